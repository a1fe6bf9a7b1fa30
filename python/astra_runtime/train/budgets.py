"""Transform codes within a budget of bits, or with as few as a target takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..codes.base import Codec, geometry
from ..codes.codebook import Codebook
from ..codes.fine import FineCode
from ..codes.transform import TransformCodes
from ..models import Adapter, Inputs, adapt
from ..steady import give_back
from .calibration import Progress, check_finite, empty_pairs, record_pairs
from .fit_transform import SEARCH, allocate, embedding_of, fit_blocks, fit_fine, past_first
from .linear import Products, Rows, linear_models, shared_basis
from .options import FitData, FitOptions
from .sensitivity import DECODER_DIAGONAL, Cost, sensitivity

# Windows with a backward pass each; of a decoder short ones, as a pass keeps all activations.
PASSES, DECODER_PASSES, DECODER_TOKENS = 8, 6, 384
# Tokens, and vectors a codeword, with which the rest of these windows is not needed.
ENOUGH, ENOUGH_MEMBERS = 8192, 32
DEFAULT_BITS = 100.0
BASIS = 96  # coordinates of the embedding that the predictors of all blocks read
RANK, RANK_WITH_BASIS = 64, 80  # of predictors, at most
FINE_CODEWORDS = 64  # of a group of fine codes, which are many
FINE_ROWS = 4096  # tokens that they are fitted on: as many as k-means of so few codewords sees
MANY_BITS = 200.0  # beyond, groups are so many that each has few codewords
TARGET_FROM, TARGET_LEAST, TARGET_MOST = 40.0, 5.0, 1280.0  # budgets tried for a target


@dataclass(frozen=True)
class TransformOptions:
    """Of a fit of transform codes, see `FitOptions` for what they mean.

    Attributes:
        codewords: None: `default_codewords` of each budget.
    """

    prefix: int
    codewords: int | None
    rank: int
    iterations: int
    seed: int
    basis: int = 0
    bits: float = DEFAULT_BITS
    fine_bits: float = 0.0
    fine_tokens: int = 0
    target_gap: float | None = None

    @classmethod
    def of(cls, options: FitOptions, codec: type[Codec], adapter: Adapter) -> TransformOptions:
        """Refuses, with a ValueError, a budget that no codes can be made of."""
        prefix = options.prefix_for(codec, adapter)
        basis = _check_basis(options, adapter)
        rank = default_rank(adapter, basis) if options.rank is None else options.rank
        bits = _check_budget(options, rank, adapter)
        return cls(
            prefix,
            options.codewords,
            rank,
            options.iterations,
            options.seed,
            basis,
            bits,
            options.fine_bits,
            _check_fine(options, adapter),
            options.target_gap,
        )

    def codewords_for(self, bits: float) -> int:
        """Of a group, within a budget of `bits`."""
        return self.codewords or default_codewords(bits)

    @property
    def vectors_needed(self) -> int:
        return self.codewords_for(self.bits)


class TransformFit:
    """Codebooks of any budgets from one look at the calibration windows.

    Args:
        windows: of `calibration.as_windows`.

    Attributes:
        empty: all of a codebook but its transforms and what follows from them.
    """

    def __init__(
        self, model: nn.Module, windows: list[Inputs], options: TransformOptions, progress: Progress
    ) -> None:
        adapter = adapt(model)
        self.options, self.progress = options, progress
        weighed, others = _divided(windows, adapter, options)
        windows = weighed + others
        notes = {
            "calibration_vectors": sum(math.prod(adapter.count(window)) for window in windows),
            "iterations": options.iterations,
            "seed": options.seed,
        }
        self.empty = Codebook(
            TransformCodes.key,
            prefix=options.prefix,
            geometry=geometry(adapter),
            model=adapter.checkpoint(),
            notes=notes,
        )
        pairs, parts = empty_pairs(adapter, windows, options.prefix)
        fisher = sensitivity(
            model,
            weighed,
            prefix=options.prefix,
            world_size=4,
            seed=options.seed,
            parts=parts[: len(weighed)],
            progress=progress,
        )
        record_pairs(adapter, others, progress, options.prefix, parts[len(weighed) :])
        give_back()
        for block, rows in enumerate(pairs):
            check_finite(rows, block)
        copies, embedding = adapter.class_tokens + options.prefix, None
        if adapter.token_ids:
            embedding = torch.cat(
                [embedding_of(adapter, window)[:, copies:].flatten(0, 1) for window in windows]
            )
        diagonal = DECODER_DIAGONAL if adapter.causal else 0.0
        self.rows = Rows(pairs, embedding)
        self.cost = Cost.of(fisher.to(adapter.device), diagonal=diagonal)
        self.basis: Tensor | None = None
        progress("predicting", 0, 1)
        with torch.no_grad():
            products = Products.of(self.rows)
            if options.basis and len(pairs) > 1:
                models = list(linear_models(products))
                self.basis = shared_basis(self.rows, models, self.cost.root, options.basis)
                self.rows = self.rows.in_basis(self.basis)
                products = products.with_embedding(self.rows)
            self.models = list(linear_models(products))

    def codebook(self, bits: float, fine_bits: float | None = None) -> Codebook:
        """At most `bits` a token and block, on average over the blocks; `fine_bits`: in place of
        the options', where these have fine tokens."""
        options, blocks = self.options, len(self.rows.blocks)
        fine_bits = options.fine_bits if fine_bits is None else fine_bits
        codewords = options.codewords_for(bits)
        with torch.no_grad():  # not inference mode: the tensors made here may be trained with
            counts = allocate(
                self.models,
                self.cost,
                bits,
                (codewords - 1).bit_length(),
                progress=lambda step: self.progress("sharing bits out", step, SEARCH),
            )
            counts = past_first(counts)
            with_fine = bool(options.fine_tokens and fine_bits)
            transforms, errors = fit_blocks(
                self.rows,
                self.cost,
                counts,
                codewords=codewords,
                rank=options.rank,
                iterations=options.iterations,
                seed=options.seed,
                kept=FINE_ROWS if with_fine else 0,
                progress=lambda block: self.progress("clustering", block + 1, blocks),
            )
            fine: tuple[FineCode, ...] = ()
            fine_codewords = min(FINE_CODEWORDS, len(self.rows.blocks[0]))
            if with_fine:
                fine = fit_fine(
                    errors,
                    self.cost,
                    fine_bits,
                    codewords=fine_codewords,
                    iterations=options.iterations,
                    seed=options.seed,
                    progress=lambda block: self.progress(
                        "clustering fine codes", block + 1, blocks
                    ),
                )
        codes = [t.codes for t in transforms]
        notes = {**self.empty.notes, "bits": bits, "rank": options.rank, "codes": codes}
        if self.basis is not None:
            notes["basis"] = options.basis
        made = replace(
            self.empty,
            groups=max(codes),
            codewords=codewords,
            transforms=transforms,
            basis=self.basis,
            notes=notes,
        )
        if not any(part.codes for part in fine):
            return made
        notes |= {"fine_bits": fine_bits, "fine_codes": [part.codes for part in fine]}
        tokens = options.fine_tokens
        return replace(made, fine=fine, fine_tokens=tokens, fine_codewords=fine_codewords)


