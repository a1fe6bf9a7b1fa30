"""Keys, hosts, origins, TLS; metrics, log lines and timelines."""

from __future__ import annotations

import asyncio
import datetime
import errno
import json
import logging
import ssl
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from astra_runtime.errors import AstraError
from astra_runtime.serve.http import (
    HttpOptions,
    check_exposure,
    listening,
    make_app,
    read_api_keys,
    run_server,
)
from astra_runtime.serve.http.access import Hosts
from astra_runtime.serve.http.errors import ApiError
from astra_runtime.serve.http.listening import open_listeners
from astra_runtime.serve.service import ServiceFailed, Span, Status
from tests.runtime.transport.test_addresses import dual_stack
from tests.serve.fakes import FakeService, serving
from tests.serve.test_malformed import CHAT, CHAT_PATH, JSON, ask, refused

KEYED = HttpOptions(api_keys=("first", "second"))
BODY = json.dumps(CHAT).encode()


def call(method: str, path: str, **more: Any) -> Any:
    return asyncio.run(ask(FakeService(), method, path, **more))


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/nothing", "/v1", "/metrics", "/v1/astra/status"]
)
def test_with_a_key_the_api_needs_it(path: str) -> None:
    for header in ({}, {"authorization": "Bearer"}, {"authorization": "Basic first"}):
        answer = call("GET", path, headers=header, options=KEYED)
        assert refused(answer, 401)["code"] is None
        assert answer.headers["www-authenticate"] == "Bearer"
    for wrong in ("third", "firs", "first2", "first second"):
        answer = call("GET", path, headers={"authorization": f"Bearer {wrong}"}, options=KEYED)
        assert refused(answer, 401)["code"] == "invalid_api_key"
    for key in ("first", "second"):
        answer = call("GET", path, headers={"authorization": f"bearer {key}"}, options=KEYED)
        assert answer.status_code == (404 if path in ("/v1", "/v1/nothing") else 200)


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/console.js", "/console.css"])
def test_the_page_and_the_probes_need_no_key(path: str) -> None:
    answer = call("GET", path, options=KEYED)
    assert answer.status_code == 200
    if "json" not in answer.headers["content-type"]:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


def test_keys_from_an_option_a_file_or_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the lab\none\n  # and of others\n\ntwo\n")
    monkeypatch.delenv("ASTRA_API_KEY", raising=False)
    assert read_api_keys() == ()
    monkeypatch.setenv("ASTRA_API_KEY", "three")
    assert read_api_keys() == ("three",)
    file.chmod(0o600)
    assert read_api_keys(file=file) == ("one", "two")
    assert "can be read by others" not in caplog.text
    file.chmod(0o644)
    assert read_api_keys(file=file) == ("one", "two")
    assert "can be read by others" in caplog.text
    assert read_api_keys("four", file) == ("four",)
    file.write_text("# none\n")
    for wrong in ({"given": ""}, {"given": "two words"}, {"file": file}, {"file": tmp_path}):
        with pytest.raises(AstraError, match="API key"):
            read_api_keys(**wrong)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_off_loopback_only_with_a_key(host: str) -> None:
    with pytest.raises(AstraError, match="expected an API key"):
        HttpOptions(host=host)
    with pytest.raises(AstraError, match="expected an API key"):
        run_server(make_app(FakeService()), host)
    check_exposure(host, ("key",))
    check_exposure(host, (), insecure=True)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.0.1", "::1", "localhost", " 127.0.0.1 ", "[::1]"]
)
def test_loopback_needs_no_key(host: str) -> None:
    check_exposure(host, ())


def test_a_page_that_rebinds_its_name_is_refused() -> None:
    hosts = Hosts("127.0.0.1", ["proxy.example.org"])
    known = [
        "127.0.0.1:8000",
        "LOCALHOST:8000",
        "[::1]:8000",
        "10.0.0.7",
        "proxy.example.org",
        None,
    ]
    for header in known:
        hosts.check(header)
    for header in (
        "evil.example.org:8000",
        "127.0.0.1.evil.org",
        "localhost.evil.org",
        "",
        "x:y:z",
    ):
        with pytest.raises(ApiError, match="no name of this server"):
            hosts.check(header)
    answer = call("POST", CHAT_PATH, content=BODY, headers={"host": "evil.org", **JSON})
    assert refused(answer, 403)["code"] == "host_not_allowed"
    assert refused(call("GET", "/", headers={"host": "evil.org"}), 403)


