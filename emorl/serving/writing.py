"""Tokens become text as they come: whole characters, up to a stop string, and behind the mark where answers begin."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

BROKEN = "\N{REPLACEMENT CHARACTER}"  # the first bytes of a character whose others come with the next tokens
_MOST_BYTES = 8  # tokens that a character may take; more are none


@dataclass(frozen=True)
class Piece:
    """What a token adds to the answer, and to the text before the mark behind which answers begin."""

    text: str = ""
    reasoning: str = ""


class TextWriter:
    """One text in the making. All pieces together are the answer, as `decode` and `answer_in` would give it, but that answers
    begin behind the first mark: what was told cannot be taken back where another one comes.

    Args:
        stop: texts before which it ends.
        after: the mark behind which answers begin; before it, all is reasoning.
        strip: leaves out white space at both ends, as evaluation does.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), after: str | None = None, strip: bool = False
    ) -> None:
        self._tokenizer, self._stop, self._after, self._strip = tokenizer, [text for text in stop if text], after, strip
        self._ids: list[int] = []
        self._shown = self._decoded = 0  # tokens that are text already, and those before them that decide how they look
        self._held = ""  # may yet be the beginning of a stop string or of the mark, or white space at the end
        self._has_begun = False  # whether anything of the present part was given out
        self.has_stopped = False

    def add(self, token: int) -> Piece:
        """The next token; what can be said since."""
        self._ids.append(token)
        before = self._text(self._ids[self._shown : self._decoded])
        now = self._text(self._ids[self._shown :])
        may_be_whole_later = now.endswith(BROKEN) and len(self._ids) - self._decoded < _MOST_BYTES
        if self.has_stopped or len(now) <= len(before) or may_be_whole_later:
            return Piece()
        self._shown, self._decoded = self._decoded, len(self._ids)
        return self._taken(now[len(before) :])

    def end(self) -> Piece:
        """The last piece, of what was held back."""
        if self.has_stopped:
            return Piece()
        before = self._text(self._ids[self._shown : self._decoded])
        piece = self._taken(self._text(self._ids[self._shown :])[len(before) :])
        return piece if self.has_stopped else _joined(piece, self._rest())

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _taken(self, text: str) -> Piece:
        """Further text, up to a stop string, without what must be held back."""
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self._held, self.has_stopped = self._held[: min(found)], True
        reasoning = Piece()
        if self._after is not None and self._after in self._held:
            thought, self._held = self._held.split(self._after, 1)
            reasoning = self._part(thought.rstrip() if self._strip else thought)
            self._after, self._has_begun = None, False
        if self.has_stopped:
            return _joined(reasoning, self._rest())
        awaited = self._stop if self._after is None else [*self._stop, self._after]
        ready = len(self._held) - max((_overlap(self._held, text) for text in awaited), default=0)
        if self._strip:
            ready = len(self._held[:ready].rstrip())
        given, self._held = self._held[:ready], self._held[ready:]
        return _joined(reasoning, self._part(given))

    def _rest(self) -> Piece:
        rest, self._held = self._held, ""
        return self._part(rest.rstrip() if self._strip else rest)

    def _part(self, text: str) -> Piece:
        if self._strip and not self._has_begun:
            text = text.lstrip()
        self._has_begun = self._has_begun or bool(text)
        return Piece(text) if self._after is None else Piece(reasoning=text)


def _overlap(text: str, awaited: str) -> int:
    """How many last characters of a text are the first ones of an awaited one."""
    most = min(len(text), len(awaited) - 1)
    return next((size for size in range(most, 0, -1) if awaited.startswith(text[-size:])), 0)


def _joined(one: Piece, other: Piece) -> Piece:
    return Piece(one.text + other.text, one.reasoning + other.reasoning)
