"""Noise-Augmented Vector Quantization: all formulas of training codebooks and model together.

Write x for a vector, q for its nearest codeword, sg for "no gradient flows here", and

    x̂ = x + sg(q − x)                             straight-through: the value is q, the gradient x's
    output = x̂ + λ·ε,  ε ~ N(μ, diag σ²)          NAVQ (arXiv 2505.19342), only while training
    commitment = β·E ‖x − sg(q)‖²                 keeps activations near their codewords
    μ = E[x − q],  σ² = E[(x − q)²] − μ²          the residual's running moments, by channel
    n_k ← γ·n_k + (1 − γ)·|{x : q(x) = c_k}|      codewords follow their members without gradient
    s_k ← γ·s_k + (1 − γ)·Σ{x : q(x) = c_k} x
    c_k = s_k / ñ_k,  ñ_k = (n_k + δ) / (Σn + K·δ) · Σn      with Laplace smoothing δ

In ‖·‖² the channels of all groups are summed; E is the mean over tokens. Straight-through gradient,
commitment and moving averages are those of van den Oord et al. 2017 (arXiv 1711.00937, eq. 3 and
appendix A.1). With noise the model sees more of the space around the codewords than these K points,
which is what inputs it was not trained on look like to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import astra_kernels as ak

from ..codes.search import Search
from .kmeans import draw


@dataclass(frozen=True, eq=False)
class Quantized:
    """What a quantizer makes of vectors [..., C, w].

    Attributes:
        codes: int32 [..., C].
        estimate: x̂, in the vectors' dtype: the codewords, with the vectors' gradient.
        output: x̂ + λ·ε while training, else x̂ itself.
        commitment: scalar, β times the squared error of a token (the sum over its groups and
            channels), the mean over all counted tokens.
    """

    codes: Tensor
    estimate: Tensor
    output: Tensor
    commitment: Tensor


class NAVQ(nn.Module):
    """One block's codebooks while they are trained; in evaluation mode a plain quantizer.

    A forward pass in training mode also moves the codebooks and the residual's statistics, after
    its output was computed from the codebooks as they were. `state_dict` holds all there is to
    know, the random generator included, so that a loaded quantizer goes on bit-identically.

    Args:
        tables: [C, K, w] fp32 (fp64 for checks), the codewords to start from. Noise is drawn on
            their device.
        noise: λ.
        commitment: β, of the squared error summed over channels.
        decay: γ of all moving averages.
        dead: a codeword is dead once its moving count n_k is below this share of the mean count
            Σn / K; it is then put onto a vector of the batch, drawn by squared error.
        smoothing: δ.
        seed: of noise and re-seeding.
    """

    tables: Tensor
    counts: Tensor
    sums: Tensor
    moments: Tensor
    weight: Tensor
    search: Search | None = None  # the engine's, of tables that do not move

    def __init__(
        self,
        tables: Tensor,
        *,
        noise: float = 1.0,
        commitment: float = 1e-4,
        decay: float = 0.99,
        dead: float = 0.01,
        smoothing: float = 1e-5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_settings(tables, noise, commitment, decay, dead, smoothing)
        self.noise, self.commitment, self.decay = noise, commitment, decay
        self.dead, self.smoothing = dead, smoothing
        groups, codewords, width = tables.shape
        self.register_buffer("tables", tables.detach().clone())
        # as if every codeword had had one member so far: itself
        self.register_buffer("counts", tables.new_ones(groups, codewords))
        self.register_buffer("sums", tables.detach().clone())
        # Σ (1 − γ)·γ^age of x − q and of its square, and of 1: what the sums are divided by
        self.register_buffer("moments", tables.new_zeros(2, groups, width))
        self.register_buffer("weight", tables.new_zeros(()))
        self.generator = torch.Generator(tables.device).manual_seed(seed)

    def forward(self, vectors: Tensor, counted: Tensor | None = None) -> Quantized:
        """Quantizes vectors [..., C, w].

        `counted`, bool [...], leaves vectors (of padding) out of all means; None: all count.

        Raises:
            ValueError: a vector is not finite. Nothing has been changed then.
        """
        x = vectors.to(self.tables.dtype)
        if x.shape[-2:] != self.tables.shape[::2]:
            want = tuple(self.tables.shape[::2])
            raise ValueError(f"vectors: expected [..., C, w] = [..., {want}], got {tuple(x.shape)}")
        rows = x.flatten(0, -3) if counted is None else x[counted]  # [n, C, w]
        if not bool(x.isfinite().all()):
            raise ValueError("activations: expected finite values, got nan or infinity")
        codes, nearest = self._nearest(x.detach())
        of_rows = nearest.flatten(0, -3) if counted is None else nearest[counted]
        error = (rows - of_rows).square().sum((-2, -1))  # [n]
        error = error.mean() if len(rows) else error.sum()
        estimate = x + (nearest - x).detach()
        output = estimate
        if self.training and len(rows):
            with torch.no_grad():
                chosen = (codes.flatten(0, -2) if counted is None else codes[counted]).long()
                self._observe(rows - of_rows)
                self._move(rows, chosen, rows - of_rows)
                epsilon = self._epsilon(x)
            output = estimate + self.noise * epsilon
        dtype = vectors.dtype
        return Quantized(codes, estimate.to(dtype), output.to(dtype), self.commitment * error)

    @torch.no_grad()
    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            codes = self.search(x) if self.search else ak.encode(x, self.tables)
            return codes, ak.decode(codes, self.tables)

    @property
    def residual(self) -> tuple[Tensor, Tensor]:
        """μ and σ² of x − q, [C, w] each; zero before the first training step."""
        mean, square = self.moments / self.weight.clamp(min=1e-30)
        return mean, (square - mean * mean).clamp(min=0)

    @property
    def left_out(self) -> float:
        """The share of the vectors' energy that codewords leave out: E‖x − q‖² beside that and
        E‖q‖², as a codeword is the mean of its members; 0 before the first training step."""
        error = float((self.moments[1] / self.weight.clamp(min=1e-30)).sum())
        of_codewords = self.tables.square().sum(-1) * self.counts
        found = float((of_codewords.sum(-1) / self.counts.sum(-1).clamp(min=1e-30)).sum())
        return error / max(error + found, 1e-30)

    def _observe(self, residual: Tensor) -> None:
        """Running moments of the residual [n, C, w], divided by what weights them so far."""
        fresh = torch.stack([residual.mean(0), residual.square().mean(0)])
        self.moments.lerp_(fresh, 1 - self.decay)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - self.decay)

    def _epsilon(self, like: Tensor) -> Tensor:
        """ε ~ N(μ, diag σ²)."""
        mean, variance = self.residual
        normal = torch.empty_like(like, memory_format=torch.contiguous_format)
        return mean + variance.sqrt() * normal.normal_(generator=self.generator)

    def _move(self, rows: Tensor, codes: Tensor, residual: Tensor) -> None:
        """Counts, sums and codewords after members rows [n, C, w] with codes int64 [n, C]."""
        groups, codewords, width = self.tables.shape
        place = (codes + torch.arange(groups, device=codes.device) * codewords).flatten()
        members = place.bincount(minlength=groups * codewords).view(groups, codewords)
        sums = torch.zeros_like(self.sums).view(-1, width)
        sums.index_add_(0, place, rows.detach().flatten(0, 1))
        self.counts.lerp_(members.to(self.counts.dtype), 1 - self.decay)
        self.sums.lerp_(sums.view_as(self.sums), 1 - self.decay)
        total = self.counts.sum(-1, keepdim=True)
        smooth = (self.counts + self.smoothing) / (total + codewords * self.smoothing) * total
        self.tables.copy_(self.sums / smooth[..., None])
        self._reseed(rows.detach(), residual.square().sum(-1), total / codewords)

    def _reseed(self, rows: Tensor, error: Tensor, mean_count: Tensor) -> None:
        """Puts dead codewords onto vectors [n, C, w] of large squared error [n, C]."""
        low = self.counts < self.dead * mean_count
        for group in low.any(-1).nonzero().flatten().tolist():
            dead = low[group].nonzero().flatten()[: len(rows)]
            fresh = rows[draw(error[:, group], len(dead), self.generator), group]
            self.tables[group, dead] = fresh
            # a mean codeword's count, so that it has time to find members
            self.counts[group, dead] = mean_count[group]
            self.sums[group, dead] = fresh * mean_count[group]

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())


def check_settings(
    tables: Tensor, noise: float, commitment: float, decay: float, dead: float, smoothing: float
) -> None:
    """Refuses settings that the formulas have no meaning for."""
    if tables.dim() != 3 or tables.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "tables: expected fp32 or fp64 of shape [C, K, w], "
            f"got {tables.dtype} of shape {tuple(tables.shape)}"
        )
    if not bool(tables.isfinite().all()):
        raise ValueError("tables: expected finite values, got nan or infinity")
    for name, value in (("noise", noise), ("commitment", commitment), ("smoothing", smoothing)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected 0 or more, got {value}")
    for name, value in (("decay", decay), ("dead", dead)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}: expected at least 0 and below 1, got {value}")
