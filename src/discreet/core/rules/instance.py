"""Rule for instance normalisation: normalise each channel of each example without parameters, then scale and shift."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from discreet.core.parameter import Guarded, Use, rule
from discreet.core.rules.normalisation import affine


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
    return affine(use, normal, weight, bias, trailing=False)
