"""A pytest plugin for runs that may be ended at any time: failures are reported as they happen.

    python -m pytest -p bench.gpu.pytest_log [--every N]

Only pytest's last lines have the tracebacks otherwise, and a run that is killed has no last lines.
"""

from __future__ import annotations

import pytest

LONGEST = 4000  # characters of a traceback, from its end


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="run each N-th test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    dropped = [item for place, item in enumerate(items) if place % config.getoption("--every")]
    if dropped:
        kept = set(items) - set(dropped)
        items[:] = [item for item in items if item in kept]
        config.hook.pytest_deselected(items=dropped)


class Log:
    """Writes failures to pytest's own output, where they stand among the tests' names."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            text = report.longreprtext[-LONGEST:]
            terminal = self.config.pluginmanager.getplugin("terminalreporter")
            terminal.write(f"\n---- {report.nodeid} ({report.when})\n{text}\n----\n", flush=True)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # reports of workers come to the main process
        config.pluginmanager.register(Log(config), "astra-log")
