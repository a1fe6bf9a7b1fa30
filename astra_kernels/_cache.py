"""Where files are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$ASTRA_CACHE`, or `astra` in the user's cache folder."""
    root = os.environ.get("ASTRA_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "astra"
