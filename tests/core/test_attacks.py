"""Attacks on the guarantee: models, losses and batches that were written to move the clipped sum past its bound.

Each is measured by leaving one example out, or against brute force. None needs to know how the engine works.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import CASES, Fn, loss, par
from discreet.core import route
from discreet.core.book import Layout
from discreet.core.clipping import ClippedSum, Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.noise import release
from discreet.core.precision import full_precision
from discreet.core.rng import PIECE, NoiseSource
from discreet.core.style import Style
from discreet.errors import ConfigError, UnsupportedUse
from discreet.train.check import check
from oracles import abadi, alone, flat, norms, relative_gap, rows, weighted

ALLOWED = 1 + 1e-6
D = 6
QUANTUM = 2.0**-149
"""The smallest number above zero in float32."""


def _given(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Per example: outputs times the gradients that the example brings along."""
    return (model(batch["x"]) * batch["g"]).flatten(1).sum(1)


def _moved(
    model: nn.Module,
    function: Callable[..., Tensor],
    batch: dict[str, Tensor],
    clipping: Clipping,
    *,
    layout: Layout | None = None,
    out: tuple[int, ...] | None = None,
) -> float:
    """The largest change of the clipped sum when one example leaves, relative to the bound."""
    size = len(next(iter(batch.values())))
    whole = flat(clipped_gradient(model, function, batch, clipping=clipping, layout=layout).tensors)
    moved = []
    for row in range(size) if out is None else out:
        rest = rows(batch, [i for i in range(size) if i != row], size)
        without = flat(clipped_gradient(model, function, rest, clipping=clipping, layout=layout).tensors)
        moved.append(float((whole - without).norm()) / clipping.sensitivity)
    return max(moved)


def _gap(model: nn.Module, batch: dict[str, Tensor], *, layout: Layout | None, style: Style | None = None) -> float:
    """Relative distance of the clipped sum from brute force."""
    gradients = alone(model, loss, batch, size=len(batch["target"]))
    bound = 0.5 * float(norms(gradients).median())
    clipping = Clipping.abadi(bound, style=style)
    wanted: dict[str, Tensor] = {}
    groups = clipping.style.split(gradients)
    for group in groups:
        part = {name: gradients[name] for name in group}
        wanted |= weighted(part, abadi(norms(part), bound / len(groups) ** 0.5))
    return relative_gap(clipped_gradient(model, loss, batch, clipping=clipping, layout=layout).tensors, wanted)


def _model(forward: Callable[..., Tensor], **parts: Any) -> nn.Module:
    torch.manual_seed(3)
    return Fn(forward, **parts).double()


