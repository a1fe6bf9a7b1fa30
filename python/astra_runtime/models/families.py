"""The families: Llama (Mistral, Qwen2), Qwen3, GPT-2, ViT, BERT, RoBERTa (XLM-RoBERTa)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..limits import configured_limit
from ..plan import Plan
from .base import Adapter, adapters, adapters_lock
from .heads import ROW, check_head
from .patches import PatchRows, patch_product
from .projection import Projection, folded, is_plain, joined


def _heads(flat: Tensor, head_dim: int) -> Tensor:
    """[B, N, H·d] -> [B, H, N, d]."""
    return flat.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _padding(inputs: Mapping[str, Tensor]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    if mask is None or bool(mask.all()):
        return None
    visible = mask.bool()
    empty = (~visible.any(-1)).nonzero().flatten()
    if len(empty):
        raise ValueError(
            f"attention_mask: expected a token to see in every row, got none in row {int(empty[0])}"
        )
    return visible


def _take_ids(inputs: Mapping[str, Tensor], known: set[str]) -> Tensor:
    unknown = set(inputs) - known
    if unknown:
        raise ValueError(f"expected inputs among {sorted(known)}, got also {sorted(unknown)}")
    ids = inputs.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        got = "nothing" if ids is None else f"{ids.dtype} of shape {tuple(ids.shape)}"
        raise ValueError(f"input_ids: expected integers of shape [B, T], got {got}")
    for name, value in inputs.items():
        if value.shape != ids.shape:
            raise ValueError(
                f"{name}: expected the shape of input_ids, {tuple(ids.shape)}, "
                f"got {tuple(value.shape)}"
            )
    return ids


def _window(attention: Any, config: Any) -> int | None:
    """The sliding window of one attention module, which a configuration may name in vain."""
    if config.model_type == "mistral":
        return getattr(config, "sliding_window", None)
    return getattr(attention, "sliding_window", None)


class _Decoder(Adapter):
    causal, class_tokens = True, 0

    def attention_of(self, block: Any) -> nn.Module:
        return block.self_attn

    def count(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        ids = _take_ids(inputs, {"input_ids", "attention_mask"})
        limit = self.model.config.max_position_embeddings
        if ids.shape[1] > limit:
            raise ValueError(
                f"input_ids: expected at most {limit} tokens, the model's limit, got {ids.shape[1]}"
            )
        return ids.shape[0], ids.shape[1]

    def positions(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if "position_ids" in inputs:  # of tokens that others precede, see `sessions`
            return inputs["position_ids"]
        ids, mask = inputs["input_ids"], _padding(inputs)
        if mask is None:
            return torch.arange(ids.shape[1], device=ids.device)[None]
        return (mask.cumsum(-1) - 1).clamp(min=0)  # padded on the left, as generation does

    def visible(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        return _padding(inputs)

    def last_tokens(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """A classifier finds the last token that is no padding by its id, as transformers does;
        other heads are given the last one that the attention mask shows."""
        ids = inputs["input_ids"]
        if self.head == ROW:
            padding = self.model.config.get_text_config().pad_token_id
            if padding is None:
                if len(ids) > 1:
                    raise ValueError(
                        "input_ids: expected one row, as the model's configuration names no "
                        f"pad_token_id by which to find a row's last token, got {len(ids)} rows"
                    )
                return None
            shown = ids != padding
        else:
            mask = _padding(inputs)
            if mask is None:
                return None
            shown = mask
        columns = torch.arange(ids.shape[1], device=ids.device)
        last = (columns * shown).argmax(-1)
        return None if bool((last == ids.shape[1] - 1).all()) else last

    def local_inputs(self, inputs: Mapping[str, Tensor], plan: Plan, rank: int) -> dict[str, Any]:
        whole = {"input_ids": inputs["input_ids"], "position_ids": self.positions(inputs)}
        return {name: plan.local_tokens(tensor, rank) for name, tensor in whole.items()}

    def final(self) -> nn.Module:
        return self.base


class Llama(_Decoder):
    """Rotary positions, grouped queries, RMS norm before attention, a gated MLP."""

    mlp_matrices = 3
    head_words = ("num_key_value_heads", "head_dim")

    def check(self) -> None:
        config: Any = self.model.config
        limit = config.max_position_embeddings
        windows = {window for module in self.attentions if (window := _window(module, config))}
        if any(window < limit for window in windows):
            raise ValueError(
                f"model: {config.model_type} with sliding-window attention is not supported; "
                f"a remote shard is seen wholly or not at all (windows {sorted(windows)})"
            )
        kind = getattr(self.base.rotary_emb, "rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise ValueError(
                f"model: rotary positions of type {kind!r} depend on each rank's own length and "
                "are not supported; expected default, linear, llama3 or yarn"
            )

    def rotary(self) -> nn.Module:
        module: nn.Module = self.base.rotary_emb
        return module

    def find_blocks(self) -> list[nn.Module]:
        return list(self.base.layers[: self.base.config.num_hidden_layers])

    def project(self, block: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        layer: Any = self.blocks[block]
        normed = layer.input_layernorm(hidden)
        attention = layer.self_attn
        return (
            _heads(attention.k_proj(normed), self.head_dim),
            _heads(attention.v_proj(normed), self.head_dim),
        )

    def projection(self, block: int) -> Projection | None:
        layer: Any = self.blocks[block]
        product = joined([layer.self_attn.k_proj, layer.self_attn.v_proj])
        return product and folded(layer.input_layernorm, *product)

    def projecting(self) -> list[nn.Module]:
        blocks: Any = self.blocks
        parts = [(b.input_layernorm, b.self_attn.k_proj, b.self_attn.v_proj) for b in blocks]
        return [module for of_block in parts for module in of_block]

    def embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        embedded: Tensor = self.base.embed_tokens(inputs["input_ids"])
        return embedded

    def rope(self, positions: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        # in the model's dtype, as its own queries and keys are rotated
        like = torch.empty(0, dtype=dtype or self.dtype, device=positions.device)
        cos, sin = self.base.rotary_emb(like, positions)
        return cos, sin


class Qwen3(Llama):
    """As Llama, with a norm over each head of the queries and keys before they rotate."""

    def project(self, block: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().project(block, hidden)
        layer: Any = self.blocks[block]
        return layer.self_attn.k_norm(key), value

    def projection(self, block: int) -> Projection | None:
        return None  # a norm follows the product

    def projecting(self) -> list[nn.Module]:
        attentions: Any = self.attentions
        return [*super().projecting(), *(attention.k_norm for attention in attentions)]


def _is_plain(projection: nn.Module) -> bool:
    """Whether a GPT-2 projection is its weight and bias alone: no adapter, no hook, no patch."""
    from transformers.pytorch_utils import Conv1D

    return is_plain(projection, Conv1D)


class GPT2(_Decoder):
    """Learned positions, so keys do not rotate; layer norm before attention."""

    def find_blocks(self) -> list[nn.Module]:
        return list(self.base.h)

    def attention_of(self, block: Any) -> nn.Module:
        return block.attn

    def scale_of(self, block: int) -> float:
        config = self.model.config
        scale = super().scale_of(block) if config.scale_attn_weights else 1.0
        return scale / (block + 1) if config.scale_attn_by_inverse_layer_idx else scale

    def project(self, block: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        layer: Any = self.blocks[block]
        projection, width, normed = layer.attn.c_attn, self.hidden_size, layer.ln_1(hidden)
        if _is_plain(projection):  # without the queries, a third of the work
            weight, bias = projection.weight[:, width:], projection.bias[width:]
            key, value = F.linear(normed, weight.T, bias).split(width, -1)
        else:
            key, value = projection(normed)[..., width:].split(width, -1)
        return _heads(key, self.head_dim), _heads(value, self.head_dim)

    def projection(self, block: int) -> Projection | None:
        layer: Any = self.blocks[block]
        both, width = layer.attn.c_attn, self.hidden_size
        if not _is_plain(both):
            return None
        return folded(layer.ln_1, both.weight[:, width:].T, both.bias[width:])

    def projecting(self) -> list[nn.Module]:
        blocks: Any = self.blocks
        return [module for block in blocks for module in (block.ln_1, block.attn.c_attn)]

    def embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        embedded: Tensor = self.base.wte(inputs["input_ids"])
        return embedded + self.base.wpe(self.positions(inputs))


def pair(size: Any) -> tuple[int, int]:
    """Height and width of a size that is given as one number or as two."""
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


class ViT(Adapter):
    """Patches and a class token; cut after embedding."""

    causal, class_tokens, token_ids = False, 1, False
    head_words = ("head_dim",)

    @property
    def num_patches(self) -> int:
        """Of an image of the size that the model wants, the class token not counted."""
        config: Any = self.model.config
        (height, width), (rows, columns) = pair(config.image_size), pair(config.patch_size)
        return (height // rows) * (width // columns)

    def find_blocks(self) -> list[nn.Module]:
        return list(self.base.layers)

    def attention_of(self, block: Any) -> nn.Module:
        return block.attention

    def project(self, block: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        layer: Any = self.blocks[block]
        normed = layer.layernorm_before(hidden)
        attention = layer.attention
        return (
            _heads(attention.k_proj(normed), self.head_dim),
            _heads(attention.v_proj(normed), self.head_dim),
        )

    def projection(self, block: int) -> Projection | None:
        layer: Any = self.blocks[block]
        product = joined([layer.attention.k_proj, layer.attention.v_proj])
        return product and folded(layer.layernorm_before, *product)

    def projecting(self) -> list[nn.Module]:
        blocks: Any = self.blocks
        parts = [(b.layernorm_before, b.attention.k_proj, b.attention.v_proj) for b in blocks]
        return [module for of_block in parts for module in of_block]

    def count(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        config: Any = self.model.config
        pixels = inputs.get("pixel_values")
        if pixels is None or pixels.dim() != 4 or set(inputs) != {"pixel_values"}:
            raise ValueError(
                "expected pixel_values of shape [B, channels, height, width] and nothing else, "
                f"got { ({name: tuple(t.shape) for name, t in inputs.items()}) }"
            )
        rows, columns = pair(config.patch_size)
        return pixels.shape[0], (pixels.shape[2] // rows) * (pixels.shape[3] // columns)

    def local_inputs(self, inputs: Mapping[str, Tensor], plan: Plan, rank: int) -> dict[str, Any]:
        return dict(inputs)

    def final(self) -> nn.Module:
        return self.base.layernorm

    def cut_after(self) -> nn.Module:
        module: nn.Module = self.base.embeddings
        return module

    def patch_product(self) -> nn.Module | None:
        return patch_product(self.base.embeddings, pair(self.model.config.patch_size))

    def patch_rows(self, plan: Plan, rank: int) -> PatchRows | None:
        if plan.world_size == 1:
            return None
        patches = slice(plan.bounds[rank], plan.bounds[rank + 1])
        return PatchRows(patches, pair(self.model.config.patch_size))


class Bert(Adapter):
    """Learned positions, norm after attention: codes of the block input need no norm."""

    causal, class_tokens = False, 1

    def check(self) -> None:
        config: Any = self.model.config
        if config.is_decoder:
            raise ValueError(
                f"model: expected {config.model_type} as an encoder, got is_decoder=True"
            )
        if config.chunk_size_feed_forward:
            raise ValueError(
                "model: expected chunk_size_feed_forward=0, which computes the same, as a rank's "
                f"tokens are no multiple of {config.chunk_size_feed_forward}"
            )

    def find_blocks(self) -> list[nn.Module]:
        return list(self.base.encoder.layer)

    def attention_of(self, block: Any) -> nn.Module:
        return block.attention.self

    def project(self, block: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        layer: Any = self.blocks[block]
        attention = layer.attention.self
        return (
            _heads(attention.key(hidden), self.head_dim),
            _heads(attention.value(hidden), self.head_dim),
        )

    def projection(self, block: int) -> Projection | None:
        layer: Any = self.blocks[block]
        product = joined([layer.attention.self.key, layer.attention.self.value])
        return product and Projection(*product, norm=None)

    def projecting(self) -> list[nn.Module]:
        attentions: Any = self.attentions
        return [module for each in attentions for module in (each.key, each.value)]

    def count(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        ids = _take_ids(inputs, {"input_ids", "attention_mask", "token_type_ids"})
        limit = configured_limit(self.model.config) or 0
        if not 2 <= ids.shape[1] <= limit:
            raise ValueError(
                f"input_ids: expected 2 to {limit} tokens, the class token first, "
                f"got {ids.shape[1]}"
            )
        return ids.shape[0], ids.shape[1] - 1

    def visible(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        return _padding(inputs)

    def places(self, ids: Tensor) -> Tensor:
        """Rows of the position embeddings, [1 or B, 1 + T]."""
        return torch.arange(ids.shape[1], device=ids.device)[None]

    def local_inputs(self, inputs: Mapping[str, Tensor], plan: Plan, rank: int) -> dict[str, Any]:
        ids = inputs["input_ids"]
        whole = {"input_ids": ids, "position_ids": self.places(ids)}
        if "token_type_ids" in inputs:
            whole["token_type_ids"] = inputs["token_type_ids"]
        return {name: plan.local_tokens(tensor, rank) for name, tensor in whole.items()}

    def embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        ids, types = inputs["input_ids"], inputs.get("token_type_ids")
        embedded: Tensor = self.base.embeddings(input_ids=ids, token_type_ids=types)
        return embedded

    def final(self) -> nn.Module:
        return self.blocks[-1]


class Roberta(Bert):
    """As BERT, with positions that count the ids that are no padding, from behind padding's own."""

    def check(self) -> None:
        super().check()
        padding = self.model.config.pad_token_id
        made_with = self.base.embeddings.padding_idx
        if padding is None or padding != made_with:
            wanted = "a number" if made_with is None else f"{made_with}, as its embeddings have it"
            raise ValueError(
                f"model: expected pad_token_id to be {wanted}, as positions count from behind it, "
                f"got {padding}"
            )

    def places(self, ids: Tensor) -> Tensor:
        embeddings: Any = self.base.embeddings
        places: Tensor = embeddings.create_position_ids_from_input_ids(ids, embeddings.padding_idx)
        return places


FAMILIES: dict[str, type[Adapter]] = {
    "llama": Llama,
    "mistral": Llama,
    "qwen2": Llama,
    "qwen3": Qwen3,
    "gpt2": GPT2,
    "vit": ViT,
    "bert": Bert,
    "roberta": Roberta,
    "xlm-roberta": Roberta,
}


def adapt(model: nn.Module) -> Adapter:
    """The adapter of a Hugging Face model; one a model, however many engines share it.

    Raises:
        ValueError: a model of another family, a head that cannot be given what it reads, attention
            over a sliding window, rotary positions that depend on a rank's own length.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Hugging Face model, got {type(model).__name__}")
    with adapters_lock:
        kept = adapters.get(model)
        if kept is None or not kept.is_current():
            kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            if kind not in FAMILIES:
                raise ValueError(
                    "model: expected a Hugging Face model of type "
                    f"{', '.join(sorted(FAMILIES))}, got {kind!r}"
                )
            check_head(model)
            kept = adapters[model] = FAMILIES[kind](model)
        kept.check()
        return kept
