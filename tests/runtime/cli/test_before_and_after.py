"""What is judged before a model is loaded, and answers that nothing after them can take away."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from astra_runtime import store
from astra_runtime.cli import common
from astra_runtime.deploy.jobs import Ranks
from astra_runtime.errors import AstraError
from astra_runtime.store import DamagedModel, at_hand, load_model, read_text, token_limit
from astra_runtime.trace import write_timeline

from ..models import tiny
from .test_cli import PROMPT, WORDS, here, home, model_options  # noqa: F401 - two are fixtures

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
    home: Path,  # noqa: F811
    here: Here,  # noqa: F811
    arguments: list[str],
    message: str,
) -> None:
    told = here(*[word.format(home=home) for word in arguments], code=1)[1]
    assert message in told.strip().splitlines()[-1]


def test_another_models_codebook_is_refused_before_anybody_is_waited_for(
    home: Path,  # noqa: F811
    here: Here,  # noqa: F811
) -> None:
    peers = ["--peers", "127.0.0.1:1,127.0.0.1:2", "--connect-timeout", "1"]
    other = ["--model", str(home / "model"), "--codebook", str(home / "other")]
    for command in (["run", "--rank", "0", "--prompt", PROMPT], ["worker", "--rank", "1"]):
        assert "made for a model with" in here(*command, *other, *peers, code=1)[1]


def test_requests_beyond_the_limit_reach_no_other_rank(
    home: Path,  # noqa: F811
    here: Here,  # noqa: F811
) -> None:
    peers = ["--rank", "0", "--peers", "127.0.0.1:1,127.0.0.1:2"]
    asked = ["run", *model_options(home), "--prompt", PROMPT, "--max-new-tokens", "100000"]
    told = here(*asked, *peers, code=1)[1]
    assert "--max-new-tokens: expected at most 227 after a prompt of 30 tokens" in told


def test_an_answer_survives_the_loss_of_its_timeline(
    home: Path,  # noqa: F811
    here: Here,  # noqa: F811
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
    home: Path,  # noqa: F811
    here: Here,  # noqa: F811
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
    home: Path,  # noqa: F811
    here: Here,  # noqa: F811
) -> None:
    asked = [*model_options(home), "--max-new-tokens", "4"]
    alone = here("run", *asked, "--prompt", PROMPT)[0]
    out, told = here("run", *asked, "--prompt", PROMPT, "--world-size", "3")
    assert out == alone
    assert "rests on codes" not in told
    assert "0 bits a token and block" in told
    assert "rests on codes" in here("run", *asked, "--prompt", LONG, "--world-size", "2")[1]


def test_output_that_is_not_utf8_loses_no_answer(home: Path) -> None:  # noqa: F811
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "astra_runtime"]
    shown = subprocess.run([*command, "finetune", "--help"], capture_output=True, env=environment)
    assert shown.returncode == 0
    code = "from astra_runtime import console; console.show_json({'text': 'мир'})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert json.loads(shown.stdout) == {"text": "мир"}


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


class Chat:
    """A tokenizer with a chat template."""

    chat_template = "…"

    def __call__(self, text: str, **options: Any) -> Any:
        return type("Encoded", (), {"input_ids": [text]})

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> Any:
        assert options["add_generation_prompt"]
        return {"input_ids": [f"<{message['role']}>{message['content']}" for message in messages]}


def test_a_chat_template_is_used_unless_the_prompt_is_raw(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from astra_runtime.cli.run import encode_prompt

    options: Any = type("Options", (), {"raw": False})
    assert encode_prompt(options, Chat(), "hello", speak=True) == ["<user>hello"]
    assert "--raw" in capsys.readouterr().err
    options.raw = True
    assert encode_prompt(options, Chat(), "hello", speak=True) == ["hello"]


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


def test_doctor_finds_a_cut_model(
    home: Path,  # noqa: F811
    here: Here,  # noqa: F811
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


def test_a_text_without_an_end_is_refused() -> None:
    with pytest.raises(AstraError, match="expected at most 64 MiB, got more"):
        read_text("/dev/zero")
