"""The self-check on examples that nobody gave: what is reordered by a key that all examples of the check share."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import loss
from discreet.core.clipping import Clipping
from discreet.core.gradient import clipped_gradient
from discreet.errors import UnsupportedUse
from discreet.train.check import check
from discreet.train.elsewhere import elsewhere
from train.checking import B, D, T, V, expect_failed

WHAT = "gradients of made-up examples"


class _Placed(nn.Module):
    """Puts its examples in the order of a key before a layer, in ways that no graph shows, and back after it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.way = way
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        key = key > 0 if key.is_floating_point() else key
        order = key.int().argsort(stable=True)
        turns = int((key != key[0]).any())
        matrix = F.one_hot(order, len(x)).to(x)
        back = order.argsort()
        y = {
            "data": lambda: self.b(x[order]).tanh()[back],
            "rolled": lambda: self.b(x.roll(turns, 0)).tanh().roll(-turns, 0),
            "by a matrix": lambda: matrix.T @ self.b(matrix @ x).tanh(),
            "copied by index": lambda: self.b(torch.zeros_like(x).index_copy(0, back, x)).tanh()[back],
            "an activation copied by index": lambda: self.b(
                torch.zeros_like(x).index_copy(0, back, self.a(x).tanh())
            ).tanh()[back],
            "an activation added by index": lambda: self.b(
                torch.zeros_like(x).index_add(0, back, self.a(x).tanh())
            ).tanh()[back],
            "an activation through its numbers": lambda: self.b(
                self.a(x).flatten().take((order * D)[:, None] + torch.arange(D)).tanh()
            )[back],
        }[self.way]()
        return y + self.a(x).tanh()


KEYS = {
    "ones": torch.ones(B),
    "zeros": torch.zeros(B),
    "all above zero": torch.tensor([0.3, 0.4, 0.5, 0.6]),
    "one length": torch.full((B,), 7),
    "one label": torch.full((B,), 3),
    "the first label": torch.zeros(B, dtype=torch.long),
    "all marked": torch.ones(B, dtype=torch.bool),
}
WAYS = [
    "data",
    "rolled",
    "by a matrix",
    "copied by index",
    "an activation copied by index",
    "an activation added by index",
    "an activation through its numbers",
]


@pytest.mark.parametrize("key", list(KEYS))
@pytest.mark.parametrize("way", WAYS)
def test_an_order_that_no_example_of_the_check_shows_is_caught(way, key):
    """The examples come in order, or have one key: given, reversed and one less, each stays at its place."""
    torch.manual_seed(5)
    batch = {"x": torch.randn(B, D), "key": KEYS[key], "target": torch.randn(B)}
    expect_failed(_Placed(way), batch, WHAT)


