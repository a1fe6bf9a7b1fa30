"""`astra serve`: an OpenAI-compatible service on several processes or devices."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..console import say, show_json
from ..errors import AstraError
from ..limits import configured_limit
from .common import end_at_once, quiet_transformers
from .leading import LedRanks, start, started_early
from .options import (
    DEFAULT_MODEL,
    add_fit_options,
    add_leader,
    add_mesh_options,
    add_missing,
    add_model,
    add_ranks,
    group,
    host,
    model_name,
    not_negative,
    positive,
    seconds,
)

NO_LIMIT = 1 << 30
END_SECONDS = 2.0  # for what loads a service to notice that it is to end


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  astra serve --world-size 2 --port 8000\n"
        "  astra serve --rank 0 --peers 10.0.0.1:7000,10.0.0.2:7000 --keys rank-0/ --codebook DIR "
        "--host 0.0.0.0 --api-key-file KEY\n"
        "      (the other devices run `astra worker`; `astra keys init` makes the keys)"
    )
    add_model(parser)
    add_fit_options(parser)
    add_ranks(parser, "processes on this machine (default: 1)")
    add_mesh_options(parser)
    add_missing(parser)
    add_leader(parser)
    _add_http(parser)
    _add_limits(parser)


def _add_http(parser: argparse.ArgumentParser) -> None:
    http = group(parser, "the HTTP server")
    http.add_argument(
        "--host", type=host, default="127.0.0.1", help="address to listen at (default: %(default)s)"
    )
    http.add_argument(
        "--port", type=not_negative, default=8000, help="0: any free one (default: %(default)s)"
    )
    keys = http.add_mutually_exclusive_group()
    keys.add_argument(
        "--api-key",
        metavar="KEY",
        help="what clients have to send; beyond loopback there has to be one",
    )
    keys.add_argument(
        "--api-key-file", metavar="FILE", help="a key a line (default: ASTRA_API_KEY, if set)"
    )
    http.add_argument(
        "--served-name", metavar="NAME", help="the name clients ask for (default: the model's)"
    )
    http.add_argument("--tls-cert", metavar="FILE", help="PEM: serve https")
    http.add_argument("--tls-key", metavar="FILE", help="PEM: its key, if in another file")
    http.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web page's origin that may ask",
    )
    http.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="HOST",
        help="a further name of this server",
    )
    http.add_argument("--trace", metavar="FOLDER", help="write a timeline of each request")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="the most a request may ask for (default: as it fits)",
    )
    parser.add_argument(
        "--request-timeout",
        type=seconds,
        metavar="S",
        help="seconds an answer may take (default: no limit)",
    )
    parser.add_argument(
        "--drain",
        type=seconds,
        default=10.0,
        metavar="S",
        help="seconds that answers have to end when the service ends (default: 10)",
    )


def run(options: argparse.Namespace) -> int:
    import logging

    from ..serve.http import HttpOptions, read_api_keys
    from ..serve.http.listening import open_listeners, tls_context
    from ..serve.http.server_state import make_folder

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.port > 0xFFFF:
        raise AstraError(f"--port: expected 0 to {0xFFFF}, got {options.port}")
    keys = read_api_keys(options.api_key, options.api_key_file)
    http = HttpOptions(
        host=options.host,
        api_keys=keys,
        insecure=options.insecure,
        allowed_hosts=tuple(options.allowed_host),
        cors_origins=tuple(options.cors_origin),
        max_new_tokens=options.max_new_tokens,
        request_timeout_s=options.request_timeout,
        trace_folder=None if options.trace is None else Path(options.trace),
        degrade=options.on_missing == "degrade",
    )
    if http.trace_folder is not None:
        make_folder(http.trace_folder)
    tls_context(options.tls_cert, options.tls_key)
    led = LedRanks.of(options)
    with contextlib.ExitStack() as stack:
        listeners = [
            stack.enter_context(listener) for listener in open_listeners(options.host, options.port)
        ]
        others = stack.enter_context(started_early(options, led))
        _serve(options, led, others, http, listeners)
    if gc.get_freeze_count():
        # it was not collected meanwhile, and libraries would report it as leaked
        end_at_once(0)
    return 0


def _serve(
    options: argparse.Namespace,
    led: LedRanks,
    others: Any,
    http: Any,
    listeners: Sequence[socket.socket],
) -> None:
    """Listens, and answers 503 until the service has started, until a signal ends it."""
    from ..serve.http import make_app, run_server
    from ..serve.http.access import is_loopback
    from ..serve.running import RunningService, Started

    kind, limit = about_model(options.model)
    name = options.served_name or model_name(options)
    stopped = threading.Event()

    def begin(service: Any) -> Started:
        started = start(options, led, service, others)
        gc.freeze()  # what is loaded stays: no collection has to look through it again
        return started

    service = RunningService(name, kind, limit, begin, led.addresses)
    app = make_app(service, http)

    def listening(url: str) -> None:
        say(f"listening at {url}, loading {options.model}")
        if not (is_loopback(options.host) or options.tls_cert):
            say("WARNING: keys and texts cross the network in plaintext (--tls-cert, or a proxy)")
        threading.Thread(target=_tell, args=(service, app, url, stopped), daemon=True).start()

    try:
        run_server(
            app,
            options.host,
            options.port,
            certfile=options.tls_cert,
            keyfile=options.tls_key,
            drain_s=options.drain,
            listeners=listeners,
            on_listening=listening,
        )
    finally:
        stopped.set()
        failed = service.failed  # by itself; what is closed while it loads fails, too
        loaded = service.loading_ends(END_SECONDS)
        if loaded:
            service.close(options.drain)
    if options.json:
        show_json({"model": name, "world_size": len(led.addresses)})
    if isinstance(failed, ModuleNotFoundError):
        raise failed  # the extra that brings it is named
    if failed is not None:
        raise AstraError(f"the service could not be started: {failed}")
    if not loaded:
        say(f"ended while it was loading {options.model}")
        raise SystemExit(0)


def _tell(service: Any, app: Any, url: str, stopped: threading.Event) -> None:
    """Says when the service is ready, and why where it is not; ends it where it never will be."""
    last = ""
    while not stopped.wait(0.1):
        if service.failed is not None:
            app.state.stop()
            return
        status = service.status()
        line = f"ready at {url}" if status.ready else status.reason
        if line != last:
            say(line)
            last = line


def about_model(name: str) -> tuple[Any, int]:
    """What a model is for, and how many tokens it reads, from its configuration alone.

    A GGUF file that is still to be converted continues texts; its limit is known once it is loaded.
    """
    config = _configuration(name)
    if config is None:
        return "decoder", NO_LIMIT
    made = (config.get("architectures") or [""])[0]
    if made.endswith(("ForCausalLM", "LMHeadModel")):
        kind = "decoder"
    else:
        kind = "vision" if "image_size" in config else "encoder"
    limit = configured_limit(SimpleNamespace(**config))
    return kind, NO_LIMIT if limit is None else limit


def _configuration(name: str) -> dict[str, Any] | None:
    """A model's config.json; torch and transformers are imported only where it has to be found.
    None: it is made when the model is loaded."""
    from ..core import cache_folder

    for folder in (Path(name).expanduser(), cache_folder() / "models" / name):
        if (folder / "config.json").is_file():
            return _read(folder / "config.json")
    if name == DEFAULT_MODEL or name.endswith(".gguf"):
        return None
    from ..store import ModelNotFound, model_folder

    quiet_transformers()
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            model_folder(name), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"model {name!r} is not here: {str(error).splitlines()[0]}") from error
    return dict(config.to_dict())


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise AstraError(f"model: expected a JSON object in {file}: {error}") from error
