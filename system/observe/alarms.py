"""Alarms: what a run's figures say is going wrong, often before its held-out accuracy does.

The last ``WINDOW`` records of training steps are held against the first ``WINDOW`` of the run.  An alarm is
a warning: nothing is stopped.  The bounds are wide, since every one of these figures moves in a healthy run.
They are told on the console and by every view, and recorded in ``alarms.jsonl`` (:class:`AlarmBook`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from statistics import fmean, median

from system.observe.sinks import Alarm

WINDOW = 10  # records
COLLAPSED = 0.1  # of the entropy it began with
FACTOR = 3.0  # longer or shorter answers, more calls
STOPPED_CALLING = 0.2  # of the calls it began with
LOST_FORM = 0.5  # of the share of answers that ended by themselves
ENGINE_KL = 0.01  # nats per token, engine against learner at the same weights; bfloat16 makes some 1e-4
SPIKE = 20.0  # times the median gradient norm
SKIPPED = 0.3  # optimizer steps that were not taken
PAID_NOT_RIGHT = 0.1  # the rise of the reward's mean, and the fall of the accuracy's
DROPPED = 0.2  # of the trees that ended
STALLED_S, STALLED = 300.0, 10.0  # without a training step: at least so long, and so many times the median

# Made of several keys of a record.
_STOPPED, _FORMAT, _DROPPED = "stopped or ended", "format of answers", "dropped share"

Means = Mapping[str, float]  # metric -> its mean; NaN where unknown


class Alarms:
    """Takes the records of training steps in their order; says what is wrong at each."""

    def __init__(self, beginning: dict[str, list[float]]) -> None:
        """``beginning``: metric -> its values in the run's first records.  Filled here and kept by the
        caller, so that a run that is resumed is still held against its own beginning.
        """
        self._beginning = beginning
        self._recent = {key: deque[float](maxlen=WINDOW) for key in _KEYS}

    def look(self, record: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """(name, text) of every alarm at this record."""
        values = dict(record) | dict(_made(record))
        for key, recent in self._recent.items():
            if math.isfinite(value := values.get(key, math.nan)):
                recent.append(value)
                first = self._beginning.setdefault(key, [])
                first += [value] if len(first) < WINDOW else []
        if not math.isfinite(loss := record.get("train/loss", 0.0)):
            yield (
                "loss not finite",
                f"train/loss is {loss}: the step was not taken, if the gradient is not finite either (train/"
                "skipped_steps); look at the reward's values and at learn.lr, and go back to a checkpoint",
            )
        begin, now = _Means.of(self._beginning), _Means.of(self._recent)
        for name, rule in _RULES.items():
            if text := rule(begin, now):
                yield name, text
        norms = self._recent["train/grad_norm"]
        if len(norms) == WINDOW and norms[-1] > SPIKE * (usual := median(norms)) > 0:
            yield (
                "gradient spike",
                f"the gradient's norm is {norms[-1]:.3g}, {norms[-1] / usual:.0f} times the median of "
                f"the last {WINDOW} steps (learn.grad_clip bounds what it does)",
            )


def _made(record: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """What is made of several keys, where the record has them."""
    if "rollout/leaves" in record:  # an outcome that no branch had has no key
        yield _STOPPED, sum(record.get(f"rollout/outcome/{how}", 0.0) for how in ("stopped", "ended"))
    if formats := [
        value for key, value in record.items() if key.startswith("reward/") and key.endswith("/format")
    ]:
        yield _FORMAT, fmean(formats)
    dropped = sum(value for key, value in record.items() if key.startswith("flow/dropped/"))
    if ended := dropped + record.get("rollout/trees", 0.0):
        yield _DROPPED, dropped / ended


class _Means(dict[str, float]):
    """NaN, with which every comparison is false, for what is unknown."""

    @classmethod
    def of(cls, values: Mapping[str, Collection[float]]) -> _Means:
        return cls({key: fmean(some) for key, some in values.items() if len(some) == WINDOW})

    def __missing__(self, key: str) -> float:
        return math.nan


def _entropy(begin: Means, now: Means) -> str | None:
    was, entropy, silent = begin["train/entropy"], now["train/entropy"], now["rollout/zero_variance_share"]
    if entropy < COLLAPSED * was and silent > 0.5 and not now["rollout/accuracy"] > 0.9:
        return (
            f"{entropy:.3g} nats per token, {was:.3g} at the beginning, and {silent:.0%} of the trees teach "
            "nothing: the policy repeats itself (a smaller learn.lr or learn.entropy_coef may help)"
        )
    return None


def _length(begin: Means, now: Means) -> str | None:
    was, length = begin["rollout/response_tokens"], now["rollout/response_tokens"]
    if length > FACTOR * was or length < was / FACTOR:
        return f"{length:.0f} tokens per branch, {was:.0f} at the beginning: read some (espalier tree)"
    return None


def _calls(begin: Means, now: Means) -> str | None:
    was, calls = begin["rollout/calls_per_leaf"], now["rollout/calls_per_leaf"]
    if calls < STOPPED_CALLING * was:
        return f"{calls:.2f} tool calls per branch, {was:.2f} at the beginning: the policy gives its tools up"
    if calls > FACTOR * max(was, 1.0):
        return f"{calls:.2f} tool calls per branch, {was:.2f} at the beginning: read some (espalier tree)"
    return None


def _form(begin: Means, now: Means) -> str | None:
    was, share = begin[_STOPPED], now[_STOPPED]
    if share < LOST_FORM * was:
        return (
            f"{share:.0%} of the branches end by themselves, {was:.0%} at the beginning: the others run into "
            "rollout.max_response_tokens or rollout.call_limit"
        )
    return None


def _format(begin: Means, now: Means) -> str | None:
    was, share = begin[_FORMAT], now[_FORMAT]
    if share < LOST_FORM * was:
        return (
            f"the reward for an answer's form is {share:.2f}, {was:.2f} at the beginning: the policy no "
            "longer writes what can be scored (espalier tree --worst)"
        )
    return None


def _dropped(_: Means, now: Means) -> str | None:
    if (share := now[_DROPPED]) > DROPPED:
        return (
            f"{share:.0%} of the last trees were dropped and will not be trained on: see dropped and causes "
            "in summary.json, and flow/dropped/<reason> in metrics.jsonl"
        )
    return None


def _paid(begin: Means, now: Means) -> str | None:
    reward, right = (now[key] - begin[key] for key in ("rollout/reward", "rollout/accuracy"))
    if reward > PAID_NOT_RIGHT and right < -PAID_NOT_RIGHT:
        return (
            f"the reward's mean rose by {reward:.2f} while the accuracy's fell by {-right:.2f}: the "
            "policy is paid for something else than right answers"
        )
    return None


def _engine(_: Means, now: Means) -> str | None:
    if (kl := now["train/engine_kl"]) > ENGINE_KL:
        return (
            f"engine and learner differ by {kl:.2g} nats per token (KL) at the same weights: the engine's "
            "numbers are not the model's (dtype, quantisation, a kernel), and learn.tis_cap only bounds that "
            "(docs/precision.md)"
        )
    return None


def _skipped(_: Means, now: Means) -> str | None:
    if (share := now["train/skipped_steps"]) > SKIPPED:
        return f"{share:.0%} of the last optimizer steps were not taken: the gradient was not finite"
    return None


_RULES: dict[str, Callable[[Means, Means], str | None]] = {
    "entropy collapse": _entropy,
    "answer length": _length,
    "tool calls": _calls,
    "unfinished answers": _form,
    "format collapse": _format,
    "dropped trees": _dropped,
    "reward without accuracy": _paid,
    "engine mismatch": _engine,
    "skipped steps": _skipped,
}
_KEYS = (
    "train/entropy",
    "train/engine_kl",
    "train/grad_norm",
    "train/skipped_steps",
    "rollout/accuracy",
    "rollout/reward",
    "rollout/response_tokens",
    "rollout/calls_per_leaf",
    "rollout/zero_variance_share",
    *(_STOPPED, _FORMAT, _DROPPED),
)


class StallWatch:
    """Says when a training step takes far longer than those before: some actor stands still."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._awaited: float | None = None  # since when
        self._took = deque[float](maxlen=2 * WINDOW)  # seconds of the last steps

    def began(self) -> None:
        """The loop waits for a step from now on."""
        self._awaited = self._clock()

    def ended(self) -> None:
        """The step is there, or nobody waits for it any more."""
        if self._awaited is not None:
            self._took.append(self._clock() - self._awaited)
        self._awaited = None

    def look(self) -> float | None:
        """Seconds since a stalled step began; None where none is, and before there is anything to compare."""
        if self._awaited is None or len(self._took) < WINDOW:
            return None
        seconds = self._clock() - self._awaited
        return seconds if seconds > max(STALLED_S, STALLED * median(self._took)) else None


class AlarmBook:
    """Tells the sinks when an alarm begins and when it ends; one that lasts is told once."""

    def __init__(self, tell: Callable[[Alarm], object], now: Callable[[], float]) -> None:
        self._tell, self._now = tell, now
        self._on: dict[str, set[str]] = {}  # source -> names

    def seen(self, step: int, source: str, raised: Mapping[str, str]) -> None:
        """All that ``source`` raises now: name -> text."""
        on = self._on.setdefault(source, set())
        for name in sorted(on - raised.keys()):
            on.remove(name)
            self._tell(Alarm(step, self._now(), name, False, ""))
        for name, text in raised.items():
            if name not in on:
                on.add(name)
                self._tell(Alarm(step, self._now(), name, True, text))

    def once(self, step: int, name: str, text: str) -> None:
        """Something that happened, and is over."""
        self._tell(Alarm(step, self._now(), name, True, text))
        self._tell(Alarm(step, self._now(), name, False, ""))
