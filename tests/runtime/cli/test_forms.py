"""--dtype, --threads and GGUF files on the command line."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest

from astra_runtime import cores, store
from astra_runtime.cli import _parser as parser_of
from astra_runtime.cli.cluster import Cluster
from astra_runtime.cli.leading import LedRanks
from astra_runtime.cli.options import settle_threads, sharing
from astra_runtime.cli.place import Place
from astra_runtime.store import DamagedModel, model_folder

from ..models import tiny
from .commands import PROMPT, model_options


def test_a_run_in_int8_says_what_it_takes(home: Path, here: Any) -> None:
    asked = ["run", *model_options(home), "--prompt", PROMPT, "--max-new-tokens", "3", "--json"]
    whole = json.loads(here(*asked)[0])
    out, told = here(*asked, "--dtype", "int8", "--world-size", "2", "--threads", "1")
    found = json.loads(out)
    assert found["dtype"] == "int8"
    assert len(found["text"].split()) == 3
    assert found["threads"] == {"0": 1, "1": 1}
    assert found["weight_bytes"]["1"] < 0.4 * whole["weight_bytes"]["0"]
    assert found["peak_bytes"]["0"] > found["weight_bytes"]["0"]
    assert "the weights are kept in int8; the codes were fitted for the same checkpoint" in told


def test_training_wants_float32(home: Path, here: Any, tmp_path: Path) -> None:
    asked = [*model_options(home), "--output", str(tmp_path), "--dtype", "int4"]
    told = here("finetune", *asked, code=1)[1]
    assert "--dtype: expected float32, which training needs, got int4" in told


def test_a_checkpoint_that_the_weights_contradict_is_refused(
    home: Path,
    here: Any,
) -> None:
    asked = [*model_options(home), "--prompt", PROMPT, "--checkpoint", "0123456789abcdef"]
    assert "checkpoint: expected" in here("run", *asked, code=1)[1]


def test_processes_share_the_physical_cores(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for cpu in range(8):  # two threads a core
        place = tmp_path / f"cpu{cpu}/topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    quota = tmp_path / "cpu.max"
    assert cores.physical_cores(tmp_path, quota) == 4
    quota.write_text("250000 100000\n")  # a container's share: two and a half
    assert cores.physical_cores(tmp_path, quota) == 3
    quota.write_text("max 100000\n")
    assert cores.physical_cores(tmp_path, quota) == 4
    monkeypatch.setattr(cores, "physical_cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for given, processes, threads in ((None, 1, 4), (None, 3, 1), (None, 9, 1), (7, 2, 7)):
        options = argparse.Namespace(threads=given)
        settle_threads(options, processes)
        assert options.threads == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # as of every program that torch is in
    assert cores.threads_of(1) == cores.threads_of(2) == 3


def test_only_ranks_that_share_a_machine_share_its_cores() -> None:
    apart = ["10.0.0.1:7000", "10.0.0.2:7000", "10.0.0.3:7000"]
    assert [sharing(apart, rank) for rank in range(3)] == [1, 1, 1]
    together = ["10.0.0.1:7000", "10.0.0.2:7000", "10.0.0.1:7001"]
    assert [sharing(together, rank) for rank in range(3)] == [2, 1, 2]
    assert sharing(["127.0.0.1:7000", "[::1]:7001", "127.0.0.2:7002"], 1) == 3
    assert sharing(["Desk:7000", "desk:7001", "127.0.0.1:7002"], 0) == 2


def test_commands_of_a_mesh_settle_the_threads_of_their_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cores, "physical_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    apart, together = "10.0.0.1:7000,10.0.0.2:7000", "10.0.0.1:7000,10.0.0.1:7001"
    for peers, threads in ((apart, 8), (together, 4)):
        place = Place(0, 2, peers.split(","))
        assert cores.threads_of(place.on_this_machine) == threads
        asked = ["serve", "--peers", peers, "--rank", "0", "--insecure"]
        options = parser_of("serve").parse_args(asked)
        LedRanks(options, peers.split(","))
        assert options.threads == threads


@pytest.mark.parametrize("packed", [False, True])
def test_local_workers_pack_weights_as_their_leader_does(packed: bool) -> None:
    asked = ["serve", "--world-size", "2", *(["--pack-weights"] if packed else [])]
    options = parser_of("serve").parse_args(asked)
    led = LedRanks.of(options)
    assert led.settings["pack_weights"] == packed
    ranks = Cluster(options, 2, led.settings, None, None, standing=True)
    arguments = ["worker", "--rank", "1", *ranks._worker_arguments(None)]
    assert parser_of("worker").parse_args(arguments).pack_weights == packed


def test_a_gguf_file_is_converted_once_for_each_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path / "cache"))
    converted: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        converted.append(folder)

    monkeypatch.setattr(store, "_convert", convert)
    file = tmp_path / "model.Q8_0.gguf"
    with pytest.raises(DamagedModel, match="expected a GGUF file"):
        model_folder(str(file))
    file.write_bytes(b"GGUF one")
    first = model_folder(str(file))
    assert model_folder(str(file)) == first
    assert converted == [Path(first)]
    file.write_bytes(b"GGUF another")
    assert model_folder(str(file)) != first
    assert len(converted) == 2


def test_a_codebook_without_its_model_is_told_which_model_was_taken(
    home: Path,
    here: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tiny("llama", num_hidden_layers=2)
    monkeypatch.setattr(store, "load_model", lambda *names, **options: other)
    tokenizer = store.load_tokenizer(str(home / "model"))
    monkeypatch.setattr(store, "load_tokenizer", lambda *names: tokenizer)
    told = here("run", "--codebook", str(home / "codebook"), "--prompt", PROMPT, code=1)[1]
    assert "num_blocks 3 (codebook) and 2 (model)" in told
    assert "(--model is smollm2 unless another is given)" in told
