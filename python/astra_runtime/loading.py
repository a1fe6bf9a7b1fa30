"""Loading a model in another form than its files have, one tensor at a time.

The weights of a model in float32 are never all in memory: each tensor is read, rounded and let go
before the next. What the files do not hold under the names of the model's own tensors (another
layout, a base model without its head) is left to transformers, which reads all of it first.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .models import adapt
from .models.digest import digests_of, entry_of
from .models.families import FAMILIES
from .models.quantize import quantize
from .models.quantized import BITS, quantizable, quantized_module, tie_head
from .steady import give_back

FORMS = ("float32", "bfloat16", *BITS)
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_HEADER = 100 << 20  # bytes, as safetensors itself allows


class _NotAsStored(Exception):
    """The files do not hold the model's tensors one by one under their names."""


def form_named(dtype: torch.dtype | str) -> str:
    """A form's name, of the name itself or of a torch dtype.

    Raises:
        ValueError: neither.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in FORMS:
        raise ValueError(f"dtype: expected one of {', '.join(FORMS)}, got {dtype!r}")
    return name


def load_in_form(kind: Any, folder: str, config: Any, form: str, whole: Any) -> Any:
    """The model of a folder in `form`, which is not float32; it knows its checkpoint.

    Args:
        kind: the class of the model.
        whole: gives the model in float32, for files that cannot be read tensor by tensor.
    """
    if config.model_type in FAMILIES:
        with contextlib.suppress(_NotAsStored):
            return _streamed(kind, Path(folder), config, form)
    model = whole()
    adapter = adapt(model)
    checkpoints = adapter.checkpoints()
    if form in BITS:
        quantize(model, form)
    else:
        dtype = getattr(torch, form)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        adapter.set_checkpoints(checkpoints)
    return model


def _streamed(kind: Any, folder: Path, config: Any, form: str) -> Any:
    stored = _stored(folder)
    model = _empty(kind, folder, config)
    shapes = {name: [*weight.shape] for name, weight in model.state_dict().items()}
    names = list(shapes)
    shared = _shared(model, names, config)
    if {*names} - {*stored} != {*shared} or {*stored} - {*names}:
        raise _NotAsStored
    if any(tensor.shape != shapes[name] for name, tensor in stored.items()):
        raise _NotAsStored
    adapter = adapt(model)
    kinds = quantizable(model, adapter.blocks) if form in BITS else {}
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in kinds}
    entries: dict[str, bytes] = {}
    for name in names:
        if name in shared:
            continue
        tensor = stored[name].read()
        for other in (name, *(alias for alias, source in shared.items() if source == name)):
            entries[other] = entry_of(other, tensor, torch.float32)
        module, _, last = name.rpartition(".")
        if module not in kinds:
            dtype = torch.float32 if form in BITS else getattr(torch, form)
            _assign(model, name, tensor.to(dtype))
            continue
        parts[module][last] = tensor
        if parts[module].keys() >= _parameters(model, module):
            made = quantized_module(kinds[module], form=form, **_of(parts.pop(module)))
            _replace(model, module, made)
            give_back()
    if shared:
        _share(model, form, {alias.rpartition(".")[0] for alias in shared}, kinds)
    elif parts:
        raise _NotAsStored
    if any(value.is_meta for value in model.state_dict().values()):
        raise _NotAsStored
    adapter = adapt(model)
    adapter.set_checkpoints(digests_of(config, entries))
    return model


def _of(parts: dict[str, Tensor]) -> dict[str, Any]:
    return {"weight": parts["weight"], "bias": parts.get("bias")}


def _parameters(model: nn.Module, name: str) -> set[str]:
    return {key for key, _ in model.get_submodule(name).named_parameters(recurse=False)}


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, last = name.rpartition(".")
    place = model.get_submodule(module)
    old = getattr(place, last)
    if old.shape != tensor.shape:
        raise _NotAsStored
    setattr(place, last, nn.Parameter(tensor) if isinstance(old, nn.Parameter) else tensor)


def _shared(model: Any, names: list[str], config: Any) -> dict[str, str]:
    """Of two names of one weight, the head's: {"lm_head.weight": "model.embed_tokens.weight"}."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not getattr(config, "tie_word_embeddings", False):
        return {}
    by_module = {id(module): name for name, module in model.named_modules()}
    alias, source = (f"{by_module[id(module)]}.weight" for module in (head, embeddings))
    return {alias: source} if alias in names and source in names else {}


