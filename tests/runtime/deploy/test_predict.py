"""Predictions against what can be worked out by hand, and their directions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from astra_runtime import Codebook
from astra_runtime.call import Sizes
from astra_runtime.cli import main
from astra_runtime.codes.base import geometry
from astra_runtime.costs import engine_plan, flops_over_ideal, single_flops
from astra_runtime.deploy.predict import (
    Rates,
    first_token,
    measured,
    of_flops,
    on_paper,
    quickest_plan,
    single,
)
from astra_runtime.models import adapt
from astra_runtime.models.shapes import SHAPES, shaped
from astra_runtime.plan import Plan
from astra_runtime.transport import Link

from ..models import book_of, fitted, tiny

FREE = Link()
_kept: list[Any] = []  # adapters do not keep their models alive


def adapter_of(model: Any) -> Any:
    _kept.append(model)
    return adapt(model)


def kv(adapter: Any, groups: int = 1) -> Codebook:
    return Codebook("kv", groups, 1024, groups == 1, geometry=geometry(adapter))


@pytest.mark.parametrize("name", SHAPES)
def test_one_device_is_its_flops(name: str) -> None:
    adapter = adapter_of(shaped(name))
    rates = of_flops(adapter, Codebook.drop(), 1e9)
    assert single(adapter, rates, 256) == pytest.approx(single_flops(adapter, 256) / 1e9)


@pytest.mark.parametrize("name", ["vit-base", "gpt2"])
@pytest.mark.parametrize("world", [2, 4, 7])
def test_without_a_link_the_slowest_ranks_flops_are_all(name: str, world: int) -> None:
    adapter = adapter_of(shaped(name))
    book = kv(adapter)
    plan = engine_plan(adapter, book, 512, world)
    rates = of_flops(adapter, book, 1e9)
    found = first_token(adapter, book, plan, [rates] * world, FREE)
    ideal = single_flops(adapter, 512) / 1e9 / world
    expected = flops_over_ideal(adapter, book, 512, world) * ideal
    assert max(found.busy) == pytest.approx(expected, rel=1e-6)
    # hardly anybody waits, and nobody for a rank before the last one that has a little more to do
    assert 0.99 * expected <= found.seconds <= 1.1 * expected


def test_the_link_by_hand() -> None:
    """Two ranks of an encoder, two blocks of work that takes no time: only frames do."""
    adapter = adapter_of(tiny("vit"))
    blocks = len(adapter.blocks)
    book = Codebook.none()
    plan = Plan((0, 12, 25), causal=False, copies=1)
    link = Link(8.0, 3.0)  # 1 MB/s
    nothing = Rates(0, 0, 0, 0, 0, 0)
    found = first_token(
        adapter, book, plan, [nothing] * 2, link, payload=lambda block, tokens: 1000.0 * tokens
    )
    answer = link.seconds(4 * adapter.hidden_size) + 0.003
    # each block ends when the larger frame has come; both ranks wait for each other's
    larger, smaller = link.seconds(13000) + 0.003, link.seconds(12000) + 0.003
    assert found.seconds == pytest.approx(_alternating(blocks, larger, smaller) + answer)


def _alternating(blocks: int, larger: float, smaller: float) -> float:
    """When rank 1 is ready: rank 0 hears 13 tokens, rank 1 hears 12, block after block."""
    ready = [0.0, 0.0]
    link = [0.0, 0.0]
    for _ in range(blocks):
        sent = [max(ready[0], link[0]) + smaller - 0.003, max(ready[1], link[1]) + larger - 0.003]
        link = sent
        ready = [sent[1] + 0.003, sent[0] + 0.003]
    return ready[1]


def test_frames_to_more_peers_cross_the_uplink_one_after_another() -> None:
    adapter = adapter_of(tiny("vit"))
    nothing = Rates(0, 0, 0, 0, 0, 0)

    def seconds(world: int) -> float:
        plan = Plan.make(24, world, causal=False, copies=1)
        found = first_token(
            adapter,
            Codebook.none(),
            plan,
            [nothing] * world,
            Link(1.0),
            payload=lambda block, tokens: 1000.0,
        )
        return found.seconds

    assert seconds(4) == pytest.approx(3 * seconds(2), rel=0.2)


def test_class_tokens_of_many_ranks_take_a_step_for_each_doubling() -> None:
    adapter, link = adapter_of(tiny("vit")), Link(1.0, 3.0)
    nothing = Rates(0, 0, 0, 0, 0, 0)
    plan = Plan.make(24, 8, causal=False, copies=1)
    found = first_token(adapter, Codebook.local_only(), plan, [nothing] * 8, link)
    assert found.seconds == pytest.approx(3 * (link.seconds(4 * adapter.hidden_size) + 0.003))


def test_fine_codes_lengthen_the_next_ranks_frame() -> None:
    options = {"bits": 12, "codewords": 16, "iterations": 2, "held_back": 0}
    model = tiny("llama")
    book = book_of(model, "llama", space="transform", fine_bits=60, fine_tokens=4, **options)
    coarse = replace(book, fine=(), fine_tokens=0, fine_codewords=0)
    plan = Plan.make(30, 2, causal=True, copies=1)
    idle, link = Rates(0, 0, 0, 0, 0, 0), Link(mbit_per_s=1)
    with_fine, without = (
        first_token(adapt(model), b, plan, [idle] * 2, link).seconds for b in (book, coarse)
    )
    more = sum(4 * part.codes * 6 for part in book.fine)  # bits of the last 4 of 15 tokens
    assert with_fine - without == pytest.approx(more / 1e6, rel=0.1)  # up to whole bytes


def test_slow_links_and_more_bits_cost_time() -> None:
    adapter = adapter_of(shaped("vit-base"))

    def seconds(book: Codebook, mbit: float) -> float:
        rates = of_flops(adapter, book, 50e9)
        plan = engine_plan(adapter, book, 512, 4)
        return first_token(adapter, book, plan, [rates] * 4, Link(mbit, 1.0)).seconds

    slow = [seconds(kv(adapter), mbit) for mbit in (1, 10, 100)]
    assert slow == sorted(slow, reverse=True)
    wide = [seconds(b, 10) for b in (kv(adapter), kv(adapter, 12), Codebook.none("int8"))]
    assert wide == sorted(wide)


def test_a_slow_rank_is_waited_for() -> None:
    adapter = adapter_of(shaped("vit-base"))
    book = kv(adapter)
    rates = of_flops(adapter, book, 50e9)
    plan = engine_plan(adapter, book, 512, 3)
    even = first_token(adapter, book, plan, [rates] * 3, FREE)
    uneven = first_token(adapter, book, plan, [rates, rates.slower(2), rates], FREE)
    assert uneven.seconds == pytest.approx(2 * even.seconds, rel=0.05)
    assert uneven.waiting[0] > 0.3 * uneven.seconds
    with pytest.raises(ValueError, match="rates: expected those of 3 ranks, got 2"):
        first_token(adapter, book, plan, [rates] * 2, FREE)


@pytest.mark.parametrize("mbit", [None, 1.0])
def test_a_slow_link_takes_tokens_from_the_rank_that_sends_to_all(mbit: float | None) -> None:
    adapter = adapter_of(shaped("gpt2"))
    book = kv(adapter, 12)
    rates = [of_flops(adapter, book, 50e9)] * 16
    usual = engine_plan(adapter, book, 512, 16)
    plan, found = quickest_plan(adapter, book, rates, Link(mbit, 1.0), 512)
    assert (plan == usual) == (mbit is None)
    assert plan.size(0) <= usual.size(0)
    assert found == first_token(adapter, book, plan, rates, Link(mbit, 1.0))
    if mbit:
        assert found.seconds < first_token(adapter, book, usual, rates, Link(mbit, 1.0)).seconds


@pytest.mark.parametrize(
    ("space", "kind"),
    [
        *(("transform", kind) for kind in ("llama", "gpt2", "bert", "vit")),
        *((space, kind) for space in ("kv", "none", "drop") for kind in ("llama", "vit")),
    ],
)
def test_every_space_is_measured(kind: str, space: str) -> None:
    model = tiny(kind)
    if space == "kv":
        book = fitted(kind, model, space="kv", groups=1)
    elif space == "transform":
        options = {"bits": 24, "codewords": 16, "held_back": 0}
        book = book_of(model, kind, space="transform", **options)
    else:
        book = Codebook(space)
    tokens = 25 if kind == "vit" else 32
    if kind == "vit":
        with pytest.raises(ValueError, match="tokens: expected the 25 patches"):
            measured(model, book, 24)
    rates = measured(model, book, tokens)
    assert min(vars(rates).values()) >= 0
    assert (rates.far > 0) == (space != "drop")
    assert (rates.code > 0) == (space != "drop")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_bits_are_those_of_the_engine(dtype: str) -> None:
    adapter = adapter_of(tiny("llama"))  # three KV heads of 16 channels
    each = {"float32": 32, "float16": 16, "int8": 9}[dtype]
    assert Codebook.none(dtype).token_bits(adapter, 1) == 2 * 3 * 16 * each
    assert Codebook.drop().token_bits(adapter, 0) == 0
    differential = replace(kv(adapter), space="differential")
    assert [differential.token_bits(adapter, block) for block in (0, 1)] == [0, 10]


def test_flops_that_cannot_be_are_refused() -> None:
    adapter = adapter_of(tiny("llama"))
    with pytest.raises(ValueError, match="flops: expected a positive rate, got 0"):
        of_flops(adapter, Codebook.none(), 0)
    with pytest.raises(ValueError, match="name: expected one of vit-base"):
        shaped("alexnet")


@pytest.mark.parametrize("world", [2, 8])
def test_the_closed_form_is_near_the_followed_ranks(world: int) -> None:
    adapter = adapter_of(shaped("vit-base"))
    book, link = kv(adapter), Link(10.0, 1.0)
    rates = of_flops(adapter, book, 50e9)
    plan = engine_plan(adapter, book, 1024, world)
    followed = first_token(adapter, book, plan, [rates] * world, link).seconds
    assert on_paper(adapter, book, rates, link, 1024, world) == pytest.approx(followed, rel=0.05)
    alone = on_paper(adapter, book, rates, link, 1024, 1)
    assert alone == pytest.approx(single(adapter, rates, 1024))


def test_rows_and_columns_pay_when_frames_are_all_headers() -> None:
    adapter = adapter_of(shaped("vit-base"))
    book, link = kv(adapter), Link(10.0, 1.0)
    rates = of_flops(adapter, book, 50e9)

    def seconds(world: int, two_level: bool) -> float:
        return on_paper(adapter, book, rates, link, 1024, world, two_level=two_level)

    assert seconds(4, False) <= seconds(4, True)
    far = Link(10.0, 100.0)
    direct, in_two = (
        on_paper(adapter, book, rates, far, 1024, 4, two_level=two) for two in (False, True)
    )
    assert in_two > direct + 1  # one more latency in each of 12 blocks, for nothing
    assert seconds(512, True) < 0.5 * seconds(512, False)
    with pytest.raises(ValueError, match="world: expected 1 to 1024 ranks"):
        seconds(1025, False)


# The command.


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_shape_is_planned_from_flops(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", "vit-base", "--flops", "50e9", "--tokens", "196"]
    found = planned(capsys, *asked, "--world-size", "2", "4", "--mbit", "10")
    assert found["recommended"]["world_size"] == 4
    assert 2.5 < found["recommended"]["speedup"] < 3.7
    assert {row["codes"] for row in found["rows"]} >= {"kv, one code", "dense int8"}
    assert [row["seconds"] for row in found["rows"]] == sorted(r["seconds"] for r in found["rows"])
    far = planned(capsys, *asked, "--world-size", "2", "--mbit", "0.01", "--rtt-ms", "2000")
    assert far["recommended"] is None  # stay on one device


def test_a_recommendation_says_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--model", "vit-base", "--flops", "50e9", "--tokens", "196"]
    for mbit, codes in (("10", "hidden, one code"), ("0", "dense float32")):
        assert main([*asked, "--world-size", "4", "--mbit", mbit, "--rtt-ms", "0"]) == 0
        told = capsys.readouterr().out
        assert f"recommended: {codes} on" in told
        assert ("is known after a fit" in told) is not codes.startswith("dense")


def test_uneven_devices_get_uneven_shards(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", "gpt2", "--flops", "1e11", "--world-size", "2", "--speeds", "1,0.5"]
    first, second = planned(capsys, *asked)["recommended"]["shards"]
    assert first > 1.7 * second


def test_this_machine_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    fitted("llama", model, space="kv", groups=3).save_pretrained(tmp_path / "codes")
    _tokenizer().save_pretrained(tmp_path / "model")
    found = planned(
        capsys,
        *("--model", str(tmp_path / "model"), "--codebook", str(tmp_path / "codes")),
        *("--tokens", "40", "--world-size", "2"),
    )
    assert found["single_seconds"] > 0
    assert {row["codes"] for row in found["rows"]} == {
        "codes",
        *(f"dense {dtype}" for dtype in ("float32", "float16", "int8")),
    }


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vit-base"], "--flops: expected with the shape vit-base"),
        (["--model", "gpt2", "--flops", "1e9", "--speeds", "1,x"], "--speeds: expected positive"),
        (["--model", "gpt2", "--flops", "1e9", "--speeds", "1,1"], "--world-size 2, got 2 3 4 8"),
    ],
)
def test_bad_questions_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and codebooks for it of one name and of another."""
    folder = tmp_path_factory.mktemp("own")
    model = tiny("llama")
    model.save_pretrained(folder / "model")
    _tokenizer().save_pretrained(folder / "model")
    for at, groups in (("a/codes", 3), ("b/codes", 6), ("other", 3)):
        fitted("llama", model, space="kv", groups=groups).save_pretrained(folder / at)
    return folder


