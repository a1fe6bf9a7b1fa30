"""Forward passes of encoders and vision models: a rank's part of a round, and how it crosses."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine import Engine
from ..errors import CallEnded
from ..trace import Trace, tracing

Input = dict[str, Any]  # of one pass, as jobs carry it


class Passes:
    """The forward passes of one rank in one round."""

    def __init__(self, engine: Engine, pooling: str) -> None:
        self.engine, self.pooling = engine, pooling

    def run(self, batch: Sequence[Input]) -> dict[str, Any]:
        """What this rank reports: parts of vectors by input, and seconds of its own passes."""
        parts, seconds, problem = [], [], None
        trace, begun = Trace(), time.perf_counter()
        for index, one in enumerate(batch):
            start = time.perf_counter()
            try:
                with tracing(trace):
                    part = self._pass(one)
            except (CallEnded, ValueError) as error:
                problem = str(error)
                continue
            if part is not None:
                total, weight, first = part
                parts.append([index, packed(total), weight, first])
                if one["owner"] is not None:
                    seconds.append([index, time.perf_counter() - start])
        busy = max(0.0, time.perf_counter() - begun - trace.seconds()["wait"])
        return {"parts": parts, "seconds": seconds, "problem": problem, "busy": round(busy, 6)}

    def _pass(self, one: Input) -> tuple[Tensor, float, str | None] | None:
        """Sum of token states, how many, and the class token's; None: nothing is this rank's."""
        engine, owner = self.engine, one["owner"]
        if owner not in (None, engine.rank):
            return None
        inputs = _inputs(one, engine)
        alone = owner is not None
        image = "pixel_values" in inputs
        if alone:
            with engine.calling():
                output = engine.model(**inputs, return_dict=True)
        else:
            asked: dict[str, Any] = {"outputs": "one"} if image else {"logits": "local"}
            output = engine(**inputs, **asked)
        if image:
            return None if output is None else (output.logits[0].float(), 1.0, None)
        states = output.last_hidden_state[0].float()
        first = packed(states[0])  # every rank has a copy of the class token
        if self.pooling == "cls":
            return states[0], 1.0, first
        if not alone:
            states = states[engine.adapter.class_tokens :]
            return states.sum(0), float(len(states)), first
        return states.sum(0), float(len(states)), None


def _inputs(one: Input, engine: Engine) -> dict[str, Any]:
    device = engine.adapter.device
    if "input_ids" in one:
        return {"input_ids": torch.tensor([one["input_ids"]]).to(device)}
    pixels = unpacked(one["pixel_values"]).view(one["shape"])
    return {"pixel_values": pixels.to(device, engine.adapter.dtype)}


def packed(tensor: Tensor) -> str:
    """fp32 values as text."""
    return base64.b64encode(tensor.detach().float().cpu().contiguous().numpy().tobytes()).decode()


def unpacked(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
