"""A small ViT, trained from nothing, and what it gets right as N ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from astra_runtime import Codebook, Engine
from astra_runtime.evaluate import run_ranks
from astra_runtime.models import adapt
from astra_runtime.plan import Plan
from astra_runtime.train.simulate import Simulation, frozen

from .data import CLASSES, DIGITS, SIDE, Images, compose

PATCH = 2
ROWS, COLUMNS = SIDE // PATCH, DIGITS * SIDE // PATCH
TOKENS = ROWS * COLUMNS  # beside the class token; four equal shards are a row of patches each


def make(hidden: int, layers: int, heads: int, seed: int, mlp: int = 1) -> Any:
    """An untrained ViTForImageClassification, whose inputs are as large as what blocks add.

    Hugging Face's initial values are for wide models and long training: with them, this one needs
    several times as many steps.
    """
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp * hidden,
        image_size=(SIDE, DIGITS * SIDE),
        patch_size=PATCH,
        num_channels=1,
        num_labels=CLASSES,
        initializer_range=0.08,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.ViTForImageClassification(config).eval()
    embeddings: Any = model.vit.embeddings
    with torch.no_grad():
        embeddings.patch_embeddings.projection.weight.normal_(0, 1 / PATCH)
        embeddings.position_embeddings[0, 1:] = waves(hidden)
    return model


def waves(hidden: int) -> Tensor:
    """Positions to start from: sines and cosines of a patch's row and column, [TOKENS, hidden]."""
    at = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    frequencies = torch.linspace(0.6, -2.5, hidden // 4).exp()
    angles = [where.flatten()[:, None] * frequencies for where in at]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], -1)


def pretrain(model: Any, *, steps: int, batch: int, lr: float, seed: int) -> nn.Linear:
    """Trains on one device, in place: the class token tells the larger digit, all tokens both.

    The second makes training short. Returns the head that it needs, from hidden states to the
    logits of both digits, the left one's first.
    """
    torch.manual_seed(seed)
    head = nn.Linear(model.config.hidden_size, DIGITS * CLASSES)
    weights = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    # digits that move are learned far sooner by a model that can read those that do not
    parts = [compose("train", steps * batch // 2, "largest", 2 * seed + i, shift=i) for i in (0, 1)]
    for step in range(steps):
        images = parts[step >= steps // 2]
        at = step % (steps // 2) * batch
        chosen = slice(at, at + batch)
        hidden = model.vit(pixel_values=images.pixels[chosen]).last_hidden_state
        loss = F.cross_entropy(model.classifier(hidden[:, 0]), images.labels[chosen])
        logits = head(hidden).unflatten(-1, (DIGITS, CLASSES))  # [batch, tokens, DIGITS, CLASSES]
        digits = images.digits[chosen, None].expand(logits.shape[:-1])
        (loss + F.cross_entropy(logits.flatten(0, 2), digits.flatten())).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad(set_to_none=True)
    return head


def reader(model: Any, head: nn.Linear) -> Any:
    """A copy of the model whose label is the left digit: the class token tells it already."""
    reading = copy.deepcopy(model)
    with torch.no_grad():
        reading.classifier.weight.copy_(head.weight[:CLASSES])
        reading.classifier.bias.copy_(head.bias[:CLASSES])
    return reading


@torch.inference_mode()
def accuracy(
    model: Any,
    codebook: Codebook,
    images: Images,
    world_size: int,
    *,
    single: bool = False,
    lost: float = 0.0,
    seed: int = 0,
) -> float:
    """Percent of images right, with equal shards, by the simulation of all ranks.

    Args:
        single: rank 0 alone has the class token.
        lost: share of the frames that do not arrive; drawn anew for every few images.
    """
    adapter = adapt(model)
    plan = Plan.make(TOKENS, world_size, causal=False, copies=1)
    options: dict[str, Any] = {"single_class_token": single}
    if lost:
        options |= {"lost": lost, "generator": torch.Generator().manual_seed(seed)}
    quantizers, right = frozen(codebook, adapter.device), 0
    for pixels, labels in batches(images, 16 if lost else 128):
        inputs = {"pixel_values": pixels}
        output = Simulation(model, codebook, plan, inputs, quantizers, **options).run()
        right += int((output.logits.argmax(-1) == labels).sum())
    return 100 * right / len(images.labels)


@torch.inference_mode()
def engine_accuracy(model: Any, codebook: Codebook, images: Images, world_size: int) -> float:
    """The same by the engine: ranks, sockets, frames."""

    def work(mesh: Any) -> int:
        with Engine(model, codebook, mesh) as engine:
            return sum(
                int((engine(pixel_values=pixels).logits.argmax(-1) == labels).sum())
                for pixels, labels in batches(images, 128)
            )

    return 100 * run_ranks(world_size, work)[0] / len(images.labels)


def batches(images: Images, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.pixels.split(size), images.labels.split(size), strict=True))
