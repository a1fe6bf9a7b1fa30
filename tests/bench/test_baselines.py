"""The rivals against the single device, against slow references, and their bytes."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import socket
import stat
import struct
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from astra_runtime.models import adapt
from bench import baselines
from bench.baselines import GlooComm, ThreadComm
from bench.baselines.block_parallel import original_layers
from bench.baselines.blocks import Transformer, cut
from bench.baselines.segment_means import segment_sizes
from tests.processes import status
from tests.runtime.models import inputs_for, tiny
from tests.runtime.ranks import together

KINDS = ("vit", "gpt2", "llama")
METHODS = baselines.methods()
LAYERS = 4


def model_of(kind: str, **changes: Any) -> Any:
    return tiny(kind, num_hidden_layers=LAYERS, **changes)


def answers(
    world_size: int, run: Callable[..., Any], model: Any, inputs: Any, **options: Any
) -> tuple[list[Tensor | None], list[ThreadComm]]:
    comms = ThreadComm.group(world_size)
    calls = [lambda comm=comm: run(model, inputs, comm, **options) for comm in comms]
    return together(calls), comms


def answer(world_size: int, run: Callable[..., Any], *arguments: Any, **options: Any) -> Tensor:
    """The logits, which are the same on every rank that has them."""
    found = [x for x in answers(world_size, run, *arguments, **options)[0] if x is not None]
    for other in found[1:]:
        assert torch.equal(other, found[0])
    return found[0]


def single(model: Any, inputs: Any) -> Tensor:
    """The model's own answer, by way of all its logits."""
    with torch.inference_mode():
        logits = model(**inputs).logits
    return logits if logits.dim() == 2 else logits[:, -1]


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)


