"""Recipes of generated models: all choices of one, told in a line, and drawn by chance."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from generated_masks import MASKS
from generated_numbers import BRANCHES, CONDITIONS, NUMBERS, USES
from generated_steps import IMAGE_STEPS, MAP_STEPS, TOKEN_CUTS, TOKEN_STEPS

STRUCTURAL = {"image": IMAGE_STEPS, "map": MAP_STEPS, "tokens": TOKEN_STEPS | TOKEN_CUTS}
STRUCTURAL |= {"mask": MASKS, "given mask": MASKS}
"""The steps that use no number, by place: in the stem, on the map before or between blocks, at a block's input, and for
scores, made in the attention or given to it. Steps with a number stand there too, and at "queries", "values", "scale",
"attended" in the attention, and at "logits"."""


@dataclass(frozen=True)
class Step:
    """A named step at a place; for those that use a number or a condition, with its formula."""

    place: str
    name: str
    formula: str = ""

    def __repr__(self):
        return f"Step({', '.join(repr(value) for value in (self.place, self.name, self.formula) if value)})"


STEMS = ("conv", "two convs", "conv padded", "patches by reshape", "patches by unfold")
BLOCKS = ("tokens", "map", "conv map", "windows", "windows on tokens", "rows", "reduced", "reduced by pooling")
CORES = ("matmul", "sdpa", "einsum", "bmm")
SPLITS = ("reshape", "view", "unflatten", "fused", "fused view")
SIZES = ("arguments", "tuple", "dict", "root", "isqrt", "attributes", "resolution")
SHELLS = ("modules", "block", "net")
POOLS = ("mean", "sum over n", "sum by factor", "max", "class token", "tokens after class", "first", "middle",
         "weighted", "pooled map", "with auxiliary in training", "upper rows")  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """All choices of a model; what is left at its default is not printed."""

    image: tuple[int, int] = (16, 16)
    patch: int = 4
    dim: int = 16
    heads: int = 2
    stem: str = "conv"
    block: str = "tokens"
    blocks: int = 1
    core: str = "matmul"
    split: str = "reshape"
    sizes: str = "arguments"
    shell: str = "modules"
    window: int = 4
    clamped: bool = False
    padded: bool = True
    shift: str = ""
    batch: str = "b"
    mlp: bool = False
    skipping: str = ""
    pool: str = "mean"
    seed: int = 0
    steps: tuple[Step, ...] = field(default=())

    def __repr__(self):
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = [f"{f.name}={given[f.name]!r}" for f in fields(self) if given[f.name] != f.default]
        return f"Recipe({', '.join(changed)})"

    def at(self, place):
        return [step for step in self.steps if step.place == place]


def other_sizes(recipe):
    """Sizes to judge at beside the captured one: as many patches on another map, larger, longer, and uneven."""
    (h, w), p = recipe.image, recipe.patch
    return [(h // 2, w * 2), (h + 2 * p, w + 2 * p), (h, w + p), (h * 2, w), (h + p // 2, w + p + 1)]


PLACES_OF = {
    "tokens": ("tokens", "queries", "values", "attended", "mask", "given mask"),
    "map": ("queries", "values", "attended", "mask", "given mask"),
    "conv map": ("mask", "given mask"),
    "windows": ("queries", "values", "attended", "mask"),
    "windows on tokens": ("tokens", "queries", "values", "attended", "mask"),
    "rows": ("queries", "values", "attended", "mask"),
    "reduced": ("tokens", "queries", "values", "attended", "mask", "given mask"),
    "reduced by pooling": ("tokens", "queries", "values", "attended", "mask"),
}
"""Where steps can stand by the kind of block, beside the places that all have."""


def step_by(choose, block, pool, blocks):
    """A step that this kind of model can take; ``choose`` takes one of a list."""
    places = ("map", "map", "scale", "logits", "image", *PLACES_OF[block]) + (("between",) if blocks > 1 else ())
    if "class" in pool:
        places = [place for place in places if "mask" not in place]
    place = choose(places)
    named = STRUCTURAL.get("map" if place == "between" else place, {})
    if place == "tokens" and (block != "tokens" or blocks > 1):
        named = TOKEN_STEPS
    if place in ("mask", "given mask") or (named and choose((True, True, True, False))):
        return Step(place, choose(list(named)))
    if choose((True, False)):
        return Step(place, choose(list(USES)), choose(NUMBERS))
    return Step(place, choose(list(BRANCHES)), choose(CONDITIONS))


def recipe_by(choose, block=None):
    """A recipe of choices, few enough that one refused choice does not hide all others."""
    block = block or choose(BLOCKS)
    changes = {"block": block, "image": choose(((16, 16), (32, 32), (16, 32), (24, 24), (32, 16), (24, 16)))}
    changes["blocks"] = choose((1, 1, 2))
    if choose((True, False)):
        changes |= {"core": choose(CORES), "split": choose(SPLITS), "mlp": choose((False, True))}
    if choose((True, False)):
        changes["shell"] = choose(SHELLS)
    if block in ("tokens", "windows on tokens", "reduced", "reduced by pooling"):
        changes["sizes"] = choose(("arguments", *SIZES))
    if "windows" in block:
        changes["window"] = choose((4, 4, 2, 3, 8))
        changes |= {"clamped": choose((False, True)), "padded": choose((True, False))}
        changes |= {"shift": choose(("", "", "half window", "if larger", "quarter map"))}
        changes |= {"batch": choose(("b", "divided", "-1", "loop"))}
    if block == "reduced by pooling":
        changes["clamped"] = choose((False, True))
    if choose((True, True, False)):
        changes["pool"] = "mean"
    else:
        pools = POOLS if block == "tokens" else [pool for pool in POOLS if "class" not in pool]
        changes["pool"] = choose(pools)
    if not choose((True, True, True, False)):
        changes["stem"] = choose(STEMS)
    if not choose((True, True, True, True, False)):
        changes["skipping"] = choose(("in training", "by chance", "batch of one"))
    count = choose((1, 1, 2, 0, 3))
    changes["steps"] = tuple(step_by(choose, block, changes["pool"], changes["blocks"]) for _ in range(count))
    changes["seed"] = choose(range(4))
    return Recipe(**changes)
