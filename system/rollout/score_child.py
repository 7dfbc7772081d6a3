"""The process in which a reward runs: ``python -m system.rollout.score_child``.

It reads lines of JSON from its standard input and answers each with one: first the configuration, from which
it makes the reward by name; then it gives up what it does not need; then a leaf, or all leaves of a tree, a
line.  Nothing but plain data crosses.  What a scorer prints goes nowhere.

Code that a scorer evaluates can still choose that scorer's answers until the process is replaced; it cannot
write a file, reach the network, signal or start a process, or outlast ``reward.deadline_s``.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

from system.config import ChosenReward, Config, from_dict
from system.rollout.reward import BranchView, Score, ScoreFailed
from system.rollout.scorer import each, groupwise, make_reward
from system.tools.sandbox import lockdown
from system.tools.sandbox.kernel import die_with_parent
from system.tree.prompt import Prompt
from system.tree.record import Kind, Outcome


def answer(name: str, reward: Any, line: bytes) -> dict[str, Any]:
    """The scores of the leaves in ``line``, or {"error": why there are none, "reason": …}."""
    try:
        request = json.loads(line)
        prompt = request["prompt"]
        prompt |= {"messages": tuple(prompt["messages"]), "answers": tuple(prompt["answers"])}
        asked, views = Prompt(**prompt), [_view(branch) for branch in request["branches"]]
        if groupwise(reward):
            returned = reward.score_group(asked, views)
        else:
            returned = [reward.score(asked, view) for view in views]
        return {"scores": [_plain(one) for one in each(name, returned, len(views))]}
    except ScoreFailed as error:
        return {"error": str(error), "reason": error.reason}
    except MemoryError:
        return {"error": f"reward {name}: more memory than reward.memory_mb", "reason": "process"}
    except Exception as error:  # the scorer's own code
        return {"error": f"reward {name}: {type(error).__name__}: {error!s:.500}", "reason": "exception"}


def _view(branch: dict[str, Any]) -> BranchView:
    return BranchView(
        tuple((Kind(kind), text) for kind, text in branch["segments"]),
        Outcome(branch["outcome"]),
        tuple((tool, status) for tool, status in branch["tools"]),
        branch["tokens"],
        tuple(branch["steps"]),
        branch["result"],
    )


def _plain(score: Score | ScoreFailed) -> dict[str, Any]:
    if isinstance(score, ScoreFailed):
        return {"error": str(score), "reason": score.reason}
    return {"value": score.value, "correct": score.correct, "parts": score.parts}


def prepare(config: Config, chosen: ChosenReward) -> Any:
    """The reward, made while this process may still do what it likes, and then confined."""
    made = make_reward(config, chosen)
    if config.reward.confined:
        lockdown.confine_scorer(config.reward.memory_mb, must=not getattr(made, "trusted", False))
    else:
        lockdown.limit_memory(config.reward.memory_mb)
    return made


def main() -> None:
    die_with_parent(signal.SIGKILL)
    incoming, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def say(reply: dict[str, Any]) -> None:
        answers.write(json.dumps(reply).encode() + b"\n")
        answers.flush()

    try:
        told = json.loads(incoming.readline())
        config = from_dict(told["config"])
        chosen = ChosenReward(**told["reward"])
        reward = prepare(config, chosen)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)
    say({"ready": True})
    for line in incoming:
        say(answer(chosen.shown, reward, line))


if __name__ == "__main__":
    main()
