"""Calls of the coded attentions, what float64 makes of them, and how exact plain torch is.

The oracle is the reference in float64 on the very inputs of the kernel; the peer is torch's own
attention on looked-up keys in the kernel's dtype.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from astra_kernels.coded_attention.reference import look_up_keys_values
from astra_kernels.mixed_attention import reference

State = tuple[Tensor, Tensor]


@dataclass
class Case:
    """Arguments of ``mixed_attention``; with no dense tokens those of ``coded_attention``."""

    query: Tensor
    key: Tensor
    value: Tensor
    codes: Tensor
    key_codebook: Tensor
    value_codebook: Tensor
    dense: dict = field(default_factory=dict)  # is_causal, key_mask
    coded: dict = field(default_factory=dict)  # value_codes, rope, code_mask
    scale: float | None = None

    @property
    def coded_arguments(self) -> tuple[Tensor, ...]:
        return (self.query, self.codes, self.key_codebook, self.value_codebook)

    @property
    def mixed_arguments(self) -> tuple[Tensor, ...]:
        return (self.query, self.key, self.value, *self.coded_arguments[1:])

    def to(self, dtype: torch.dtype) -> Case:
        def cast(x):
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        coded = dict(self.coded)
        if coded.get("rope") is not None:
            coded["rope"] = tuple(cast(x) for x in coded["rope"])
        tensors = [cast(x) for x in self.mixed_arguments]
        return Case(*tensors, dict(self.dense), coded, self.scale)

    def oracle(self) -> State:
        """float64 out and lse."""
        case = self.to(torch.float64)
        return reference.mixed_attention(
            *case.mixed_arguments, **case.dense, **case.coded, scale=case.scale
        )

    def peer(self) -> Tensor:
        """What torch's attention gives, in the case's dtype; NaN where nothing is seen."""
        options = {"value_codes": None, "rope": None, "code_mask": None} | self.coded
        far = look_up_keys_values(*self.coded_arguments, **options)
        key, value = (
            torch.cat((near, x.to(near.dtype)), dim=2)
            for near, x in zip((self.key, self.value), far, strict=True)
        )
        return sdpa(
            self.query, key, value, attn_mask=self.visible(), scale=self.scale, enable_gqa=True
        )

    def visible(self) -> Tensor:
        """Which keys each query sees, bool [B, 1, M, L + N]."""
        batch, _, rows, _ = self.query.shape
        near = torch.ones(batch, 1, rows, self.key.shape[2], dtype=torch.bool)
        if self.dense.get("is_causal"):
            near = near.tril(self.key.shape[2] - rows)
        if self.dense.get("key_mask") is not None:
            near = near & self.dense["key_mask"][:, None, None]
        far = torch.ones(batch, 1, rows, self.codes.shape[1], dtype=torch.bool)
        if self.coded.get("code_mask") is not None:
            far = far & self.coded["code_mask"][:, None, None]
        return torch.cat((near, far), dim=3)


def make(
    b=1, h=4, kv=2, m=5, near=0, n=40, d=16, k=24, groups=1, stages=1, *, dtype=torch.float32,
    shared=False, rope=False, causal=False, key_mask=False, code_mask=False, value_codes=False,
    scale=None,
) -> Case:  # fmt: skip
    tables = [torch.randn(stages, kv, groups, k, d // groups, dtype=dtype) for _ in range(2)]
    count = stages * groups * (1 if shared else kv)

    def codes():
        return torch.randint(0, k, (b, n, count), dtype=torch.int32)

    coded = {}
    if rope:
        angle = torch.randn(n, d // 2).repeat(1, 2)
        coded["rope"] = (angle.cos().to(dtype), angle.sin().to(dtype))
    if code_mask:
        coded["code_mask"] = torch.rand(b, n) > 0.3
    if value_codes:
        coded["value_codes"] = codes()
    dense = {"is_causal": causal}
    if key_mask:
        dense["key_mask"] = torch.rand(b, near) > 0.3
    query = torch.randn(b, h, m, d, dtype=dtype)
    key, value = torch.randn(2, b, kv, near, d, dtype=dtype)
    return Case(query, key, value, codes(), *tables, dense, coded, scale)


def examples(count: int) -> settings:
    """So many examples of hypothesis, fewer where each is a kernel to compile."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return settings(
        max_examples=count if interpreted else min(count, 8),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def assert_as_exact_as_torch(got: State, case: Case) -> None:
    """Error at most twice that of torch in the same dtype; nothing seen gives 0 and -inf."""
    out, lse = got
    want, want_lse = case.oracle()
    dtype = case.query.dtype
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    seen = want_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert (lse[~seen] == -torch.inf).all()
    assert (out[~seen] == 0).all()
    if not seen.any():
        return
    eps = torch.finfo(dtype).eps
    peer_error = (case.peer()[seen] - want[seen]).abs().max()
    # Weights rounded to the dtype, times values of up to 4, and the output's own rounding: of few
    # elements torch's may by luck all be exact.
    assert (out[seen] - want[seen]).abs().max() <= 2 * peer_error + 4 * eps
    # A score is a sum of d products of rounded keys; its error grows with their size.
    assert (lse[seen] - want_lse[seen]).abs().max() <= 4 * eps * (1 + want_lse[seen].abs().max())
