"""What a book does not ask the data while its settlement is recorded, to be replayed (`discreet.core.replay`).

Shape legend: B = examples of the microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recording:
    """What a settlement that is recorded, to be replayed, leaves open: who takes part, and whether norms are sure.

    Attributes:
        takes_part_B: whether an example of the microbatch is one; what stands in for one has a factor of 0.
        answer: where it is written, as soon as all norms are there, whether some norm is in doubt; None where it is not
            recorded, and doubts are asked for.
    """

    takes_part_B: Tensor
    answer: Tensor | None
    _doubts: list[Tensor] = field(default_factory=list)

    def note(self, norm_B: Tensor, *, groups: int) -> None:
        """The norms of a group, of so many."""
        assert self.answer is not None
        self._doubts.append(~torch.isfinite(norm_B.sum()))
        if len(self._doubts) == groups:
            self.answer.copy_(torch.stack(self._doubts).any().to(self.answer.dtype), non_blocking=True)
