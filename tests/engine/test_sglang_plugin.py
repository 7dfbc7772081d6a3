"""Our plug-in of SGLang, as far as it runs without SGLang: entropies, and the keys of the prefix cache."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from system.config import EngineConfig
from system.engine.sglang.command import IN_SERVER, interpreter, server_command
from system.engine.weights.digest import QUANTISED, sha256_hash


@pytest.fixture(scope="module")
def plugin() -> Any:
    path = IN_SERVER / "plugin" / "espalier_sglang.py"
    spec = importlib.util.spec_from_file_location("espalier_sglang", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rows", [0, 1, 64, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropies_equal_their_definition(plugin: Any, rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = (4 * torch.randn(rows, 333, generator=generator)).to(dtype)
    temperatures = 0.3 + torch.rand(rows, 1, generator=generator)
    for scale in (temperatures, None):
        log_p = torch.log_softmax(logits.double() / (1 if scale is None else scale.double()), -1)
        expected = -(log_p.exp() * log_p).sum(-1)
        found = plugin.entropies(logits, scale)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=3e-6, rtol=0)


def test_forbidden_tokens_have_no_part_in_the_entropy(plugin: Any) -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf, 0.0, 0.0], [3.0, *[-torch.inf] * 4]])
    found = plugin.entropies(logits, torch.ones(2, 1))
    torch.testing.assert_close(found, torch.tensor([4.0, 1.0]).log())


def test_deferred_numbers_are_plain_floats(plugin: Any) -> None:
    numbers = plugin.Deferred(torch.tensor([0.5, 1.5]))
    assert [numbers[0], numbers[1]] == [0.5, 1.5]
    assert type(numbers[0]) is float


@pytest.mark.gpu
def test_deferred_numbers_come_from_the_device(plugin: Any) -> None:
    logits = torch.randn(100, 5000, device="cuda")
    temperatures = torch.full((100, 1), 0.7, device="cuda")
    found = plugin.entropies(logits, temperatures)
    numbers = plugin.Deferred(found)
    logits.zero_()  # as sampling does, which overwrites them
    assert [numbers[row] for row in range(100)] == found.tolist()


def test_cache_keys_follow_the_weights(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is keyed when it arrives, and again if the weights change while it waits."""
    serving = SimpleNamespace(weight_version="default")
    context = types.ModuleType("sglang.srt.runtime_context")
    context.get_serving = lambda: serving  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", context)
    plain, own = SimpleNamespace(extra_key=None), SimpleNamespace(extra_key="tenant;7")
    for received in (plain, own):
        plugin._key_arriving(None, received)
    assert (plain.extra_key, own.extra_key) == ("weights=default;", "weights=default;tenant;7")
    serving.weight_version = "12"
    plugin._key_waiting(None, SimpleNamespace(waiting_queue=[plain, own]))
    assert (plain.extra_key, own.extra_key) == ("weights=12;", "weights=12;tenant;7")


def test_a_weight_group_waits_no_longer_than_it_was_told(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On gloo the group itself gives up; on NCCL the process, so that what we look at comes before that."""
    monkeypatch.setenv("ESPALIER_GROUP_DEADLINE_S", "7")
    for backend, seconds in (("gloo", 7), ("nccl", 14)):
        args, kwargs = plugin._bounded(backend=backend, world_size=3)
        assert (args, kwargs.pop("timeout").total_seconds()) == ((), seconds)
        assert kwargs == {"backend": backend, "world_size": 3}


@pytest.mark.parametrize("comes", [True, False])
def test_a_bucket_that_does_not_come_is_given_up_and_the_server_lives(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    looks, aborted = iter([False, False, True]), list[bool]()
    event = SimpleNamespace(record=lambda: None, query=lambda: comes and next(looks))
    monkeypatch.setenv("ESPALIER_GROUP_DEADLINE_S", "0.1")
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    group = SimpleNamespace(abort=lambda: aborted.append(True))
    updater = SimpleNamespace(device="cuda", _model_update_group={"g": group})
    if comes:
        assert plugin._received([], updater, group_name="g", names=[]) is None
    else:
        with pytest.raises(RuntimeError, match=r"no bucket of weights within 0\.1 s"):
            plugin._received([], updater, group_name="g", names=[])
    assert aborted == ([] if comes else [True])
    updater.device = "cpu"
    assert plugin._received([], updater, group_name="g") is None  # gloo has waited


def test_float8_matrices_are_told_by_what_they_are_made_of(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digests that the sender computes (Digests), of every matrix that came, under its name in files."""
    utils = types.ModuleType("sglang.srt.managers.mm_utils")
    utils.tensor_hash = sha256_hash  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.mm_utils", utils)
    layer, model = torch.nn.Module(), torch.nn.Module()
    layer.register_parameter("weight", frozen(torch.zeros(4, 6).to(torch.float8_e4m3fn)))
    layer.register_parameter("weight_scale", frozen(torch.ones(1, 6)))
    layer.register_parameter("bias", frozen(torch.ones(6)))
    model.add_module("qkv_proj", layer)
    result = {"checksums": dict.fromkeys(dict(model.named_parameters()), "0"), "rank": 1}
    checker = SimpleNamespace(_get_model=lambda: model)
    assert plugin._tell_given(result, checker) is None, "one whose weights are numbers is told as it is"
    model.original_weights_rebuild_keys = {}  # type: ignore[assignment]
    sent = {f"{one}_proj.weight": torch.randn(2, 3) for one in ("l.q", "l.k", "l.v")}
    arriving = iter([*sent.items(), ("l.q_proj.bias", torch.ones(2))])
    (same, load, handed), none = plugin._keep_given(model, len, arriving)
    assert (same, load, none) == (model, len, {})
    assert dict(handed).keys() == {*sent, "l.q_proj.bias"}, "which the loader must still find"
    told = plugin._tell_given(result, checker)
    given = {name: f"{sha256_hash(tensor):016x}" for name, tensor in sent.items()}
    assert told == {"checksums": {"qkv_proj.bias": "0"} | given, "rank": 1}
    assert plugin.QUANTISED == QUANTISED


def frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


@pytest.mark.sglang
def test_sglangs_own_float8_loader_is_told_of() -> None:
    """The real loader and the real weight checker, in SGLang's interpreter, without a server or a GPU."""
    line = server_command(
        EngineConfig(name="sglang"), python=interpreter(EngineConfig()), model="", dtype="", port=0, cpu=True
    )
    script = Path(__file__).with_name("float8_in_sglang.py")
    environment = {**os.environ, **line.env}
    done = subprocess.run(
        [line.argv[0], str(script)], env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (matrix, weight), (norm, scales) = found["sent"].items()
    assert found["told"] == {
        matrix: f"{sha256_hash(torch.tensor(weight).bfloat16()):016x}",
        norm: f"{sha256_hash(torch.tensor(scales)):016x}",
    }
    assert 0 < found["error"] < 0.2, "it has made codes of the new weights, not of the old"
