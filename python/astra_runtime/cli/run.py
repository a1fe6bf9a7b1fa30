"""`astra run`: continue a prompt."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..console import say, show_json, working
from ..errors import AstraError
from .cluster import cluster, traced, write_trace
from .common import load
from .fitting import codebook_at_hand, ensure_codebook
from .options import (
    DENSE,
    add_fit_options,
    add_mesh_options,
    add_missing,
    add_model,
    add_trace,
    check_keys,
    check_own_keys,
    check_text,
    check_trace,
    connect_options,
    engine_options,
    model_name,
    peers_of,
    positive,
    settle_threads,
    sharing,
)
from .streaming import Streaming, add_sampling, sampling_of
from .waiting import Waiting


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        '  astra run --world-size 2 --prompt "What is the capital of France?"\n'
        "  torchrun --nproc-per-node 2 -m astra_runtime run --prompt TEXT\n"
        "  astra run --rank 0 --peers 10.0.0.1:7000,10.0.0.2:7000 --keys rank-0/ --codebook DIR "
        "--prompt TEXT\n"
        "      (the other devices run `astra worker`; `astra keys init` makes the keys)"
    )
    add_model(parser)
    add_fit_options(parser)
    add_mesh_options(parser)
    add_missing(parser)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--prompt", help="the text to continue; -: what standard input has")
    where.add_argument(
        "--text", metavar="FILE", help="a file with the text to continue; -: standard input"
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="take the prompt as it stands, also where the model has a chat template",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=40, help="of the answer (default: 40)"
    )
    parser.add_argument(
        "--space",
        choices=("codes", "none", "drop"),
        default="codes",
        help="what to send: the codebook's codes, dense tensors, or nothing (default: codes)",
    )
    parser.add_argument("--world-size", type=positive, help="processes on this machine")
    parser.add_argument("--rank", type=int, help="with --peers: 0, the leader")
    parser.add_argument("--peers", help="host:port of every rank, by rank")
    parser.add_argument(
        "--backend",
        choices=("tcp", "gloo"),
        default="tcp",
        help="under torchrun: what carries the frames; gloo is not encrypted (default: tcp)",
    )
    add_sampling(parser)
    add_trace(parser)


@dataclass(frozen=True)
class Place:
    """This process among the ranks, and who started the others.

    Attributes:
        peers: "host:port" of every rank, where the others are `astra worker`s of other devices.
        torchrun: it started all ranks alike. Where it did not and there are no `peers`, this
            process starts the others itself.
    """

    rank: int
    world_size: int
    peers: list[str] | None = None
    torchrun: bool = False

    @property
    def local(self) -> bool:
        return self.peers is None and not self.torchrun

    @property
    def on_this_machine(self) -> int:
        """How many ranks share this machine's cores."""
        if self.torchrun:
            return int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        return self.world_size if self.peers is None else sharing(self.peers, self.rank)


def place_of(options: argparse.Namespace) -> Place:
    """Where the options and torchrun's variables place this process; refuses contradictions."""
    from ..transport.addresses import require_loopback
    from ..transport.rendezvous import from_environment, own_host

    if options.peers is not None:
        peers = peers_of(options)
        if options.rank != 0:
            raise AstraError(
                "--rank: expected 0 with --peers; the other devices run `astra worker`"
            )
        if options.world_size not in (None, len(peers)):
            raise AstraError(
                f"--world-size: expected {len(peers)}, the addresses of --peers, or none, "
                f"got {options.world_size}"
            )
        place = Place(0, len(peers), peers)
        check_keys(options, peers)
    elif options.rank is not None:
        raise AstraError("--rank: expected together with --peers")
    elif (started := from_environment()) is None:
        place = Place(0, options.world_size or 1)
    elif options.world_size is not None:
        raise AstraError("--world-size: torchrun has said how many ranks there are; leave it out")
    elif options.trace:
        raise AstraError("--trace: not under torchrun, where no rank leads the others")
    else:
        place = Place(*started, torchrun=True)
    if options.backend != "tcp" and options.transport != "tcp":
        raise AstraError(f"--backend {options.backend}: expected without --transport datagram")
    if options.backend != "tcp" and not place.torchrun:
        raise AstraError(f"--backend {options.backend}: expected under torchrun only")
    if options.backend != "tcp" and options.on_missing == "degrade":
        raise AstraError(f"--backend {options.backend}: expected without --on-missing degrade")
    if place.peers is None:
        asked = connect_options(
            options, place.rank, place.world_size, None, backend=_backend(options)
        )
        if options.backend != "tcp":
            asked.require_loopback_in_plaintext()
        elif place.torchrun and place.world_size > 1 and asked.find_keys() is None:
            require_loopback([asked.host or own_host()])
        check_local_keys(options, place)
    return place


def _backend(options: argparse.Namespace) -> str:
    return options.backend if options.transport == "tcp" else options.transport


