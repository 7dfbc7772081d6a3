"""What ``espalier prompt`` prints: the first questions exactly as the model will get them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

from system.config import Config, ConfigError
from system.envs.live import TreeSessions
from system.envs.make import make_environment
from system.envs.service import Environments
from system.observe.terminal import shown, visible
from system.rollout.chat import Chat, PromptError, answered_roles, make_chat, planned_syntax
from system.rollout.encode import Tokenizer, local_tokenizer
from system.rollout.planting import opened
from system.tasks.base import HasTokenizer, Task, first, make_task, notes
from system.tree.prompt import Prompt

_HOW = {
    "template": "told by the chat template",
    "words": "told by the call syntax's words, in the system message",
    "data": "told by the data themselves",
    "nobody": "the prompt does not mention them (task.tools_in_prompt)",
}
_RULE = "─" * 72


def describe(config: Config, count: int, held_out: bool = False) -> Iterator[str]:
    """The lines about the first ``count`` training or held-out questions; nothing is started but, where there
    is an environment, a world for each, which tells what it begins with.

    Text of the data is escaped, its line breaks kept.  Raises :class:`ConfigError`, also for a question that
    the chat template refuses.
    """
    task = make_task(config)
    tokenizer = _tokenizer(config, task)
    syntax = planned_syntax(config)
    environment = make_environment(config.environment)
    chat = make_chat(config, tokenizer, config.model.path, syntax, environment)
    yield from map(shown, notes(config, task))
    ends = ", ".join(f"{visible(tokenizer.decode([end]))} ({end})" for end in chat.ends)
    if config.agent.on:
        yield "the agent asks the model in words of its own; what follows is what would be asked without it"
    yield f"the model's turn ends at: {ends or 'no token: only at rollout.max_response_tokens'}"
    calls = syntax.stops if config.rollout.call_limit else ()
    goes_on = ", where the turn goes on" if syntax.several and calls else ""
    yield f"a tool call ends at:      {', '.join(map(visible, calls)) or 'no tools'}{goes_on}"
    yield from map(visible, _answers(chat, answered_roles(config, syntax, environment)))
    questions = task.eval() if held_out else task.train()
    asked = asyncio.run(_opened(config, first(questions, count)))
    for number, prompt in enumerate(asked, 1):
        yield from _question(config, chat, prompt, f"{number} of {len(questions)}")


def _answers(chat: Chat, several: Sequence[Sequence[str]]) -> Iterator[str]:
    """What stands around answers, by who speaks."""
    if chat.codec is None:
        yield "answers stand in:         the call syntax's words (rollout.answers)"
        return
    for roles in several:
        yield f"answers stand in:         the chat template's; {chat.codec.described(roles)}"


async def _opened(config: Config, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """``prompts`` with what their worlds begin with.  Raises :class:`.WorldFailed`."""
    if (environments := Environments.of(config)) is None:
        return prompts
    found: list[Prompt] = []
    for prompt in prompts:
        sessions = TreeSessions(environments.train, prompt, prompt.id, config.run.seed)
        try:
            found.append(opened(prompt, await sessions.begin()))
        finally:
            await sessions.close()
    await environments.settle()
    return found


def _question(config: Config, chat: Chat, prompt: Prompt, number: str) -> Iterator[str]:
    try:
        tokens = chat.encode(prompt.messages)
    except PromptError as error:
        raise ConfigError(f"question {prompt.id}: {error}") from error
    room = config.engine.max_context - tokens.size
    yield f"\nquestion {number}: {visible(prompt.id)} ({visible(prompt.kind)})"
    yield f"  tokens: {tokens.size}; engine.max_context={config.engine.max_context} leaves {room}" + (
        f", less than rollout.max_response_tokens={config.rollout.max_response_tokens}"
        if room < config.rollout.max_response_tokens
        else ""
    )
    yield f"  gold:   {' | '.join(map(visible, prompt.answers)) or 'none'}"
    yield f"  extra:  {', '.join(map(visible, prompt.extra)) or 'nothing'}"
    told = _HOW[chat.told_by(prompt.messages)] if config.rollout.call_limit else "none (rollout.call_limit=0)"
    yield f"  tools:  {told}"
    text = chat.tokenizer.decode(
        tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    yield f"{_RULE}\n{visible(text, breaks=True)}\n{_RULE}"


def _tokenizer(config: Config, task: Task) -> Tokenizer:
    """The model's, or the one that the task brings for a model made here."""
    path = config.model.path
    if not path:
        if isinstance(task, HasTokenizer):
            return task.tokenizer()
        raise ConfigError(
            f"model.path is empty, and task {task.name!r} brings no tokenizer: set model.path to a Hugging "
            "Face directory"
        )
    if not Path(path).is_dir():
        raise ConfigError(f"model.path: there is no directory {path}: give one in Hugging Face format")
    return local_tokenizer(path)
