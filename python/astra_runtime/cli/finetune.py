"""`astra finetune`: adapt a model and its codebook to each other."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..console import say, show_json, working
from ..errors import AstraError
from .common import load, save_result, window_tokens
from .fitting import verdict
from .options import (
    add_model,
    add_tokens,
    group,
    not_negative,
    output_folder,
    positive,
    seed,
    two_or_more,
)

if TYPE_CHECKING:
    from ..evaluate import Measured
    from ..train.finetune import Step

CONTROLS = ("exact", "local-only")
SHARD = 16  # tokens, the fewest of a device where windows are long enough


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  astra finetune --model smollm2 --codebook codebook/ --output adapted/ --steps 300\n"
        "  astra run --model adapted/ --codebook adapted/ --world-size 4 --prompt TEXT\n\n"
        "N devices are simulated in one process; N and the shards change with every step."
    )
    add_model(parser)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--codebook", metavar="DIR", help="where the codewords start: `astra fit`")
    start.add_argument(
        "--control", choices=CONTROLS, help="train a control instead, which needs no codebook"
    )
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="folder for model and codebook"
    )
    text = group(parser, "text")
    text.add_argument("--text", metavar="FILE", help="text to train on (default: built-in)")
    add_tokens(text, "tokens a window")
    text.add_argument(
        "--windows",
        type=positive,
        default=1000,
        help="most windows of the text to train on (default: 1000)",
    )
    text.add_argument(
        "--held-back",
        type=not_negative,
        default=2,
        help="windows held out for evaluation (default: 2)",
    )
    training = group(parser, "training")
    training.add_argument(
        "--steps", type=positive, default=300, help="optimizer steps (default: 300)"
    )
    training.add_argument("--batch", type=positive, default=4, help="windows a step (default: 4)")
    training.add_argument(
        "--lr", type=float, default=5e-5, help="highest learning rate (default: 5e-5)"
    )
    training.add_argument(
        "--noise",
        type=float,
        default=1.0,
        help="λ: noise over the residual (default: 1)",
    )
    training.add_argument(
        "--commitment",
        type=float,
        default=1e-4,
        help="β: weight of the commitment loss (default: 1e-4)",
    )
    training.add_argument(
        "--decay", type=float, default=0.99, help="γ of moving averages (default: 0.99)"
    )
    training.add_argument(
        "--min-ranks", type=positive, default=2, help="fewest devices of a step (default: 2)"
    )
    training.add_argument(
        "--max-ranks", type=positive, default=8, help="most devices of a step (default: 8)"
    )
    training.add_argument(
        "--min-shard",
        type=positive,
        help=f"fewest tokens of a device (default: {SHARD}, or as many as all have in a window)",
    )
    evaluation = group(parser, "evaluation and checkpoints")
    evaluation.add_argument(
        "--world-size", type=two_or_more, default=4, help="ranks of the evaluation (default: 4)"
    )
    evaluation.add_argument(
        "--evaluate-every",
        type=not_negative,
        default=100,
        help="steps from one evaluation to the next; 0: at start and end alone (default: 100)",
    )
    evaluation.add_argument(
        "--checkpoint-every",
        type=not_negative,
        default=100,
        help="steps from one checkpoint to the next; 0: none (default: 100)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--seed", type=seed, default=0, help="of all that is drawn (default: 0)")


def run(options: argparse.Namespace) -> int:
    from ..codes.codebook import Codebook
    from ..texts import builtin_text, read_text, token_windows
    from ..train.finetune import CHECKPOINT, finetune
    from ..train.finetune import save_result as write_result

    device, settings = device_of(options), settings_of(options)
    if options.control is None:
        codebook = Codebook.from_pretrained(options.codebook)
    else:
        codebook = Codebook.dense() if options.control == "exact" else Codebook.local_only()
    text = builtin_text()[0] if options.text is None else read_text(options.text)
    folder = output_folder(options)
    if options.resume and not (folder / CHECKPOINT).is_file():
        raise AstraError(f"--resume: found no checkpoint {folder / CHECKPOINT}; start without it")
    if options.dtype != "float32":
        raise AstraError(f"--dtype: expected float32, which training needs, got {options.dtype}")
    model, tokenizer = load(options)
    model = model.to(device)
    length = window_tokens(options, model, shorten=True)
    if options.min_shard is None:  # a token is every rank's own, or has none to be compared with
        most = (length - 1 - codebook.prefix) // options.max_ranks
        settings = replace(settings, shard=max(1, min(SHARD, most)))
    windows = token_windows(tokenizer, text, length, options.windows)
    begun, log = time.perf_counter(), _Log()
    with working(log.describe):
        adapted = finetune(
            model,
            codebook,
            windows,
            settings,
            folder=folder,
            resume=options.resume,
            held_back=options.held_back,
            world_size=options.world_size,
            evaluate_every=options.evaluate_every,
            checkpoint_every=options.checkpoint_every,
            report=log,
        )
    save_result(lambda place: write_result(model, adapted, place, tokenizer), folder)
    seconds = time.perf_counter() - begun
    held_back = adapted.notes.get("held_back")
    if adapted.coded:
        say(verdict(held_back))
    say(f"written to {options.output} after {seconds:.0f} s")
    if options.json:
        show_json(
            {
                "output": str(folder),
                "digest": adapted.digest,
                "steps": options.steps,
                "loss": log.losses,
                "held_back": held_back,
                "measured": adapted.notes.get("measured"),
                "seconds": seconds,
            }
        )
    return 0


def device_of(options: argparse.Namespace) -> str:
    import torch

    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise AstraError("--device: expected cpu, as torch finds no CUDA device here, got cuda")
    return options.device or ("cuda" if there else "cpu")


def settings_of(options: argparse.Namespace) -> Any:
    from ..train.schedule import Settings

    for name, good, wanted in (
        ("lr", 0 < options.lr < math.inf, "more than 0"),
        ("noise", 0 <= options.noise < math.inf, "0 or more"),
        ("commitment", 0 <= options.commitment < math.inf, "0 or more"),
        ("decay", 0 <= options.decay < 1, "at least 0 and below 1"),
    ):
        if not good:
            raise AstraError(f"--{name}: expected {wanted}, got {getattr(options, name)}")
    if options.min_ranks > options.max_ranks:
        raise AstraError(
            f"--min-ranks: expected at most --max-ranks {options.max_ranks}, "
            f"got {options.min_ranks}"
        )
    return Settings(
        steps=options.steps,
        lr=options.lr,
        batch=options.batch,
        noise=options.noise,
        commitment=options.commitment,
        decay=options.decay,
        ranks=(options.min_ranks, options.max_ranks),
        shard=options.min_shard or SHARD,
        seed=options.seed,
    )


class _Log:
    """A line for people now and then: the mean loss since the last one, and what was measured."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._shown = 0  # losses that a line has told of
        self._seconds = 0.0  # that the steps since then took, evaluations left out
        self._last = time.perf_counter()

    def describe(self) -> str:
        return f"after {len(self.losses)} steps" if self.losses else "evaluating the start"

    def __call__(self, step: Step) -> None:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        if step.measured is not None:
            say(f"step {step.step}/{step.steps}: {_figures(step.measured)}")
            return
        self.losses.append(step.loss)
        self._seconds += elapsed
        if step.step < step.steps and self._seconds < 5:
            return
        recent = self.losses[self._shown :]
        say(
            f"step {step.step}/{step.steps}: loss {sum(recent) / len(recent):.4f}, "
            f"commitment {step.commitment:.2g}, {self._seconds / len(recent):.2f} s a step"
        )
        self._shown, self._seconds = len(self.losses), 0.0


def _figures(measured: Measured) -> str:
    figures = (
        f"held out: {measured.metric} {measured.astra:.4g} "
        f"(exact {measured.exact:.4g}, remote tokens dropped {measured.local_only:.4g})"
    )
    if math.isnan(measured.gap_recovered):
        return figures
    return f"{figures}, {100 * measured.gap_recovered:.0f} % of the gap recovered"
