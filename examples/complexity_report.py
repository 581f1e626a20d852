"""Swin-T beside what it would cost with neighborhood, RMT's and TransNeXt's attention: one page, nothing converted.

python examples/complexity_report.py [complexity.html]
"""

import sys

import torch

from attnrewrite import analyze
from attnrewrite.hosts.loading import load_model


def main(path: str = "complexity.html") -> None:
    model = load_model("torchvision:swin_t").eval()
    report = analyze(model, torch.zeros(1, 3, 224, 224), to=["neighborhood", "rmt", "transnext"], hardware="h200")
    for comparison in report.comparisons:
        print(comparison.verdict)
    print(f"wrote {report.to_html(path)}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
