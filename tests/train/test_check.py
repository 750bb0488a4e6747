"""The self-check catches what would void the guarantee, by behaviour; it passes clean models; it leaves no trace."""

from __future__ import annotations

import contextlib
import importlib
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import CASES, Fn, loss
from discreet.core import rules
from discreet.core.clipping import Clipping
from discreet.errors import CheckFailed, ConfigError
from discreet.train.check import Status, check
from discreet.train.stillness import Allowed

B, T, D, V = 4, 7, 6, 11


def _features(*shape: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(B, *shape), "target": torch.randn(B)}


def _model(f, **parts) -> nn.Module:
    torch.manual_seed(1)
    return Fn(f, **parts)


def _failed(model, batch, what: str, *, loss_function=loss) -> None:
    report = check(model, loss_function, batch)
    failed = [row for row in report.rows if row.status is Status.FAILED]
    assert not report.passed
    assert any(what in f"{row.name} {row.what}" for row in failed), report.table()
    with pytest.raises(CheckFailed, match="no private training starts"):
        report.raise_if_failed()


class HandMadeBatchNorm(nn.Module):
    """Nothing in its name or class says what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, correction=0).sqrt() + 1e-3)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(D),
        lambda: nn.BatchNorm1d(D, affine=False),
        lambda: nn.BatchNorm1d(D, affine=False, track_running_stats=False),
        lambda: nn.BatchNorm1d(D, track_running_stats=False),
        lambda: HandMadeBatchNorm(),
    ],
)
def test_batch_norm_is_caught(norm):
    model = _model(lambda s, x: s.b(s.n(s.a(x))), a=nn.Linear(D, D), n=norm(), b=nn.Linear(D, 2))
    _failed(model, _features(D), "isolation")


def test_batch_norm_beside_dropout_is_caught():
    model = _model(
        lambda s, x: s.b(s.d(s.n(s.a(x)))),
        a=nn.Linear(D, D),
        n=nn.BatchNorm1d(D, affine=False),
        d=nn.Dropout(),
        b=nn.Linear(D, 2),
    )
    _failed(model, _features(D), "isolation")


def test_frozen_batch_norm_passes():
    model = _model(lambda s, x: s.b(s.n(s.a(x))), a=nn.Linear(D, D), n=nn.BatchNorm1d(D), b=nn.Linear(D, 2))
    model.n.requires_grad_(False).eval()
    assert check(model, loss, _features(D)).passed


def test_a_mean_over_the_tokens_of_the_batch_is_caught():
    """What language-model trainers do: divide by the number of labelled tokens in the whole batch."""
    torch.manual_seed(2)
    model = _model(lambda s, x: s.l(s.e(x)), e=nn.Embedding(V, D), l=nn.Linear(D, V))
    labels = torch.randint(0, V, (B, T))
    labels[0, 3:] = -100
    batch = {"x": torch.randint(0, V, (B, T)), "target": labels}

    def by_token(m, b):
        each = F.cross_entropy(m(b["x"]).transpose(1, 2), b["target"], reduction="none", ignore_index=-100).sum(1)
        return each / (b["target"] != -100).sum()

    def by_example(m, b):
        each = F.cross_entropy(m(b["x"]).transpose(1, 2), b["target"], reduction="none", ignore_index=-100).sum(1)
        return each / (b["target"] != -100).sum(1)

    _failed(model, batch, "isolation", loss_function=by_token)
    assert check(model, by_example, batch).passed
    even = {"x": batch["x"], "target": torch.randint(0, V, (B, T))}
    _failed(model, even, "removed", loss_function=by_token)


def _auxiliary(m, b):
    gates = m.gate(b["x"]).softmax(-1)
    return loss(m, b) + 0.01 * (gates.mean(0).square().sum() * gates.shape[-1])


def test_an_auxiliary_loss_over_the_batch_is_caught():
    model = _model(lambda s, x: s.gate(x).softmax(-1) * s.l(x), gate=nn.Linear(D, 4), l=nn.Linear(D, 4))
    _failed(model, _features(D), "isolation", loss_function=_auxiliary)


@pytest.mark.parametrize("weight", [1e-3, 1e-4])
def test_a_faint_auxiliary_loss_is_caught(weight):
    model = _model(lambda s, x: s.l(x), l=nn.Linear(D, 4))
    _failed(model, _features(D), "isolation", loss_function=lambda m, b: loss(m, b) + weight * m(b["x"]).tanh().mean())


def test_a_faint_coupling_beside_a_large_loss_is_caught():
    def uneven(m, b):
        scale = torch.ones(len(b["x"])).index_fill(0, torch.tensor([0]), 1e4) if len(b["x"]) > 1 else torch.ones(1)
        return loss(m, b) * scale + 0.05 * m(b["x"]).tanh().mean()

    _failed(_model(lambda s, x: s.l(x), l=nn.Linear(D, 4)), _features(D), "isolation", loss_function=uneven)


def test_negatives_from_the_batch_are_caught():
    def contrastive(m, b):
        z = F.normalize(m(b["x"]), dim=1)
        return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)), reduction="none")

    _failed(_model(lambda s, x: s.l(x), l=nn.Linear(D, 4)), _features(D), "isolation", loss_function=contrastive)


def test_mixing_examples_is_caught():
    def mixed(m, b):
        return m(0.7 * b["x"] + 0.3 * b["x"].roll(1, 0)).square().sum(1)

    _failed(_model(lambda s, x: s.l(x), l=nn.Linear(D, 4)), _features(D), "isolation", loss_function=mixed)


def test_division_by_the_size_of_the_batch_is_caught():
    _failed(
        _model(lambda s, x: s.l(x), l=nn.Linear(D, 4)),
        _features(D),
        "removed",
        loss_function=lambda m, b: loss(m, b) / len(b["x"]),
    )


def test_a_gradient_that_is_coupled_where_the_loss_is_not_is_caught():
    """The value of ``h - mean + mean.detach()`` depends on no other example; its gradient does."""
    model = _model(lambda s, x: _straight(s.a(x)), a=nn.Linear(D, 3))
    assert not check(model, loss, _features(D)).passed


def _straight(h: Tensor) -> Tensor:
    mean = h.mean(0, keepdim=True).expand_as(h)
    return h - mean + mean.detach()


def test_a_hook_that_couples_gradients_is_caught():
    def forward(self, x):
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(lambda g: g / g.norm())
        return self.b(h)

    assert not check(_model(forward, a=nn.Linear(D, D), b=nn.Linear(D, 2)), loss, _features(D)).passed


class RunningMean(nn.Module):
    """Keeps a mean of what it saw, and never uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(D))
        self.lin = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.seen.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.lin(x)


