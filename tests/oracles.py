"""Second implementations, in float64 and by brute force: what the engine must agree with.

Nothing here knows of rules, books or forms. Each example goes through the model alone, in a batch of one, and autograd
gives its gradient; norms, factors and sums are then written out by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Loss = Callable[[nn.Module, Any], Tensor]
Gradients = dict[str, Tensor]


def rows(batch: Any, chosen: Sequence[int], size: int) -> Any:
    """The chosen examples of a batch; leaves without a batch axis stay as they are."""
    index = torch.as_tensor(list(chosen), dtype=torch.int64)
    return tree_map(lambda x: x[index] if isinstance(x, Tensor) and x.dim() and x.shape[0] == size else x, batch)


def alone(model: nn.Module, loss: Loss, batch: Any, *, size: int) -> Gradients:
    """Per-example gradients, name -> (B, *shape): every example alone in its batch."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    stacked: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in range(size):
        value = loss(model, rows(batch, [i], size))
        assert value.shape == (1,)
        grads = torch.autograd.grad(value[0], list(parameters.values()), allow_unused=True)
        for (name, p), g in zip(parameters.items(), grads, strict=True):
            stacked[name].append(torch.zeros_like(p) if g is None else g)
    return {name: torch.stack(gs) for name, gs in stacked.items()}


def norms(gradients: Gradients) -> Tensor:
    """Per-example norms over all parameters, (B,), float64."""
    flat = torch.cat([g.to(torch.float64).reshape(len(g), -1) for g in gradients.values()], 1)
    return flat.norm(dim=1)


def abadi(norm_B: Tensor, bound: float) -> Tensor:
    """min(1, R / n), written as a loop."""
    return torch.tensor([1.0 if n <= bound else bound / n for n in norm_B.tolist()], dtype=torch.float64)


def automatic(norm_B: Tensor, gamma: float = 0.01) -> Tensor:
    """1 / (n + gamma), written as a loop."""
    return torch.tensor([1.0 / (n + gamma) for n in norm_B.tolist()], dtype=torch.float64)


def weighted(gradients: Gradients, factor_B: Tensor) -> Gradients:
    """sum_b factor_b g_b in float64, example by example."""
    sums = {}
    for name, each in gradients.items():
        total = torch.zeros(each.shape[1:], dtype=torch.float64)
        for factor, g in zip(factor_B.tolist(), each.to(torch.float64), strict=True):
            total += factor * g
        sums[name] = total
    return sums


def flat(tensors: Any) -> Tensor:
    """All tensors of a mapping in one float64 vector, in the order of their names."""
    return torch.cat([tensors[name].detach().to(torch.float64).flatten() for name in sorted(tensors)])


def relative_gap(found: Any, wanted: Any) -> float:
    """|found - wanted| / |wanted|, over all tensors together."""
    assert set(found) == set(wanted)
    gap, size = flat(found) - flat(wanted), flat(wanted).norm()
    return float(gap.norm() / size.clamp(min=1e-300))
