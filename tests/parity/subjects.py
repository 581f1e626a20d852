"""Which of our modules answers for which official class, by the family of a golden file."""

from __future__ import annotations

import importlib

from golden import Golden, Subject

FAMILIES = {
    "na": "neighborhood_subjects",
    "nat": "neighborhood_subjects",
    "transnext": "transnext_subjects",
    "rmt": "rmt_subjects",
    "crossformer": "crossformer_subjects",
    "t2t": "t2t_subjects",
    "src": "source_subjects",
}


def subject_of(golden: Golden) -> Subject:
    """Raises:
    LookupError: for a family or class that has no counterpart here.
    """
    module = FAMILIES.get(golden.family.split(".")[0])
    if module is None:
        raise LookupError(f"no counterpart for family {golden.family!r}")
    return importlib.import_module(module).build(golden)
