"""torch.compile: compiled models have the norms and sums of brute force, and what cannot be traced runs call by call.

The traces are run operator by operator (`without_kernels`) in most tests, and by Inductor in a few: its kernels take
their time to build. Every test starts with an empty compiler.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import discreet
from blocks import B, D, Fn, T, V, loss, par
from cases import CASES
from core.compiling import CALL_BY_CALL, MARKS, RULE, Deliveries, Wrapped, agrees, sum_agrees
from discreet.core import compiled
from discreet.core.clipping import Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.style import Style
from discreet.errors import UnsupportedUse
from oracles import relative_gap, rows

pytestmark = MARKS

EACH_RULE = (
    *("linear 3-D", "first layer frozen", "matmul of a transpose", "linear with a split weight", "merged low rank"),
    *("embedding, padding", "position ids (T,), T equal to B", "one-hot times table", "matrices by index (experts)"),
    *(
        "layer norm, two axes",
        "layer norm, frozen weight",
        "group norm",
        "RMS norm",
        "RMS norm, 1 + w",
        "conv2d, groups",
    ),
    *("conv2d, groups", "conv2d, same, even kernel", "conv2d, standardised weight", "in-place add", "where and lerp"),
    *("token and positions (ViT)", "position table slice", "expand to T, T equal to B", "penalty on the weights"),
    *("tied head", "tied embeddings", "called twice, other lengths", "ALBERT", "windows (Swin)"),
    *("group norm on folded frames", "in-place relu after convolution", "unused parameter", "weight norm"),
    *("checkpoint", "an eval forward inside", "detached and data copies"),
)


@pytest.mark.parametrize("name", EACH_RULE)
def test_a_compiled_model_has_the_sum_of_brute_force(name: str, seen: Deliveries) -> None:
    model, batch = CASES[name].build()
    agrees(torch.compile(model, fullgraph=True), batch)
    assert seen.delivered > 0
    assert not torch._dynamo.utils.counters["graph_break"]


BREAKING = ("scale from the right, divide, subtract", "powers")
"""``1 - w`` and ``2 ** w``, a parameter on the right: PyTorch writes these in Python; the recording stops there."""


@pytest.mark.parametrize("name", [*BREAKING, "weight norm, old"])
def test_what_breaks_the_graph_or_cannot_be_traced_is_exact(name: str, seen: Deliveries) -> None:
    model, batch = CASES[name].build()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{CALL_BY_CALL}")
        agrees(torch.compile(model), batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in (*EACH_RULE, *BREAKING, "weight norm, old")])
def test_every_case_compiles_without_a_graph_break(name: str, seen: Deliveries) -> None:
    model, batch = CASES[name].build()
    agrees(torch.compile(model, fullgraph=True), batch)
    assert seen.delivered > 0
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.filterwarnings("ignore")  # of Inductor itself, on other people's deprecations
@pytest.mark.parametrize("name", ["token and positions (ViT)", "tied head"])
def test_kernels_agree_with_brute_force(name: str, seen: Deliveries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compiler", compiled.by_inductor)
    model, batch = CASES[name].build()
    agrees(torch.compile(model, fullgraph=True), batch)
    assert seen.delivered > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Inductor itself, on other people's deprecations
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "name", ["conv2d, groups", "group norm", "windows (Swin)", "weight norm", "ALBERT", "in-place add"]
)
def test_kernels_of_strided_views_agree_with_brute_force(
    name: str, dtype: torch.dtype, seen: Deliveries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "compiler", compiled.by_inductor)
    model, batch = CASES[name].build(dtype)
    agrees(torch.compile(model, fullgraph=True), batch, tolerance=1e-9 if dtype is torch.float64 else 1e-4)
    assert seen.delivered > 0


@pytest.mark.filterwarnings("ignore:.*(jit|Inductor|inductor).*")  # of Inductor itself
def test_memory_read_by_strides_is_not_compiled(seen: Deliveries, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor stores what a convolution puts out in another order than the trace says; as_strided does not know."""

    def read(self: Any, x: Tensor) -> Tensor:
        h = F.pad(self.c(x), (1, 1, 1, 1)).contiguous()
        one, channel, row, column = h.stride()
        return h.as_strided((len(x), D, 3, 3), (one, channel, 2 * row, column)).square()

    monkeypatch.setattr(compiled, "compiler", compiled.by_inductor)
    model = Fn(read, c=nn.Conv2d(3, D, 3)).double()
    batch = {"x": torch.randn(B, 3, 6, 6).double(), "target": torch.randn(B).double()}
    model.compile(fullgraph=True)
    with pytest.warns(UserWarning, match="as_strided"):
        agrees(model, batch)
    assert seen.delivered == 0


