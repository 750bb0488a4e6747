"""Mixtures of experts: rows picked from the batch belong to the right example, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import B, Fn, T, loss, par
from discreet.core.clipping import ROUNDING_MARGIN, Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.outer import Outer
from discreet.core.routed import Routed
from discreet.errors import UnsupportedUse
from discreet.train.check import check
from oracles import abadi, alone, norms, relative_gap, rows, weighted

E, D, H = 3, 8, 8
"""Experts, width, hidden width: grouped products on a CPU want rows of a multiple of 16 bytes."""
TYPE = {"grouped": torch.float32}
"""Grouped products exist in float32 and below."""


def _x(*shape: int) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"x": torch.randn(B, *shape, dtype=torch.float64), "target": torch.randn(B, dtype=torch.float64)}


def _route(self: Any, h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weight, index = self.router(h).softmax(-1).topk(k, -1)
    return weight / weight.sum(-1, keepdim=True), index


def _one_by_one(self: Any, h: Tensor, k: int = 2) -> Tensor:
    """Every expert picks its rows in turn: the plain form of most implementations."""
    weight, index = _route(self, h, k)
    total = torch.zeros_like(h)
    for expert in range(E):
        row, place = torch.where(index == expert)
        if not len(row):
            continue
        gate, up = F.linear(h[row], self.up[expert]).chunk(2, -1)
        out = F.linear(F.silu(gate) * up, self.down[expert])
        total = total.index_add(0, row, out * weight[row, place, None])
    return total


def _with_biases(self: Any, h: Tensor, k: int = 2) -> Tensor:
    """Weights stored (I, O), with biases, as an activation with interleaved halves has them."""
    weight, index = _route(self, h, k)
    total = torch.zeros_like(h)
    for expert in range(E):
        row, place = torch.where(index == expert)
        if not len(row):
            continue
        both = h[row] @ self.up[expert].mT + self.up_bias[expert]
        gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
        out = ((up + 1) * gate * torch.sigmoid(1.7 * gate)) @ self.down[expert].mT + self.down_bias[expert]
        total = total.index_add(0, row, out * weight[row, place, None])
    return total


def _grouped(self: Any, h: Tensor, k: int = 2) -> Tensor:
    """All rows sorted by expert, and one grouped product for all."""
    weight, index = _route(self, h, k)
    expert, order = index.reshape(-1).sort()
    ends = torch.bincount(expert, minlength=E).cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(h[order // k], self.up.transpose(-2, -1), offs=ends).chunk(2, -1)
    out = F.grouped_mm(F.silu(gate) * up, self.down.transpose(-2, -1), offs=ends)
    out = out * weight.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return out[back].view(len(h), k, -1).sum(1)


MIXTURES = {"one by one": _one_by_one, "with biases": _with_biases, "grouped": _grouped}


def _model(name: str, k: int = 2) -> nn.Module:
    mixture = MIXTURES[name]

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        picked = mixture(self, h.reshape(-1, D), k).view(h.shape)
        return h + picked

    torch.manual_seed(1)
    parts = {
        "first": nn.Linear(D, D),
        "router": nn.Linear(D, E),
        "up": par(E, 2 * H, D),
        "down": par(E, D, H),
    }
    if mixture is _with_biases:
        parts |= {"up_bias": par(E, 2 * H), "down_bias": par(E, D)}
    return Fn(forward, **parts).to(TYPE.get(name, torch.float64))


def _exact(model: nn.Module, batch: Any, *, size: int = B, layout: Any = None) -> None:
    dtype = next(model.parameters()).dtype
    batch = {key: value.to(dtype) for key, value in batch.items()}
    gradients = alone(model, loss, batch, size=size)
    norm_B = norms(gradients)
    bound = 0.7 * float(norm_B.median())
    found = clipped_gradient(model, loss, batch, clipping=Clipping.abadi(bound), layout=layout)
    factor_B = abadi(norm_B, bound)
    shrunk = torch.where(factor_B == 1, factor_B, factor_B * ROUNDING_MARGIN)
    assert relative_gap(found.tensors, weighted(gradients, shrunk)) < (1e-9 if dtype is torch.float64 else 1e-4)


@pytest.mark.parametrize("name", list(MIXTURES))
def test_every_token_of_every_expert_is_counted_for_its_example(name):
    model = _model(name)
    dtype = next(model.parameters()).dtype
    report = check(model, loss, {key: value.to(dtype) for key, value in _x(T, D).items()})
    assert report.passed, report.table()
    _exact(model, _x(T, D), layout=report.layout)
    for seed in range(3):  # other batches are routed otherwise, with the layout of the first
        torch.manual_seed(10 + seed)
        other = {"x": 2 * torch.randn(B, T + seed, D, dtype=torch.float64), "target": torch.randn(B).double()}
        _exact(model, other, layout=report.layout)
    _exact(model, rows(_x(T, D), [3], B), size=1, layout=report.layout)
    _exact(model, rows(_x(T, D), [3], B), size=1)


@pytest.mark.parametrize("name", list(MIXTURES))
def test_float32_passes_the_check(name):
    batch = {key: value.float() for key, value in _x(T, D).items()}
    report = check(_model(name).float(), loss, batch)
    assert report.passed, report.table()


@pytest.mark.parametrize("name", list(MIXTURES))
def test_without_a_verified_layout_folded_tokens_are_refused(name):
    batch = {key: value.float() for key, value in _x(T, D).items()}
    with pytest.raises(UnsupportedUse):
        clipped_gradient(_model(name).float(), loss, batch, clipping=Clipping.automatic())


@pytest.mark.parametrize("name", list(MIXTURES))
@pytest.mark.parametrize("k", [1, 2])
def test_rows_of_examples_themselves_need_no_check(name, k):
    """One token per example: the sorted rows are as many as the examples, in an order that the data decide."""
    model = _model(name, k)
    _exact(model, _x(D))


def test_a_permutation_by_the_data_is_undone():
    """Sorting examples by length and back is exact, though dimension 0 looks like the batch all the way."""

    def forward(self, x):
        order = x[:, 0].argsort()
        h = self.b(self.a(x)[order].tanh())
        return h[order.argsort()]

    torch.manual_seed(1)
    model = Fn(forward, a=nn.Linear(D, D), b=nn.Linear(D, 3)).double()
    _exact(model, _x(D))


def test_a_picked_row_under_a_function_without_such_a_rule_is_refused():
    def forward(self, x):
        order = x[:, 0].argsort()
        return self.n(self.a(x)[order])[order.argsort()]

    model = Fn(forward, a=nn.Linear(D, D), n=nn.LayerNorm(D)).double()
    with pytest.raises(UnsupportedUse, match="picked from the batch"):
        clipped_gradient(model, loss, _x(D), clipping=Clipping.automatic())


def test_rows_picked_by_two_indices_are_refused():
    def forward(self, x):
        order = x[:, 0].argsort()
        h = self.a(x)
        return self.b(h[order] * h[order.flip(0)])[order.argsort()]

    model = Fn(forward, a=nn.Linear(D, D), b=nn.Linear(D, 3)).double()
    with pytest.raises(UnsupportedUse, match="not certain"):
        clipped_gradient(model, loss, _x(D), clipping=Clipping.automatic())


def test_the_last_token_of_each_example_is_no_picking():
    def forward(self, x):
        last = (x[:, :, 0] > 0).sum(1).clamp(max=T - 1)
        return self.n(self.b(self.a(x)[torch.arange(len(x)), last]))

    model = Fn(forward, a=nn.Linear(D, D), b=nn.Linear(D, D), n=nn.LayerNorm(D)).double()
    _exact(model, _x(T, D))


def test_rows_picked_twice_and_by_mask_compose():
    def forward(self, x):
        h = self.a(x).reshape(-1, D)
        mask = h.detach()[:, 0] > 0
        order = torch.arange(int(mask.sum()) - 1, -1, -1)
        out = torch.zeros(len(h), 3, dtype=x.dtype)
        picked = self.b(h[mask][order]).tanh()
        return out.index_add(0, mask.nonzero()[:, 0][order], picked).view(*x.shape[:-1], 3)

    torch.manual_seed(1)
    model = Fn(forward, a=nn.Linear(D, D), b=nn.Linear(D, 3)).double()
    report = check(model, loss, _x(T, D))
    assert report.passed, report.table()
    _exact(model, _x(T, D), layout=report.layout)


def _form(dtype: torch.dtype = torch.float64) -> Routed:
    torch.manual_seed(3)
    size = 23
    owner, expert = torch.randint(0, B - 1, (size,)), torch.randint(0, E, (size,))
    return Routed(
        torch.randn(size, D, dtype=dtype), torch.randn(size, H, dtype=dtype), owner, expert, B, torch.Size((E, H, D))
    )


def test_the_form_keeps_its_identities():
    form = _form()
    each = form.per_example()
    wanted = torch.zeros(B, E, H, D, dtype=torch.float64)
    for s in range(len(form.owner)):
        wanted[form.owner[s], form.expert[s]] += torch.outer(form.grad[s], form.input[s])
    assert torch.allclose(each, wanted, rtol=1e-12, atol=1e-12)
    assert torch.allclose(form.norm2(), wanted.flatten(1).square().sum(1), rtol=1e-9)
    assert torch.allclose(form.gram().diagonal(), form.norm2(), rtol=1e-9)
    assert torch.allclose(form.inner(form), form.norm2(), rtol=1e-9)
    for i in range(B):
        assert torch.allclose(form.weighted_sum(torch.eye(B, dtype=torch.float64)[i]), wanted[i], rtol=1e-9, atol=1e-12)
        assert torch.allclose(form.rows(i, i + 1).per_example()[0], each[i], rtol=1e-12, atol=1e-12)


def test_the_form_leaves_out_what_is_not_finite():
    form = _form()
    form.input[0] = float("nan")
    bad_B = torch.arange(B) == form.owner[0]
    kept = form.without(bad_B)
    assert bool(torch.isfinite(kept.norm2()).all())
    assert bool(torch.isfinite(kept.weighted_sum(torch.ones(B, dtype=torch.float64))).all())


def test_two_forms_are_joined_with_their_cross_terms():
    form = _form()
    twice = form.joined(form)
    assert twice is not None
    assert torch.allclose(twice.norm2(), 4 * form.norm2(), rtol=1e-9)
    other = Routed(form.input, form.grad, form.owner, form.expert, B, torch.Size((E * H, D)))
    assert form.joined(other) is None


def test_one_expert_is_a_sum_of_outer_products():
    torch.manual_seed(4)
    input, grad = torch.randn(B, 1, T, D).double(), torch.randn(B, 1, T, H).double()
    outer = Outer(input, grad, torch.Size((H, D)))
    owner = torch.arange(B).repeat_interleave(T)
    routed = Routed(input.reshape(-1, D), grad.reshape(-1, H), owner, torch.zeros_like(owner), B, torch.Size((H, D)))
    assert torch.allclose(routed.norm2(), outer.norm2(), rtol=1e-9)
    assert torch.allclose(routed.per_example(), outer.per_example(), rtol=1e-12)


REORDERED = {
    "sorted, with positions": lambda s, x: _sorted_back(s.a(x), s.b, x[:, 0, 0].argsort()),
    "gathered": lambda s, x: s.b(s.a(x[:, 0]).gather(0, x[:, 0, :1].argsort(0).expand(-1, D))),
    "flipped": lambda s, x: s.b(s.a(x).flip(0)).flip(0),
}


def _sorted_back(h: Tensor, layer: nn.Module, order: Tensor) -> Tensor:
    return layer(h[order])[order.argsort()]


@pytest.mark.parametrize("name", list(REORDERED))
def test_a_batch_in_another_order_is_refused(name):
    """As many rows as examples, and not theirs: dimension 0 looks right, and every norm would be somebody else's."""
    model = Fn(REORDERED[name], a=nn.Linear(D, D), b=nn.Linear(D, 3)).double()
    with pytest.raises(UnsupportedUse, match="picked from the batch"):
        clipped_gradient(model, loss, _x(T, D), clipping=Clipping.automatic())


