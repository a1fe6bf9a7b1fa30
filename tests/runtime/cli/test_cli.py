"""The command as a new user meets it: help, results, and sentences instead of tracebacks."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from astra_runtime import Codebook, transport
from astra_runtime.cli import COMMANDS, chat, main
from astra_runtime.cli.fitting import codebook_at_hand, default_fine_bits, default_name
from astra_runtime.deploy import launch
from astra_runtime.texts import token_windows
from tests.processes import Fork, fork_workers, runs, workers_of

from ..models import tiny
from ..ranks import free_ports, wait_for

WORDS = [f"w{i}" for i in range(96)]
PROMPT = " ".join(WORDS[i * 7 % 96] for i in range(30))
TEXT = " ".join(WORDS[i * i % 96] for i in range(600))


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

    A new process takes seconds to import torch and transformers; `astra` below starts real ones.
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


def astra(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "astra_runtime", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"ASTRA_CACHE": str(home / "cache")},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def model_options(home: Path) -> list[str]:
    return ["--model", str(home / "model"), "--codebook", str(home / "codebook")]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"astra {command} " in capsys.readouterr().out.split("example")[1]


def test_codes_as_datagrams(home: Path, here: Callable[..., tuple[str, str]]) -> None:
    asked = [*model_options(home), "--prompt", PROMPT, "--max-new-tokens", "3", "--json"]
    alone = json.loads(here("run", *asked)[0])
    asked += ["--world-size", "2", "--space", "none", "--transport", "datagram"]
    asked += ["--on-missing", "degrade", "--deadline-ms", "20000"]
    found = json.loads(here("run", *asked)[0])
    assert (found["text"], found["degraded"], found["missing"]) == (alone["text"], False, {})


def test_datagrams_want_answers_that_may_be_degraded(
    home: Path, here: Callable[..., tuple[str, str]]
) -> None:
    asked = [*model_options(home), "--prompt", PROMPT, "--transport", "datagram"]
    told = here("run", *asked, "--world-size", "2", code=1)[1]
    assert "--transport datagram: expected --on-missing degrade" in told


def test_run_prints_one_json_object(
    home: Path, here: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a worker that is a process of its own."""
    asked = [*model_options(home), "--prompt", PROMPT, "--max-new-tokens", "5", "--json"]
    alone = json.loads(here("run", *asked)[0])
    monkeypatch.setattr(launch, "subprocess", subprocess)
    found = json.loads(here("run", *asked, "--world-size", "2", "--space", "none")[0])
    assert set(found) == {
        "text",
        "world_size",
        "seconds_to_first_token",
        "seconds_per_token",
        "bits_per_token_block",
        "degraded",
        "missing",
        "dtype",
        "threads",
        "weight_bytes",
        "peak_bytes",
    }
    assert found["text"] == alone["text"]
    assert found["world_size"] == 2
    assert len(found["text"].split()) == 5
    assert found["bits_per_token_block"] == 2 * 3 * 16 * 32


def test_run_sends_codes(home: Path, here: Callable[..., tuple[str, str]]) -> None:
    out, _ = here(
        "run", *model_options(home), "--prompt", PROMPT, "--world-size", "2", "--json",
        "--max-new-tokens", "2", "--weights", "1,1", "--halo", "0",
    )  # fmt: skip
    found = json.loads(out)
    assert 15 <= found["bits_per_token_block"] < 16  # rows are padded to whole bytes


