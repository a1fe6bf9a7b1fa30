"""PyTorch's tests of `scaled_dot_product_attention` on a CPU (test/test_transformers.py).

Theirs run over dtypes, batches and heads, sequences of equal and unlike lengths, boolean and float
masks of every rank that broadcasts, causal ones, scales, grouped queries, layouts, dropout, and
compare outputs and gradients with the formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import astra_kernels as ak

from .cases import Case, close

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
B, H, M, L, D = 2, 4, 6, 6, 16


def tensors(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, grad: bool = False
) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in shapes]


def same(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> None:
    """The same outputs as torch's and, where an input requires grad, the same gradients."""
    inputs = [query, key, value]
    mask = options.get("attn_mask")
    inputs += [mask] if mask is not None and mask.requires_grad else []
    found = ak.scaled_dot_product_attention(query, key, value, **options)
    want = F.scaled_dot_product_attention(query, key, value, **options)
    assert (found.shape, found.dtype) == (want.shape, want.dtype)
    close(found, want, query.dtype)
    if any(tensor.requires_grad for tensor in inputs):
        pulled = torch.randn_like(want)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        ours, theirs = (torch.autograd.grad(out, wanted, pulled) for out in (found, want))
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, query.dtype, factor=4)


def plain(shapes: Any, dtype: torch.dtype, grad: bool = False, **options: Any) -> None:
    same(*tensors(shapes, dtype, grad), **options)


def masked(
    shapes: Any, mask: tuple[int, ...], kind: str, dtype: torch.dtype, grad: bool, **options: Any
) -> None:
    query, key, value = tensors(shapes, dtype, grad)
    seen = torch.rand(mask) > 0.4
    given = seen
    if kind == "float":
        given = torch.randn(mask, dtype=dtype)
    elif kind == "-inf":
        given = torch.zeros(mask, dtype=dtype).masked_fill(~seen, -torch.inf)
    elif kind == "bias with gradient":
        given = torch.randn(mask, dtype=dtype, requires_grad=True)
    if kind in ("bool", "-inf"):
        given[..., 0] = True if kind == "bool" else 0  # every query sees a key
    same(query, key, value, attn_mask=given, **options)


def square(rows: int = M, tokens: int = L, width: int = D) -> tuple[tuple[int, ...], ...]:
    return (B, H, rows, D), (B, H, tokens, D), (B, H, tokens, width)


MASKS = (
    (M, L),
    (1, L),
    (M, 1),
    (B, 1, M, L),
    (1, H, M, L),
    (B, H, M, L),
    (B, 1, 1, L),
    (B, H, 1, L),
)


