"""A step of `astra finetune`: attention by states that are merged, beside one mask over all tokens.

    python -m bench.finetune              # writes bench/results/<device>/finetune.json
    python -m bench.finetune --no-write --tokens 64 --samples 1      # whether everything runs

Two blocks of each model's shape with random weights and codewords run as four ranks: forward,
backward, AdamW. The baseline `one_mask` is what was done before: keys of all tokens as they are and
as codes in one row, heads repeated, under a mask [L, L + S]. `peak_bytes` are what a process of its
own needed at most for a step, over what it had with the model loaded.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from astra_runtime.models import adapt
from astra_runtime.plan import Plan
from astra_runtime.train.simulate import Layout, Simulation, quantizers
from bench.codebooks import random_codebook
from bench.ops_drop_in import memory_kb
from bench.report import Case, measure, write

TOKENS, RANKS, BLOCKS = 1024, 4, 2
CODES = {"vit": "kv:12", "gpt2": "kv:12", "llama": "kv:3"}  # one code a head of keys
METHODS = ("ours", "one_mask")


def make_mask(layout: Layout, plan: Plan, visible: Tensor | None) -> Tensor:
    """Who sees whom: bool [B or 1, 1, L, L + S], the tokens of all ranks, then those sent.

    `visible`, bool [B, tokens], is False at padding. A token always sees itself.
    """
    sent, token = layout.sent, layout.token
    local = layout.rank[:, None] == layout.rank
    remote = ~local[:, sent]
    if plan.causal:
        local = local & (token[:, None] >= token)
        ranks = range(plan.world_size)
        first = [plan.shard(n).start + plan.copies - plan.num_leading(n) for n in ranks]
        start = torch.tensor(first, device=token.device)[layout.rank, None]
        # Not what the halo has.
        remote = remote & (token[:, None] > token[sent]) & (start > token[sent])
    both = torch.cat([local, remote], 1)[None, None]
    if visible is None:
        return both
    no_padding = visible[:, token]
    both = both & torch.cat([no_padding, no_padding[:, sent]], 1)[:, None, None]
    return both | torch.eye(len(token), both.shape[-1], dtype=torch.bool, device=both.device)


class OneMask(Simulation):
    """The same pass with one softmax over [L, L + S] scores of each head, masked."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        plan, inputs = self.plan, args[3]
        self.mask = make_mask(self.layout, plan, self.adapter.visible(inputs))

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        length, mask = key.shape[2], self.mask
        if self.codec is None:
            return one_softmax(query, key, value, mask[..., :length], scale)
        received = self._received(block)
        attended = self._attended(received)
        if attended is not None:
            seen = attended[self.layout.rank]
            mask = torch.cat([mask[..., :length], mask[..., length:] & seen], -1)
        pairs = self._remote_pairs(block, key, value, received)
        outputs = []
        for n, (remote_key, remote_value) in enumerate(pairs):
            rows = self.layout.rank == n if len(pairs) > 1 else slice(None)
            keys = torch.cat([key, remote_key.to(key.dtype)], 2)
            values = torch.cat([value, remote_value.to(value.dtype)], 2)
            outputs.append(one_softmax(query[:, :, rows], keys, values, mask[:, :, rows], scale))
        return torch.cat(outputs, 2)


def one_softmax(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def make_model(name: str, tokens: int) -> Any:
    import transformers

    sizes: dict[str, Any] = {"num_hidden_layers": BLOCKS, "vocab_size": 1024}
    sizes |= {"bos_token_id": None, "eos_token_id": None}
    if name == "vit":
        side = round(tokens**0.5)
        config = transformers.ViTConfig(image_size=16 * side, num_hidden_layers=BLOCKS)
        return transformers.ViTForImageClassification(config).eval()
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    sizes |= {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    config = transformers.LlamaConfig(num_key_value_heads=3, **sizes)  # SmolLM2's block
    return transformers.LlamaForCausalLM(config).eval()


def make_step(name: str, tokens: int, method: str) -> Callable[[], object]:
    """A step of a model of its own; the same steps of both methods."""
    torch.manual_seed(0)
    model = make_model(name, tokens)
    adapter = adapt(model)
    book = random_codebook(CODES[name], adapter)
    layers = quantizers(book, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if adapter.token_ids:
        inputs = {"input_ids": torch.randint(0, 1024, (1, tokens))}
    else:
        inputs = {"pixel_values": torch.randn(1, 3, *(2 * [16 * round(tokens**0.5)]))}
    plan = Plan.make(tokens, RANKS, causal=adapter.causal, copies=adapter.class_tokens)
    simulation = Simulation if method == "ours" else OneMask

    def step() -> None:
        run = simulation(model, book, plan, inputs, layers)
        logits = run.run().logits.flatten(0, -2)
        target = inputs["input_ids"].flatten() if adapter.token_ids else torch.zeros(1).long()
        optimizer.zero_grad(set_to_none=True)
        (F.cross_entropy(logits, target) + run.commitment).backward()
        optimizer.step()

    return step


def peak_bytes(name: str, tokens: int, method: str) -> int:
    """What a step needs at most, in a process of its own."""
    command = [sys.executable, "-m", "bench.finetune", "--tokens", str(tokens)]
    command += ["--peak", name, method]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(name: str, tokens: int, method: str) -> None:
    step = make_step(name, tokens, method)
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
    before = memory_kb("VmRSS")
    step()
    print((memory_kb("VmHWM") - before) * 1024)


def cases(tokens: int, samples: int) -> Iterator[Case]:
    for name in CODES:
        peaks = {method: peak_bytes(name, tokens, method) for method in METHODS}
        steps = {method: make_step(name, tokens, method) for method in METHODS}
        times = measure(steps, samples=samples)
        shape = {"B": 1, "tokens": tokens, "N": RANKS, "blocks": BLOCKS}
        baselines = {"one_mask": times["one_mask"].p50}
        print(f"{name}  {times['ours'].p50:.0f} ms, one mask {times['one_mask'].p50:.0f}; {peaks}")
        yield Case(
            f"finetune_{name}", shape, "float32", "auto", times["ours"], None, baselines,
            {"peak_bytes": peaks},
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.finetune", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="a window's; a square number")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        name, method = args.peak
        print_peak(name, args.tokens, method)
        return
    done = list(cases(args.tokens, args.samples))
    if not args.no_write:
        print(write("finetune", done, command="python -m bench.finetune", packages=("torch",)))


if __name__ == "__main__":
    main()