@pytest.mark.parametrize("asked", [[], ["--insecure"]], ids=["default", "insecure"])
def test_processes_of_one_command_speak_tls_unless_told_otherwise(
    asked: list[str],
    home: Path,
    here: Callable[..., tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("cryptography")
    meshes: list[Any] = []
    folders: list[Path] = []

    def open_mesh(options: transport.ConnectOptions) -> Any:
        folders.extend(Path(str(folder)) for folder in [options.keys] if folder)
        assert all(folder.stat().st_mode & 0o777 == 0o700 for folder in folders)
        meshes.append(real(options))
        return meshes[-1]

    real = transport.open_mesh
    monkeypatch.setattr(transport, "open_mesh", open_mesh)
    here(
        "run", *model_options(home), "--prompt", PROMPT, "--world-size", "2", "--max-new-tokens",
        "1", *asked,
    )  # fmt: skip
    assert [mesh.encrypted for mesh in meshes] == [not asked]
    assert len(folders) == (0 if asked else 1)
    assert not any(folder.exists() for folder in folders)


@pytest.mark.slow
def test_torchrun_starts_the_ranks(home: Path) -> None:
    asked = ["run", *model_options(home), "--prompt", PROMPT, "--max-new-tokens", "3", "--json"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "astra_runtime", *asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["world_size"] == 2


def test_ranks_that_torchrun_would_have_started(
    home: Path, here: Callable[..., tuple[str, str]]
) -> None:
    asked = ["run", *model_options(home), "--prompt", PROMPT, "--max-new-tokens", "3", "--json"]
    found = json.loads(here(*asked, "--world-size", "2")[0])
    port = free_ports(1)[0].rpartition(":")[2]

    def rank(number: int) -> int:
        place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        return main([*asked, "--backend", "gloo"])

    printed = "".join(fork.end() for fork in [Fork(partial(rank, number)) for number in (0, 1)])
    assert json.loads(printed)["text"] == found["text"]


def test_a_worker_follows_a_leader_on_given_addresses(
    home: Path, here: Callable[..., tuple[str, str]]
) -> None:
    peers = ",".join(free_ports(2))
    asked = ["worker", "--once", "--rank", "1", "--peers", peers, *model_options(home)]
    worker = Fork(lambda: main(asked))
    try:
        out, _ = here(
            "run", *model_options(home), "--rank", "0", "--peers", peers, "--prompt", PROMPT,
            "--json",
        )  # fmt: skip
        assert json.loads(out)["world_size"] == 2
        worker.end()
    finally:
        worker.kill()


def test_a_run_leaves_a_timeline(home: Path, here: Callable[..., tuple[str, str]]) -> None:
    path = home / "timeline.json"
    asked = ["--prompt", PROMPT, "--max-new-tokens", "2", "--trace", str(path)]
    here("run", *model_options(home), *asked, "--world-size", "2", "--halo", "0")
    events = json.loads(path.read_text())["traceEvents"]
    names = {rank: {e["name"] for e in events if e["tid"] == rank} for rank in (0, 1)}
    assert {"compute", "encode", "pack", "send", "attend"} <= names[0]
    assert {"compute", "wait", "unpack", "attend", "merge"} <= names[1]


def test_eval_gives_both_controls(home: Path, here: Callable[..., tuple[str, str]]) -> None:
    out, told = here(
        "eval", *model_options(home), "--text", str(home / "text.txt"), "--tokens", "60",
        "--windows", "3", "--world-size", "3", "--json",
    )  # fmt: skip
    assert "windows of" not in told
    found = json.loads(out)
    assert set(found["perplexity"]) == {"exact", "astra", "local_only", "local_overlap"}
    assert found["windows"] == 3
    assert 15 <= found["bits_per_token_block"] < 16
    assert found["compression"] == pytest.approx(2 * 48 * 32 / found["bits_per_token_block"])
    assert math.isfinite(found["gap_recovered"])


def test_eval_says_how_many_windows_a_text_has(
    home: Path, here: Callable[..., tuple[str, str]]
) -> None:
    asked = ["--text", str(home / "text.txt"), "--tokens", "250", "--windows", "9" * 20, "--json"]
    out, told = here("eval", *model_options(home), *asked)
    assert json.loads(out)["windows"] == 2
    assert "the text has 2 windows of 250 tokens" in told


def test_fit_writes_a_codebook_and_tells_its_worth(
    home: Path, here: Callable[..., tuple[str, str]]
) -> None:
    out, _ = here(
        "fit", "--model", str(home / "model"), "--text", str(home / "text.txt"), "--space", "kv",
        "--bits", "40", "--codewords", "16", "--tokens", "50", "--windows", "8",
        "--world-size", "2", "--output", str(home / "new"), "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert found["groups"] == 8  # one set of 4-bit codes for all heads, within 40 bits
    assert found["bits_per_token_block"] == 32
    assert found["verdict"]
    assert Codebook.from_pretrained(home / "new").digest == found["digest"]


def test_bits_alone_make_transform_codes_that_run(
    home: Path, here: Callable[..., tuple[str, str]]
) -> None:
    model, text = ["--model", str(home / "model")], ["--text", str(home / "text.txt")]
    book = str(home / "transform")
    out, told = here(
        "fit", *model, *text, "--bits", "20", "--codewords", "16", "--tokens", "50", "--windows",
        "8", "--sampled", "2", "--world-size", "2", "--output", book, "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert found["space"] == "transform"
    assert 10 < found["bits_per_token_block"] <= 20
    assert "sampling" in told
    assert Codebook.from_pretrained(book).notes["calibration_vectors"] == 6 * 50 + 2 * 50
    out, _ = here(
        "eval", *model, *text, "--codebook", book, "--tokens", "60", "--windows", "2",
        "--world-size", "2", "--json",
    )  # fmt: skip
    # of 29 and 30 tokens a rank, whole bytes
    assert "local_overlap" in json.loads(out)["perplexity"]
    found_bits = json.loads(out)["bits_per_token_block"]
    assert 60 < found["fine_bits"] <= 80  # of all 29: fewer than those that would have fine codes
    # and a quarter of them have fine codes, 8 of 30
    both = found["bits_per_token_block"] + 8 / 30 * found["fine_bits"]
    assert found_bits == pytest.approx(both, rel=0.02)
    out, _ = here(
        "run", *model, "--codebook", book, "--prompt", PROMPT, "--world-size", "2",
        "--max-new-tokens", "3", "--json",
    )  # fmt: skip
    assert len(json.loads(out)["text"].split()) == 3
    out, _ = here(
        "demo", *model, *text, "--codebook", book, "--tokens", "60", "--world-size", "2",
        "--mbit", "100", "--repeats", "1", "--json",
    )  # fmt: skip
    demo = json.loads(out)
    single, dense, coded = (run["perplexity"] for run in demo["runs"])
    assert dense == pytest.approx(single, rel=1e-4)  # of the same tokens
    assert coded == pytest.approx(single, rel=0.5)


def test_a_target_is_met_by_the_fewest_bits_tried(
    home: Path, here: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from astra_runtime.train import fit

    monkeypatch.setattr(
        fit, "_evaluate", lambda model, book, *rest: FOUND | {"gap_recovered": book.bits / 50}
    )
    for target, wanted, tried in ((0.3, 20, 3), (0.75, 40, 2), (0.9, 80, 2)):
        out, _ = here(
            "fit", "--model", str(home / "model"), "--text", str(home / "text.txt"),
            "--target-gap", str(target), "--codewords", "16", "--tokens", "50", "--windows", "8",
            "--sampled", "0", "--output", str(home / "target"), "--json",
        )  # fmt: skip
        found = json.loads(out)
        assert found["bits_per_token_block"] <= wanted
        assert found["held_back"]["gap_recovered"] >= target
        assert len(found["tried"]) == tried


@pytest.mark.parametrize(
    ("kind", "space", "bits", "wanted"),
    [
        ("llama", "transform", None, 400),
        ("llama", "transform", 10, 40),
        ("llama", "transform", 3000, 64 * 3 * 16),  # no more than dense fp32
        ("llama", "kv", None, 0),
        ("bert", "transform", None, 0),  # an encoder's tokens look both ways
    ],
)
def test_fine_codes_of_a_decoder_by_default(
    kind: str, space: str, bits: float | None, wanted: float
) -> None:
    assert default_fine_bits(tiny(kind), space, bits) == wanted


FOUND = {"windows": 2, "world_size": 2, "metric": "perplexity", "exact": 1.0, "astra": 1.5}
FOUND |= {"local_only": 2.0}


def test_differential_codes_are_fitted_evaluated_and_run(
    home: Path, here: Callable[..., tuple[str, str]]
) -> None:
    model, text = ["--model", str(home / "model")], ["--text", str(home / "text.txt")]
    book = str(home / "differential")
    out, told = here(
        "fit", *model, *text, "--space", "differential", "--groups", "4", "--codewords", "16",
        "--tokens", "50", "--windows", "8", "--world-size", "2", "--output", book, "--json",
    )  # fmt: skip
    bits = 4 * 4 * 2 / 3  # the first of three blocks sends nothing
    assert json.loads(out)["bits_per_token_block"] == pytest.approx(bits)
    assert "10.667 bits a token and block" in told
    out, _ = here(
        "eval", *model, *text, "--codebook", book, "--tokens", "60", "--windows", "2",
        "--world-size", "2", "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert found["bits_per_token_block"] == pytest.approx(bits)
    assert found["compression"] == pytest.approx(48 * 32 / bits)
    out, _ = here(
        "run", *model, "--codebook", book, "--prompt", PROMPT, "--world-size", "2",
        "--max-new-tokens", "3", "--halo", "0", "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert len(found["text"].split()) == 3
    assert found["bits_per_token_block"] == pytest.approx(bits)


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


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_leader(
    home: Path, here: Callable[..., tuple[str, str]], tmp_path: Path, blow: signal.Signals
) -> None:
    # a model whose limit is far off, so that the run cannot end before the blow falls
    shutil.copytree(home / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["max_position_embeddings"] = 1 << 20
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    asked = ["run", "--model", str(tmp_path / "model"), "--codebook", "none", "--prompt", PROMPT]
    asked += ["--world-size", "2", "--max-new-tokens", "100000", "--timeout", "30"]
    with (
        open(tmp_path / "stderr", "w+") as stderr,
        contextlib.closing(Fork(lambda: main(asked), stderr)) as leader,
    ):
        workers = wait_for(lambda: workers_of(leader.pid), 0.05)
        assert len(workers) == 1
        assert leader.stdout.read(1)  # the answer has begun
        leader.send_signal(blow)
        ends = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
        assert leader.wait() == ends[blow]
        wait_for(lambda: not any(map(runs, workers.values())), 0.05)
        stderr.seek(0)
        assert "Traceback" not in stderr.read()


def test_a_default_codebook_of_another_default_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path))
    options = argparse.Namespace(model="some/model", codebook=None)
    for name, taken in (("model-0-transform", False), (default_name("some/model", "0"), True)):
        (tmp_path / "codebooks" / name).mkdir(parents=True)
        (tmp_path / "codebooks" / name / "astra_config.json").touch()
        assert codebook_at_hand(options) is taken


def test_benchmarks_are_reached_by_name(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--ranks" in astra(home, "bench", "latency", "--help").stdout
    with pytest.raises(SystemExit) as left:
        main(["bench", "nothing"])
    assert left.value.code == 2
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


def test_text_comes_token_by_token(
    home: Path, here: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from astra_runtime.cli import streaming

    pieces: list[str] = []
    write = streaming.Streaming.write
    monkeypatch.setattr(
        streaming.Streaming, "write", lambda self, piece: (pieces.append(piece), write(self, piece))
    )
    asked = ["run", *model_options(home), "--prompt", PROMPT, "--max-new-tokens", "4"]
    asked += ["--temperature", "0.8", "--top-p", "0.9", "--seed", "3"]
    out, _ = here(*asked)
    assert out == "".join(pieces)
    assert len([piece for piece in pieces if piece.strip()]) == 4
    assert here(*asked)[0] == out  # the same seed
    assert here(*asked, "--world-size", "2", "--space", "none")[0] == out


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
