"""What third-party packages need before they can be imported beside this torch."""

from __future__ import annotations

import functools
import importlib.util

import torch

THIRD_PARTY_WARNINGS = (
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # transformers to peft
    "ignore:There is a performance drop:UserWarning",  # torch: vmap of a weight normalisation falls back to a loop
)
_OPERATORS = ("nms", "qnms")


@functools.cache
def make_importable() -> torch.library.Library | None:
    """Let timm and transformers import torchvision when its operators are built for another torch.

    A package registry serves torchvision for CUDA; beside a CPU build of torch its library does not load, and its
    import fails on two operators that nothing here calls. They are declared, without an implementation.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in _OPERATORS:
            library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
        return library
    return None