def cases() -> Iterator[Case]:
    for dtype, grad, rows, causal in product(DTYPES, (False, True), (1, 6, 33), (False, True)):
        name = f"{dtype} {rows} rows causal {causal}"
        feature = "backward" if grad else "forward"
        yield Case(feature, name, partial(plain, square(rows, rows), dtype, grad, is_causal=causal))
    for dtype, grad, scale in product(DTYPES, (False, True), (0.1, 1.0, 0.0, -0.5)):
        feature = "backward" if grad else "forward"
        run = partial(plain, square(), dtype, grad, scale=scale)
        yield Case(feature, f"{dtype} scale {scale}", run)
    for dtype, grad, (rows, tokens) in product(DTYPES, (False, True), ((3, 9), (9, 3), (1, 17))):
        feature = "backward" if grad else "forward"
        yield Case(
            feature, f"{dtype} {rows} x {tokens}", partial(plain, square(rows, tokens), dtype, grad)
        )
        yield Case(
            "causal, other lengths",
            f"{dtype} {rows} x {tokens} grad {grad}",
            partial(plain, square(rows, tokens), dtype, grad, is_causal=True),
        )
    for dtype, grad, mask in product(DTYPES, (False, True), MASKS):
        name = f"{dtype} {list(mask)} grad {grad}"
        yield Case("boolean mask", name, partial(masked, square(), mask, "bool", dtype, grad))
        yield Case("float mask, bias", name, partial(masked, square(), mask, "float", dtype, grad))
    for dtype, mask in product(DTYPES, MASKS[:6]):
        name = f"{dtype} {list(mask)}"
        yield Case(
            "float mask, bias",
            "-inf " + name,
            partial(masked, square(), mask, "-inf", dtype, False),
        )
    for dtype, mask in product((torch.float32, torch.float64), MASKS[:7]):
        run = partial(masked, square(), mask, "bias with gradient", dtype, True)
        yield Case("gradient of the mask", f"{dtype} {list(mask)}", run)
    for dtype, grad, heads in product(DTYPES, (False, True), (1, 2, 4)):
        shapes = ((B, H, M, D), (B, heads, L, D), (B, heads, L, D))
        for causal in (False, True):
            run = partial(plain, shapes, dtype, grad, is_causal=causal, enable_gqa=True)
            yield Case("grouped queries", f"{dtype} {heads} KV heads {causal} {grad}", run)
        run = partial(masked, shapes, (M, L), "bool", dtype, grad, enable_gqa=True)
        yield Case("grouped queries", f"{dtype} {heads} KV heads masked {grad}", run)
    for dtype, grad in product(DTYPES, (False, True)):
        for width in (8, 24):
            run = partial(plain, square(M, L, width), dtype, grad)
            yield Case("values of another width", f"{dtype} {width} {grad}", run)
        yield from _layouts(dtype, grad)
        yield from _long(dtype, grad)
        yield from _one_projection(dtype, grad)
        yield from _every_broadcast(dtype, grad)
        yield from _strided_masks(dtype, grad)
        yield from _three_axes_masked(dtype, grad)
    for dtype, shapes in product(DTYPES, EMPTY):
        yield Case("no tokens or batch", f"{dtype} {shapes}", partial(plain, shapes, dtype))
    for dtype in DTYPES:
        yield Case("a row that sees nothing", f"{dtype}", partial(_nothing_seen, dtype))
        for probability in (0.3, 1.0):
            run = partial(_dropout, dtype, probability)
            yield Case("dropout", f"{dtype} {probability}", run)
    for packed in (False, True):
        yield Case("gradcheck", f"packed {packed}", partial(_gradcheck, packed))
    for dtype, grad in product((torch.bfloat16, torch.float16), (False, True)):
        run = partial(_mask_in_float32, dtype, grad)
        yield Case("float mask, bias", f"{dtype} in float32 {grad}", run)
    yield Case("float mask, bias", "a band of -inf", _band_of_infinity)
    yield Case("forward", "a scale of -1e4", partial(plain, square(), torch.float64, scale=-1e4))
    run = partial(masked, square(), (M, L), "float", torch.float32, False, is_causal=True)
    yield Case("a mask and is_causal", "float", run)
    yield Case("nested", "jagged", _nested)
    for feature, options, refusal in WRONG:
        yield Case("what torch refuses", feature, partial(_wrong, **options), refusal)


EMPTY = (
    ((0, H, M, D), (0, H, L, D), (0, H, L, D)),
    ((B, H, 0, D), (B, H, L, D), (B, H, L, D)),
    ((B, 0, M, D), (B, 0, L, D), (B, 0, L, D)),
)


def _layouts(dtype: torch.dtype, grad: bool) -> Iterator[Case]:
    def heads_last() -> None:
        query, key, value = tensors(((B, M, H, D),) * 3, dtype, grad)
        same(*(t.transpose(1, 2) for t in (query, key, value)), is_causal=True)

    def one_projection() -> None:
        (joint,) = tensors(((B, M, 3 * H * D),), dtype, grad)
        parts = joint.unflatten(2, (3, H, D)).permute(2, 0, 3, 1, 4).unbind()
        same(*(part.detach().requires_grad_(grad) for part in parts))

    def expanded() -> None:
        query, key, value = tensors(((B, H, M, D), (1, 1, L, D), (1, 1, L, D)), dtype, grad)
        same(query, key.expand(B, H, -1, -1), value.expand(B, H, -1, -1))

    def broadcast() -> None:
        same(*tensors(((B, H, M, D), (1, H, L, D), (1, 1, L, D)), dtype, grad))

    def three_axes() -> None:
        same(*tensors(((H, M, D), (H, L, D), (H, L, D)), dtype, grad), is_causal=True)

    def two_axes() -> None:
        same(*tensors(((M, D), (L, D), (L, D)), dtype, grad))

    def five_axes() -> None:
        same(*tensors(((2, B, H, M, D),) * 3, dtype, grad))

    def every_other() -> None:
        same(*(t[..., ::2] for t in tensors(((B, H, M, 2 * D),) * 3, dtype, grad)))

    for run in (
        *(heads_last, one_projection, expanded, broadcast),
        *(three_axes, two_axes, five_axes, every_other),
    ):
        yield Case("layouts and broadcast batches", f"{run.__name__} {dtype} {grad}", run)


