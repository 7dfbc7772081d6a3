"""Adapters against PEFT on Hugging Face's model: loss, gradient, steps, files; and what stands still."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import as_in_files
from learner_ranks import Place, Ranks
from learner_reference import (
    credit_of,
    flat_loss,
    learner_config,
    load_hf,
    make_trees,
    path_logprobs,
    path_tokens,
    relative_distance,
    supervise,
    train,
)
from test_learner_equality import open_trainer

from system.config import LoraConfig
from system.learn.extract import extract, extract_adapters
from system.learn.lora import drawn
from system.models.adapter import Adapter, AdapterError, read_adapter
from system.models.shape import ModelShape

RANK, ALPHA = 4, 8.0
ALL = ["q", "k", "v", "o", "gate", "up", "down"]
MODULES = {name: f"{name}_proj" for name in ALL}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp1, full": {"recompute": "full"},
    "tp2": {"tp": 2},
    "tp2, sp, selective": {"tp": 2, "sequence_parallel": True, "recompute": "selective"},
    "tp2, sp, full": {"tp": 2, "sequence_parallel": True, "recompute": "full"},
    "pp2, full": {"pp": 2, "recompute": "full"},
    "cp2": {"cp": 2},
    "dp2": {"dp": 2, "distributed_optimizer": True},
    "dp2, offload": {"dp": 2, "offload": True},
}
ATTENTION = ["q", "k", "v", "o"]
EP2: dict[str, Any] = {"dp": 2, "ep": 2}
OF_EXPERTS: dict[str, dict[str, Any]] = {
    "ep2": EP2,
    "ep2, full, offload": EP2 | {"recompute": "full", "offload": True},
    "ep2, distributed": EP2 | {"distributed_optimizer": True},
    "ep2 with tp2": {"tp": 2, "sequence_parallel": True, "ep": 2},
    "ep2 with cp2": {"cp": 2, "ep": 2, "recompute": "selective"},
}
WORK: dict[str, Any] = {
    "objective": "ppo", "micro_tokens": 64, "lr": 1e-2, "grad_clip": 0.5, "weight_decay": 0.1, "eps": 1e-5,
    "kl_coef": 0.1,
}  # fmt: skip


def lora(targets: list[str] | None = None, init: str = "") -> LoraConfig:
    return LoraConfig(rank=RANK, alpha=ALPHA, targets=targets or ALL, init=init)


def wanted(targets: list[str]) -> Adapter:
    return Adapter(RANK, ALPHA, lora(targets).parts(experts=False))


def shape_of(model: str) -> ModelShape:
    return ModelShape.from_directory(model)


def peft_model(model: str, targets: list[str]) -> Any:
    """PEFT's adapters on Hugging Face's model; both factors of each are random."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    modules = [MODULES[target] for target in targets]
    config = PeftConfig(
        r=RANK, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules=modules, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(load_hf(model), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                scale = 0.1 if "lora_B" in name else parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return adapted


def trained(adapted: Any) -> dict[str, torch.nn.Parameter]:
    return {
        name.replace(".default", ""): one for name, one in adapted.named_parameters() if one.requires_grad
    }


def numbers(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}


# ---------------------------------------------------------------------- equality


def lora_case(
    place: Place, model: str, layout: dict[str, Any], targets: list[str], init: str
) -> dict[str, Any]:
    """Three steps; the loss and the clipped gradient of the first, all norms, and the adapters at the end."""
    from system.learn.weights import Export

    trainer = open_trainer(place, learner_config(**(WORK | layout), lora=lora(targets, init)), model)
    try:
        before = {
            key: one.detach().clone()
            for key, one in trainer.model.named_parameters()
            if not one.requires_grad
        }
        scores = trainer.logprobs(make_trees(0))
        export, reports, gradient = Export(trainer.model, trainer.layout, 1 << 20, adapters=True), [], {}
        for step in range(3):
            reports.append(train(trainer, make_trees(1 + step)))
            split = trainer.learn.offload or trainer.learn.distributed_optimizer
            if step == 0 and not split:  # else each rank has a share of the sum
                own = {
                    key: one.main_grad for key, one in trainer.model.named_parameters() if one.requires_grad
                }
                for mapped in (mapped for bucket in export.plan for mapped in bucket):
                    gradient |= export.gather(mapped, own.get(mapped.key))
        merged: dict[str, torch.Tensor] = {}
        for bucket in trainer.export():
            merged |= bucket
        parameters = dict(trainer.model.named_parameters())
        learning = [one for one in parameters.values() if one.requires_grad]
        return {
            "scores": scores,
            "reports": reports,
            "gradient": numbers(gradient),
            "adapters": exported(trainer),
            "merged": numbers(merged),
            "of all ranks": all(getattr(one, "allreduce", True) for one in learning),
            "still": all(torch.equal(one, parameters[key]) for key, one in before.items()),
            "states": sum(one.numel() for one in learning),
            "held": sum(
                part.values.numel()
                for one in learning
                for part in trainer.optimizer.slices(one, mine=True)
                if part.kind == "exp_avg"
            ),
        }
    finally:
        trainer.close()


@cache
def peft_reference(model: str, targets: tuple[str, ...], init: str) -> dict[str, Any]:
    """The same by PEFT, path by path; its adapters at the beginning are left in ``init``."""
    adapted = peft_model(model, [*targets])
    adapted.save_pretrained(init)
    begun = copy.deepcopy(adapted)
    parameters = trained(adapted)
    config = learner_config(**WORK)
    optimizer = torch.optim.AdamW(
        [*parameters.values()], lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1
    )
    losses, norms, gradient = [], [], {}
    for step in range(3):
        trees = make_trees(1 + step)
        optimizer.zero_grad()
        loss = flat_loss(adapted, trees, *credit_of(trees, config), config.learn, reference=begun)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([*parameters.values()], 0.5)))
        losses.append(float(loss))
        if step == 0:
            gradient = {
                name: one.grad.numpy().copy() for name, one in parameters.items() if one.grad is not None
            }
        optimizer.step()
    adapters = numbers(parameters)
    merged = as_in_files(adapted.merge_and_unload().state_dict())
    return {
        "losses": losses,
        "norms": norms,
        "gradient": gradient,
        "adapters": adapters,
        "merged": numbers(merged),
    }


