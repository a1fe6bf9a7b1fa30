"""The code of README and of every page of docs/ runs, the shell's too, with a tiny model.

`smollm2` is a small random model here: it lies where the converted one would (`ASTRA_CACHE`).
Commands of `astra` run in this process, workers and whatever a shell line sends to the background
in forks of it, since most of a new process's time would go to importing torch and transformers.
"""

from __future__ import annotations

import re
import runpy
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from astra_runtime.cli import main
from tests.documents import LANGUAGES, ROOT, Block, blocks, commands, pages
from tests.processes import Fork, fork_workers
from tests.runtime.ranks import free_ports

transformers = pytest.importorskip("transformers")

ALL = [block for page in pages() for block in blocks(page)]
# Added to a command, so that it takes a second and not minutes.
QUICKLY = {
    "fit": "--text text.txt --tokens 64 --windows 5 --sampled 0 --codewords 16 --world-size 2",
    "eval": "--text text.txt --tokens 64 --windows 1",
    "run": "--max-new-tokens 2",
    "plan": "--tokens 64",
    "finetune": "--text text.txt --steps 2 --tokens 64 --windows 6 --batch 2 --max-ranks 2",
}


def names(block: Block) -> str:
    return f"{block}-{block.language}"


@pytest.mark.parametrize("block", ALL, ids=names)
def test_every_block_runs_or_says_why_not(block: Block) -> None:
    assert block.language in LANGUAGES, "expected a language behind the fence"
    kind, _, reason = block.mark.partition(": ")
    if block.mark.startswith("run by "):
        file, _, test = block.mark.removeprefix("run by ").partition("::")
        assert f"def {test}(" in (ROOT / file).read_text("utf-8")
    elif block.mark and not block.mark.startswith(("table ", "continues")):
        assert kind == "not run"
        assert len(reason.split()) >= 3, "expected a reason"


def test_no_mark_is_overlooked() -> None:
    """Each stands right before a block."""
    for page in pages():
        marks = re.findall(
            r"^<!-- (?:not run|run by|continues).*-->$", page.read_text("utf-8"), re.M
        )
        marked = [b for b in blocks(page) if b.mark.startswith(("not run", "run by", "continues"))]
        assert len(marks) == len(marked), page


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in: a codebook, and a cache with a tiny model by the name of smollm2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from astra_runtime import Codebook

    folder = tmp_path_factory.mktemp("reader")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = transformers.LlamaConfig(
        vocab_size=len(alphabet), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=16, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for part in (model, transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)):
        part.save_pretrained(folder / "cache/models/smollm2")
    windows = torch.randint(len(alphabet), (5, 64))
    Codebook.fit(model, windows, groups=3, codewords=16, held_back=0).save_pretrained(
        folder / "codebook"
    )
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    fork_workers(monkeypatch)
    monkeypatch.chdir(home)
    monkeypatch.setenv("ASTRA_CACHE", str(home / "cache"))
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    torch.manual_seed(0)
    yield home
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def units() -> list[Block]:
    """The blocks that run, each with those that continue it."""
    found: list[Block] = []
    for block in ALL:
        if block.mark == "continues":
            first = found.pop()
            assert first.page == block.page
            block = replace(first, source=first.source + block.source)
        if block.runs:
            found.append(block)
    return found


def with_free_ports(source: str) -> str:
    ports = iter(free_ports(8))
    chosen: dict[str, str] = {}
    return re.sub(
        r"(?<=127\.0\.0\.1:)7\d{3}",
        lambda found: chosen.setdefault(found[0], next(ports).rpartition(":")[2]),
        source,
    )


@pytest.mark.parametrize("block", units(), ids=names)
def test_runs(block: Block, here: Path) -> None:
    source = with_free_ports(block.source)
    if block.language == "shell":
        run_shell(source)
    elif "sys.argv" in source:  # a program of two processes, which gets its rank
        for rank in [Fork(partial(run_python, source, str(rank))) for rank in (0, 1)]:
            assert rank.end()
    else:
        run_python(source)


def run_python(source: str, *arguments: str) -> None:
    sys.argv = ["program", *arguments] if arguments else sys.argv
    exec(compile(source, "document", "exec"), {"__name__": "document"})


def run_shell(source: str) -> None:
    """The commands of a block, which must all end well."""
    behind: list[Fork] = []
    for line in commands(source):
        words = shlex.split(line, comments=True)
        if words == ["wait"]:
            for fork in behind:
                fork.end()
        elif words[0] == "astra":
            given = [word for word in words[1:] if word != "&"]
            given += shlex.split(QUICKLY.get(given[0], ""))
            if words[-1] == "&":
                behind.append(Fork(partial(main, given)))
            else:
                assert main(given) == 0, line
        else:
            assert words[0] == "python"
            run_program(words[1:])


def run_program(words: list[str]) -> None:
    def program() -> None:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")

    assert Fork(program).end()
