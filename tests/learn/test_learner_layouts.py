"""Every parallel layout computes what one rank computes; checkpoints and weights move between layouts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_ranks import Place, Ranks
from learner_reference import learner_config, make_trees, relative_distance, save_tiny_model, train
from safetensors.torch import load_file
from test_learner_equality import hf_gradients, open_trainer
from test_learner_state import STEP, weights_of

from system.config import Config, PartConfig
from system.learn.checkpoint import MANIFEST

Layouts = Sequence[dict[str, Any]]

# Trees cut to 48 tokens make several micro-batches of unequal length; 256 leaves fewer than there are stages.
MANY, FEW = {"micro_tokens": 48}, {"micro_tokens": 256}
WEIGHED = {"correction": PartConfig("seq-tis", {"over": "mean", "normalize": True})}
SPLIT = {"distributed_optimizer": True}
HOST = {"offload": True}
LAYOUTS: Layouts = (
    {"tp": 2, "sequence_parallel": True, "recompute": "selective"} | MANY,
    {"pp": 2, "recompute": "full"} | MANY,
    {"dp": 2} | SPLIT | MANY,
    {"tp": 2, "pp": 2} | MANY,
    {"tp": 2, "dp": 2, "sequence_parallel": True} | SPLIT | MANY | WEIGHED,
    {"pp": 2, "dp": 2} | SPLIT | MANY | WEIGHED,
    {"tp": 2, "dp": 2, "sequence_parallel": True} | HOST | MANY,
    {"pp": 4} | FEW,
    {"pp": 2, "dp": 2, "trees": 1} | FEW,  # one of the pipelines has nothing to do
)
# Ratios to the policy that sampled, which are clipped from the first update on.
CLIPPED: dict[str, Any] = {"micro_tokens": 64, "objective": "ppo"} | WEIGHED
LAYOUTS_CONTEXT: Layouts = (
    {"cp": 2} | CLIPPED,
    {"tp": 2, "cp": 2, "sequence_parallel": True, "recompute": "selective"} | CLIPPED,
    {"cp": 2, "pp": 2, "recompute": "full"} | CLIPPED,
    {"cp": 2, "dp": 2} | SPLIT | CLIPPED,
    {"cp": 2, "dp": 2} | HOST | CLIPPED,
    {"cp": 4} | FEW,  # in some rows one of the ranks has nothing to score
)
# The embedding lives on the first and on the last stage.
LAYOUTS_TIED: Layouts = (
    {"tp": 2, "pp": 2, "sequence_parallel": True, "recompute": "full"} | MANY,
    {"pp": 2, "dp": 2} | SPLIT | MANY,
    {"cp": 2, "pp": 2} | CLIPPED,
    {"pp": 2} | HOST | MANY,
    {"cp": 2, "pp": 2} | HOST | CLIPPED,
)


def world_of(layout: dict[str, Any]) -> int:
    return math.prod(layout.get(name, 1) for name in ("tp", "pp", "cp", "dp"))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.fixture(scope="session")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A function (family, tied) -> directory of a tiny model with four layers, so that it has four stages."""
    made: dict[tuple[str, bool], Path] = {}

    def get(family: str, tied: bool) -> str:
        if (family, tied) not in made:
            made[family, tied] = tmp_path_factory.mktemp(f"deep-{family}-{tied}")
            save_tiny_model(made[family, tied], family, tied=tied, num_hidden_layers=4)
        return str(made[family, tied])

    return get


# ---------------------------------------------------------------------- one step in every layout