def _batch(size: int, *shape: int, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    x = 3 * torch.randn(size, *shape, dtype=torch.float64)
    return {"x": x, "target": torch.randn(size, dtype=torch.float64)}


# ------------------------------------------------------------------------------------------------- shared operands


def _parallel(*, branches: int, width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    parts = {f"l{index}": nn.Linear(width, width, bias=False) for index in range(branches)}
    return Fn(lambda s, x: sum(getattr(s, name)(x) for name in parts), **parts)


def _pairs(size: int, length: int, width: int = 32) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(size, length, width), "g": 10 * torch.randn(size, length, width)}


@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("length", [1, 3, 64])
def test_parameters_that_share_both_operands_are_all_counted(branches, length):
    assert _moved(_parallel(branches=branches), _given, _pairs(4, length), Clipping.abadi(1.0)) <= ALLOWED


def test_a_check_at_one_length_holds_at_another():
    model = _parallel(branches=2)
    report = check(model, _given, _pairs(4, 64))
    assert report.passed
    assert _moved(model, _given, _pairs(4, 3), Clipping.abadi(1.0), layout=report.layout) <= ALLOWED


SHARED = {
    "query, key, value": lambda s, x: (s.a(x) @ s.b(x).mT).softmax(-1) @ s.c(x),
    "one gradient, three inputs": lambda s, x: s.a(x) + s.b(x.flip(1)) + s.c(x.tanh()),
    "two inputs, two gradients": lambda s, x: s.a(x) * s.b(x) + s.c(x.tanh()),
    "changed in place between": lambda s, x: s.a(x).mul_(2).add_(s.b(x)).relu_() + s.c(x),
    "views of one activation": lambda s, x: s.a(x.tanh()[:, :2]).sum(1, keepdim=True) + s.b(x.tanh()) + s.c(x),
}


@pytest.mark.parametrize("name", list(SHARED))
def test_linear_maps_that_share_an_operand_are_exact(name):
    model = _model(SHARED[name], **{part: nn.Linear(D, 40) for part in "abc"})
    report = check(model, loss, _batch(4, 3, D, seed=1))
    assert report.passed, report.table()
    for layout in (None, report.layout):
        assert _gap(model, _batch(5, 3, D), layout=layout) < 4e-5


# ---------------------------------------------------------------------------------------------------------- routes


def _always(kind: route.Route) -> Callable[[route.Cost], route.Choice]:
    def choose(cost: route.Cost) -> route.Choice:
        if kind is not route.Route.KEEP and type(cost) is route.Cost:
            taken = route.Route.PRODUCT if cost.positions == 1 else route.Route.GRAM
            return route.Choice(taken, 0.0, 0.0, cost.kept, 0)
        return route.Choice(kind, 0.0, 0.0, cost.kept, 0)

    return choose


@pytest.mark.parametrize("kind", [route.Route.KEEP, route.Route.PIXELS, route.Route.WINDOWS])
@pytest.mark.parametrize("style", [Style.flat(), Style.per_parameter()], ids=["flat", "per parameter"])
def test_every_route_is_exact_on_every_case(kind, style, monkeypatch):
    monkeypatch.setattr(route.Cost, "choose", _always(kind))
    monkeypatch.setattr(route.WindowCost, "choose", _always(kind))
    for name, case in CASES.items():
        model, batch = case.build()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layout = check(model, loss, batch).layout if case.folded else None
            assert _gap(model, batch, layout=layout, style=style) < 4e-5, name


@pytest.mark.parametrize("length", [3, 20, 60])
def test_the_check_of_a_tied_head_passes_at_any_length(length):
    model = _model(lambda s, x: F.linear(s.e(x).tanh(), s.e.weight), e=nn.Embedding(11, D))
    torch.manual_seed(0)
    batch = {"x": torch.randint(0, 11, (5, length)), "target": torch.randn(5, dtype=torch.float64)}
    report = check(model, loss, batch)
    assert report.passed, report.table()
    assert _gap(model, batch, layout=report.layout) < 4e-5


# ------------------------------------------------------------------------------------------------------ batch axis


def _looped(self: Any, x: Tensor) -> Tensor:
    steps = sum(self.cell(x[:, t]).tanh() for t in range(x.shape[1]))
    return steps + (self.cell(self.grid).tanh() * self.mix).sum(0)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_constant_is_never_taken_for_the_batch_when_lengths_change(length):
    slots = 6
    model = _model(_looped, cell=nn.Linear(D, 5), grid=torch.randn(slots, D), mix=torch.randn(slots, 5))
    report = check(model, loss, _batch(4, 3, D))
    assert report.passed
    _exact_or_refused(model, _batch(slots, length, D), layout=report.layout)


def _exact_or_refused(model: nn.Module, batch: dict[str, Tensor], *, layout: Layout | None) -> None:
    try:
        gap = _gap(model, batch, layout=layout)
    except (UnsupportedUse, ConfigError):
        return
    assert gap < 4e-5


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda h: h,
    "layer norm": lambda h: F.layer_norm(h, (5,)),
    "softmax": lambda h: h.softmax(1),
    "RMS norm": lambda h: F.rms_norm(h, (5,)),
    "normalise": lambda h: F.normalize(h, dim=1),
    "cat": lambda h: torch.cat([h[:, :2], h[:, 2:]], 1),
    "frozen matrix": lambda h: h @ torch.eye(5, dtype=h.dtype),
    "unsqueeze": lambda h: h.unsqueeze(1).squeeze(1),
    "expand": lambda h: h.unsqueeze(1).expand(-1, 2, -1).sum(1),
    "stack": lambda h: torch.stack([h, h]).mean(0),
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "minimum": lambda h: torch.minimum(h, 0 * h + 1),
    "transposed twice": lambda h: h.t().contiguous().t(),
    "seventy operations": lambda h: _often(h, 70),
}


def _often(h: Tensor, times: int) -> Tensor:
    """Multiply so often that a bounded walk through the graph ends early."""
    for _ in range(times):
        h = h * 1.001
    return h


def _sorted_inside(between: Callable[[Tensor], Tensor]) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.a(x)
        order = h.detach().sum(1).argsort()
        return self.b(between(h[order]))[order.argsort()]

    return _model(forward, a=nn.Linear(D, 5), b=nn.Linear(5, 5))