# ------------------------------------------------------------------------- rows put in another order, all of them


class _Sorted(nn.Module):
    """Puts the marked examples first, in one of several ways, and all of them back before the end."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.way, self.frozen = way, torch.randn(D, D, dtype=torch.float64)
        self.a, self.b, self.c = (nn.Linear(D, D) for _ in range(3))
        self.double()

    def forward(self, x: Tensor, mark: Tensor) -> Tensor:
        h, first = self.a(x), mark > 0
        order = torch.cat([first.nonzero()[:, 0], (~first).nonzero()[:, 0]])
        placed = {
            "joined": lambda: torch.cat([h[first], 2 * h[~first]]),
            "with one more axis": lambda: h[order].unsqueeze(1),
            "through a frozen layer": lambda: F.linear(h[order], self.frozen),
            "through a frozen layer with a bias": lambda: F.linear(h[order], self.frozen, self.frozen[0]),
            "through a product": lambda: h[order] @ self.frozen,
        }[self.way]()
        y = self.b(placed).reshape(len(x), D).tanh()
        return self.c(y[order.argsort()]) + h


WAYS = {
    "joined": False,
    "with one more axis": False,
    "through a frozen layer": True,
    "through a frozen layer with a bias": True,
    "through a product": True,
}
"""Way -> whether it is exact; the others are refused."""


@pytest.mark.parametrize("way", list(WAYS))
def test_an_order_that_the_check_did_not_see_is_seen_when_it_comes(way):
    """All examples of the check are marked, so that they stay in their order: the layout cannot know of another."""
    model = _Sorted(way)
    layout = check(model, loss, {**_x(D), "mark": torch.ones(B)}).layout
    batch = {**_x(D), "mark": torch.tensor([0.0, 1, 0, 1, 1])}
    if not WAYS[way]:
        with pytest.raises(UnsupportedUse, match="picked from the batch"):
            clipped_gradient(model, loss, batch, clipping=Clipping.abadi(1.0), layout=layout)
        return
    assert layout is not None
    gradients = alone(model, loss, batch, size=B)
    bound = 0.7 * float(norms(gradients).median())
    found = clipped_gradient(model, loss, batch, clipping=Clipping.abadi(bound), layout=layout)
    assert relative_gap(found.tensors, weighted(gradients, abadi(norms(gradients), bound))) < 4e-5
