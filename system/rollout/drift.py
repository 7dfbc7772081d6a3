"""Where the tokens that a branch goes on from are not what the chat template makes of the whole conversation.

What was sampled stays as it was sampled, so that is the template's doing: it strips what was said, leaves
earlier thoughts out, or writes an answer differently once more is said behind it.  Serving a conversation
anew, from its messages, would show the model the template's text.  It is counted and never mended.
"""

from __future__ import annotations

from collections import Counter

from system.rollout.branch import Branch
from system.rollout.chat import Chat, Told
from system.rollout.codec import ChatMessage, TemplateRefused
from system.tree.record import Int32, Kind


class HistoryDrift:
    """Looks at turns; the counts of a rollout worker."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._counts: Counter[str] = Counter()

    def look(self, told: Told, branch: Branch, path: Int32) -> None:
        """A branch goes on from ``path`` [P] after an answer; ``told``: what its prompt is made of.

        Nothing is looked at where answers do not stand as the template writes them, and where what was heard
        is not known (of an expert, before a resume).
        """
        said = [text for kind, text in branch.segments if kind == Kind.MODEL]
        if self._chat.codec is None or len(branch.heard) != len(said):
            return
        messages: list[ChatMessage] = [*told.messages]
        for text, heard in zip(said, branch.heard, strict=True):
            messages += [{"role": "assistant", "content": text}, *heard]
        try:
            whole = self._chat.codec.rendered(messages, told.tools or ())
        except TemplateRefused:
            whole = None
        here = self._chat.tokenizer.decode(
            path.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        self._counts["chat/turns"] += 1
        self._counts["chat/drift"] += whole != here

    @property
    def counters(self) -> dict[str, float]:
        """Running totals: turns that were looked at, and those that differ."""
        return {name: float(count) for name, count in self._counts.items()}