# Exact ones


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.exact])
def test_exact_methods_equal_the_single_device(kind: str, name: str) -> None:
    model, inputs = model_of(kind), inputs_for(kind, batch=2)
    for world_size in (1, 2, 3, 4):
        same(answer(world_size, METHODS[name].run, model, inputs), single(model, inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [(1, 2), (5, 1, 3)])
@pytest.mark.parametrize("options", [{"exchange": "hidden"}, {"exchange": "kv"}, None])
def test_uneven_shares_change_nothing(kind: str, weights: Any, options: Any) -> None:
    """`options` None: tensor parallel, whose heads are cut inside a group of grouped queries."""
    model, inputs = model_of(kind), inputs_for(kind)
    run = baselines.tp if options is None else baselines.sp
    found = answer(len(weights), run, model, inputs, weights=weights, **(options or {}))
    same(found, single(model, inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exchange", ["hidden", "kv"])
def test_rounding_what_is_sent_costs_little(kind: str, exchange: str) -> None:
    model, inputs = model_of(kind), inputs_for(kind)
    exact = single(model, inputs)
    errors = [
        float((answer(3, METHODS[name].run, model, inputs, exchange=exchange) - exact).abs().max())
        for name in ("sp", "sp_fp16", "sp_int8")
    ]
    scale = float(exact.abs().max())
    assert errors[0] < 1e-4 * scale < errors[1] < 1e-2 * scale
    assert errors[1] < errors[2] < 1e-1 * scale


# Approximations


APPROXIMATE = [name for name, method in METHODS.items() if not method.exact]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", APPROXIMATE)
def test_one_rank_computes_the_model_itself(kind: str, name: str) -> None:
    model, inputs = model_of(kind), inputs_for(kind)
    same(answer(1, METHODS[name].run, model, inputs), single(model, inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [None, (2, 1, 1)])
def test_settings_without_a_loss_are_exact(kind: str, weights: Any) -> None:
    """As many original layers as layers; as many segments as tokens."""
    model, inputs = model_of(kind), inputs_for(kind)
    for run, options in (
        (baselines.bp, {"blocks": LAYERS}),
        (baselines.bp, {"blocks": LAYERS, "sequence_parallel": True}),
        (baselines.segment_means, {"rate": 1}),
    ):
        same(answer(3, run, model, inputs, weights=weights, **options), single(model, inputs))


def sub_block(kind: str, block: int, model: Any, rank: int, world_size: int) -> torch.nn.Module:
    """Sub-block `rank` of a decoupled layer: a layer of a smaller Hugging Face model."""
    changes = {"hidden_size": 48 // world_size, "num_attention_heads": 6 // world_size}
    changes |= {"n_inner": 4 * 48} if kind == "gpt2" else {}
    changes |= {"num_key_value_heads": 3 // world_size} if kind == "llama" else {}
    layer, whole = adapt(tiny(kind, **changes)).blocks[0], adapt(model).blocks[block]

    def narrower(name: str, large: Tensor, small: Tensor) -> Tensor:
        if "c_attn" in name:  # query, key and value beside each other
            thirds = zip(large.chunk(3, -1), small.chunk(3, -1), strict=True)
            return torch.cat([narrower("", *pair) for pair in thirds], -1)
        for axis, size in enumerate(small.shape):
            start = rank * size if size < large.shape[axis] else 0
            large = large.narrow(axis, start, size)
        return large

    sizes = layer.state_dict()
    found = {name: narrower(name, x, sizes[name]) for name, x in whole.state_dict().items()}
    layer.load_state_dict(found)
    return layer


def run_layer(kind: str, model: Any, layer: Any, hidden: Tensor, positions: Tensor) -> Tensor:
    """A Hugging Face layer over a whole sequence, causal where the family is."""
    rope = adapt(model).rope(positions[None])
    out = layer(hidden, **({"position_embeddings": rope} if kind == "llama" else {}))
    return out if isinstance(out, Tensor) else out[0]


def embedded(kind: str, model: Any, inputs: Any) -> Tensor:
    adapter = adapt(model)
    return model.vit.embeddings(**inputs) if kind == "vit" else adapter.embed(inputs)


def headed(kind: str, model: Any, hidden: Tensor) -> Tensor:
    """The logits, by the model's own final norm and head."""
    if kind == "vit":
        return model.classifier(model.vit.layernorm(hidden)[:, 0])
    norm = model.transformer.ln_f if kind == "gpt2" else model.model.norm
    return model.lm_head(norm(hidden))[:, -1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bp_ag_nb1", "bp_ag_nb2", "bp_sp_nb1", "bp_sp_nb2"])
@torch.inference_mode()
def test_block_parallel_is_narrow_layers_side_by_side(kind: str, name: str) -> None:
    model, inputs = model_of(kind), inputs_for(kind)
    world_size = 3 if kind == "llama" else 2  # which divides the KV heads
    x = embedded(kind, model, inputs)
    positions, originals = torch.arange(x.shape[1]), original_layers(LAYERS, int(name[-1]))
    for index, layer in enumerate(adapt(model).blocks):
        if index in originals:
            x = run_layer(kind, model, layer, x, positions)
            continue
        slices = []
        for rank, channels in enumerate(x.chunk(world_size, -1)):
            narrow = sub_block(kind, index, model, rank, world_size)
            slices.append(run_layer(kind, model, narrow, channels, positions))
        x = torch.cat(slices, -1)
    same(answer(world_size, METHODS[name].run, model, inputs), headed(kind, model, x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"weights": (1, 2, 3, 2)}])
def test_block_parallel_needs_no_even_shares(kind: str, options: Any) -> None:
    """Both kinds compute the same function; four ranks cut six heads and groups of queries."""
    model, inputs = model_of(kind), inputs_for(kind)
    one, other = (
        answer(4, baselines.bp, model, inputs, blocks=2, sequence_parallel=way, **options)
        for way in (False, True)
    )
    same(one, other)


def test_original_layers_end_groups_as_equal_as_they_can_be() -> None:
    assert original_layers(12, 1) == {11}
    assert original_layers(12, 4) == {2, 5, 8, 11}
    assert original_layers(30, 4) == {7, 14, 21, 29}
    assert original_layers(4, 4) == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [(1, 1), (1, 3, 2)])
@torch.inference_mode()
def test_segment_means_are_repeated_tokens(kind: str, weights: Any) -> None:
    """A layer over the rank's own tokens and, in place of each remote token, its segment's mean."""
    model, inputs, rate = model_of(kind), inputs_for(kind), 3
    x = embedded(kind, model, inputs)
    shards = cut(x.shape[1], len(weights), weights)
    positions = torch.arange(x.shape[1], dtype=torch.float32)

    def repeated(x: Tensor, shard: slice) -> Tensor:
        parts = x[shard].split(segment_sizes(shard.stop - shard.start, rate))
        return torch.cat([part.mean(0, keepdim=True).expand_as(part) for part in parts])

    for layer in adapt(model).blocks:
        outs = []
        for shard in shards:
            seen = [s for s in shards if kind == "vit" or s.start <= shard.start]
            context, places = (
                torch.cat([t[s] if s == shard else repeated(t, s) for s in seen])
                for t in (x[0], positions)
            )
            out = run_layer(kind, model, layer, context[None], places)
            outs.append(out[:, shard])
        x = torch.cat(outs, 1)
    found = answer(len(weights), baselines.segment_means, model, inputs, rate=rate, weights=weights)
    same(found, headed(kind, model, x))


# Bytes


LONG, WIDE = 512, 768  # tokens, D


@pytest.fixture(scope="module")
def wide() -> Any:
    """Twelve blocks of ViT-Base's width. On the meta device, where shapes are all there is."""
    sizes = {"hidden_size": WIDE, "num_attention_heads": 12, "n_positions": LONG}
    with torch.device("meta"):
        return tiny("gpt2", num_hidden_layers=12, **sizes)


BITS = {  # that a device sends for a token, over 12 blocks; D = 768, N = 4
    "tp": 73_728,
    "sp": 18_432 * 11 / 12,  # the first block's input is everywhere
    "sp_fp16": 18_432 / 2 * 11 / 12,
    "sp_int8": (18_432 + 24 * 2) / 4 * 11 / 12,  # an fp16 step for D int8 channels
    "bp_ag_nb1": 1_536,
    "bp_ag_nb2": 3_072,
    "bp_ag_nb4": 6_144,
    "bp_sp_nb1": 1_536,
    "bp_sp_nb2": 3_072 + 384,  # an all-to-all on the way back from the first original layer
    "bp_sp_nb4": 6_144 + 3 * 384,
    "segment_means": 144 * 11 / 12,
}


@pytest.mark.parametrize("name", BITS)
def test_bits_a_device_sends(wide: Any, name: str) -> None:
    inputs = {"input_ids": torch.zeros(1, LONG, dtype=torch.int64, device="meta")}
    _, comms = answers(4, METHODS[name].run, wide, inputs)
    for comm in comms:
        assert 8 * comm.bytes_sent / LONG / 12 == pytest.approx(BITS[name], rel=1e-12)


def test_grouped_queries_send_keys_and_values_where_these_are_fewer() -> None:
    model, inputs = model_of("llama", num_key_value_heads=1), inputs_for("llama", 24)
    sent = {}
    for exchange in ("auto", "hidden", "kv"):
        _, comms = answers(3, baselines.sp, model, inputs, exchange=exchange)
        sent[exchange] = [comm.bytes_sent for comm in comms]
    gathers, fan_out, tokens = LAYERS - 1, 2, 8
    assert sent["hidden"] == [gathers * fan_out * tokens * 48 * 4] * 3
    assert sent["auto"] == sent["kv"] == [gathers * fan_out * tokens * 2 * 16 * 4] * 3


@pytest.mark.parametrize("size", [1, 5, 12])
def test_all_reduce_sends_what_a_ring_does(size: int) -> None:
    """2·(N − 1)/N of the tensor, on average; also of a tensor of fewer elements than ranks."""
    comms, world_size = ThreadComm.group(3), 3
    given = [torch.arange(float(size)) * (rank + 1) for rank in range(world_size)]
    calls = [lambda comm=comm: comm.all_reduce(given[comm.rank]) for comm in comms]
    for found in together(calls):
        torch.testing.assert_close(found, sum(given))
    total = sum(comm.bytes_sent for comm in comms)
    assert total == world_size * 2 * (world_size - 1) / world_size * 4 * size


def bytes_at_sockets() -> int:
    """What TCP has sent on this process's connections, its own headers left out.

    `tcpi_bytes_sent` without `tcpi_bytes_retrans` of Linux's struct tcp_info: a busy machine may
    acknowledge so late that TCP sends again, on loopback too.
    """
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # of another kind of socket, or this listing's own
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as found:
                    info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
                    sent, again = struct.unpack_from("=QQ", info, 200)
                    total += sent - again
    return total


GLOO_HEADERS = 3 * 48  # bytes a message: its own header, and both sides announcing their buffers


def gloo_rank(rank: int, world_size: int, folder: str, results: Any) -> None:
    """One process: every method over gloo, what it says it sent, and what its sockets sent."""
    import torch.distributed

    dist: Any = torch.distributed  # of whose names it does not export some
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=60)
    group = dist.ProcessGroupGloo(store, rank, world_size, options)
    model, inputs = model_of("gpt2"), inputs_for("gpt2")
    found = {}
    for name, method in METHODS.items():
        group.barrier().wait()
        before = settled(bytes_at_sockets)
        comm = CountedComm(group)
        logits = method.run(model, inputs, comm)
        carried = settled(bytes_at_sockets) - before
        logits = None if logits is None else logits.numpy()
        found[name] = (logits, comm.bytes_sent, comm.messages, carried)
        group.barrier().wait()  # of others, who may still be at this method
    results.put((rank, found))


class CountedComm(GlooComm):
    """Counts messages, too."""

    messages = 0

    def exchange(self, parts: Any, shapes: Any) -> list[Tensor]:
        self.messages += sum(part.numel() > 0 for n, part in enumerate(parts) if n != self.rank)
        return super().exchange(parts, shapes)


def settled(read: Callable[[], int]) -> int:
    """The value once it grows no more: gloo's threads send on their own, until they all sleep."""
    own = str(threading.get_native_id())
    while True:
        value = read()
        time.sleep(0.005)
        others = [status(f"self/task/{n}") for n in os.listdir("/proc/self/task") if n != own]
        if all(found[:1] in ([], ["S"]) for found in others) and read() == value:
            return value


def test_over_gloo_the_sockets_carry_what_is_counted(tmp_path: Path) -> None:
    world_size = 3
    context = multiprocessing.get_context("fork")  # torch is imported already
    results = context.Queue()
    processes = [
        context.Process(target=gloo_rank, args=(n, world_size, str(tmp_path), results), daemon=True)
        for n in range(world_size)
    ]
    with warnings.catch_warnings():  # of threads in this process, which are idle
        warnings.simplefilter("ignore", DeprecationWarning)
        for process in processes:
            process.start()
    ranks = dict(results.get(timeout=200) for _ in processes)
    for process in processes:
        process.join(60)
    model, inputs = model_of("gpt2"), inputs_for("gpt2")
    for name, method in METHODS.items():
        found, comms = answers(world_size, method.run, model, inputs)
        expected = next(logits for logits in found if logits is not None)
        for rank, comm in enumerate(comms):
            logits, counted, messages, carried = ranks[rank][name]
            if logits is not None:
                same(torch.from_numpy(logits), expected)
            assert counted == comm.bytes_sent
            assert counted <= carried <= counted + GLOO_HEADERS * messages
            assert counted > 0 or name in ("single", "bp_ag_nb4")


# What is shared, and what is refused


def test_weights_are_views_of_the_model_and_die_with_it() -> None:
    model, inputs = model_of("gpt2"), inputs_for("gpt2")
    first = Transformer.of(model)
    assert Transformer.of(model) is first
    pointers = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for block in first.blocks:
        for linear in (block.query, block.key, block.value, block.output, block.up, block.down):
            assert linear.weight.untyped_storage().data_ptr() in pointers
    model.double()
    assert answer(2, baselines.tp, model, inputs).dtype == torch.float64
    gone = weakref.ref(model)
    del model, first, block, linear
    gc.collect()
    assert gone() is None


def test_what_cannot_be_cut_is_refused() -> None:
    gpt2, inputs = model_of("gpt2"), inputs_for("gpt2")
    one, many = ThreadComm.group(1)[0], ThreadComm.group(7)[0]
    with pytest.raises(ValueError, match=r"world_size: expected at most 6 ranks, got 7"):
        baselines.tp(gpt2, inputs, many)
    with pytest.raises(ValueError, match=r"blocks: expected 1 to 4"):
        baselines.bp(gpt2, inputs, one, blocks=5)
    with pytest.raises(ValueError, match=r"dtype: expected one of float32, float16, int8"):
        baselines.sp(gpt2, inputs, one, dtype="int4")
    with pytest.raises(ValueError, match=r"exchange: expected one of auto, hidden, kv"):
        baselines.sp(gpt2, inputs, one, exchange="keys")
    with pytest.raises(ValueError, match=r"rate: expected at least 1"):
        baselines.segment_means(gpt2, inputs, one, rate=0.5)
    with pytest.raises(ValueError, match=r"without padding"):
        baselines.sp(gpt2, inputs | {"attention_mask": torch.ones(1, 23)}, one)
    with pytest.raises(ValueError, match=r"model: expected one of vit, gpt2, llama, got 'bert'"):
        baselines.tp(tiny("bert"), inputs_for("bert"), one)
    with pytest.raises(ValueError, match=r"tensor: expected shape \(2, 3\) on rank 0, got \(3,\)"):
        one.all_gather(torch.zeros(3), [(2, 3)])


def test_the_names_of_reports() -> None:
    assert list(METHODS) == ["single", *BITS]
    assert [name for name, method in METHODS.items() if method.exact] == ["single", "tp", "sp"]
