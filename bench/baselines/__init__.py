"""The baselines: what else one can do with several devices and a model that fits one of them.

Each method is a function `run(model, inputs, comm, **options)`, called by every rank with the same
whole inputs, an unmodified Hugging Face ViT, GPT-2 or Llama and its own `Comm`. It really computes
what that rank computes and returns the logits [B, V] of the last token (of the class token), or
None on ranks that do not have them. Nothing is timed here: the same code runs over gloo between
processes, over threads, and on a link with a clock of its own.

What a rank sends, in bits a token of the sequence, and what it costs in accuracy:

| name | bits | answer |
|---|---|---|
| `single` | none | the model's |
| `tp` | 4·(N − 1)/N·D·32 a block | the model's |
| `sp`, `sp_fp16`, `sp_int8` | (N − 1)/N·D·32 (16, 8) a block | the model's, but for rounding |
| `bp_ag_nb1`, `2`, `4` | Nb·(N − 1)/N·D·32 for all blocks | needs training |
| `bp_sp_nb1`, `2`, `4` | … and (Nb − 1)·(N − 1)/N²·D·32 | needs training |
| `segment_means` | (N − 1)/N·D·32/128 a block | needs fine-tuning |

Sequence parallelism and segment means send nothing in the first block, whose input every rank has.
No method computes while it sends; one that did would hide the shorter of the two at best. Attention
is that of `astra_kernels` (torch's own kernel on a CPU), as in ASTRA's engine, so that what differs
is the method; `single` is the model's own forward pass with torch's attention. Weights are views of
the model's: nothing is cut or copied in a call but activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from .block_parallel import bp
from .comm import Collectives, Comm, GlooComm, ThreadComm
from .segment_means import segment_means
from .sequence_parallel import sp
from .single import single
from .tensor_parallel import tp

__all__ = [
    "Collectives",
    "Comm",
    "GlooComm",
    "Method",
    "ThreadComm",
    "bp",
    "methods",
    "segment_means",
    "single",
    "sp",
    "tp",
]


@dataclass(frozen=True)
class Method:
    """One baseline.

    Attributes:
        run: see the package's docstring.
        exact: its logits are the single device's, to fp32 rounding.
        about: one line.
    """

    name: str
    run: Callable[..., Tensor | None]
    exact: bool
    about: str


def methods() -> dict[str, Method]:
    """All baselines by the names that reports use, the single device first."""
    every = [
        Method("single", single, True, "one device, the model's own forward pass"),
        Method("tp", tp, True, "tensor parallel (Megatron-LM)"),
        Method("sp", sp, True, "sequence parallel (Voltage), fp32 activations"),
        Method("sp_fp16", partial(sp, dtype="float16"), False, "the same, sent in fp16"),
        Method("sp_int8", partial(sp, dtype="int8"), False, "the same, sent in int8"),
    ]
    for sequence_parallel, name in ((False, "ag"), (True, "sp")):
        what = "sequence parallel" if sequence_parallel else "all-gather"
        for blocks in (1, 2, 4):
            run = partial(bp, blocks=blocks, sequence_parallel=sequence_parallel)
            about = f"block parallel with {what} (DeTransformer), Nb={blocks}; needs training"
            every.append(Method(f"bp_{name}_nb{blocks}", run, False, about))
    about = "segment means of 128 tokens (PRISM); needs fine-tuning"
    every.append(Method("segment_means", segment_means, False, about))
    return {method.name: method for method in every}
