"""What the trainer keeps and hands on: checkpoints, Hugging Face directories; and what it refuses."""

from __future__ import annotations

import errno
import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from learner_ranks import Place, Ranks
from learner_reference import (
    learner_config,
    load_hf,
    make_tree,
    make_trees,
    pack_whole,
    path_logprobs,
    path_tokens,
    save_tiny_model,
    train,
)
from test_learner_equality import open_trainer
from test_tree_is_its_paths import answered

from system.config import ConfigError, PartConfig
from system.learn.credit.gain import clip_scale
from system.learn.parallel import start
from system.tree.record import Kind
from system.tree.stats import TreeStats

# A large eps: Adam divides by the gradient, and where that is rounding noise a small eps makes it ±lr.
STEP: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "grad_clip": 1.0, "eps": 1e-4}


def weights_of(trainer: Any) -> dict[str, np.ndarray]:
    return {n: t.float().numpy() for bucket in trainer.export() for n, t in bucket.items()}


# ---------------------------------------------------------------------- checkpoints


def save_case(place: Place, model: str, path: str, **layout: Any) -> dict[str, Any]:
    """Save before any step and after two; go on for one more."""
    config = learner_config(**layout, kl_coef=0.1, **STEP)
    trainer = open_trainer(place, config, model)
    try:
        fresh = Path(path).with_name("fresh")
        trainer.save(fresh, {"version": 0})
        train(trainer, make_trees(4))
        trainer.reset_optimizer()  # moves the reference model off the file's weights
        for seed in (5, 6):
            train(trainer, make_trees(seed))
        trainer.save(path, {"version": 2, "note": "ü"})
        trainer.save(path, {"version": 3, "note": "ü"})  # replaces
        draw = torch.rand(3).tolist()
        stats = train(trainer, make_trees(7))  # while it is written
        # Untouched by everything since: the checkpoint from before the first step.
        after = weights_of(trainer)
        trainer.load(fresh)
        train(trainer, make_trees(4))
        return {"weights": after, "loss": stats["loss"], "draw": draw, "restarted": weights_of(trainer)}
    finally:
        trainer.close()


def load_case(place: Place, model: str, path: str, **layout: Any) -> dict[str, Any]:
    config = learner_config(**layout, kl_coef=0.1, **STEP)
    config.run.seed = 17
    trainer = open_trainer(place, config, model)
    try:
        train(trainer, make_trees(11))  # state that loading must replace
        extra = trainer.load(Path(path))
        draw, steps = torch.rand(3).tolist(), trainer.step_count
        stats = train(trainer, make_trees(7))
        resumed = weights_of(trainer)
        trainer.load(Path(path).with_name("fresh"))
        train(trainer, make_trees(4))
        return {
            "weights": resumed,
            "loss": stats["loss"],
            "draw": draw,
            "extra": extra,
            "steps": steps,
            "restarted": weights_of(trainer),
        }
    finally:
        trainer.close()


