"""A language model as a reward, on any server of OpenAI's chat completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from system.rollout.reward import BranchView, Score, ScoreFailed
from system.rollout.rewards.judge_prompt import (
    RUBRIC,
    SYSTEM,
    TEMPLATE,
    Messages,
    NoVerdict,
    Questionnaire,
    criteria,
)
from system.rollout.rewards.judge_server import JudgeServer, Verdicts, request_key
from system.rollout.words import final_answer
from system.tree.prompt import Prompt
from system.tree.record import Kind, Outcome

_ROUNDING = 1e-9  # of a weighted mean
_TRIED = (  # what a judge is asked before a run begins
    Prompt("", ({"role": "user", "content": "What is 1 + 1?"},), ("2",)),
    BranchView(((Kind.MODEL, "2"),), Outcome.STOPPED),
)


class Judge:
    """Grades each answer by a rubric; the value is the weighted mean of the grades, in [0, 1].

    Options, beside those of :class:`Questionnaire` and :class:`JudgeServer`:

    * ``base_url``: up to and without ``/chat/completions``; ``api_key_env``: the environment variable with
      the key that the server wants to be shown, when the run begins;
    * ``parameters``: of the request (``{max_tokens: 512}``); null takes one out, temperature too;
    * ``correct_at``: the value from which an answer counts as correct;
    * ``skip_equal``: an answer that is the reference word for word is correct without asking;
    * ``price_read``, ``price_written``: of a million tokens, for the metric ``cost``.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "",
        system: str = SYSTEM,
        template: str = TEMPLATE,
        rubric: list[dict[str, Any]] | None = None,
        verdict: str = "json",
        parameters: dict[str, Any] | None = None,
        max_chars: int = 20_000,
        correct_at: float = 1.0,
        skip_equal: bool = False,
        retries: int = 5,
        try_s: float = 20.0,
        rate_per_s: float = 0.0,
        price_read: float = 0.0,
        price_written: float = 0.0,
        deadline_s: float = math.inf,
        secret: Callable[[str], str | None] | None = None,
        store: Path | None = None,
    ) -> None:
        """``deadline_s``: of the reward, and the longest Retry-After that is waited for.  ``secret``,
        ``store``: the system's to give (:meth:`system.rollout.scoring.Scoring.of`).

        Raises ValueError naming the option.
        """
        if isinstance(secret, str) or isinstance(store, str):
            raise ValueError("secret and store are the system's: name the key's variable by api_key_env")
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url={base_url!r} must begin with http:// or https://")
        for name, value, least in (("retries", retries, 0), ("rate_per_s", rate_per_s, 0)):
            if value < least:
                raise ValueError(f"{name}={value} must be {least} or more")
        if try_s <= 0 or max_chars < 2:
            raise ValueError("try_s must be above 0, and max_chars 2 or more")
        self._criteria = criteria(RUBRIC if rubric is None else rubric)
        self._form = Questionnaire(system, template, self._criteria, verdict, max_chars)
        self._correct_at, self._skip_equal = correct_at, skip_equal
        key = secret(api_key_env) if secret and api_key_env else ""
        if key is None:
            raise ValueError(f"api_key_env={api_key_env}: this process was handed no such key")
        self._server = JudgeServer(
            base_url,
            model,
            parameters or {},
            key=key,
            retries=retries,
            try_s=try_s,
            rate_per_s=rate_per_s,
            deadline_s=deadline_s,
            prices=(price_read, price_written),
        )
        self._verdicts = Verdicts(store / "judge" if store else None)

    @property
    def measured(self) -> Sequence[str]:
        return [one.name for one in self._criteria]

    async def score(self, prompt: Prompt, branch: BranchView) -> Score:
        if self._skip_equal and _plain(final_answer(branch.model_text)) in map(_plain, prompt.answers):
            return self._scored((1.0,) * len(self._criteria))
        messages = self._form.messages(prompt, branch)
        key = request_key(self._server.url, self._server.body(messages))
        return self._scored(await self._verdicts.get(key, lambda: self._judged(messages)))

    async def check(self, within_s: float) -> None:
        """Have one answer graded, whatever the grade.  Raises as :meth:`.JudgeServer.check` does."""
        try:
            await self._server.check(self._form.messages(*_TRIED), within_s)
        finally:
            await self.close()

    async def _judged(self, messages: Messages) -> tuple[tuple[float, ...], str]:
        """Grades and the reply that they stand in; a reply without any is asked for again, once."""
        reply = await self._server.ask(messages)
        try:
            return self._form.read(reply), reply
        except NoVerdict as fault:
            messages = self._form.again(messages, reply, str(fault))
        self._verdicts.counts["asked_again"] += 1
        reply = await self._server.ask(messages)
        try:
            return self._form.read(reply), reply
        except NoVerdict as fault:
            said = f"judge: no verdict: {fault}; it replied {reply[-200:]!r}"
            raise ScoreFailed(said, "verdict") from fault

    def _scored(self, grades: Sequence[float]) -> Score:
        weights = [one.weight for one in self._criteria]
        value = sum(w * grade for w, grade in zip(weights, grades, strict=True)) / sum(weights)
        parts = {one.name: grade for one, grade in zip(self._criteria, grades, strict=True)}
        return Score(value, value >= self._correct_at - _ROUNDING, parts)

    @property
    def counters(self) -> Mapping[str, float]:
        """Running totals: ``requests`` sent, ``answers`` and the seconds they took (``answer_s``),
        ``retries``, ``refused`` (429), ``asked_again``, ``cache_hits``, ``joins``, tokens and ``cost``.
        """
        counts = self._server.counts + self._verdicts.counts
        return {name: float(count) for name, count in counts.items()} | self._server.amounts

    async def close(self) -> None:
        await self._server.close()


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
