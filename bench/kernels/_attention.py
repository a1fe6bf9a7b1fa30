"""Calls of the attention ops, of what they are compared with, and their error against float64."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

import astra_kernels as ak
from astra_kernels._replay import choosing
from astra_kernels._triton import strategies
from bench.kernels.spec import BITS, Calls, Shape
from bench.kernels.timing import Call

CHECKED_ROWS = 8  # of the queries, against float64
# (M, N) at which compiled flex_attention is a baseline: each shape costs seconds to compile.
FLEX_SHAPES = frozenset({(1024, 32768), (256, 8192), (1, 131072)})
NEVER: Any = math.inf  # also where a number of rows is expected
INTERPRETED = 90  # the compute capability that kernels are interpreted for
FORCED = {
    "fused": strategies.Crossover(NEVER, NEVER, NEVER),
    "counted": strategies.Crossover(0.0, 0.0, NEVER),
    "expanded": strategies.Crossover(NEVER, NEVER, 0),
}


@contextlib.contextmanager
def strategy(name: str, device: torch.device) -> Iterator[None]:
    """Makes the Triton kernels choose a strategy; a CPU's own paths do not ask."""
    capability = INTERPRETED
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    old = strategies.MEASURED.get(capability)
    strategies.MEASURED[capability] = FORCED[name]
    try:
        with choosing(name):
            yield
    finally:
        if old is None:
            del strategies.MEASURED[capability]
        else:
            strategies.MEASURED[capability] = old


@dataclass
class Coded:
    """Queries, and tokens known by their codes; each KV head has codes of its own."""

    shape: Shape
    query: Tensor  # [1, H, M, d]
    codes: Tensor  # int32 [1, N, Hkv*S]
    tables: tuple[Tensor, Tensor]  # [Hkv, S, K, d/S]
    rope: tuple[Tensor, Tensor] | None  # [N, d]

    @functools.cached_property
    def packed(self) -> Tensor:
        return torch.stack([ak.pack(row, BITS) for row in self.codes])

    @functools.cached_property
    def counts(self) -> Tensor:
        return ak.count_codes(self.codes, self.shape["K"], check=False)

    @functools.cached_property
    def rows(self) -> Tensor:
        """Which row of a table, all heads and sub-vectors one after the other, a code means."""
        groups = self.shape["Hkv"] * self.shape["S"]
        first = torch.arange(groups, device=self.codes.device, dtype=torch.int32)
        return first * self.shape["K"]

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Keys and values [1, Hkv, N, d] in plain torch, in query's dtype."""
        index = (self.codes + self.rows).flatten()
        heads, dim = self.shape["Hkv"], self.shape["d"]
        key, value = (
            table.reshape(-1, table.shape[-1])
            .index_select(0, index)
            .view(1, -1, heads, dim)
            .transpose(1, 2)
            for table in self.tables
        )
        if self.rope is None:
            return key, value
        return rotated(key, *(angle.to(key.dtype) for angle in self.rope)), value

    @functools.cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        """Contiguous keys and values, rotated in fp32 and rounded once, so as exact as may be."""
        key, value = self.expanded()
        if self.rope is not None:
            plain = Coded(self.shape, self.query, self.codes, self.tables, None).expanded()[0]
            key = torch.empty_like(key)
            cos, sin = (angle.float() for angle in self.rope)
            for head in range(key.shape[1]):  # one at a time: a million tokens take room in fp32
                key[:, head] = rotated(plain[:, head].float(), cos, sin)
        return key.contiguous(), value.contiguous()

    def dense_head(self, head: int) -> tuple[Tensor, Tensor]:
        """Keys and values [N, d] of a KV head in float64, from the tables, without `expanded`."""
        groups = self.shape["S"]
        columns = self.codes[0, :, head * groups : (head + 1) * groups].long()
        key, value = (
            torch.cat([table[head, s].double()[columns[:, s]] for s in range(groups)], dim=1)
            for table in self.tables
        )
        if self.rope is not None:
            key = rotated(key, *(angle.double() for angle in self.rope))
        return key, value


