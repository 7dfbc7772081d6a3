"""An evaluation as a table, for people and papers."""

from __future__ import annotations

import math
from collections.abc import Iterator

from system.evals.estimates import interval
from system.evals.record import OWN
from system.evals.result import EvalResult, EvalScores


def rows(result: EvalResult) -> Iterator[tuple[str, EvalScores]]:
    """What has scores, by name: each set, and its kinds where it has several."""
    own = [(OWN, result)] if result.total.questions or not result.sets else []
    for name, one in [*own, *result.sets.items()]:
        yield name, one.total
        if len(one.kinds) > 1:
            yield from ((f"{name}: {kind}", scores) for kind, scores in one.kinds.items())


def markdown(result: EvalResult) -> str:
    """A table of Markdown: shares in per cent with their 95 % intervals over the questions."""
    found = list(rows(result))
    ks = sorted({k for _, scores in found for k in scores.pass_at})
    several = bool(ks)
    samples = {scores.samples for _, scores in found}
    avg = f"avg@{samples.pop()}" if several and len(samples) == 1 else ("avg@n" if several else "accuracy")
    head = ["set", "questions", *(["n"] if several else []), avg]
    head += [f"pass@{k}" for k in ks] + (["maj@n"] if several else [])
    head += ["reward", "tool calls", "tokens", "right per call"]
    lines = [head, ["---"] * len(head)]
    for name, scores in found:
        cells = [name.replace("|", "\\|"), str(scores.questions), *([str(scores.samples)] if several else [])]
        cells.append(share(scores.accuracy, scores.questions))
        cells += [share(scores.pass_at.get(k, math.nan), scores.questions) for k in ks]
        cells += [share(scores.majority, scores.questions)] if several else []
        cells.append(with_interval(scores))
        numbers = (scores.tool_calls, scores.response_tokens, scores.productivity)
        cells += ["–" if math.isnan(one) else f"{one:.4g}" for one in numbers]
        lines.append(cells)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    about = "Shares and rewards with their 95 % intervals over the questions; calls and tokens per answer."
    return f"{table}\n\n{about}\n"


def in_line(result: EvalResult) -> str:
    """The accuracies: of the task's own questions by the number alone, of further sets with their names."""
    own = [f"{result.total.accuracy:.3f}"] if result.total.questions or not result.sets else []
    return ", ".join([*own, *(f"{name} {one.total.accuracy:.3f}" for name, one in result.sets.items())])


def with_interval(scores: EvalScores) -> str:
    """The mean reward, with its interval where there is one."""
    if math.isnan(scores.reward):
        return "–"
    known = not math.isnan(scores.reward_low)
    return f"{scores.reward:.3f}" + known * f" ({scores.reward_low:.3f} to {scores.reward_high:.3f})"


def share(value: float, questions: int) -> str:
    """A share in per cent, with its 95 % interval over the questions."""
    low, high = interval(value, questions)
    return "–" if math.isnan(low) else f"{value:.1%} ({low:.1%} to {high:.1%})"
