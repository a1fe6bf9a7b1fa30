"""What is judged before a model is loaded, and answers that nothing after them can take away."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from astra_kernels._cache import cache_folder
from astra_runtime import cli, store
from astra_runtime.cli import common, doctor, fitting
from astra_runtime.cli.options import model_name
from astra_runtime.console import say
from astra_runtime.deploy.jobs import Ranks
from astra_runtime.errors import AstraError, PeerLost
from astra_runtime.store import (
    DamagedModel,
    ModelNotFound,
    at_hand,
    load_model,
    load_tokenizer,
    token_limit,
)
from astra_runtime.trace import write_timeline

from ..models import tiny
from ..ranks import key_folder
from .commands import PROMPT, WORDS, model_options

Here = Callable[..., tuple[str, str]]
LONG = " ".join(WORDS[i * 5 % 96] for i in range(90))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(name: str, dtype: str = "float32") -> Any:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(store, "load_model", load_model)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--prompt", "\udcff\udcfe"], "--prompt: expected text in UTF-8, got the bytes b'"),
        (["run", "--prompt", ""], "at least one token"),
        (["run", "--prompt", "x", "--trace", "{home}"], "--trace: expected a file that can be"),
        (["run", "--prompt", "x", "--trace", "{home}/no/where"], "--trace: expected a file"),
        (["run", "--prompt", "x", "--trace", "/proc/none"], "--trace: expected a file"),
        (["run", "--prompt", "x", "--codebook", ""], "--codebook: expected a value, got an empty"),
        (["fit", "--output", ""], "--output: expected a value, got an empty text"),
        (["run", "--prompt", "x", "--world-size", "2", "--keys", "{home}"], "certificate.pem or"),
        (["demo", "--world-size", "2", "--keys", "{home}"], "certificate.pem or rank-0/"),
        (["chat", "--world-size", "2", "--keys", "{home}"], "certificate.pem or rank-0/"),
        (["chat", "--system", "\udcff"], "--system: expected text in UTF-8, got the bytes b'"),
        (["serve", "--world-size", "2", "--keys", "{home}"], "certificate.pem or rank-0/"),
        (["serve", "--tls-key", "{home}/text.txt"], "expected a certificate (--tls-cert)"),
        (["serve", "--tls-cert", "{home}/text.txt"], "TLS: cannot use"),
        (["serve", "--host", "192.0.2.1", "--api-key", "k"], "cannot listen at 192.0.2.1"),
        (["serve", "--allowed-host", "https://a"], "(--allowed-host): expected a name"),
        (["serve", "--trace", "{home}/text.txt"], "--trace: cannot make the folder"),
        (["finetune", "--control", "exact", "--output", "{home}/x", "--lr", "nan"], "--lr: exp"),
        (["finetune", "--control", "exact", "--output", "{home}/x", "--decay", "2"], "--decay: "),
        (["run", "--prompt", "x", "--peers", "127.0.0.1:1,127.0.0.1:2", "--rank", "0",
          "--world-size", "3"], "--world-size: expected 2, the addresses"),
        (["demo", "--trace", "{home}"], "--trace: expected a file"),
        (["demo", "--text", "{home}/none"], "cannot be read"),
        (["eval", "--text", "{home}/none"], "cannot be read"),
        (["fit", "--text", "{home}/none", "--output", "{home}/x"], "cannot be read"),
        (["fit", "--output", "{home}/text.txt/x"], "--output: "),
        (["fit", "--space", "kv", "--target-gap", ".9", "--output", "{home}/x"], "--target-gap"),
        (["finetune", "--control", "exact", "--output", "{home}/text.txt"], "--output: "),
        (["plan", "--codebook", "{home}/none"], "make one with `astra"),
        (["run", "--prompt", "x", "--codebook", "{home}/none"], "make one with `astra"),
        (["eval", "--codebook", "{home}/none"], "make one with `astra"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_a_model_is_loaded(
    home: Path,
    here: Here,
    arguments: list[str],
    message: str,
) -> None:
    told = here(*[word.format(home=home) for word in arguments], code=1)[1]
    assert message in told.strip().splitlines()[-1]


def test_another_models_codebook_is_refused_before_anybody_is_waited_for(
    home: Path,
    here: Here,
) -> None:
    peers = ["--peers", "127.0.0.1:1,127.0.0.1:2", "--connect-timeout", "1"]
    other = ["--model", str(home / "model"), "--codebook", str(home / "other")]
    for command in (["run", "--rank", "0", "--prompt", PROMPT], ["worker", "--rank", "1"]):
        assert "made for a model with" in here(*command, *other, *peers, code=1)[1]


def test_requests_beyond_the_limit_reach_no_other_rank(
    home: Path,
    here: Here,
) -> None:
    peers = ["--rank", "0", "--peers", "127.0.0.1:1,127.0.0.1:2"]
    asked = ["run", *model_options(home), "--prompt", PROMPT, "--max-new-tokens", "100000"]
    told = here(*asked, *peers, code=1)[1]
    assert "--max-new-tokens: expected at most 227 after a prompt of 30 tokens" in told


def test_an_answer_survives_the_loss_of_its_timeline(
    home: Path,
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lose(ranks: Ranks) -> None:
        raise AstraError("the timeline is lost")

    monkeypatch.setattr(Ranks, "timeline", lose)
    asked = ["run", *model_options(home), "--prompt", PROMPT, "--max-new-tokens", "2", "--json"]
    out, told = here(*asked, "--trace", str(home / "lost.json"), code=1)
    assert len(json.loads(out)["text"].split()) == 2
    assert "the timeline is lost" in told


def test_a_demo_shows_what_it_measured_whatever_ends_it(
    home: Path,
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lose(ranks: Ranks, *_: Any) -> None:
        raise AstraError("the continuation is lost")

    monkeypatch.setattr(Ranks, "generate", lose)
    asked = [*model_options(home), "--text", str(home / "text.txt"), "--tokens", "70"]
    out, told = here("demo", *asked, "--world-size", "2", "--repeats", "1", "--mbit", "0", code=1)
    assert "dense sequence parallel" in out
    assert "the continuation is lost" in told


def test_a_timeline_into_a_pipe_leaves_it_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    write_timeline(pipe, {0: [("compute", -1, 0, 5)]})
    assert json.loads(reader.communicate()[0])["traceEvents"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_short_prompts_are_exact_and_long_ones_say_what_they_rest_on(
    home: Path,
    here: Here,
) -> None:
    asked = [*model_options(home), "--max-new-tokens", "4"]
    alone = here("run", *asked, "--prompt", PROMPT)[0]
    out, told = here("run", *asked, "--prompt", PROMPT, "--world-size", "3")
    assert out == alone
    assert "rests on codes" not in told
    assert "0 bits a token and block" in told
    assert "rests on codes" in here("run", *asked, "--prompt", LONG, "--world-size", "2")[1]


def test_output_that_is_not_utf8_loses_no_answer(home: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "astra_runtime"]
    shown = subprocess.run([*command, "finetune", "--help"], capture_output=True, env=environment)
    assert shown.returncode == 0
    code = "from astra_runtime import console; console.show_json({'text': 'мир'})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert json.loads(shown.stdout) == {"text": "мир"}


class Chat:
    """A tokenizer with a chat template."""

    chat_template = "…"

    def __call__(self, text: str, **options: Any) -> Any:
        return type("Encoded", (), {"input_ids": [text]})

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> Any:
        assert options["add_generation_prompt"]
        if any("(" in message["content"] for message in messages):
            raise TypeError("can only concatenate str")
        return {"input_ids": [len(f"<{m['role']}>{m['content']}") for m in messages]}


def test_a_chat_template_is_used_unless_the_prompt_is_raw(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from astra_runtime.cli.prompt import encode_prompt

    options: Any = type("Options", (), {"raw": False})
    assert encode_prompt(options, Chat(), "hello", speak=True).tolist() == [[11]]
    assert encode_prompt(options, Chat(), "hello\n", speak=True).tolist() == [[11]]  # a file's
    assert "--raw" in capsys.readouterr().err
    words = "messages: the model's chat template refuses them: TypeError: can only .*; --raw takes"
    with pytest.raises(AstraError, match=words):
        encode_prompt(options, Chat(), "(", speak=False)
    options.raw = True
    assert encode_prompt(options, Chat(), "hello\n", speak=True) == ["hello\n"]


def test_one_rule_for_the_tokens_of_an_input(capsys: pytest.CaptureFixture[str]) -> None:
    options: Any = type("Options", (), {"tokens": None})
    model = tiny("bert")
    assert token_limit(model) == common.window_tokens(options, model) == 128
    options.tokens = 64
    assert common.window_tokens(options, model) == 64
    options.tokens = 129
    with pytest.raises(AstraError, match="--tokens: expected at most 128"):
        common.window_tokens(options, model)
    assert common.window_tokens(options, model, shorten=True) == 128
    assert "windows of 128 tokens" in capsys.readouterr().err


def test_files_that_lack_weights_are_no_model(tmp_path: Path) -> None:
    model = tiny("llama")
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(DamagedModel, match=r"lack 1 weights, model.layers.1.mlp.up_proj.weight"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_a_configuration_that_contradicts_the_weights_is_named(tmp_path: Path, form: str) -> None:
    """In another form they were taken as they are, without a word."""
    tiny("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_key_value_heads": 1}))
    words = r"expected model.layers.0.self_attn.k_proj.weight with shape \[16, 48\], got \[48, 48\]"
    with pytest.raises(DamagedModel, match=f"its config.json contradicts its weights: {words}"):
        load_model(str(tmp_path), form)
    file.write_text(json.dumps(config | {"hidden_size": 50}))
    with pytest.raises(DamagedModel, match="its config.json is wrong"):
        load_model(str(tmp_path), form)


def _with_biases(state: dict[str, Any]) -> None:
    state["model.layers.0.self_attn.q_proj.bias"] = torch.ones(48)


def _with_scales(state: dict[str, Any]) -> None:
    state["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)


@pytest.mark.parametrize("form", ["float32", "int8"])
@pytest.mark.parametrize(
    ("change", "said", "key"),
    [
        (None, {"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight"),
        (_with_biases, {}, "model.layers.0.self_attn.q_proj.bias"),
        (_with_scales, {}, "model.layers.0.mlp.up_proj.weight_scale"),
    ],
)
def test_weights_that_the_model_would_pass_over_are_named(
    tmp_path: Path, form: str, change: Any, said: dict[str, Any], key: str
) -> None:
    """It gave the answers of a smaller model, without a word."""
    model = tiny("llama")
    state = model.state_dict()
    if change is not None:
        change(state)
    model.save_pretrained(tmp_path, state_dict=state)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    with pytest.raises(DamagedModel, match=f"contradicts its weights: expected no {key}, as"):
        load_model(str(tmp_path), form)


@pytest.mark.parametrize(
    "asked",
    [
        ["fit", "--output", "{made}"],
        ["eval", "--codebook", "none"],
        ["finetune", "--control", "exact", "--output", "{made}"],
    ],
)
def test_a_model_of_images_is_named(
    here: Here,
    tmp_path: Path,
    asked: list[str],
) -> None:
    """It was said to lack a tokenizer."""
    tiny("vit").save_pretrained(tmp_path / "vit")
    filled = [part.format(made=tmp_path / "made") for part in asked]
    told = here(*filled, "--model", str(tmp_path / "vit"), code=1)[1]
    assert "which reads images" in told


def test_files_may_hold_more_than_a_model(tmp_path: Path) -> None:
    """Tables of older versions, and the head of a model whose body is loaded."""
    model = tiny("llama")
    state = model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    model.save_pretrained(tmp_path, state_dict=state)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"architectures": ["LlamaModel"]}
    file.write_text(json.dumps(config))
    assert type(load_model(tmp_path)).__name__ == "LlamaModel"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized .gptq.; load"),
        ({"architectures": ["OurLlama"]}, "names the class 'OurLlama', which transformers 5"),
    ],
)
def test_models_of_other_libraries_are_named(
    tmp_path: Path, said: dict[str, Any], words: str
) -> None:
    tiny("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    with pytest.raises(DamagedModel, match=words):
        load_model(str(tmp_path))
    with pytest.raises(TypeError, match="model: expected a name, a folder or a file, got NoneType"):
        load_model(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", {"architectures": True}, "cannot be loaded: TypeError"),
        ("generation_config.json", 3, "cannot be loaded: TypeError"),
        ("tokenizer_config.json", {"tokenizer_class": [1]}, "has no tokenizer here .AttributeErr"),
        ("tokenizer.json", {"version": 1}, "has no tokenizer here .Exception: invalid type"),
    ],
)
def test_files_that_say_nonsense_are_named_with_their_model(
    home: Path,
    tmp_path: Path,
    file: str,
    content: Any,
    words: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(home / "model", folder)
    if isinstance(content, dict):
        content = json.loads((folder / file).read_text()) | content
    (folder / file).write_text(json.dumps(content))
    load = load_tokenizer if "tokenizer" in file else load_model
    with pytest.raises(ModelNotFound, match=f"model '{folder}' {words}"):
        load(str(folder))


def test_doctor_finds_a_cut_model(
    home: Path,
    here: Here,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "models" / "smollm2"
    tiny("llama").save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path))
    assert at_hand("smollm2") == str(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found = json.loads(here("doctor", "--json", code=1)[0])
    assert not found["healthy"]
    assert [name for name, check in found["checks"].items() if not check["ok"]] == ["model smollm2"]


def test_streams_that_are_closed_are_opened_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`2>&-` leaves None, and `print` would put what is said on stdout, among the results."""
    opened: list[str] = []

    def fstat(number: int) -> None:
        if number == 2:
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(os, "fstat", fstat)
    monkeypatch.setattr(os, "open", lambda path, mode: opened.append(path))
    cli._open_standard_streams()
    replaced = sys.stderr
    monkeypatch.undo()
    assert opened == [os.devnull]
    assert replaced.name == os.devnull
    replaced.close()


