"""Random small graphs with random ties, reuse and frozen parts, against one-example-at-a-time autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from discreet.core.clipping import ROUNDING_MARGIN, Clipping
from discreet.core.gradient import clipped_gradient
from oracles import abadi, alone, norms, relative_gap, rows, weighted

B, T, D, V = 3, 4, 4, 5

STEPS = (
    *("linear", "linear of w.t()", "matmul", "head of the embedding", "conv", "depthwise", "layer norm", "rms norm"),
    *("scale", "one plus", "shift", "product of two", "position", "token", "lookup again", "gate", "residual", "slice"),
)


@dataclass(frozen=True)
class Op:
    """One step: what it does, and which of the shared parameters it uses."""

    kind: str
    slot: int
    curved: bool


class Graph(nn.Module):
    """A chain of steps over a pool of parameters that any number of steps may share."""

    def __init__(self, ops: list[Op], frozen: set[str], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.ops = ops
        self.table = nn.Parameter(torch.randn(V, D))
        self.square = nn.ParameterList([nn.Parameter(torch.randn(D, D) / 2) for _ in range(2)])
        self.vector = nn.ParameterList([nn.Parameter(torch.randn(D) / 2) for _ in range(2)])
        self.kernel = nn.ParameterList([nn.Parameter(torch.randn(D, D, 3) / 3) for _ in range(2)])
        self.slow = nn.ParameterList([nn.Parameter(torch.randn(D, 1, 3) / 3) for _ in range(2)])
        self.places = nn.Parameter(torch.randn(1, T + 3, D))
        for name, p in self.named_parameters():
            p.requires_grad_(name not in frozen)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = F.embedding(x, self.table)
        for op in self.ops:
            h = self.step(op, h, x)
            h = h.tanh() if op.curved else h
        return h

    def step(self, op: Op, h: Tensor, x: Tensor) -> Tensor:
        square, vector = self.square[op.slot], self.vector[op.slot]
        kernel, other = self.kernel[op.slot], self.vector[1 - op.slot]
        results = {
            "linear": lambda: F.linear(h, square, vector),
            "linear of w.t()": lambda: F.linear(h, square.t()),
            "matmul": lambda: h @ square + vector,
            "head of the embedding": lambda: F.linear(h, self.table)[..., :D],
            "conv": lambda: F.conv1d(h.transpose(1, 2), kernel, other, padding=1).transpose(1, 2),
            "depthwise": lambda: F.conv1d(h.transpose(1, 2), self.slow[op.slot], padding="same", groups=D).transpose(
                1, 2
            ),
            "layer norm": lambda: F.layer_norm(h, (D,), vector, other),
            "rms norm": lambda: F.rms_norm(h, (D,), vector),
            "scale": lambda: vector * h,
            "one plus": lambda: h * (1 + vector),
            "shift": lambda: h - vector,
            "product of two": lambda: h * (vector * other).unsqueeze(0),
            "position": lambda: h + self.places[:, : h.shape[1]],
            "token": lambda: torch.cat([vector.expand(h.shape[0], 1, -1), h[:, 1:]], 1),
            "lookup again": lambda: h + F.embedding(x.flip(1), self.table),
            "gate": lambda: h * torch.sigmoid(F.linear(h, square)),
            "residual": lambda: h + other.mean() * F.linear(h, square[:, :2] @ square[:2]),
            "slice": lambda: torch.cat([F.linear(h, square[: D // 2]), F.linear(h, square[D // 2 :])], -1),
        }
        return results[op.kind]()


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum((1, 2))


NAMES = ["table", "places", *(f"{pool}.{i}" for pool in ("square", "vector", "kernel", "slow") for i in range(2))]
OPS = st.builds(Op, kind=st.sampled_from(STEPS), slot=st.integers(0, 1), curved=st.booleans())


@given(
    ops=st.lists(OPS, min_size=1, max_size=5),
    frozen=st.sets(st.sampled_from(NAMES), max_size=6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, derandomize=True, deadline=None, database=None)
def test_any_graph_of_known_uses_is_exact(ops, frozen, seed):
    model = Graph(ops, frozen, seed)
    x = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))
    assume(_loss(model, x).requires_grad)
    assume(bool(torch.isfinite(_loss(model, x)).all()))
    gradients = alone(model, _loss, x, size=B)
    norm_B = norms(gradients)
    assume(float(norm_B.min()) > 1e-6)
    bound = 0.7 * float(norm_B.median())
    clipping = Clipping.abadi(bound)
    found = clipped_gradient(model, _loss, x, clipping=clipping)
    factor_B = abadi(norm_B, bound)
    factor_B = torch.where(factor_B == 1, factor_B, factor_B * ROUNDING_MARGIN)
    assert relative_gap(found.tensors, weighted(gradients, factor_B)) < 1e-9
    exact = clipped_gradient(model, _loss, x, clipping=Clipping.none())
    assert relative_gap(exact.tensors, weighted(gradients, torch.ones(B))) < 1e-10
    split = clipped_gradient(model, _loss, rows(x, [2], B), clipping=clipping) + clipped_gradient(
        model, _loss, rows(x, [0, 1], B), clipping=clipping
    )
    assert relative_gap(split.tensors, found.tensors) < 1e-10
