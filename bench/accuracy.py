"""What codes cost in accuracy: perplexity of SmolLM2 beside both controls.

    python -m bench.accuracy [--codes kv:3 hidden:1 …] [--windows 8]

Codebooks are fitted on the calibration part of the built-in text and evaluated on its evaluation
part, topics that they never saw, as 2 and as 4 ranks. Writes accuracy.json; minutes a codebook.
"""

import argparse
import sys

import torch

from astra_runtime import Codebook
from astra_runtime.cli.common import fit_builtin, quiet_transformers, say
from astra_runtime.evaluate import measure
from astra_runtime.fit import as_windows
from astra_runtime.store import builtin_text, load_model, load_tokenizer, token_windows
from bench._report import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    codes = ["kv:1", "kv:3", "kv:12", "hidden:1", "hidden:8", "none:int8"]
    parser.add_argument("--codes", nargs="+", default=codes, help="SPACE:GROUPS, or none:DTYPE")
    parser.add_argument("--windows", type=int, default=4, help="evaluation windows of 1024 tokens")
    options = parser.parse_args()
    quiet_transformers()
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    windows = as_windows(token_windows(tokenizer, builtin_text()[1], 1024, options.windows))
    rows = []
    for name in options.codes:
        space, choice = name.split(":")
        if space == "none":
            book = Codebook.none(choice)
        else:
            book = fit_builtin(model, tokenizer, space=space, groups=int(choice), held_back=0)
        for world_size in (2, 4):
            found = measure(model, book, windows, world_size=world_size)
            row = {
                "codes": name,
                "world_size": world_size,
                "windows": len(windows),
                "bits_per_token_block": found.bits_per_token_block,
                "exact": found.exact,
                "astra": found.astra,
                "local_only": found.local_only,
                "gap_recovered": found.gap_recovered,
                "calibration_vectors": book.notes.get("calibration_vectors"),
            }
            say(str(row))
            rows.append(row)
        write(  # after each, as a codebook takes minutes
            "accuracy",
            [],
            command=" ".join(["python -m bench.accuracy", *sys.argv[1:]]),
            packages=("torch", "numpy", "transformers"),
            extra={"rows": rows, "threads": torch.get_num_threads()},
        )


if __name__ == "__main__":
    main()
