"""Rule for embedding_bag: rows picked by integer ids, added up or averaged bag by bag.

A bag is an embedding and a weighted sum, so it is written as these two: the embedding has its own rule, and what comes
after it holds no parameter.

Shape legend: B = examples, N = bags (B, or B folded), S = ids in a bag, D = width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from discreet.core.parameter import Guarded, Use, rule
from discreet.core.rules.embedding import embedding


@rule(F.embedding_bag)
def embedding_bag(
    use: Use,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """``F.embedding_bag`` for ``mode="sum"`` and ``"mean"``: one bag per row of ids, or one per offset.

    Padding ids count neither for the sum nor for the mean; an empty bag is zero.
    """
    if mode not in ("sum", "mean"):
        raise use.refuse(f"mode={mode!r}", 'pass mode="sum" or mode="mean".')
    if isinstance(per_sample_weights, Guarded) or (per_sample_weights is not None and mode != "sum"):
        raise use.refuse("per_sample_weights of a mean, or a parameter", "use F.embedding and multiply.")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    ids_NS, scale_NS, kept_NS = _bags(use, input, offsets, per_sample_weights, include_last_offset)
    if padding_idx is not None:
        kept_NS = kept_NS & (ids_NS != padding_idx)
    rows_NSD = embedding(
        use.renamed(input if offsets is None else offsets, ids_NS), ids_NS, weight, None, max_norm, norm_type,
        scale_grad_by_freq, sparse,
    )  # fmt: skip
    rows_NSD = rows_NSD.masked_fill(~kept_NS.unsqueeze(-1), 0)
    if scale_NS is not None:
        rows_NSD = rows_NSD * scale_NS.unsqueeze(-1)
    sums_ND = rows_NSD.sum(1)
    return sums_ND / kept_NS.sum(1, keepdim=True).clamp(min=1) if mode == "mean" else sums_ND


def _bags(
    use: Use, input: Tensor, offsets: Tensor | None, scale: Tensor | None, include_last_offset: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Ids and weights bag by bag, (N, S), and which of the entries exist."""
    if offsets is None:
        if isinstance(input, Guarded) or input.dim() != 2 or not use.is_batched(input):
            raise use.refuse(f"ids of shape {tuple(input.shape)}", "pass ids [batch, ids of a bag].")
        return input, scale, torch.ones_like(input, dtype=torch.bool)
    if include_last_offset or not use.is_batched(offsets) or offsets.shape[0] != use.book.examples:
        raise use.refuse(
            f"{offsets.shape[0]} offsets for {use.book.examples} examples",
            "pass one offset per example without the last one, or two-dimensional ids with padding_idx.",
        )
    ends = torch.cat([offsets[1:], offsets.new_tensor([input.shape[0]])])
    lengths = ends - offsets
    if input.dim() != 1 or int(offsets[0]) != 0 or int(lengths.min()) < 0:
        raise use.refuse("offsets that do not cut the ids into bags", "start at 0, and do not decrease.")
    place_NS = torch.arange(int(lengths.max()), device=offsets.device) + offsets.unsqueeze(1)
    kept_NS = place_NS < ends.unsqueeze(1)
    place_NS = place_NS.clamp(max=max(0, input.shape[0] - 1))
    return input[place_NS], None if scale is None else scale[place_NS], kept_NS
