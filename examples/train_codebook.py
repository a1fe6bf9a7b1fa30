"""A training loop with gradients through codes: the tables learn what attention needs of them.

Far tokens are known by their codes alone. `ak.mixed_attention` gives gradients to the tables of
keys and values that the codes name, so a loss on the attention's own output trains them; codes are
integers and stay. Here tables that k-means would start from random rows learn to stand for
the keys and values that were coded, and the error of the output falls.

    python examples/train_codebook.py
"""

from __future__ import annotations

import torch

import astra_kernels as ak

HEADS, KV_HEADS, DIM, CODEWORDS, NEAR, FAR = 4, 2, 16, 32, 8, 256


def main(steps: int = 60) -> tuple[float, float]:
    """Mean squared error of the attention's output before and after training."""
    torch.manual_seed(0)
    centers = torch.randn(CODEWORDS, KV_HEADS, 2 * DIM)
    far = centers[torch.randint(CODEWORDS, (FAR,))] + 0.1 * torch.randn(FAR, KV_HEADS, 2 * DIM)
    far = far[None]  # keys and values of the far tokens, [1, N, Hkv, 2d]
    codebook = far[0, torch.randperm(FAR)[:CODEWORDS]].transpose(0, 1).contiguous()  # [Hkv, K, 2d]
    codes = ak.encode(far, codebook)  # int32 [1, N, Hkv]
    keys, values = (t.clone().requires_grad_() for t in codebook.unsqueeze(1).chunk(2, -1))
    far_key, far_value = far.transpose(1, 2).chunk(2, -1)
    optimizer = torch.optim.Adam([keys, values], lr=0.02)
    errors = []
    for _ in range(steps):
        query = torch.randn(1, HEADS, NEAR, DIM)
        near_key, near_value = torch.randn(2, 1, KV_HEADS, NEAR, DIM)
        found = ak.mixed_attention(query, near_key, near_value, codes, keys, values)
        everything = torch.cat([near_key, far_key], 2), torch.cat([near_value, far_value], 2)
        want, _ = ak.attention(query, *everything)
        loss = (found - want).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(loss.detach()))
    tenth = max(1, steps // 10)
    return sum(errors[:tenth]) / tenth, sum(errors[-tenth:]) / tenth


if __name__ == "__main__":
    before, after = main()
    print(f"mean squared error of the output: {before:.4f} before, {after:.4f} after training")
