"""The backward pass and the memory of a training step, by running both on shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .cost import Cost
from .size_tracer import SizeTracer


@dataclass(frozen=True)
class Training:
    """One step on the example, with attention fused (its map is recomputed: five products instead of four).

    Attributes:
        forward, backward: MACs; ``step`` is their sum. Backward are the contractions that take place, also in modules
            whose forward is counted by definition.
        saved: bytes kept from forward to backward, parameters excluded.
        peak: most bytes of activations and gradients alive at once, parameters excluded.
        peak_inference: the same of a forward pass without gradients, unfused.
        states: bytes of parameters, their gradients and two optimizer moments, all in the parameters' dtype.
    """

    forward: int
    backward: int
    saved: int
    peak: int
    peak_inference: int
    states: int

    @property
    def step(self) -> int:
        return self.forward + self.backward


def training_costs(tracer: SizeTracer, parameters: int, model: nn.Module) -> Training:
    """Raises:
    CaptureError: the model does not run on shapes alone with gradients.
    """
    found, inference = tracer.at_example(training=True), tracer.at_example()
    backward: Cost = found.backward
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    return Training(
        forward=found.total.macs,
        backward=backward.macs,
        saved=found.total.saved,
        peak=found.peak,
        peak_inference=inference.peak,
        states=stored + 3 * trainable,
    )