def _divided(
    windows: list[Inputs], adapter: Adapter, options: TransformOptions
) -> tuple[list[Inputs], list[Inputs]]:
    """Evenly spaced windows for gradients, of a decoder their beginnings, and the others.

    What follows on the beginnings are further windows where the tokens would be few without it.
    """
    count = min(DECODER_PASSES if adapter.causal else PASSES, len(windows))
    chosen = [i * len(windows) // count for i in range(count)]
    others = [window for i, window in enumerate(windows) if i not in chosen]
    whole = [windows[i] for i in chosen]
    if not adapter.causal:
        return whole, others
    weighed = [_tokens(window, slice(0, DECODER_TOKENS)) for window in whole]
    tokens = sum(adapter.count(window)[1] for window in weighed + others)
    if tokens < max(ENOUGH, ENOUGH_MEMBERS * options.vectors_needed):
        rests = [_tokens(window, slice(DECODER_TOKENS, None)) for window in whole]
        others += [rest for rest in rests if adapter.count(rest)[1] > options.prefix]
    return weighed, others


def _tokens(window: Inputs, part: slice) -> Inputs:
    return {name: ids[:, part] for name, ids in window.items()}


def fit_transform(data: FitData, options: TransformOptions) -> Codebook:
    """The codebook of a budget, or of the smallest that recovers `target_gap` of the gap."""
    if options.target_gap is not None and data.evaluate is None:
        raise ValueError("target_gap: expected windows to hold out, on which it is measured")

    def evaluated(codebook: Codebook) -> Codebook:
        give_back()
        if data.evaluate is not None:
            codebook.notes["held_back"] = data.evaluate(codebook)
        return codebook

    def prepared() -> TransformFit:
        return TransformFit(data.model, data.windows, options, data.progress)

    if options.target_gap is None:  # what was recorded is gone before the evaluation
        return evaluated(prepared().codebook(options.bits))
    fit = prepared()
    return _smallest(lambda budget: evaluated(fit.codebook(budget)), options.target_gap)


def _check_budget(options: FitOptions, rank: int, adapter: Adapter) -> float:
    """The budget to begin with."""
    target = options.target_gap
    if target is not None and options.bits is not None:
        raise ValueError("target_gap: expected in place of bits, got both")
    if target is not None and not 0 < target < 1:
        raise ValueError(f"target_gap: expected a share between 0 and 1, got {target}")
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    bits = DEFAULT_BITS if options.bits is None else float(options.bits)
    code = ((options.codewords or default_codewords(bits)) - 1).bit_length()
    blocks = len(adapter.blocks)
    most = 32 * 2 * adapter.num_key_value_heads * adapter.head_dim
    if not code / blocks <= bits <= most:
        raise ValueError(
            f"bits: expected at least {code / blocks:.2g}, one code of {code} bits in one of "
            f"{blocks} blocks, and at most {most}, dense fp32, got {bits:g}"
        )
    return bits


def _check_fine(options: FitOptions, adapter: Adapter) -> int:
    """How many tokens before a cut get fine codes; 0: none do."""
    most = 32 * 2 * adapter.num_key_value_heads * adapter.head_dim
    if not 0 <= options.fine_bits <= most:
        raise ValueError(f"fine_bits: expected 0 to {most}, dense fp32, got {options.fine_bits:g}")
    if not options.fine_bits:
        return 0
    if not adapter.causal:
        raise ValueError("fine_bits: expected 0 for an encoder, whose tokens look both ways")
    if options.fine_tokens < 1:
        raise ValueError(f"fine_tokens: expected at least 1, got {options.fine_tokens}")
    return options.fine_tokens


def _check_basis(options: FitOptions, adapter: Adapter) -> int:
    """How many coordinates of the embedding predictors read; 0: the embedding, if there is one."""
    width = adapter.hidden_size if adapter.token_ids else 0
    if options.basis is None:
        return default_basis(adapter)
    if not 0 <= options.basis <= width:
        raise ValueError(f"basis: expected 0 to {width}, got {options.basis}")
    return options.basis


def default_basis(adapter: Adapter) -> int:
    """Coordinates of the embedding: few enough to be worth making, once a token."""
    return min(BASIS, adapter.hidden_size // 2) if adapter.token_ids else 0


def default_rank(adapter: Adapter, basis: int) -> int:
    """Receivers pay for the predictor: it is to stay small beside the block's own work.

    Where it reads few features of the embedding it may have a higher rank at the same price.
    """
    most, share = (RANK_WITH_BASIS, 7) if basis else (RANK, 8)
    return min(most, max(1, adapter.hidden_size // share))


def default_codewords(bits: float) -> int:
    """More codewords are better, and cost more to learn and to search; few bits have few groups."""
    return 256 if bits <= MANY_BITS else 64


def _smallest(at: Callable[[float], Codebook], target: float) -> Codebook:
    """The codebook of the smallest budget tried that recovers `target` of the gap."""
    tried: dict[float, Codebook] = {}

    def enough(bits: float) -> bool:
        tried[bits] = tried.get(bits) or at(bits)
        recovered = tried[bits].notes["held_back"]["gap_recovered"]
        if math.isnan(recovered):
            raise ValueError(
                "target_gap: remote tokens are worth nothing on the held-out windows, so there is "
                "no gap to recover; give longer windows, or bits in its place"
            )
        return bool(recovered >= target)

    bits = TARGET_FROM
    if enough(bits):
        while bits > TARGET_LEAST and enough(bits / 2):
            bits /= 2
    else:
        while bits < TARGET_MOST and not enough(bits):
            bits *= 2
        enough(bits)
    summary = [
        {"bits": book.bits, "gap_recovered": book.notes["held_back"]["gap_recovered"]}
        for _, book in sorted(tried.items())
    ]
    tried[bits].notes.update(target_gap=target, tried=summary)
    return tried[bits]
