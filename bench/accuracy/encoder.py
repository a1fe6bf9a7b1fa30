"""What codes cost an encoder: do all-MiniLM-L6-v2's embeddings still find the same neighbours?

    python -m bench.accuracy encoder [--codes transform:30 kv:12 …] [--seeds 0 1 2]

Texts of 256 tokens, as four simulated ranks. A text's embedding is the mean of its tokens' final
states, as the model is meant to be used. Each text's nearest neighbours among the others are sought
with exact and with coded embeddings. Codebooks are fitted on documentation; evaluated on other
topics of it, and on a handbook that they never saw. Writes accuracy_encoder.json after each row;
rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from astra_runtime import Codebook
from astra_runtime.console import say
from astra_runtime.costs import flops_over_ideal
from astra_runtime.models import adapt
from astra_runtime.parallel import map_cores
from astra_runtime.plan import Plan
from astra_runtime.store import load_model, load_tokenizer
from astra_runtime.texts import token_windows
from astra_runtime.train.simulate import Simulation
from bench import codebooks
from bench.accuracy.corpora import corpus, held_out
from bench.report import Rows, command_line, quiet_transformers

TOKENS, RANKS, NEIGHBOURS = 256, 4, 10
RESULT = "accuracy_encoder"


def embeddings(model: Any, book: Codebook, texts: list[Tensor]) -> Tensor:
    """Unit embeddings [W, D] of the texts, on simulated ranks."""
    plan = Plan.make(TOKENS - 1, RANKS, causal=False, copies=1)

    @torch.inference_mode()
    def embedding(ids: Tensor) -> Tensor:
        output = Simulation(model, book, plan, {"input_ids": ids[None]}).run()
        mean: Tensor = output.last_hidden_state[0].mean(0)
        return mean

    with adapt(model).installed():
        return F.normalize(torch.stack(list(map_cores(embedding, texts))), dim=-1)


def neighbours(vectors: Tensor) -> Tensor:
    """The nearest other texts of each, nearest first: [W, NEIGHBOURS]."""
    similarity = vectors @ vectors.T
    return similarity.fill_diagonal_(-2).topk(NEIGHBOURS).indices


def agreement(exact: Tensor, coded: Tensor) -> dict[str, float]:
    """How alike embeddings are, and how alike the rankings that they give."""
    of_exact, of_coded = neighbours(exact), neighbours(coded)
    shared = (of_exact[:, :, None] == of_coded[:, None]).any(-1).float().mean()
    return {
        "cosine": float((exact * coded).sum(-1).mean()),
        "first_neighbour_agrees": float((of_exact[:, 0] == of_coded[:, 0]).float().mean()),
        "ten_neighbours_shared": float(shared),
    }


def codebook_of(name: str, seed: int, model: Any, calibration: list[Tensor]) -> Codebook:
    """A control, or fitted on three quarters of the calibration texts, others for each seed."""
    book = codebooks.control(name)
    if book is not None:
        return book
    order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(seed))
    windows = [calibration[i] for i in order[: len(calibration) * 3 // 4]]
    return Codebook.fit(model, windows, **codebooks.size_of(name), held_back=0, seed=seed)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.accuracy encoder", description=__doc__.splitlines()[0]
    )
    codes = ["drop", "none:int8", "transform:10", "transform:30", "transform:100", "kv:1", "kv:12"]
    parser.add_argument("--codes", nargs="+", default=codes, help="SPACE:GROUPS, transform:BITS")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the fits")
    parser.add_argument("--texts", type=int, default=128, help="a domain")
    parser.add_argument("--calibration", type=int, default=96, help="texts, three quarters used")
    parser.add_argument("--domains", nargs="+", default=["documentation", "handbook"])
    options = parser.parse_args(arguments)
    quiet_transformers()
    model, tokenizer = load_model("minilm"), load_tokenizer("minilm")
    calibration = token_windows(tokenizer, corpus("documentation")[0], TOKENS, options.calibration)
    texts = held_out(tokenizer, options.domains, TOKENS, options.texts)
    exact = {d: embeddings(model, Codebook.dense(), texts[d]) for d in options.domains}
    rows = Rows(
        RESULT,
        command=command_line("bench.accuracy encoder", arguments),
        extra={"threads": torch.get_num_threads()},
        say=say,
    )

    def row(book: Codebook, domain: str) -> dict[str, Any]:
        return {
            "texts": len(texts[domain]),
            "world_size": RANKS,
            "bits_per_token_block": codebooks.bits_per_token_block(book, adapt(model)),
            "flops_over_ideal": flops_over_ideal(adapt(model), book, TOKENS - 1, RANKS),
            "calibration_vectors": book.notes.get("calibration_vectors"),
            **agreement(exact[domain], embeddings(model, book, texts[domain])),
        }

    for name in options.codes:
        for seed in [0] if codebooks.control(name) else options.seeds:
            places = [{"codes": name, "seed": seed, "domain": d} for d in options.domains]
            if all(map(rows.find, places)):
                continue  # the codebook need not be fitted
            book = codebook_of(name, seed, model, calibration)
            for place in places:
                rows.measured(place, partial(row, book, place["domain"]))


if __name__ == "__main__":
    main()
