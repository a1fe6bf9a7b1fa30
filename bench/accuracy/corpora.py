"""Real text of several kinds, to train on and to evaluate on domains that training never saw.

    python -m bench.accuracy corpora [--fetch]      what is here; --fetch gets the Debian packages

Nothing of it is in the repository. Two domains come with Python; the others are Debian packages,
which are downloaded and unpacked, not installed, into $ASTRA_CACHE/corpora or
~/.cache/astra/corpora.
"""

import argparse
import gzip
import html.parser
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from astra_kernels._cache import cache_folder
from astra_runtime.errors import AstraError
from astra_runtime.texts import builtin_text, token_windows

BUILTIN = {
    "documentation": "Python's language reference: English technical prose",
    "source": "the standard library's modules: Python code with comments and docstrings",
}
# What each is; the Debian package that has it; the files in it.
DEBIAN = {
    "manpages": ("Linux manual pages: terse technical prose", "manpages"),
    "fortunes": ("quotations, jokes and verse: English of many authors", "fortunes"),
    "devref": ("Debian Developer's Reference: English procedural prose", "developers-reference"),
    "handbook": ("The Debian Administrator's Handbook: an English textbook", "debian-handbook"),
}
DOMAINS = (*BUILTIN, *DEBIAN)
UNSEEN = ("handbook", "devref")  # that no codebook of `bench.accuracy.calibrate` is fitted on


def corpus(domain: str) -> tuple[str, str]:
    """The text of a domain as (calibration, evaluation).

    Every fifth document (page, chapter, file, or hundred quotations) is for evaluation; no
    paragraph of these is in the other part.

    Raises:
        ValueError: no such domain.
        AstraError: its package is not unpacked here; says what to run.
    """
    if domain in BUILTIN:
        return builtin_text(domain)
    if domain not in DEBIAN:
        raise ValueError(f"domain: expected one of {', '.join(DOMAINS)}, got {domain!r}")
    return split(READERS[domain](_folder(DEBIAN[domain][1])))


def split(documents: Sequence[str]) -> tuple[str, str]:
    """(calibration, evaluation) of documents in order, no paragraph in both or twice."""
    evaluation = dict.fromkeys(p for text in documents[::5] for p in _paragraphs(text))
    rest = (text for i, text in enumerate(documents) if i % 5)
    calibration = dict.fromkeys(
        p for text in rest for p in _paragraphs(text) if p not in evaluation
    )
    return "\n\n".join(calibration), "\n\n".join(evaluation)


def held_out(tokenizer: Any, domains: Iterable[str], tokens: int, windows: int) -> dict[str, Any]:
    """Of each domain, windows of the part that no codebook is fitted on: int64 [tokens] each."""
    return {name: token_windows(tokenizer, corpus(name)[1], tokens, windows) for name in domains}


def available(domain: str) -> bool:
    return domain in BUILTIN or _place(DEBIAN[domain][1]).is_dir()


