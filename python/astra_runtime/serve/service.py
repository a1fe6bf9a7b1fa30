"""What a service offers, whatever is in front of it: requests, events, errors.

Nothing here knows HTTP or torch. `astra serve` puts an OpenAI-compatible server in front of a
`Service`; a service of one's own calls the same methods.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ..errors import AstraError

STARTING, CLOSING = "the service is starting", "the service is shutting down"


class QueueFull(AstraError):
    """More requests wait than the service takes. `retry_after`: seconds to try again after."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(waiting, retry_after)
        self.waiting, self.retry_after = waiting, retry_after

    def __str__(self) -> str:
        return f"{self.waiting} requests wait already; try again in {self.retry_after:.0f} s"


class NotReady(AstraError):
    """The service cannot answer just now: it loads, or a device is away, as the sentence says."""


class RequestRefused(AstraError, ValueError):
    """A request that this service cannot answer, whenever it is asked.

    Attributes:
        param: the argument that is wrong.
        code: a short name, such as "context_length_exceeded"; None: there is none.
    """

    def __init__(self, param: str, message: str, code: str | None = None) -> None:
        super().__init__(param, message, code)
        self.param, self.message, self.code = param, message, code

    def __str__(self) -> str:
        return self.message


class ServiceFailed(AstraError):
    """A request that had begun could not be finished: a device was lost, for example."""


class TimeIsUp(ServiceFailed):
    """A request was not finished within its `within_s`."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The same seed, prompt and rank give the same tokens.

    Attributes:
        temperature: 0: always the likeliest token.
        top_p: of the likeliest tokens, those whose probabilities add up to so much.
        top_k: so many of the likeliest tokens; None: all.
        seed: None: another one for every request.
        presence_penalty, frequency_penalty: taken from the logit of a token that was generated
            before, once and for each time, −2 to 2.
        logit_bias: added to the logits of these tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt to continue.

    Attributes:
        id: names the request in logs; unique.
        prompt_ids: at least one token.
        max_new_tokens: None: as many as the model's context and the devices' memory have room for.
        stop: texts that end the answer and are not part of it.
        n: answers, each with its `index`; they draw with seed, seed + 1, …. Each is
            decoded by one rank, not all by the same.
        top_logprobs: how many alternatives each token names, 0 to 20; None: no log-probabilities.
        within_s: seconds from now until the answer has to be whole; None: no limit.
        fresh: read the whole prompt anew, whatever is kept of earlier requests.
        degrade: rather an answer that lacks tokens of a device than an error, where the service may
            leave out a device that is late or lost (`Engine(on_missing="degrade")`).
        trace: keep a timeline of this request, for `Done`.
    """

    id: str
    prompt_ids: Sequence[int] = field(hash=False)
    max_new_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop: Sequence[str] = field(default=(), hash=False)
    n: int = 1
    top_logprobs: int | None = None
    within_s: float | None = None
    fresh: bool = False
    degrade: bool = False
    trace: bool = False


@dataclass(frozen=True)
class Token:
    """One new token of answer `index`.

    Attributes:
        text: what can be shown by now: empty in the middle of a character, and while the text might
            become a stop text. The pieces of all tokens and of `Done` are the whole answer.
        logprob: natural log of its probability before temperature and penalties; None: not asked.
        top: the likeliest tokens and their log-probabilities, most likely first.
    """

    index: int
    id: int
    text: str
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = field(default=(), hash=False)


@dataclass(frozen=True)
class Span:
    """What a rank did: `name` from `start` to `stop`, in seconds from the timeline's beginning."""

    rank: int
    name: str
    start: float
    stop: float


