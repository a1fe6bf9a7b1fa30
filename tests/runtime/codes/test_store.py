"""Packed codes that grow, are forked and are cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import astra_kernels as ak
from astra_runtime.codes.store import PAGE_TOKENS, CodeStore


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(0, 5),
    bits=st.integers(1, 16),
    steps=st.lists(st.integers(-90, 90), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_a_store_is_a_list_of_codes(groups: int, bits: int, steps: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    store, model = CodeStore(groups, bits), torch.zeros(0, groups, dtype=torch.int32)
    forks = []
    for step in steps:
        forks.append((store.fork(), model))
        if step < 0:
            length = max(0, len(store) + step)
            store.truncate(length)
            model = model[:length]
        else:
            new = torch.randint(1 << bits, (step, groups), generator=generator).int()
            if step % 2:
                store.append(new)
            else:
                data = ak.pack(new, bits).numpy().tobytes() if new.numel() else b""
                store.append_packed(data, step)
            model = torch.cat([model, new])
    for kept, expected in [*forks, (store, model)]:
        assert torch.equal(kept.codes(), expected)
        middle = len(expected) // 2
        part = expected[middle // 2 : middle]
        packed = ak.pack(part.contiguous(), bits).numpy().tobytes() if part.numel() else b""
        assert kept.packed(middle // 2, middle) == packed


def test_a_fork_shares_its_pages() -> None:
    store = CodeStore(3, 7)
    store.append(torch.ones(PAGE_TOKENS + 5, 3, dtype=torch.int32))
    fork = store.fork()
    assert [a is b for a, b in zip(store._pages, fork._pages, strict=True)] == [True, True]
    fork.append(torch.zeros(1, 3, dtype=torch.int32))
    assert [a is b for a, b in zip(store._pages, fork._pages, strict=True)] == [True, False]
    assert store.nbytes == ak.packed_size(3 * PAGE_TOKENS, 7) + ak.packed_size(15, 7)


def test_what_is_no_code_is_refused() -> None:
    store = CodeStore(2, 4, codewords=10)
    with pytest.raises(ValueError, match=r"codes: expected 0 to 9, got 10"):
        store.append(torch.tensor([[1, 10]]))
    with pytest.raises(ValueError, match=r"codes: expected shape \[n, 2\], got \[1, 3\]"):
        store.append(torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match=r"data: expected 3 bytes of 3 tokens, got 2"):
        store.append_packed(b"\0\0", 3)
    with pytest.raises(ValueError, match=r"length: expected 0 to 0, got 1"):
        store.truncate(1)
    with pytest.raises(ValueError, match=r"start, stop: expected 0 <= start <= stop <= 0"):
        store.codes(0, 1)
    with pytest.raises(ValueError, match=r"bits: expected 1 to 16, got 17"):
        CodeStore(1, 17)
    assert len(store) == 0
