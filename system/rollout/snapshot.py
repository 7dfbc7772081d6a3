"""A growing tree as bytes, so that a resumed run goes on with it instead of growing it anew.

``freeze`` looks at a tree between two events of its loop: what its branches have written, what their random
streams will draw next, whose tool call is under way (made again, if that does no harm), how much of the
deadlines is spent, what was done in their sessions.  ``thaw`` makes a tree of it that goes on; its worlds
are built again when they are needed.  Sampled tokens keep their log-probabilities and weight versions; what
comes after is sampled, and stamped, by the weights of then.

The format is safetensors: arrays by name, everything else as JSON in the metadata.  No code is in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from system.awake import awake_s
from system.config import Config, settings, to_dict
from system.engine.protocol import Finish
from system.envs.journal import Book, Entry, read
from system.envs.live import TreeSessions
from system.errors import EspalierError
from system.rollout.branch import Branch
from system.rollout.context import RolloutContext
from system.rollout.planting import opened
from system.rollout.tree_rollout import TreeRollout
from system.tree.builder import TreeBuilder
from system.tree.prompt import Prompt
from system.tree.record import Kind, Mishap, Origin, Outcome, TreeError

FORMAT = 5
_NOT_KEPT_SO = ("began_s", "spent_s", "late", "measured")  # clocks, and what the tokens there tell
_PLAIN = [  # the fields of a branch that JSON takes as they are
    field.name
    for field in fields(Branch)
    if field.type in ("int", "float", "bool", "int | None") and field.name not in _NOT_KEPT_SO
]


class SnapshotError(EspalierError, ValueError):
    """Bytes that are no snapshot of this format."""


def fingerprint(config: Config) -> dict[str, Any]:
    """What a tree's growth depends on: a snapshot is of use only where all of this is the same."""
    values = to_dict(config)
    rollout = {
        name: value
        for name, value in values["rollout"].items()
        if not settings()[f"rollout.{name}"].safe_on_resume
    }
    kept = {"rollout": rollout, "tools": values["tools"]["names"], "format": FORMAT}
    kept |= {section: values[section] for section in ("branching", "task", "model")}
    chosen = ("name", "options", "parts") if config.reward.parts else ("name", "options")
    kept["reward"] = {name: values["reward"][name] for name in chosen}
    kept["environment"] = {name: values["environment"][name] for name in ("name", "options", "turn_limit")}
    return json.loads(json.dumps(kept))


def can_freeze(tree: TreeRollout) -> bool:
    """Not while branches stand at barriers that only this process knows of."""
    return tree.schedule.streaming


def freeze(tree: TreeRollout) -> bytes:
    """The tree as it stands.  Call it on the tree's event loop."""
    now = awake_s()
    arrays, growth = tree.growth.state()
    book = Book()
    fields = {
        "format": FORMAT,
        "growth": growth,
        "seed": tree.seed,
        "temperature": tree.temperature,
        "started": {str(int(origin)): count for origin, count in tree.budget.started.items()},
        "live": [_branch(branch, now, book) for branch in tree.live.values()],
        "ended": [[_branch(branch, now, book), int(outcome)] for branch, outcome in tree.ended],
        "opening": tree.sessions and tree.sessions.opening,
        "journal": book.entries,
        "seconds": tree.seconds,
        "mishaps": tree.mishaps,
        "spent_s": _spent(tree.spent_s, tree.began_s, now),
        "frozen_s": tree.calls.since_start(),
    }
    return save(arrays, {"tree": json.dumps(fields)})


def thaw(context: RolloutContext, prompt: Prompt, data: bytes, ticket: int | str = "") -> TreeRollout:
    """A tree that goes on where :func:`freeze` saw it.  Raises :class:`SnapshotError`."""
    try:
        fields = json.loads(_metadata(data)["tree"])
        if fields["format"] != FORMAT:
            raise SnapshotError(f"format {fields['format']}: this version reads {FORMAT}")
        growth = TreeBuilder.restore(load(data), fields["growth"], context.now)
        if growth.prompt_id != prompt.id:
            raise SnapshotError(f"a tree of prompt {growth.prompt_id!r}, not of {prompt.id!r}")
        temperature, seed = fields["temperature"], fields["seed"]
        sessions, entries = None, read(fields["journal"])
        if context.environments is not None:
            opening: str = fields["opening"]
            sessions = TreeSessions(context.environments.train, prompt, str(ticket), seed, opening)
            prompt = opened(prompt, opening)
        tree = TreeRollout(
            *(context, prompt),
            seed=seed,
            ticket=ticket,
            n=growth.budget,
            temperature=temperature,
            growth=growth,
            sessions=sessions,
        )
        tree.budget.started.update({Origin(int(origin)): n for origin, n in fields["started"].items()})
        restored = partial(_restored, sessions=sessions, entries=entries)
        tree.live.update((branch.key, branch) for branch in map(restored, fields["live"]))
        tree.ended += [(restored(values), Outcome(outcome)) for values, outcome in fields["ended"]]
        tree.seconds.update(fields["seconds"])
        tree.spent_s = fields["spent_s"]
        # Nothing of it grew in between.  An older version did not say since when.
        away = [fields.get("frozen_s", math.nan), tree.calls.since_start()]
        if not math.isnan(away[0]):
            growth.meta["away_s"] = [*growth.meta.get("away_s", []), away]
        tree.mishaps = [one for fields_ in fields["mishaps"] if (one := Mishap(*fields_)).kind != "reward"]
        return tree
    except (SafetensorError, KeyError, TypeError, IndexError, TreeError, json.JSONDecodeError) as error:
        raise SnapshotError(f"{type(error).__name__}: {error}") from error


def _branch(branch: Branch, now: float, book: Book) -> dict[str, Any]:
    session = branch.session
    return {
        **{name: getattr(branch, name) for name in _PLAIN},
        "key": list(branch.key),
        "origin": int(branch.origin),
        "rng": branch.rng.bit_generator.state,
        "seeds": branch.seeds.bit_generator.state,
        "tools": branch.tools,
        "passed": branch.passed,
        "session": session and session.state(book.write(session.journal)),
        "segments": [[int(kind), text] for kind, text in branch.segments],
        "finish": None if branch.finish is None else asdict(branch.finish),
        "spent_s": _spent(branch.spent_s, branch.began_s, now),
    }


def _restored(values: dict[str, Any], sessions: TreeSessions | None, entries: Sequence[Entry]) -> Branch:
    """The inverse of :func:`_branch`.  The engines have forgotten what they cached: no ``request``."""
    return Branch(
        key=tuple(values["key"]),
        origin=Origin(values["origin"]),
        rng=_generator(values["rng"]),
        seeds=_generator(values["seeds"]),
        tools=tuple((tool, status) for tool, status in values["tools"]),
        passed=tuple((calls, actions) for calls, actions in values["passed"]),
        session=sessions.restored(values["session"], entries) if sessions is not None else None,
        segments=tuple((Kind(kind), text) for kind, text in values["segments"]),
        finish=None if values["finish"] is None else Finish(**values["finish"]),
        spent_s=values["spent_s"],
        **{name: values[name] for name in _PLAIN},
    )


def _generator(state: dict[str, Any]) -> np.random.Generator:
    generator = np.random.default_rng()
    generator.bit_generator.state = state
    return generator


def _spent(before: float, began: float, now: float) -> float:
    return before + (0.0 if math.isnan(began) else now - began)


def _metadata(data: bytes) -> dict[str, str]:
    """The text part of a safetensors file: its header is JSON behind its length (8 bytes, little endian)."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size])["__metadata__"]
