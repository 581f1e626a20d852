"""Judge recipes drawn by seed and count what came: ``python tests/sizes/survey.py 0 300`` (the first seed, how many).

With ``--simplify``, faulty recipes are made as simple as they stay faulty. One recipe is judged alone by
``python tests/sizes/survey.py 'Recipe(block="windows")'``.
"""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the library of this checkout, whichever is installed

from generated_models import build
from generated_recipes import Recipe, Step, other_sizes, recipe_by
from judging import FAULTS, TARGETS, fate, faults, judge, told


def findings_of(recipe, targets=TARGETS):
    return judge(lambda: build(recipe), recipe.image, other_sizes(recipe), targets)


def simpler(recipe):
    """Recipes with one choice less."""
    for i in range(len(recipe.steps)):
        yield replace(recipe, steps=recipe.steps[:i] + recipe.steps[i + 1 :])
    for choice in fields(Recipe):
        if choice.name != "steps" and getattr(recipe, choice.name) != choice.default:
            yield replace(recipe, **{choice.name: choice.default})


def simplest(recipe, fault):
    """The recipe with all choices left out that the target and the kind of its fault do without."""
    for one in simpler(recipe):
        found = faults(findings_of(one, {fault.target: TARGETS[fault.target]}))
        if found and kind(found[0]) == kind(fault):
            return simplest(one, fault)
    return recipe


def kind(fault):
    return fault.verdict, fault.where == "conversion", "training" in fault.where


def drawn(seed):
    return recipe_by(random.Random(seed).choice)


def survey(seeds, simplify=False):
    counts, comparisons, start = Counter(), Counter(), time.perf_counter()
    for seed in seeds:
        recipe = drawn(seed)
        found = findings_of(recipe)
        verdict = fate(found)
        counts[verdict] += 1
        if verdict in FAULTS:
            found_faults = faults(found)
            if simplify:
                recipe = simplest(recipe, found_faults[0])
                found_faults = faults(findings_of(recipe))
            print(f"{seed}: {verdict} {told(recipe, found_faults[:3])}", flush=True)
        comparisons.update(finding.verdict for finding in found)
    seconds = time.perf_counter() - start
    print(f"recipes: {dict(counts)}; comparisons: {dict(comparisons)}; {seconds / len(seeds):.2f} s a recipe")


def main(arguments):
    warnings.filterwarnings("ignore")
    simplify = "--simplify" in arguments
    arguments = [argument for argument in arguments if argument != "--simplify"]
    if arguments and arguments[0].startswith("Recipe"):
        recipe = eval(arguments[0], {"Recipe": Recipe, "Step": Step})
        print(told(recipe, findings_of(recipe)))
    else:
        first, count = (int(argument) for argument in arguments or ("0", "300"))
        survey(range(first, first + count), simplify)


if __name__ == "__main__":
    main(sys.argv[1:])
