"""Rule for instance normalisation: normalise each channel of each example without parameters, then scale and shift."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from discreet.core.parameter import Guarded, Use, plain, rule


@rule(F.instance_norm)
def instance_norm(
    use: Use,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.instance_norm`` of activations [batch, channels, ...]. Statistics that a forward would update are refused."""
    if isinstance(input, Guarded) or not use.is_batched(input) or input.dim() < 3:
        raise use.refuse(f"an input of shape {tuple(input.shape)}", "pass activations [batch, channels, ...].")
    if use_input_stats and (running_mean is not None or running_var is not None):
        raise use.refuse("running statistics would learn from the data without noise", "track_running_stats=False.")
    normal = F.instance_norm(
        input, running_mean, running_var, None, None, use_input_stats=use_input_stats, momentum=momentum, eps=eps
    )
    if weight is not None:
        normal = normal * _per_channel(use, weight, normal)
    return normal if bias is None else normal + _per_channel(use, bias, normal)


def _per_channel(use: Use, value: Tensor, target: Tensor) -> Tensor:
    """A scale or shift (C,) shaped to broadcast over axis 1 of the target; guarded ones as one copy per example."""
    inner = [1] * (target.dim() - 2)
    if not isinstance(value, Guarded):
        return plain(value).reshape(1, -1, *inner)
    each = use.expand(value)
    folds = target.shape[0] // use.book.examples
    if folds > 1:
        each = each.repeat_interleave(folds, 0)
    return each.reshape(target.shape[0], -1, *inner)
