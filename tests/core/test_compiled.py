"""torch.compile: compiled models have the norms and sums of brute force, and what cannot be traced runs call by call.

The traces are run operator by operator (`without_kernels`) in most tests, and by Inductor in a few: its kernels take
their time to build. Every test starts with an empty compiler.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import discreet
from cases import CASES, B, D, Fn, T, V, frozen, loss, par
from discreet.core import compiled, lowering
from discreet.core.book import Book
from discreet.core.clipping import ROUNDING_MARGIN, Clipping
from discreet.core.gradient import backward, clipped_gradient, settle, trainable
from discreet.core.meeting import guard
from discreet.core.style import Style
from discreet.errors import UnsupportedUse
from oracles import abadi, alone, norms, relative_gap, rows, weighted

pytestmark = [  # PyTorch's own: what Inductor imports, how inputs are looked at, what is slow
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

RULE = Clipping.abadi(1.5)
CALL_BY_CALL = "runs call by call"

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


class Deliveries:
    """Counts what compiled backwards booked, and what was compiled."""

    def __init__(self) -> None:
        self.delivered = self.compiled = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Deliveries]:
    """An empty compiler that builds no kernels, and what it does."""
    found = Deliveries()
    deliver, compile_region = compiled.Region.deliver, compiled.Region.compile

    def delivering(self: compiled.Region, *given: Any) -> None:
        found.delivered += 1
        deliver(self, *given)

    def compiling(self: compiled.Region, *given: Any) -> None:
        found.compiled += 1
        compile_region(self, *given)

    monkeypatch.setattr(compiled.Region, "deliver", delivering)
    monkeypatch.setattr(compiled.Region, "compile", compiling)
    monkeypatch.setattr(compiled, "compiler", compiled.without_kernels)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled._backends.clear()
    yield found
    torch._dynamo.reset()


def agrees(model: nn.Module, batch: Any, *, compiled_loss: Any = loss, size: int = B, tolerance: float = 1e-9) -> None:
    """The compiled model's self-check passes, and its clipped sum is that of one example at a time."""
    report = discreet.check(model, compiled_loss, batch, clipping=RULE, examples=size)
    report.raise_if_failed()
    sum_agrees(model, batch, report.layout, compiled_loss=compiled_loss, size=size, tolerance=tolerance)


def sum_agrees(
    model: nn.Module, batch: Any, layout: Any, *, compiled_loss: Any = loss, size: int = B, tolerance: float = 1e-9
) -> None:
    found = clipped_gradient(model, compiled_loss, batch, clipping=RULE, layout=layout, examples=size)
    with compiled.uncompiled():
        each = alone(model, compiled_loss, batch, size=size)
    assert relative_gap(found.tensors, weighted(each, abadi(norms(each), 1.5 * ROUNDING_MARGIN))) < tolerance


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


def test_what_was_compiled_before_goes_on_as_it_was(seen: Deliveries) -> None:
    model, batch = CASES["linear 3-D"].build()
    model.compile(backend="aot_eager")
    loss(model, batch).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    agrees(model, batch)
    assert seen.delivered > 0
    model.zero_grad()
    loss(model, batch).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_a_tensor_changed_after_it_was_used_is_refused_as_in_eager_code(seen: Deliveries) -> None:
    def changed(self: Any, x: Tensor) -> Tensor:
        h = self.a(x)
        out = self.b(h)
        h.mul_(2)
        return out + h

    model = Fn(changed, a=nn.Linear(D, D), b=nn.Linear(D, D)).double()
    _, batch = CASES["linear 3-D"].build()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        agrees(torch.compile(model), batch)


def test_several_forwards_of_one_region_before_the_backward(seen: Deliveries) -> None:
    model, batch = CASES["linear 3-D"].build()
    model.compile(fullgraph=True)

    def twice(model: nn.Module, batch: Any) -> Tensor:
        other = {**batch, "x": batch["x"].flip(1).tanh()}
        return loss(model, batch) * loss(model, other)

    agrees(model, batch, compiled_loss=twice)
    assert seen.delivered >= 2


def test_a_compiled_block_under_activation_checkpointing(seen: Deliveries) -> None:
    block = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D))

    def run(self: Any, x: Tensor) -> Tensor:
        h = checkpoint(self.b, self.a(x), use_reentrant=False)
        return self.c(checkpoint(self.b, h, use_reentrant=False))

    model = Fn(run, a=nn.Linear(D, D), b=block, c=nn.Linear(D, 2)).double()
    _, batch = CASES["linear 3-D"].build()
    block.forward = torch.compile(block.forward)
    agrees(model, batch)
    assert seen.delivered > 0


def test_a_region_without_gradients_under_the_guard(seen: Deliveries) -> None:
    model, batch = CASES["linear 3-D"].build()
    model.compile()
    book = Book(trainable(model), examples=B)
    with guard(book):
        with torch.no_grad():
            evaluated = model(batch["x"])
        backward(book, loss(model, batch))
    assert torch.allclose(evaluated, model(batch["x"]))
    assert settle(book, RULE).tensors.keys() == trainable(model).keys()