@pytest.mark.parametrize("name", list(BETWEEN))
def test_rows_sorted_by_the_data_are_followed_or_refused(name):
    _exact_or_refused(_sorted_inside(BETWEEN[name]), _batch(5, D), layout=None)


@pytest.mark.parametrize("name", ["nothing", "cat", "frozen matrix", "seventy operations"])
def test_a_check_batch_that_was_sorted_already_hides_no_sort(name):
    model = _sorted_inside(BETWEEN[name])
    batch = _batch(4, D, seed=5)
    order = model.a(batch["x"]).detach().sum(1).argsort()
    report = check(model, loss, rows(batch, order.tolist(), 4))
    if report.passed:
        _exact_or_refused(model, _batch(5, D), layout=report.layout)


def test_inputs_sorted_by_their_data_do_not_pass_a_sorted_check():
    def forward(self: Any, x: Tensor) -> Tensor:
        order = x.sum(1).argsort()
        return self.a(x[order]).tanh()[order.argsort()] + self.b(x)

    model = _model(forward, a=nn.Linear(D, 5), b=nn.Linear(D, 5))
    batch = _batch(4, D, seed=5)
    report = check(model, loss, rows(batch, batch["x"].sum(1).argsort().tolist(), 4))
    if report.passed:
        _exact_or_refused(model, _batch(5, D), layout=report.layout)


def test_padding_that_is_removed_is_followed_or_refused():
    def forward(self: Any, x: Tensor) -> Tensor:
        size, length, _ = x.shape
        kept = (x[:, :, 0] != 0).flatten().nonzero()[:, 0]
        h = self.b(self.a(x).view(size * length, -1)[kept] @ self.frozen)
        return h.new_zeros(size * length, 5).index_add(0, kept, h).view(size, length, -1).sum(1)

    model = _model(forward, a=nn.Linear(D, 5), b=nn.Linear(5, 5), frozen=torch.randn(5, 5))
    report = check(model, loss, _batch(4, 4, D, seed=5))
    batch = _batch(4, 4, D)
    batch["x"][0, 1:, 0] = batch["x"][1, 3:, 0] = 0  # lengths 1, 3, 4, 4: as many rows as three each
    if report.passed:
        _exact_or_refused(model, batch, layout=report.layout)


@pytest.mark.parametrize("length", [2, 5, 6])
def test_a_derived_value_with_as_many_rows_as_examples_is_exact(length):
    models = (
        _model(lambda s, x: x + (2 * s.p)[: x.shape[1]], p=par(9, D)),
        _model(lambda s, x: x * (s.p * s.p)[: x.shape[1]].tanh(), p=par(9, D)),
        _model(lambda s, x: s.l(x + s.p.expand(x.shape[1], -1)), p=par(1, D), l=nn.Linear(D, 3)),
    )
    for model in models:
        _exact_or_refused(model, _batch(length, length, D), layout=None)


# -------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize(
    ("width", "level", "step"),
    [(64, 1.389830470085144, 0.002), (768, 1.4406780004501343, 0.002), (1024, 1.2542372941970825, 0.002),
     (4096, 1.4067796468734741, 0.005)],
)  # fmt: skip
def test_positions_that_oppose_each_other_keep_the_bound_at_any_width(width, level, step):
    """Constant features round alike in every product: the error of a float32 dot product grows with its width."""
    torch.manual_seed(1)
    model = Fn(lambda s, x: s.l(x), l=nn.Linear(width, 64, bias=False))
    batch = {"x": torch.randn(3, 2, width), "g": 100 * torch.randn(3, 2, 64)}
    batch["x"][0, 0], batch["x"][0, 1] = level, level * (1 + step)
    batch["g"][0, 1] = -batch["g"][0, 0]
    assert _moved(model, _given, batch, Clipping.abadi(1.0), out=(0,)) <= ALLOWED


def test_windows_that_oppose_each_other_keep_the_bound():
    torch.manual_seed(1)
    model = Fn(lambda s, x: s.c(x), c=nn.Conv1d(256, 256, 4, stride=4, bias=False))
    batch = {"x": torch.randn(3, 256, 8), "g": 100 * torch.randn(3, 256, 2)}
    batch["x"][0, :, :4], batch["x"][0, :, 4:] = 1.2542372941970825, 1.2542372941970825 * 1.002
    batch["g"][0, :, 1] = -batch["g"][0, :, 0]
    assert _moved(model, _given, batch, Clipping.abadi(1.0), out=(0,)) <= ALLOWED