def assert_equals_peft(reports: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    first = reports[0]
    for report in reports:
        assert [one["loss"] for one in report["reports"]] == pytest.approx(expected["losses"], rel=1e-4)
        assert [one["grad_norm"] for one in report["reports"]] == pytest.approx(expected["norms"], rel=1e-4)
        assert report["still"]
        assert report["of all ranks"], "none is reduced over the ranks of the same experts alone"
    if first["gradient"]:
        assert relative_distance(first["gradient"], expected["gradient"]) < 1e-5
    assert relative_distance(first["adapters"], expected["adapters"]) < 1e-4
    norm = np.sqrt(sum(float((one.astype(np.float64) ** 2).sum()) for one in expected["adapters"].values()))
    assert first["reports"][-1]["weight_norm"] == pytest.approx(norm, rel=1e-4)  # of what is trained
    merged = {name: expected["merged"][name] for name in first["merged"]}
    assert relative_distance(first["merged"], merged) < 1e-5
    assert sum(report["held"] for report in reports) >= sum(one.size for one in expected["adapters"].values())
    assert first["held"] <= first["states"]


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_adapters_learn_as_by_peft(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory, layout: str
) -> None:
    model = tiny_model("qwen3")
    expected, init = started(tmp_path_factory, model, ALL)
    world = 1 if layout.startswith("tp1") else 2
    reports = ranks.run(
        lora_case, world=world, model=model, layout=LAYOUTS[layout], targets=ALL, init=init, deadline_s=170
    )
    assert_equals_peft(reports, expected)


@pytest.mark.parametrize(
    ("family", "tied", "targets", "layout"),
    [
        ("qwen2", True, ALL, "pp2, full"),
        ("qwen2", False, ["q", "v"], "tp2, sp, selective"),
        ("llama", False, ["k", "down"], "tp2"),
        ("mistral", True, ["up", "o"], "tp1"),
        *(("qwen3_moe", True, ATTENTION, name) for name in ("tp1, full", "tp2, sp, selective", "pp2, full")),
        *(("qwen3_moe", True, ATTENTION, name) for name in OF_EXPERTS),
    ],
)
def test_of_every_family_and_of_some_projections_only(
    ranks: Ranks,
    tiny_model: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    tied: bool,
    targets: list[str],
    layout: str,
) -> None:
    model = tiny_model(family, tied=tied)
    expected, init = started(tmp_path_factory, model, targets)
    world = 1 if layout.startswith("tp1") else 2
    reports = ranks.run(
        lora_case, world=world, model=model, layout=(LAYOUTS | OF_EXPERTS)[layout], targets=targets, init=init
    )
    assert_equals_peft(reports, expected)


_STARTED: dict[tuple[str, tuple[str, ...]], str] = {}


def started(factory: pytest.TempPathFactory, model: str, targets: list[str]) -> tuple[dict[str, Any], str]:
    """PEFT's run, made once, and where the adapters lie that it began with."""
    key = (model, tuple(targets))
    if key not in _STARTED:
        _STARTED[key] = str(factory.mktemp("peft"))
    return peft_reference(*key, _STARTED[key]), _STARTED[key]


# ---------------------------------------------------------------------- where they begin


def begin_case(place: Place, model: str, layout: dict[str, Any]) -> dict[str, Any]:
    """The policy of a new run, and its adapters if it has some."""
    trainer = open_trainer(place, learner_config(**layout), model)
    try:
        adapters = exported(trainer) if trainer.learn.lora.on else {}
        return {"adapters": adapters, "scores": trainer.logprobs(make_trees(0))}
    finally:
        trainer.close()


def test_a_run_begins_at_the_model_itself_and_alike_under_every_layout(
    ranks: Ranks, tiny_model: Callable[..., str]
) -> None:
    begun: list[dict[str, Any]] = []
    for world, layout in ((1, {}), (2, {"tp": 2, "sequence_parallel": True})):
        plain, adapted = (
            ranks.run(begin_case, world=world, model=tiny_model("qwen3"), layout=layout | extra)[0]
            for extra in ({}, {"lora": lora()})
        )
        for before, after in zip(plain["scores"], adapted["scores"], strict=True):
            np.testing.assert_array_equal(before, after)
        begun.append(adapted["adapters"])
    assert begun[0].keys() == begun[1].keys() == wanted(ALL).tensors(shape_of(tiny_model("qwen3"))).keys()
    for name, tensor in begun[0].items():
        np.testing.assert_array_equal(tensor, begun[1][name])
        assert tensor.any() == (".lora_A." in name)


def test_a_is_drawn_as_by_peft() -> None:
    """In distribution: uniform within 1/√in; another tensor, and another seed, draw other numbers."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    size, model = (64, 4096), torch.nn.Sequential(torch.nn.Linear(4096, 8))
    peft = get_peft_model(model, PeftConfig(r=64, target_modules=["0"]))
    theirs = next(one for name, one in peft.named_parameters() if "lora_A" in name).detach()
    ours = drawn("a.lora_A.weight", size, 0)
    assert ours.abs().max() <= 4096**-0.5
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.01)
    assert float(ours.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=0.01)
    assert torch.equal(ours, drawn("a.lora_A.weight", size, 0))
    assert not torch.equal(ours, drawn("b.lora_A.weight", size, 0))
    assert not torch.equal(ours, drawn("a.lora_A.weight", size, 1))


def reference_case(place: Place, model: str, layout: dict[str, Any]) -> dict[str, Any]:
    """KL to the reference: of a fresh run, after steps, and where reinforcement learning begins anew."""
    settings = WORK | layout | {"lr": 1e-2}
    trainer = open_trainer(place, learner_config(**settings, lora=lora()), model)
    try:
        kls = [train(trainer, make_trees(1))["reference_kl"], train(trainer, make_trees(1))["reference_kl"]]
        supervise(trainer, make_trees(1), 1e-2)
        trainer.reset_optimizer()
        kls.append(train(trainer, make_trees(1))["reference_kl"])
        return {
            "kls": kls,
            "models": sum(isinstance(one, type(trainer.model)) for one in vars(trainer).values()),
        }
    finally:
        trainer.close()


def test_the_reference_is_the_model_without_a_second_copy(
    ranks: Ranks, tiny_model: Callable[..., str]
) -> None:
    for layout, world in (({}, 1), ({"pp": 2, "recompute": "full"}, 2)):
        for report in ranks.run(reference_case, world=world, model=tiny_model("qwen3"), layout=layout):
            fresh, moved, anew = report["kls"]
            assert fresh == pytest.approx(0, abs=1e-7)
            assert moved > 1e-4
            assert anew == pytest.approx(0, abs=1e-7)
            assert report["models"] == 1


# ---------------------------------------------------------------------- files, checkpoints


PLAIN = LoraConfig(rank=RANK, alpha=ALPHA)  # on all projections that the model has for it
SAVED = {"qwen3": ("tp2, sp, full", ALL), "qwen3_moe": ("ep2", ATTENTION)}  # the layout, and all it has


def saved_case(place: Place, model: str, path: str, layout: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint after two steps, the files of that moment, and the adapters one step on."""
    trainer = open_trainer(place, learner_config(**(WORK | layout), lora=PLAIN), model)
    try:
        for seed in (4, 5):
            train(trainer, make_trees(seed))
        trainer.save(Path(path) / "v2", {"version": 2})
        trainer.saved()
        trainer.save_hf(Path(path) / "merged")
        trainer.save_adapters(Path(path) / "adapters", "the-model")
        scores = trainer.logprobs(make_trees(0))
        return {
            "scores": scores,
            "kl": train(trainer, make_trees(6))["reference_kl"],
            "next": exported(trainer),
        }
    finally:
        trainer.close()


def resumed_case(place: Place, model: str, path: str, layout: dict[str, Any]) -> dict[str, Any]:
    trainer = open_trainer(place, learner_config(**(WORK | layout), lora=PLAIN), model)
    try:
        train(trainer, make_trees(9))  # state that loading must replace
        trainer.reset_optimizer()
        trainer.load(Path(path) / "v2")
        steps = trainer.step_count
        kl = train(trainer, make_trees(6))["reference_kl"]
        return {"steps": steps, "kl": kl, "next": exported(trainer)}
    finally:
        trainer.close()


def exported(trainer: Any) -> dict[str, np.ndarray]:
    adapters: dict[str, torch.Tensor] = {}
    for bucket in trainer.export(adapters=True):
        adapters |= bucket
    return numbers(adapters)


Saved = Callable[[str], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tiny_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Of a family: where its files lie, and the report; made once."""

    @cache
    def of(family: str) -> tuple[Path, dict[str, Any]]:
        path, layout = tmp_path_factory.mktemp("saved"), (LAYOUTS | OF_EXPERTS)[SAVED[family][0]]
        case = {"model": tiny_model(family), "path": str(path), "layout": layout}
        return path, ranks.run(saved_case, world=2, **case)[0]

    return of


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *(("qwen3", layout) for layout in ("tp2, sp, full", "tp1", "pp2, full", "dp2, offload")),
        *(("qwen3_moe", layout) for layout in ("ep2", "tp1", "ep2 with tp2")),
    ],
)
def test_a_checkpoint_has_the_adapters_alone_and_any_layout_goes_on_from_it(
    ranks: Ranks, tiny_model: Callable[..., str], saved: Saved, family: str, layout: str
) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    path, went_on = saved(family)
    own, targets = SAVED[family]
    model, world = tiny_model(family), 1 if layout == "tp1" else 2
    case = {"model": model, "path": str(path), "layout": (LAYOUTS | OF_EXPERTS)[layout]}
    report = ranks.run(resumed_case, world=world, **case)[0]
    assert report["steps"] == 2
    assert report["kl"] == pytest.approx(went_on["kl"], rel=1e-4)
    for name, tensor in went_on["next"].items():
        if layout == own:
            np.testing.assert_array_equal(report["next"][name], tensor)
        np.testing.assert_allclose(report["next"][name], tensor, rtol=0, atol=1e-5)
    held = FileSystemReader(path / "v2").read_metadata().state_dict_metadata
    names = wanted(targets).tensors(shape_of(model))
    kinds = ("parameter", "exp_avg", "exp_avg_sq", "reference")
    assert held.keys() == {"rng"} | {f"{kind}/{name}" for kind in kinds for name in names}


@pytest.mark.parametrize("family", list(SAVED))
def test_peft_reads_our_files_and_they_say_what_the_merged_model_says(
    tiny_model: Callable[..., str], saved: Saved, family: str
) -> None:
    from peft import PeftModel

    path, report = saved(family)
    adapted = PeftModel.from_pretrained(load_hf(tiny_model(family)), path / "adapters")
    merged = load_hf(path / "merged")
    with torch.no_grad():
        for tree, mine in zip(make_trees(0), report["scores"], strict=True):
            for leaf in range(tree.n_leaves):
                index = path_tokens(tree, leaf)
                for model in (adapted, merged):
                    found, _ = path_logprobs(model, tree.tokens[index])
                    np.testing.assert_allclose(mine[index][1:], found.numpy(), rtol=0, atol=1e-4)
    config = json.loads((path / "adapters" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "the-model"
    assert sorted(config["target_modules"]) == sorted(MODULES[target] for target in SAVED[family][1])


@pytest.mark.parametrize("family", list(SAVED))
def test_a_checkpoint_is_exported_merged_or_as_adapters(
    tiny_model: Callable[..., str], saved: Saved, tmp_path: Path, family: str
) -> None:
    path, _ = saved(family)
    model, adapter = tiny_model(family), wanted(SAVED[family][1])
    extract(path / "v2", model, tmp_path / "merged", torch.float32, adapter=adapter, file_bytes=1 << 15)
    assert len([*(tmp_path / "merged").glob("*.safetensors")]) > 3
    found, expected = (load_hf(one / "merged").state_dict() for one in (tmp_path, path))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    extract_adapters(path / "v2", model, tmp_path / "adapters", torch.float32, adapter, "the-model")
    files = [one / "adapters" / "adapter_config.json" for one in (tmp_path, path)]
    assert files[0].read_text() == files[1].read_text()
    ours = read_adapter(tmp_path / "adapters", shape_of(model), adapter)
    theirs = read_adapter(path / "adapters", shape_of(model), adapter)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_adapters_that_do_not_fit_are_refused_by_name(
    tiny_model: Callable[..., str], saved: Saved, tmp_path: Path
) -> None:
    path, shape = saved("qwen3")[0] / "adapters", shape_of(tiny_model("qwen3"))

    def refused(says: str, adapter: Adapter | None = None, name: str = "a") -> None:
        with pytest.raises(AdapterError, match=says):
            read_adapter(tmp_path / name, shape, adapter or wanted(ALL))

    def changed(**values: Any) -> None:
        shutil.copytree(path, tmp_path / "a", dirs_exist_ok=True)
        file = tmp_path / "a" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    refused("adapter_config.json is missing", name="none")
    changed()
    refused("learn.lora.rank of these adapters is 4, not 8: set it so", replace(wanted(ALL), rank=8))
    refused("learn.lora.alpha of these adapters is 8.0, not 16", replace(wanted(ALL), alpha=16.0))
    refused("learn.lora.targets of these adapters is", wanted(["q"]))
    for key, value, why in (
        ("use_dora", True, "DoRA's magnitudes"),
        ("use_rslora", True, "not by alpha / √rank"),
        ("rank_pattern", {"q_proj": 2}, "the same rank"),
        ("bias", "all", "biases that were trained"),
        ("peft_type", "ADALORA", "another method than LoRA"),
        *(
            ("init_lora_weights", name, "a base model whose weights it has changed")
            for name in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica", "tomorrow")
        ),
        ("alora_invocation_tokens", [1, 2], "begin at certain tokens"),
        ("exclude_modules", ["q_proj"], "list those that have adapters"),
        ("use_bdlora", {"rank": 2}, "a way of PEFT's that is not known here"),
        ("of_tomorrow", 1, "a way of PEFT's that is not known here"),
    ):
        changed(**{key: value})
        refused(f"{key}=.* is not computed here: .*{why}")
        changed(**{key: None if key != "peft_type" else "LORA"})
        read_adapter(tmp_path / "a", shape, wanted(ALL))
    for key, value in (
        ("init_lora_weights", "gaussian"),
        ("lora_dropout", 0.1),
        ("peft_version", "9.9"),
        ("of_tomorrow", False),
    ):
        changed(**{key: value})
        read_adapter(tmp_path / "a", shape, wanted(ALL))
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"x")
    refused("cannot be read")
    with pytest.raises(AdapterError, match=r"no place for .*layers\.1"):
        read_adapter(path, replace(shape, layers=1), wanted(ALL))