def check_local_keys(options: argparse.Namespace, place: Place) -> None:
    """Refuses keys that this machine's ranks could not use, before a model is loaded."""
    ranks = [place.rank] if place.torchrun else range(place.world_size)
    if options.backend == "tcp" and (options.keys or place.torchrun) and place.world_size > 1:
        check_own_keys(options, ranks, place.world_size)


def run(options: argparse.Namespace) -> int:
    prompt = prompt_of(options)
    place = place_of(options)
    settings = engine_options(options, place.world_size)
    sampling = sampling_of(options)
    check_trace(options)
    settle_threads(options, place.on_this_machine)
    with contextlib.ExitStack() as stack:
        others = None
        if place.local:
            others = stack.enter_context(cluster(options, place.world_size, settings))
            if options.space != "codes":
                others.start(DENSE)
            elif codebook_at_hand(options):
                others.start(options.codebook)
        import torch  # which takes seconds, while the other ranks load too

        from ..serve.sampling import sampling_to_json

        torch.set_num_threads(options.threads)
        model, tokenizer = load(options, decoder=True)
        ids = encode_prompt(options, tokenizer, prompt, speak=place.rank == 0)
        check_prompt(ids.shape[1], place.world_size)
        check_length(model, ids.shape[1], options.max_new_tokens)
        if options.codebook is None and (others is None or others.workers is None):
            _without_codes(options, place, ids.shape[1], settings)
        elif options.space != "codes":
            options.codebook = DENSE
        codebook, folder = ensure_codebook(options, model, tokenizer)
        torch.set_num_threads(options.threads)  # fitting used every core
        if others is not None:
            ranks = stack.enter_context(others.ranks(model, codebook, folder))
        else:
            ranks = stack.enter_context(connected(options, place, model, codebook, settings))
        job = {
            "do": "generate",
            "input_ids": ids.tolist(),
            "space": options.space,
            "max_new_tokens": options.max_new_tokens,
            "sampling": sampling_to_json(sampling) if sampling.temperature else None,
        }
        _answer(options, place, ranks, tokenizer, codebook, job)
    return 0


def _answer(
    options: argparse.Namespace,
    place: Place,
    ranks: Any,
    tokenizer: Any,
    codebook: Any,
    job: dict[str, Any],
) -> None:
    """Has the ranks continue the prompt, and shows what they give, as it comes."""
    from ..models import adapt

    streaming = None
    if place.rank == 0 and not options.json:
        streaming = Streaming(tokenizer, len(adapt(ranks.model).blocks))
        ranks.on_block, ranks.on_token = streaming.on_block, streaming.on_token
    try:
        with working("computing the answer") if place.rank == 0 else contextlib.nullcontext():
            if place.torchrun:
                answer = ranks.run(job)
            else:
                answer = traced(options, ranks, lambda: ranks.submit(**job))
    finally:
        if streaming is not None:
            streaming.end_progress()
    if streaming is not None:
        streaming.finish()
    if place.rank == 0:
        report(options, tokenizer, answer, place.world_size)
        say_exactness(options, codebook, answer)
    if not place.torchrun:
        write_trace(options, ranks)


def prompt_of(options: argparse.Namespace) -> str:
    """The text of --prompt or --text, judged before a model is loaded."""
    if options.text is not None or options.prompt == "-":
        from ..texts import read_text

        text = read_text("/dev/stdin" if options.text in (None, "-") else options.text)
    else:
        text = check_text("--prompt", str(options.prompt))
    if not text:
        raise AstraError("prompt: expected at least one token, got an empty text")
    return text


def encode_prompt(options: argparse.Namespace, tokenizer: Any, prompt: str, *, speak: bool) -> Any:
    """Token ids [1, T], with the model's chat template around the prompt if it has one."""
    if options.raw or not getattr(tokenizer, "chat_template", None):
        return tokenizer(prompt, return_tensors="pt", verbose=False).input_ids
    if speak:
        say("the prompt is put into the model's chat template (--raw: taken as it stands)")
    import torch

    from ..store import encode_messages

    # the line break that ends a file, or a pipe's last line, is no part of a question
    asked = {"role": "user", "content": prompt.removesuffix("\n")}
    try:
        return torch.tensor([encode_messages(tokenizer, [asked])])
    except AstraError as error:
        raise AstraError(f"{error}; --raw takes the prompt as it stands") from error


def check_length(model: Any, tokens: int, new_tokens: int) -> None:
    """Refuses what the engine would refuse on every rank, before any other rank is asked."""
    from ..store import token_limit

    limit = token_limit(model)
    if limit is not None and tokens > limit:
        raise AstraError(
            f"prompt: expected at most {limit} tokens, the model's limit, got {tokens}"
        )
    if limit is not None and tokens + new_tokens - 1 > limit:
        raise AstraError(
            f"--max-new-tokens: expected at most {limit - tokens + 1} after a prompt of {tokens} "
            f"tokens, as the model's limit is {limit}, got {new_tokens}"
        )


