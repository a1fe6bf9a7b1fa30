"""What is compared: variants of adapting a model, and where each is looked at."""

from __future__ import annotations

from dataclasses import dataclass, replace

LONG = 1000  # steps of adaptation, of the rows with goals
RANKS = (2, 8)  # N is drawn from these while training, where nothing else is said
WORLD = 4  # ranks at the evaluation, where nothing else is said


@dataclass(frozen=True)
class Size:
    """How large model and data are, and how long training takes.

    Attributes:
        pretraining: steps on one device.
        adaptation, lr: steps as N ranks, of codes and controls alike, and their rate.
        longest: steps at most, where a variant has its own.
        batch: images a step, of both.
        images: adaptation images; calibration takes the first `calibration` of them.
        test: images of the evaluation, of each seed's own.
        seeds: of initial values, data and codebooks.
        codewords: at most as many a group.
        mlp: the inner width of an MLP over `hidden`.
    """

    hidden: int = 96
    layers: int = 4
    heads: int = 4
    pretraining: int = 1000
    adaptation: int = 250
    longest: int = LONG
    lr: float = 4e-4
    batch: int = 16
    images: int = 8192
    calibration: int = 512
    test: int = 2048
    seeds: int = 3
    codewords: int = 4096
    mlp: int = 1


FULL = Size()
# Of the shape that real ViTs have, where codes are small beside the blocks' own work.
# What 3e-4 and 500 steps learn of the images adapted on costs more than codes do.
WIDE = Size(hidden=192, mlp=4, lr=5e-5, longest=250)
QUICK = Size(32, 2, 2, 4, 2, 2, 4e-4, 4, 64, 16, 32, 2, 4)


@dataclass(frozen=True)
class Variant:
    """A task, a codebook, and how model and codebook were adapted to each other; λ is `noise`, β
    `commitment`. Not `adapted`: the model as it was, with the codebook that calibration found.
    `bits` in place of groups in space "transform"; `steps` where not the size's own."""

    task: str
    space: str
    groups: int = 0
    codewords: int = 0
    adapted: bool = True
    noise: float = 0.3
    commitment: float = 1e-4
    ranks: tuple[int, int] = RANKS
    single: bool = False
    bits: float = 0
    steps: int = 0

    @property
    def name(self) -> str:
        if self.bits:
            return f"{self.space}:{self.bits:g}"
        return f"{self.space}:{self.groups}×{self.codewords}"


@dataclass(frozen=True)
class Row:
    """A variant, looked at as `world_size` ranks that lose a share `lost` of all frames."""

    variant: Variant
    world_size: int = WORLD
    lost: float = 0.0


# 76.8 and 2457.6 times fewer bits than the block's input in fp32. The fewest bits are those of one
# code of five bits in one block: a code of one bit in each is worse than none.
MAIN = Variant("largest", "transform", codewords=32, bits=40, steps=LONG)
LEAST = replace(MAIN, bits=1.25)
SWEPT = Variant("largest", "hidden", 4, 256)  # of which training settings are varied
SPACES = {
    "hidden": [(1, 1024), (4, 1024)],
    "kv": [(1, 1024), (4, 1024), (16, 128)],
}
BUDGETS = (10, 40, 112)  # of space "transform"


def wide() -> dict[str, list[Row]]:
    """Rows of a model of size `WIDE`, at the same compression, by four ranks and by two.

    Of 256 codewords: so many bits are worth more in fewer, larger groups, and a model of this size
    has room for the search.
    """
    main = replace(MAIN, codewords=256, bits=MAIN.bits * WIDE.hidden / FULL.hidden)
    return {"goals": [Row(main), Row(main, world_size=2)]}


def groups() -> dict[str, list[Row]]:
    """Rows by what they show; what matters most comes first."""
    sweep = (2, 3, WORLD, 6, 8)
    fixed = replace(SWEPT, ranks=(WORLD, WORLD))
    bits = [Variant("largest", space, *sizes) for space, tried in SPACES.items() for sizes in tried]
    bits += [Variant("largest", "transform", codewords=32, bits=budget) for budget in BUDGETS]
    return {
        "goals": [Row(MAIN), Row(LEAST)],
        "class token": [Row(replace(SWEPT, single=single)) for single in (False, True)],
        "loss": [Row(SWEPT, lost=share) for share in (0.0, 0.05)],
        "bits": [
            Row(replace(variant, adapted=adapted)) for variant in bits for adapted in (True, False)
        ],
        "noise": [Row(replace(SWEPT, noise=value)) for value in (0.0, 0.1, 0.3, 1.0)],
        "commitment": [
            Row(replace(SWEPT, commitment=value)) for value in (0.0, 1e-4, 2e-4, 5e-4, 0.25)
        ],
        "ranks": [Row(variant, world_size=n) for variant in (SWEPT, fixed) for n in sweep],
        "codewords": [Row(replace(SWEPT, codewords=count)) for count in (64, 256, 1024, 4096)],
        "easy": [Row(replace(SWEPT, task="left"))],
    }
