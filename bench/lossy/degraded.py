"""What missing frames cost in accuracy: perplexity of SmolLM2 against the share that is missing.

    python -m bench.lossy degraded [--codes kv:3 transform:100] [--shares 0 .02 .05 .1 .2]

Of each block, from each rank to each other, a frame misses its deadline with the given probability,
independently: the receiver leaves that shard out of the block's softmax, as the engine does with
`on_missing="degrade"`. Ranks are simulated in one pass (`astra_runtime.train.simulate`, which
the tests hold to the engine). Codes that build on earlier blocks have rows for what else a receiver
could do afterwards: "out" leaves the shard out of the rest of the call, "predicted" never leaves it
out.
Adds to degraded.json after each row; rows that are there already are not measured again.
"""

import argparse
import json
import statistics
from collections.abc import Sequence

import torch

from astra_runtime.console import say
from astra_runtime.models import adapt
from astra_runtime.plan import Plan
from astra_runtime.store import load_model, load_tokenizer, token_windows
from astra_runtime.train.simulate import Simulation
from bench.accuracy.corpora import corpus
from bench.accuracy.lm import CONTROLS, TOKENS, codebook_of, row_of
from bench.report import command_line, load, quiet_transformers, write

RESULT = "degraded"
WAYS = {"kv": ("stale",), "hidden": ("stale",), "differential": ("stale", "out")}
WAYS |= {"transform": ("stale", "out", "predicted")}


def losses(model, book, windows, place) -> list[float]:
    """Nats a token after the first shard, by window; the same frames are missing in every row."""
    plan = Plan.make(
        TOKENS - book.prefix,
        place["world_size"],
        causal=True,
        copies=book.prefix,
        halo=place["halo"],
    )
    found = []
    for number, ids in enumerate(windows):
        generator = torch.Generator().manual_seed(1000 * place["seed"] + number)
        run = Simulation(
            model,
            book,
            plan,
            {"input_ids": ids[None]},
            lost=place["missing"],
            generator=generator,
            after_loss=place["afterwards"],
        )
        with torch.inference_mode():
            logits = run.run().logits[0]
        first = TOKENS // place["world_size"]
        loss = torch.nn.functional.cross_entropy(logits[first:-1], ids[first + 1 :])
        found.append(float(loss))
    return found


def measure(model, tokenizer, options: argparse.Namespace, command: str) -> None:
    rows = (load(f"cpu-2core/{RESULT}") or {"rows": []})["rows"]
    windows = token_windows(tokenizer, corpus(options.domain)[1], TOKENS, options.windows)
    common = {
        "domain": options.domain,
        "world_size": options.ranks,
        "windows": options.windows,
        "seed": options.seed,
    }

    def row(name: str, book, share: float, afterwards: str, base: dict | None) -> list[float]:
        halo = 0 if name in CONTROLS else options.halo
        place = {"codes": name, "missing": share, "afterwards": afterwards, "halo": halo} | common
        for known in rows:
            if place.items() <= known.items():
                return known["losses"]
        found = losses(model, book, windows, place)
        measured = {**place, "losses": [round(x, 5) for x in found]}
        measured["mean_loss"] = statistics.fmean(found)
        if base is not None:
            measured |= row_of(model, book, found, base)
        rows.append(measured)
        say(json.dumps({k: v for k, v in measured.items() if k != "losses"}))
        write(
            RESULT,
            [],
            command=command,
            packages=("torch", "numpy", "transformers"),
            extra={"rows": rows, "threads": torch.get_num_threads()},
        )
        return found

    with adapt(model).installed():
        base = {name: row(name, book, 0.0, "stale", None) for name, book in CONTROLS.items()}
        for name in options.codes:
            book = codebook_of(name, 0, model, tokenizer)
            for share in options.shares:
                for way in WAYS[book.space] if share else ("stale",):
                    row(name, book, share, way, base)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.lossy degraded", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--codes", nargs="+", default=["kv:3", "transform:100"])
    shares = [0.0, 0.02, 0.05, 0.1, 0.2]
    parser.add_argument("--shares", nargs="+", type=float, default=shares)
    parser.add_argument("--windows", type=int, default=4, help="of 1024 tokens")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--halo", type=int, default=32)
    parser.add_argument("--domain", default="documentation")
    parser.add_argument("--seed", type=int, default=0, help="of what is missing")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    command = command_line("bench.lossy degraded", arguments)
    torch.set_num_threads(options.threads)
    quiet_transformers()
    measure(load_model("smollm2"), load_tokenizer("smollm2"), options, command)


if __name__ == "__main__":
    main()
