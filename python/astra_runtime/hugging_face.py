"""Arguments as Hugging Face scripts give them: taken where they mean something here, else refused.

A call's are `use_cache=False`, `return_dict`, `labels` and so on; a generation's are those of
`GenerationConfig` and of the keywords of `model.generate`. What is refused is refused by name,
before anything is sent.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .decoding import DEFAULT_NEW_TOKENS, Generation, end_tokens
from .engine_parts import EngineParts
from .inputs import (
    check_function,
    check_inputs,
    check_integer,
    inferred_mask,
    num_leading_padding,
)
from .models import vocabulary_of
from .processors import chooser, processors, warper, warpers, with_own
from .sessions.several import draw_several
from .stopping import Stopping

# What a call may be told, and the only values that say what happens anyway.
_CALL = {
    "use_cache": (False, "sessions keep what was read (`engine.session()`)"),
    "output_attentions": (False, "no rank has the weights of all tokens"),
    "output_hidden_states": (False, "no rank has the states of all tokens"),
    "interpolate_pos_encoding": (False, "pictures have the size that the model was made for"),
}
_NOT_OF_A_CALL = {
    "labels": "compute the loss from the logits of logits='all'",
    "past_key_values": "sessions keep what was read (`engine.session()`)",
    "cache": "sessions keep what was read (`engine.session()`)",
    "cache_position": "positions follow from input_ids and attention_mask",
    "position_ids": "positions follow from input_ids and attention_mask",
    "inputs_embeds": "ranks compare token ids, and embed them themselves",
    "head_mask": "attention runs over all heads",
    "encoder_hidden_states": "the engine runs encoders and decoders, not both",
}


def call_arguments(inputs: dict[str, Any]) -> tuple[dict[str, Any], str | None, bool]:
    """What is left as inputs, which logits were asked for by `logits_to_keep`, and whether the
    output is to be a tuple.

    Raises:
        ValueError: an argument that the engine does not take, or not with this value.
    """
    left = dict(inputs)
    for name, (value, instead) in _CALL.items():
        given = left.pop(name, None)
        if given is not None and not (isinstance(given, int) and bool(given) is value):
            raise ValueError(f"{name}: expected {value}, got {given!r}: {instead}")
    for name, instead in _NOT_OF_A_CALL.items():
        if left.pop(name, None) is not None:
            raise ValueError(f"{name}: expected none, got one: {instead}")
    as_dict = left.pop("return_dict", None)
    as_tuple = as_dict is not None and not as_dict
    keep, logits = left.pop("logits_to_keep", None), None
    if keep is not None:
        if not isinstance(keep, int) or isinstance(keep, bool) or keep not in (0, 1):
            raise ValueError(
                f"logits_to_keep: expected 0 (all) or 1 (the last token's), got {keep!r}"
            )
        logits = "last" if keep else "all"
    return left, logits, as_tuple


# Fields of GenerationConfig that have their effect here.
_SAMPLING = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"),
    *("no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "min_new_tokens"),
)
_LENGTHS = ("max_new_tokens", "max_length", "num_return_sequences")
_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")
# That say what happens anyway, or nothing that matters; and the values with which others do.
_WITHOUT_EFFECT = (
    *("transformers_version", "_from_model_config", "cache_implementation", "cache_config"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size"),
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_cache": (True, False),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "early_stopping": (False,),
    "length_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "renormalize_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "return_dict_in_generate": (False,),
    "remove_invalid_values": (False,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "is_assistant": (False,),
    "low_memory": (False,),
    "disable_compile": (True, False),
    "min_length": (0,),
    "token_healing": (False,),
    "guidance_scale": (1.0,),
}
_FUNCTIONS = ("logits_processor", "stopping_criteria", "streamer")
_REFUSED = (
    *("assistant_model", "prefix_allowed_tokens_fn", "negative_prompt_ids", "synced_gpus"),
    *("negative_prompt_attention_mask", "custom_generate", "inputs_embeds", "past_key_values"),
    "cache",
)


@dataclass(frozen=True)
class Asked:
    """What a generation was asked for in Hugging Face's words.

    Attributes:
        ends: tokens that end a row.
        choose: as `Engine.generate` takes it; None: its own.
        criteria: that end a row, of the host's own.
        warp: what `choose` does to the logits before it draws, where any row may be drawn by
            itself; None: it is not to draw, or a function of the host's own takes part.
        sampling: what `warp` does, in words.
        returned: answers for each row of the prompt.
        pad: what stands behind the end of a finished row; None: the end token again.
        streamer: is given the prompt and every token.
        mask: the attention mask, given or inferred.
    """

    max_new_tokens: int | None
    ends: tuple[int, ...]
    choose: Callable[[Tensor, Tensor], Tensor] | None
    criteria: Sequence[Callable[..., Any]]
    warp: Callable[[Tensor, Tensor], Tensor] | None
    sampling: str
    returned: int
    pad: int | None
    streamer: Any
    mask: Tensor


def generate_as_asked(
    engine: Any, input_ids: Tensor, config: Any, keywords: Mapping[str, Any], **plain: Any
) -> Tensor:
    """`engine.generate` with a generation config and Hugging Face's keywords.

    Args:
        plain: keywords of `engine.generate` itself, which count before those of the config.
    """
    inputs = {"input_ids": input_ids, "attention_mask": plain["attention_mask"]}
    check_inputs(engine.adapter, inputs)
    asked = generation_arguments(engine.model, input_ids, config, keywords, plain)
    for name, other in (("choose", asked.choose), ("stop", asked.criteria)):
        if other and plain[name] is not None:
            raise ValueError(
                f"{name}: expected alone, without Hugging Face's keywords for the same"
            )
    if asked.returned > 1 and asked.choose is None:
        raise ValueError("num_return_sequences: expected 1 without do_sample, as all were alike")
    options = _options(asked, plain)
    prompt = input_ids.repeat_interleave(asked.returned, 0)
    if (streamer := asked.streamer) is not None:
        options["on_token"] = _streaming(streamer, prompt, options.get("on_token"))
    if asked.returned > 1 and asked.warp is not None and _is_for_all(engine, input_ids, options):
        ids = _draw_several(engine, input_ids, asked, options)
    else:
        ids = engine.generate(prompt, **options)
    if streamer is not None:
        streamer.end()
    return _padded(ids, prompt.shape[1], asked.ends, asked.pad)


def _options(asked: Asked, plain: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords with which `engine.generate` does what was asked for."""
    options = {name: value for name, value in plain.items() if value is not None}
    own: dict[str, Any] = {"max_new_tokens": asked.max_new_tokens, "choose": asked.choose}
    own |= {"attention_mask": asked.mask.repeat_interleave(asked.returned, 0)}
    options |= {name: value for name, value in own.items() if value is not None}
    options["eos_token_id"] = asked.ends
    if asked.criteria:
        choose = options.get("choose")
        check_function("choose", choose)
        stopping = Stopping(asked.criteria, asked.ends, asked.pad)
        options |= {"choose": stopping.filling(choose), "stop": stopping.stop}
    return options


