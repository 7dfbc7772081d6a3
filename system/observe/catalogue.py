"""The catalogue of metrics: every key of ``metrics.jsonl``, its unit, what it is, what it should look like.

It stands in ``metrics.txt``.  ``docs/metrics.md``, ``espalier metrics`` and the Prometheus endpoint (names,
types, help) are made from it; tests hold the keys of real runs against it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from system.errors import ConfigError
from system.plugins import nearest

FIVE = {
    "eval/accuracy": "and `rollout/accuracy`: does it learn? The former rises with the latter; if it stays "
    "behind while rewards rise, the policy is paid for something else.",
    "train/entropy": "does it still try things? It falls slowly. To a tenth within a few steps, while "
    "answers are still wrong, is collapse.",
    "rollout/zero_variance_share": "is there something to learn from? A tree whose leaves all earn the same "
    "teaches nothing: towards 1 the tasks are too easy or too hard.",
    "train/engine_kl": "and `train/mismatch_kl`: is what is trained what was sampled? The former is "
    "arithmetic alone (about 1e-4 in bfloat16), the latter counts staleness, too (below 1e-2).",
    "time/idle_share/<actor>/<cause>": "and `flow/queue_depth`: who waits for whom? A learner that waits for "
    "batches wants more engines, engines that wait at the staleness bound want a faster learner.",
}
"""The five curves to watch: key -> what it tells."""

HEAD = """\
# Metrics

Every key of a run's `metrics.jsonl`, which W&B, TensorBoard, trackio and the Prometheus endpoint get, too
(`docs/observe.md`). Made by `espalier metrics --markdown > docs/metrics.md` of `system/observe/metrics.txt`.

A record is written after each training step, and one after each evaluation. `<…>` stands for names that vary.
A *count* is of what came since the last record; everything else is a level, or a mean over that time. A share
lies in [0, 1]; a key of which nothing is known in a record is not in it. `-`: nothing in particular.
"""

# Units that stand in Prometheus' names as they are; it takes bits for a unit that should be bytes.
_MEASURED = ("bytes", "nats", "tokens", "versions")
_RENAMED = {
    "time": "last_record_timestamp_seconds",
    # To Prometheus, `_h` is an abbreviation of hours.
    **{f"tree/delta_h{which}": f"tree_entropy_rise{which}" for which in ("", "_p10", "_p50", "_p90")},
}
RULE = "| --- " * 5 + "|"
_VARIES = re.compile(r"<(\w+)>")


@dataclass(frozen=True, slots=True)
class Metric:
    """One key of a record, or all of a pattern."""

    key: str  # `<…>` stands for any text
    unit: str  # "" for a plain number; "text" and "mark" are no numbers
    count: bool  # of what came since the last record; else a level
    text: str  # what it is
    looks: str  # what it should look like
    group: str  # the heading that it stands under

    @property
    def numeric(self) -> bool:
        return self.unit not in ("text", "mark")

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of what varies in the key."""
        return tuple(_VARIES.findall(self.key))

    @property
    def prometheus(self) -> str:
        """Its name by Prometheus' conventions: base units in full, ``_ratio`` for a share, ``_total`` for a
        counter; what varies in the key is in labels.
        """
        if self.key in _RENAMED:
            return f"espalier_{_RENAMED[self.key]}"
        parts = [part for part in self.key.split("/") if not _VARIES.fullmatch(part)]
        name = "_".join(re.sub(r"\W+", "_", _VARIES.sub("", part)).strip("_") for part in parts)
        noun, per, _ = self.unit.partition("/s")
        if per:
            name = re.sub(r"_per_s$", "", name)
            name += f"{'' if noun in name.split('_') else f'_{noun}'}_per_second"
        elif self.unit == "s":
            name = _with_unit(re.sub(r"_s(?=_|$)", "_seconds", name), "seconds")
        elif self.unit == "share":
            name = _with_unit(re.sub(r"_share(?=_|$)", "_ratio", name), "ratio")
        elif self.unit in _MEASURED:
            name = _with_unit(name, self.unit)
        return f"espalier_{name}{'_total' * self.count}"


