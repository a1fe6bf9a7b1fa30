"""The command `astra`: one module a subcommand, each with `configure` and `run`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    "demo": "the whole idea in one table: one device, dense exchange and ASTRA on a slow link",
    "fit": "learn codebooks for a model",
    "finetune": "adapt a model and its codebook to each other",
    "eval": "what the codes cost in accuracy, beside exact and local-only",
    "run": "continue a prompt on several processes or devices",
    "chat": "a conversation on several processes or devices",
    "serve": "answer over HTTP, as OpenAI's interface does, on several processes or devices",
    "worker": "be one rank of a run that rank 0 leads",
    "plan": "how quick a model will be on N devices, and what to choose",
    "keys": "make the keys with which devices recognize each other",
    "bench": "the benchmarks of a checkout",
    "doctor": "what this machine has, and whether it works",
}

# Packages that the base installation lacks, and the extra that brings each.
EXTRAS = {
    "PIL": "serve",
    "accelerate": "models",
    "cryptography": "security",
    "gguf": "models",
    "matplotlib": "plots",
    "prometheus_client": "serve",
    "starlette": "serve",
    "tqdm": "models",
    "transformers": "models",
    "triton": "gpu",
    "uvicorn": "serve",
    "zmq": "bench",
}

MAY_BE_EMPTY = ("arguments", "prompt", "system")  # of a benchmark; their commands say more


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser; only the chosen command's module is imported, so that help is quick."""
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog="astra",
        description="One Transformer answers faster on several devices than on one.",
    )
    parser.add_argument("--version", action="version", version=f"astra {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == chosen:
            importlib.import_module(f".{name}", __package__).configure(sub)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 0, 1 after an error, 2 for bad usage, 130 for Ctrl-C and
    128 + n for any other signal n."""
    _open_standard_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # no answer is lost to what a terminal cannot show
    options = _parser(given[0] if given else None).parse_args(given)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(ending, lambda number, _: sys.exit(128 + number))  # `finally` runs
    from ..steady import keep_memory

    keep_memory()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here ever downloads
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from ..console import ReaderLeft, say
    from ..errors import AstraError

    try:
        _check_current_folder()
        command = importlib.import_module(f".{options.command}", __package__)
        _check_values(options)
        _check_codebook(options)
        status = int(command.run(options) or 0)
        sys.stdout.flush()
        return status
    except (KeyboardInterrupt, SystemExit) as ended:
        if isinstance(ended, KeyboardInterrupt):
            say("astra: interrupted")
            _leave(130)
        _leave(ended.code if isinstance(ended.code, int) else 1)
    except Exception as error:
        # the cause: of a function that is handed an answer's tokens
        if isinstance(error, BrokenPipeError) or isinstance(error.__cause__, ReaderLeft):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the reader of our output has left
            return 1
        if os.environ.get("ASTRA_DEBUG"):
            raise
        expected = isinstance(error, AstraError | ValueError | OSError | ModuleNotFoundError)
        what = str(error) if expected else f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError):
            what = _without(error, options.command)
        elif what.startswith("codebook: made for another model"):
            what += _default_model(options)
        where = "" if expected else " (ASTRA_DEBUG=1 shows where)"
        say(f"astra: error: {what}{where}")
        _drop_unwritable_output()
        return 1


def _open_standard_streams() -> None:
    """Opens those of 0, 1 and 2 that are closed, to nothing: else the next file or socket would get
    the number, and `print` would put on stdout what is for stderr."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _drop_unwritable_output() -> None:
    """Forgets what is left for a stdout that takes nothing, a full disk for example: Python would
    try it again at the end, and end with a status of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _check_current_folder() -> None:
    """Libraries that the commands load look into it, and end the process where it is gone."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise OSError("the current folder has been removed: change to another one") from None


def _check_values(options: argparse.Namespace) -> None:
    """Refuses empty values, which variables of a shell leave that are not set."""
    for name, value in vars(options).items():
        values = value if isinstance(value, list) else [value]
        if "" in values and name not in MAY_BE_EMPTY:
            option = "DIR" if name == "folder" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: expected a value, got an empty text")


def _check_codebook(options: argparse.Namespace) -> None:
    """Refuses a folder without a codebook before a model is loaded; `plan` looks at several."""
    from ..files import check_codebook_folder
    from .options import DENSE

    folder = getattr(options, "codebook", None)
    if isinstance(folder, str) and folder != DENSE:
        check_codebook_folder(folder)


def _default_model(options: argparse.Namespace) -> str:
    """Says which model was taken where the command line may not have named any."""
    from .options import DEFAULT_MODEL

    taken = getattr(options, "model", None) == DEFAULT_MODEL
    return f" (--model is {DEFAULT_MODEL} unless another is given)" if taken else ""


def _without(error: ModuleNotFoundError, command: str) -> str:
    """Which package a command lacks, and how to install it."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return str(error)
    return (
        f"astra {command} needs the package {package}, which is not installed: "
        f'pip install "astra-inference[{EXTRAS[package]}]"'
    )


def _leave(status: int) -> NoReturn:
    """Ends the process now: threads that are inside torch cannot be asked to."""
    _drop_unwritable_output()
    with contextlib.suppress(OSError):  # nobody reads it
        sys.stderr.flush()
    if threading.active_count() > 1:
        os._exit(status)
    sys.exit(status)