def rotated(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = key.chunk(2, dim=-1)
    return key * cos + torch.cat((-second, first), dim=-1) * sin


def make(
    shape: Shape, dtype: torch.dtype, device: torch.device, angles: torch.dtype | None
) -> Coded:
    """`angles`: their dtype; None: keys do not rotate."""
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    heads, groups, dim, tokens = (shape[key] for key in ("Hkv", "S", "d", "N"))
    query = torch.randn(1, shape["H"], shape["M"], dim, **options)
    of_table = (heads, groups, shape["K"], dim // groups)
    tables = torch.randn(of_table, **options), torch.randn(of_table, **options)
    size = (1, tokens, heads * groups)
    codes = torch.randint(0, shape["K"], size, dtype=torch.int32, device=device)
    rope = None
    if angles is not None:
        speed = 10_000.0 ** -torch.arange(0, 1, 2 / dim, dtype=torch.float64, device=device)
        place = torch.arange(tokens, dtype=torch.float64, device=device)
        angle = torch.outer(place, speed).repeat(1, 2)
        rope = (angle.cos().to(angles), angle.sin().to(angles))
    return Coded(shape, query, codes, tables, rope)


def oracle(
    query: Tensor,
    keys_values: Callable[[int], tuple[Tensor, Tensor]],
    kv_heads: int,
    rows: list[int],
    masked: Callable[[int, int], slice] | None = None,
) -> tuple[Tensor, Tensor]:
    """out [H, len(rows), d] and lse [H, len(rows)] in float64.

    masked: which keys row m of the queries does not see, of all there are.
    """
    per_kv_head, dim = query.shape[1] // kv_heads, query.shape[3]
    outs, lses = [], []
    for head in range(kv_heads):
        key, value = keys_values(head)
        picked = query[0, head * per_kv_head : (head + 1) * per_kv_head, rows].double()
        scores = picked @ key.T * dim**-0.5
        if masked is not None:
            for place, row in enumerate(rows):
                scores[:, place, masked(row, key.shape[0])] = -math.inf
        lse = scores.logsumexp(dim=-1, keepdim=True)
        outs.append((scores - lse).exp() @ value)
        lses.append(lse.squeeze(-1))
    return torch.cat(outs), torch.cat(lses)


def error_of(want: tuple[Tensor, Tensor], rows: list[int]) -> Callable[[Any], float]:
    """Relative error of out; infinite if lse is off by more than rounding of the scores."""

    def error(result: Any) -> float:
        out, lse = result if isinstance(result, tuple) else (result, None)
        if lse is not None:
            eps = torch.finfo(out.dtype).eps
            most = 4 * eps * (1 + want[1].abs().max())
            if not (lse[0][:, rows] - want[1]).abs().max() <= most:
                return math.inf
        return float((out[0][:, rows].double() - want[0]).norm() / want[0].norm())

    return error


def whole(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def checked_rows(queries: int) -> list[int]:
    """The first, the last, and some between."""
    some = torch.randperm(queries)[: CHECKED_ROWS - 2].tolist()
    return sorted({0, queries - 1, *some})


KeysValues = Callable[[], tuple[Tensor, Tensor]]


def backend(name: SDPBackend, call: Call) -> Call:
    def run() -> object:
        with sdpa_kernel(name):
            return call()

    return run


def chosen_backend(query: Tensor, key: Tensor, value: Tensor) -> str:
    """The backend that torch's attention takes for these tensors when none is asked for."""
    try:
        number = torch._fused_sdp_choice(query, key, value, enable_gqa=True)
    except (AttributeError, TypeError, RuntimeError) as reason:  # it is torch's own affair
        return f"unknown ({type(reason).__name__})"
    members: dict[str, Any] = dict(SDPBackend.__members__)
    names = {int(member): name for name, member in members.items()}
    return names.get(int(number), f"unknown ({number})").removesuffix("_ATTENTION").lower()


def dense_baselines(query: Tensor, dense: KeysValues) -> dict[str, Call]:
    """torch's attention to dense keys, by each of its backends, and what else is installed."""

    def plain() -> Tensor:
        return sdpa(query, *dense(), enable_gqa=True)

    baselines: dict[str, Call] = {"sdpa": plain}
    if query.device.type == "cuda":
        baselines["sdpa_flash"] = backend(SDPBackend.FLASH_ATTENTION, plain)
        baselines["sdpa_cudnn"] = backend(SDPBackend.CUDNN_ATTENTION, plain)
        if query.shape[2] == 1 and importlib.util.find_spec("flashinfer"):
            baselines["flashinfer"] = flashinfer(query, dense)
    return baselines


@functools.cache
def compiled_flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attention(query: Tensor, dense: KeysValues) -> Call:
    return lambda: compiled_flex_attention()(query, *dense(), enable_gqa=True)


def flashinfer(query: Tensor, dense: KeysValues) -> Call:
    def run() -> Tensor:
        import flashinfer

        keys, values = dense()
        one = flashinfer.single_decode_with_kv_cache(
            query[0, :, 0], keys[0], values[0], kv_layout="HND"
        )
        return one[None, :, None]

    return run


def coded(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    rotary: bool = False,
) -> Calls:
    case = make(shape, dtype, device, dtype if rotary else None)
    query, tables, rope = case.query, case.tables, case.rope

    def attend(name: str, packed: bool) -> Call:
        def run() -> object:
            with strategy(name, device):
                if packed:
                    return ak.coded_attention(
                        *(query, case.packed, *tables),
                        code_bits=BITS,
                        num_tokens=shape["N"],
                        rope=rope,
                    )
                return ak.coded_attention(query, case.codes, *tables, rope=rope)

        return run

    ours = {
        f"{name}{tail}": attend(name, bool(tail)) for name in FORCED for tail in ("", "_packed")
    }
    ours["counts"] = lambda: ak.codeword_attention(query, case.counts, *tables)

    def select() -> Tensor:
        return sdpa(query, *case.expanded(), enable_gqa=True)

    rows = checked_rows(shape["M"])

    @functools.cache
    def error() -> Callable[[Any], float]:
        return error_of(oracle(query, case.dense_head, shape["Hkv"], rows), rows)

    baselines = {**dense_baselines(query, lambda: case.dense), "index_select_sdpa": select}
    if device.type == "cuda" and (shape["M"], shape["N"]) in FLEX_SHAPES:
        baselines["flex_attention"] = flex_attention(query, lambda: case.dense)
    if device.type == "cuda" and shape["M"] > 1:
        baselines["expand_sdpa"] = lambda: sdpa(query, *expanded_by_us(case), enable_gqa=True)
    return Calls(
        *(ours, baselines, lambda result: error()(result)),
        whole=whole,
        notes=lambda: {"sdpa_backend": chosen_backend(query, *case.dense)},
    )


def expanded_by_us(case: Coded) -> tuple[Tensor, Tensor]:
    """Keys and values by the kernel behind the strategy "expanded"."""
    from astra_kernels.coded_attention.kernel import describe, look_up

    coded = describe(case.codes, *case.tables, None, case.rope, None, None, None)
    key, value, *_ = look_up(case.query, coded)
    return key, value


coded_rotary = functools.partial(coded, rotary=True)


def mixed(shape: Shape, dtype: torch.dtype, device: torch.device) -> Calls:
    case = make(shape, dtype, device, dtype)
    query, tables, rope = case.query, case.tables, case.rope
    size = (2, 1, shape["Hkv"], shape["L"], shape["d"])
    near = torch.randn(size, dtype=dtype, device=device)
    causal = shape["causal"]

    def fused() -> object:
        with strategy("fused", device):
            return ak.mixed_attention(
                *(query, *near, case.codes, *tables),
                rope=rope,
                is_causal=causal,
                return_lse=True,
            )

    def two_launches() -> object:
        with strategy("fused", device):
            local = ak.attention(query, *near, is_causal=causal)
            remote = ak.coded_attention(query, case.codes, *tables, rope=rope)
            return ak.merge_state(*local, *remote)

    # The far keys first: then the mask is the causal one that flash kernels know.
    visible = causal_lower_right(shape["M"], shape["N"] + shape["L"]) if causal else None
    key, value = (torch.cat(pair, dim=2) for pair in zip(case.dense, near, strict=True))

    def select() -> Tensor:
        keys, values = (torch.cat(pair, dim=2) for pair in zip(case.expanded(), near, strict=True))
        return sdpa(query, keys, values, attn_mask=visible, enable_gqa=True)

    def keys_values(head: int) -> tuple[Tensor, Tensor]:
        far = case.dense_head(head)
        return tuple(torch.cat((near[i, 0, head].double(), far[i])) for i in range(2))  # type: ignore[return-value]

    rows = checked_rows(shape["M"])
    masked = (lambda row, keys: slice(row + 1, shape["L"])) if causal else None

    @functools.cache
    def error() -> Callable[[Any], float]:
        return error_of(oracle(query, keys_values, shape["Hkv"], rows, masked), rows)

    baselines = {
        "two_launches": two_launches,
        "sdpa": lambda: sdpa(query, key, value, attn_mask=visible, enable_gqa=True),
        "index_select_sdpa": select,
    }
    return Calls(
        *({"fused": fused}, baselines, lambda result: error()(result)),
        whole=whole,
        notes=dict if causal else lambda: {"sdpa_backend": chosen_backend(query, key, value)},
    )


def merge(shape: Shape, dtype: torch.dtype, device: torch.device) -> Calls:
    outs = torch.randn(2, 1, shape["M"], shape["H"], shape["d"], dtype=dtype, device=device)
    first, second = outs.transpose(2, 3)  # stored as attention stores it
    lses = torch.randn(2, 1, shape["H"], shape["M"], device=device)

    def plain() -> tuple[Tensor, Tensor]:
        lse = torch.logaddexp(lses[0], lses[1])
        weight = (lses[0] - lse).exp().unsqueeze(-1)
        return torch.lerp(second.float(), first.float(), weight).to(dtype), lse

    wide = lses.double()
    want_lse = torch.logaddexp(wide[0], wide[1])
    weights = (wide - want_lse).exp().unsqueeze(-1)
    want = weights[0] * first.double() + weights[1] * second.double()

    def error(result: Any) -> float:
        out, lse = result
        if not (lse - want_lse).abs().max() <= 1e-5:
            return math.inf
        return float((out.double() - want).norm() / want.norm())

    ours = {"auto": lambda: ak.merge_state(first, lses[0], second, lses[1])}
    return Calls(ours, {"torch": plain}, error)
