"""One learner rank: a Megatron trainer in a process of its own, and the hand that pushes its weights to the
engines.
"""

from __future__ import annotations

import asyncio
import copy
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import psutil
import ray
from ray.exceptions import RayError

from actors import keys, raylet
from actors.placement import Placement
from actors.ray_support import answer, answers, spawn
from system import config as configuration
from system.config import ClusterConfig
from system.config.lora import adapters_travel
from system.engine.sglang.command import NCCL
from system.engine.weights.base import PushReport, Transport
from system.flow.loop import TreesLost
from system.flow.replay import TreeInFlight
from system.tree.pack import PackedBatch, pack_share
from system.tree.plan import BatchPlan
from system.tree.record import Tree
from system.tree.stats import TreeStats

FETCH_DEADLINE_S = 300.0  # a rank's trees of one batch


class LearnerRank:
    """Rank ``rank`` of ``world``.  The group calls every method but ``address`` on all ranks; all but
    ``prepare``, ``discard`` and ``saved`` are collective.

    A rank that dies takes its process group with it, so it is not restarted alone: the conductor ends the
    run, which resumes from the last checkpoint.
    """

    def __init__(self, rank: int, world: int) -> None:
        # One queue for all streams, before CUDA starts: Megatron's reduction of a layer's gradient then
        # begins before the weight's product, and runs beside it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        from system.learn import cpu

        with cpu.quick_import():  # takes seconds all the same, in which the others start
            from system.learn.trainer import Trainer
        self._make: Any = Trainer
        self._rank, self._world = rank, world
        self._trainer: Any = None
        self._transport: Any = None  # on rank 0, from the first push on
        self._plan: BatchPlan | None = None  # of the batch that is prepared, to be trained on
        self._updates: list[list[PackedBatch]] = []  # this rank's share of it
        self._measured: dict[str, float] = {}  # while preparing it
        self._credit_before: Any = None
        self._meeting: Any = None  # rank 0's server, where the ranks find each other

    def address(self) -> str:
        """Where rank 0 gathers the process group.  It listens from here on, so that nobody takes the port;
        ``multi_tenant`` has the group that this process forms use this very server.
        """
        import torch.distributed as dist

        host = ray.util.get_node_ip_address()
        self._meeting = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            host, 0, is_master=True, wait_for_workers=False, multi_tenant=True
        )
        return f"tcp://{host}:{self._meeting.port}"

    def setup(self, config: dict[str, Any], hf_path: str, init_method: str) -> list[str]:
        """Load the model; returns warnings about the settings."""
        _meet_on_the_interface_of(ray.util.get_node_ip_address())
        os.environ.update(NCCL)
        self._config, self._model = configuration.from_dict(config), hf_path
        self._trainer = self._make(
            self._config, hf_path, rank=self._rank, world=self._world, init_method=init_method
        )
        return self._trainer.warnings

    def supervise(self, trees: Sequence[Tree], lr: float) -> dict[str, float]:
        return self._trainer.supervise(self._supervised(trees), lr)

    def supervised_loss(self, trees: Sequence[Tree]) -> float:
        return self._trainer.supervised_loss(self._supervised(trees))

    def _supervised(self, trees: Sequence[Tree]) -> list[PackedBatch]:
        """This rank's share of a supervised batch."""
        plan = self._trainer.planner.supervised([TreeStats.of(tree) for tree in trees])
        (micro_batches,) = pack_share(plan, self._trainer.layout.dp_rank, dict(enumerate(trees)))
        return micro_batches

    def reset_optimizer(self) -> None:
        self._trainer.reset_optimizer()

    def prepare(self, batch: Sequence[tuple[Any, TreeStats]]) -> dict[int, str]:
        """Plan a batch of (reference, statistics), and fetch and pack what this rank trains on of it.

        Not collective: the ranks step only once all of them have theirs.  Returns the trees, by index in the
        batch, that could not be fetched, and why.
        """
        self._credit_before = copy.deepcopy(self._trainer.planner.credit)
        rank, began = self._trainer.layout.dp_rank, time.monotonic()
        plan = self._trainer.planner.plan([stats for _, stats in batch])
        planned = time.monotonic()
        trees, lost = _fetch({index: batch[index][0] for index in plan.trees(rank)})
        fetched = time.monotonic()
        self._plan, self._updates = plan, [] if lost else pack_share(plan, rank, trees)
        self._measured = {
            "trees_without_signal": float(plan.silent),
            "time_fetch_s": fetched - planned,
            "time_pack_s": planned - began + time.monotonic() - fetched,
        }
        return lost

    def discard(self) -> None:
        """Forget what was prepared, as if it had not been."""
        self._trainer.planner.credit, self._plan, self._updates = self._credit_before, None, []

    def step(self, version: int) -> dict[str, float]:
        """Train on what was prepared.  Adds ``seconds``, all that the batch took on this rank."""
        began = time.monotonic()
        stats = self._trainer.train(self._plan, self._updates, version=version) | self._measured
        self._plan, self._updates = None, []
        seconds = time.monotonic() - began + stats["time_fetch_s"] + stats["time_pack_s"]
        return stats | {"seconds": seconds}

    def publish(self, urls: list[str], version: int, deadline_s: float) -> PushReport:
        """Stream the current weights into the engines at ``urls`` as ``version``; the answer is on rank 0."""
        from system.engine import weights

        apart = adapters_travel(self._config)
        adapter = self._trainer.model.adapter if apart else None
        if self._rank == 0:
            if self._transport is None:
                config, address = self._config, ray.util.get_node_ip_address()
                run, dtype = Path(config.run.dir, config.run.name), config.model.dtype
                self._transport = weights.make(
                    config.engine, urls, self._model, dtype, address, run, adapter=adapter
                )
            buckets = self._trainer.export(on_gpu=self._transport.on_gpu, adapters=apart)
            kv = "keep" if self._config.engine.kv_after_update == "keep" else "recompute"
            report = asyncio.run(_push(self._transport, urls, buckets, version, kv, deadline_s))
            merged = self._config.learn.lora.on and not apart
            return replace(report, lora_kept=self._trainer.rounding.kept) if merged else report
        # The gather is collective: every rank walks through it.
        for _ in self._trainer.export(on_gpu=True, adapters=apart):
            pass
        return PushReport()

    def save(self, path: str, extra: dict[str, Any]) -> None:
        self._trainer.save(Path(path), extra)

    def saved(self, wait: bool) -> bool:
        return self._trainer.saved(wait=wait)

    def load(self, path: str) -> dict[str, Any]:
        return self._trainer.load(Path(path))

    def save_hf(self, path: str) -> float | None:
        return self._trainer.save_hf(Path(path))

    def save_adapters(self, path: str, base: str) -> None:
        self._trainer.save_adapters(Path(path), base)


