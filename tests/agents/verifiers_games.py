"""A taskset for the real verifiers: what is asked says what the environment does."""

from __future__ import annotations

import asyncio
import os
import time

import verifiers.v1 as vf
from openai import AsyncOpenAI


class Data(vf.TaskData):
    does: str


class Game(vf.Task[Data]):
    @vf.reward
    async def right(self, trace) -> float:
        match self.data.does:
            case "raise":
                raise ValueError("no luck")
            case "nan":
                return float("nan")
            case "hang":
                time.sleep(600)  # noqa: ASYNC251 -- what it does wrong
            case "die":
                os._exit(3)
            case "print":
                print('{"reward": 7}', flush=True)
        said = [one.content or "" for one in trace.branches[-1].messages if one.role == "assistant"]
        return float("42" in said[-1])

    @vf.reward(weight=0.5)
    async def brief(self, trace) -> float:
        return 1.0

    @vf.metric
    async def turns(self, trace) -> float:
        return float(trace.num_turns)


class Config(vf.TasksetConfig):
    split: str = "train"


class Games(vf.Taskset[Game, Config]):
    def load(self):
        if self.config.split == "test":
            yield Game(Data(prompt="held out", does="right"), self.config.task)
            return
        for does in ("right", "many", "raise", "nan", "hang", "die", "print", "wait"):
            system = "Be brief." if does == "many" else None
            yield Game(Data(prompt=f"What is it, {does}?", system_prompt=system, does=does), self.config.task)


class Player(vf.Harness[vf.HarnessConfig]):
    """Asks until a number is said."""

    EXECUTES_CODE = NEEDS_CONTAINER = False
    APPENDS_SYSTEM_PROMPT = True

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        if data.does == "wait":
            await asyncio.sleep(600)
        async with AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0) as client:
            while True:
                reply = await client.chat.completions.create(model=ctx.model, messages=messages)
                message = reply.choices[0].message
                messages += [message.model_dump(exclude_none=True), {"role": "user", "content": "And?"}]
                if any(letter.isdigit() for letter in message.content or ""):
                    return vf.ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["Games", "Player"]