def test_a_buffer_that_learns_from_the_data_is_named():
    model = RunningMean()
    report = check(model, loss, _features(D))
    (row,) = [row for row in report.rows if row.status is Status.FAILED]
    assert row.name == "buffers"
    assert "seen" in row.detail
    assert not model.seen.any()


_WRITES = {
    "in place": lambda model, mean: model.kept.add_(mean),
    "past autograd": lambda model, mean: model.kept.data.add_(mean),
    "another object": lambda model, mean: setattr(model, "kept", nn.Parameter(model.kept + mean, requires_grad=False)),
    "a trained one": lambda model, mean: model.l.bias.data.add_(1e-6 * mean.mean()),
    "in training alone": lambda model, mean: torch.is_grad_enabled() and model.kept.data.add_(mean),
}


@pytest.mark.parametrize("how", _WRITES)
def test_a_parameter_that_a_forward_writes_is_named(how):
    """A codebook or a teacher that follows the batch: frozen, so it gets no noise, and it is saved with the model."""

    def forward(model, x):
        value = model.l(x)
        with contextlib.nullcontext() if how == "in training alone" else torch.no_grad():
            _WRITES[how](model, x.detach().mean(0))
        return value

    model = _model(forward, l=nn.Linear(D, D), kept=nn.Parameter(torch.zeros(D), requires_grad=False))
    row = next(row for row in check(model, loss, _features(D)).rows if row.name == "buffers")
    assert row.status is Status.FAILED
    assert ("l.bias" if how == "a trained one" else "kept") in row.detail
    still = _model(lambda s, x: s.l(x), l=nn.Linear(D, D), kept=nn.Parameter(torch.zeros(D), requires_grad=False))
    assert check(still, loss, _features(D)).passed


def test_a_buffer_that_is_written_in_training_alone_is_named():
    def forward(model, x):
        if torch.is_grad_enabled():
            model.seen.add_(x.detach().mean(0))
        return model.l(x)

    model = _model(forward, l=nn.Linear(D, D))
    model.register_buffer("seen", torch.zeros(D))
    row = next(row for row in check(model, loss, _features(D)).rows if row.name == "buffers")
    assert row.status is Status.FAILED


def _bank(model: nn.Module, x: Tensor) -> None:
    model.kept = torch.cat([model.kept, x.detach()])


def _by_rows(model: nn.Module, x: Tensor) -> None:
    if len(x) > len(model.kept):
        model.kept = torch.zeros(len(x), D)


def _once(model: nn.Module, x: Tensor) -> None:
    if model.later is None:
        model.later = torch.zeros(D)


