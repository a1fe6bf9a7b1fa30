"""The engine: one rank's side of a model that runs on N devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .call import Call
from .codes.codebook import Codebook
from .codes.spaces import make_space
from .control import Control
from .costs import engine_plan
from .errors import ModelChanged
from .exchange import receive_tensors, send_tensor
from .last_tokens import LastTokens
from .layer import Layer
from .missing import Missing
from .models import EVERY, ROW, Watch, adapt, check_attention, check_runnable, with_cache
from .plan import Plan, check_halo
from .trace import stage
from .transport import Mesh, local_mesh

ANSWERS = ("last", "all", "local")


class Engine:
    """Runs an unmodified Hugging Face model together with the other ranks of a mesh.

    Making an engine, calling it and generating are collective: every rank does the same, with the
    same inputs. The model goes on working by itself, outside of the engine's calls.

    Args:
        model: a Hugging Face ViT, GPT-2, Llama, Mistral, Qwen2 or BERT, with or without a head.
        codebook: what to send. None: dense keys and values, `Codebook.none()`.
        mesh: the other ranks, from `astra_runtime.connect`. None: this process alone.
        weights: shares of the tokens, one a rank; None: shares with which ranks of equal speed
            finish together.
        halo: context overlap: tokens before its shard that a decoder's rank computes, too, so that
            they are as good as exact where they matter most; None: `default_halo`, 0 without codes.
        deadline_ms: how long a block's exchange may wait for its frames; None: the mesh's timeout.
            For the answer a rank waits as long as the mesh does, at least two such deadlines; with
            "degrade", a deadline a block longer.
        on_missing: "raise": a rank that misses a deadline, or is lost, is an error on every rank.
            "degrade": it is left out of that block's softmax, and of an encoder's mean of class
            tokens; the answer says so. The rank that owns the answer is never left out, nor is any
            with logits="all". A late rank is back at the next block it reaches in time, a lost one
            after `rejoin`.

    Attributes:
        degraded: whether the last answer lacks anything, here or on a rank that shaped it.
        missing: of the last answer, the blocks in which tokens of a rank were left out, by rank;
            the number of blocks stands for the answer itself. Both are on the output as well. A
            rank that got no answer (outputs="one") knows of what it left out itself.

    An error that this rank meets in a call is told to the others, which raise the same one, and
    ends the mesh; `rejoin` makes a new one. Arguments that are refused end nothing.

    Raises:
        ValueError: a model of another family, or a codebook made for another model.
        HandshakeRefused: a rank has another model, codebook, weights, or other ways with deadlines.

    Between calls nothing of ASTRA is in the model. Close the engine, or use it in a `with` block.
    """

    def __init__(
        self,
        model: nn.Module,
        codebook: Codebook | None = None,
        mesh: Mesh | None = None,
        *,
        weights: Sequence[float] | None = None,
        halo: int | None = None,
        deadline_ms: float | None = None,
        on_missing: Literal["raise", "degrade"] = "raise",
    ) -> None:
        self.model = model
        self.adapter = adapt(model)
        self.codebook = Codebook.none() if codebook is None else codebook
        self.mesh = local_mesh(1)[0] if mesh is None else mesh
        self.shard_weights = None if weights is None else tuple(float(w) for w in weights)
        if self.shard_weights is not None:  # refuses weights that no plan can have
            Plan.make(
                len(self.shard_weights),
                self.mesh.world_size,
                causal=True,
                shard_weights=self.shard_weights,
            )
        check_halo(halo or 0, self.adapter.causal)
        self.halo = halo
        _check_missing(on_missing, deadline_ms, self.mesh)
        self.deadline_ms, self.on_missing = deadline_ms, on_missing
        self.degraded = False
        self.missing: dict[int, list[int]] = {}
        check_runnable(model)
        check_attention(self.adapter.attentions)
        self._watch = Watch(model)
        self.space = make_space(self.codebook, self.adapter)
        self.bits_per_token_block = 0.0
        self._agree()
        self._open = True

    def _agree(self) -> None:
        self.mesh.agree(
            {
                "model": self.adapter.digest(),
                "codebook": self.codebook.digest,
                "plan": f"weights {self.shard_weights or 'balanced'}, halo {_named(self.halo)}",
                "deadline_ms": _named(self.deadline_ms),
                "on_missing": self.on_missing,
            }
        )

    def rejoin(self, mesh: Mesh | None = None, *, connect_timeout: float | None = None) -> None:
        """Closes what is left of the mesh and connects the ranks again; collective.

        Works after any error of a call, and where a rank is another process by now. The model with
        its hooks and the codebook stay as they are.

        Args:
            mesh: the ranks, connected again by the caller; None: as `connect` did it before.
            connect_timeout: seconds to wait for the other ranks; None: as before.

        Raises what `connect` raises, and HandshakeRefused as the engine did at first. `rejoin` may
        then be called again.
        """
        if not self._open:
            raise RuntimeError("the engine is closed")
        if mesh is None:
            mesh = self.mesh.reconnect(connect_timeout)
        elif mesh is not self.mesh:
            self.mesh.close()
        place = (mesh.rank, mesh.world_size)
        if place != (self.mesh.rank, self.mesh.world_size):
            raise ValueError(
                f"mesh: expected rank {self.mesh.rank} of {self.mesh.world_size}, "
                f"got rank {place[0]} of {place[1]}"
            )
        _check_missing(self.on_missing, self.deadline_ms, mesh)
        self.mesh = mesh
        self._agree()

    @property
    def rank(self) -> int:
        return self.mesh.rank

    def plan(self, tokens: int, padding: int = 0) -> Plan:
        """The cut of an input of `tokens` tokens, the class token not counted.

        Where the codebook has every rank compute the first tokens itself, `padding`
        tokens in front of them are taken along.
        """
        return engine_plan(
            self.adapter,
            self.codebook,
            tokens,
            self.mesh.world_size,
            shard_weights=self.shard_weights,
            padding=padding,
            halo=self.halo,
        )

    @torch.inference_mode()
    def __call__(self, *, logits: str = "last", outputs: str = "every", **inputs: Any) -> Any:
        """One forward pass, as the model's own: `engine(input_ids=…)`, `engine(pixel_values=…)`.

        Args:
            logits: "last": of the last token, or from the class token; "all": of every token;
                "local": of this rank's tokens (with its class token), nothing is gathered.
            outputs: "every": each rank gets the answer; "one": the owner of the last token (rank 0
                of an encoder) does, the others return None.
            inputs: `input_ids` [B, T], `attention_mask` [B, T], `token_type_ids` [B, T],
                `pixel_values` [B, C, h, w]: whole, the same on every rank.

        Returns:
            The model's own output class.
        """
        call, kwargs = self._prepare(inputs, logits, outputs)
        with self._failing_together(), self.adapter.listening(Layer(call)), stage("compute"):
            output = self.model(**kwargs)
        self._count(call)
        self._flag(call)
        output.degraded, output.missing = self.degraded, self.missing
        has_answer = call.everywhere or call.answer == "local" or self.rank == call.plan.owner
        return output if has_answer else None

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Whatever ends a call on this rank ends it on every rank, with one cause."""
        try:
            yield
        except BaseException as error:
            self.mesh.abort(error)
            raise

    def _check_model(self) -> None:
        """That the model is still the one whose tables and digest the ranks agreed on."""
        check_runnable(self.model)
        check_attention(self.adapter.attentions)
        changed = self._watch.changed()
        if changed is not None:
            error = ModelChanged(
                f"{changed} of the model has changed since this engine was made; close the engine "
                "and make another"
            )
            self.mesh.abort(error)
            raise error

    def _check_answer(self, logits: str) -> bool:
        """Refuses an answer that the model's head cannot give; whether the head picks a row's last
        token itself."""
        head, name = self.adapter.head, type(self.model).__name__
        if head == EVERY and logits != "all":
            raise ValueError(
                f"logits: expected 'all' for {name}, whose head reads every token, got {logits!r}"
            )
        if head == ROW and logits == "local":
            raise ValueError(
                f"logits: expected 'last' or 'all' for {name}, whose head reads the last token of "
                "a row, got 'local'"
            )
        return head == ROW

    def _flag(self, call: Call) -> None:
        self.missing = call.missing.by_rank() if call.missing else {}
        self.degraded = bool(self.missing)

    def _prepare(
        self, inputs: dict[str, Tensor], logits: str, outputs: str, *options: object
    ) -> tuple[Call, dict[str, Any]]:
        """The call and the model's arguments; `options` have to be the same on every rank."""
        if not self._open:
            raise RuntimeError("the engine is closed")
        self._check_model()
        if logits not in ANSWERS:
            raise ValueError(f"logits: expected one of {', '.join(ANSWERS)}, got {logits!r}")
        if outputs not in ("every", "one"):
            raise ValueError(f"outputs: expected 'every' or 'one', got {outputs!r}")
        adapter, rank = self.adapter, self.rank
        pooled = self._check_answer(logits)
        batch, tokens = adapter.count(inputs)
        visible, last = adapter.visible(inputs), adapter.last_tokens(inputs)
        plan = self.plan(tokens, _padding(visible))
        call = Call(
            rank,
            plan,
            self.space.begin(inputs, plan, rank),
            self.mesh,
            batch,
            plan.tag([*_contents(inputs), repr(options).encode()]),
            answer="last" if pooled else logits,
            last_tokens=None if last is None else LastTokens.of(last, plan),
            pooled=pooled,
            everywhere=outputs == "every",
        )
        self._set_limits(call)
        far = bool(plan.sources(rank))
        if visible is not None:
            call.local_mask = plan.local_tokens(visible, rank)
            call.remote_mask = plan.remote_tokens(visible, rank) if far else None
        positions = adapter.positions(inputs)
        rope = None if positions is None else adapter.rope(positions)
        if rope is not None:
            own = plan.sent_slice(rank)
            call.local_rope = (rope[0][:, own], rope[1][:, own])
            if far:
                call.remote_rope = (
                    plan.remote_tokens(rope[0], rank),
                    plan.remote_tokens(rope[1], rank),
                )
        kwargs = adapter.local_inputs(inputs, plan, rank)
        # a shard's hidden states or attentions would pass for the sequence's
        kwargs |= {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
        if adapter.causal:
            kwargs["use_cache"] = False
        return call, kwargs

    def _set_limits(self, call: Call) -> None:
        """How long to wait, and whether a rank may be left out."""
        self.degraded, self.missing = False, {}
        longest = self.mesh.timeout
        if self.deadline_ms is not None:
            longest = call.deadline = self.deadline_ms / 1000
        # whoever waits for an answer must not give up before the rank that makes it has done so
        call.patience = max(self.mesh.timeout, 2 * longest)
        if self.on_missing == "degrade":
            call.patience += len(self.adapter.blocks) * longest  # it may have waited in each block
            call.missing = Missing(self.mesh.world_size, len(self.adapter.blocks))

    def _count(self, call: Call) -> None:
        """Payload bits made for remote use, over the tokens they stand for and the blocks."""
        makers = [n for n in range(call.plan.world_size) if call.plan.receivers(n)]
        tokens = sum(call.plan.num_sent(n) for n in makers) * call.batch
        blocks = len(self.adapter.blocks)
        sizes = [
            self.space.payload_bytes(block, call.batch, call.plan.num_sent(n))
            for block in range(blocks)
            for n in makers
        ]
        told = call.missing.width if call.missing else 0
        size = sum(size + told for size in sizes if size)
        self.bits_per_token_block = 8 * size / (tokens * blocks) if tokens else 0.0

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        eos_token_id: int | Sequence[int] | None = None,
        choose: Callable[[Tensor, Tensor], Tensor] | None = None,
        on_token: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Continues `input_ids` [B, T]; the prompt is read by all ranks, the rest by its owner.

        The owner's cache holds its own tokens' keys and values in full precision and the codes of
        the rest. It tells every other rank each token as it comes.

        Args:
            max_new_tokens: at least 1.
            eos_token_id: ends a sequence; by default the model's own. A finished sequence is
                continued with its end token until all have ended.
            choose: (ids [B, t], logits [B, V]) -> next token [B], by default the likeliest; a
                Hugging Face `LogitsProcessorList` followed by a draw fits in here.
            on_token: called on every rank with each new column [B].

        Returns:
            int64 [B, T + new], on every rank.
        """
        if not (self.adapter.causal and hasattr(self.model, "lm_head")):
            raise ValueError("generate: expected a decoder with a language-model head")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        inputs = {"input_ids": input_ids}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        _, tokens = self.adapter.count(inputs)
        limit = int(self.adapter.model.config.max_position_embeddings)
        if tokens + max_new_tokens - 1 > limit:
            raise ValueError(
                f"max_new_tokens: expected at most {limit - tokens + 1} after {tokens} tokens, as "
                f"the model's limit is {limit}, got {max_new_tokens}"
            )
        if self.adapter.last_tokens(inputs) is not None:
            raise ValueError(
                "attention_mask: expected the last column to be a token of every row, as "
                "generation goes on behind it; pad shorter rows on the left"
            )
        ends = self._ends(eos_token_id, input_ids.device)
        call, kwargs = self._prepare(inputs, "last", "one", max_new_tokens, ends.tolist())
        call.keeps = call.rank == call.plan.owner
        with self._failing_together(), self.adapter.installed():
            ids = self._continue(call, kwargs, inputs, max_new_tokens, ends, choose, on_token)
        self._flag(call)
        return ids

    def _continue(
        self,
        call: Call,
        kwargs: dict[str, Any],
        inputs: dict[str, Tensor],
        max_new_tokens: int,
        ends: Tensor,
        choose: Callable[[Tensor, Tensor], Tensor] | None,
        on_token: Callable[[Tensor], None] | None,
    ) -> Tensor:
        """Prefill, and then token after token, from the owner to all others."""
        owner = _Owner(self, call, kwargs, inputs) if call.rank == call.plan.owner else None
        if owner is None:
            with self.adapter.listening(Layer(call)), stage("compute"):
                self.model(**kwargs)
        self._count(call)
        others = [n for n in range(call.plan.world_size) if n != call.rank]
        ids = inputs["input_ids"].long()
        done = torch.zeros(call.batch, dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            if owner is not None:
                scores = owner.scores(ids)
                token = scores.argmax(-1) if choose is None else choose(ids, scores)
                token = token.to(ids.dtype).reshape(call.batch)
                token = torch.where(done, ends[0], token) if len(ends) else token
                send_tensor(call, token, block=Control.TOKEN, to=others)
            else:
                shapes = {call.plan.owner: (call.batch,)}
                token = receive_tensors(call, shapes, ids, block=Control.TOKEN)[call.plan.owner]
            ids = torch.cat([ids, token[:, None]], 1)
            if on_token is not None:
                on_token(token)
            done |= torch.isin(token, ends)
            if bool(done.all()):
                break
        return ids

    def _ends(self, eos_token_id: int | Sequence[int] | None, device: torch.device) -> Tensor:
        if eos_token_id is None:
            config = getattr(self.model, "generation_config", self.model.config)
            eos_token_id = getattr(config, "eos_token_id", None)
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
        return torch.tensor(ends, dtype=torch.int64, device=device)

    def close(self) -> None:
        """Ends the use of the model by this engine. The mesh stays open."""
        if self._open:
            self._open = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _contents(inputs: dict[str, Tensor]) -> list[bytes]:
    """What must be the same on every rank: shapes, and token ids to the last one.

    Images may differ by the rounding of each rank's own preprocessing.
    """
    told = []
    for name, tensor in sorted(inputs.items()):
        told.append(f"{name}{tuple(tensor.shape)}".encode())
        if not tensor.is_floating_point():
            told.append(tensor.to("cpu", torch.int64).contiguous().numpy().tobytes())
    return told


def _named(value: float | None) -> str:
    return "default" if value is None else str(value)


def _check_missing(on_missing: str, deadline_ms: float | None, mesh: Mesh) -> None:
    if on_missing not in ("raise", "degrade"):
        raise ValueError(f"on_missing: expected 'raise' or 'degrade', got {on_missing!r}")
    if deadline_ms is not None and not 0 < deadline_ms <= 1e9:
        raise ValueError(f"deadline_ms: expected above 0, at most 1e9, got {deadline_ms}")
    if on_missing == "degrade" and deadline_ms is None:
        raise ValueError("deadline_ms: expected a number with on_missing='degrade', got None")
    if on_missing == "degrade" and not mesh.partial:
        raise ValueError(
            "on_missing: expected 'raise' with this transport, which leaves nobody out"
        )
    if on_missing == "raise" and mesh.lossy:
        raise ValueError(
            "on_missing: expected 'degrade' with this transport, which loses frames, got 'raise'"
        )


def _padding(visible: Tensor | None) -> int:
    """The most tokens of padding in front of a sequence of the batch; `visible` is bool [B, T]."""
    return 0 if visible is None else int((visible.cumsum(-1) == 0).sum(-1).max())


class _Owner:
    """Decoding on the rank that holds the last token: its cache is dense for its own tokens."""

    def __init__(
        self, engine: Engine, call: Call, kwargs: dict[str, Any], inputs: dict[str, Tensor]
    ) -> None:
        from transformers import DynamicCache

        self.model, self.adapter, self.call = engine.model, engine.adapter, call
        self.cache = DynamicCache()
        positions = engine.adapter.positions(inputs)
        assert positions is not None, "every decoder takes positions"
        self.position = positions[:, -1:].expand(call.batch, 1)
        self.output = self._run(kwargs)
        self.seen = inputs["input_ids"].shape[1]

    def _run(self, kwargs: dict[str, Any]) -> Any:
        with self.adapter.listening(Layer(self.call)), stage("compute"):
            return self.model(**kwargs | with_cache(self.model, self.cache))

    def scores(self, ids: Tensor) -> Tensor:
        """fp32 logits [B, V] after `ids` [B, t], which is at most one token more than before."""
        if ids.shape[1] > self.seen:
            self.seen, self.call.decoding = ids.shape[1], True
            self.position = self.position + 1
            if self.call.local_mask is not None:
                self.call.local_mask = F.pad(self.call.local_mask, (0, 1), value=True)
            self.output = self._run({"input_ids": ids[:, -1:], "position_ids": self.position})
        return self.output.logits[:, -1].float()
