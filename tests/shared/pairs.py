"""A small model beside what it became: the pairs that most tests of conversion compare."""

from __future__ import annotations

import copy

from small_models import BUILDERS, DTYPE, TOLERANCE, images, small_model

import attnrewrite

VITS = [name for name in BUILDERS if "vit" in name]
SWINS = [name for name in BUILDERS if "swin" in name]
CONVERSIONS = [(name, "identity") for name in BUILDERS]
CONVERSIONS += [(name, "neighborhood") for name in BUILDERS if not name.endswith(("unfused", "eager"))]


def converted_from(donor, name, to, example=None, **options):
    """Attention of whole maps becomes a kernel of 3, windows stay what they are; other sites become our own modules."""
    if to == "neighborhood" and name in VITS:
        options = {"kernel_size": 3} | options
    example = images(name, 1, next(donor.parameters()).dtype) if example is None else example
    return attnrewrite.convert(donor, to, example, **options)


class Pair:
    """A donor, what it became, and a batch for both. Tests change copies only."""

    def __init__(self, name, to):
        self.name, self.to = name, to
        self.donor = small_model(name)
        self.converted = converted_from(self.donor, name, to)
        self.batch = images(name)
        self.same_function = to == "identity" or name in SWINS
        self.tolerance = TOLERANCE[DTYPE[name]]

    def copies(self):
        return copy.deepcopy(self.donor), copy.deepcopy(self.converted)
