"""A small GPT-2, trained here from scratch on real text: what `bench.gpt2` measures.

Two kinds of windows, of the same text. "prose" is the text as it stands. "revised" is a text and
then a later version of it, as in a review: the second half repeats the first, but for one passage
in eight, which is another. Who has read the first half knows most of the second, so remote tokens
are worth a lot. Three of four training windows are revised, with beginnings of several lengths.

To recall a passage a model needs a head that looks one token back and, a block later, one that
looks for the token at hand; plain training does not find this pair in the time that a core has
here. So one head of each of the first two blocks starts out looking there (`recall_heads`). All
else starts at random, and everything is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astra_kernels._cache import cache_folder
from bench.accuracy.corpora import corpus
from bench.gpt2 import KINDS

SCALE = 0.1  # of embeddings at first: GPT-2's 0.02 would be gone after a few of AdamW's steps


@dataclass(frozen=True)
class Shape:
    """Model and pre-training.

    Attributes:
        seen: domains that model, vocabulary and codebooks are made of; the first is evaluated on.
        unseen: a domain that none of them ever sees.
        per_domain: most training tokens of a domain, so that large ones do not drown small ones.
    """

    width: int = 128
    layers: int = 4
    head: int = 32
    vocabulary: int = 1024
    tokens: int = 512
    steps: int = 600
    batch: int = 4
    per_domain: int = 250_000
    seed: int = 0
    seen: tuple[str, ...] = ("documentation", "source", "manpages", "fortunes", "devref")
    unseen: str = "handbook"

    @property
    def domains(self) -> tuple[str, str]:
        """What is evaluated on: text of a kind that was trained on, and of one that was not."""
        return self.seen[0], self.unseen

    @property
    def name(self) -> str:
        return sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:12]


class Texts:
    """Token ids of training text and evaluation text, in a vocabulary made of the former."""

    def __init__(self, shape: Shape) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        texts = {domain: corpus(domain) for domain in (*shape.seen, shape.unseen)}
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=shape.vocabulary,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([texts[domain][0] for domain in shape.seen], trainer)

        def ids(text: str) -> Tensor:
            return torch.tensor(tokenizer.encode(text).ids)

        self.tokens = shape.tokens
        of_domains = (ids(texts[domain][0])[: shape.per_domain] for domain in shape.seen)
        self.training = torch.cat(list(of_domains))
        self.evaluation = {domain: ids(texts[domain][1]) for domain in shape.domains}

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Windows [count, T] of the training text, three of four revised."""
        starts = torch.randint(0, len(self.training) - self.tokens, (count,), generator=generator)
        rows = [self.training[i : i + self.tokens] for i in starts.tolist()]
        for i in range(count):
            period = self.tokens // 8 << int(torch.randint(0, 3, (), generator=generator))
            if i % 4:
                rows[i] = revised(rows[i], rows[i - 1], generator, period)
        return torch.stack(rows)

    def windows(self, domain: str, kind: str, count: int) -> Tensor:
        """Windows [count, T] of the evaluation text, evenly spaced, the same in every run."""
        ids = self.evaluation[domain]
        starts = [i * (len(ids) - self.tokens) // (count - 1) for i in range(count)]
        rows = [ids[start : start + self.tokens] for start in starts]
        if kind == "revised":
            generator = torch.Generator().manual_seed(0)
            half = self.tokens // 2
            rows = [revised(row, rows[i - 1], generator, half) for i, row in enumerate(rows)]
        return torch.stack(rows)


def revised(row: Tensor, other: Tensor, generator: torch.Generator, period: int) -> Tensor:
    """A window [T]: the first `period` tokens of `row`, again and again, with changes.

    A passage has T/32 tokens; one in eight is replaced by what `other`, [T] too, has there.
    """
    passages = len(row) // 32
    again = row[:period].repeat(len(row) // period)
    replaced = torch.rand(len(row) // passages, generator=generator) < 1 / 8
    replaced = replaced.repeat_interleave(passages)
    replaced[:period] = False
    return torch.where(replaced, other, again)


def new_model(shape: Shape) -> Any:
    """GPT-2 with fresh weights, those of `recall_heads` aside."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(shape.seed)
    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.tokens,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.width // shape.head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        recall_heads(model)
    return model


def recall_heads(model: Any) -> None:
    """Two heads that recall: where they look at first, not what they do with it.

    Of the D channels the first d hold positions, as sinusoids, the next d nothing, and the others
    the token. Head 0 of block 0 attends from p to the p′ of largest Σ cos(w·(p − p′ − 1)), the
    token before, and writes a random projection of that token into the empty channels. Head 0 of
    block 1 projects its own token alike and attends to where these channels hold the same: to
    tokens that followed the one at hand.
    """
    transformer = model.transformer
    width, head = model.config.n_embd, model.config.n_embd // model.config.n_head
    first, second = (transformer.h[i].attn for i in (0, 1))
    positions = transformer.wpe.weight
    half, reach = head // 2, len(positions)
    rates = 2.5 * torch.exp(-math.log(2.5 * reach) * torch.arange(half) / half)
    angles = torch.arange(reach)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    positions.copy_(SCALE * math.sqrt(2) * F.pad(waves, (0, width - head)))
    transformer.wte.weight.normal_(0, SCALE)
    transformer.wte.weight[:, : 2 * head] = 0

    def put(attention: Any, part: int, weights: Tensor) -> None:
        """Head 0's queries (0), keys (1) or values (2), from weights [D, d]."""
        attention.c_attn.weight[:, part * width : part * width + head] = weights

    one, none = torch.eye(head), torch.zeros(width - head, head)
    cos, sin = rates.cos().diag(), rates.sin().diag()
    turned = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])
    put(first, 0, 3 * torch.cat([one, none]))
    put(first, 1, 3 * torch.cat([turned.T, none]))
    token = torch.randn(width, head) / math.sqrt(width - 2 * head)
    token[: 2 * head] = 0
    put(first, 2, token)
    first.c_proj.weight[:head] = SCALE * F.pad(one, (head, width - 2 * head))
    put(second, 0, 1.5 * token)
    put(second, 1, 1.5 * F.pad(one, (0, 0, head, width - 2 * head)))


class Muon:
    """Momentum made orthogonal (Jordan et al. 2024), in fp32: torch's own multiplies in bf16, which
    CPUs without it emulate slowly. For matrices; it needs about half of AdamW's steps here."""

    def __init__(self, weights: list[nn.Parameter], momentum: float = 0.95) -> None:
        self.weights, self.momentum = weights, momentum
        self.moving = [torch.zeros_like(w) for w in weights]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for weight, moving in zip(self.weights, self.moving, strict=True):
            assert weight.grad is not None
            moving.mul_(self.momentum).add_(weight.grad)
            update = orthogonal(weight.grad + self.momentum * moving)
            weight.add_(update, alpha=-lr * max(1, weight.shape[1] / weight.shape[0]) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values are about 1, by five Newton–Schulz steps."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide else x.T


Say = Callable[[str], None]


def pretrain(shape: Shape, texts: Texts, say: Say) -> Any:
    """The model after `shape.steps` steps; kept in the cache folder, by its settings."""
    model, file = new_model(shape), cache_folder() / "gpt2" / f"{shape.name}.pt"
    if file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    generator = torch.Generator().manual_seed(shape.seed)
    matrices = [w for w in model.transformer.h.parameters() if w.dim() == 2]
    known = set(matrices)
    others = [w for w in model.parameters() if w not in known]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(shape.steps):
        windows = texts.draw(shape.batch, generator)
        loss = language_loss(model(windows).logits, windows).mean()
        loss.backward()
        remaining = (shape.steps - step) / shape.steps
        height = min(1.0, (step + 1) / 30, remaining / 0.4)  # a trapezoid
        for group in adam.param_groups:
            group["lr"] = 1e-3 * height
        adam.step()
        muon.step(0.02 * height)
        model.zero_grad()
        if step % 25 == 0 or step == shape.steps - 1:
            losses = ", ".join(f"{k} {v:.3f}" for k, v in _losses(model, texts).items())
            say(f"pre-training: step {step + 1} of {shape.steps}: {losses}")
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)
    return model


@torch.no_grad()
def _losses(model: Any, texts: Texts) -> dict[str, float]:
    """Nats a token in the second half of two windows of each kind."""
    losses, half = {}, texts.tokens // 2
    for kind in KINDS:
        windows = texts.windows(next(iter(texts.evaluation)), kind, 2)
        losses[kind] = float(language_loss(model(windows).logits, windows)[:, half:].mean())
    return losses


def language_loss(logits: Tensor, windows: Tensor) -> Tensor:
    """Nats [B, T − 1] of predicting windows [B, T] from logits [B, T, V]."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), windows[:, 1:], reduction="none")
