"""The keywords of `Codebook.fit`, and what every way of fitting is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..codes.base import Codec
from ..codes.codebook import Codebook
from ..inputs import check_function
from ..models import Adapter, Inputs
from .calibration import Progress


@dataclass(frozen=True, eq=False)
class FitOptions:
    """The keywords of `Codebook.fit`.

    Attributes:
        space: "kv" codes keys and values jointly, before rotation; "hidden" codes block inputs;
            "differential" codes what a block's input adds to the estimate of the block before;
            "transform" codes keys and values with all that is known of them
            (`codes/predictive.py`): the most accurate, and the only one that says itself how many
            bits each block is worth.
        groups: codes a token and block. Space "kv": a multiple of the KV heads, each coded on its
            own, or fewer, shared by all heads. Else channel groups (the paper's G).
        codewords: codewords of a group (the paper's K); None: 1024, in space "transform" 256 up to
            200 bits, above that 64.
        bits: space "transform", which has no `groups`: at most so many bits a token and block, on
            average over the blocks; None: 100.
        fine_bits: space "transform" of a decoder: at most so many bits more, on average over
            the blocks, for the last `fine_tokens` tokens before a cut (at most a quarter of a
            shard), sent to the next rank alone; 0: none, and by default the engine has a halo.
        target_gap: space "transform": in place of `bits`, the share of the gap between dropping
            remote tokens and having them exactly that is to be recovered on the held-out windows.
            Tries budgets that double, or halve, and takes the smallest that suffices;
            `notes["tried"]` has them all.
        extra: more windows to calibrate on, never held out: `sampled_windows` of the model.
        prefix: leading tokens of a decoder's input that every rank computes itself; None: 1 in
            space "transform", else 0.
        rank: space "transform", of its predictor; None: an eighth of the hidden size, at most 64;
            where it reads the embedding in a basis, a seventh, at most 80.
        basis: space "transform" of a model with token ids: coordinates of the embedding that the
            predictors of all blocks read, in place of all D; None: 96, at most D/2; 0: all D.
        shared: one set of codes for all heads; None: where `groups` is no multiple of the KV heads.
        iterations: Lloyd iterations.
        seed: makes the result deterministic, whatever the number of threads; in space "transform"
            for the same number, as torch sums products over all tokens in one part a thread.
        held_back: windows kept out of the fit, on which the result is evaluated as `world_size`
            ranks. `notes["held_back"]` of the codebook tells; with 0, nothing is evaluated.
        progress: called with what is done, the steps done and the steps in all.
    """

    space: str = "kv"
    groups: int = 1
    codewords: int | None = None
    bits: float | None = None
    fine_bits: float = 0.0
    fine_tokens: int = 64
    target_gap: float | None = None
    extra: Tensor | Sequence[Tensor] = ()
    prefix: int | None = None
    rank: int | None = None
    basis: int | None = None
    shared: bool | None = None
    iterations: int = 8
    seed: int = 0
    held_back: int = 2
    world_size: int = 4
    progress: Progress = lambda what, done, steps: None

    def __post_init__(self) -> None:
        for name in ("codewords", "prefix", "rank", "basis"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name))
        numbers = ("groups", "iterations", "seed", "fine_tokens", "held_back", "world_size")
        for name in numbers:
            _check_whole(name, getattr(self, name))
        for name in ("bits", "fine_bits", "target_gap"):
            _check_number(name, getattr(self, name))
        if not isinstance(self.space, str):
            raise TypeError(f"space: expected a string, got {self.space!r}")
        if not isinstance(self.extra, Tensor | Sequence):
            raise TypeError(f"extra: expected tensors, got {type(self.extra).__name__}")
        check_function("progress", self.progress)
        if not -(2**62) <= self.seed <= 2**62:
            raise ValueError(f"seed: expected at most 62 bits, got {self.seed}")
        if self.codewords == 0:
            raise ValueError("codewords: expected 2 to 65536, got 0")
        for name in ("iterations", "held_back"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")

    def prefix_for(self, codec: type[Codec], adapter: Adapter) -> int:
        """Leading tokens that every rank computes itself. ValueError: an encoder's, or below 0."""
        prefix = codec.default_prefix(adapter) if self.prefix is None else self.prefix
        if prefix < 0 or (prefix and not adapter.causal):
            raise ValueError(
                "prefix: expected 0 or more, and 0 for an encoder, whose first tokens see all "
                f"others, got {prefix}"
            )
        return prefix


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")


def _check_number(name: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")


@dataclass(frozen=True)
class FitData:
    """A model and its calibration windows.

    Attributes:
        windows: to calibrate on; `vectors` is the number of their tokens.
        evaluate: measures a codebook on the held-out windows, for its notes; None: there are none.
    """

    model: nn.Module
    adapter: Adapter
    codec: type[Codec]
    windows: list[Inputs]
    vectors: int
    evaluate: Callable[[Codebook], dict[str, Any]] | None
    progress: Progress