def check_prompt(tokens: int, world_size: int) -> None:
    """Before any process starts: every rank needs a token."""
    if tokens == 0:
        raise AstraError("prompt: expected at least one token, got an empty text")
    if tokens < world_size:
        raise AstraError(
            f"the prompt has {tokens} tokens for {world_size} ranks: expected at least one token "
            "a rank; give a longer prompt or a smaller --world-size"
        )


def _without_codes(
    options: argparse.Namespace, place: Place, tokens: int, settings: dict[str, Any]
) -> None:
    """Spares a fit where no codes are wanted, or none would be sent of so short a prompt."""
    from ..costs import EXACT_TOKENS

    if options.space != "codes" or place.world_size == 1:
        options.codebook = DENSE
    elif place.local and settings["halo"] is None and tokens <= EXACT_TOKENS:
        options.codebook, settings["halo"] = DENSE, tokens


@contextlib.contextmanager
def connected(
    options: argparse.Namespace, place: Place, model: Any, codebook: Any, settings: dict[str, Any]
) -> Iterator[Any]:
    """This rank's `Ranks` in a mesh that others started too.

    Under torchrun every rank was started alike and knows the job; else rank 0 sends it.
    """
    from ..deploy.jobs import Ranks

    with _open_mesh(options, place) as mesh:
        ranks = Ranks(model, codebook, mesh, **settings)
        yield ranks
        if not place.torchrun:
            ranks.submit(do="stop")
        ranks.close()


def _open_mesh(options: argparse.Namespace, place: Place) -> Any:
    """The mesh of `place`; rank 0 says for whom it waits."""
    from ..transport import open_mesh

    changes: dict[str, Any] = {"backend": _backend(options)}
    others: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if place.peers is not None:
        say(f"rank 0 of {place.world_size} waits for the others at {place.peers[0]}")
        changes["on_wait"] = Waiting(0, place.peers)
    elif place.rank == 0:
        others = working("rank 0 waits for the ranks that torchrun starts")
    with others:
        return open_mesh(
            connect_options(options, place.rank, place.world_size, place.peers, **changes)
        )


def report(options: argparse.Namespace, tokenizer: Any, answer: Any, world_size: int) -> None:
    """Figures on stderr, behind the text; or all as one JSON object."""
    times = answer["times"]
    each = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
    if options.json:
        show_json(
            {
                "text": tokenizer.decode(answer["ids"][0], skip_special_tokens=True),
                "world_size": world_size,
                "seconds_to_first_token": times[0],
                "seconds_per_token": each,
                "bits_per_token_block": answer["bits_per_token_block"],
                "degraded": answer["degraded"],
                "missing": {str(rank): blocks for rank, blocks in answer["missing"].items()},
                "dtype": options.dtype,
                **answer["devices"],
            }
        )
        return
    if answer["degraded"]:
        say(f"WARNING: a degraded answer, without {without(answer['missing'])}")
    pace = "" if each is None else f", then {each:.3f} s a token"
    say(
        f"{world_size} rank{'s' if world_size > 1 else ''}, "
        f"{answer['bits_per_token_block']:.0f} bits a token and block: first token after "
        f"{times[0]:.2f} s{pace} ({model_name(options)})"
    )
    devices = answer["devices"]
    say(
        f"threads by rank: {listed(devices['threads'])}; weights in {options.dtype}: "
        f"{listed(devices['weight_bytes'], 2**20)} MiB; most memory: "
        f"{listed(devices['peak_bytes'], 2**20)} MiB"
    )


def listed(by_rank: dict[str, int], unit: int = 1) -> str:
    """Figures of the ranks, one where all are alike."""
    figures = [str(round(value / unit)) for value in by_rank.values()]
    return figures[0] if len({*figures}) == 1 else ", ".join(figures)


def say_exactness(options: argparse.Namespace, codebook: Any, answer: Any) -> None:
    """Says when the answer is not what one device would give."""
    from ..codes.local_only import LocalOnly

    local_only = options.space == LocalOnly.key
    if not answer["bits_per_token_block"] and not local_only:
        return
    if local_only:
        say("the ranks computed without each other's tokens (--space drop)")
    elif options.space == "codes" and codebook.coded:
        say(
            "the answer rests on codes: ranks read each other's tokens as codewords, so it may "
            "differ from one device's (--space none: exact)"
        )


def without(missing: dict[int, list[int]]) -> str:
    """Whose tokens were left out where, in words."""
    parts = []
    for rank, blocks in missing.items():
        starts = [i for i in range(len(blocks)) if i == 0 or blocks[i] != blocks[i - 1] + 1]
        runs = [blocks[a:b] for a, b in zip(starts, [*starts[1:], len(blocks)], strict=True)]
        ranges = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)
        parts.append(f"rank {rank} in block{'s' if len(blocks) > 1 else ''} {ranges}")
    return "; ".join(parts)
