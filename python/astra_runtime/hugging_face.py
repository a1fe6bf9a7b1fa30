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
from torch import Tensor, nn

from .decoding import DEFAULT_NEW_TOKENS, Generation, end_tokens
from .inputs import check_function, check_integer
from .sessions.several import draw_several

# What a call may be told, and the only values that say what happens anyway.
_CALL = {
    "use_cache": (False, "sessions keep what was read (`engine.session()`)"),
    "output_attentions": (False, "no rank has the weights of all tokens"),
    "output_hidden_states": (False, "no rank has the states of all tokens"),
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
    as_tuple = left.pop("return_dict", None) is False
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
)
DEFAULT_TOP_K = 50  # of `model.generate`


@dataclass(frozen=True)
class Asked:
    """What a generation was asked for in Hugging Face's words.

    Attributes:
        choose, stop: as `Engine.generate` takes them; None: its own.
        warp: what `choose` does to the logits before it draws, where any row may be drawn by
            itself; None: it is not to draw, or a function of the host's own takes part.
        returned: answers for each row of the prompt.
        pad: what stands behind the end of a finished row; None: the end token again.
        streamer: hears of the prompt and of every token.
    """

    max_new_tokens: int | None = None
    eos_token_id: Any = None
    choose: Callable[[Tensor, Tensor], Tensor] | None = None
    stop: Callable[[Tensor], bool] | None = None
    warp: Callable[[Tensor, Tensor], Tensor] | None = None
    returned: int = 1
    pad: int | None = None
    streamer: Any = None


def generate_as_asked(
    engine: Any, input_ids: Tensor, config: Any, keywords: Mapping[str, Any], **plain: Any
) -> Tensor:
    """`engine.generate` with a generation config and Hugging Face's keywords.

    Args:
        plain: keywords of `engine.generate` itself, which count before those of the config.
    """
    asked = generation_arguments(engine.model, input_ids, config, keywords)
    for name in ("choose", "stop"):
        if getattr(asked, name) is not None and plain[name] is not None:
            raise ValueError(
                f"{name}: expected alone, without Hugging Face's keywords for the same"
            )
    plain = {name: value for name, value in plain.items() if value is not None}
    from_config = {"max_new_tokens": asked.max_new_tokens, "eos_token_id": asked.eos_token_id}
    from_config |= {"choose": asked.choose, "stop": asked.stop}
    options = {name: value for name, value in from_config.items() if value is not None} | plain
    prompt = input_ids
    if asked.returned > 1 and isinstance(input_ids, Tensor):
        if asked.choose is None:
            raise ValueError(
                "num_return_sequences: expected 1 without do_sample, as all were alike"
            )
        prompt = input_ids.repeat_interleave(asked.returned, 0)
        if "attention_mask" in options:
            options["attention_mask"] = options["attention_mask"].repeat_interleave(
                asked.returned, 0
            )
    if (streamer := asked.streamer) is not None:
        options["on_token"] = _streaming(streamer, prompt, options.get("on_token"))
    if asked.returned > 1 and asked.warp is not None and _is_for_all(engine, input_ids, options):
        ids = _draw_several(engine, input_ids, asked, options)
    else:
        ids = engine.generate(prompt, **options)
    if streamer is not None:
        streamer.end()
    ends = end_tokens(engine.model, options.get("eos_token_id"), engine.model.config.vocab_size)
    return _padded(ids, prompt.shape[1], ends, asked.pad)


def _is_for_all(engine: Any, input_ids: Any, options: Mapping[str, Any]) -> bool:
    """Whether every rank can draw some of several answers: to one prompt, without padding."""
    mesh = engine.mesh
    if mesh.world_size == 1 or not mesh.resumes or "stop" in options or "on_block" in options:
        return False
    if not (engine.adapter.causal and engine.codec.keeps_sessions and engine.on_missing == "raise"):
        return False
    mask = options.get("attention_mask")
    whole = mask is None or (isinstance(mask, Tensor) and bool((mask == 1).all()))
    return isinstance(input_ids, Tensor) and input_ids.shape[:1] == (1,) and whole


