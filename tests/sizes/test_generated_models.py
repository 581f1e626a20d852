"""Models that use their sizes and modes in ways drawn by chance: converted, they are their donors or refuse."""

from __future__ import annotations

import random

import pytest
import torch
from generated_models import build
from generated_recipes import BLOCKS, Recipe, Step, other_sizes, recipe_by
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from judging import TARGETS, error, fate, faults, images, judge, outputs, places, told

import attnrewrite

RUN = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.generate),  # shrinking would judge hundreds more: survey.py simplifies
    "report_multiple_bugs": False,
}


@st.composite
def recipes(draw, block=None):
    return recipe_by(lambda options: draw(st.sampled_from(options)), block)


def check(recipe, target):
    found = faults(judge(lambda: build(recipe), recipe.image, other_sizes(recipe), {target: TARGETS[target]}))
    assert not found, told(recipe, found)


@pytest.mark.parametrize("block", BLOCKS)
def test_generated_models_are_their_donors_or_refuse(block):
    @settings(max_examples=38, **RUN)
    @given(recipes(block), st.sampled_from(list(TARGETS)))
    def judged(recipe, target):
        check(recipe, target)

    judged()


COURSE = "h % 4 == 0 and w % 4 == 0"

FOUND = {
    "a branch that no look takes": Recipe(
        image=(32, 16), block="map", core="sdpa", steps=(Step("scale", "gained_if", COURSE),)
    ),
    "a branch that a look leaves on its second condition": Recipe(
        image=(24, 16), seed=1, steps=(Step("logits", "doubled_if", COURSE),)
    ),
    "a padding of nothing on every look": Recipe(
        block="windows on tokens", core="bmm", shell="block", mlp=True, seed=2
    ),
    "the larger of a size and a constant": Recipe(
        image=(32, 16),
        block="conv map",
        blocks=2,
        shell="net",
        steps=(Step("map", "lower_right"), Step("map", "pooled_by_ratio")),
    ),
    "extents that meet on every look": Recipe(
        image=(32, 16), block="conv map", blocks=2, shell="net", steps=(Step("map", "pooled_by_ratio"),) * 2
    ),
    "a roll by a part of the map": Recipe(
        image=(32, 32), block="windows on tokens", window=2, clamped=True, padded=False, shift="quarter map"
    ),
    "a root of a count that is one on every look": Recipe(
        image=(32, 16), block="reduced by pooling", sizes="isqrt", shell="net", clamped=True, mlp=True,
        steps=(Step("map", "pooled_by_ratio"),),
    ),
    "sides of a part of the map": Recipe(
        block="reduced by pooling", blocks=2, sizes="attributes", shell="net", clamped=True,
        steps=(Step("between", "lower_right"),),
    ),
    "sides of a part of the map, and a law of the image that fits them": Recipe(
        block="reduced by pooling", blocks=2, sizes="attributes", shell="block", clamped=True,
        steps=(Step("between", "lower_right"),),
    ),
    "a plain number that is alike on every look": Recipe(
        image=(24, 16), split="fused", pool="pooled map", steps=(Step("logits", "rolled_by", "h - w + 5"),)
    ),
    "remainders of patches that are alike on every look": Recipe(
        image=(24, 16), stem="patches by reshape", block="reduced", blocks=2, sizes="tuple",
        steps=(Step("scale", "repeated", "len([i for i in range(h) if i % 2])"),),
    ),
    "squares alone agree": Recipe(
        block="rows", blocks=2, steps=(Step("attended", "squashed_if", "int((h * w) ** 0.5) ** 2 != h * w"),)
    ),
    "a look that contradicts one of the same course": Recipe(
        image=(16, 32), block="reduced", split="fused", sizes="dict", shell="block",
        steps=(
            Step("tokens", "flipped_if", "(h, w) == (4, 4)"),
            Step("scale", "repeated", "len([i for i in range(h) if i % 2])"),
        ),
    ),
    "a branch on a root that a parent gave": Recipe(
        image=(24, 24), split="fused view", sizes="isqrt", pool="max",
        steps=(Step("map", "padded_if_needed"), Step("attended", "gained_if", "(h, w) == (4, 4)")),
    ),
    "a constant of training": Recipe(
        image=(24, 24), block="map", steps=(Step("attended", "times_a_tensor", "2 if self.training else 1"),)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_was_wrong_once_is_right_or_refused(name):
    for target in TARGETS:
        check(FOUND[name], target)


def test_a_form_with_a_constant_that_fits_two_batches_explains_nothing():
    """No other size takes the same course, and ``0.1 * b + 0.2`` is ``0.1 * log2(8 * b)`` for a batch of 1 and of 2."""
    queries = Step("queries", "times", "b")
    check(
        Recipe(
            image=(32, 16), block="windows", split="fused view", sizes="resolution", shell="block", window=2,
            batch="loop", mlp=True, seed=3, steps=(queries,),
        ),
        "identity",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(20))
def test_many_generated_models_are_their_donors_or_refuse(part):
    """250 a part; recipes and their target by a seed, which spread wider than what hypothesis draws."""
    wrong = []
    for seed in range(1000 + 250 * part, 1250 + 250 * part):
        chance = random.Random(seed)
        recipe, target = recipe_by(chance.choice), chance.choice(list(TARGETS))
        options = {target: TARGETS[target]}
        found = faults(judge(lambda recipe=recipe: build(recipe), recipe.image, other_sizes(recipe), options))
        if found:
            wrong.append(told(f"{seed}: {recipe}", found[:3]))
    assert not wrong, "\n".join([f"{len(wrong)} of 250 recipes", *wrong])


def test_a_donor_is_equal_to_itself():
    """Else the judge would find faults of its own."""
    judged = 0
    for seed in range(150):
        recipe = recipe_by(random.Random(seed).choice)
        one, other = build(recipe), build(recipe)
        for _, batch, train in places(recipe.image, other_sizes(recipe)):
            try:
                expected = outputs(one.train(train), batch, train)
            except Exception:  # this donor does not take this size
                continue
            assert error(outputs(other.train(train), batch, train), expected) == 0, recipe
            judged += 1
    assert judged > 1000


def test_a_recipe_is_printed_as_it_is_written():
    for seed in range(50):
        recipe = recipe_by(random.Random(seed).choice)
        assert eval(repr(recipe), {"Recipe": Recipe, "Step": Step}) == recipe


@pytest.mark.parametrize(
    ("step", "where"),
    [
        (Step("map", "doubled_if", "h > 5"), "24x24"),
        (Step("map", "doubled_if", "b > 1"), "captured size, batch 3"),
        (Step("map", "doubled_if", "self.training"), "captured size, training"),
        (Step("map", "table_interpolated"), "8x32"),
        (Step("logits", "plus", "h * w"), "16x20"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_the_judge_finds_what_stays_as_it_was_at_capture(monkeypatch, step, where):
    """A trace at one size, in eval mode, stands for a wrong conversion."""

    def traced(model, to, example, **options):
        program = torch.export.export(model, (example,)).module(check_guards=False)
        program.train = program.eval = lambda mode=True: program
        return program

    class Nothing:
        converted = ()

    monkeypatch.setattr(attnrewrite, "convert", traced)
    monkeypatch.setattr(attnrewrite, "report", lambda model: Nothing)
    recipe = Recipe(steps=(step,))
    found = judge(lambda: build(recipe), recipe.image, other_sizes(recipe), {"identity": {}})
    assert fate(found) in ("WRONG", "FOREIGN")
    assert any(finding.where.startswith(where) for finding in faults(found)), told(recipe, found)


def test_a_plain_model_runs_at_every_size():
    """A refusal everywhere would pass all other tests."""
    recipe = Recipe(pool="mean")
    converted = attnrewrite.convert(build(recipe), "identity", images(1, recipe.image), progress=False)
    donor = build(recipe)
    for _, batch, train in places(recipe.image, other_sizes(recipe)):
        assert error(outputs(converted.train(train), batch, train), outputs(donor.train(train), batch, train)) < 1e-9