def test_other_origins_only_where_they_were_named() -> None:
    headers = {"origin": "https://page.org", "access-control-request-method": "POST"}
    refused(call("OPTIONS", CHAT_PATH, headers=headers), 405)
    options = HttpOptions(cors_origins=("https://page.org",))
    answer = call("OPTIONS", CHAT_PATH, headers=headers, options=options)
    assert answer.headers["access-control-allow-origin"] == "https://page.org"
    answer = call("POST", CHAT_PATH, content=BODY, headers=headers | JSON, options=options)
    assert answer.headers["access-control-allow-origin"] == "https://page.org"
    other = headers | {"origin": "https://evil.org"}
    answer = call("OPTIONS", CHAT_PATH, headers=other, options=options)
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"allowed_hosts": ("https://api.org",)}, "--allowed-host"),
        ({"allowed_hosts": ("api.org:8000",)}, "--allowed-host"),
        ({"allowed_hosts": ("*",)}, "--allowed-host"),
        ({"cors_origins": ("page.org",)}, "--cors-origin"),
        ({"cors_origins": ("https://page.org/",)}, "--cors-origin"),
        ({"cors_origins": ("https://Page.org",)}, "--cors-origin"),
        ({"cors_origins": ("https://page.org:443",)}, "--cors-origin"),
    ],
)
def test_names_that_no_request_has_are_refused(names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HttpOptions(**names)


def test_names_as_requests_have_them() -> None:
    origins = ("*", "https://page.org", "http://localhost:3000", "capacitor://localhost")
    HttpOptions(allowed_hosts=("api.org", "10.0.0.7", "::1"), cors_origins=origins)


def test_every_address_of_a_host_is_listened_at(monkeypatch: pytest.MonkeyPatch) -> None:
    dual_stack(monkeypatch, "::1", "127.0.0.1")
    listen_at, failed = listening._listen_at, []

    def in_use_once(endpoint: Any, port: int) -> Any:
        if port and not failed:
            failed.append(port)
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return listen_at(endpoint, port)

    monkeypatch.setattr(listening, "_listen_at", in_use_once)
    listeners = open_listeners("box", 0)
    assert failed
    try:
        assert [one.getsockname()[0] for one in listeners] == ["::1", "127.0.0.1"]
        ports = {one.getsockname()[1] for one in listeners}
        assert len(ports) == 1
        with pytest.raises(AstraError, match="cannot listen at .*::1.* port .* in use"):
            open_listeners("[::1]", ports.pop())
    finally:
        for one in listeners:
            one.close()
    with pytest.raises(AstraError, match="cannot listen at 192.0.2.1 port 0"):
        open_listeners("192.0.2.1", 0)


def test_tls_with_a_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates = pytest.importorskip("astra_runtime.transport.certificates")
    certificates.make_keys(tmp_path / "keys", 1, hosts=["127.0.0.1"])
    rank = tmp_path / "keys/rank-0"
    files = {
        "certfile": str(rank / certificates.CERTIFICATE),
        "keyfile": str(rank / certificates.KEY),
    }
    trust = ssl.create_default_context(cafile=str(rank / certificates.AUTHORITY))
    with serving(FakeService(), **files) as url:
        assert url.startswith("https://")
        with urllib.request.urlopen(f"{url}/health", context=trust) as answer:
            assert json.load(answer) == {"status": "ok"}
    with pytest.raises(AstraError, match="TLS: cannot use"):
        run_server(make_app(FakeService()), certfile=str(tmp_path / "none.crt"))
    with pytest.raises(AstraError, match="expected a certificate .--tls-cert."):
        run_server(make_app(FakeService()), keyfile=files["keyfile"])

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return datetime.datetime.now(tz) + datetime.timedelta(days=500)

    monkeypatch.setattr(listening, "datetime", Clock)
    with pytest.raises(AstraError, match="TLS: .* has expired: it is valid from"):
        run_server(make_app(FakeService()), **files)


def test_ready_says_why_not() -> None:
    service = FakeService()
    assert asyncio.run(ask(service, "GET", "/ready")).json() == {"ready": True}
    service.state = Status(False, "rank 1 is away")
    answer = asyncio.run(ask(service, "GET", "/ready"))
    assert answer.status_code == 503
    assert answer.json() == {"ready": False, "reason": "rank 1 is away"}
    assert asyncio.run(ask(service, "GET", "/health")).status_code == 200


def test_status_for_the_page() -> None:
    told = call("GET", "/v1/astra/status").json()
    assert (told["model"], told["kind"], told["ready"]) == ("tiny", "decoder", True)
    assert told["max_new_tokens"] is None
    assert [peer["state"] for peer in told["peers"]] == ["here", "away"]
    assert told["timeline"][0] == {"rank": 0, "name": "compute", "start": 0.0, "stop": 0.5}
    again = call("GET", f"/v1/astra/status?timeline={told['timeline_key']}").json()
    assert again["timeline"] is None
    assert again["timeline_key"] == told["timeline_key"]


def test_a_long_timeline_is_cut_to_what_can_be_seen() -> None:
    service = FakeService()
    spans = [Span(0, "compute", i, i + (1.0 if i % 9 else 0.1)) for i in range(9000)]
    service.state = Status(True, "", timeline=spans)
    shown = asyncio.run(ask(service, "GET", "/v1/astra/status")).json()["timeline"]
    assert len(shown) == 4000
    assert all(span["stop"] - span["start"] == 1.0 for span in shown)


def test_metrics() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    service = FakeService()

    async def run() -> str:
        import httpx

        from astra_runtime.serve.http import make_app

        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for _ in range(3):
                await client.post(CHAT_PATH, content=BODY, headers=JSON)
            service.error = ServiceFailed("lost")
            await client.post(CHAT_PATH, content=BODY, headers=JSON)
            await client.get("/v1/x" * 30)
            return (await client.get("/metrics")).text

    text = asyncio.run(run())
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    tokens = len(service.text.encode())
    assert samples["astra_requests_total", "/v1/chat/completions", "200"] == 3
    assert samples["astra_requests_total", "/v1/chat/completions", "503"] == 1
    assert samples["astra_requests_total", "404", "other"] == 1
    assert samples["astra_tokens_total", "generated"] == 3 * tokens
    assert samples["astra_time_to_first_token_seconds_count",] == 3
    assert samples["astra_time_per_token_seconds_count",] == 3 * (tokens - 1)
    assert samples["astra_requests_queued",] == 1
    assert samples["astra_requests_running",] == 2
    assert samples["astra_wire_bytes_total", "sent"] == 5000
    assert samples["astra_peer_sent_bytes_total", "1"] == 5000
    assert samples["astra_peer_busy_ratio", "0"] == 0.43
    assert samples["astra_peer_round_trip_seconds", "0"] == 0.0025
    assert ("astra_peer_busy_ratio", "1") not in samples
    assert samples["astra_peers", "here"] == samples["astra_peers", "away"] == 1
    assert samples["astra_degraded_answers_total",] == 0
    assert samples["astra_ready",] == 1


def test_one_line_a_request_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "astra_runtime.serve")
    body = json.dumps(CHAT | {"unheard_of": 1, "seed": 3}).encode()
    answer = call("POST", CHAT_PATH, content=body)
    call("GET", "/health")
    lines = [
        json.loads(record.message)
        for record in caplog.records
        if record.name == "astra_runtime.serve"
    ]
    ignored, line = lines
    assert ignored == {"path": CHAT_PATH, "ignored_parameter": "unheard_of"}
    assert line["request"] == answer.headers["x-request-id"]
    assert (line["method"], line["path"], line["status"]) == ("POST", CHAT_PATH, 200)
    assert line["finish_reason"] == "stop"
    assert line["completion_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert {"seconds", "seconds_to_first_token", "rank", "cached_tokens"} <= set(line)
    assert "Hello" not in json.dumps(lines)
    assert FakeService().text not in json.dumps(lines, ensure_ascii=False)


def test_a_refusal_is_logged_without_what_was_sent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "astra_runtime.serve")
    answer = call("POST", CHAT_PATH, content=json.dumps(CHAT | {"stop": [["secret"]]}).encode())
    assert "secret" in answer.json()["error"]["message"]
    line = json.loads(caplog.records[-1].message)
    assert line["error"] == "invalid_request_error stop"
    assert "secret" not in caplog.text


