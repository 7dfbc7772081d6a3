"""How a learner rank joins its process group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from system.config import Config
from system.learn import cpu, parallel


class _JoinedError(Exception):
    pass


def test_on_a_gpu_no_device_is_bound_to_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `device_id`, torch splits every later group off the world: a collective of all ranks, for which
    the group that carries weights to the engines, rank 0's alone, would wait for ever (ncclCommSplit).
    """
    asked: dict[str, Any] = {}

    def init_process_group(backend: str, **settings: Any) -> None:
        asked.update(settings, backend=backend)
        raise _JoinedError

    monkeypatch.setattr(cpu, "needed", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(parallel.dist, "init_process_group", init_process_group)
    with pytest.raises(_JoinedError):
        parallel.start(Config(), rank=0, world=Config().learn.ranks, init_method="tcp://127.0.0.1:1")
    assert asked["backend"] == "nccl"
    assert asked.get("device_id") is None
