"""The seam between a Hugging Face model and ASTRA.

A model is left as it is. Whoever wants to hear of its attention, its blocks' inputs and its final
hidden states (the engine during a forward pass, the recorder during calibration) is a `Listener`,
set for the current thread by `Adapter.listening`; `hooks.py` says how. Without a listener the model
behaves as if ASTRA were not there.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..plan import Plan
from .constants import other_numbers
from .digest import digests_of, entry_of
from .forward_pass import Listener
from .heads import check_forward, head_reads
from .hooks import Hooks
from .patches import PatchRows
from .projection import Projection
from .quantized import activation_dtype, form_of

Inputs = dict[str, Any]  # the tensors of one forward pass


class Adapter(ABC):
    """A model family: where its blocks are, and how to cut its inputs. See `families.py`.

    Attributes:
        causal: a decoder; its shards see earlier shards only.
        class_tokens: 1 for encoders, whose first token is copied to every rank.
        token_ids: the input is token ids, which every rank has: `embed` works.
        blocks, attentions: the Transformer blocks and their attention modules, in order.
        num_heads, num_key_value_heads, head_dim, hidden_size: H, Hkv, d and D.
    """

    causal: bool
    class_tokens: int
    token_ids = True
    mlp_matrices = 2  # of hidden_size × mlp_size each
    # words about heads that the family's modules read; in others' configurations they mean nothing
    head_words: tuple[str, ...] = ()

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        self._model = weakref.ref(model)  # strong, it would keep its own key in adapters alive
        self.head = head_reads(model)
        try:
            self.blocks: list[nn.Module] = self.find_blocks()
            self.attentions = [self.attention_of(block) for block in self.blocks]
        except AttributeError as error:
            raise ValueError(
                f"model: expected blocks of transformers' {config.model_type} with their "
                f"attention, got others: {error}"
            ) from error
        if not self.blocks:
            raise ValueError("model: expected at least one Transformer block, got none")
        if len(set(self.attentions)) < len(self.attentions):
            raise ValueError(
                "model: expected an attention module of its own in every block, got one that "
                "several share; make copies of it (copy.deepcopy)"
            )
        self.hidden_size = int(config.hidden_size)
        self.num_heads = int(config.num_attention_heads)
        own = {name: getattr(config, name, None) for name in self.head_words}
        self.num_key_value_heads = int(own.get("num_key_value_heads") or self.num_heads)
        self.head_dim = int(own.get("head_dim") or self.hidden_size // self.num_heads)

    @property
    def model(self) -> Any:
        model = self._model()
        assert model is not None, "the adapter of a model that is gone"
        return model

    @property
    def generates(self) -> bool:
        """Whether it is a decoder with a language-model head, which can continue a text."""
        return self.causal and is_language_model(self.model)

    @property
    def base(self) -> Any:
        """The model without its head."""
        return getattr(self.model, getattr(self.model, "base_model_prefix", ""), self.model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of queries, keys and values. Embeddings and norms may have another."""
        return activation_dtype(self.attentions[0]) or activation_dtype(self.model) or torch.float32

    @property
    def mlp_size(self) -> int:
        config = self.model.config
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
        return int(inner or 4 * self.hidden_size)

    def block_flops(self) -> tuple[float, float]:
        """FLOPs of a block: of one token's projections and MLP, and of one query over one key."""
        queries, keys = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        mlp = self.mlp_matrices * self.hidden_size * self.mlp_size
        return 2.0 * (2 * self.hidden_size * (queries + keys) + mlp), 4.0 * queries

    def digest(self) -> str:
        """Names the model in the form it has: a hash over what its configuration says of the
        function that it computes, and over every tensor's name, shape, dtype and a sample of its
        values."""
        return self._own_digests()[0]

    def _own_digests(self) -> tuple[str, ...]:
        state = self.model.state_dict()
        entries = {name: entry_of(name, value) for name, value in state.items()}
        return digests_of(self.model.config, entries)

    def checkpoints(self) -> tuple[str, ...]:
        """Names of the checkpoint that the model is a form of, see `digests_of`.

        A form that `load_model` or `quantize` made knows them, as long as its weights are what they
        were. Any other model's are its own.
        """
        own = self._own_digests()
        form, *checkpoint = getattr(self.model, "astra_checkpoint", ("",))
        return own if form != own[0] else tuple(checkpoint)

    def set_checkpoints(self, checkpoints: tuple[str, ...]) -> None:
        """Has the model, as it is now, be a form of that checkpoint."""
        self.model.astra_checkpoint = (self.digest(), *checkpoints)

    def name_checkpoint(self, checkpoint: str) -> None:
        """Takes the caller's word for what the model is a form of: `checkpoint`, a digest.

        Raises:
            ValueError: the weights themselves say that it is another's.
        """
        known = self.digests()
        if checkpoint in known:
            return
        if self.form() == "float32" or self.checkpoint() != self.digest():
            raise ValueError(
                f"checkpoint: expected {self.checkpoint()}, as the weights say, got {checkpoint!r}"
            )
        self.set_checkpoints((checkpoint,))

    def checkpoint(self) -> str:
        """Names the checkpoint in its float32 form, whatever form the model has."""
        return self.checkpoints()[0]

    def form(self) -> str:
        """What the weights are kept in: "float32", "bfloat16", "int8", "int4" …"""
        return form_of(self.model)

    def named_form(self, mixed: bool) -> str:
        """What ranks have to agree on of their forms; `mixed`: what passes between them alone."""
        if mixed:
            return f"any, {str(self.dtype).removeprefix('torch.')} between ranks"
        form = self.form()
        return form if form == "float32" else f"{form} {self.digest()}"

    def digests(self) -> set[str]:
        """By which names codebooks may know the model: its own, and those of its checkpoint."""
        return {*self._own_digests(), *self.checkpoints()}

    def is_current(self) -> bool:
        """Whether the model still has the blocks and attention modules that this adapter knows."""
        try:
            blocks = self.find_blocks()
            modules = [*blocks, *map(self.attention_of, blocks)]
        except AttributeError:  # a new adapter says what is not there
            return False
        known = [*self.blocks, *self.attentions]
        return len(modules) == len(known) and all(map(operator.is_, modules, known))

    def other_numbers(self) -> str:
        """What the modules compute with and the configuration does not say, see `constants`; "": it
        says all."""
        scales = {module: self.scale_of(block) for block, module in enumerate(self.attentions)}
        return other_numbers(self.model, scales, self.rotary())

    def check(self) -> None:  # noqa: B027
        """Refuses a model that this family's adapter cannot cut, as configuration and modules are
        now.

        Raises:
            ValueError: by name, what no shard could compute.
        """

    # What a family says of itself.

    def scale_of(self, block: int) -> float:
        """What the scores of a block are multiplied by, as the configuration says."""
        return float(self.head_dim**-0.5)

    def rotary(self) -> nn.Module | None:
        """The module that makes rotary angles."""
        return None

    @abstractmethod
    def find_blocks(self) -> list[nn.Module]:
        """The Transformer blocks in order."""

    @abstractmethod
    def attention_of(self, block: nn.Module) -> nn.Module:
        """The module that calls the attention interface."""

    @abstractmethod
    def project(self, block: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, not rotated, [B, Hkv, N, d], of block inputs [B, N, D]."""

    def projection(self, block: int) -> Projection | None:
        """`project` as one product; None where the modules do more than that."""
        return None

    def projecting(self) -> list[nn.Module]:
        """The modules that `project` calls, of all blocks."""
        return []

    @abstractmethod
    def count(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        """Batch size and number of tokens, the class token not counted. Checks the inputs."""

    @abstractmethod
    def local_inputs(self, inputs: Mapping[str, Tensor], plan: Plan, rank: int) -> dict[str, Any]:
        """The keyword arguments with which `rank` calls the model's own forward."""

    def embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Block 0's input of every token, [B, class_tokens + T, D], where `token_ids`.

        Positions and token types are in it where the family adds them to the embeddings.
        """
        raise NotImplementedError(f"{type(self).__name__} has no token ids")

    def last_tokens(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """The column of each row's last token, int64 [B]; None: the last column of every row."""
        return None

    def rope(
        self, positions: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """cos and sin [B, N, d] at positions [B, N], or None without rotary positions.

        `dtype`: the model's, if None.
        """
        return None

    def positions(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Position of every token, [1 or B, T], where the model takes positions."""
        return None

    def visible(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Which tokens are not padding, bool [B, class_tokens + T], or None if all are."""
        return None

    @abstractmethod
    def final(self) -> nn.Module:
        """The module whose output is, or holds as last_hidden_state, what the head reads."""

    def cut_after(self) -> nn.Module | None:
        """The module whose output is cut into shards, for families that are cut after embedding."""
        return None

    def patch_product(self) -> nn.Module | None:
        """The module that makes patches of pixels, where it may be given some of the rows."""
        return None

    def patch_rows(self, plan: Plan, rank: int) -> PatchRows | None:
        """Of a picture, the rows of patches that `rank` needs; None: all, or it is no picture."""
        return None

    # Hooks, present during calls.

    @cached_property
    def hooks(self) -> Hooks:
        return Hooks(self.blocks, self.attentions, self.final, self.cut_after(), self.patch_product)

    def installed(self) -> contextlib.AbstractContextManager[None]:
        """Keeps the hooks in the model, for several calls in a row; see `Hooks.installed`."""
        return self.hooks.installed()

    def listening(
        self, listener: Listener, rows: PatchRows | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Lets `listener` hear of this model's passes in this thread; see `Hooks.listening`."""
        return self.hooks.listening(listener, rows)


adapters_lock = threading.RLock()  # ranks that are threads share one model, and so one adapter
adapters: weakref.WeakKeyDictionary[nn.Module, Adapter] = weakref.WeakKeyDictionary()


def is_language_model(model: Any) -> bool:
    """Whether its head says what comes next; RoBERTa's of the same name says what is masked."""
    return hasattr(model, "lm_head") and bool(model.can_generate())


def vocabulary_of(model: Any) -> int:
    """How many token ids the model has embeddings of; as its configuration says where the module
    that embeds them is somebody's own."""
    embeddings = model.get_input_embeddings()
    return int(getattr(embeddings, "num_embeddings", model.config.vocab_size))


def num_logits_of(model: Any) -> int:
    """How many tokens the head gives logits of, which may be others than have embeddings."""
    return int(getattr(model.get_output_embeddings(), "out_features", vocabulary_of(model)))


def check_runnable(
    model: nn.Module, modules: Iterable[tuple[str, nn.Module]] | None = None
) -> None:
    """Refuses a model that cannot be run by engines, by name.

    modules: `model.named_modules()`, of who has them already.

    Raises:
        ValueError: training mode, weights that are not in memory, a forward pass of the user's own.
    """
    check_forward(model)
    config: Any = model.config
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    if not getattr(config, "return_dict", True) and base is not model:
        raise ValueError(
            "model: expected return_dict=True in its configuration, which its own head needs, got "
            "False; pass return_dict=False to the call for a tuple"
        )
    if model.training:
        raise ValueError("model: expected evaluation mode, got training: call model.eval()")
    for path, module in model.named_modules() if modules is None else modules:
        if module.training and _is_random(module):
            raise ValueError(
                f"model: expected evaluation mode, got training in {path}: call model.eval()"
            )
        for name, tensor in module._parameters.items():
            if tensor is not None and tensor.is_meta:
                raise ValueError(
                    f"model: expected weights in memory, got {path}.{name} on the meta device: "
                    "load the model without offloading"
                )


def _is_random(module: nn.Module) -> bool:
    """Whether a module in training computes something else each time, or changes itself: most,
    such as an adapter that was put into a model, compute the same in either mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.modules.batchnorm._NormBase)


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The arguments that make a decoder's forward fill and use `cache`, a `DynamicCache`.

    transformers calls it `cache` since 5.24, `past_key_values` before.
    """
    taken = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in taken else "past_key_values": cache, "use_cache": True}