def _draw_several(
    engine: Any, input_ids: Tensor, asked: Asked, options: Mapping[str, Any]
) -> Tensor:
    """`engine.generate` of several answers to one prompt, each drawn by a rank."""
    most = check_integer("max_new_tokens", options.get("max_new_tokens", DEFAULT_NEW_TOKENS), 1)
    ends = end_tokens(engine.model, options.get("eos_token_id"), engine.model.config.vocab_size)
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
        Generation(most, ends, None, options.get("on_token")),
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
    model: nn.Module, input_ids: Tensor, config: Any, keywords: Mapping[str, Any]
) -> Asked:
    """From a `GenerationConfig` (None: the model's own) and the keywords of `model.generate`.

    Raises:
        TypeError: a keyword that there is not.
        ValueError: one that has no effect here (beams, assistants …), by name.
    """
    keywords = dict(keywords)
    for name in _REFUSED:
        if keywords.pop(name, None):
            raise ValueError(f"{name}: expected none, as the engine does without, got one")
    functions = {name: keywords.pop(name, None) for name in _FUNCTIONS}
    _check_functions(functions)
    if config is not None and not hasattr(config, "to_diff_dict"):
        raise TypeError(
            "generation_config: expected transformers' GenerationConfig, got "
            f"{type(config).__name__}"
        )
    given: Any = copy.deepcopy(
        getattr(model, "generation_config", None) if config is None else config
    )
    for name, value in keywords.items():
        if given is None or not hasattr(given, name):
            raise TypeError(f"generate: expected keywords of Hugging Face's generate, got {name!r}")
        setattr(given, name, value)
    if given is not None:
        _check_config(given, keywords)
    processors = _processors(given, input_ids.shape[1], model)
    processors += list(functions["logits_processor"] or [])
    criteria = list(functions["stopping_criteria"] or [])
    sample = bool(getattr(given, "do_sample", False))
    own = functions["logits_processor"]
    returned = getattr(given, "num_return_sequences", None)
    return Asked(
        _new_tokens(given, input_ids.shape[1]),
        getattr(given, "eos_token_id", None),
        _chooser(processors, sample) if processors or sample else None,
        _stopper(criteria) if criteria else None,
        _warper(processors) if sample and not own else None,
        1 if returned is None else check_integer("num_return_sequences", returned, 1),
        getattr(given, "pad_token_id", None),
        functions["streamer"],
    )


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
    if whole <= tokens:
        raise ValueError(
            f"max_length: expected more than the prompt's {tokens} tokens, got {whole}"
        )
    return int(whole) - tokens


def _processors(config: Any, tokens: int, model: nn.Module) -> list[Any]:
    """In the order of `model.generate`."""
    from transformers.generation import logits_process as hf

    def value(name: str) -> Any:
        return getattr(config, name, None)

    ends = value("eos_token_id")
    device = str(next(model.parameters()).device)
    made: list[Any] = []
    if value("repetition_penalty") not in (None, 1.0):
        made.append(hf.RepetitionPenaltyLogitsProcessor(value("repetition_penalty")))
    if value("no_repeat_ngram_size"):
        made.append(hf.NoRepeatNGramLogitsProcessor(value("no_repeat_ngram_size")))
    if value("bad_words_ids"):
        made.append(hf.NoBadWordsLogitsProcessor(value("bad_words_ids"), ends))
    if value("min_new_tokens") and ends is not None:
        made.append(
            hf.MinNewTokensLengthLogitsProcessor(
                tokens, value("min_new_tokens"), ends, device=device
            )
        )
    if value("suppress_tokens"):
        made.append(hf.SuppressTokensLogitsProcessor(value("suppress_tokens"), device=device))
    if not value("do_sample"):
        return made
    if value("temperature") not in (None, 1.0):
        made.append(hf.TemperatureLogitsWarper(value("temperature")))
    top_k = DEFAULT_TOP_K if value("top_k") is None else value("top_k")
    if top_k:
        made.append(hf.TopKLogitsWarper(top_k))
    if value("top_p") is not None and value("top_p") < 1:
        made.append(hf.TopPLogitsWarper(value("top_p")))
    if value("min_p") is not None:
        made.append(hf.MinPLogitsWarper(value("min_p")))
    if value("typical_p") is not None and value("typical_p") < 1:
        made.append(hf.TypicalLogitsWarper(value("typical_p")))
    return made


def _warper(processors: Sequence[Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def warp(ids: Tensor, logits: Tensor) -> Tensor:
        for processor in processors:
            logits = processor(ids, logits)
        return logits

    return warp


def _chooser(processors: Sequence[Any], sample: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Draws as `model.generate` does, from torch's own generator."""

    warp = _warper(processors)

    def choose(ids: Tensor, logits: Tensor) -> Tensor:
        logits = warp(ids, logits)
        if not sample:
            return logits.argmax(-1)
        return torch.multinomial(logits.softmax(-1), 1)[:, 0]

    return choose


def _stopper(criteria: Sequence[Any]) -> Callable[[Tensor], bool]:
    def stop(ids: Tensor) -> bool:
        """Whether every row is ended by one of the criteria."""
        ended = torch.zeros(len(ids), dtype=torch.bool, device="cpu")
        for criterion in criteria:
            ended |= torch.as_tensor(criterion(ids, None)).cpu()
        return bool(ended.all())

    return stop


def _padded(ids: Tensor, prompt: int, ends: Sequence[int], pad: int | None) -> Tensor:
    """`ids` [B, T] with `pad` behind the end token of each row that has ended."""
    if pad is None or not ends:
        return ids
    answer = ids[:, prompt:]
    ended = torch.isin(answer, torch.tensor(list(ends), device=ids.device)).long()
    behind = ended.cumsum(1) > ended
    return torch.cat([ids[:, :prompt], answer.masked_fill(behind, pad)], 1)