def step_case(place: Place, model: str, layout: dict[str, Any]) -> dict[str, Any]:
    """The gradient of a batch, then two optimizer steps with every kind of forward pass there is."""
    import torch.distributed as dist

    settings = dict(layout)
    count = settings.pop("trees", 5)
    config = learner_config(kl_coef=0.1, **(STEP | settings))
    trainer = open_trainer(place, config, model)
    try:
        learn = config.learn
        step, learn.lr, learn.grad_clip = (learn.lr, learn.grad_clip), 0.0, 0.0
        first = train(trainer, make_trees(1)[:count])
        # The reduced gradient is spread over the ranks under a distributed optimizer: compare its steps.
        gradient = None if learn.distributed_optimizer or learn.offload else hf_gradients(trainer)
        trainer.reset_optimizer()
        (learn.lr, learn.grad_clip), learn.updates = step, min(2, count)
        before = weights_of(trainer)
        stats = train(trainer, make_trees(2)[:count])
        after = weights_of(trainer)
        scores = trainer.logprobs(make_trees(3)[:2])
        fingerprint = torch.stack([p.detach().double().sum() for p in trainer.model.parameters()])
        copies: list[torch.Tensor] = []
        for group in (trainer.layout.cp_group, trainer.layout.dp_group):
            theirs = [torch.empty_like(fingerprint) for _ in range(group.size())]
            dist.all_gather(theirs, fingerprint, group=group)
            copies += theirs
        return {
            "gradient": gradient,
            "norm": first["grad_norm"],
            "loss": first["loss"],
            "stats": {k: v for k, v in stats.items() if not k.startswith("time_")},
            "update": {n: after[n] - before[n] for n in after},
            "scores": scores,
            "copies agree": all(torch.equal(copy, copies[0]) for copy in copies),
        }
    finally:
        trainer.close()


