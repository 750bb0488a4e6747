"""The self-check catches what would void the guarantee, by behaviour; it passes clean models; it leaves no trace."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from torch import Tensor, nn

from blocks import loss
from cases import CASES
from discreet.core import rules
from discreet.core.clipping import Clipping
from discreet.core.kernels import processor
from discreet.errors import CheckFailed, ConfigError
from discreet.train.check import Status, check
from train import toys
from train.checking import B, D, T, built, drawn, expect_failed


def test_a_rule_with_a_wrong_norm_is_caught(monkeypatch):
    """Negative control: were a rule wrong by one percent, the check would say so."""
    honest = rules.linear.Linear.weight_form

    def wrong(self, grad, input, weight, examples):
        return honest(self, grad * 0.99, input, weight, examples)

    monkeypatch.setattr(rules.linear.Linear, "weight_form", wrong)
    expect_failed(built(lambda s, x: s.l(x), l=nn.Linear(D, 4)), drawn(D), "l.weight")


_WRONG = {
    "gram": ("discreet.core.outer.gram_norm2", lambda: built(lambda s, x: s.l(x), l=nn.Linear(D, 3)), (40, D)),
    "gram of two layers": (
        "discreet.core.uses.gram_norm2",
        lambda: built(lambda s, x: s.k(x) * s.l(x), k=nn.Linear(D, 3), l=nn.Linear(D, 3)),
        (40, D),
    ),
    "gram of pixels": (
        "discreet.core.windows.sum_of_products",
        lambda: built(lambda s, x: s.c(x), c=nn.Conv1d(2, 3, 3)),
        (2, 30),
    ),
}
_BY_KERNEL = {
    "gram": "discreet.core.kernels.dispatch.gram_norm2",
    "gram of two layers": "discreet.core.kernels.dispatch.gram_norm2",
    "gram of pixels": "discreet.core.kernels.processor.gram_norm2",
}


@pytest.mark.parametrize("name", list(_WRONG))
@pytest.mark.parametrize("by_kernel", [False, True])
def test_a_route_that_these_sizes_would_not_take_is_tried(name, by_kernel, monkeypatch):
    """Training has longer examples than the check, so it may go where the check would not."""
    target, make, shape = _WRONG[name]
    model, batch = make(), drawn(*shape)
    if not by_kernel:
        monkeypatch.setattr(processor, "_is_there", lambda: False)
    elif processor._is_there():
        target = _BY_KERNEL[name]
    else:
        pytest.skip("no compiled products for this processor")
    assert check(model, loss, batch).passed
    assert all("instantiate" in row.detail for row in check(model, loss, batch).rows if row.name.endswith("weight"))
    module, _, function = target.rpartition(".")
    honest = getattr(importlib.import_module(module), function)
    monkeypatch.setattr(target, lambda *args, **options: honest(*args, **options) * 0.5)
    expect_failed(model, batch, "")


@pytest.mark.skipif(not processor._is_there(), reason="no compiled products for this processor")
def test_norms_that_are_not_those_of_the_gradients_beside_them_are_caught(monkeypatch):
    honest = processor.products

    def wrong(input, grad):
        made, norm2_B = honest(input, grad)
        return made, norm2_B * 0.5

    model, batch = built(lambda s, x: s.c(x), c=nn.Conv2d(8, 8, 3)), drawn(8, 12, 12)
    assert check(model, loss, batch).passed
    monkeypatch.setattr(processor, "products", wrong)
    expect_failed(model, batch, "c.weight")


def test_a_missed_use_is_caught(monkeypatch):
    from discreet.core import book

    honest = book.Book.record

    def forgetful(self, derivation, form):
        if len(self._records) != 1:
            honest(self, derivation, form)

    monkeypatch.setattr(book.Book, "record", forgetful)
    assert not check(built(lambda s, x: s.l(s.l(x).tanh()), l=nn.Linear(D, D)), loss, drawn(D)).passed


def test_a_remedy_is_said_once():
    report = check(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), toys.loss, toys.data()[:4])
    assert sum(row.name == "isolation" and row.status is Status.FAILED for row in report.rows) == 2
    with pytest.raises(CheckFailed) as failed:
        report.raise_if_failed()
    assert str(failed.value).count("use GroupNorm or LayerNorm") == 1


def test_a_use_without_a_rule_is_reported_and_not_raised():
    model = built(lambda s, x: torch.cdist(x, s.w), w=nn.Parameter(torch.randn(3, D)))
    report = check(model, loss, drawn(T, D))
    assert not report.passed
    assert report.layout is None
    assert "cdist" in report.table()


@pytest.mark.parametrize("training", [True, False])
def test_dropout_passes(training):
    model = built(
        lambda s, x: s.b(s.d(s.a(x).relu())), a=nn.Linear(D, 32), d=nn.Dropout(0.5), b=nn.Linear(32, 2)
    ).train(training)
    report = check(model, loss, drawn(D))
    assert report.passed, report.table()
    assert model.training is training


def test_nothing_is_left_behind():
    model = built(
        lambda s, x: s.b(s.d(s.n(s.a(x)))), a=nn.Linear(D, D), n=nn.BatchNorm1d(D), d=nn.Dropout(0.3), b=nn.Linear(D, 2)
    )
    model.n.eval()
    model.a.weight.grad = torch.full_like(model.a.weight, 7.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    batch = drawn(D)
    torch.set_rng_state(state)
    kept = {k: v.clone() for k, v in batch.items()}
    check(model, loss, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.a.weight.grad, torch.full_like(model.a.weight, 7.0))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "a.weight")
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert all(torch.equal(batch[k], kept[k]) for k in kept)


def test_what_is_published_of_a_check_is_the_same_whatever_the_examples_are():
    """One row decides whether a gate opens, so whether what is behind it is used, and how long the padded batch is."""

    def gated(model, x):
        is_open = (x > 3).flatten(1).any(1).to(x.dtype)
        return model.a(x).mean(1) + is_open[:, None] * model.b(x).mean(1)

    reports = []
    for first, length in ((0.0, 3), (9.0, 3), (0.0, 200)):
        batch = drawn(length, D)
        batch["x"][0] = first
        batch["x"].clamp_(max=9.0 if first else 3.0)
        reports.append(check(built(gated, a=nn.Linear(D, 9), b=nn.Linear(D, 9)), loss, batch))
    assert all(report.passed for report in reports)
    assert len({report.table() for report in reports}) == 3
    assert len({json.dumps(report.released()) for report in reports}) == 1
    assert {row["status"] for row in reports[0].released()["rows"]} == {"passed"}


def test_unused_parameters_are_reported_and_pass():
    model, batch = CASES["unused parameter"].build(torch.float32)
    report = check(model, loss, batch)
    assert report.passed
    assert {row.name for row in report.rows if row.status is Status.UNUSED} == {"never.weight", "never.bias", "token"}


def test_every_clipping_function_can_be_compared():
    model, batch = CASES["linear 3-D"].build(torch.float32)
    for clipping in (Clipping.abadi(0.1), Clipping.automatic(), Clipping.none()):
        assert check(model, loss, batch, clipping=clipping).passed


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_any_small_batch_will_do(size):
    for name in ("windows (Swin)", "position ids (T,), T equal to B", "tied head", "token by repeat"):
        model, batch = CASES[name].build()
        part = {k: v.repeat(2, *[1] * (v.dim() - 1))[:size] for k, v in batch.items()}
        part["target"] = torch.randn(size, dtype=torch.float64)
        assert check(model, loss, part).passed


def test_a_check_of_one_example_is_refused():
    model, batch = CASES["linear 2-D"].build()
    with pytest.raises(ConfigError, match="at least 2"):
        check(model, loss, {k: v[:1] for k, v in batch.items()})


def test_the_report_holds_no_value_from_the_data():
    model, batch = CASES["linear 2-D"].build(torch.float32)
    batch["x"][0, 0] = 123456.789
    report = check(model, loss, batch)
    text = report.table() + json.dumps(report.to_json())
    assert "123456" not in text
    assert json.loads(json.dumps(report.to_json()))["passed"] == report.passed
    assert len(report.table().splitlines()) == len(report.rows) + 1


def test_rows_that_are_not_finite_do_not_hide_a_failure():
    batch = drawn(D)
    batch["x"][1] = float("nan")
    good = built(lambda s, x: s.l(x), l=nn.Linear(D, 4))
    expect_failed(good, batch, "isolation", loss_function=lambda m, b: loss(m, b) + m(b["x"]).nan_to_num().mean())


def test_bfloat16_autocast_inside_the_model_passes():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3))

    def mixed(m, b):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = m(b["x"])
        return out.float().square().sum(1)

    report = check(net, mixed, drawn(D))
    assert report.passed, report.table()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda model, batch: model(batch).mean(), r"losses of shape \(\)"),
        (lambda model, batch: model(batch), r"losses of shape \(4, 3\)"),
        (lambda model, batch: [1.0, 2.0], "losses of type list"),
    ],
)
def test_losses_that_are_not_one_per_example_are_said_to_be_so(bad, said):
    with pytest.raises(ConfigError, match=said):
        check(nn.Linear(5, 3), bad, torch.randn(4, 5))


class Gated(nn.Module):
    """A branch behind a gate that begins at zero, as adapters, LayerScale and adaLN-Zero begin."""

    def __init__(self, branch, *, gate: Tensor) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.before, self.after, self.inner = nn.Linear(D, D), nn.Linear(D, 2), nn.Linear(D, D)
        self.gate, self.branch = nn.Parameter(gate), branch

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return self.after(h + self.gate * self.branch(self, h))


def _time_first(model: nn.Module, h: Tensor) -> Tensor:
    """Rows in an order that no layout describes: position by position, and not example by example."""
    folded = model.inner(h.transpose(0, 1).reshape(-1, D)).tanh()
    return folded.reshape(h.shape[1], -1, D).transpose(0, 1)


def _centred(model: nn.Module, h: Tensor) -> Tensor:
    return h - h.mean(0, keepdim=True)


@pytest.mark.parametrize("gate", [torch.zeros(D), torch.cat([torch.zeros(D - 1), torch.full((1,), -0.0)])])
@pytest.mark.parametrize(("branch", "what"), [(_time_first, "inner"), (_centred, "isolation")])
def test_what_is_wrong_behind_a_gate_that_begins_at_zero_is_caught(branch, what, gate):
    """At zero no gradient and no other example comes through: after the first update the norms would be wrong."""
    model = Gated(branch, gate=gate)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expect_failed(model, drawn(3, D), what)
    assert all(torch.equal(value.view(torch.int32), before[n].view(torch.int32)) for n, value in
               model.state_dict().items())  # fmt: skip


def test_what_is_right_behind_a_gate_that_begins_at_zero_passes():
    model = Gated(lambda s, h: s.inner(h).tanh(), gate=torch.zeros(D))
    report = check(model, loss, drawn(3, D))
    assert report.passed, report.table()
    assert not any(row.status is Status.UNUSED for row in report.rows)


def test_a_parameter_that_no_gradient_reaches_is_said_not_to_have_been_compared():
    model = built(lambda s, x: s.b(x) + (s.a(x) - 1e9).relu(), a=nn.Linear(D, 2), b=nn.Linear(D, 2))
    report = check(model, loss, drawn(D))
    assert report.passed, report.table()
    rows = {row.name: row for row in report.rows}
    assert rows["a.weight"].status is Status.UNUSED
    assert "nothing to compare" in rows["a.weight"].detail
    assert rows["b.weight"].status is Status.PASSED


@pytest.mark.parametrize("key", [torch.arange(B), torch.arange(B).flip(0)])
def test_a_batch_that_is_sorted_by_its_data_is_caught_though_it_came_in_order(key):
    def forward(s, batch: Tensor) -> Tensor:
        x, order = batch[..., :-1], batch[:, 0, -1].argsort()
        h = s.a(x).tanh()
        return s.b(h[order].reshape(-1, D)).reshape(len(x), 3, 2)[order.argsort()]

    torch.manual_seed(3)
    x = torch.cat([torch.randn(B, 3, D) * torch.tensor([0.1, 1.0, 2.0, 4.0])[:, None, None],
                   key[:, None, None].expand(B, 3, 1).float()], -1)  # fmt: skip
    model = built(forward, a=nn.Linear(D, D), b=nn.Linear(D, 2))
    expect_failed(model, {"x": x, "target": torch.randn(B)}, "b.weight")


def test_a_failed_check_gives_no_layout():
    model = built(lambda s, x: _time_first(s, s.a(x)), a=nn.Linear(D, D), inner=nn.Linear(D, D))
    report = check(model, loss, drawn(3, D))
    assert not report.passed
    assert report.layout is None
