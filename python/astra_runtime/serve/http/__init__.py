"""An OpenAI-compatible HTTP server in front of a `Service`, and a page to look at it.

    app = make_app(service, HttpOptions(api_keys=("secret",)))
    run_server(app, "127.0.0.1", 8000)

Needs the extra `serve`; nothing else of the package imports this one.
"""

from .access import check_exposure, read_api_keys
from .app import make_app
from .options import HttpOptions
from .server import run_server

__all__ = ["HttpOptions", "check_exposure", "make_app", "read_api_keys", "run_server"]