def test_an_unknown_parameter_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    from astra_runtime.serve.http.logs import OnceEach

    caplog.set_level(logging.INFO, "astra_runtime.serve")
    once = OnceEach()
    for _ in range(3):
        once.say("/v1/completions", ["a", "b" * 1000])
    for number in range(1000):
        once.say("/v1/completions", [f"name {number}"])
    assert len(caplog.records) <= 256
    assert sum('"a"' in record.message for record in caplog.records) == 1


def test_a_timeline_a_request(tmp_path: Path) -> None:
    options = HttpOptions(trace_folder=tmp_path)
    answer = call("POST", CHAT_PATH, content=BODY, options=options)
    file = tmp_path / f"{answer.headers['x-request-id']}.json"
    events = json.loads(file.read_text())["traceEvents"]
    assert {event["name"] for event in events if event["ph"] == "X"} == {"compute", "wait"}
    with pytest.raises(AstraError, match="--trace: cannot make the folder"):
        make_app(FakeService(), HttpOptions(trace_folder=file))
    with pytest.raises(AstraError, match="or files in it"):
        make_app(FakeService(), HttpOptions(trace_folder=Path("/proc")))


def test_a_full_disk_takes_no_answer_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from astra_runtime.serve.http import server_state

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server_state, "_write_spans", full)
    answer = call("POST", CHAT_PATH, content=BODY, options=HttpOptions(trace_folder=tmp_path))
    assert answer.status_code == 200
    assert "No space left" in caplog.text