def test_ragged_batches_are_compiled_at_most_three_times(seen: Deliveries) -> None:
    model, batch = CASES["linear 3-D"].build()
    model.compile(fullgraph=True)
    report = discreet.check(model, loss, batch, clipping=RULE)
    for size in (5, 3, 11, T, 1, 8, 2, 40, T, 1, 6):
        sum_agrees(model, rows(batch, [row % B for row in range(size)], B), report.layout, size=size)
    assert seen.delivered >= 11
    assert seen.compiled <= 3  # any batch, a batch as long as the sequence, a batch of one


def test_ragged_lengths_are_compiled_at_most_four_times(seen: Deliveries) -> None:
    model, batch = CASES["tied head"].build()
    model.compile()
    report = discreet.check(model, loss, batch, clipping=RULE)
    for length in (7, 4, 3, 9, 6, 12, 8, 2):
        ids = torch.randint(V, (B, length))
        sum_agrees(model, {**batch, "x": ids}, report.layout)
    assert seen.delivered >= 8
    assert seen.compiled <= 4


@pytest.mark.parametrize("style", [Style.per_layer(), Style.per_parameter()])
def test_groups_are_settled_while_the_compiled_backward_is_booked(style: Style, seen: Deliveries) -> None:
    model, batch = CASES["token and positions (ViT)"].build()
    rule = Clipping.abadi(1.5, style=style)
    wanted = clipped_gradient(model, loss, batch, clipping=rule)
    model.compile(fullgraph=True)
    found = clipped_gradient(model, loss, batch, clipping=rule)
    assert relative_gap(found.tensors, wanted.tensors) < 1e-12
    assert seen.delivered == 1


def test_a_compiled_loss_and_compiled_blocks_that_share_their_code(seen: Deliveries) -> None:
    model = Fn(
        lambda s, x: s.two(s.one(s.e(x))).mean(-1),
        e=nn.Embedding(V, D), one=nn.Linear(D, D), two=nn.Linear(D, D),
    ).double()  # fmt: skip
    _, batch = CASES["embedding"].build()
    model.one.forward = torch.compile(model.one.forward)
    model.two.forward = torch.compile(model.two.forward)
    agrees(model, batch)
    assert seen.delivered > 0
    torch._dynamo.reset()
    agrees(model, batch, compiled_loss=torch.compile(loss, fullgraph=True))


def test_eager_code_at_a_graph_break_is_guarded(seen: Deliveries) -> None:
    def broken(self: Any, x: Tensor) -> Tensor:
        h = self.one(x)
        torch._dynamo.graph_break()
        return self.two(h * self.scale) + F.linear(x, self.one.weight)

    model = Fn(broken, one=nn.Linear(D, D), two=nn.Linear(D, D), scale=par(D)).double()
    _, batch = CASES["linear 3-D"].build()
    agrees(torch.compile(model), batch)
    assert torch._dynamo.utils.counters["graph_break"]
    assert seen.delivered > 0


def test_a_value_made_of_parameters_crosses_a_graph_break(seen: Deliveries) -> None:
    def broken(self: Any, x: Tensor) -> Tensor:
        scaled = self.w * 2
        torch._dynamo.graph_break()
        return F.linear(x, scaled)

    _, batch = CASES["linear 3-D"].build()
    with pytest.warns(UserWarning, match=CALL_BY_CALL):
        agrees(torch.compile(Fn(broken, w=par(4, D)).double()), batch)