def _new(model: nn.Module, x: Tensor) -> None:
    if "more" not in model._buffers:
        model.register_buffer("more", torch.zeros(D))


def _dropped(model: nn.Module, x: Tensor) -> None:
    if "kept" in model._buffers:
        del model.kept


def _wider(model: nn.Module, x: Tensor) -> None:
    model.kept = model.kept.double()


_RESIZES = {
    "a bank of examples": (_bank, "kept"),
    "a table by rows": (_by_rows, "kept"),
    "made later": (_once, "later"),
    "new": (_new, "more"),
    "dropped": (_dropped, "kept"),
    "another type": (_wider, "kept"),
}


def _sized(write, *, persistent: bool) -> nn.Module:
    def forward(model, x):
        write(model, x)
        return model.l(x)

    model = _model(forward, l=nn.Linear(D, D))
    model.register_buffer("kept", torch.ones(2, D), persistent=persistent)
    model.register_buffer("later", None, persistent=persistent)
    return model


@pytest.mark.parametrize("how", _RESIZES)
def test_a_buffer_that_is_saved_and_changes_its_size_is_named(how):
    """Its size is a number of examples, or the length of the longest; a bank holds the examples themselves."""
    write, name = _RESIZES[how]
    model = _sized(write, persistent=True)
    report = check(model, loss, _features(D))
    (row,) = [row for row in report.rows if row.status is Status.FAILED]
    assert row.name == "buffers"
    assert f"{name}: a forward gives it another size" in row.detail
    assert "persistent=False" in row.detail
    assert torch.equal(model.kept, torch.ones(2, D))
    assert model.later is None
    assert "more" not in dict(model.named_buffers())


def test_a_table_that_is_not_saved_and_follows_from_sizes_passes():
    for write, name in ((_by_rows, "kept"), (_once, "later"), (_wider, "kept")):
        report = check(_sized(write, persistent=False), loss, _features(D))
        assert report.passed, report.table()
        assert report.allowed == Allowed(tables=(name,))


def test_a_bank_of_examples_is_named_though_it_is_not_saved():
    report = check(_sized(_bank, persistent=False), loss, _features(D))
    assert not report.passed
    assert "kept: a forward gives it another size" in report.table()


def test_a_state_that_is_made_of_the_examples_is_named():
    """What a recurrent layer keeps of one batch for the next, made anew for each size."""

    def keep(model, x):
        fresh = model.kept.shape != x.shape
        model.kept = x.detach() if fresh else model.kept + x.detach()

    row = next(row for row in check(_sized(keep, persistent=False), loss, _features(D)).rows if row.name == "buffers")
    assert row.status is Status.FAILED
    assert "kept: a forward writes private statistics" in row.detail


def test_what_every_forward_moves_must_be_movable_by_a_made_up_example():
    class Picky(RunningMean):
        def forward(self, x):
            self.seen.add_(1)
            if not x.abs().max() > 100:
                raise ValueError("too small")
            return self.lin(x)

    batch = _features(D)
    batch["x"] += 1000.0
    report = check(Picky(), loss, batch)
    (row,) = [row for row in report.rows if row.status is Status.FAILED]
    assert "seen: every forward moves it" in row.detail
    assert "made-up example" in row.detail


def test_a_counter_past_autograd_is_known_to_move():
    def forward(model, x):
        model.kept.data.add_(1)
        return model.l(x)

    model = _model(forward, l=nn.Linear(D, D))
    model.register_buffer("kept", torch.zeros(()))
    assert check(model, loss, _features(D)).allowed == Allowed(moving=("kept",))


def test_a_counter_is_no_secret():
    class Counting(RunningMean):
        def forward(self, x):
            with torch.no_grad():
                self.seen.add_(1)
            return self.lin(x)

    assert check(Counting(), loss, _features(D)).passed


def test_a_rule_with_a_wrong_norm_is_caught(monkeypatch):
    """Negative control: were a rule wrong by one percent, the check would say so."""
    honest = rules.linear.Linear.weight_form

    def wrong(self, grad, input, weight, examples):
        return honest(self, grad * 0.99, input, weight, examples)

    monkeypatch.setattr(rules.linear.Linear, "weight_form", wrong)
    _failed(_model(lambda s, x: s.l(x), l=nn.Linear(D, 4)), _features(D), "l.weight")


