"""How often an accelerator would be waited for: every question that is asked of a tensor's values stops its queue."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from discreet.core.book import Book
from discreet.core.clipping import Clipping
from discreet.core.gradient import backward, settle, trainable
from discreet.core.meeting import guard
from discreet.core.style import Style

aten = torch.ops.aten
QUESTIONS = {
    *(aten._local_scalar_dense, aten.equal, aten.nonzero, aten.is_nonzero, aten.masked_select, aten.bincount),
    *(aten._unique2, aten.unique_consecutive, aten.unique_dim),
}


class Waits(TorchDispatchMode):
    """Names of the operations whose answer, or whose shape, depends on what a tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = function.overloadpacket is aten.index and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if function.overloadpacket in QUESTIONS or masks:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Decoder(nn.Module):
    """A tied language model with attention, norms, a convolution and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 16), nn.Parameter(torch.randn(12, 16))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(2))
        self.mix = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTD = self.tokens(ids_BT) + self.places
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        hidden_BTD = hidden_BTD + self.mix(hidden_BTD.mT).mT
        return F.linear(hidden_BTD, self.tokens.weight)


def _waits(style: Style, *, spoil: bool = False) -> tuple[list[str], list[str]]:
    torch.manual_seed(0)
    model, ids_BT = Decoder(), torch.randint(50, (5, 12))
    clipping = Clipping.abadi(1.0, style=style)
    book = Book(trainable(model), examples=5, clipping=clipping)
    with guard(book):
        losses_B = model(ids_BT).logsumexp(2).mean(1)
        if spoil:
            losses_B = losses_B * torch.tensor([1.0, 1.0, float("nan"), 1.0, 1.0])
        with Waits() as during:
            backward(book, losses_B)
    with Waits() as after:
        total = settle(book, clipping)
    assert all(torch.isfinite(value).all() for value in total.tensors.values())
    return during.names, after.names


def test_a_flat_step_waits_once():
    during, after = _waits(Style.flat())
    assert during == []
    assert len(after) == 1


def test_an_example_that_is_not_finite_costs_no_second_question():
    during, after = _waits(Style.flat(), spoil=True)
    assert during == []
    assert len(after) == 1


@pytest.mark.parametrize("style", [Style.per_layer(), Style.per_parameter()], ids=["per layer", "per parameter"])
def test_groups_wait_once_each(style):
    during, after = _waits(style)
    groups = len(style.split(dict(Decoder().named_parameters())))
    assert len(during) + len(after) == groups


def test_the_count_sees_a_question():
    with Waits() as waits:
        value = torch.tensor([1.0, 2.0])
        assert bool((value > 0).all())
        value[value > 1].sum()
        torch.unique(value)
    assert len(waits.names) == 3
