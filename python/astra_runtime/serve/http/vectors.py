"""`/v1/embeddings` and `/v1/images/classify`."""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from .chat import encode_text
from .connection import while_connected
from .errors import expected, invalid, too_long
from .front import record_of
from .schemas import CLASSIFY, EMBEDDINGS
from .server_state import ServerState

DEFAULT_LABELS = 5


async def embeddings(request: Request) -> JSONResponse:
    """`/v1/embeddings`: a vector for each text, as numbers or as float32 in base64."""
    state = ServerState.of(request)
    values = await state.read(request, EMBEDDINGS, "encoder")
    state.check_ready()
    texts = [
        await state.in_thread(_encode, state, text, number)
        for number, text in enumerate(values["input"])
    ]
    work = state.in_time(state.service.embed(texts))
    embedded = await while_connected(request.receive, state.ending, work)
    tokens = sum(each.tokens for each in embedded)
    record_of(request.scope).prompt_tokens = tokens
    state.metrics.tokens.labels("prompt").inc(tokens)
    shape = _base64 if values.get("encoding_format") == "base64" else list
    data = [
        {"object": "embedding", "index": index, "embedding": shape(each.vector)}
        for index, each in enumerate(embedded)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    model = state.service.model_id
    return JSONResponse({"object": "list", "data": data, "model": model, "usage": usage})


def _encode(state: ServerState, text: str | list[int], number: int) -> list[int]:
    if text == "":
        raise invalid("input", f"input[{number}]: expected a text, got an empty string")
    ids = encode_text(state.service.tokenizer, text, "input")
    if len(ids) > state.service.context_length:
        raise too_long("input", len(ids), 0, state.service.context_length)
    return ids


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


async def classify(request: Request) -> JSONResponse:
    """`/v1/images/classify`: the likeliest classes of each image."""
    state = ServerState.of(request)
    values = await state.read(request, CLASSIFY, "vision")
    images = [_image(text, number) for number, text in enumerate(values["image"])]
    state.check_ready()
    work = state.in_time(state.service.classify(images, values.get("top_k", DEFAULT_LABELS)))
    labelled = await while_connected(request.receive, state.ending, work)
    data = [
        {"object": "classification", "index": index, "labels": [_label(each) for each in labels]}
        for index, labels in enumerate(labelled)
    ]
    return JSONResponse({"object": "list", "data": data, "model": state.service.model_id})


def _label(label: Any) -> dict[str, Any]:
    return {"id": label.id, "label": label.name, "score": label.score}


def _image(text: str, number: int) -> bytes:
    """The bytes of an image in base64 or in a data URL; no other URL is ever fetched."""
    place = f"image[{number}]"
    if text.startswith("data:"):
        header, comma, text = text.partition(",")
        if not comma or not header.endswith(";base64"):
            raise expected(place, "data:image/…;base64,…", header)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise expected(place, "an image in base64, or a data: URL of one", text) from None
    if not data:
        raise expected(place, "an image", text)
    return data
