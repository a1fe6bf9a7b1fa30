"""`astra chat`: a conversation that stays on all ranks."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from astra_runtime.cli import chat

from .commands import WORDS


def test_a_conversation_goes_on_from_what_was_said(
    home: Path,
    here: Callable[..., tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    shutil.copytree(home / "model", tmp_path / "model")
    config = tmp_path / "model" / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    words, long = " ".join(WORDS[:70]), "w1 " * 300
    asked = f"{words}\n{long}\nw5 \udcff\nw5 w6\n/clear\nw7\n\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(asked))
    out, told = here(
        "chat", "--model", str(tmp_path / "model"), "--codebook", str(home / "codebook"),
        "--world-size", "2", "--max-new-tokens", "3", "--json", code=1,
    )  # fmt: skip
    # two questions that cannot be answered are told of, and forgotten
    assert "the conversation has 373 tokens, and the model's limit is 256" in told
    assert "question: expected text in UTF-8" in told
    turns = json.loads(out)["turns"]
    assert [turn["question"] for turn in turns] == [words, "w5 w6", "w7"]
    assert [turn["prompt_tokens"] for turn in turns] == [70, 75, 1]
    # what was answered is kept too, but for the last token, which nobody has read
    assert [turn["cached_tokens"] for turn in turns] == [0, 72, 0]
    assert all(len(turn["text"].split()) == 3 for turn in turns)
    assert [bool(turn["coded_tokens"]) for turn in turns] == [True, True, False]


def test_the_screen_says_what_an_answer_rests_on(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"prompt_tokens": 70, "coded_tokens": 0, "degraded": False}
    chat._say_what_it_rests_on(figures)
    assert capsys.readouterr().err == ""
    chat._say_what_it_rests_on(figures | {"coded_tokens": 35, "degraded": True})
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("WARNING: a degraded answer")
    assert "of 70 tokens its rank read 35 as codewords" in told[1]