def fetch(package: str) -> None:
    """Downloads a Debian package and unpacks it into the cache folder, whole or not at all."""
    folder = _place(package)
    part = folder.with_name(package + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    subprocess.run(["apt-get", "download", package], cwd=part, check=True)
    (file,) = part.glob("*.deb")
    subprocess.run(["dpkg", "-x", file.name, "."], cwd=part, check=True)
    file.unlink()
    part.rename(folder)


def _place(package: str) -> Path:
    return cache_folder() / "corpora" / package


def _folder(package: str) -> Path:
    folder = _place(package)
    if not folder.is_dir():
        raise AstraError(
            f"text: the Debian package {package} is not unpacked in {folder}; on Debian or Ubuntu "
            "run python -m bench.accuracy corpora --fetch"
        )
    return folder / "usr" / "share"


def _paragraphs(text: str) -> list[str]:
    parts = (part.strip("\n") for part in re.split(r"\n\s*\n", text))
    return [part for part in parts if part.strip()]


def _manpages(share: Path) -> list[str]:
    """Pages of several hundred bytes or more; the others name another page."""
    pages = sorted(share.glob("man/man[1-8]/*.gz"))
    texts = (plain_roff(gzip.decompress(page.read_bytes()).decode("utf-8")) for page in pages)
    return [text for text in texts if len(text) > 500]


def plain_roff(source: str) -> str:
    """The text of a manual page without its markup, near enough: tables stay as they are."""
    lines = []
    for line in source.splitlines():
        if line.startswith((".", "'")):
            macro, _, rest = line[1:].partition(" ")
            if macro in ("SH", "SS", "PP", "TP", "IP", "P", "LP"):
                lines.append("")
            line = rest if re.fullmatch(r"[BIR]{1,2}|SB|SM|SH|SS|IP", macro) else ""
            if macro in ("BR", "IR", "BI", "IB", "RB", "RI"):  # fonts take turns, without blanks
                line = "".join(_arguments(line))
            if not line:
                continue
        lines.append(line.replace('"', "") if line.startswith('"') else line)
    text = "\n".join(lines)
    text = re.sub(r"\\f(\[\w*\]|\(..|.)|\\s[-+]?\d|\\[&|^%/,:]", "", text)
    text = re.sub(r"\\\((?:aq|cq|oq)", "'", text)
    text = re.sub(r'\\".*', "", text)
    for mark, meant in (("\\-", "-"), ("\\ ", " "), ("\\e", "\\"), ("\\(co", "(c)"), ("\\~", " ")):
        text = text.replace(mark, meant)
    return text


def _arguments(line: str) -> list[str]:
    """Arguments of a macro: words, or what stands in double quotes."""
    return [quoted or word for quoted, word in re.findall(r'"([^"]*)"|(\S+)', line)]


def _fortunes(share: Path) -> list[str]:
    """A hundred quotations a document."""
    documents = []
    for file in sorted((share / "games" / "fortunes").iterdir()):
        if file.suffix or not file.is_file() or file.is_symlink():
            continue
        text = file.read_text(encoding="utf-8", errors="ignore").expandtabs(4)
        quotations = [q.strip("\n") for q in text.split("\n%\n")]
        documents += ["\n\n".join(quotations[i : i + 100]) for i in range(0, len(quotations), 100)]
    return documents


class _Text(html.parser.HTMLParser):
    """The text of an HTML page, a paragraph for each element that is one."""

    BLOCKS = frozenset(
        ["p", "div", "li", "h1", "h2", "h3", "h4", "h5", "pre", "tr", "dt", "dd", "table", "ul"]
        + ["ol", "section", "body", "title"]
    )
    SKIPPED = frozenset(["script", "style", "head", "nav", "footer"])

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping = self.literal = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.skipping += tag in self.SKIPPED
        self.literal += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipping -= tag in self.SKIPPED
        self.literal -= tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.literal else re.sub(r"\s+", " ", data))


def plain_html(page: str) -> str:
    parser = _Text()
    parser.feed(page)
    paragraphs = _paragraphs("".join(parser.parts))
    return "\n\n".join(p for p in paragraphs if len(p) > 40)  # not the buttons


def _pages(pattern: str) -> Callable[[Path], list[str]]:
    def read(share: Path) -> list[str]:
        files = sorted(share.glob(pattern))
        return [plain_html(file.read_text(encoding="utf-8", errors="ignore")) for file in files]

    return read


READERS: dict[str, Callable[[Path], list[str]]] = {
    "manpages": _manpages,
    "fortunes": _fortunes,
    "devref": _pages("developers-reference/*.html"),
    "handbook": _pages("doc/debian-handbook/html/en-US/*.html"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.accuracy corpora", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--fetch", action="store_true", help="get the Debian packages")
    if parser.parse_args(arguments).fetch:
        for _, package in DEBIAN.values():
            if not _place(package).is_dir():
                fetch(package)
    about = {**BUILTIN, **{name: what for name, (what, _) in DEBIAN.items()}}
    for domain, what in about.items():
        sizes = "not here: see --fetch"
        if available(domain):
            sizes = " and ".join(f"{len(part) / 1e3:.0f}" for part in corpus(domain)) + " KB"
        print(f"{domain:14} {sizes:24} {what}")


if __name__ == "__main__":
    main()