def _with_unit(name: str, unit: str) -> str:
    return name if unit in name.split("_") else f"{name}_{unit}"


@cache
def catalogue() -> dict[str, Metric]:
    """Every metric by its key, in the order of the document."""
    text = (files("system.observe") / "metrics.txt").read_text(encoding="utf-8")
    _, *sections = re.split(r"^# ", text, flags=re.MULTILINE)
    found: dict[str, Metric] = {}
    for section in sections:
        heading, *lines = section.splitlines()
        rows = [line for line in lines if line]
        for row, looks in zip(rows[::2], rows[1::2], strict=True):
            key, unit, what = (part.strip() for part in row.split("|", 2))
            found[key] = Metric(key, unit.lstrip("+").strip(), "+" in unit, what, looks.strip(), heading)
    return found


@cache
def _patterns() -> list[tuple[re.Pattern[str], Metric]]:
    """Of the keys that vary, those with most letters of their own first."""
    varying = [one for one in catalogue().values() if one.labels]
    varying.sort(key=lambda one: -len(_VARIES.sub("", one.key)))
    return [(re.compile(_VARIES.sub(r"(?P<\1>.+)", _escaped(one.key))), one) for one in varying]


def _escaped(key: str) -> str:
    return re.sub(r"[.+*?()\[\]]", r"\\\g<0>", key)


def find(key: str) -> tuple[Metric, dict[str, str]] | None:
    """The metric of a record's ``key``, and what stands there for each of its labels; None for an unknown
    key.
    """
    if (exact := catalogue().get(key)) is not None and not exact.labels:
        return exact, {}
    for pattern, metric in _patterns():
        if match := pattern.fullmatch(key):
            return metric, match.groupdict()
    return None


def text(wanted: str = "") -> str:
    """The catalogue for the console: all of it, what begins so (``train``), or one key, also a record's.

    Raises :class:`ConfigError` for a key that there is not.
    """
    exact = catalogue().get(wanted) or (find(wanted) or (None,))[0]
    chosen = [exact] if exact else [one for key, one in catalogue().items() if key.startswith(wanted)]
    if not chosen:
        close = nearest(wanted, [*catalogue()])
        raise ConfigError(f"no metric {wanted!r}{close}; espalier metrics prints all")
    return "\n".join(line for one in chosen for line in _told(one))


def _told(one: Metric) -> Iterator[str]:
    yield f"{one.key}{f'   [{_unit(one)}]' if _unit(one) else ''}"
    yield textwrap.indent(textwrap.fill(one.text, 96), "    ")
    if one.looks != "-":
        yield textwrap.indent(textwrap.fill(f"should: {one.looks}", 96), "    ")
    if one.numeric:
        yield f"    in Prometheus: {one.prometheus}"
    yield ""


def _unit(one: Metric) -> str:
    return " ".join(filter(None, ["count" if one.count else "", f"of {one.unit}" if one.count else one.unit]))


def markdown() -> str:
    """``docs/metrics.md``."""
    lines = [HEAD, "## Five curves to watch", ""]
    lines += [f"{number}. `{key}`: {why}" for number, (key, why) in enumerate(FIVE.items(), start=1)]
    group = None
    for one in catalogue().values():
        if one.group != group:
            group = one.group
            name, _, told = group.partition(": ")
            title = f"## {name}" if told else "## Of every record"
            lines += ["", title, "", *([f"{told}.", ""] if told else [])]
            lines += [
                "| key | unit | what it is | what it should look like | in Prometheus |",
                "| --- " * 5 + "|",
            ]
        name = f"`{one.prometheus}`" if one.numeric else "-"
        cells = (f"`{one.key}`", _unit(one), one.text, one.looks, name)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
