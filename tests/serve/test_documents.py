"""docs/serving.md and README: what they show runs, and what they list is what there is."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from astra_runtime.cli import _parser
from astra_runtime.serve.http import schemas
from astra_runtime.serve.service import Status
from tests.documents import ROOT, Block, blocks, commands
from tests.runtime.ranks import free_ports
from tests.serve.fakes import FakeService, serving

PAGE = ROOT / "docs/serving.md"
COLUMNS = {
    "chat": schemas.CHAT,
    "completions": schemas.COMPLETIONS,
    "embeddings": schemas.EMBEDDINGS,
    "classify": schemas.CLASSIFY,
}


def named(test: str) -> list[Block]:
    """The blocks that say that they are run by a test of this file."""
    found = [block for page in (PAGE, ROOT / "README.md") for block in blocks(page)]
    return [block for block in found if block.mark.endswith(f"test_documents.py::{test}")]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FakeService, str]]:
    service = FakeService()
    service.model_id, service.text = "smollm2", "Paris."
    with serving(service) as url:
        yield service, url


@pytest.mark.parametrize("block", named("test_curl_and_python"), ids=str)
def test_curl_and_python(
    block: Block, server: tuple[FakeService, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    source = block.source.replace("http://127.0.0.1:8000", server[1])
    if block.language == "python":
        exec(compile(source, "document", "exec"), {})
        assert capsys.readouterr().out == "Paris."
        return
    for line in commands(source):
        words = shlex.split(line)
        if words[0] == "astra":
            assert vars(_parser(words[1]).parse_args(words[1:]))["port"] == 8000
        elif words[0] == "curl":
            told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            assert json.loads(told)["choices"][0]["message"]["content"] == "Paris."
        else:
            assert words[:2] == ["python", "-c"]
            exec(compile(words[2], "document", "exec"), {})
            assert capsys.readouterr().out == "Paris.\n"


def test_an_app_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from astra_runtime.serve import http

    (block,) = named("test_an_app_of_ones_own")
    run: list[Any] = []
    monkeypatch.setattr(http, "run_server", lambda *arguments: run.append(arguments))
    exec(compile(block.source, "document", "exec"), {"service": FakeService()})
    app, host, port = run[0]
    assert (host, port) == ("127.0.0.1", 8000)
    assert app.state.server.options.api_keys == ("secret",)


def test_the_table_of_parameters_is_that_of_the_server() -> None:
    table = PAGE.read_text().partition("<!-- parameters -->\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    assert rows[0][1:5] == list(COLUMNS)
    shown = {row[0].strip("`"): row[1:5] for row in rows[2:]}
    known: dict[str, list[str]] = {}
    for place, endpoint in enumerate(COLUMNS.values()):
        kinds = {"taken": endpoint.taken, "ignored": endpoint.ignored, "refused": endpoint.refused}
        for kind, names in kinds.items():
            for name in names:
                known.setdefault(name, ["–"] * len(COLUMNS))[place] = kind
    assert shown == known


def haproxy_configuration(front: int, meshes: list[str]) -> str:
    """That of the page, at other addresses and without TLS."""
    (block,) = named("test_a_proxy_keeps_a_conversation_on_one_mesh")
    text, binds = re.subn(r"bind .*", f"bind 127.0.0.1:{front}", block.source)
    # a busy machine may answer no check within a second
    text, checks = re.subn("inter 1s", "inter 60s", text)
    servers = iter(meshes)
    text, count = re.subn(
        r"server (mesh-\d) .*", lambda found: f"server {found[1]} {next(servers)}", text
    )
    assert (binds, checks, count) == (1, 1, len(meshes))
    return text


class Proxy:
    """HAProxy with the page's configuration in front of two services."""

    def __init__(self, folder: Path, services: list[FakeService], urls: list[str]) -> None:
        port = int(free_ports(1)[0].rpartition(":")[2])
        self.services, self.url = services, f"http://127.0.0.1:{port}"
        file = folder / "haproxy.cfg"
        file.write_text(haproxy_configuration(port, [url.removeprefix("http://") for url in urls]))
        self.process = subprocess.Popen(
            ["haproxy", "-db", "-f", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def ask(self, conversation: str | None = None, **more: Any) -> int:
        """Which service has answered; more than one never has."""
        before = [len(service.asked) for service in self.services]
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "model": "tiny"}
        headers = {"Content-Type": "application/json"}
        headers |= {} if conversation is None else {"X-Conversation": conversation}
        asked = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body | more).encode(), headers
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.load(answer)["choices"][0]["message"]["content"]
        grown = [len(s.asked) - n for s, n in zip(self.services, before, strict=True)]
        assert sorted(grown) == [0, 1]
        return grown.index(1)

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/ready", timeout=60):
                    return
            except OSError:
                assert time.monotonic() < deadline
                assert self.process.poll() is None
                time.sleep(0.05)


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    if shutil.which("haproxy") is None:
        pytest.skip("there is no HAProxy")
    services = [FakeService(), FakeService()]
    with serving(services[0]) as first, serving(services[1]) as second:
        proxy = Proxy(tmp_path, services, [first, second])
        try:
            proxy.wait()
            yield proxy
        finally:
            proxy.process.terminate()
            proxy.process.communicate(timeout=60)


def test_a_proxy_keeps_a_conversation_on_one_mesh(proxy: Proxy) -> None:
    places = {name: proxy.ask(name) for name in map(str, range(12))}
    assert set(places.values()) == {0, 1}, "both meshes are used"
    assert all(proxy.ask(name) == place for name, place in places.items())
    users = [proxy.ask(user=name) for name in places]
    assert users == list(places.values()), "the parameter `user` counts as the header does"
    assert len({proxy.ask() for _ in range(3)}) == 1, "else the client's address does"
    # a mesh that is not ready gets nothing, at once and not only at the next health check
    proxy.services[0].state = Status(False, "rank 1 is away")
    assert {proxy.ask(name) for name in places} == {1}
    proxy.services[0].state = FakeService().state
    # a stream comes through as it is made, and a client that leaves is noticed
    chosen = proxy.services[proxy.ask()]
    chosen.endless = True
    body = {"messages": [{"role": "user", "content": "Hi"}], "model": "tiny", "stream": True}
    asked = urllib.request.Request(
        f"{proxy.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:
        assert answer.readline().startswith(b"data: ")
        assert not chosen.cancelled.is_set()
    assert chosen.cancelled.wait(60)


def test_importing_the_package_imports_no_server() -> None:
    code = (
        "import sys, astra_runtime, astra_runtime.cli, astra_runtime.serve.service; "
        "absent = {'starlette', 'uvicorn', 'prometheus_client'} & sys.modules.keys(); "
        "assert not absent, absent"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from astra_runtime.cli import main

    for module in [name for name in sys.modules if name.startswith("astra_runtime.serve.http")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "starlette.datastructures", None)
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert main(["serve"]) == 1
    assert 'pip install "astra-inference[serve]"' in capsys.readouterr().err
