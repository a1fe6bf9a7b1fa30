"""What MkDocs needs to know of this repository, whose documents link to each other as on GitHub.

The documents outside of docs/ become pages, and every other file that a page links to is copied
into the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "DESIGN.md": "design.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
SOURCES = "source"  # the folder of the site that other files are copied into
_GROUPED = re.compile(
    r"^(?P<indent> +)(?P<names>\w+(?:,\s+\w+)+)(?P<text>:.*(?:\n(?P=indent) +\S.*)*)", re.M
)
_LINK = re.compile(r"(?P<start>\]\()(?P<target>[^)\s#:]+)(?P<rest>[)#])")


def on_files(files: Files, config: Any) -> Files:
    for name, page in PAGES.items():
        text = (ROOT / name).read_text("utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as the site has them; what they lead to is copied where it is no page."""
    names = {site: name for name, site in PAGES.items()}
    here = page.file.src_uri
    origin = names.get(here, f"docs/{here}")

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link["target"]))
        if target in PAGES:
            there = PAGES[target]
        elif target.startswith("docs/"):
            there = target.removeprefix("docs/")
        else:
            there = f"{SOURCES}/{target}"
            if files.get_file_from_path(there) is None:
                files.append(File.generated(config, there, abs_src_path=str(ROOT / target)))
        return link["start"] + posixpath.relpath(there, posixpath.dirname(here)) + link["rest"]

    return _LINK.sub(moved, markdown)


class Docstrings(griffe.Extension):
    """What docstrings here have and griffe does not know.

    Lines like `key, value: [B, Hkv, L, d]` become one for each name, and "Example:" is the section
    that griffe calls "Examples:".
    """

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = _GROUPED.sub(one_each, obj.docstring.value)
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.M)


def one_each(group: re.Match[str]) -> str:
    names = re.split(r",\s+", group["names"])
    return "\n".join(f"{group['indent']}{name}{group['text']}" for name in names)