def test_a_full_disk_is_told_of_and_ends_no_work(
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("cryptography")
    with open("/dev/full", "w") as full, open(os.devnull, "w") as nothing:
        with monkeypatch.context() as changed:
            changed.setattr(sys, "stdout", full)
            told = here("keys", "show", str(key_folder()), code=1)[1]
            assert sys.stdout.name == os.devnull
            sys.stdout.close()
        with monkeypatch.context() as changed:
            changed.setattr(sys, "stderr", full)
            say("a line for nobody")
        os.dup2(nothing.fileno(), full.fileno())  # what it still has goes nowhere
    assert "No space left on device" in told


def test_a_reader_who_leaves_is_no_error(
    home: Path,
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`astra run … | head -c 1`: the answer ends, and that is all."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as left, open(os.devnull, "w") as nothing:
        with monkeypatch.context() as changed:
            changed.setattr(sys, "stdout", left)
            told = here("run", *model_options(home), "--prompt", PROMPT, code=1)[1]
            sys.stdout.close()  # what stands in its place
        os.dup2(nothing.fileno(), writing)  # what it still has goes nowhere
    assert "error" not in told


def test_a_peer_whose_connection_broke_is_told_of(
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel's word for it is the one for a reader of stdout who has left."""

    def lose(options: argparse.Namespace) -> int:
        raise PeerLost(1, 2, "its process ended") from BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(doctor, "run", lose)
    assert "rank 1" in here("doctor", code=1)[1]


def test_a_folder_that_is_gone_is_told_of(
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "current folder has been removed" in here("doctor", code=1)[1]


def test_what_was_fitted_is_kept_where_the_folder_takes_nothing_more(tmp_path: Path) -> None:
    saved: list[Path] = []

    def save(folder: Path) -> None:
        saved.append(folder)
        if folder == tmp_path:
            raise OSError(errno.ENOSPC, "No space left on device")
        (folder / "result").write_text("whole")

    with pytest.raises(AstraError, match="No space left on device; what was made is in ") as error:
        common.save_result(save, tmp_path)
    assert str(error.value).endswith(str(saved[1]))
    assert (saved[1] / "result").read_text() == "whole"
    shutil.rmtree(saved[1])


def test_a_timeline_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TypeError):
        write_timeline(tmp_path / "t.json", {0: [("compute", -1, 0, 5)]}, about={1, 2})
    assert not list(tmp_path.iterdir())


def test_a_cache_that_can_only_be_read_will_do(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody else has fitted the codebook; no lock can be taken there."""
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path))
    model = load_model(str(home / "model"))
    folder = fitting._cache_folder("model", model)
    shutil.copytree(home / "codebook", folder)
    (folder.parent / f"{folder.name}.lock").mkdir()  # as good as a file that root cannot write
    options: Any = SimpleNamespace(model="model", codebook=None)
    assert fitting.ensure_codebook(options, model, None)[1] == folder


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"ASTRA_CACHE": "~/here"}, "/home/me/here"),
        ({"ASTRA_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/astra"),
        ({"ASTRA_CACHE": "", "XDG_CACHE_HOME": "/var/cache"}, "/var/cache/astra"),
    ],
)
def test_the_folder_of_the_cache(
    variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"HOME": "/home/me"} | variables).items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == folder


def test_a_user_without_a_home_is_told_what_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASTRA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(OSError, match="expected a folder in ASTRA_CACHE"):
        cache_folder()


def test_what_a_model_is_called() -> None:
    names = [".", "adapted/", "org/name", "smollm2"]
    called = [model_name(argparse.Namespace(model=name)) for name in names]
    assert called == [Path.cwd().name, "adapted", "name", "smollm2"]
