"""The engine: one rank's side of a model that runs on N devices."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import decoding
from .call import Call, Endable, Sizes, ending_after, ending_together
from .codes.codebook import Codebook
from .costs import Paces, engine_plan
from .errors import ConnectFailed
from .exchange import send_picture
from .hugging_face import call_arguments, generate_as_asked
from .inputs import (
    check_autocast,
    check_bound,
    check_choice,
    check_integer,
    check_kind,
    check_numbers,
    check_request,
)
from .layer import Layer
from .missing import check_deadlines
from .models import (
    Apart,
    Watch,
    adapt,
    check_attention,
    check_dtypes,
    check_head_module,
    check_runnable,
)
from .plan import Plan, check_halo
from .prefill import Prefix, prefill
from .prepare import prepare
from .sessions.host import SessionHost
from .store import token_limit
from .trace import stage
from .transport import Mesh, local_mesh
from .transport.subset import Subset
from .turns import turn_of, without_gradients
from .warmup import example_inputs

ANSWERS = ("last", "all", "local")
_SHAPES = 256  # of calls whose plans and sizes an engine remembers


class Engine(SessionHost):
    """Runs an unmodified Hugging Face model together with the other ranks of a mesh.

    Making an engine, calling it and generating are collective: every rank does the same, with the
    same inputs. The model goes on working by itself, outside of the engine's calls.

    Args:
        model: a Hugging Face ViT, GPT-2, Llama, Mistral, Qwen2, Qwen3, BERT, RoBERTa or
            XLM-RoBERTa, with or without a head.
        codebook: what to send. None: dense keys and values, `Codebook.dense()`.
        mesh: the other ranks, from `astra_runtime.connect`. None: this process alone.
        weights: shares of the tokens, one a rank; None: shares with which ranks of equal speed
            finish together.
        halo: context overlap: tokens before its shard that a decoder's rank computes, too, so that
            they are as good as exact where they matter most; None: all of them in inputs of up to
            `costs.EXACT_TOKENS` tokens, else `default_halo`; 0 without codes.
        deadline_ms: how long a block's exchange may wait for its frames; None: the mesh's timeout.
            For the answer a rank waits as long as the mesh does, at least two such deadlines; with
            "degrade", a deadline a block longer.
        on_missing: "raise": a rank that misses a deadline, or is lost, is an error on every rank.
            "degrade": it is left out of that block's softmax (with transform codes its tokens are
            attended to as they were predicted), and of an encoder's mean of class tokens; the
            answer says so. The rank that owns the answer is never left out, nor is any with
            logits="all". A late rank is back at the next block it reaches in time, a lost one after
            `rejoin`.
        checkpoint: of a model that somebody else quantized, the digest of the checkpoint that it
            was made from; the codes fitted for that one serve it.
        mixed_forms: lets other ranks run other forms of the checkpoint ("float32", "int8", "int4"),
            as long as all of them ask for it: answers are then a mixture of these forms'.
        pack_weights: keeps a second copy of the linear layers' fp32 weights, in the order in which
            MKL's products read them: a tenth to a fifth faster where a rank has 64 to 512 tokens,
            for twice the memory; with fewer, AVX-512 makes products as fast without the copy, and
            on processors that are not Intel's faster with any number.
            Engines of one model share it. MKL does not promise that a copy serves any number of
            rows; tests show that it does, on the processors where they have run.

    Attributes:
        degraded: whether the last answer lacks anything, here or on a rank that shaped it.
        missing: of the last answer, the blocks in which tokens of a rank were left out, by rank;
            the number of blocks stands for the answer itself. Both are on the output as well. A
            rank that got no answer (outputs="one") knows of what it left out itself.
        seconds: that the last call took on this rank; on the output as well.

    Arguments that are refused end nothing: ValueError or TypeError, before anything is sent. What
    ends a call alone is a `CallEnded` on every rank: tokens that `choose` may not give, values that
    are not finite, ranks that are out of step or have other inputs (a WireError where found), an
    engine closed by another thread. Any other error that this rank meets in a call is sent to the
    others, which raise the same one, and ends the mesh; `rejoin` makes a new one. Over datagrams
    and torch.distributed every error of a call does.

    Calls of several threads take turns; each rank's in its own order, so the hosts see to it that
    the orders are alike.

    Raises:
        ValueError: a model of another family, of parts whose dtypes do not work together, or a
            codebook made for another model.
        HandshakeRefused: a rank has another model, or sets numbers of its modules (attention's
            scale, a norm's epsilon) that the others do not; another codebook, weights, or other
            ways with deadlines.

    Between calls nothing of ASTRA is in the model. Close the engine, or use it in a `with` block.

    Example:
        with Engine(model, codebook, mesh) as engine:
            logits = engine(input_ids=ids).logits  # of the last token
            new_ids = engine.generate(ids, max_new_tokens=20)
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
        checkpoint: str | None = None,
        mixed_forms: bool = False,
        pack_weights: bool = False,
    ) -> None:
        self.model = model
        self.adapter = adapt(model)
        check_kind("checkpoint", checkpoint, str)
        if checkpoint is not None:
            self.adapter.name_checkpoint(checkpoint)
        self.mixed_forms = mixed_forms
        check_kind("codebook", codebook, Codebook)
        check_kind("mesh", mesh, Mesh)
        self.codebook = Codebook.dense() if codebook is None else codebook
        self.mesh = local_mesh(1)[0] if mesh is None else mesh
        self._owns_mesh = mesh is None
        self.shard_weights = None if weights is None else check_numbers("weights", weights)
        if self.shard_weights is not None:  # refuses those that no plan can have
            ranks = self.mesh.world_size
            Plan.make(ranks, ranks, causal=True, shard_weights=self.shard_weights)
        self.halo = halo if halo is None else check_integer("halo", halo, 0)
        check_halo(self.halo or 0, self.adapter.causal)
        check_deadlines(on_missing, deadline_ms, self.mesh)
        self.deadline_ms, self.on_missing = deadline_ms, on_missing
        self.degraded, self.bits_per_token_block, self.bits_per_receiver = False, 0.0, 0.0
        self.missing: dict[int, list[int]] = {}
        self.seconds = 0.0
        self._adopt_model()
        self._running: Endable | None = None
        self._joining, self._given_up = False, ""  # whether `rejoin` runs, and why no longer
        self._packed = pack_weights
        if pack_weights:
            self.adapter.hooks.pack()
        try:
            self._agree()
        except BaseException:
            self._unpack()
            raise
        self._open = True

    def _adopt_model(self) -> None:
        """Refuses a model that no engine can run; makes its codec, and watches it from here on."""
        model, adapter = self.model, self.adapter
        check_runnable(model)
        check_attention(adapter.attentions, adapter.causal)
        check_dtypes(adapter, example_inputs(adapter, (1,))[0])
        check_head_module(model, adapter.hidden_size, adapter.dtype)
        self.codec = self.codebook.make_codec(adapter)
        adapter.hooks.fuse(adapter.base)
        tabled = adapter.projecting() if self.codec.tabled else []
        if self.codec.early:
            tabled = [*tabled, *adapter.attentions]
        self._watch = Watch(model, tabled, self.codebook.tensors())
        self._apart = Apart(self.adapter) if self.mesh.world_size > 1 else None
        self._verified = not self.codec.early or self.mesh.world_size == 1

    def _remember_shapes(self) -> None:
        """Plans and sizes are made once for all calls of one shape."""
        self._plan = functools.lru_cache(_SHAPES)(
            functools.partial(
                engine_plan,
                self.adapter,
                self.codebook,
                world_size=self.mesh.world_size,
                shard_weights=self.shard_weights,
                halo=self.halo,
                paces=self.paces,
            )
        )
        self._sizes = functools.lru_cache(_SHAPES)(
            functools.partial(Sizes.of, self.codec, len(self.adapter.blocks))
        )

    def _unpack(self) -> None:
        if self._packed:
            self.adapter.hooks.unpack()

    def _agree(self) -> None:
        fields = {
            "model": self.adapter.checkpoint(),
            "form": self.adapter.named_form(self.mixed_forms),
            "codebook": self.codebook.digest,
            "plan": f"weights {self.shard_weights or 'balanced'}, halo {_named(self.halo)}",
            "deadline_ms": _named(self.deadline_ms),
            "on_missing": self.on_missing,
        }
        if numbers := self.adapter.other_numbers():
            fields["module numbers"] = numbers
        # tokens are shared out by them, and ranks of other processors have to cut alike
        paces = str(Paces.of(self.adapter, self.codebook))
        self.paces = Paces.slowest(self.mesh.agree(fields, exchanged={"paces": paces})["paces"])
        self._remember_shapes()

    def rejoin(self, mesh: Mesh | None = None, *, connect_timeout: float | None = None) -> None:
        """Closes what is left of the mesh and connects the ranks again; collective.

        Works after any error of a call, and where a rank is another process by now. The model with
        its hooks and the codebook stay as they are.

        Args:
            mesh: the ranks, connected again by the caller; None: as `connect` did it before.
            connect_timeout: seconds to wait for the other ranks; None: as before.

        `close` and `cancel` end it, from any thread or signal handler, but while it waits for
        ranks over torch.distributed.

        Raises what `connect` raises, and HandshakeRefused; ConnectFailed where it was ended. It may
        then be called again, unless the engine was closed.
        """
        if not self._open:
            raise RuntimeError("the engine is closed")
        check_kind("mesh", mesh, Mesh)
        self._given_up, self._joining = "", True
        try:
            self._join(mesh, connect_timeout)
            self._check_given_up()
        except Exception as error:
            if not self._given_up:
                raise
            self.mesh.abort(error)
            raise ConnectFailed(self._given_up) from error
        finally:
            self._joining = False

    def _check_given_up(self) -> None:
        if self._given_up:
            raise ConnectFailed(self._given_up)

    def _join(self, mesh: Mesh | None, connect_timeout: float | None) -> None:
        if mesh is None:
            mesh = self.mesh.reconnect(connect_timeout, check=self._check_given_up)
        elif mesh is not self.mesh:
            self.mesh.close()
        place = (mesh.rank, mesh.world_size)
        if place != (self.mesh.rank, self.mesh.world_size):
            raise ValueError(
                f"mesh: expected rank {self.mesh.rank} of {self.mesh.world_size}, "
                f"got rank {place[0]} of {place[1]}"
            )
        check_deadlines(self.on_missing, self.deadline_ms, mesh)
        self.mesh, self._owns_mesh = mesh, False
        self._check_given_up()
        self._agree()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._open

    @property
    def space(self) -> Any:
        """An older name of `codec`."""
        return self.codec

    @property
    def rank(self) -> int:
        """This rank's number in the mesh."""
        return self.mesh.rank

    def plan(self, tokens: int, padding: int = 0) -> Plan:
        """The cut of an input of `tokens` tokens, the class token not counted.

        Where the codebook has attention-sink tokens, `padding` in front of them is taken along.
        """
        tokens, padding = check_integer("tokens", tokens, 0), check_integer("padding", padding, 0)
        return self._plan(tokens, padding=padding)

    def __call__(
        self,
        first: Tensor | None = None,
        /,
        *,
        logits: str = "last",
        outputs: str = "every",
        request: int | None = None,
        within_ms: float | None = None,
        **inputs: Any,
    ) -> Any:
        """One forward pass, as the model's own: `engine(input_ids=…)`, `engine(pixel_values=…)`.

        Args:
            logits: "last": of the last token, or from the class token; "all": of every token;
                "local": of this rank's tokens (with its class token), nothing is gathered.
            outputs: "every": each rank gets the answer; "one": the owner of the last token (rank 0
                of an encoder) does, the others return None.
            request: a number of the host's own, such as the picture's. Ranks that were given
                different ones, or none, raise RequestMismatch before any code is used (a WireError
                before any answer, where codes go from GPU to GPU).
            within_ms: the most that the call may take, answer included; then it ends with CallEnded
                on every rank. None: as long as the deadlines of its waits allow.
            first: the model's own first input, `input_ids` or `pixel_values`.
            inputs: `input_ids` [B, T], `attention_mask` [B, T], `token_type_ids` [B, T],
                `pixel_values` [B, C, h, w]: whole, the same on every rank. Pictures that differ by
                more than rounding are refused, as far as the means of 16 parts tell. Further
                arguments of a Hugging Face call are taken where they mean something here
                (`return_dict`, `logits_to_keep`, `use_cache=False` …), else refused by name.

        Returns:
            The model's own output class; a tuple with `return_dict=False`.
        """
        inputs, kept, as_tuple = call_arguments(inputs)
        if kept is not None and logits not in ("last", kept):
            raise ValueError(f"logits_to_keep: expected none beside logits={logits!r}, got one")
        if kept == "last" and not self.adapter.causal:
            raise ValueError("logits_to_keep: expected 0, as an encoder has no last token, got 1")
        logits = kept or logits
        if first is not None:
            name = "input_ids" if self.adapter.token_ids else "pixel_values"
            if name in inputs:
                raise TypeError(f"{name}: expected once, got it by position and by name")
            inputs[name] = first
        check_choice("logits", logits, ANSWERS)
        check_choice("outputs", outputs, ("every", "one"))
        request, within_ms = check_request(request), check_bound(within_ms)
        with without_gradients(), self._turn():
            call, kwargs, _ = prepare(self, inputs, logits, outputs == "every", request)
            with (
                self._ending_together(call, request, within_ms),
                self.adapter.listening(Layer(call), self.adapter.patch_rows(call.plan, call.rank)),
                stage("compute"),
            ):
                send_picture(call)
                output = self.model(**kwargs)
                self.mesh.check_cancelled()
            self._report(call)
            output.degraded, output.missing = self.degraded, self.missing
            output.seconds = self.seconds
            if not call.has_answer:
                return None
            return output.to_tuple() if as_tuple else output

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        with turn_of(self.mesh):
            if not self._open:
                raise RuntimeError("the engine is closed")
            yield

    @contextlib.contextmanager
    def _ending_together(
        self, call: Endable, request: int | None, within_ms: float | None
    ) -> Iterator[None]:
        """Whatever ends a call on this rank ends it on every rank, with one cause."""
        self.mesh.begin(request)
        call.state.number = self.mesh.call
        self._running = call
        clock = contextlib.nullcontext() if within_ms is None else ending_after(within_ms, call)
        start = time.perf_counter()
        try:
            with ending_together(self.mesh), clock:
                self._check_unchanged()
                self._check_apart()
                yield
                self._check_apart()  # which hooks change anything shows in a pass
        finally:
            self._running, self.seconds = None, time.perf_counter() - start

    def _check_model(self) -> None:
        if not self._open:
            raise RuntimeError("the engine is closed")
        check_runnable(self.model, self._watch.modules)
        check_attention(self.adapter.attentions, self.adapter.causal)
        check_autocast(self.adapter.device)

    def _check_unchanged(self) -> None:
        self._watch.check()

    def _check_apart(self) -> None:
        if self._apart is not None:
            self._apart.check()

    def _report(self, call: Call) -> None:
        """What is known when a call has ended, for the host."""
        if call.verifier is not None and any(call.sizes.num_sent.values()):
            self._verified = True
        missing = call.missing.by_rank() if call.missing else {}
        mesh = call.mesh
        if isinstance(mesh, Subset):  # errors and answers name the devices
            missing = {mesh.members[rank]: blocks for rank, blocks in missing.items()}
        self.missing = dict(sorted(missing.items()))
        self.degraded = bool(self.missing)
        trailer = call.missing.width if call.missing else 0
        self.bits_per_token_block = call.sizes.bits_per_token_block(call.batch, trailer)
        self.bits_per_receiver = call.sizes.bits_per_receiver(call.batch)

    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        choose: Callable[[Tensor, Tensor], Tensor] | None = None,
        on_token: Callable[[Tensor], None] | None = None,
        stop: Callable[[Tensor], bool] | None = None,
        on_block: Callable[[int], None] | None = None,
        request: int | None = None,
        within_ms: float | None = None,
        generation_config: Any = None,
        **keywords: Any,
    ) -> Tensor:
        """Continues `input_ids` [B, T]; the prompt is read by all ranks, the rest by its owner.

        The owner's cache holds its own tokens' keys and values in full precision and the codes of
        the rest. It tells every other rank each token as it comes.

        Args:
            attention_mask: None: as `model.generate` takes it, padding tokens of the model are
                padding, unless they also end a text.
            max_new_tokens: at least 1; None: the generation config's, if one is used, else 20.
            eos_token_id: one or several that end a sequence; by default those of the model's own
                that are in its vocabulary. A finished sequence is continued with the end token it
                has until all have ended.
            choose: (ids [B, t], logits [B, V]) -> next token [B], by default the likeliest; a
                Hugging Face `LogitsProcessorList` followed by a draw fits in here.
            on_token: called on every rank with each new column [B]. What it raises ends this call
                with CallEnded, on every rank.
            stop: called on the owner with the ids [B, t] so far; True: the last column was the last
                one.
            on_block: called before each block of the prompt's pass, with its number.
            request, within_ms: as of a call.
            generation_config, keywords: as of `model.generate`: `do_sample`, `temperature`,
                `top_p`, `num_return_sequences`, `stopping_criteria`, `streamer` … With any of them
                the model's own generation config counts, too; the owner draws from torch's
                generator. Several answers to one prompt are drawn by all ranks, as the owner would
                draw them. Beams, assistants and the like are refused by name.

        Returns:
            int64 [B, T + new], on every rank.

        Raises:
            ValueError: a model without a language-model head, or arguments that it cannot take.
            InvalidChoice: `choose` gave something else than a token of the vocabulary for each
                sequence, or raised an error.
            NotFinite: the logits hold NaN, of which any token could be the likeliest.
        """
        if not self.adapter.generates:
            raise ValueError("generate: expected a decoder with a language-model head")
        plain: dict[str, Any] = {"attention_mask": attention_mask, "max_new_tokens": max_new_tokens}
        plain |= {"eos_token_id": eos_token_id, "choose": choose, "on_token": on_token}
        plain |= {"stop": stop, "on_block": on_block, "request": request, "within_ms": within_ms}
        if generation_config is not None or keywords:
            return generate_as_asked(self, input_ids, generation_config, keywords, **plain)
        return decoding.run(self, input_ids, **plain)

    def prefill(
        self,
        input_ids: Tensor,
        *,
        owner: int | None = None,
        request: int | None = None,
        within_ms: float | None = None,
        between: Callable[[int], None] | None = None,
    ) -> Prefix | None:
        """Reads `input_ids` [1, T] on all ranks, for `owner` to go on with alone.

        Args:
            owner: the rank that holds the last tokens; None: the last rank.
            between: called on every rank before each block, with its number; what it does beside
                the call, on every rank alike, counts against no deadline of the call.
            request, within_ms: as of a call.

        Returns:
            On the owner what it knows of the prompt, on the other ranks None.
        """
        if not self.adapter.generates:
            raise ValueError("prefill: expected a decoder with a language-model head")
        return prefill(
            self, input_ids, owner=owner, request=request, within_ms=within_ms, between=between
        )

    def warmup(self, *lengths: int) -> None:
        """Runs the model once for inputs of each of these lengths, so that later calls of them find
        their plans, tables and buffers made and their kernels compiled; collective.

        Args:
            lengths: tokens, the class token not counted; none: as many as the model reads, at most
                128. A vision model's images have one length.
        """
        for inputs in example_inputs(self.adapter, lengths):
            if self.adapter.generates:
                room = inputs["input_ids"].shape[1] < (token_limit(self.model) or 1 << 30)
                whole = torch.ones_like(inputs["input_ids"])
                self.generate(**inputs, attention_mask=whole, max_new_tokens=2 if room else 1)
            else:
                self(**inputs, logits="local")

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """A turn of this thread to use model and mesh, with what belongs to the engine around it.

        Raises RuntimeError where the engine is closed.
        """
        with without_gradients(), self._turn():
            yield

    def close(self) -> None:
        """Ends the use of the model by this engine. A mesh that it was given stays open.

        From any thread or signal handler: a call that runs ends with CallEnded, on every rank, and
        a `rejoin` with ConnectFailed.
        """
        if self._open:
            self._open = False
            self._end_running("the engine was closed")
            self._unpack()
            if self._owns_mesh:
                self.mesh.close()

    def cancel(self) -> None:
        """Ends the call that runs, on every rank, with CallEnded; engine and mesh stay as they are.

        From any thread or signal handler. It ends a `rejoin` of this rank, too, with ConnectFailed.
        Without either it does nothing.
        """
        self._end_running("it was cancelled")

    def _end_running(self, reason: str) -> None:
        if (call := self._running) is not None:
            call.end(reason)
        elif self._joining:
            self._given_up = f"rejoin: {reason}"
            self.mesh.abort(
                ConnectFailed(self._given_up)
            )  # where it is made, and the ranks still compare

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an engine is one rank's end of its mesh, and cannot be copied or pickled: copy the "
            "model, and make an engine of it"
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _named(value: float | None) -> str:
    return "default" if value is None else str(value)
