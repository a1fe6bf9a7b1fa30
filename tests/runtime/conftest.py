"""A tiny model with its tokenizer, codebooks and a text, and the command `astra` on them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from astra_runtime import Codebook
from astra_runtime.cli import main
from astra_runtime.texts import token_windows
from tests.processes import fork_workers

from .cli.commands import TEXT, WORDS
from .models import tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer, a codebook, a text."""
    folder = tmp_path_factory.mktemp("home")
    vocabulary = {"<unk>": 0} | {word: i + 1 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.save_pretrained(folder / "model")
    model = tiny("llama")
    model.save_pretrained(folder / "model")
    tiny("bert").save_pretrained(folder / "bert")
    (folder / "text.txt").write_text(TEXT)
    ids = token_windows(fast, TEXT, 50, 8)
    book = Codebook.fit(model, ids, groups=3, codewords=32, held_back=2, world_size=2)
    book.save_pretrained(folder / "codebook")
    other = Codebook.fit(tiny("llama", seed=3), ids, groups=3, codewords=32, held_back=0)
    other.save_pretrained(folder / "other")
    return folder


@pytest.fixture
def here(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[str, str]]]:
    """Runs a command in this process, its workers in forks of it: stdout and stderr.

    A new process takes seconds to import torch and transformers; `commands.astra` starts real ones.
    """
    fork_workers(monkeypatch)
    monkeypatch.setenv("ASTRA_CACHE", str(home / "cache"))
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)

    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        assert main(arguments) == code
        return capsys.readouterr()

    yield run
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)