def test_checkpoint_resumes_exactly_and_under_another_layout(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    went_on = ranks.run(save_case, world=2, model=tiny_model(), path=str(path), tp=2)[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "fresh"]  # nothing half-written
    same = ranks.run(load_case, world=2, model=tiny_model(), path=str(path), tp=2)[0]
    other = ranks.run(load_case, world=1, model=tiny_model(), path=str(path), tp=1)[0]
    for resumed in (same, other):
        assert resumed["extra"] == {"version": 3, "note": "ü"}
        assert resumed["steps"] == 2
        assert resumed["draw"] == went_on["draw"]
    assert same["loss"] == went_on["loss"]
    for name, value in went_on["weights"].items():
        np.testing.assert_array_equal(same["weights"][name], value, err_msg=name)  # bit for bit
        np.testing.assert_allclose(other["weights"][name], value, rtol=0, atol=1e-5, err_msg=name)
    for name, value in went_on["restarted"].items():
        np.testing.assert_array_equal(same["restarted"][name], value, err_msg=name)
        np.testing.assert_allclose(other["restarted"][name], value, rtol=0, atol=1e-5, err_msg=name)


def full_disk_case(place: Place, model: str, path: str) -> list[tuple[int | None, str]]:
    """The errors of a checkpoint and of a model that the disk does not take: here, no file above 8 kB."""
    trainer = open_trainer(place, learner_config(), model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    found: list[tuple[int | None, str]] = []
    try:
        for write in (lambda: trainer.save(path, {}) or trainer.saved(), lambda: trainer.save_hf(path)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
            try:
                write()
            except OSError as error:
                found.append((error.errno, error.filename))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return found
    finally:
        trainer.close()


def test_a_full_disk_is_an_error_of_the_disk_that_names_the_place(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    """Torch and safetensors call it a RuntimeError and a SafetensorError."""
    path = str(tmp_path / "v1")
    found = ranks.run(full_disk_case, world=1, model=tiny_model(), path=path)
    partial = f"{path}.partial"
    assert found[0] == [(errno.EFBIG, partial), (errno.EFBIG, f"{partial}/model.safetensors")]
    assert not Path(path).exists()


def harmed_case(place: Place, model: str, path: str) -> dict[str, str]:
    """What loading says of a checkpoint whose manifest is harmed in one way or another; then it is loaded."""
    from system.learn.checkpoint import MANIFEST, CheckpointError

    trainer, manifest = open_trainer(place, learner_config(), model), Path(path) / MANIFEST
    try:
        train(trainer, make_trees(4))
        trainer.save(path, {"version": 12, "nan": math.nan, "by number": {1: (2, 3)}})
        trainer.saved()
        whole = manifest.read_text()
        keys: dict[str, Any] = json.loads(whole)
        old = {name: value for name, value in keys.items() if name != "digest"}  # as it was written before
        files = {name: digest for name, digest in keys["files"].items() if name != ".metadata"}
        said: dict[str, str] = {}
        for what, text in {
            "digit": whole.replace('"version": 12', '"version": 13'),
            "step": whole.replace('"step": 1', '"step": 3'),
            "no plan": json.dumps(old | {"files": files}),
            "plan alone": json.dumps(old | {"files": {".metadata": keys["files"][".metadata"]}}),
            "negative": json.dumps(old | {"step": -4}),
            "fraction": json.dumps(old | {"step": 1.7}),
            "list": "[1, 2]",
        }.items():
            assert text != whole
            manifest.write_text(text)
            with pytest.raises(CheckpointError) as error:
                trainer.load(path)
            said[what] = str(error.value)
        manifest.write_text(json.dumps(old))
        trainer.load(path)
        manifest.write_text(whole)
        trainer.load(path)
        with patch("torch.load", side_effect=OSError(errno.EIO, "Input/output error")):
            with pytest.raises(CheckpointError) as error:
                trainer.load(path)
            said["read"] = str(error.value)
        return said
    finally:
        trainer.close()


def test_a_manifest_is_proved_as_the_files_are(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    (said,) = ranks.run(harmed_case, world=1, model=tiny_model(), path=str(path))
    assert "it cannot be read: [Errno 5]" in said.pop("read")
    for what, message in said.items():
        assert message.startswith(f"{path}: manifest.json is damaged: "), what
    assert "its digest is another" in said["digit"]
    assert "its digest is another" in said["step"]


def average_teacher_case(place: Place, model: str, path: str) -> dict[str, Any]:
    """Self-distillation: what the average says before and after a step, and of which weights it is."""
    config = learner_config(credit="none", **(STEP | {"grad_clip": 0.0}))
    config.learn.teacher, config.learn.teacher_decay = "average", 0.5
    trainer = open_trainer(place, config, model)
    try:
        first = weights_of(trainer)
        said = [train(trainer, make_trees(4))["teacher_kl"]]
        with torch.no_grad():  # alone it would stay where it is
            for parameter in trainer.model.parameters():
                parameter.mul_(1.5)
        said.append(train(trainer, make_trees(4))["teacher_kl"])
        second = weights_of(trainer)
        trainer.save(path, {})
        trainer.saved()
        assert trainer.beside.teacher is not None
        kept, weight = (
            [p.clone() for p in trainer.beside.teacher.model.parameters()],
            trainer.beside.teacher.weight,
        )
        train(trainer, make_trees(5))
        trainer.load(path)
        again = [*trainer.beside.teacher.model.parameters()]
        model_now, trainer.model = trainer.model, trainer.beside.teacher.model
        taught = weights_of(trainer)
        trainer.model = model_now
        expected = {n: (first[n] * 0.75 + second[n]) / 1.75 for n in first}  # β² + β, and 1
        return {
            "said": said,
            "error": max(float(np.abs(taught[n] - expected[n]).max()) for n in expected),
            "moved": max(float(np.abs(second[n] - first[n]).max()) for n in expected),
            "loaded": all(torch.equal(a, b) for a, b in zip(kept, again, strict=True)),
            "weight": (weight, trainer.beside.teacher.weight),
        }
    finally:
        trainer.close()


def test_an_average_of_the_weights_teaches_them(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    (found,) = ranks.run(average_teacher_case, world=1, model=tiny_model(), path=str(tmp_path / "v1"))
    assert found["said"][0] == pytest.approx(0, abs=1e-6), "it is the model itself as yet"
    assert abs(found["said"][1]) > 1e-3
    assert found["error"] < 1e-3 < 0.1 < found["moved"], "the average of the weights after each step"
    assert found["loaded"]
    assert found["weight"] == (1.75, 1.75)


def credit_state_case(place: Place, model: str, path: str) -> dict[str, Any]:
    config = learner_config(tp=2, **STEP)
    config.learn.credit = PartConfig("test_batch:Running")
    trainer = open_trainer(place, config, model)
    try:
        train(trainer, make_trees(4))
        trainer.save(path, {"version": 1})
        saved = trainer.planner.credit.state_dict()
        train(trainer, make_trees(5))
        moved = trainer.planner.credit.state_dict()
        extra = trainer.load(path)
        return {
            "saved": saved,
            "moved": moved,
            "loaded": trainer.planner.credit.state_dict(),
            "extra": extra,
        }
    finally:
        trainer.close()


def test_a_checkpoint_keeps_the_credits_state(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    results = ranks.run(credit_state_case, world=2, model=tiny_model(), path=str(tmp_path / "checkpoint"))
    assert results[0] == results[1]
    for result in results:
        assert result["loaded"] == result["saved"] != result["moved"]
        assert result["extra"] == {"version": 1}


def broken_case(place: Place, model: str, path: str) -> str:
    from system.learn.checkpoint import CheckpointError

    trainer = open_trainer(place, learner_config(), model)
    try:
        with pytest.raises(CheckpointError) as error:
            trainer.load(path)
        return str(error.value)
    finally:
        trainer.close()


def test_a_missing_checkpoint_is_named(ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path) -> None:
    (message,) = ranks.run(broken_case, world=1, model=tiny_model(), path=str(tmp_path / "none"))
    assert str(tmp_path / "none") in message


# ---------------------------------------------------------------------- Hugging Face directories


def save_hf_case(place: Place, model: str, path: str, **layout: Any) -> list[np.ndarray]:
    trainer = open_trainer(place, learner_config(**(layout or {"tp": 2}), **STEP), model)
    try:
        train(trainer, make_trees(8))
        trainer.save_hf(path)
        return trainer.logprobs(make_trees(9))
    finally:
        trainer.close()


@pytest.mark.parametrize(
    ("family", "tied", "rope"),
    [("qwen2", True, "default"), ("llama", False, "llama3"), ("qwen3", False, "yarn")],
)
def test_saved_model_loads_in_transformers(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path, family: str, tied: bool, rope: str
) -> None:
    source, out = Path(tiny_model(family, tied=tied, rope=rope)), tmp_path / "model"
    (source / "tokenizer.json").write_text("{}")  # any file that travels with a model
    mine = ranks.run(save_hf_case, world=2, model=str(source), path=str(out))[0]
    assert (out / "tokenizer.json").read_text() == "{}"
    written, given = (json.loads((at / "config.json").read_text()) for at in (out, source))
    assert written == given | {"dtype": "float32"}, "what its family has of its own is kept"
    hf = load_hf(out)
    for tree, values in zip(make_trees(9), mine, strict=True):
        for leaf in range(tree.n_leaves):
            index = path_tokens(tree, leaf)
            with torch.no_grad():
                expected, _ = path_logprobs(hf, tree.tokens[index])
            np.testing.assert_allclose(values[index][1:], expected.numpy(), rtol=0, atol=1e-4)


def sharded_files_case(place: Place, model: str, path: str) -> None:
    from system.learn import weights

    trainer = open_trainer(place, learner_config(), model)
    try:
        weights.save_hf(trainer.model, trainer.layout, Path(path), model, file_bytes=40_000)
        before = weights_of(trainer)
        weights.load(trainer.model, trainer.layout, path)
        for name, value in weights_of(trainer).items():
            np.testing.assert_array_equal(value, before[name])
    finally:
        trainer.close()


def test_weights_in_several_files(ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path) -> None:
    ranks.run(sharded_files_case, world=1, model=tiny_model(), path=str(tmp_path / "m"))
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    load_hf(tmp_path / "m")


# ---------------------------------------------------------------------- what a token sees


def sight_case(place: Place, model: str) -> dict[str, float]:
    """Change one token and see whose log-probabilities move; then shift the positions."""
    from system.learn.rows import Row

    trainer = open_trainer(place, learner_config(), model)
    try:
        fork = (Kind.PROMPT, 6, False, [(Kind.MODEL, 8, True, []), (Kind.MODEL, 7, True, [])])
        tree = make_tree(fork, np.random.default_rng(0))
        (before,) = trainer.logprobs([tree])

        def changed(at: int) -> np.ndarray:
            tree.tokens[at] = (tree.tokens[at] + 1) % 100
            (after,) = trainer.logprobs([tree])
            tree.tokens[at] = (tree.tokens[at] - 1) % 100
            return np.abs(after - before)

        tree.tokens[:] %= 100
        (before,) = trainer.logprobs([tree])
        sibling, ancestor = changed(8), changed(2)
        row = Row(pack_whole([tree]), trainer.layout.device, trained=False)
        row.position = row.position.clone().copy_(torch.arange(21))
        with torch.no_grad():
            hidden = row.run(trainer.model)
            numbered, _ = row.logprob_entropy(hidden, trainer.model, trainer.layout, 1.0)
        trap = np.abs(numbered.numpy() - before[1:])
        return {
            "second branch after a change in the first": float(sibling[14:].max()),
            "first branch after a change in itself": float(sibling[8:14].max()),
            "both after a change in the prompt": float(min(ancestor[6:14].max(), ancestor[14:].max())),
            "first branch numbered by row index": float(trap[:13].max()),
            "second branch numbered by row index": float(trap[14:].max()),
        }
    finally:
        trainer.close()


def test_branches_see_their_ancestors_only(ranks: Ranks, tiny_model: Callable[..., str]) -> None:
    (seen,) = ranks.run(sight_case, world=1, model=tiny_model())
    assert seen["second branch after a change in the first"] == 0
    assert seen["first branch after a change in itself"] > 0.01
    assert seen["both after a change in the prompt"] > 0.01
    # Megatron's own "rope" numbers the row and ignores position ids: right on the first branch only.
    assert seen["first branch numbered by row index"] < 1e-5
    assert seen["second branch numbered by row index"] > 0.1


# ---------------------------------------------------------------------- variants of one step


def variant_case(place: Place, model: str, dtype: str, recompute: str) -> dict[str, Any]:
    config = learner_config(tp=2, recompute=recompute, **STEP)
    config.model.dtype = dtype
    trainer = open_trainer(place, config, model)
    try:
        stats = [train(trainer, make_trees(s)) for s in (10, 11, 12)]
        return {"stats": stats, "weights": weights_of(trainer)}
    finally:
        trainer.close()


def test_recomputation_changes_nothing_and_bfloat16_little(
    ranks: Ranks, tiny_model: Callable[..., str]
) -> None:
    def run(dtype: str = "float32", recompute: str = "none") -> dict[str, Any]:
        return ranks.run(variant_case, world=2, model=tiny_model(), dtype=dtype, recompute=recompute)[0]

    plain, half = run(), run("bfloat16")
    for recompute in ("selective", "full"):
        recomputed = run(recompute=recompute)
        for name, value in plain["weights"].items():
            np.testing.assert_allclose(recomputed["weights"][name], value, rtol=0, atol=1e-6)
    for a, b in zip(plain["stats"], half["stats"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.05, abs=0.01)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.1)
        assert b["skipped_steps"] == 0


def non_finite_case(place: Place, model: str) -> dict[str, float]:
    trainer = open_trainer(place, learner_config(tp=2, **STEP), model)
    try:
        with torch.no_grad():
            trainer.model.decoder.final_layernorm.weight[0] = float("inf")
        before = weights_of(trainer)
        stats = train(trainer, make_trees(13))
        for name, value in weights_of(trainer).items():
            np.testing.assert_array_equal(value, before[name])
        return stats | {"steps": float(trainer.step_count)}
    finally:
        trainer.close()


def test_a_non_finite_gradient_is_not_applied(ranks: Ranks, tiny_model: Callable[..., str]) -> None:
    for stats in ranks.run(non_finite_case, world=2, model=tiny_model()):
        assert stats["skipped_steps"] == 1
        assert stats["steps"] == 0
        assert not np.isfinite(stats["grad_norm"])


def course_case(place: Place, model: str, by_step: bool) -> dict[str, float]:
    config = learner_config(objective="ppo", clip_high=0.0 if by_step else 0.2)
    if by_step:  # the batch is trained at version 6
        config.run.by_step = {
            "learn.clip_high": [[2, 0.0], [10, 0.4]],
            "rollout.temperature": [[0, 1.0], [12, 0.5]],
        }
    else:
        config.rollout.temperature = 0.75
    trainer = open_trainer(place, config, model)
    try:
        stats = train(trainer, make_trees(1))
        return {name: value for name, value in stats.items() if not name.startswith("time_")}
    finally:
        trainer.close()


def test_the_learner_follows_the_courses_of_settings(ranks: Ranks, tiny_model: Callable[..., str]) -> None:
    fixed, moving = (
        ranks.run(course_case, world=1, model=tiny_model(), by_step=by_step)[0] for by_step in (False, True)
    )
    assert moving == fixed
    assert fixed["clip_high"] > 0


def scaling_case(place: Place, model: str) -> tuple[float, float]:
    """The widest clip of A²TGPO that a learner's tokens had, and the one of its trees."""
    trainer = open_trainer(place, learner_config(objective="a2tgpo", credit="a2tgpo"), model)
    try:
        rng = np.random.default_rng(0)
        trees = [answered(tree, rng) for tree in make_trees(1)]
        widest = max(clip_scale(TreeStats.of(tree), 0.3).max() for tree in trees)
        return train(trainer, trees)["clip_scale_max"], float(widest)
    finally:
        trainer.close()


def test_the_learner_scales_the_clip_of_each_turn(ranks: Ranks, tiny_model: Callable[..., str]) -> None:
    found, widest = ranks.run(scaling_case, world=1, model=tiny_model())[0]
    assert found == pytest.approx(widest)
    assert found > 1.05


def adapting_case(place: Place, model: str, correction: PartConfig) -> dict[str, Any]:
    """Two updates of M2PO: rows scored in each pass beside the updates', what the objective was shown."""
    trainer = open_trainer(
        place, learner_config(objective="m2po", correction=correction, updates=2, **STEP), model
    )
    passes: list[int] = []
    shown: list[list[float]] = []
    score, adapt = trainer._score, trainer.objective.adapt

    def scoring(model: Any, rows: Any) -> Any:
        passes.append(len(rows))
        return score(model, rows)

    def adapting(log_ratio: torch.Tensor, leaves: torch.Tensor) -> None:
        shown.append(log_ratio.tolist())
        adapt(log_ratio, leaves)

    trainer._score, trainer.objective.adapt = scoring, adapting
    try:
        train(trainer, make_trees(1))
        return {"passes": passes, "shown": shown}
    finally:
        trainer.close()


def test_rows_that_a_correction_has_scored_are_not_scored_again(
    ranks: Ranks, tiny_model: Callable[..., str]
) -> None:
    nothing_rejected = PartConfig("geo-reject", {"low": 1e-9, "high": 1e9})
    plain, corrected = (
        ranks.run(adapting_case, world=1, model=tiny_model(), correction=correction)[0]
        for correction in (PartConfig("none"), nothing_rejected)
    )
    first, second = plain["passes"]
    assert corrected["passes"] == [first + second, second]
    assert corrected["shown"][0] == plain["shown"][0]
    assert corrected["shown"][1] == pytest.approx(plain["shown"][1], abs=1e-5)


def averaging(place: Place, model: str, dtype: str) -> Any:
    """A trainer whose proximal policy is a moving average."""
    config = learner_config(
        tp=place.world, objective="decoupled", proximal="average", proximal_reset=0.0, **STEP
    )
    config.flow.window, config.model.dtype = 1, dtype
    return open_trainer(place, config, model)


def mean_of(trainer: Any) -> dict[str, np.ndarray]:
    """The average's numbers on this rank."""
    return {name: one.numpy().copy() for name, one in trainer.beside.average.mean.items()}


def average_case(place: Place, model: str, dtype: str, path: str) -> dict[str, Any]:
    """PPO-EWMA: three batches, a checkpoint after the second, and the third once more from it."""
    trainer = averaging(place, model, dtype)
    try:
        first, second = train(trainer, make_trees(1)), train(trainer, make_trees(2))
        trainer.save(path, {})
        kept = mean_of(trainer)
        third = train(trainer, make_trees(3))
        trainer.load(path)
        weight = trainer.beside.average.weight
        again = train(trainer, make_trees(3))
        trainer.learn.proximal_reset = 2.0  # always
        train(trainer, make_trees(4))
        mean, new = (dict(one.named_parameters()) for one in (trainer.beside.average.model, trainer.model))
        same = all(torch.equal(mean[name], new[name]) for name in new)
        return {
            "ratios": [stats["ratio_mean"] for stats in (first, second)],
            "active": first["proximal_active"],
            "weight": weight,
            "kept": kept,
            "third": third["loss"],
            "again": again["loss"],
            "reset": same and trainer.beside.average.weight == 1.0,
        }
    finally:
        trainer.close()


def resumed_average_case(place: Place, model: str, dtype: str, path: str) -> dict[str, Any]:
    """The third batch in a process that has the checkpoint alone."""
    trainer = averaging(place, model, dtype)
    try:
        trainer.load(path)
        kept, weight = mean_of(trainer), trainer.beside.average.weight
        return {"kept": kept, "weight": weight, "third": train(trainer, make_trees(3))["loss"]}
    finally:
        trainer.close()


@pytest.mark.parametrize(("world", "dtype"), [(1, "float32"), (2, "float32"), (2, "bfloat16")])
def test_the_proximal_policy_is_an_average_that_is_kept(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path, world: int, dtype: str
) -> None:
    case: dict[str, Any] = {"model": tiny_model(), "dtype": dtype, "path": str(tmp_path / "kept")}
    every = ranks.run(average_case, world=world, **case)
    got = every[0]
    assert got["ratios"][0] == pytest.approx(1.0), "the average of one policy is that policy"
    assert abs(got["ratios"][1] - 1.0) > 1e-6, "afterwards it lags behind"
    assert got["active"] == pytest.approx(1.0)
    assert got["weight"] == pytest.approx(1 + 0.5 * (1 + 0.5)), "β = 2/4 at η = 1 and a window of 1"
    assert got["again"] == pytest.approx(got["third"], rel=1e-6)
    assert got["reset"]
    for before, after in zip(every, ranks.run(resumed_average_case, world=world, **case), strict=True):
        assert after["weight"] == before["weight"]
        assert after["third"] == pytest.approx(before["third"], rel=1e-6)
        for name, mean in before["kept"].items():
            assert mean.dtype == np.float32
            np.testing.assert_array_equal(after["kept"][name], mean, err_msg=name)


# ---------------------------------------------------------------------- refusals


def refusal_case(place: Place, model: str, learn: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        open_trainer(place, learner_config(**learn), model)
    from system.learn import parallel

    parallel.stop()
    return str(error.value)


def test_what_cannot_run_is_refused_by_name(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="needs 4 ranks, not 3"):
        start(learner_config(tp=2, pp=2), rank=0, world=3, init_method="")
    hard = {"objective": "grpo-flat", "credit": "arpo-hard"}
    assert "arpo-hard" in ranks.run(refusal_case, world=1, model=tiny_model(), learn=hard)[0]
    rope = tmp_path / "dynamic"
    save_tiny_model(rope, "qwen3", tied=False, rope_parameters={"rope_type": "dynamic", "factor": 4.0})
    assert "dynamic" in ranks.run(refusal_case, world=1, model=str(rope), learn={})[0]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((Path(tiny_model()) / "config.json").read_text())
    assert "safetensors" in ranks.run(refusal_case, world=1, model=str(empty), learn={})[0]
