"""From what a client sends to token ids: messages, the model's chat template, texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...errors import AstraError
from ...store import encode_messages
from .errors import ApiError, expected, invalid
from .schemas import text

ROLES = ("system", "developer", "user", "assistant")
MAX_MESSAGES = 4096
# Parts of a message that other models take.
_UNSUPPORTED = {"image_url": "images", "input_audio": "audio", "file": "files"}


def read_messages(value: Any) -> list[dict[str, str]]:
    """Messages as templates take them: a role and one text each; "developer" is "system"."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise expected("messages", f"a list of 1 to {MAX_MESSAGES} messages", value)
    return [_message(f"messages[{i}]", message) for i, message in enumerate(value)]


def _message(place: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise expected(place, "an object", message)
    role = message.get("role")
    if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise invalid(place, f"{place}: tools are not supported here", "unsupported_parameter")
    if role not in ROLES:
        raise expected(f"{place}.role", " or ".join(ROLES), role)
    content = _content(f"{place}.content", message.get("content"))
    return {"role": "system" if role == "developer" else role, "content": content}


def _content(place: str, content: Any) -> str:
    """A text, or a list of text parts, joined."""
    if isinstance(content, str):
        return text(place, content)
    if not isinstance(content, list) or not content:
        raise expected(place, "a string or a list of text parts", content)
    return "".join(_part(f"{place}[{i}]", part) for i, part in enumerate(content))


def _part(place: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise expected(place, "an object", part)
    kind = part.get("type")
    if isinstance(kind, str) and kind in _UNSUPPORTED:
        message = f"{place}: {_UNSUPPORTED[kind]} are not supported here"
        raise invalid(place, message, "unsupported_parameter")
    if kind != "text":
        raise expected(f"{place}.type", "'text'", kind)
    return text(f"{place}.text", part.get("text"))


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation in the model's template, up to where the answer begins.

    Raises:
        ApiError: the model has no template, or its template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        message = "This model has no chat template: ask /v1/completions for a continuation"
        raise ApiError(400, message, param="model", code="unsupported_endpoint")
    try:
        return encode_messages(tokenizer, messages)
    except AstraError as error:
        raise invalid("messages", str(error)) from None


def encode_text(tokenizer: Any, prompt: str | list[int], param: str) -> list[int]:
    """Token ids of a text, with the special tokens of the model around it; ids as they are."""
    if isinstance(prompt, str):
        ids = [int(token) for token in tokenizer(prompt, verbose=False)["input_ids"]]
    else:
        check_ids(tokenizer, prompt, param)
        ids = prompt
    if not ids:
        raise invalid(param, f"{param}: expected at least one token, got none")
    return ids


def check_ids(tokenizer: Any, ids: Sequence[int], param: str) -> None:
    """Refuses ids that are in no vocabulary."""
    size = len(tokenizer)
    beyond = next((token for token in ids if token >= size), None)
    if beyond is not None:
        raise expected(param, f"token ids below {size}", beyond)


class TokenNames:
    """How single tokens are shown beside their log probabilities."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.byte_level = "ByteLevel" in repr(getattr(backend, "decoder", None))

    def data(self, token: int) -> bytes:
        """The bytes that the token stands for: a part of a character, perhaps."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token in self.added:  # as it stands, in no alphabet
            return str(piece).encode()
        if self.byte_level and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("▁", " ").encode()

    def text(self, token: int) -> str:
        """The token's text; of a part of a character its bytes, as the reference writes them."""
        data = self.data(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_level_alphabet()
