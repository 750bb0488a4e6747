"""Rules for layer, group and RMS normalisation: normalise without parameters, then scale and shift per example."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from discreet.core.parameter import Guarded, Use, plain, rule


@rule(F.layer_norm)
def layer_norm(
    use: Use,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.layer_norm`` over trailing axes."""
    return _affine(use, input, F.layer_norm(input, normalized_shape, eps=eps), weight, bias, trailing=True)


@rule(F.rms_norm)
def rms_norm(
    use: Use, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``F.rms_norm`` over trailing axes."""
    return _affine(use, input, F.rms_norm(input, normalized_shape, eps=eps), weight, None, trailing=True)


@rule(F.group_norm)
def group_norm(
    use: Use,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.group_norm``: statistics within an example, scale and shift per channel."""
    return _affine(use, input, F.group_norm(input, num_groups, eps=eps), weight, bias, trailing=False)


def _affine(
    use: Use, input: Tensor, normal: Tensor, weight: Tensor | None, bias: Tensor | None, *, trailing: bool
) -> Tensor:
    if isinstance(input, Guarded) or not use.is_batched(input):
        raise use.refuse("its input does not carry the batch", "pass activations [batch, ...].")
    if weight is not None:
        normal = normal * _aligned(use, weight, normal, trailing=trailing)
    if bias is not None:
        normal = normal + _aligned(use, bias, normal, trailing=trailing)
    return normal


def _aligned(use: Use, value: Tensor, target: Tensor, *, trailing: bool) -> Tensor:
    """A scale or shift shaped to broadcast against the target: over trailing axes, or over channels (axis 1)."""
    if not isinstance(value, Guarded):
        return plain(value) if trailing else value.reshape(1, -1, *[1] * (target.dim() - 2))
    each = use.expand(value)
    folds = target.shape[0] // use.book.examples
    if folds > 1:
        each = each.repeat_interleave(folds, 0)
    if not trailing:
        return each.reshape(target.shape[0], -1, *[1] * (target.dim() - 2))
    return each.reshape(target.shape[0], *[1] * (target.dim() - 1 - value.dim()), *value.shape)