def test_dropout_draws_one_mask_for_norm_and_sum(seen: Deliveries) -> None:
    model = torch.compile(nn.Sequential(nn.Linear(D, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double(), fullgraph=True)
    _, batch = CASES["linear 3-D"].build()

    def by_position(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch["x"]).flatten(1) - batch["target"].unsqueeze(1)).square().mean(1)

    discreet.check(model, by_position, batch, clipping=RULE).raise_if_failed()
    assert seen.delivered > 0


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_that_of_eager_code(inside: bool, seen: Deliveries) -> None:
    model, batch = CASES["token and positions (ViT)"].build(torch.float32)

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                return self.model(x).float()

    whole = Cast()

    def outside(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
            return loss(model, batch)

    layout = discreet.check(whole, outside, batch, clipping=RULE).layout
    wanted = clipped_gradient(whole, outside, batch, clipping=RULE, layout=layout)
    whole.compile(fullgraph=True)
    report = discreet.check(whole, outside, batch, clipping=RULE)
    report.raise_if_failed()
    found = clipped_gradient(whole, outside, batch, clipping=RULE, layout=report.layout)
    assert seen.delivered > 0
    assert relative_gap(found.tensors, wanted.tensors) < 2e-2  # bfloat16 rounds at 4e-3


def test_rows_picked_inside_a_region_run_call_by_call(seen: Deliveries) -> None:
    def pick(self: Any, x: Tensor) -> Tensor:
        h = self.a(x)
        index = h.sum(-1).argsort(0)
        return self.b(h[index].tanh()).new_zeros(len(x), 2).index_add(0, index, self.b(h[index].tanh()))

    model = Fn(pick, a=nn.Linear(D, D), b=nn.Linear(D, 2)).double()
    _, batch = CASES["linear 2-D"].build()
    with pytest.warns(UserWarning, match=CALL_BY_CALL):
        agrees(torch.compile(model, fullgraph=True), batch)
    assert seen.delivered == 0


def test_rows_picked_before_a_region_are_not_taken_for_the_batch(seen: Deliveries) -> None:
    """Row i of what the region gets belongs to example index[i], and there are exactly as many rows as examples."""

    def pick(self: Any, x: Tensor) -> Tensor:
        h = self.a(x)
        index = h.detach().sum(-1).argsort(0)
        return torch.zeros_like(h).index_add(0, index, self.b(h[index]))

    model = Fn(pick, a=nn.Linear(D, D), b=nn.Linear(D, D)).double()
    _, batch = CASES["linear 2-D"].build()
    model.b = Wrapped(model.b)
    model.b.compile()
    with pytest.warns(UserWarning, match=CALL_BY_CALL):
        agrees(model, batch)
    assert seen.delivered == 0


def test_rows_picked_by_a_compiled_function_without_parameters_are_seen(seen: Deliveries) -> None:
    picked = torch.compile(lambda h, index: h[index].tanh())

    def pick(self: Any, x: Tensor) -> Tensor:
        h = self.a(x)
        index = h.detach().sum(-1).argsort(0)
        return torch.zeros_like(h).index_add(0, index, self.b(picked(h, index)))

    model = Fn(pick, a=nn.Linear(D, D), b=nn.Linear(D, D)).double()
    _, batch = CASES["linear 2-D"].build()
    with pytest.warns(UserWarning, match=CALL_BY_CALL):
        agrees(model, batch)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_a_compiled_function_without_parameters_is_compiled_and_books_nothing(backend: str, seen: Deliveries) -> None:
    """It was taken for a region that books, and its backward failed for want of what is booked."""
    curved = torch.compile(lambda h: h.tanh() * 2, backend=backend)
    model = Fn(lambda s, x: s.b(curved(s.a(x))), a=nn.Linear(D, D), b=nn.Linear(D, D)).double()
    _, batch = CASES["linear 3-D"].build()
    agrees(model, batch)
    assert seen.delivered == 0


def test_a_layout_of_the_model_as_written_says_nothing_about_its_compiled_form(seen: Deliveries) -> None:
    model, batch = CASES["linear 3-D"].build()
    layout = discreet.check(model, loss, batch, clipping=RULE).layout
    model.compile()
    with pytest.warns(UserWarning, match=CALL_BY_CALL), pytest.raises(UnsupportedUse, match="never saw this use"):
        clipped_gradient(model, loss, batch, clipping=RULE, layout=layout)


def test_a_use_without_a_rule_is_refused_by_name(seen: Deliveries) -> None:
    model = nn.Sequential(nn.Conv1d(T, D, 1), nn.BatchNorm1d(D)).double()
    _, batch = CASES["linear 3-D"].build()
    report = discreet.check(torch.compile(Wrapped(model)), loss, batch, clipping=RULE)
    assert not report.passed
    assert any("batch_norm" in row.detail and "1.weight" in row.detail for row in report.rows)
