"""Capture: a model in, its ATen graph and the boundary of every module call out."""

from .captured_graph import CapturedGraph
from .examples import Inputs, example_inputs_for, normalize_inputs
from .exported import Capture, capture, capture_call, traced_graph
from .in_place import IN_PLACE
from .looks import further_looks, image_sides, is_image, other_looks, same_size_looks, training_look
from .module_call import ModuleCall, NodeRef

__all__ = [
    "IN_PLACE", "Capture", "CapturedGraph", "Inputs", "ModuleCall", "NodeRef", "capture", "capture_call",
    "example_inputs_for", "further_looks", "image_sides", "is_image", "normalize_inputs", "other_looks",
    "same_size_looks", "traced_graph", "training_look",
]  # fmt: skip
