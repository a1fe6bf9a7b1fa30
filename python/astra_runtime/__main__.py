"""`python -m astra_runtime` is the command `astra`."""

from .cli import main

raise SystemExit(main())
