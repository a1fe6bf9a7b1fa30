"""`astra keys`: who may join a run."""

from __future__ import annotations

import argparse
import datetime
from typing import Any

from ..console import say, show_json
from .options import positive

_INIT = (
    "examples:\n"
    "  astra keys init --ranks 4\n"
    "  astra keys init --ranks 2 --output keys/ --hosts 10.0.0.1,10.0.0.2 --days 90\n"
    "then copy keys/rank-R, and nothing else, to the device of rank R:\n"
    "  astra worker --rank 1 --peers 10.0.0.1:7000,10.0.0.2:7000 --keys rank-1/"
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "examples:\n  astra keys init --ranks 4\n  astra keys show keys/"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    init = actions.add_parser(
        "init",
        help="make a private authority and a certificate for each rank",
        description="Make a private authority and a certificate for each rank.",
        epilog=_INIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    init.add_argument("--ranks", type=positive, required=True, help="how many devices there are")
    init.add_argument(
        "--output", metavar="DIR", default="keys", help="a new folder (default: %(default)s)"
    )
    init.add_argument(
        "--hosts",
        metavar="H,H,…",
        help="bind each rank to an address as well, written as in --peers, without ports",
    )
    init.add_argument(
        "--days", type=positive, default=365, help="until the keys expire (default: %(default)s)"
    )
    show = actions.add_parser(
        "show",
        help="the ranks in a folder of keys, and when they expire",
        description="The ranks in a folder of keys, when they expire, and which are not valid now.",
        epilog="example:\n  astra keys show keys/ --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument("folder", metavar="DIR")
    for action in (init, show):
        action.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(options: argparse.Namespace) -> int:
    return _init(options) if options.action == "init" else _show(options)


def _init(options: argparse.Namespace) -> int:
    from ..transport.certificates import AUTHORITY_KEY, make_keys

    hosts = None if options.hosts is None else options.hosts.split(",")
    made = make_keys(options.output, options.ranks, hosts=hosts, days=options.days)
    folders = [str(made.folder / f"rank-{rank}") for rank in range(made.ranks)]
    authority = made.folder / AUTHORITY_KEY
    if options.json:
        show_json(
            {
                "folder": str(made.folder),
                "ranks": made.ranks,
                "expires": made.expires.isoformat(),
                "authority_key": str(authority),
                "folders": folders,
            }
        )
        return 0
    for folder in folders:
        print(folder)
    say(
        f"keys of {made.ranks} ranks, valid until {made.expires:%Y-%m-%d}. Copy each folder to "
        f"its device alone, and name it there with --keys. {authority} belongs on none of them: "
        "whoever has it can make members."
    )
    return 0


def _show(options: argparse.Namespace) -> int:
    from ..transport.certificates import show_keys

    shown = show_keys(options.folder)
    now = datetime.datetime.now(datetime.UTC)
    problems = [one.why_invalid(now) or _damage(options.folder, one.rank) for one in shown]
    if options.json:
        ranks: list[dict[str, Any]] = [
            {
                "rank": one.rank,
                "expires": one.expires.isoformat(),
                "valid": not problem,
                "problem": problem or None,
                "hosts": list(one.hosts),
                "serial": one.serial,
            }
            for one, problem in zip(shown, problems, strict=True)
        ]
        show_json({"folder": options.folder, "ranks": ranks})
        return 0
    for one, problem in zip(shown, problems, strict=True):
        bound = f", at {' '.join(one.hosts)} only" if one.hosts else ""
        mark = f": {problem}" if problem else ""
        print(f"rank {one.rank:<5} until {one.expires:%Y-%m-%d %H:%M} UTC{bound}{mark}")
    return 0


def _damage(folder: str, rank: int) -> str:
    """Why the keys of a rank could not be used, whatever their dates; "": they could."""
    from ..transport.credentials import Keys, KeysError

    try:
        Keys(folder).contexts(rank)
    except KeysError as error:
        return str(error)
    return ""