def _share(model: Any, form: str, heads: set[str], kinds: dict[str, str]) -> None:
    """Has the head read the embeddings' weight, which alone is in the files."""
    embeddings = model.get_input_embeddings()
    if form not in BITS:
        model.get_output_embeddings().weight = embeddings.weight
        return
    for name in heads & kinds.keys():
        head: Any = quantized_module(
            "head", torch.zeros(1, embeddings.embedding_dim, dtype=torch.float32), None, form
        )
        head.out_features = embeddings.num_embeddings
        _replace(model, name, head)
        tie_head(model)


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    """Parameters that this thread makes in here take no memory; buffers are as they should be.

    One thread at a time, as `store.load_model` sees to: another one would take what is put into the
    class here for torch's own.
    """
    maker, register = threading.get_ident(), nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and threading.get_ident() == maker:
            grad = param.requires_grad
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _empty(kind: Any, folder: Path, config: Any) -> Any:
    """The model without weights, with buffers and settings as `from_pretrained` gives them."""
    from transformers import GenerationConfig

    with _without_memory():
        model = kind._from_config(config, dtype=torch.float32)
    if model.can_generate():
        with contextlib.suppress(OSError):  # without one, what the configuration says counts
            model.generation_config = GenerationConfig.from_pretrained(
                folder, local_files_only=True
            )
    return model


class _Stored:
    """One tensor of a safetensors file."""

    def __init__(self, file: Path, dtype: torch.dtype, shape: list[int], start: int) -> None:
        self.file, self.dtype, self.shape, self.start = file, dtype, shape, start

    def read(self) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        data: Any = tensor.view(-1).view(torch.uint8).numpy()
        view = memoryview(data)
        # read and not mapped, as mapped pages count as this process's memory
        with self.file.open("rb", buffering=0) as opened:
            opened.seek(self.start)
            while view:
                got = opened.readinto(view)
                if not got:
                    raise ValueError(f"{self.file} ends within a tensor")
                view = view[got:]
        return tensor


def _stored(folder: Path) -> dict[str, _Stored]:
    """The tensors of a folder's safetensors files by name."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise _NotAsStored
    found: dict[str, _Stored] = {}
    for file in files:
        size = file.stat().st_size
        header, begin = _header(file, size)
        for name, said in header.items():
            if name == "__metadata__":
                continue
            if said["dtype"] not in _DTYPES or name in found:
                raise _NotAsStored
            dtype = _DTYPES[said["dtype"]]
            start, stop = said["data_offsets"]
            first, shape = begin + start, said["shape"]
            if stop - start != math.prod(shape) * dtype.itemsize or first + stop - start > size:
                raise ValueError(f"{file} lacks a part of {name}")
            found[name] = _Stored(file, dtype, shape, first)
    return found


def _header(file: Path, size: int) -> tuple[dict[str, Any], int]:
    """What a safetensors file of so many bytes says of its tensors, and where these begin."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= min(size, _MOST_HEADER):
            raise ValueError(f"{file} is no safetensors file")
        return json.loads(opened.read(length)), 8 + length


def first_of_integers(folder: Path, model: Any) -> str | None:
    """The first weight that a folder's files have in integers: one that is of floating point in the
    model, or with scales beside it; None: there is none."""
    prefix = f"{model.base_model_prefix}."
    weights = model.state_dict().items()
    known = {name.removeprefix(prefix) for name, value in weights if value.is_floating_point()}
    for file in sorted(folder.glob("*.safetensors")):
        header, _ = _header(file, file.stat().st_size)
        header.pop("__metadata__", None)
        for name, said in header.items():
            scaled = f"{name.removesuffix('.weight')}.scale" in header
            if said["dtype"][0] in "IU" and (scaled or name.removeprefix(prefix) in known):
                return name
    return None
