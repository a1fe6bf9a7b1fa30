"""Texts that are at hand, and the token windows that are cut of a text."""

from __future__ import annotations

import codecs
import os
import stat
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import AstraError


def _paragraphs(topics: Sequence[str]) -> list[str]:
    """Paragraphs in order, each once: topics, and files of source, quote each other."""
    seen: dict[str, None] = {}
    for topic in topics:
        parts = (part.strip("\n") for part in topic.split("\n\n"))
        seen.update(dict.fromkeys(part for part in parts if part.strip()))
    return list(seen)


def _documentation() -> list[str]:
    """The topics of Python's reference, by name."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _source() -> list[str]:
    """Modules of the standard library, by name: those of 16 to 64 KiB, not the private ones."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [
        file for file in sorted(folder.glob("[a-z]*.py")) if 16 <= file.stat().st_size >> 10 < 64
    ]
    if len(files) < 10:
        raise AstraError(f"domain 'source': expected the standard library's source in {folder}")
    return [read_text(file) for file in files]


DOMAINS = {"documentation": _documentation, "source": _source}


def builtin_text(domain: str = "documentation") -> tuple[str, str]:
    """Real text that every Python brings along: (calibration, evaluation).

    Every fifth topic, or file, is for prompts and evaluation; no paragraph of these is in the other
    part.

    Args:
        domain: "documentation", the prose of Python's reference, or "source", the code of its
            standard library. Codebooks are fitted on one, and may be tried on the other.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain: expected one of {', '.join(DOMAINS)}, got {domain!r}")
    texts = DOMAINS[domain]()
    evaluation = _paragraphs(texts[::5])
    aside = set(evaluation)
    rest = [text for i, text in enumerate(texts) if i % 5]
    calibration = [p for p in _paragraphs(rest) if p not in aside]
    return "\n\n".join(calibration), "\n\n".join(evaluation)


MOST_PIPED = 64 << 20  # bytes of text, where no file says how long it is


def read_text(file: str | os.PathLike[str]) -> str:
    """A text file in UTF-8, with or without a byte order mark; lines may end in CR LF.

    Raises:
        AstraError: it cannot be read, or is in another encoding.
    """
    name = f"text {os.fspath(file)!r}"
    try:
        with open(file, "rb") as source:
            whole = stat.S_ISREG(os.fstat(source.fileno()).st_mode)
            data = source.read(-1 if whole else MOST_PIPED + 1)
    except (OSError, ValueError) as error:
        raise AstraError(f"{name} cannot be read: {error}") from error
    if not whole and len(data) > MOST_PIPED:
        raise AstraError(
            f"{name} cannot be read: expected at most {MOST_PIPED >> 20} MiB, got more"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AstraError(
            f"{name} cannot be read: expected UTF-8, got {_encoding(data)} ({error}); "
            "`iconv -t utf-8` converts a text"
        ) from error
    if "\0" in text:
        raise AstraError(f"{name} cannot be read: expected UTF-8, got {_encoding(data)}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _encoding(data: bytes) -> str:
    """A guess at what is no UTF-8 text."""
    marks = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
    marks |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
    for mark, encoding in marks.items():
        if data.startswith(mark):
            return encoding
    return "NUL bytes, as in UTF-16 or a binary file" if b"\0" in data else "another encoding"


def excerpts(text: str, count: int, characters: int) -> list[str]:
    """`count` parts of a text, evenly spaced; each begins with a paragraph where one is near."""
    near, parts = characters // 4, []
    room = max(0, len(text) - characters - near)
    for number in range(count):
        start = number * room // max(1, count - 1)
        found = text.find("\n\n", start, start + near) if start else -1
        start = start if found < 0 else found + 2
        parts.append(text[start : start + characters])
    return parts


class _Tokens:
    """Token ids of a text; an encoder's windows are framed by class token and separator."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        first = getattr(tokenizer, "cls_token_id", None)
        last = getattr(tokenizer, "sep_token_id", None)
        self.frame = [] if first is None or last is None else [first, last]
        self.ids: Tensor = tokenizer(
            text, return_tensors="pt", verbose=False, add_special_tokens=not self.frame
        ).input_ids[0]

    def window(self, start: int, tokens: int) -> Tensor:
        """int64, at most `tokens` of them, the frame counted."""
        body = self.ids[start : start + tokens - len(self.frame)].long()
        if not self.frame:
            return body
        first, last = self.frame
        return torch.cat([torch.tensor([first]), body, torch.tensor([last])])


def first_tokens(tokenizer: Any, text: str, tokens: int) -> Tensor:
    """The beginning of a text, int64 [at most `tokens`], framed as `token_windows` are."""
    return _Tokens(tokenizer, text).window(0, tokens)


def token_windows(tokenizer: Any, text: str, tokens: int, windows: int) -> list[Tensor]:
    """`windows` windows of `tokens` token ids, evenly spaced over the text, not overlapping.

    An encoder's windows each begin with its class token and end with its separator.
    """
    tokenized = _Tokens(tokenizer, text)
    found, body = len(tokenized.ids), tokens - len(tokenized.frame)
    if not 1 <= body <= found:
        raise AstraError(
            f"text: expected at least {tokens} tokens, got {found + tokens - body}; "
            "give a longer text or ask for fewer tokens"
        )
    count = min(windows, found // body)
    starts = [i * (found - body) // max(1, count - 1) for i in range(count)]
    return [tokenized.window(start, tokens) for start in starts]