async def _push(
    transport: Transport,
    urls: list[str],
    buckets: Iterator[dict[str, Any]],
    version: int,
    kv: Literal["recompute", "keep"],
    deadline_s: float,
) -> PushReport:
    # Not a method: one async method would turn every call of the actor into a coroutine on Ray's loop.
    async with asyncio.timeout(deadline_s), keys.http(urls) as http:
        return await transport.push(http, urls, buckets, version, kv)


def _meet_on_the_interface_of(address: str) -> None:
    """Let gloo and NCCL use the node's own address; they would take the first interface, or the host name's.

    What the environment says already (``slurm.env``) stands.
    """
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def _fetch(references: Mapping[int, Any]) -> tuple[dict[int, Tree], dict[int, str]]:
    """The trees behind references, and why the others cannot be had."""
    trees: dict[int, Tree] = {}
    lost: dict[int, str] = {}
    deadline = time.monotonic() + FETCH_DEADLINE_S
    if references:  # all at once; what fails is found below
        ray.wait([*references.values()], num_returns=len(references), timeout=FETCH_DEADLINE_S)
    for index, reference in references.items():
        try:
            trees[index] = ray.get(reference, timeout=max(deadline - time.monotonic(), 0.1))
        except RayError as error:
            lost[index] = f"{type(error).__name__}: {error}"
    return trees, lost


