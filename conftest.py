"""How all tests run, and where those of the Triton kernels do."""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# Both are read at imports, which another conftest.py may make before pytest_configure is called.
# Tests fork this process, and a fork has none of the threads of an OpenMP pool: it would wait for
# them forever.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Formulas are fp32's: what may be rounded is not, but where a test says so.
os.environ["ASTRA_ROUND"] = "0"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where tests/triton_kernels run: in Triton's interpreter, or compiled, on a GPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    # a shell starts what is to run in the background, or without a terminal, deaf to these two,
    # and every process of a test would be so as well
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
    # the same examples each time, however long a busy machine takes for one
    slow = [HealthCheck.too_slow]
    settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=slow)
    settings.load_profile("same")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")