def test_private_training_of_a_compiled_model_is_that_of_the_model(seen: Deliveries, tmp_path: Any) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(40, D), torch.randint(3, (40,)))

    def trained(name: str, *, compiles: bool) -> list[Tensor]:
        torch.manual_seed(3)
        model = Wrapped(nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)))
        if compiles:
            model.compile(fullgraph=True)
        private = discreet.make_private(
            model, torch.optim.SGD(model.parameters(), lr=0.1), data, loss=cross_entropy, epsilon=8.0,
            batch_size=8, steps=6, seed=1, learning_rate=None, run_dir=tmp_path / name,
        )  # fmt: skip
        for _ in private:
            pass
        return [p.detach() for p in model.parameters()]

    wanted = trained("written", compiles=False)
    found = trained("compiled", compiles=True)
    assert seen.delivered >= 6
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_an_unchanged_loop_with_a_compiled_loss(seen: Deliveries, tmp_path: Any) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(40, D), torch.randint(3, (40,)))
    model = nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step_loss = torch.compile(cross_entropy, fullgraph=True)
    private = discreet.make_private(
        model, optimizer, data, loss=step_loss, epsilon=8.0, batch_size=8, steps=4, seed=1, learning_rate=None,
        run_dir=tmp_path / "run",
    )  # fmt: skip
    for batch in private.loader:
        private.backward(step_loss(model, batch))
        optimizer.step()
    assert seen.delivered >= 4


def test_frozen_and_thawed_between_steps(seen: Deliveries) -> None:
    model = frozen(nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3)), "0.weight").double()
    _, batch = CASES["linear 3-D"].build()
    whole = torch.compile(Wrapped(model), fullgraph=True)
    agrees(whole, batch)
    model.requires_grad_(True)
    agrees(whole, batch)


class Wrapped(nn.Module):
    """A model that is called by keyword, as the loss of the cases does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def _toy() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    wrapped = Fn(lambda s, x: s.inner(x), inner=model)
    return wrapped, {"x": torch.randn(B, 3, 6).double(), "target": torch.randn(B).double()}


@pytest.mark.parametrize("given", [{"mode": "reduce-overhead"}, {"options": {"epilogue_fusion": False}}, {}])
def test_mode_and_options_reach_inductor(given: dict[str, Any], seen: Deliveries, monkeypatch) -> None:
    wished = []

    def noting(graph: Any, inputs: Any, deliver: Any, options: Any) -> Any:
        wished.append(dict(options))
        return compiled.without_kernels(graph, inputs, deliver, options)

    monkeypatch.setattr(compiled, "compiler", noting)
    model, batch = _toy()
    agrees(torch.compile(model, **given), batch)
    wanted = {"epilogue_fusion": False} if "options" in given else {"triton.cudagraphs": True} if given else {}
    assert wished
    assert all(wanted.items() <= options.items() and bool(options) is bool(wanted) for options in wished)


def test_inductor_is_configured_as_it_was_asked_to_be(monkeypatch) -> None:
    import torch._inductor.compile_fx as inductor

    found = {}
    monkeypatch.setattr(inductor, "compile_fx", lambda *_, **named: found.update(named))
    lowering.by_inductor(fx.GraphModule({}, fx.Graph()), [], None, {"epilogue_fusion": False})
    assert found["config_patches"] == {"epilogue_fusion": False}


@pytest.mark.parametrize(("backend", "compiles"), [("eager", False), ("aot_eager", True)])
def test_backends_without_kernels_are_what_was_asked_for(backend: str, compiles: bool, seen: Deliveries) -> None:
    model, batch = _toy()
    agrees(torch.compile(model, backend=backend), batch)
    assert bool(seen.compiled) is compiles
    assert bool(seen.delivered) is compiles


def _own_backend(graph: Any, inputs: Any) -> Any:
    return graph.forward


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"backend": _own_backend}, "backend='_own_backend'"),
        ({"backend": "aot_eager_decomp_partition"}, "aot_eager_decomp_partition"),
        ({"backend": "aot_eager", "options": {"a": 1}}, "options="),
    ],
)
def test_another_backend_is_refused_by_name_and_works_where_nothing_is_guarded(given, said, seen: Deliveries) -> None:
    model, batch = _toy()
    called = torch.compile(model, **given)
    with pytest.raises(UnsupportedUse, match=re.escape(said)):
        clipped_gradient(called, loss, batch, clipping=RULE)
    if "options" not in given:
        torch.testing.assert_close(called(batch["x"]), model(batch["x"]))


def test_cuda_graphs_are_refused_where_they_would_be_used() -> None:
    wish = lowering.Wish(options={"triton.cudagraphs": True})
    on_accelerator = mock.Mock(spec=torch.Tensor, is_cuda=True)
    assert "max-autotune-no-cudagraphs" in str(wish.refusal([on_accelerator]))
    assert wish.refusal([torch.zeros(3)]) is None