def _is_for_all(engine: EngineParts, input_ids: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether every rank can draw some of several answers: to one prompt, without padding."""
    mesh = engine.mesh
    if mesh.world_size == 1 or not mesh.resumes or "stop" in options or "on_block" in options:
        return False
    if not (engine.adapter.causal and engine.codec.keeps_sessions and engine.on_missing == "raise"):
        return False
    return len(input_ids) == 1 and bool((options["attention_mask"] != 0).all())


def _draw_several(
    engine: Any, input_ids: Tensor, asked: Asked, options: Mapping[str, Any]
) -> Tensor:
    """`engine.generate` of several answers to one prompt, each drawn by a rank."""
    most = check_integer("max_new_tokens", options.get("max_new_tokens", DEFAULT_NEW_TOKENS), 1)
    check_function("on_token", options.get("on_token"))
    assert asked.warp is not None
    start = time.perf_counter()
    engine.bits_per_token_block = engine.bits_per_receiver = 0.0  # unless ranks exchange codes
    ids = draw_several(
        engine,
        engine.session(),
        input_ids,
        asked.returned,
        asked.warp,
        Generation(most, asked.ends, None, options.get("on_token")),
        named=asked.sampling,
        request=options.get("request"),
        within_ms=options.get("within_ms"),
    )
    engine.seconds = time.perf_counter() - start
    return ids


def _streaming(
    streamer: Any, prompt: Tensor, also: Callable[[Tensor], None] | None
) -> Callable[[Tensor], None]:
    begun = False

    def on_token(token: Tensor) -> None:
        nonlocal begun
        if not begun:
            streamer.put(prompt.cpu())
            begun = True
        streamer.put(token.cpu())
        if also is not None:
            also(token)

    return on_token


def generation_arguments(
    model: Any,
    input_ids: Tensor,
    config: Any,
    keywords: Mapping[str, Any],
    plain: Mapping[str, Any],
) -> Asked:
    """From a `GenerationConfig` (None: the model's own) and the keywords of `model.generate`.

    `plain`: those of them that `engine.generate` has as its own; None: not given.

    Raises:
        TypeError: a keyword that there is not.
        ValueError: one that has no effect here (beams, assistants …), by name.
    """
    keywords = dict(keywords)
    for name in _REFUSED:
        value = keywords.pop(name, None)
        if value is not None and value is not False:  # an empty cache is one, too
            raise ValueError(f"{name}: expected none, as the engine does without, got one")
    functions = {name: keywords.pop(name, None) for name in _FUNCTIONS}
    _check_functions(functions)
    given = _config(model, config, keywords, plain)
    ends = plain["eos_token_id"]
    ends = getattr(given, "eos_token_id", None) if ends is None else ends
    ends = end_tokens(model, ends, vocabulary_of(model))
    pad, mask = getattr(given, "pad_token_id", None), plain["attention_mask"]
    if pad is not None:
        pad = check_integer("pad_token_id", pad, -1)  # as some configurations have it
    mask = inferred_mask(input_ids, pad, ends) if mask is None else mask
    mask = torch.ones_like(input_ids) if mask is None else mask
    returned = getattr(given, "num_return_sequences", None)
    returned = 1 if returned is None else check_integer("num_return_sequences", returned, 1)
    sample, own = bool(getattr(given, "do_sample", False)), functions["logits_processor"]
    padding = num_leading_padding(mask, returned)
    made = with_own(processors(given, input_ids.shape[1], model, ends, padding), own or [])
    made += warpers(given) if sample else []
    return Asked(
        _new_tokens(given, input_ids.shape[1]),
        ends,
        chooser(made, sample) if made or sample else None,
        list(functions["stopping_criteria"] or []),
        warper(made) if sample and not own else None,
        str({name: getattr(given, name, None) for name in _SAMPLING}),
        returned,
        pad,
        functions["streamer"],
        mask,
    )


def _config(model: Any, config: Any, keywords: Mapping[str, Any], plain: Mapping[str, Any]) -> Any:
    """A copy of the generation config that counts: `config`, what it does not say by the model's
    own, then the keywords. None: there is none."""
    if config is not None and not hasattr(config, "to_diff_dict"):
        raise TypeError(
            "generation_config: expected transformers' GenerationConfig, got "
            f"{type(config).__name__}"
        )
    own: Any = getattr(model, "generation_config", None)
    given: Any = copy.deepcopy(own if config is None else config)
    for name, value in vars(own).items() if config is not None and own is not None else ():
        if not name.startswith("_") and getattr(given, name, None) is None:
            setattr(given, name, copy.deepcopy(value))
    for name, value in keywords.items():
        if given is None or not hasattr(given, name):
            raise TypeError(f"generate: expected keywords of Hugging Face's generate, got {name!r}")
        setattr(given, name, value)
    if given is not None:
        _check_config(given, keywords)
        for name in ("max_new_tokens", "eos_token_id"):
            if plain[name] is not None:
                setattr(given, name, plain[name])
    return given


def _check_functions(functions: Mapping[str, Any]) -> None:
    for name in ("logits_processor", "stopping_criteria"):
        listed = functions[name]
        if listed is None or (isinstance(listed, list | tuple) and all(map(callable, listed))):
            continue
        raise TypeError(f"{name}: expected a list of functions, got {type(listed).__name__}")
    streamer = functions["streamer"]
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TypeError(
            f"streamer: expected an object with put and end, got {type(streamer).__name__}"
        )


def _check_config(config: Any, keywords: Mapping[str, Any]) -> None:
    known = {*_SAMPLING, *_LENGTHS, *_TOKENS, *_WITHOUT_EFFECT}
    for name, value in config.to_diff_dict().items():
        if value is None or name in known or value in _NEUTRAL.get(name, ()):
            continue
        where = name if name in keywords else f"generation_config.{name}"
        neutral = " or ".join(map(repr, _NEUTRAL.get(name, (None,))))
        raise ValueError(
            f"{where}: expected {neutral}, as the engine does nothing else, got {value!r}"
        )


def _new_tokens(config: Any, tokens: int) -> int | None:
    asked, whole = (getattr(config, name, None) for name in ("max_new_tokens", "max_length"))
    if asked is not None or whole is None:
        return asked
    if check_integer("max_length", whole, 0) <= tokens:
        raise ValueError(
            f"max_length: expected more than the prompt's {tokens} tokens, got {whole}"
        )
    return int(whole) - tokens


def _padded(ids: Tensor, prompt: int, ends: Sequence[int], pad: int | None) -> Tensor:
    """`ids` [B, T] with `pad` behind the end token of each row that has ended."""
    if pad is None or not ends:
        return ids
    answer = ids[:, prompt:]
    ended = torch.isin(answer, torch.tensor(list(ends), device=ids.device)).long()
    behind = ended.cumsum(1) > ended
    return torch.cat([ids[:, :prompt], answer.masked_fill(behind, pad)], 1)
