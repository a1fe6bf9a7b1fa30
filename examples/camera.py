"""A camera's loop: a ViT reads frames at a fixed rate on two ranks, with a deadline a frame.

    python examples/camera.py 0 127.0.0.1:7000,127.0.0.1:7001 &
    python examples/camera.py 1 127.0.0.1:7000,127.0.0.1:7001

Both ranks get every frame, as from a camera that sends to both. A rank that is late or lost is left
out of that frame's answer, which says so; a frame whose answer is late is given up, and the loop
goes on with the next one.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

import astra_runtime as astra
from astra_runtime.errors import CallEnded


@dataclass(frozen=True)
class Seen:
    """What became of one frame: its class, or None where no answer came in time."""

    frame: int
    label: int | None
    degraded: bool
    seconds: float


def watch(
    engine: astra.Engine, frames: int, rate: float, deadline_ms: float, start: float
) -> list[Seen]:
    """Reads `frames` frames, `rate` a second from `start` on, of `time.monotonic`; collective."""
    seen = []
    for number in range(frames):
        time.sleep(max(0.0, start + number / rate - time.monotonic()))
        try:
            output = engine(
                pixel_values=camera(engine, number), request=number, within_ms=deadline_ms
            )
            label = int(output.logits[0].argmax())
            seen.append(Seen(number, label, output.degraded, output.seconds))
        except CallEnded:  # on every rank: the next frame finds them in step
            seen.append(Seen(number, None, False, engine.seconds))
    return seen


def camera(engine: astra.Engine, number: int) -> torch.Tensor:
    """The frame that every rank is given."""
    config: Any = engine.model.config
    generator = torch.Generator().manual_seed(number)
    shape = (1, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=generator)


def run(model: Any, mesh: Any, frames: int, rate: float, deadline_ms: float) -> list[Seen]:
    """One rank's part: makes everything ready first, so that no frame pays for it."""
    limits: dict[str, Any] = {"on_missing": "degrade", "deadline_ms": deadline_ms / 4}
    with astra.Engine(model, None, mesh, **limits) as engine:
        engine.warmup()
        return watch(engine, frames, rate, deadline_ms, time.monotonic() + 0.1)


if __name__ == "__main__":
    import transformers

    torch.manual_seed(0)  # the same weights on both ranks
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=4)).eval()
    with astra.connect(int(sys.argv[1]), peers=sys.argv[2].split(",")) as connected:
        for one in run(vit, connected, frames=30, rate=2.0, deadline_ms=500.0):
            print(one)
