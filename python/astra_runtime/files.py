"""Writing several files: all of them or none, with the modes that the umask leaves."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIG_FILE, TENSOR_FILE = "astra_config.json", "codebooks.safetensors"


def check_codebook_folder(folder: str | os.PathLike[str]) -> None:
    """Raises FileNotFoundError unless both files of a codebook are in `folder`."""
    path = Path(folder)
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"codebook: expected {CONFIG_FILE} and {TENSOR_FILE} in {path}, "
                f"found no {name}; make one with `astra fit --output {path}`"
            )


def open_to_others(folder: Path) -> None:
    """Gives a folder and its files the modes that the umask leaves, as any others.

    Some libraries write files that their owner alone can read.
    """
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o666 & ~umask)


def write_private(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that its owner alone can read: whole, or not at all.

    Raises OSError, which names `path`; a device or a folder is not replaced.
    """
    target = Path(path)
    _require_file(target)
    try:
        number, part = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # mode 0600
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    try:
        with open(number, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        os.unlink(part)
        raise


def read_whole(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file. Raises OSError, also for a device, which may have no end."""
    target = Path(path)
    _require_file(target)
    return target.read_bytes()


def _require_file(target: Path) -> None:
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "expected a file", str(target))


def check_path(name: str, path: Any) -> None:
    """Raises TypeError unless `path` is one, ValueError where it is empty."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name}: expected a path, got {type(path).__name__}")
    if path == "":
        raise ValueError(f"{name}: expected a path, got an empty text")


@contextlib.contextmanager
def written_together(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder, whose files end up in `folder` once all of them are written.

    When writing fails, or moving a file does, `folder` is as it was before, and the error goes on.

    Example:
        with written_together("codebook") as part:
            (part / "astra_config.json").write_text("{}")
            (part / "codebooks.safetensors").write_bytes(data)
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".part") as part:
        yield Path(part)
        open_to_others(Path(part))
        _replace(Path(part), path)


def _replace(part: Path, folder: Path) -> None:
    """Moves all files, and moves them back when one cannot be moved."""
    old = part / "old"
    names = sorted(file.name for file in part.iterdir())
    old.mkdir()
    moved: list[str] = []
    try:
        for name in names:
            moved.append(name)
            if (folder / name).exists():
                os.replace(folder / name, old / name)
            os.replace(part / name, folder / name)
    except BaseException:
        for name in moved:
            if (old / name).exists():
                os.replace(old / name, folder / name)
            elif not (part / name).exists():  # it was moved, and replaced nothing
                os.replace(folder / name, part / name)
        raise
