"""Every method as a process of its own, which runs the prompt whenever it is told to.

    python -m bench.rivals.methods SETTINGS

It prints a line of JSON when it is ready, warmed up, and one for each line that it reads: seconds
to the first token, processor seconds, and the token. `python` is that of the rivals where the
method is one; torch is imported by our own only.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

PATIENCE: Final = 1800.0  # seconds
CPU_DEVICE: Final = 0  # ggml's GGML_BACKEND_DEVICE_TYPE_CPU


@dataclass(frozen=True)
class Settings:
    """What a process runs.

    Attributes:
        method: a key of `METHODS`.
        form: what the weights are kept in, by the method's own name.
        threads: which are kept on as many cores, from `core` on.
        folder: of the model; `files` has the rivals' files.
        prompt: a JSON file with "ids" and "words", the tokens' numbers and names.
        rank, addresses, keys, codebook: of our ranks.
        server: host:port of llama.cpp's RPC server.
    """

    method: str
    form: str
    threads: int
    core: int
    folder: str
    files: str
    prompt: str
    rank: int = 0
    addresses: Sequence[str] = ()
    keys: str = ""
    codebook: str = ""
    server: str = ""


# The first token, None on a rank that does not have it, and the seconds that it took.
Once = Callable[[], tuple[int | None, float]]


@contextmanager
def torch_model(setup: Settings) -> Iterator[Once]:
    """The Hugging Face model, eager or compiled."""
    import torch

    from astra_runtime.store import load_model
    from bench.report import quiet_transformers

    quiet_transformers()
    torch.set_num_threads(setup.threads)
    model = load_model(setup.folder)
    run = torch.compile(model) if setup.method == "torch_compiled" else model
    ids = torch.tensor([_prompt(setup)["ids"]])

    def once() -> tuple[int, float]:
        begun = time.monotonic()
        with torch.inference_mode():
            logits = run(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            token = int(logits[0, -1].argmax())
        return token, time.monotonic() - begun

    yield once


@contextmanager
def astra(setup: Settings) -> Iterator[Once]:
    """Our engine, alone or as one of several ranks; all begin at one moment."""
    import torch

    import astra_runtime
    from astra_runtime import Codebook, Engine
    from astra_runtime.steady import keep_memory
    from astra_runtime.store import load_model
    from bench.link.rank import begin
    from bench.report import quiet_transformers

    quiet_transformers()
    keep_memory()  # as the command line does
    torch.set_num_threads(setup.threads)
    model = load_model(setup.folder, dtype=setup.form)
    ids = torch.tensor([_prompt(setup)["ids"]])
    world = len(setup.addresses)
    book = Codebook.from_pretrained(setup.codebook) if world else Codebook.dense()
    if world:
        addresses = list(setup.addresses)
        mesh = astra_runtime.connect(
            setup.rank, world, addresses, timeout=PATIENCE, keys=setup.keys
        )
    else:
        mesh = astra_runtime.local_mesh(1)[0]
    with mesh, Engine(model, book, mesh) as engine:

        def once() -> tuple[int | None, float]:
            begun = begin(mesh) if world else time.monotonic()
            answer = engine(input_ids=ids, outputs="one")
            token = None if answer is None else int(answer.logits[0, -1].argmax())
            seconds = time.monotonic() - begun
            mesh.flush()
            return token, seconds

        yield once


@contextmanager
def ctranslate2_model(setup: Settings) -> Iterator[Once]:
    import ctranslate2

    folder = str(Path(setup.files) / "ctranslate2")
    generator = ctranslate2.Generator(
        folder, device="cpu", compute_type=setup.form, intra_threads=setup.threads, inter_threads=1
    )
    words = _prompt(setup)["words"]

    def once() -> tuple[int, float]:
        begun = time.monotonic()
        answer = generator.generate_batch(
            [words], max_length=1, sampling_topk=1, include_prompt_in_result=False, end_token=[]
        )
        return answer[0].sequences_ids[0][0], time.monotonic() - begun

    yield once


@contextmanager
def llama_cpp_model(setup: Settings) -> Iterator[Once]:
    """Of an RPC server, if there is one, half of the layers."""
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    asked = llama_cpp.llama_model_default_params()
    asked.n_gpu_layers = 0
    if setup.server:
        devices = (ctypes.c_void_p * 2)(_remote_device(setup.server), None)
        asked.devices = ctypes.cast(devices, ctypes.c_void_p)
    file = Path(setup.files) / f"smollm2-{setup.form}.gguf"
    if setup.server:
        config = json.loads((Path(setup.folder) / "config.json").read_text())
        asked.n_gpu_layers = config["num_hidden_layers"] // 2
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), asked)
    if not model:
        raise RuntimeError(f"llama.cpp could not load {file}")
    ids = _prompt(setup)["ids"]
    context_asked = llama_cpp.llama_context_default_params()
    context_asked.n_ctx = context_asked.n_batch = len(ids)
    context_asked.n_threads = context_asked.n_threads_batch = setup.threads
    context = llama_cpp.llama_init_from_model(model, context_asked)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    tokens = (llama_cpp.llama_token * len(ids))(*ids)

    def once() -> tuple[int, float]:
        begun = time.monotonic()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode: status {status}")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        token = int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())
        return token, time.monotonic() - begun

    yield once


def _ggml() -> Any:
    """The library below llama.cpp, which its Python package does not bind."""
    import llama_cpp

    names = ("libggml-base.so", "libggml-rpc.so", "libggml.so")
    folder = Path(llama_cpp.__file__).parent / "lib"
    base, rpc, ggml = (ctypes.CDLL(str(folder / name)) for name in names)
    pointer = ctypes.c_void_p
    functions: dict[str, tuple[Any, Any, list[Any]]] = {
        "add_server": (rpc.ggml_backend_rpc_add_server, pointer, [ctypes.c_char_p]),
        "register": (ggml.ggml_backend_register, None, [pointer]),
        "device_of": (base.ggml_backend_reg_dev_get, pointer, [pointer, ctypes.c_size_t]),
        "device_of_kind": (ggml.ggml_backend_dev_by_type, pointer, [ctypes.c_int]),
        "serve": (
            rpc.ggml_backend_rpc_start_server,
            None,
            [ctypes.c_char_p, ctypes.c_char_p, *[ctypes.c_size_t] * 2, ctypes.POINTER(pointer)],
        ),
    }
    for function, result, arguments in functions.values():
        function.restype, function.argtypes = result, arguments
    return {name: function for name, (function, _, _) in functions.items()}


def _remote_device(server: str) -> int:
    host, _, port = server.rpartition(":")
    deadline = time.monotonic() + PATIENCE
    while True:  # the server may still be loading its library
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    ggml = _ggml()
    registered = ggml["add_server"](server.encode())
    if not registered:
        raise RuntimeError(f"llama.cpp found no RPC server at {server}")
    ggml["register"](registered)
    return int(ggml["device_of"](registered, 0))


def serve_llama_cpp(setup: Settings, out: TextIO) -> None:
    """The RPC server, until the process is ended."""
    ggml = _ggml()
    devices = (ctypes.c_void_p * 1)(ggml["device_of_kind"](CPU_DEVICE))
    print(json.dumps({"ready": True}), file=out, flush=True)
    ggml["serve"](setup.server.encode(), None, setup.threads, 1, devices)
    raise RuntimeError(f"llama.cpp's RPC server at {setup.server} has ended")


METHODS: Final = {
    "torch_eager": torch_model,
    "torch_compiled": torch_model,
    "astra": astra,
    "ctranslate2": ctranslate2_model,
    "llama_cpp": llama_cpp_model,
    "llama_cpp_rpc": llama_cpp_model,
}
SERVER: Final = "llama_cpp_server"


def _prompt(setup: Settings) -> Any:
    return json.loads(Path(setup.prompt).read_text())


def _private_output() -> TextIO:
    """Where answers go; what libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def main(setup: Settings) -> None:
    cores = sorted(os.sched_getaffinity(0))
    chosen = {cores[(setup.core + n) % len(cores)] for n in range(setup.threads)}
    os.sched_setaffinity(0, chosen)
    out = _private_output()
    if setup.method == SERVER:
        serve_llama_cpp(setup, out)
        return
    with METHODS[setup.method](setup) as once:
        once()
        print(json.dumps({"ready": True}), file=out, flush=True)
        for _ in sys.stdin:
            used = time.process_time()
            token, seconds = once()
            answer = {
                "seconds": None if token is None else seconds,
                "processor": time.process_time() - used,
                "token": token,
            }
            print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main(Settings(**json.loads(sys.argv[1])))
