"""Rules: how each function of a guarded parameter is computed, normed and summed. One file per family.

Importing this package registers them all.
"""

from discreet.core.rules import (
    attention,
    bag,
    convolution,
    einsum,
    elementwise,
    embedding,
    experts,
    instance,
    linear,
    masks,
    normalisation,
    recurrent,
    rows,
    transposed,
)

__all__ = [
    "attention",
    "bag",
    "convolution",
    "einsum",
    "elementwise",
    "embedding",
    "experts",
    "instance",
    "linear",
    "masks",
    "normalisation",
    "recurrent",
    "rows",
    "transposed",
]
