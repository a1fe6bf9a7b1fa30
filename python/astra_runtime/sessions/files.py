"""A session as one safetensors file: ids, codes, the last tokens exactly, and whose they are."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..control import Control
from ..engine_parts import EngineParts
from ..errors import SessionRefused, WireError
from ..models import vocabulary_of
from .state import SessionState

FORMAT = "1"
TAIL = 64  # tokens at the end that are saved exactly, where rank 0 has them so
_PIECE = 64 << 20  # bytes of a frame
_SIZE = struct.Struct("<Q")
_OVERHEAD = 1 << 20  # bytes that the header takes at most


def packed(
    engine: EngineParts, state: SessionState, more: Mapping[str, str] | None = None
) -> bytes:
    """The file's bytes; nothing is pending, and this rank's cache is complete.

    `more`: further facts.
    """
    from safetensors.torch import save

    tensors = {"ids": state.ids.cpu()}
    if state.store is None:
        tensors |= _stacked(state, 0, state.read)
    else:
        for block, store in enumerate(state.store):
            data = bytearray(store.packed())
            flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.zeros(0)
            tensors[f"codes.{block:03}"] = flat.to(torch.uint8)
        tensors |= _stacked(state, tail_start(state, engine.rank), state.read)
    facts = _facts(engine) | {"read": str(state.read), "digest": _digest(tensors)}
    return save(tensors, metadata=facts | dict(more or {}))


def tail_start(state: SessionState, rank: int) -> int:
    """The first of the last tokens that `rank` has computed itself, `TAIL` at most."""
    held = state.exact[rank]
    if not held or held[-1][1] < state.read:
        return state.read
    sinks = min(state.prefix, state.read)
    return max(held[-1][0], state.read - TAIL, sinks)


def _stacked(state: SessionState, start: int, stop: int) -> dict[str, Tensor]:
    """Keys and values [blocks, Hkv, n, d] of some tokens."""
    if start == stop:
        return {}
    pairs = state.cache.slices([(start, stop)])
    key, value = (torch.cat(parts).cpu().contiguous() for parts in zip(*pairs, strict=True))
    return {"key": key, "value": value}


def _facts(engine: EngineParts) -> dict[str, str]:
    return {
        "kind": "astra session",
        "format": FORMAT,
        "model": engine.adapter.digest(),
        "codebook": engine.codebook.digest,
        "dtype": str(engine.adapter.dtype),
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        content.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def restored(engine: EngineParts, state: SessionState, data: bytes) -> dict[str, str]:
    """Fills the new, empty `state` with what `packed` gave; the facts beside it.

    Raises:
        ValueError: no file of a session, a damaged one, one of another model or codebook, or with
            ids or codes that these do not have.
    """
    tensors, facts = _read(data)
    for name, wanted in _facts(engine).items():
        if facts.get(name) != wanted:
            raise ValueError(f"its {name} is {facts.get(name)}, expected {wanted}")
    if facts.get("digest") != _digest(tensors):
        raise ValueError("it is damaged: its content is not what was saved")
    read = int(facts["read"])
    state.ids = _ids(engine, tensors.get("ids"), read).to(engine.adapter.device)
    tail = _keys_and_values(engine, tensors, read)
    if state.store is None:
        _fill_dense(state, tail, read)
    else:
        _fill_codes(state, tensors, read)
    state.advance(read, state.owner)
    start = read - (0 if tail is None else tail[0].shape[2])
    for rank in range(state.world_size):
        state.add_exact(rank, start, read)
    if state.store is not None and tail is not None:
        state.held = [(start, read, list(zip(*(t.split(1) for t in tail), strict=True)))]
    return facts


def _read(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    import json

    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        size = _SIZE.unpack_from(data)[0]
        facts = json.loads(data[_SIZE.size : _SIZE.size + size]).get("__metadata__", {})
    except (SafetensorError, ValueError, struct.error, KeyError, AttributeError) as error:
        raise ValueError(f"it is no file of a session: {error}") from error
    return tensors, facts


def _ids(engine: EngineParts, ids: Tensor | None, read: int) -> Tensor:
    config: Any = engine.adapter.model.config
    limit = int(config.max_position_embeddings)
    vocabulary = vocabulary_of(engine.adapter.model)
    if ids is None or ids.dtype != torch.int64 or ids.dim() != 2 or len(ids) != 1:
        raise ValueError("it has no ids, int64 [1, T]")
    tokens = ids.shape[1]
    if not 0 <= read <= tokens <= limit + 1:
        raise ValueError(f"it says that {read} of {tokens} tokens were read; at most {limit} are")
    if tokens and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(f"it has ids that are not among 0 to {vocabulary - 1}")
    return ids


def _keys_and_values(
    engine: EngineParts, tensors: Mapping[str, Tensor], read: int
) -> tuple[Tensor, Tensor] | None:
    """Those of the last tokens [blocks, Hkv, n, d], or None."""
    adapter = engine.adapter
    pair = tensors.get("key"), tensors.get("value")
    key, value = pair
    if key is None or value is None:
        if pair != (None, None):
            raise ValueError("it has keys or values, not both")
        return None
    tokens = key.shape[2] if key.dim() == 4 else -1
    shape = (len(adapter.blocks), adapter.num_key_value_heads, tokens, adapter.head_dim)
    for name, tensor in (("keys", key), ("values", value)):
        if tuple(tensor.shape) != shape or tensor.dtype != adapter.dtype or tokens > read:
            raise ValueError(f"its {name} are {tensor.dtype} {list(tensor.shape)}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"its {name} are not finite")
    return key.to(adapter.device), value.to(adapter.device)


def _fill_dense(state: SessionState, pair: tuple[Tensor, Tensor] | None, read: int) -> None:
    if (0 if pair is None else pair[0].shape[2]) != read:
        raise ValueError(f"it lacks keys and values of its {read} tokens")
    if pair is not None:
        for block, (key, value) in enumerate(zip(*pair, strict=True)):
            state.cache.append(block, key[None], value[None])


def _fill_codes(state: SessionState, tensors: Mapping[str, Tensor], read: int) -> None:
    assert state.store is not None
    count = max(0, read - state.prefix)
    for block, store in enumerate(state.store):
        codes = tensors.get(f"codes.{block:03}")
        if codes is None or codes.dtype != torch.uint8:
            raise ValueError(f"it has no codes of block {block}")
        try:
            store.append_packed(codes.numpy().tobytes(), count)
        except ValueError as error:
            raise ValueError(f"codes of block {block}: {error}") from error


def broadcast(engine: EngineParts, data: bytes | None, source: int, tag: int) -> bytes:
    """Rank `source` sends `data` to all others, in frames of a bounded size."""
    mesh = engine.mesh
    others = [n for n in range(mesh.world_size) if n != mesh.rank]
    if data is not None:
        if others:
            mesh.send(_SIZE.pack(len(data)), block=Control.SESSION_SIZE, plan=tag, to=others)
        for start in range(0, len(data) if others else 0, _PIECE):
            piece = data[start : start + _PIECE]
            mesh.send(piece, block=Control.SESSION, plan=tag, to=others)
        return data
    view = mesh.receive({source: _SIZE.size}, block=Control.SESSION_SIZE, plan=tag)[source]
    size, most = _SIZE.unpack(view)[0], _most_bytes(engine)
    if size > most:
        raise WireError("size of a session", f"at most {most}", size, source)
    parts = []
    for start in range(0, size, _PIECE):
        length = min(_PIECE, size - start)
        view = mesh.receive({source: length}, block=Control.SESSION, plan=tag)[source]
        parts.append(bytes(view))
    return b"".join(parts)


def _most_bytes(engine: EngineParts) -> int:
    adapter: Any = engine.adapter
    width = 2 * adapter.num_key_value_heads * adapter.head_dim * adapter.dtype.itemsize
    codes = 64 * adapter.hidden_size  # more than any codec has
    limit = int(adapter.model.config.max_position_embeddings) + 1
    return _OVERHEAD + limit * (8 + len(adapter.blocks) * (width + codes))


def refused(engine: EngineParts, path: Any, error: Exception) -> SessionRefused:
    return SessionRefused(engine.rank, f"the session in {path} cannot be used: {error}")
