"""What N ranks answer, and how near the single device it must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from astra_runtime import Codebook, Engine
from astra_runtime.evaluate import run_ranks
from astra_runtime.transport import Mesh


def logits_of(output: Any) -> Tensor:
    return output.logits if "logits" in output else output.last_hidden_state  # type: ignore


def answer_of(engine: Engine, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return logits_of(engine(**inputs, **options))


def ranks_output(
    model: Any, book: Codebook | None, inputs: dict[str, Tensor], world_size: int, **options: Any
) -> list[Tensor]:
    weights, halo = options.pop("weights", None), options.pop("halo", 0)

    def work(mesh: Mesh) -> Tensor:
        with Engine(model, book, mesh, weights=weights, halo=halo) as engine:
            return logits_of(engine(**inputs, **options))

    return run_ranks(world_size, work, timeout=30)


def rounding(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, float]:
    """The single device's output, and three times its own distance from fp64: engines sum in
    another order, and are as far from it."""
    with torch.inference_mode():
        single = logits_of(model(**inputs))
        double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        exact = logits_of(model.double()(**double))
        model.float()
    return single, 3 * float((single - exact).abs().max()) + 1e-6