def _long(dtype: torch.dtype, grad: bool) -> Iterator[Case]:
    """More queries and keys than kernels take at a time, and widths that no vector divides."""
    rows, tokens = 267, 514
    for width in (8, 31):
        shapes = tuple((1, 2, count, width) for count in (rows, tokens, tokens))
        equal = ((1, 2, rows, width),) * 3
        runs = {
            "plain": partial(plain, shapes, dtype, grad),
            "causal": partial(plain, equal, dtype, grad, is_causal=True),
            "bool": partial(masked, shapes, (rows, tokens), "bool", dtype, grad),
            "float": partial(masked, shapes, (1, 2, rows, tokens), "float", dtype, grad),
        }
        for kind, run in runs.items():
            yield Case("hundreds of tokens", f"{kind} {width} {dtype} {grad}", run)


def _one_projection(dtype: torch.dtype, grad: bool) -> Iterator[Case]:
    """Queries, keys and values are views of one tensor, which has the gradient."""

    def run(batch: int, heads: int, rows: int, width: int, causal: bool) -> None:
        joint = torch.randn(batch, rows, 3 * heads * width, dtype=dtype, requires_grad=grad)
        results = []
        for function in (ak.scaled_dot_product_attention, F.scaled_dot_product_attention):
            parts = joint.unflatten(2, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind()
            out = function(*parts, is_causal=causal)
            results.append([out])
            if grad:
                results[-1] += torch.autograd.grad(out, joint, torch.ones_like(out))
        for ours, theirs in zip(*results, strict=True):
            close(ours, theirs, dtype, factor=4)

    for causal, sizes in product((False, True), ((2, 3, 267, 8), (5, 1, 40, 16))):
        name = f"{list(sizes)} {dtype} causal {causal} {grad}"
        yield Case("one projection", name, partial(run, *sizes, causal))
    if dtype == torch.float32:
        run_long = partial(run, 1, 1, 1030, 16, True)
        yield Case("one projection", f"1030 tokens {grad}", run_long)


def _every_broadcast(dtype: torch.dtype, grad: bool) -> Iterator[Case]:
    """Masks of which any axis may be 1, on heads that lie behind rows: boolean ones, and float ones
    beside gradients."""
    rows, tokens = 19, 34

    def run(shape: tuple[int, ...]) -> None:
        sizes = ((B, rows, H, 8), (B, tokens, H, 8), (B, tokens, H, 8))
        inputs = [t.transpose(1, 2) for t in tensors(sizes, dtype)]
        mask = torch.randn(shape, dtype=dtype) if grad else torch.rand(shape) > 0.5
        same(*(t.requires_grad_(grad) for t in inputs), attn_mask=mask)

    shapes = (*product((rows, 1), (tokens, 1)), *product((B, 1), (H, 1), (rows, 1), (tokens, 1)))
    for shape in shapes:
        name = f"{list(shape)} {dtype} {grad}"
        yield Case("masks that broadcast", name, partial(run, shape))


def _three_axes_masked(dtype: torch.dtype, grad: bool) -> Iterator[Case]:
    shapes = ((H, M, D), (H, L, D), (H, L, D))
    for mask, kind in product(((M, L), (H, M, L), (1, M, L)), ("bool", "float")):
        run = partial(masked, shapes, mask, kind, dtype, grad)
        yield Case("three axes, masked", f"{kind} {list(mask)} {dtype} {grad}", run)


def _gradcheck(packed: bool) -> None:
    """Derivatives by differences, in float64."""
    inputs = tensors(((1, 2, 2, 3),) * 3, torch.float64, True)
    joint = torch.cat([tensor.detach() for tensor in inputs], 3).requires_grad_()

    def of_views(tensor: Tensor) -> Tensor:
        parts = (part.transpose(1, 2) for part in tensor.chunk(3, dim=3))
        return ak.scaled_dot_product_attention(*parts, is_causal=True)

    def of_three(*given: Tensor) -> Tensor:
        return ak.scaled_dot_product_attention(*given, is_causal=True)

    function, given = (of_views, [joint]) if packed else (of_three, inputs)
    assert torch.autograd.gradcheck(function, given)


def _mask_in_float32(dtype: torch.dtype, grad: bool) -> None:
    same(*tensors(square(), dtype, grad), attn_mask=torch.randn(M, L))


def _band_of_infinity() -> None:
    """Whole blocks of scores are -inf."""
    distance = torch.arange(600) - torch.arange(600)[:, None]
    mask = torch.zeros(600, 600).masked_fill((distance > 0) | (distance < -9), -torch.inf)
    same(*tensors(((1, 2, 600, 8),) * 3, torch.float32), attn_mask=mask)


def _strided_masks(dtype: torch.dtype, grad: bool) -> Iterator[Case]:
    def expanded(mask: Tensor) -> Tensor:
        return mask[:1, :1].expand(B, H, -1, -1)

    def transposed(mask: Tensor) -> Tensor:
        return mask.mT.contiguous().mT

    def every_other(mask: Tensor) -> Tensor:
        return mask.repeat_interleave(2, dim=3)[..., ::2]

    def run(view: Any, boolean: bool) -> None:
        mask = torch.randn(B, H, M, L, dtype=dtype)
        given = view(mask > -1 if boolean else mask)
        same(*tensors(square(), dtype, grad), attn_mask=given)

    for view, boolean in product((expanded, transposed, every_other), (False, True)):
        name = f"{view.__name__} {dtype} {boolean} {grad}"
        yield Case("masks of any strides", name, partial(run, view, boolean))


def _nothing_seen(dtype: torch.dtype) -> None:
    query, key, value = tensors(square(), dtype)
    mask = torch.ones(M, L, dtype=torch.bool)
    mask[2] = False
    found = ak.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert not found[:, :, 2].any()
    same(query, key, value, attn_mask=mask)


def _dropout(dtype: torch.dtype, probability: float) -> None:
    """Drawn by torch, so the same seed gives the same answer."""
    given = tensors(square(), dtype)
    results = []
    for function in (ak.scaled_dot_product_attention, F.scaled_dot_product_attention):
        torch.manual_seed(3)
        results.append(function(*given, dropout_p=probability))
    close(results[0], results[1], dtype)


def _nested() -> None:
    parts = [torch.randn(n, H, D) for n in (3, 5)]
    given = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    found, want = (
        function(given, given, given)
        for function in (ak.scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    close(found.values(), want.values(), torch.float32)


def _wrong(**changed: Any) -> None:
    query, key, value = tensors(square(), torch.float32)
    ak.scaled_dot_product_attention(**{"query": query, "key": key, "value": value} | changed)


WRONG: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("one axis", {"query": torch.zeros(D)}, "at least 2 dimensional|same number"),
    ("dtypes", {"key": torch.zeros(B, H, L, D, dtype=torch.float64)}, "dtype"),
    ("devices", {"key": torch.zeros(B, H, L, D, device="meta")}, "device"),
    ("widths", {"key": torch.zeros(B, H, L, D + 1)}, "size|shape|dimension|mat"),
    ("a mask of integers", {"attn_mask": torch.zeros(M, L, dtype=torch.int32)}, "mask|dtype"),
    ("a mask that does not fit", {"attn_mask": torch.zeros(M + 1, L)}, "size|shape|expand|broad"),
)
