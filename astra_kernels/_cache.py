"""Where files are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$ASTRA_CACHE`, or `astra` in the user's cache folder; an empty variable counts as none.

    Raises OSError where the user has no home, as users of containers often have none.
    """
    root = os.environ.get("ASTRA_CACHE")
    try:
        if root:
            return Path(root).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "astra"
    except RuntimeError as error:
        raise OSError(f"cache: expected a folder in ASTRA_CACHE, as here: {error}") from error
