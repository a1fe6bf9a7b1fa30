"""What is judged before a model is loaded or anybody is waited for, and what an answer rests on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from astra_runtime import store
from astra_runtime.cli import common
from astra_runtime.errors import AstraError
from astra_runtime.store import (
    token_limit,
)

from ..models import tiny
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
