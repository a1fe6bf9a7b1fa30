"""What works without the extras, and without waiting for torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from astra_runtime.cli import COMMANDS, EXTRAS

HIDDEN = """
import sys
hidden = set(sys.argv[1].split(","))

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from astra_runtime.cli import main
"""
EVERY_COMMAND = """
for command in {commands}:
    print(command[0], flush=True)
    assert main(command) == 1
    assert "transformers" not in sys.modules
"""
HELP = """
for command in {commands}:
    try:
        main([command, "--help"])
    except SystemExit as ended:
        assert ended.code == 0
"""


def python(code: str, *hidden: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN + code, ",".join(hidden)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_transport_and_every_help_do_without_torch() -> None:
    commands = [name for name in COMMANDS if name != "bench"]
    python("import astra_runtime.transport\n" + HELP.format(commands=commands), "torch")


def test_torch_finds_the_core_that_was_loaded_without_it() -> None:
    python(
        "from astra_runtime.core import _C\n"
        "assert 'torch' not in sys.modules\n"
        "import astra_kernels\n"
        "assert astra_kernels._C is _C\n"
    )


def test_commands_name_the_extra_that_they_lack(tmp_path: pytest.TempPathFactory) -> None:
    commands = [
        ["demo"],
        ["fit", "--output", str(tmp_path)],
        ["finetune", "--control", "exact", "--output", str(tmp_path)],
        ["eval"],
        ["run", "--prompt", "x"],
        ["worker", "--rank", "1", "--peers", "127.0.0.1:1,127.0.0.1:2"],
        ["plan"],
    ]
    done = python(EVERY_COMMAND.format(commands=commands), "transformers", "gguf", "tqdm")
    said = done.stderr.strip().splitlines()
    needs = [line for line in said if 'pip install "astra-inference[models]"' in line]
    assert [line.split()[3] for line in needs] == [command[0] for command in commands], said


def test_the_doctor_names_the_extra_that_a_model_needs() -> None:
    code = (
        "from astra_runtime.cli import doctor\n"
        "doctor._is_installed = lambda package: package not in hidden\n"
        "print(doctor._check_packages())\n"
        "import astra_runtime.store as store\n"
        "store.at_hand = lambda name: 'a.gguf, to be converted at its first use'\n"
        "print(doctor._check_model())\n"
    )
    packages, model = python(code, "gguf").stdout.splitlines()
    assert 'without gguf: pip install "astra-inference[models]"' in packages
    assert model.endswith('to run it needs the package gguf: pip install "astra-inference[models]"')


def test_every_extra_exists() -> None:
    import tomllib

    from tests.documents import ROOT

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(EXTRAS.values()) <= set(project["optional-dependencies"])
