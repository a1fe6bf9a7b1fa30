"""`astra run`: answers of several processes, over every transport, as they come."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from astra_runtime import transport
from astra_runtime.cli import main
from astra_runtime.deploy import launch
from tests.processes import Fork, runs, workers_of

from ..ranks import free_ports, wait_for
from .commands import PROMPT, model_options


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
