"""The command as a new user meets it: help, results, and sentences instead of tracebacks."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from astra_runtime.cli import COMMANDS, main

from .commands import astra, model_options


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"astra {command} " in capsys.readouterr().out.split("example")[1]


def test_demo_gives_the_table_as_json(home: Path, here: Callable[..., tuple[str, str]]) -> None:
    out, _ = here(
        "demo", *model_options(home), "--text", str(home / "text.txt"), "--tokens", "60",
        "--world-size", "2", "--mbit", "100", "--repeats", "1", "--json",
    )  # fmt: skip
    found: dict[str, Any] = json.loads(out)
    assert [run["method"] for run in found["runs"]] == ["single", "dense", "astra"]
    assert found["link"]["mbit_per_s"] == 100
    assert found["runs"][0]["speedup"] == 1
    single, dense, _ = (run["perplexity"] for run in found["runs"])
    assert dense == pytest.approx(single, rel=1e-4)
    assert found["local_only_perplexity"] != pytest.approx(single, rel=1e-4)
    assert found["continuation"]


def test_doctor_says_what_works(here: Callable[..., tuple[str, str]]) -> None:
    out, _ = here("doctor", "--json")
    found = json.loads(out)
    assert found["healthy"]
    assert all(check["ok"] for check in found["checks"].values())


LONG_TEXT = ["{model}", "{book}", "--text", "{home}/text.txt"]


ONE_WORD = ["--prompt", "w1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--model", "no/such/model", *ONE_WORD], "model 'no/such/model' is not here"),
        (["run", "--model", "/no/such/model", *ONE_WORD], "there is no such file or folder"),
        (["run", "--model", "{home}/cache", *ONE_WORD], "expected a folder with config.json"),
        (["run", "{model}", "--codebook", "{home}/none", *ONE_WORD], "make one with `astra"),
        (["run", "{model}", "--codebook", "{home}/other", *ONE_WORD], "made for a model with"),
        (["run", "{model}", "{book}", "--prompt", ""], "at least one token"),
        (["run", "{model}", "{book}", *ONE_WORD, "--world-size", "2"], "1 tokens for 2 ranks"),
        (["run", "{model}", "{book}", "--text", "{home}/none.txt"], "cannot be read"),
        (["run", "{model}", "{book}", "--text", "{home}/cache/bytes"], "cannot be read"),
        (["run", "{model}", "{book}", *ONE_WORD, "--weights", "a,b"], "expected 1 positive number"),
        (["run", "{model}", "{book}", *ONE_WORD, "--weights", "1,1"], "--weights: expected 1 posi"),
        (["run", "{model}", *ONE_WORD, "--rank", "1"], "--rank: expected together with --peers"),
        (["run", "{model}", *ONE_WORD, "--rank", "0", "--peers", "foo"], 'expected "host:port"'),
        (["run", "{model}", *ONE_WORD, "--rank", "1", "--peers", "a:1,b:2"], "--rank: expected 0"),
        (["run", "{model}", *ONE_WORD, "--backend", "gloo"], "expected under torchrun only"),
        (["run", "--model", "{home}/bert", *ONE_WORD], "expected a language model"),
        (["worker", "{model}", "--rank", "0", "--peers", "a:1,b:2"], "rank 0 leads"),
        (["worker", "{model}", "--rank", "2", "--peers", "a:1,b:2"], "--rank: expected 0 to 1"),
        (["demo", "{model}", "--mbit", "-5"], "mbit_per_s: expected a positive rate"),
        (["fit", "{model}", "--output", "{home}/text.txt"], "File exists"),
        (["eval", "{model}", "{book}", "--tokens", "3", "--world-size", "3"], "more than 3 tokens"),
        (["run", *LONG_TEXT], "at most 256 tokens, the model's limit, got 600"),
        (["eval", *LONG_TEXT, "--tokens", "1024"], "--tokens: expected at most 256, the model's"),
        (["demo", *LONG_TEXT, "--tokens", "1024"], "--tokens: expected at most 256, the model's"),
        (
            ["fit", "{model}", "--space", "kv", "--bits", "3", "--output", "{home}/x"],
            "expected at least 10, one",
        ),
        (
            ["fit", "{model}", "--space", "transform", "--groups", "3", "--output", "{home}/x"],
            "chooses groups itself",
        ),
        (
            ["fit", "{model}", "--space", "kv", "--target-gap", ".9", "--output", "{home}/x"],
            "--target-gap: expected with --space transform",
        ),
    ],
)
def test_mistakes_get_a_sentence(
    home: Path, here: Callable[..., tuple[str, str]], arguments: list[str], message: str
) -> None:
    (home / "cache").mkdir(exist_ok=True)
    (home / "cache" / "bytes").write_bytes(b"\xff\xfe\xfa")
    words = {"{model}": ["--model", f"{home}/model"], "{book}": ["--codebook", f"{home}/codebook"]}
    given = [w.format(home=home) for a in arguments for w in words.get(a, [a])]
    _, err = here(*given, code=1)
    last = err.strip().splitlines()[-1]
    assert last.startswith("astra: error: ")
    assert message in last


@pytest.mark.parametrize("command", [["run", *ONE_WORD], ["plan"]])
def test_threads_that_no_machine_starts(command: list[str], capsys: Any) -> None:
    """The error was torch's "can't start new thread"."""
    with pytest.raises(SystemExit) as ended:
        main([*command, "--threads", "100000"])
    assert ended.value.code == 2
    assert "--threads: expected at most 1024, got 100000" in capsys.readouterr().err


def test_a_port_in_use_is_named(home: Path, here: Callable[..., tuple[str, str]]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        peers = f"127.0.0.1:1,127.0.0.1:{port}"
        _, err = here("worker", *model_options(home), "--rank", "1", "--peers", peers, code=1)
    last = err.strip().splitlines()[-1]
    assert last.startswith("astra: error: ")
    assert str(port) in last


def test_benchmarks_are_reached_by_name(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--ranks" in astra(home, "bench", "latency", "--help").stdout
    with pytest.raises(SystemExit) as left:
        main(["bench", "nothing"])
    assert left.value.code == 2
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