@dataclass(frozen=True)
class Done:
    """Answer `index` is whole. After the last one the stream ends.

    Attributes:
        finish_reason: "stop": an end token or a stop text; "length": `max_new_tokens`.
        text: the last piece, what `Token.text` had held back.
        prompt_tokens, completion_tokens: counts; an end token counts as a token of the answer.
        cached_tokens: of the prompt's, those that were known from earlier requests.
        coded_tokens: of the prompt's, those that the answering rank knew as codes only.
        degraded: the answer lacks tokens of a device that was late or lost.
        rank: which device has given this answer.
        seconds_queued, seconds_to_first_token, seconds: from the request's arrival.
        timeline: what the ranks did for the request, where it asked for `trace`.
    """

    index: int
    finish_reason: Literal["stop", "length"]
    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    coded_tokens: int = 0
    degraded: bool = False
    rank: int = 0
    seconds_queued: float = 0.0
    seconds_to_first_token: float = 0.0
    seconds: float = 0.0
    timeline: Sequence[Span] = field(default=(), hash=False)


Event = Token | Done


@dataclass(frozen=True)
class Peer:
    """One device.

    Attributes:
        state: "here", "loading", "away".
        running: sequences that it decodes at the moment.
        bytes_sent, bytes_received: what rank 0 has sent to it and received from it so far (rank 0:
            over all links).
        prefill_tokens_per_s, decode_tokens_per_s: latest figures, the second of all its answers
            together; None: none yet.
        pid: of a process that this service started; None: somebody else's.
        busy: the share of the last seconds for which it computed, 0 to 1; None: not known yet.
        bytes_sent_per_s, bytes_received_per_s: in the last seconds, as `bytes_sent` and
            `bytes_received`.
        rtt_ms: between a question of rank 0's and the answer, where there was no work.
    """

    rank: int
    address: str
    state: Literal["here", "loading", "away"]
    running: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    pid: int | None = None
    busy: float | None = None
    bytes_sent_per_s: float | None = None
    bytes_received_per_s: float | None = None
    rtt_ms: float | None = None


@dataclass(frozen=True)
class Status:
    """A snapshot.

    Attributes:
        ready: whether a request would be answered now. `reason`: why not, or "".
        queued, running: requests that wait, and those that are worked on.
        max_queue: as many may wait.
        lost: how often a device was lost so far; `rejoined`: how often the mesh formed again.
        degraded: answers so far that lacked something.
        timeline: of the last request, by rank.
        progress: of the prompt that is being read, the share of blocks done; None: none is.
    """

    ready: bool
    reason: str
    queued: int = 0
    running: int = 0
    max_queue: int = 0
    peers: Sequence[Peer] = field(default=(), hash=False)
    lost: int = 0
    rejoined: int = 0
    degraded: int = 0
    timeline: Sequence[Span] = field(default=(), hash=False)
    progress: float | None = None


@dataclass(frozen=True)
class Embedding:
    """Of one text: the vector, of length 1, and the text's tokens."""

    vector: Sequence[float] = field(hash=False)
    tokens: int


@dataclass(frozen=True)
class Label:
    """A class of an image, with its probability."""

    id: int
    name: str
    score: float


class Service(Protocol):
    """One model on one mesh.

    Attributes:
        kind: "decoder" generates, "encoder" embeds, "vision" classifies; the other methods raise
            RequestRefused.
        model_id: the name it is asked by.
        context_length: tokens of prompt and answer together, at most.
        tokenizer: the model's, a transformers tokenizer; None: it has none, or still loads.
    """

    @property
    def kind(self) -> Literal["decoder", "encoder", "vision"]: ...
    @property
    def model_id(self) -> str: ...
    @property
    def context_length(self) -> int: ...
    @property
    def tokenizer(self) -> Any: ...

    def status(self) -> Status:
        """Who is here and what is going on; from any thread, waits for nothing."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """The answer, token by token. To close the iterator, or to cancel its task, cancels.

        Raises, at the first event or later:
            NotReady, QueueFull, RequestRefused: before anything was computed.
            TimeIsUp, ServiceFailed: in the middle.
        """

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[Embedding]:
        """The embeddings of token ids; errors as of `generate`."""

    async def classify(self, images: Sequence[bytes], top: int = 5) -> list[list[Label]]:
        """The likeliest classes of encoded images (PNG, JPEG), each most likely first."""

    def close(self, drain_s: float = 0.0) -> None:
        """Takes no further request, lets those that run end for so long, and ends the rest.

        Blocks until everything is given back; may be called from any thread, and repeated.
        """
