"""Identity conversion of many small models: each comes out equal, or its sites are refused with a reason.

    python benchmarks/zoo_sweep.py --output docs/zoo.md
    python benchmarks/zoo_sweep.py --only "timm:swin*"

The models have random weights and reduced sizes; weights that their initialization leaves too small to matter (zeros,
tiny layer scales, almost constant scores) are made larger first. They are converted with an example batch of
``--batch`` and compared with the original at that batch and at a batch of 3, at other sizes and in training. A foreign
exception or a number that differs is a defect.
"""

from __future__ import annotations

import argparse
import os
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports a model library: nothing is downloaded

import torch
from zoo.case import Case
from zoo.handwritten_models import handwritten_cases
from zoo.timm_models import timm_cases
from zoo.torchvision_models import torchvision_cases
from zoo.transformers_models import transformers_cases
from zoo.verdict import OTHER_BATCH, TOLERANCE, Row, sweep

from attnrewrite.torchvision_compat import ensure_torchvision


def cases() -> list[Case]:
    return handwritten_cases() + torchvision_cases() + transformers_cases() + timm_cases()


def table(rows: list[Row], batch: int) -> str:
    """The result as Markdown."""
    defects = sum(row.is_defect for row in rows)
    converted = sum(bool(row.sites) for row in rows)
    head = [
        f"# Identity conversion of {len(rows)} small models",
        "",
        f"Captured at a batch of {batch}, compared at {batch} and at {OTHER_BATCH} in eval mode. An error is relative",
        f"to the greatest output and may be {TOLERANCE:.0e}. torch {torch.__version__}. *Other sizes*: three other",
        "sides of the image where the model takes them, one of them with sides that nothing divides, each at a batch",
        f"of 1 and of {OTHER_BATCH}: how many came out equal, and how many were refused. *Training*: gradients in",
        "training mode.",
        f"{converted} converted, {len(rows) - converted} not; {defects} defects. Made by `benchmarks/zoo_sweep.py`.",
        "",
        "| model | sites | worst error | other sizes | training | seconds | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *map(str, rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the table to this file")
    parser.add_argument("--only", default="*", help="names of the models to run, as a glob")
    parser.add_argument("--batch", type=int, default=1, help="samples of the example input")
    arguments = parser.parse_args()
    ensure_torchvision()
    warnings.filterwarnings("ignore")
    rows: list[Row] = []
    for case in cases():
        if not fnmatchcase(case.name, arguments.only):
            continue
        rows.append(sweep(case, arguments.batch))
        print(rows[-1], flush=True)
        if arguments.output is not None:
            arguments.output.write_text(table(rows, arguments.batch), encoding="utf-8")
    print(f"\n{len(rows)} models, {sum(row.is_defect for row in rows)} defects")


if __name__ == "__main__":
    main()
