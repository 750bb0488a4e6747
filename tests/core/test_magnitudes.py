"""No magnitude of operands, subnormal or the largest of float32, lets an example move the sum by more than the bound.

Gradients are booked as forms and settled as in training, without a model in between: a loss can bring any pair of
magnitudes together. Both ends of the range matter at once. An entry that fell below the normal numbers has lost its
last bits, and what it meets may be huge; parts of one gradient may oppose each other, so that a part that is dropped
alone leaves the other behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from discreet.core.book import Book
from discreet.core.clipping import Clipping
from discreet.core.forms import Dense, Form, Lookup
from discreet.core.outer import Outer
from discreet.core.routed import Routed
from discreet.core.uses import Derivation
from discreet.core.windows import Geometry, Windows

B, S, I, O = 3, 4, 20, 24  # noqa: E741  the shape suffixes of the maths
MAGNITUDES = (1e-45, 1e-42, 1e-38, 1e-30, 1e-22, 1e-12, 1.0, 1e9, 1e17, 1e18, 1e19, 1e30, 1e33, 1e38)
CLIPPINGS = (Clipping.abadi(1.0), Clipping.abadi(1e-9), Clipping.automatic(), Clipping.automatic(1e-9))
Draw = Callable[..., Tensor]


def _product(draw: Draw) -> list[Form]:
    return [Outer(draw(B, 1, 1, I), draw(B, 1, 1, O), torch.Size((O, I)))]


def _gram(draw: Draw) -> list[Form]:
    return [Outer(draw(B, 1, S, I), draw(B, 1, S, O), torch.Size((O, I)))]


def _tied(draw: Draw) -> list[Form]:
    ids = torch.arange(B * S).reshape(B, S) % O
    return [Lookup(ids, draw(B, S, I), O), Outer(draw(B, 1, S, I), draw(B, 1, S, O), torch.Size((O, I)))]


def _routed(draw: Draw) -> list[Form]:
    rows, experts = B * S, 2
    owner, expert = torch.arange(rows) // S, torch.arange(rows) % experts
    return [Routed(draw(rows, I), draw(rows, O), owner, expert, B, torch.Size((experts, O, I)))]


def _windows(draw: Draw) -> list[Form]:
    geometry = Geometry((1,), (1,), (1,), 1)
    return [Windows(draw(B, 1, I, S), draw(B, 1, O, S), torch.Size((O, I, 3)), geometry)]


def _instantiated(draw: Draw) -> list[Form]:
    return [Dense(draw(B, O, I)), Outer(draw(B, 1, S, I), draw(B, 1, S, O), torch.Size((O, I)))]


FORMS = {each.__name__[1:]: each for each in (_product, _gram, _tied, _routed, _windows, _instantiated)}


def _settled(forms: list[Form], clipping: Clipping) -> Tensor:
    """The clipped sum of one parameter with these uses, float64."""
    parameter = nn.Parameter(torch.zeros(forms[-1].shape))
    book = Book({"w": parameter}, examples=forms[-1].examples)
    ending = book.sink.sum()
    ending.register_hook(lambda _: [book.record(Derivation.of("w", parameter), form) for form in forms] and None)
    with book.collecting():
        ending.backward()
    return book.settle(clipping)["w"].double()


def _opposed(value: Tensor, *, sign: float) -> Tensor:
    """The second half of all positions repeats the first, with a sign: two of them can cancel."""
    half = value.shape[-2] // 2
    if value.dim() < 3 or half == 0:
        return value
    return torch.cat([value[..., :half, :], sign * value[..., :half, :], value[..., 2 * half :, :]], dim=-2)


@pytest.mark.parametrize("kind", list(FORMS))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    magnitudes=st.lists(st.sampled_from(MAGNITUDES), min_size=24, max_size=24),
    seed=st.integers(0, 1 << 16),
    opposed=st.booleans(),
    clipping=st.sampled_from(CLIPPINGS),
)
def test_no_magnitude_moves_the_sum_by_more_than_the_bound(kind, magnitudes, seed, opposed, clipping):
    generator, scales = torch.Generator().manual_seed(seed), iter(magnitudes)
    signs = iter((1.0, -1.0) * 4)

    def draw(*shape: int) -> Tensor:
        """Each example, and each half of its positions, at a magnitude of its own."""
        value = torch.randn(shape, generator=generator)
        for row in value if shape[0] == B else value.reshape(B, -1, *shape[1:]):
            halves = row.movedim(-2, 0).tensor_split(2) if row.dim() > 1 else (row,)
            for half in halves:
                half.clamp_(-3, 3).mul_(next(scales, 1.0))
        return _opposed(value, sign=next(signs)) if opposed else value

    forms = FORMS[kind](draw)
    whole = _settled(forms, clipping)
    assert torch.isfinite(whole).all()
    for left_out in range(B):
        bad_B = torch.arange(B) == left_out
        without = _settled([form.without(bad_B) for form in forms], clipping)
        alone = _settled([form.without(~bad_B) for form in forms], clipping)
        for moved in (whole - without, alone):
            assert float(moved.norm()) <= clipping.sensitivity, f"{float(moved.norm()) / clipping.sensitivity} R"


def test_an_example_out_of_reach_contributes_nothing_and_the_others_all():
    """Beside features of 1e33, gradients of 1e-30 may not be told from rounding: the example is left out, whole."""
    generator = torch.Generator().manual_seed(0)
    input, grad = (torch.randn(B, 1, S, width, generator=generator) for width in (I, O))
    form = Outer(input, grad, torch.Size((O, I)))
    far = dataclasses.replace(form, input=input * torch.tensor([1.0, 1e33, 1.0]).reshape(B, 1, 1, 1))
    clipping, left_out = Clipping.abadi(1.0), torch.tensor([False, True, False])
    torch.testing.assert_close(_settled([far], clipping), _settled([form.without(left_out)], clipping))


def test_opposed_parts_in_two_experts_or_two_kinds_of_use_are_dropped_together():
    """Parts of 1e33 that cancel: were one of them dropped, the other would stay, hundreds of times the bound."""
    ids = torch.zeros(B, 1, dtype=torch.int64)
    part = torch.full((B, 1, I), 1e33)
    outer = Outer(-part.unsqueeze(1), torch.eye(O)[:1].expand(B, 1, 1, O), torch.Size((O, I)))
    for forms in ([Lookup(ids, part, O), outer], [outer, Lookup(ids, part * (1 + 1e-6), O)]):
        assert float(_settled(forms, Clipping.abadi(1.0)).norm()) <= 1.0
