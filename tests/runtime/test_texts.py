"""Texts that are at hand, how files of text are read, and windows of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from astra_runtime.errors import AstraError
from astra_runtime.texts import (
    DOMAINS,
    builtin_text,
    excerpts,
    first_tokens,
    read_text,
    token_windows,
)

WORDS = [f"w{i}" for i in range(96)]
TEXT = " ".join(WORDS[i * i % 96] for i in range(600))


@pytest.fixture
def tokenizer() -> Any:
    """A word is a token."""
    vocabulary = {"<unk>": 0} | {word: i + 1 for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_built_in_texts_share_no_paragraph(domain: str) -> None:
    calibration, evaluation = builtin_text(domain)
    assert (calibration, evaluation) == builtin_text(domain)
    shared = set(calibration.split("\n\n")) & set(evaluation.split("\n\n"))
    assert not shared
    assert len(calibration) > 200_000
    assert len(evaluation) > 50_000


def test_domains_are_different_texts() -> None:
    assert builtin_text() == builtin_text("documentation")
    assert "def __init__(self" in builtin_text("source")[1]
    assert builtin_text("source")[1].count("def ") > 20 * builtin_text()[1].count("def ")
    with pytest.raises(ValueError, match="expected one of documentation, source, got 'prose'"):
        builtin_text("prose")


def test_excerpts_are_spread_and_begin_with_a_paragraph() -> None:
    text = "\n\n".join(f"{n:04} " + "word " * 20 for n in range(300))
    parts = excerpts(text, 3, 1000)
    assert [len(part) for part in parts] == [1000, 1000, 1000]
    numbers = [int(part[:4]) for part in parts]
    assert numbers[0] == 0
    assert abs(numbers[1] - 145) < 4
    assert excerpts("short", 2, 1000) == ["short", "short"]
    assert excerpts(text, 1, 50) == [text[:50]]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("a\nß".encode(), "a\nß"),
        ("a\r\nß\rc".encode("utf-8-sig"), "a\nß\nc"),
        (b"", ""),
    ],
)
def test_texts_are_read_as_people_have_them(tmp_path: Path, data: bytes, text: str) -> None:
    (tmp_path / "text").write_bytes(data)
    assert read_text(tmp_path / "text") == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("aß".encode("utf-16"), "got UTF-16"),
        ("aß".encode("utf-32"), "got UTF-32"),
        ("aß".encode("latin-1"), "got another encoding"),
        ("ab".encode("utf-16-le"), "got NUL bytes"),
    ],
)
def test_other_encodings_get_a_sentence(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(AstraError, match=message):
        read_text(tmp_path / "text")


def test_a_text_without_an_end_is_refused() -> None:
    with pytest.raises(AstraError, match="expected at most 64 MiB, got more"):
        read_text("/dev/zero")


def test_the_first_tokens_are_those_of_a_window(tokenizer: Any) -> None:
    (window,) = token_windows(tokenizer, TEXT, 20, 1)
    assert torch.equal(first_tokens(tokenizer, TEXT, 20), window)
    assert len(first_tokens(tokenizer, TEXT, 1 << 20)) < 1 << 20


def test_windows_are_spread_and_do_not_overlap(tokenizer: Any) -> None:
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    windows = token_windows(tokenizer, TEXT, 100, 4)
    assert torch.equal(windows[0], ids[:100])
    assert torch.equal(windows[-1], ids[-100:])
    assert len(token_windows(tokenizer, TEXT, 100, 50)) == 6
