"""A result that grows row by row: what earlier runs measured stays and is not measured again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .machine import cores
from .markdown import load
from .results import commit, write

Row = dict[str, Any]


class Rows:
    """The rows of a result file, written after each one, so that a run may be interrupted.

    A file's rows may come from several runs, so each names its own: "run" has the command and the
    commit that it was measured with, "computed" those of what was computed again later.

    Args:
        name: of the result.
        command: that the file and its new rows name.
        packages: whose versions the file names.
        extra: further top-level keys of the file.
        say: told each new row, as JSON without its "losses".

    Example:
        >>> rows = Rows("accuracy_lm", command="python -m bench.accuracy", say=print)
        >>> row = rows.measured({"codes": "kv:3"}, lambda: {"perplexity": 12.6})
        {"codes": "kv:3", "perplexity": 12.6}
    """

    def __init__(
        self,
        name: str,
        *,
        command: str,
        packages: Sequence[str] = ("torch", "numpy", "transformers"),
        extra: Mapping[str, Any] | None = None,
        say: Callable[[str], None],
    ) -> None:
        self.name, self.command, self.packages = name, command, packages
        self.extra, self.say = dict(extra or {}), say
        self.run = {"command": command.strip(), "commit": commit()}
        self.rows: list[Row] = (load(f"cpu-{cores()}core/{name}") or {"rows": []})["rows"]

    def find(self, place: Mapping[str, Any]) -> Row | None:
        """The first row that has what `place` says."""
        return next((row for row in self.rows if place.items() <= row.items()), None)

    def measured(self, place: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> Row:
        """The row at `place`; if there is none, a new one of it and of what `measure` returns."""
        row = self.find(place)
        if row is None:
            row = {**place, **measure()}
            self.say(json.dumps({k: v for k, v in row.items() if k != "losses"}))
            self.rows.append(row | {"run": self.run})
            row = self.rows[-1]
            self._write()
        return row

    def change(self, row: Row, values: Mapping[str, Any]) -> None:
        """Gives a row that is there other values, of what is computed and not measured."""
        row |= {**values, "computed": self.run}
        self._write()

    def _write(self) -> None:
        write(
            self.name,
            [],
            command=self.command,
            packages=self.packages,
            extra={"rows": self.rows, **self.extra},
        )