def _both_uses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """One table as a lookup and as a head, with the gradients that the example brings along."""
    lookup = (model.e(batch["ids"]) * batch["look"]).flatten(1).sum(1)
    return lookup + (F.linear(batch["x"], model.e.weight) * batch["g"]).flatten(1).sum(1)


def _table(rows_: int, width: int) -> nn.Module:
    model = Fn(lambda s, x: x, e=nn.Embedding(rows_, width))
    nn.init.zeros_(model.e.weight)
    return model


def _tied_batch(look: Tensor, hidden: Tensor, logit: float, *, rows_: int, length: int) -> dict[str, Tensor]:
    size = 4
    grad = torch.zeros(size, length, rows_)
    grad[:, : len(hidden), 0] = logit
    x = torch.zeros(size, length, hidden.shape[1])
    x[:, : len(hidden)] = hidden
    ids = torch.zeros(size, 1, dtype=torch.int64)
    return {"ids": ids, "look": look.expand(size, 1, -1).clone(), "x": x, "g": grad}


@pytest.mark.parametrize(("exponent", "logit"), [(-32, 1e36), (-33, 1e37), (-20, 1e24), (-34, 1e37)])
def test_a_lookup_and_a_head_that_cancel_are_dropped_together(exponent, logit):
    torch.manual_seed(0)
    hidden = F.normalize(torch.randn(1, 40), dim=1) * 10.0**exponent
    batch = _tied_batch(-hidden * logit, hidden, logit, rows_=60, length=4)
    assert _moved(_table(60, 40), _both_uses, batch, Clipping.abadi(1.0), out=(0,)) <= ALLOWED


@pytest.mark.parametrize(("look", "quanta"), [(0.01, 40), (0.03, 15), (0.1, 4), (0.4, 1)])
def test_a_lookup_and_a_head_that_agree_are_not_lost_to_underflow(look, quanta):
    batch = _tied_batch(torch.full((1, 64), look), torch.full((16, 64), quanta * QUANTUM), 3e38, rows_=12, length=16)
    norm = 64**0.5 * (look + 16 * 3e38 * quanta * QUANTUM)
    assert _moved(_table(12, 64), _both_uses, batch, Clipping.abadi(norm / 2), out=(0,)) <= ALLOWED


class _Picked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.zero = nn.Linear(40, 40, bias=False), nn.Parameter(torch.zeros(1))


