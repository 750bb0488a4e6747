"""The sum over ranks. One process is the identity.

Each rank clips and sums its own share of the logical batch; the shares are disjoint, so the sum over ranks has the
sensitivity of one share. Noise is added after this sum, once: every rank draws the same noise from the same key.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from discreet.core.clipping import ClippedSum


def world_size() -> int:
    """Number of ranks; 1 when torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def world_sum(total: ClippedSum) -> ClippedSum:
    """Add the clipped sums of all ranks, in one all-reduce, in float64 as any sum of several.

    **Guarantees.** The shares must hold disjoint examples under the same clipping; then the sensitivity is unchanged.
    """
    if world_size() == 1:
        return total
    flat = torch.cat([value.to(torch.float64).flatten() for value in total.tensors.values()])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    pieces = flat.split([value.numel() for value in total.tensors.values()])
    summed = {n: piece.view(value.shape) for (n, value), piece in zip(total.tensors.items(), pieces, strict=True)}
    return replace(total, tensors=summed)