def test_a_coupling_that_these_examples_do_not_show_is_caught():
    def forward(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        alike = (batch["key"][:, None] == batch["key"]).float()
        each = m(batch["x"]).square().sum(1)
        return each + (1 - alike) @ each

    torch.manual_seed(5)
    batch = {"x": torch.randn(B, D), "key": torch.full((B,), 3)}
    expect_failed(nn.Linear(D, 2), batch, WHAT, loss_function=forward)


class _Text(nn.Module):
    """Masks, lengths, labels of which some are ignored: whatever may be drawn, no example meets another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words, self.steps, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, ids: Tensor, mask: Tensor, length: Tensor) -> Tensor:
        h = self.steps(self.words(ids)).masked_fill(~mask[..., None], 0.0)
        within = torch.arange(ids.shape[1]) < length[:, None]
        assert bool((length >= 1).all())
        return self.head(torch.where(within[..., None], h, 0.0).tanh())


def _text_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["ids"], batch["mask"], batch["length"])
    each = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none", ignore_index=-100)
    return each.sum(1) / (batch["labels"] != -100).sum(1)


def _text() -> dict[str, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, V, (B, T))
    labels[:, :2] = -100
    labels[1, 2:] = -100  # its loss is 0 / 0
    return {
        "ids": torch.randint(0, V, (B, T)),
        "mask": torch.ones(B, T, dtype=torch.bool),
        "length": torch.full((B,), T),
        "labels": labels,
    }


def test_a_model_that_takes_each_example_by_itself_passes():
    report = check(_Text(), _text_loss, _text())
    assert report.passed, report.table()


def test_a_model_that_takes_no_other_examples_passes():
    """What it refuses says nothing about it."""
    torch.manual_seed(0)
    given = {"x": torch.randn(B, D), "target": torch.randn(B)}

    def strict(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        assert bool(torch.isin(batch["x"], given["x"]).all())
        return (model(batch["x"]).sum(1) - batch["target"]).square()

    assert elsewhere(given, size=B, takes=lambda batch: bool(torch.isin(batch["x"], given["x"]).all())) == []
    assert check(nn.Linear(D, 2), strict, given).passed


def test_what_is_refused_on_other_examples_is_refused_in_training_and_not_here():
    """A rare path without a rule: the check says nothing of it, and an update that takes it ends."""

    def rare(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        weight = model.weight.cumprod(1) if bool((batch["key"] != batch["key"][0]).any()) else model.weight
        return (F.linear(batch["x"], weight).sum(1) - batch["target"]).square()

    torch.manual_seed(0)
    batch = {"x": torch.randn(B, D), "key": torch.ones(B), "target": torch.randn(B)}
    model = nn.Linear(D, 2, bias=False)
    report = check(model, rare, batch)
    assert report.passed, report.table()
    with pytest.raises(UnsupportedUse, match="cumprod"):
        clipped_gradient(
            model, rare, {**batch, "key": torch.arange(B)}, clipping=Clipping.automatic(), layout=report.layout
        )


def test_what_is_made_up_stays_in_range():
    torch.manual_seed(0)
    images = torch.rand(B, 3, T, T)
    images[:, :, 0] = 0.0
    rare = torch.randn(B, D)
    rare[0, 0], rare[1, 1], rare[2, 2] = float("nan"), float("inf"), float("-inf")
    given = {
        **_text(),
        "images": images,
        "bytes": torch.randint(0, 256, (B, 3), dtype=torch.uint8),
        "rare": rare,
        "wave": torch.randn(B, 2, dtype=torch.complex64),
        "half": rare.bfloat16(),
        "constant": torch.arange(9),
    }
    made = elsewhere(given, size=B, takes=lambda batch: True)
    assert len(made) == 2
    assert all(torch.equal(value.flip(0), made[1][name]) for name, value in made[0].items() if name != "constant")
    for batch in made:
        assert all(value.shape == given[name].shape for name, value in batch.items())
        assert all(value.dtype == given[name].dtype for name, value in batch.items())
        assert 0 <= int(batch["ids"].min()) <= int(batch["ids"].max()) <= int(given["ids"].max())
        assert 1 <= int(batch["length"].min()) <= int(batch["length"].max()) <= T
        assert torch.isin(batch["labels"], given["labels"]).all()
        assert torch.isin(batch["wave"].real, given["wave"].real).all()
        assert 0 <= float(batch["images"].min()) <= float(batch["images"].max()) <= 1
        assert batch["rare"].isfinite().all()
        assert batch["half"].isfinite().all()
        assert batch["constant"] is given["constant"]
    for name, least, most in (("length", 1, T), ("mask", 0, 1), ("ids", 0, int(given["ids"].max()))):
        assert bool((made[0][name].amin(0) == least).all()), name
        assert bool((made[0][name].amax(0) == most).all()), name


def test_ids_that_have_nothing_in_between_are_used_again():
    sparse = {"ids": torch.tensor([3, 900, 17, 40])}

    def takes(batch: dict[str, Tensor]) -> bool:
        return bool(torch.isin(batch["ids"], sparse["ids"]).all())

    made = elsewhere(sparse, size=B, takes=takes)
    assert len(made) == 2
    assert all(takes(batch) for batch in made)


def test_a_model_that_needs_a_tensor_whole_gets_that_of_another_example():
    given = {"ids": torch.randint(0, V, (B, T)), "x": torch.rand(B, D)}

    def takes(batch: dict[str, Tensor]) -> bool:
        return all(any(torch.equal(row, whole) for whole in given["ids"]) for row in batch["ids"])

    made = elsewhere(given, size=B, takes=takes)
    assert len(made) == 2
    assert all(takes(batch) for batch in made)
    assert float(made[0]["x"].min()) >= float(given["x"].min())
    assert float(made[0]["x"].max()) <= float(given["x"].max())


def test_the_same_is_made_up_every_time():
    one, other = (elsewhere(_text(), size=B, takes=lambda batch: True) for _ in range(2))
    for first, second in zip(one, other, strict=True):
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_it_costs_at_most_half_as_much_again(monkeypatch):
    """Forwards, and backwards as two of them, with the batches that nobody gave and without."""
    plain, costs = torch.autograd.grad, []
    for others in (elsewhere, lambda *_, **__: []):
        work = [0]

        def counted(model, batch, work=work):
            work[0] += 1
            return loss(model, batch)

        def grad(*args, work=work, **named):
            work[0] += 2
            return plain(*args, **named)

        monkeypatch.setattr(sys.modules["discreet.train.check"], "elsewhere", others)
        monkeypatch.setattr(torch.autograd, "grad", grad)
        torch.manual_seed(0)
        batch = {"input": torch.randn(B, D), "target": torch.randn(B)}
        assert check(nn.Linear(D, 2), counted, batch).passed
        costs.append(work[0])
    assert costs[1] < costs[0] <= 1.5 * costs[1]


class _Marked(nn.Module):
    """Meets the marked places of all examples in one matrix, which has as many rows as places are marked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, mark: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[mark] = self.a(x[mark]).tanh()
        return self.b(out.sum(1)) + self.b(x[:, 0])


def _marked(*counts: int) -> dict[str, Tensor]:
    torch.manual_seed(3)
    mark = torch.arange(T) < torch.tensor(counts)[:, None]
    return {"x": torch.randn(len(counts), T, D), "mark": mark, "target": torch.randn(len(counts))}


@pytest.mark.parametrize("counts", [(2, 0, 1, 1, 1), (3, 0, 0, 2, 0), (2, 2, 1, 1, 1)])
def test_as_many_rows_as_examples_are_not_their_rows_where_each_had_one_in_the_check(counts):
    """Five marked places among five examples look like the batch, as the four among four examples did."""
    model = _Marked()
    report = check(model, loss, _marked(1, 1, 1, 1))
    with pytest.raises(UnsupportedUse):
        clipped_gradient(model, loss, _marked(*counts), clipping=Clipping.automatic(), layout=report.layout)
