"""The C++ core without Python: built alone, tested under the sanitizers, installed and used."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (shutil.which("cmake") and shutil.which("ninja")), reason="no cmake and ninja on PATH"
    ),
]

CONSUMER_CMAKE = """
cmake_minimum_required(VERSION 3.25)
project(consumer LANGUAGES CXX)
find_package(astra_core 0.1 REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE astra_core::astra_core)
"""
CONSUMER_MAIN = """
#include <astra/bitpack.hpp>

int main() {
  const std::int32_t codes[] = {1, 2, 3};
  std::uint8_t out[2];
  astra::pack(codes, 3, 4, out, sizeof out);
  return out[0] == 0x21 && out[1] == 0x03 ? 0 : 1;
}
"""


def run(*command: str | Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def build(source: Path, build: Path, *options: str) -> None:
    run("cmake", "-S", source, "-B", build, "-G", "Ninja", *options)
    run("cmake", "--build", build, "--parallel", "2")


def test_ctest_under_the_sanitizers(tmp_path: Path) -> None:
    build(ROOT, tmp_path, "-DASTRA_BUILD_PYTHON=OFF", "-DASTRA_SANITIZE=ON", "-DASTRA_WERROR=ON")
    run("ctest", "--test-dir", tmp_path, "--output-on-failure", "--no-tests=error")


@pytest.mark.parametrize("shared", ["ON", "OFF"])
def test_an_installed_core_is_found_and_linked(tmp_path: Path, shared: str) -> None:
    options = [
        "-DASTRA_BUILD_PYTHON=OFF",
        "-DASTRA_BUILD_TESTS=OFF",
        f"-DBUILD_SHARED_LIBS={shared}",
    ]
    build(ROOT, tmp_path / "core", *options)
    run("cmake", "--install", tmp_path / "core", "--prefix", tmp_path / "installed")
    consumer = tmp_path / "consumer"
    consumer.mkdir()
    (consumer / "CMakeLists.txt").write_text(CONSUMER_CMAKE)
    (consumer / "main.cpp").write_text(CONSUMER_MAIN)
    build(consumer, consumer / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}")
    run(consumer / "build" / "consumer")
