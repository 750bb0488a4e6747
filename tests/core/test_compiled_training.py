"""Compiled models in training: what was compiled before, loops, freezing, checkpoints, regions that run twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import discreet
from blocks import B, D, Fn, frozen, loss
from cases import CASES
from core.compiling import MARKS, RULE, Deliveries, Wrapped, agrees
from discreet.core.book import Book
from discreet.core.gradient import backward, settle, trainable
from discreet.core.meeting import guard

pytestmark = MARKS


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
