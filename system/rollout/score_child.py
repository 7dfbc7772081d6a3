"""The process in which a reward runs: ``python -m system.rollout.score_child``.

It reads lines of JSON from its standard input and answers each with one: first the configuration, from which
it makes the reward by name; then it gives up what it does not need; then one leaf a line.  Nothing but plain
data crosses.  What a scorer prints goes nowhere.

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

from system.config import Config, from_dict
from system.plugins import REWARDS
from system.rollout.reward import BranchView, Reward
from system.rollout.scoring import ScoreFailed, normalised
from system.tools.sandbox import lockdown
from system.tools.sandbox.kernel import die_with_parent
from system.tree.prompt import Prompt
from system.tree.record import Kind, Outcome


def answer(name: str, reward: Reward, line: bytes) -> dict[str, Any]:
    """The score of the leaf in ``line``, or {"error": why there is none}."""
    try:
        request = json.loads(line)
        prompt, branch = request["prompt"], request["branch"]
        prompt |= {"messages": tuple(prompt["messages"]), "answers": tuple(prompt["answers"])}
        view = BranchView(
            tuple((Kind(kind), text) for kind, text in branch["segments"]),
            Outcome(branch["outcome"]),
            tuple((tool, status) for tool, status in branch["tools"]),
            branch["tokens"],
            tuple(branch["steps"]),
            branch["result"],
        )
        score = normalised(name, reward.score(Prompt(**prompt), view))
        return {"value": score.value, "correct": score.correct, "parts": score.parts}
    except ScoreFailed as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": f"reward {name}: more memory than reward.memory_mb"}
    except Exception as error:  # the scorer's own code
        return {"error": f"reward {name}: {type(error).__name__}: {error!s:.500}"}


def prepare(config: Config) -> Reward:
    """The reward, made while this process may still do what it likes, and then confined."""
    made = REWARDS.make(config.reward.name, config.reward.options, config=config)
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
        config = from_dict(json.loads(incoming.readline()))
        reward = prepare(config)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)
    say({"ready": True})
    for line in incoming:
        say(answer(config.reward.name, reward, line))


if __name__ == "__main__":
    main()