def test_codebooks_of_one_name_are_told_apart(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    books = [str(own / at) for at in ("a/codes", "b/codes", "other", "other")]
    asked = ["--model", str(own / "model"), "--flops", "1e9", "--tokens", "100"]
    found = planned(capsys, *asked, "--world-size", "2", "--codebook", *books)
    bits = {row["codes"]: row["bits_per_token_block"] for row in found["rows"]}
    named = {name: value for name, value in bits.items() if not name.startswith("dense")}
    assert set(named) == {*books[:2], "other"}
    assert named[books[1]] == 2 * named[books[0]]


def test_bits_are_those_that_the_engine_counts(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama")
    options = {"bits": 40, "codewords": 16, "rank": 8, "iterations": 3, "held_back": 0}
    book = book_of(model, "llama", space="transform", fine_bits=60, fine_tokens=8, **options)
    book.save_pretrained(own / "fine")
    asked = ["--model", str(own / "model"), "--flops", "1e9", "--codebook", str(own / "fine")]
    rows = planned(capsys, *asked, "--tokens", "101", "--world-size", "3")["rows"]
    (row,) = [row for row in rows if not row["codes"].startswith("dense")]
    adapter = adapter_of(model)
    plan = engine_plan(adapter, book, 101, 3, shard_weights=row["shards"])
    sizes = Sizes.of(book.make_codec(adapter), len(adapter.blocks), 0, plan, 1)
    assert book.fine[1].codes
    assert row["bits_per_token_block"] == pytest.approx(sizes.bits_per_token_block(1), abs=0.5)
    assert row["bits_per_token_block"] > book.bits + 1


def test_codes_are_looked_at_or_the_plan_says_that_they_were_not(
    own: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from astra_runtime import Codebook
    from astra_runtime.cli.fitting import default_name

    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path))
    asked = ["plan", "--json", "--model", str(own / "model"), "--world-size", "2"]
    assert main([*asked, "--tokens", "30"]) == 0
    said = capsys.readouterr()
    assert "codes were not looked at" in said.err
    assert all(row["codes"].startswith("dense") for row in json.loads(said.out)["rows"])
    assert main([*asked, "--tokens", "30", "--codebook", "none"]) == 0
    assert "codes were not looked at" not in capsys.readouterr().err
    book = Codebook.from_pretrained(own / "other")
    name = default_name("model", str(book.model))
    book.save_pretrained(tmp_path / "codebooks" / name)
    assert main([*asked, "--flops", "1e9"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert name in {row["codes"] for row in found["rows"]}
    assert found["tokens"] == 256  # what the model reads


@pytest.mark.parametrize("more", [[], ["--peers", "127.0.0.1:1,127.0.0.1:2"]])
def test_more_tokens_than_the_model_reads_are_refused(
    own: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["plan", "--model", str(own / "model"), "--codebook", str(own / "other")]
    assert main([*asked, "--tokens", "257", *more]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "astra: error: --tokens: expected at most 256, the model's limit, got 257"


def test_an_encoders_tokens_count_its_class_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("bert").save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    found = planned(capsys, "--model", str(tmp_path), "--world-size", "2", "--codebook", "none")
    assert found["tokens"] == 128
    assert sum(found["rows"][0]["shards"]) == 127


@pytest.mark.parametrize(("changes", "patches"), [({}, 25), ({"image_size": [20, 16]}, 20)])
def test_images_have_the_patches_of_their_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Any, patches: int
) -> None:
    """Such a model has no tokenizer; more devices than tokens are left out."""
    tiny("vit", **changes).save_pretrained(tmp_path)
    asked = ["--model", str(tmp_path), "--codebook", "none", "--world-size", "2", "1000000000"]
    found = planned(capsys, *asked)
    assert found["tokens"] == patches
    assert {row["world_size"] for row in found["rows"]} == {2}
