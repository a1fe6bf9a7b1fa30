"""What codes cost in accuracy: perplexity of SmolLM2 beside both controls.

    python -m bench.accuracy [--codes kv:3 differential:1 …] [--domain documentation source]

Codebooks are fitted on the calibration part of the built-in documentation and evaluated on its
evaluation part, topics that they never saw, and on a domain that they never saw, the source code of
the standard library, as 2 and as 4 ranks. Writes accuracy.json; minutes a codebook.
"""

import argparse
import itertools
import sys

import torch

from astra_runtime import Codebook
from astra_runtime.cli.common import fit_builtin, quiet_transformers, say
from astra_runtime.evaluate import measure
from astra_runtime.fit import as_windows
from astra_runtime.store import DOMAINS, builtin_text, load_model, load_tokenizer, token_windows
from bench._report import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    codes = ["kv:1", "kv:3", "kv:12", "hidden:1", "hidden:8", "none:int8"]
    parser.add_argument("--codes", nargs="+", default=codes, help="SPACE:GROUPS, or none:DTYPE")
    parser.add_argument("--windows", type=int, default=4, help="evaluation windows of 1024 tokens")
    parser.add_argument("--domain", nargs="+", choices=DOMAINS, default=["documentation"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], help="world sizes")
    parser.add_argument("--output", default="accuracy", help="name of the result (accuracy)")
    options = parser.parse_args()
    quiet_transformers()
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    windows = {
        domain: as_windows(token_windows(tokenizer, builtin_text(domain)[1], 1024, options.windows))
        for domain in options.domain
    }
    rows = []
    for name in options.codes:
        space, choice = name.split(":")
        if space == "none":
            book = Codebook.none(choice)
        else:
            book = fit_builtin(model, tokenizer, space=space, groups=int(choice), held_back=0)
        for domain, world_size in itertools.product(options.domain, options.ranks):
            found = measure(model, book, windows[domain], world_size=world_size)
            row = {
                "codes": name,
                "domain": domain,
                "world_size": world_size,
                "windows": len(windows[domain]),
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
            options.output,
            [],
            command=" ".join(["python -m bench.accuracy", *sys.argv[1:]]),
            packages=("torch", "numpy", "transformers"),
            extra={"rows": rows, "threads": torch.get_num_threads()},
        )


if __name__ == "__main__":
    main()
