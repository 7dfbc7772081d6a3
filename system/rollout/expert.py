"""Branches that begin with an expert's turns: what E3-TIR (arXiv 2604.09455) adds to what the model explores.

The turns of a prompt's demonstration stand in the tree once, as EXPERT and TOOL nodes with the expert's own
tool results, and some of the tree's first branches go on from the end of one of these results.  There the
policy is asked as after any result, so that a branch may fork at once where the model is unsure.

E3-TIR puts its branches where the model's entropy along the expert's path is highest, which takes a forward
pass over it; here the number of turns is drawn for each branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from system.envs.protocol import Message
from system.rollout.branch import Branch
from system.rollout.context import RolloutContext
from system.rollout.encode import encode_text
from system.rollout.syntax.base import ParsedCall
from system.tools.outcome import ToolStatus
from system.tree.builder import TreeBuilder
from system.tree.prompt import Prompt
from system.tree.record import Int32, Kind

Turns = tuple[tuple[str, str], ...]  # (what the expert wrote, what it was answered), ...


@dataclass(frozen=True, slots=True)
class Prefix:
    """So many of the expert's turns, as they stand in a tree: what is behind a branch that begins there."""

    node: int  # the TOOL node that they end with
    segments: tuple[tuple[Kind, str], ...]  # what the expert wrote is the model's, for a reward
    tools: tuple[tuple[str, str], ...]


def led(branch: Branch, prefixes: Sequence[Prefix]) -> Branch:
    """A new ``branch``; root number i goes on from the i-th prefix, if there is one: its calls count."""
    if branch.key[0] < len(prefixes):
        prefix = prefixes[branch.key[0]]
        branch.node = branch.answer = prefix.node
        branch.segments, branch.tools, branch.calls = prefix.segments, prefix.tools, len(prefix.tools)
        branch.passed = tuple((calls, 0) for calls in range(1, branch.calls + 1))
    return branch


def turns_of(prompt: Prompt) -> Turns:
    """The demonstration's turns before its answer, up to the first whose result is not known."""
    found: list[tuple[str, str]] = []
    parts = prompt.demonstration
    for (author, said), (after, got) in zip(parts[::2], parts[1::2], strict=False):
        if (author, after) != ("model", "tool") or not (said and got):
            break
        found.append((said, got))
    return tuple(found)


def prefixes(
    context: RolloutContext, growth: TreeBuilder, prompt: Prompt, seed: int, roots: int
) -> Sequence[Prefix]:
    """What half of the first ``roots`` branches of a new tree begin with (of one root, that one); the turns
    of the expert are added to ``growth``.  Nothing for a guided tree, for one that is not drawn
    (``guide.expert``), and where no turn leaves room for a response.
    """
    share, rng = context.guide.expert, np.random.default_rng([seed, 4])
    if not share or growth.guide or rng.random() >= share:
        return ()
    turns = turns_of(prompt)[: context.config.call_limit]
    encoded = [(encode_text(context.tokenizer, said), _result(context, got)) for said, got in turns]
    ends = np.cumsum([said.size + got.size for said, got in encoded])
    room = min(context.config.max_response_tokens, context.max_context - growth.depth(growth.prompt))
    most = int((ends < room).sum())
    if not most:
        return ()
    drawn = rng.integers(1, most + 1, max(1, roots // 2)).tolist()
    node, found = growth.prompt, [Prefix(growth.prompt, (), ())]
    for (said, _), tokens in zip(turns, encoded[: max(drawn)], strict=False):
        segments = found[-1].segments
        for kind, author, own in zip((Kind.EXPERT, Kind.TOOL), (Kind.MODEL, Kind.TOOL), tokens, strict=True):
            begin, node = growth.depth(node), growth.node(node, kind)
            growth.extend(node, own)
            segments = (*segments, (author, context.chat.view(growth.path_tokens(node), begin, author)))
        call = context.syntax.parse(said)
        tool = call.tool if isinstance(call, ParsedCall) else ""
        found.append(Prefix(node, segments, (*found[-1].tools, (tool, str(ToolStatus.OK)))))
    return [found[count] for count in drawn]


def beginnings(growth: TreeBuilder, found: Sequence[Prefix]) -> list[int]:
    """Where a new tree's branches may begin: its prompt, and the results of the expert on the way to the
    deepest of ``found``.
    """
    deepest = max((prefix.node for prefix in found), default=growth.prompt)
    return [node for node in growth.path(deepest) if growth.kind(node) != Kind.EXPERT]


def _result(context: RolloutContext, text: str) -> Int32:
    """Token ids of what the expert was answered, put into the syntax's tags unless it stands in them."""
    if text.lstrip().startswith(context.syntax.result_open.strip()):
        return encode_text(context.tokenizer, text)
    return context.encode_answer((Message(text),), context.config.max_tool_result_tokens, ended=False)
