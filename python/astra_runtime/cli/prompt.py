"""The prompt of a command: read, judged, and made token ids."""

from __future__ import annotations

import argparse
from typing import Any

from ..console import say
from ..errors import AstraError
from .options import check_text


def prompt_of(options: argparse.Namespace) -> str:
    """The text of --prompt or --text, judged before a model is loaded."""
    if options.text is not None or options.prompt == "-":
        from ..texts import read_text

        text = read_text("/dev/stdin" if options.text in (None, "-") else options.text)
    else:
        text = check_text("--prompt", str(options.prompt))
    if not text:
        raise AstraError("prompt: expected at least one token, got an empty text")
    return text


def encode_prompt(options: argparse.Namespace, tokenizer: Any, prompt: str, *, speak: bool) -> Any:
    """Token ids [1, T], with the model's chat template around the prompt if it has one."""
    if options.raw or not getattr(tokenizer, "chat_template", None):
        return tokenizer(prompt, return_tensors="pt", verbose=False).input_ids
    if speak:
        say("the prompt is put into the model's chat template (--raw: taken as it stands)")
    import torch

    from ..store import encode_messages

    # the line break that ends a file, or a pipe's last line, is no part of a question
    asked = {"role": "user", "content": prompt.removesuffix("\n")}
    try:
        return torch.tensor([encode_messages(tokenizer, [asked])])
    except AstraError as error:
        raise AstraError(f"{error}; --raw takes the prompt as it stands") from error


def check_length(model: Any, tokens: int, new_tokens: int) -> None:
    """Refuses what the engine would refuse on every rank, before any other rank is asked."""
    from ..store import token_limit

    limit = token_limit(model)
    if limit is not None and tokens > limit:
        raise AstraError(
            f"prompt: expected at most {limit} tokens, the model's limit, got {tokens}"
        )
    if limit is not None and tokens + new_tokens - 1 > limit:
        raise AstraError(
            f"--max-new-tokens: expected at most {limit - tokens + 1} after a prompt of {tokens} "
            f"tokens, as the model's limit is {limit}, got {new_tokens}"
        )


def check_prompt(tokens: int, world_size: int) -> None:
    """Before any process starts: every rank needs a token."""
    if tokens == 0:
        raise AstraError("prompt: expected at least one token, got an empty text")
    if tokens < world_size:
        raise AstraError(
            f"the prompt has {tokens} tokens for {world_size} ranks: expected at least one token "
            "a rank; give a longer prompt or a smaller --world-size"
        )
