"""Text that grows token by token: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder gives for part of a character


class TextStream:
    """The text of one answer, in pieces.

    Args:
        tokenizer: a transformers tokenizer.
        stop: texts that end the answer; neither they nor what follows is given out.

    Attributes:
        stopped: a stop text was found.

    Example:
        stream = TextStream(tokenizer, ["."])
        piece = stream.add(token)  # "" in the middle of a character
        rest = stream.finish()  # what was held back
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._ids: list[int] = []
        self._start = self._read = 0  # of the window, and of what was not given out yet
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The piece that can be shown now that `token` is known."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._release(self._decoded(final=False))

    def finish(self) -> str:
        """What is left: the end of an answer that no stop text has ended."""
        if self.stopped:
            return ""
        piece = self._release(self._decoded(final=True))
        held, self._held = self._held, ""
        return piece if self.stopped else piece + held

    def _decoded(self, *, final: bool) -> str:
        """What the tokens add to the text since the last whole character.

        The tokens of the piece before are decoded with them, since a text may depend on what it
        follows (a space at the beginning, for example).
        """
        known = self._text(self._ids[self._start : self._read])
        text = self._text(self._ids[self._start :])
        if not final and (len(text) <= len(known) or text.endswith(UNFINISHED)):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def _text(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _release(self, piece: str) -> str:
        """What of the text may be shown: nothing that a stop text might begin with."""
        if not self._stop:
            return piece
        text = self._held + piece
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(
            (
                size
                for stop in self._stop
                for size in range(1, len(stop))
                if text.endswith(stop[:size])
            ),
            default=0,
        )
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]