def _picked(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Two rows of each example through one layer, in another order."""
    size = len(batch["x"])
    both = (batch["x"] + 0 * model.zero).flatten(0, 1)
    order = torch.arange(2 * size).flip(0)
    each = (model.w(both[order]) * batch["g"].flatten(0, 1)[order]).sum(1)
    return torch.zeros(2 * size).index_add(0, order, each).view(size, 2).sum(1)


@pytest.mark.parametrize(("small", "large"), [(1e-20, 1e33), (1e-21, 1e33), (1e-10, 1e10)])
def test_picked_rows_that_cancel_are_dropped_together(small, large):
    torch.manual_seed(0)
    model = _Picked()
    report = check(model, _picked, {"x": torch.randn(4, 2, 40), "g": torch.randn(4, 2, 40)})
    assert report.passed, report.table()
    u, v = F.normalize(torch.randn(1, 40)), F.normalize(torch.randn(1, 40))
    batch = {
        "x": torch.stack([u * large, u * large / 2], 1).repeat(4, 1, 1),
        "g": torch.stack([v * small, -v * small * 2], 1).repeat(4, 1, 1),
    }
    assert _moved(model, _picked, batch, Clipping.abadi(1.0), layout=report.layout, out=(0,)) <= ALLOWED


@pytest.mark.parametrize(("length", "width", "quanta", "share"), [(20, 64, 1, 0.51), (100, 400, 10, 0.951)])
def test_gradients_of_a_few_quanta_are_not_rounded_up_beside_huge_features(length, width, quanta, share):
    model = Fn(lambda s, x: s.l(x), l=nn.Linear(width, width, bias=False))
    nn.init.zeros_(model.l.weight)
    batch = {"x": torch.full((2, length, width), 3e38), "g": torch.full((2, length, width), quanta * QUANTUM)}
    batch["x"][:, -1], batch["g"][:, -1] = 0, 1e-18
    norm = (length - 1) * 3e38 * quanta * QUANTUM * width
    assert _moved(model, _given, batch, Clipping.abadi(share * norm), out=(0,)) <= ALLOWED


@pytest.mark.parametrize("size", [256, 4096, 65536])
def test_a_large_batch_in_one_direction_keeps_the_bound(size):
    model = Fn(lambda s, x: x * s.b, b=nn.Parameter(torch.zeros(1)))
    for seed in range(3):
        torch.manual_seed(seed)
        batch = {"x": torch.rand(size, 1) * 0.3 + 0.7}
        batch["x"][0] = batch["x"][size // 2] = 5
        moved = _moved(model, lambda m, b: m(b["x"]).sum(1), batch, Clipping.abadi(1.0), out=(0, size // 2))
        assert moved <= ALLOWED


@pytest.mark.parametrize(
    "make", [lambda: Clipping.automatic(1e-25), lambda: Clipping.abadi(1e-24), lambda: Clipping.automatic(1e-4)]
)
def test_settings_below_what_float32_can_measure_are_refused_or_hold(make):
    model = Fn(lambda s, x: s.b * x, b=par(64))
    try:
        clipping = make()
    except ConfigError:
        return
    batch = {"x": torch.full((2, 64), 5e-24)}
    assert _moved(model, lambda m, b: m(b["x"]).sum(1), batch, clipping) <= ALLOWED


@pytest.mark.parametrize("value", [1e38, float("nan"), float("inf")])
def test_pixels_that_no_window_covers_are_no_matter(value):
    torch.manual_seed(0)
    model = Fn(lambda s, x: s.c(x), c=nn.Conv2d(4, 4, 2, stride=3, bias=False))
    batch = {"x": torch.randn(4, 4, 9, 9), "g": 10 * torch.randn(4, 4, 3, 3)}
    batch["x"][0, :, 8] = batch["x"][0, :, :, 8] = value
    assert _moved(model, _given, batch, Clipping.abadi(1.0)) <= ALLOWED


@pytest.mark.parametrize("style", [Style.flat(), Style.per_layer(), Style.groups("0")], ids=["flat", "layer", "group"])
def test_an_example_that_is_not_finite_in_one_group_keeps_the_bound(style):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3))
    batch = {"x": torch.randn(4, 3, D), "g": 1e3 * torch.randn(4, 3, 3)}
    batch["x"][0, 0, 0], batch["g"][1, 0, 0] = float("inf"), float("nan")
    assert _moved(model, _given, batch, Clipping.abadi(1.0, style=style)) <= ALLOWED


def test_convolutions_are_summed_in_full_precision_on_every_device():
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9):
        pytest.skip("this version of torch sets it otherwise")
    with full_precision():
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.mkldnn.conv.fp32_precision == "ieee"


# ----------------------------------------------------------------------------------------------------------- noise


def _released(tensors: dict[str, Tensor], into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    source = NoiseSource.insecure_seed(1)
    return dict(release(ClippedSum(tensors, 1.0), noise_multiplier=1.0, source=source, into=into).tensors)


def test_noise_of_pieces_names_and_halves_is_uncorrelated():
    drawn = _released({"a": torch.zeros(3 * PIECE + 7), "b": torch.zeros(PIECE), "a|b": torch.zeros(PIECE)})
    parts = [*drawn["a"][: 3 * PIECE].split(PIECE // 2), drawn["b"][: PIECE // 2], drawn["a|b"][: PIECE // 2]]
    for values in (torch.stack(parts), torch.stack(parts).abs()):
        off = torch.corrcoef(values) - torch.eye(len(parts))
        assert float(off.abs().max()) < 0.025
    assert bool((drawn["a"] != 0).all())


def test_targets_of_any_memory_order_get_the_same_noise():
    sums = {"a": torch.zeros(7, 5), "empty": torch.zeros(0, 3), "scalar": torch.zeros(())}
    plain = _released(sums)
    turned = _released(sums, {"a": torch.empty(5, 7).t(), "scalar": torch.zeros((), dtype=torch.bfloat16)})
    written = {name: value.clone() for name, value in sums.items()}
    in_place = _released(written, written)
    for name, value in plain.items():
        torch.testing.assert_close(turned[name], value, rtol=0, atol=0)
        torch.testing.assert_close(in_place[name], value, rtol=0, atol=0)


def test_targets_that_overlap_are_refused_or_not_used():
    sums = {"a": torch.zeros(64), "b": torch.full((64,), 100.0)}
    buffer = torch.empty(96)
    expected = _released({name: value.clone() for name, value in sums.items()})
    for into in ({"a": buffer[:64], "b": buffer[32:]}, {"a": sums["b"]}):
        try:
            found = _released(sums, into)
        except ConfigError:
            continue
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