@pytest.mark.parametrize(
    ("family", "tied", "layouts"),
    [("qwen3", False, LAYOUTS), ("qwen2", True, LAYOUTS_TIED), ("qwen3", False, LAYOUTS_CONTEXT)],
    ids=["untied", "tied", "context"],
)
def test_every_layout_takes_the_same_step(
    ranks: Ranks, deep_model: Callable[..., str], family: str, tied: bool, layouts: Layouts
) -> None:
    model = deep_model(family, tied)
    whole: dict[str, dict[str, Any]] = {}
    for layout in layouts:
        same = ("micro_tokens", "trees", "correction", "objective")
        work = {key: layout[key] for key in same if key in layout}
        if str(work) not in whole:
            (whole[str(work)],) = ranks.run(step_case, world=1, model=model, layout=work)
        reports = ranks.run(step_case, world=world_of(layout), model=model, layout=layout)
        expected, first = whole[str(work)], reports[0]
        if first["gradient"] is not None:
            assert relative_distance(first["gradient"], expected["gradient"]) < 1e-5, layout
        assert relative_distance(first["update"], expected["update"]) < 1e-5, layout
        for report in reports:  # the same figures on every rank, whichever computed them
            assert report["loss"] == pytest.approx(expected["loss"], rel=1e-5), layout
            assert report["norm"] == pytest.approx(expected["norm"], rel=1e-5), layout
            assert report["stats"] == pytest.approx(expected["stats"], rel=1e-4, abs=1e-6), layout
            assert report["copies agree"], layout
            for mine, theirs in zip(report["scores"], expected["scores"], strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- checkpoints move between layouts


def resumable(layout: dict[str, Any], dtype: str) -> Config:
    config = learner_config(kl_coef=0.1, **(STEP | MANY | layout))
    config.model.dtype = dtype
    return config


def save_case(
    place: Place, model: str, path: str, layout: dict[str, Any], dtype: str
) -> dict[str, np.ndarray]:
    """Two steps, a checkpoint, one step more; the weights after it."""
    trainer = open_trainer(place, resumable(layout, dtype), model)
    try:
        train(trainer, make_trees(4))
        trainer.reset_optimizer()  # moves the reference model off the file's weights
        for seed in (5, 6):
            train(trainer, make_trees(seed))
        trainer.save(path, {"version": 2})
        train(trainer, make_trees(7))
        return weights_of(trainer)
    finally:
        trainer.close()


def resume_case(
    place: Place, model: str, path: str, layout: dict[str, Any], dtype: str
) -> dict[str, np.ndarray]:
    trainer = open_trainer(place, resumable(layout, dtype), model)
    try:
        train(trainer, make_trees(11))  # state that loading must replace
        assert trainer.load(path) == {"version": 2}
        assert trainer.step_count == 2
        train(trainer, make_trees(7))
        return weights_of(trainer)
    finally:
        trainer.close()


@pytest.mark.parametrize(
    ("family", "tied", "dtype", "written", "read"),
    [
        ("qwen3", False, "float32", {"tp": 2, "pp": 2}, [{"tp": 1}, {"pp": 2, "dp": 2} | SPLIT]),
        ("qwen2", True, "float32", {"pp": 2, "dp": 2} | SPLIT, [{"tp": 2, "dp": 2} | SPLIT, {"dp": 2}]),
        ("qwen3", False, "float32", {"cp": 2, "dp": 2} | SPLIT, [{"cp": 2}, {"dp": 2} | SPLIT]),
        ("qwen3", False, "float32", {"cp": 2}, [{"cp": 2, "pp": 2} | SPLIT]),
        # Float32 parameters are kept beside the bfloat16 ones, and come back.
        ("qwen2", True, "bfloat16", {"pp": 2, "dp": 2} | SPLIT, [{"tp": 2, "pp": 2}, {"tp": 2} | HOST]),
        ("qwen3", False, "bfloat16", {"tp": 2} | HOST, [{"tp": 2}, {"dp": 2} | HOST, {"cp": 2} | HOST]),
        ("qwen3", False, "bfloat16", {"cp": 2, "dp": 2} | HOST, [{"cp": 2} | SPLIT]),
    ],
)
def test_a_run_resumes_under_another_layout(
    ranks: Ranks,
    deep_model: Callable[..., str],
    tmp_path: Path,
    family: str,
    tied: bool,
    dtype: str,
    written: dict[str, Any],
    read: Layouts,
) -> None:
    places: dict[str, Any] = {"model": deep_model(family, tied), "path": str(tmp_path / "checkpoint")}
    places["dtype"] = dtype
    went_on = ranks.run(save_case, world=world_of(written), layout=written, **places)[0]
    same = ranks.run(resume_case, world=world_of(written), layout=written, **places)[0]
    for name, value in went_on.items():
        np.testing.assert_array_equal(same[name], value, err_msg=name)  # bit for bit
    for layout in read:
        resumed = ranks.run(resume_case, world=world_of(layout), layout=layout, **places)[0]
        assert relative_distance(resumed, went_on) < (1e-6 if dtype == "float32" else 3e-3), layout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_bfloat16_trains_and_resumes_on_cuda(
    ranks: Ranks, deep_model: Callable[..., str], tmp_path: Path, recompute: str
) -> None:
    """Bfloat16 parameters, float32 gradients and optimizer state, split over one rank."""
    places: dict[str, Any] = {"model": deep_model("qwen3", True), "path": str(tmp_path / "checkpoint")}
    places |= {"dtype": "bfloat16", "layout": SPLIT | {"recompute": recompute}, "deadline_s": 170}
    (went_on,) = ranks.run(save_case, world=1, **places)
    (resumed,) = ranks.run(resume_case, world=1, **places)
    assert relative_distance(resumed, went_on) < 1e-3


def zero_step_case(place: Place, model: str, path: str, layout: dict[str, Any], dtype: str) -> None:
    config = learner_config(**layout)
    config.model.dtype = dtype
    trainer = open_trainer(place, config, model)
    try:
        trainer.save(path, {})
    finally:
        trainer.close()


def export_case(place: Place, model: str, path: str, out: str, dtype: str) -> None:
    config = learner_config()
    config.model.dtype = dtype
    trainer = open_trainer(place, config, model)
    try:
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.fill_(7.0)  # what is exported must come from the checkpoint
        trainer.load(path)
        trainer.save_hf(out)
    finally:
        trainer.close()


@pytest.mark.parametrize(
    ("family", "tied", "dtype", "layout"),
    [
        ("qwen3", False, "float32", {"tp": 2, "pp": 2}),
        ("qwen2", True, "bfloat16", {"tp": 2, "pp": 2}),
        ("qwen3", True, "bfloat16", {"pp": 2, "dp": 2} | SPLIT),
    ],
)
def test_a_zero_step_run_exports_its_source_bit_for_bit(
    ranks: Ranks, tmp_path: Path, family: str, tied: bool, dtype: str, layout: dict[str, Any]
) -> None:
    source, path, out = tmp_path / "source", tmp_path / "checkpoint", tmp_path / "out"
    save_tiny_model(source, family, tied=tied, num_hidden_layers=4, dtype=getattr(torch, dtype))
    places: dict[str, Any] = {"model": str(source), "path": str(path), "dtype": dtype}
    ranks.run(zero_step_case, world=4, layout=layout, **places)
    ranks.run(export_case, world=1, out=str(out), **places)
    given, exported = tensors_of(source), tensors_of(out)
    assert exported.keys() == given.keys()
    for name, tensor in given.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(exported[name], tensor), name


def refused_case(place: Place, model: str, path: str) -> str:
    """What loading says on this rank; the weights must be as before."""
    from system.learn.checkpoint import CheckpointError

    trainer = open_trainer(place, learner_config(tp=2), model)
    try:
        before = weights_of(trainer)
        with pytest.raises(CheckpointError) as error:
            trainer.load(path)
        for name, value in weights_of(trainer).items():
            np.testing.assert_array_equal(value, before[name])
        return str(error.value)
    finally:
        trainer.close()


def test_a_checkpoint_that_cannot_be_right_is_refused_on_every_rank(
    ranks: Ranks, deep_model: Callable[..., str], tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    path, model = tmp_path / "checkpoint", deep_model("qwen3", False)
    layout = {"tp": 2}
    ranks.run(zero_step_case, world=2, model=model, path=str(path), layout=layout, dtype="float32")

    def refused(by: str) -> str:
        first, second = ranks.run(refused_case, world=2, model=by, path=str(path))
        assert first == second
        return first

    assert "has shape" in refused(tiny_model("qwen2", tied=True))
    data = path / "__1_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert "__1_0.distcp is damaged" in refused(model)
    data.unlink()
    assert "__1_0.distcp is missing" in refused(model)
    (path / MANIFEST).write_text("[" * 100_000)
    assert f"{MANIFEST} is damaged: RecursionError" in refused(model)
    (path / MANIFEST).write_text('{"step": 2, "extra": {}, "files": {}}')
    assert f"{MANIFEST} is damaged" in refused(model)


# ---------------------------------------------------------------------- never whole in one process


def traced_peak(work: Callable[[], None], trace: Path, mapped: set[int]) -> int:
    """Most bytes held at once by tensors and Python objects that ``work`` allocated.

    ``mapped``: sizes of files; torch reports mapping one into memory as an allocation, which it is not.
    """
    import tracemalloc

    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
        pass  # its own imports are not counted
    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            work()
            _, after = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        if abs(event["args"]["Bytes"]) not in mapped:
            held += event["args"]["Bytes"]
            peak = max(peak, held)
    return peak + after - before


def memory_case(place: Place, model: str, out: str, bucket: int) -> dict[str, int]:
    from system.learn import weights

    trainer = open_trainer(place, learner_config(tp=2), model)
    try:
        trace = Path(out).with_name(f"trace-{place.rank}.json")
        layout = trainer.layout
        mapped = {file.stat().st_size for file in Path(model).glob("*.safetensors")}

        def read() -> None:
            weights.load(trainer.model, layout, model)

        def export() -> None:
            for tensors in weights.Export(trainer.model, layout, bucket).buckets():
                tensors.clear()

        def save() -> None:
            weights.save_hf(trainer.model, layout, Path(out), model, file_bytes=bucket)

        plan = weights.Export(trainer.model, layout, bucket).plan
        return {
            "model": sum(place.numel * 4 for group in plan for place in group),
            "largest": max(place.numel * 4 for group in plan for place in group),
            "read": traced_peak(read, trace, mapped),
            "export": traced_peak(export, trace, mapped),
            "save": traced_peak(save, trace, mapped),
        }
    finally:
        trainer.close()


def test_a_model_is_never_whole_in_one_process(ranks: Ranks, tmp_path: Path) -> None:
    """Reading holds a slice, exporting a bucket, a parameter and a shard, however many layers there are."""
    source, out, bucket = tmp_path / "source", tmp_path / "out", 1 << 20
    shape: dict[str, Any] = {
        "num_hidden_layers": 32,
        "hidden_size": 128,
        "intermediate_size": 512,
        "vocab_size": 1024,
    }
    save_tiny_model(source, "qwen3", tied=False, file_size="5MB", **shape)
    for peak in ranks.run(memory_case, world=2, model=str(source), out=str(out), bucket=bucket):
        assert peak["model"] > 30 * bucket
        assert peak["read"] < peak["largest"]
        assert peak["export"] < bucket + peak["largest"]
        assert peak["save"] < bucket + peak["largest"]
    assert len(list(out.glob("model-*.safetensors"))) > 30
    given, exported = tensors_of(source), tensors_of(out)
    assert exported.keys() == given.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in given.items())