_WRONG = {
    "gram": ("discreet.core.outer.gram_norm2", lambda: _model(lambda s, x: s.l(x), l=nn.Linear(D, 3)), (40, D)),
    "gram of two layers": (
        "discreet.core.uses.gram_norm2",
        lambda: _model(lambda s, x: s.k(x) * s.l(x), k=nn.Linear(D, 3), l=nn.Linear(D, 3)),
        (40, D),
    ),
    "gram of pixels": (
        "discreet.core.windows.sum_of_products",
        lambda: _model(lambda s, x: s.c(x), c=nn.Conv1d(2, 3, 3)),
        (2, 30),
    ),
}


@pytest.mark.parametrize("name", list(_WRONG))
def test_a_route_that_these_sizes_would_not_take_is_tried(name, monkeypatch):
    """Training has more examples and longer ones than the check, so it may go where the check would not."""
    target, make, shape = _WRONG[name]
    model, batch = make(), _features(*shape)
    assert check(model, loss, batch).passed
    assert all("instantiate" in row.detail for row in check(model, loss, batch).rows if row.name.endswith("weight"))
    module, _, function = target.rpartition(".")
    honest = getattr(importlib.import_module(module), function)
    monkeypatch.setattr(target, lambda *args, **options: honest(*args, **options) * 0.5)
    _failed(model, batch, "")


def test_a_missed_use_is_caught(monkeypatch):
    from discreet.core import book

    honest = book.Book.record

    def forgetful(self, derivation, form):
        if len(self._records) != 1:
            honest(self, derivation, form)

    monkeypatch.setattr(book.Book, "record", forgetful)
    assert not check(_model(lambda s, x: s.l(s.l(x).tanh()), l=nn.Linear(D, D)), loss, _features(D)).passed


def test_a_use_without_a_rule_is_reported_and_not_raised():
    model = _model(lambda s, x: torch.cdist(x, s.w), w=nn.Parameter(torch.randn(3, D)))
    report = check(model, loss, _features(T, D))
    assert not report.passed
    assert report.layout is None
    assert "cdist" in report.table()


@pytest.mark.parametrize("training", [True, False])
def test_dropout_passes(training):
    model = _model(
        lambda s, x: s.b(s.d(s.a(x).relu())), a=nn.Linear(D, 32), d=nn.Dropout(0.5), b=nn.Linear(32, 2)
    ).train(training)
    report = check(model, loss, _features(D))
    assert report.passed, report.table()
    assert model.training is training


def test_nothing_is_left_behind():
    model = _model(
        lambda s, x: s.b(s.d(s.n(s.a(x)))), a=nn.Linear(D, D), n=nn.BatchNorm1d(D), d=nn.Dropout(0.3), b=nn.Linear(D, 2)
    )
    model.n.eval()
    model.a.weight.grad = torch.full_like(model.a.weight, 7.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    batch = _features(D)
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
        batch = _features(length, D)
        batch["x"][0] = first
        batch["x"].clamp_(max=9.0 if first else 3.0)
        reports.append(check(_model(gated, a=nn.Linear(D, 9), b=nn.Linear(D, 9)), loss, batch))
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
    batch = _features(D)
    batch["x"][1] = float("nan")
    good = _model(lambda s, x: s.l(x), l=nn.Linear(D, 4))
    _failed(good, batch, "isolation", loss_function=lambda m, b: loss(m, b) + m(b["x"]).nan_to_num().mean())


def test_bfloat16_autocast_inside_the_model_passes():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3))

    def mixed(m, b):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = m(b["x"])
        return out.float().square().sum(1)

    report = check(net, mixed, _features(D))
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
    _failed(model, _features(3, D), what)
    assert all(torch.equal(value.view(torch.int32), before[n].view(torch.int32)) for n, value in
               model.state_dict().items())  # fmt: skip


def test_what_is_right_behind_a_gate_that_begins_at_zero_passes():
    model = Gated(lambda s, h: s.inner(h).tanh(), gate=torch.zeros(D))
    report = check(model, loss, _features(3, D))
    assert report.passed, report.table()
    assert not any(row.status is Status.UNUSED for row in report.rows)


def test_a_parameter_that_no_gradient_reaches_is_said_not_to_have_been_compared():
    model = _model(lambda s, x: s.b(x) + (s.a(x) - 1e9).relu(), a=nn.Linear(D, 2), b=nn.Linear(D, 2))
    report = check(model, loss, _features(D))
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
    model = _model(forward, a=nn.Linear(D, D), b=nn.Linear(D, 2))
    _failed(model, {"x": x, "target": torch.randn(B)}, "b.weight")


def test_a_failed_check_gives_no_layout():
    model = _model(lambda s, x: _time_first(s, s.a(x)), a=nn.Linear(D, D), inner=nn.Linear(D, D))
    report = check(model, loss, _features(3, D))
    assert not report.passed
    assert report.layout is None