class LearnerGroup:
    """All ranks as one: a method is called on every rank, in one order, and answered by every rank.

    The first failure is raised; ActorLost after ``cluster.call_deadline_s``.
    """

    def __init__(self, world: int, places: Placement, deadlines: ClusterConfig) -> None:
        self.warnings: list[str] = []  # about the settings, once started
        self._deadlines = deadlines
        self.ranks = {
            name: spawn(LearnerRank, name, rank, world, restart=False, options=places[name].options)
            for rank, name in enumerate(f"learner-{rank}" for rank in range(world))
        }

    async def start(self, config: dict[str, Any], hf_path: str) -> None:
        first, deadline_s = next(iter(self.ranks.values())), self._deadlines.start_deadline_s
        address = await answer(first.address.remote(), deadline_s, "learner rank 0")
        self.warnings = (await self._all("setup", config, hf_path, address))[0]

    async def supervise(self, trees: Sequence[Tree], lr: float) -> dict[str, float]:
        """One supervised step."""
        shared = ray.put(trees)  # once for all ranks
        return (await self._all("supervise", shared, lr))[0]

    async def supervised_loss(self, trees: Sequence[Tree]) -> float:
        """Nats per token of the model on what it is to say in ``trees``; nothing changes."""
        shared = ray.put(trees)
        return (await self._all("supervised_loss", shared))[0]

    async def reset_optimizer(self) -> None:
        """Where reinforcement learning begins."""
        await self._all("reset_optimizer")

    async def train(self, version: int, trees: Sequence[TreeInFlight]) -> dict[str, float]:
        """One training batch; ``version`` is the weight version being trained.

        Every rank gets all statistics, and fetches the trees that it trains on.  Raises :class:`TreesLost` if
        one of them cannot be had; nothing has changed then, and another batch may follow.
        """
        # In a list, lest Ray resolve the references.
        batch = [(tree.reference, tree.stats) for tree in trees]
        prepared = await self._all("prepare", batch)
        if lost := {index: reason for one in prepared for index, reason in one.items()}:
            await self._all("discard")
            raise TreesLost(lost)
        return (await self._all("step", version))[0]

    async def publish(self, urls: Sequence[str], version: int) -> PushReport:
        """Stream the current weights into the engines at ``urls``."""
        return (await self._all("publish", [*urls], version, self._deadlines.call_deadline_s))[0]

    async def save(self, path: str, extra: dict[str, Any]) -> None:
        """Begin to write a checkpoint of this moment, once the one before is written; training may go on."""
        await self._all("save", path, extra)

    async def saved(self, *, wait: bool) -> bool:
        """Whether the last checkpoint is there; ``wait`` until it is.  Raises OSError if it cannot be."""
        return all(await self._all("saved", wait))

    async def load(self, path: str) -> dict[str, Any]:
        """Go on from a checkpoint; returns its ``extra``."""
        return (await self._all("load", path))[0]

    async def save_hf(self, path: str) -> float | None:
        """Write the model in Hugging Face format; returns the share of what adapters change that is in it
        (``Rounding.kept``), None without.
        """
        return (await self._all("save_hf", path))[0]

    async def save_adapters(self, path: str, base: str) -> None:
        """Write the adapters of the model ``base`` in PEFT's format."""
        await self._all("save_adapters", path, base)

    def end(self) -> None:
        """End every rank now: nothing that is not saved is wanted any more."""
        for rank in self.ranks.values():
            ray.kill(rank)

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        raylet.check()  # the arguments may be a large object
        calls = [getattr(rank, method).remote(*arguments) for rank in self.ranks.values()]
        return await answers(calls, self._deadlines.call_deadline_s, f"learner.{method}")
