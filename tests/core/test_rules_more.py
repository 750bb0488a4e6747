"""Transposed convolutions, bags, einsum, and other rules of one function each, against one example at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import B as B
from blocks import Case, D, Fn, Seq, T, V, features, frozen, loss, par, tokens
from discreet.core.clipping import ROUNDING_MARGIN, Clipping
from discreet.core.gradient import clipped_gradient
from discreet.errors import UnsupportedUse
from discreet.train.check import check
from oracles import abadi, alone, norms, relative_gap, weighted

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap loops, and says so


def _transposed(axes: int, **options: Any) -> Case:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    return Case(lambda: Seq(kind(4, 6, 3, **options), nn.Tanh()), features(4, *((5, 4, 3)[:axes])))


def _bag(**options: Any) -> Case:
    return Case(lambda: Seq(nn.EmbeddingBag(V, D, **options), nn.Tanh()), tokens())


def _weighted_bag(self: Any, x: Tensor) -> Tensor:
    return self.bag(x, per_sample_weights=self.gate(x.unsqueeze(-1).to(self.gate.weight.dtype) / V).squeeze(-1))


def _cut_bag(self: Any, x: Tensor) -> Tensor:
    kept = x > 3  # bags of different lengths, some of them perhaps empty
    lengths = kept.sum(1)
    return self.bag(x[kept], lengths.cumsum(0) - lengths).tanh()


def _einsum(equation: str, weight: tuple[int, ...], *shape: int) -> Case:
    return Case(lambda: Fn(lambda s, x: torch.einsum(equation, x, s.w).tanh(), w=par(*weight)), features(*shape))


def _heads(self: Any, x: Tensor) -> Tensor:
    q, k = (torch.einsum("...td,dhk->...htk", x, w) for w in (self.q, self.k))
    mixed = (q @ k.mT).softmax(-1) @ torch.einsum("...td,dhk->...htk", x, self.v)
    return torch.einsum("bhtk,hkd->btd", mixed, self.o)


def _dense_experts(self: Any, x: Tensor) -> Tensor:
    gate = self.router(x).softmax(-1)
    hidden = F.silu(x.unsqueeze(1) @ self.up)
    return torch.einsum("betd,bte->btd", hidden @ self.down, gate)


def _standardised(self: Any, x: Tensor) -> Tensor:
    """NFNet's convolution: the weight is standardised by batch_norm, over parameters alone."""
    flat = self.w.reshape(1, len(self.w), -1)
    weight = F.batch_norm(flat, None, None, weight=(self.gain * 0.5).view(-1), training=True, momentum=0.0)
    return F.conv1d(x, weight.reshape_as(self.w))


def _dora(self: Any, x: Tensor) -> Tensor:
    """DoRA: a magnitude for each output of a frozen weight plus a low-rank one, through an identity."""
    update = self.b(self.a(torch.eye(D, dtype=x.dtype))).T
    norm = torch.linalg.norm(self.base.weight + 0.5 * update, dim=1).detach()
    scale = (self.magnitude / norm).view(1, -1)
    return (scale - 1) * self.base(x) + scale * 0.5 * self.b(self.a(x)) + self.base(x)


def _parametrised(wrap: Any, **options: Any) -> Case:
    """In evaluation mode: a training forward of spectral_norm moves its vectors."""
    return Case(lambda: Seq(wrap(nn.Linear(D, D), **options), nn.Tanh()).eval(), features(T, D))


_BASE = ("base.weight", "base.bias")
MORE = {
    "spectral norm": _parametrised(nn.utils.parametrizations.spectral_norm),
    "orthogonal, by exponential": _parametrised(nn.utils.parametrizations.orthogonal, orthogonal_map="matrix_exp"),
    "orthogonal, by solving": _parametrised(nn.utils.parametrizations.orthogonal, orthogonal_map="cayley"),
    "standardised convolution": Case(lambda: Fn(_standardised, w=par(4, 3, 3), gain=par(4, 1, 1)), features(3, 8)),
    "DoRA": Case(
        lambda: frozen(
            Fn(
                _dora,
                base=nn.Linear(D, 4),
                a=nn.Linear(D, 2, bias=False),
                b=nn.Linear(2, 4, bias=False),
                magnitude=par(4),
            ),
            *_BASE,
        ),
        features(T, D),
    ),
    "conv_transpose1d": _transposed(1),
    "conv_transpose1d, stride and padding": _transposed(1, stride=2, padding=1),
    "conv_transpose1d, output padding": _transposed(1, stride=3, padding=1, output_padding=2),
    "conv_transpose1d, dilation": _transposed(1, dilation=2, padding=2),
    "conv_transpose1d, output padding below dilation": _transposed(1, dilation=3, output_padding=2),
    "conv_transpose1d, groups": _transposed(1, groups=2, stride=2),
    "conv_transpose1d, no bias": _transposed(1, bias=False),
    "conv_transpose2d": _transposed(2),
    "conv_transpose2d, everything": _transposed(
        2, stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=2, dilation=(2, 1)
    ),
    "conv_transpose3d": _transposed(3, stride=2, groups=2),
    "conv_transpose2d, depthwise": Case(lambda: Seq(nn.ConvTranspose2d(4, 4, 3, groups=4)), features(4, 4, 4)),
    "conv_transpose1d, frozen weight": Case(
        lambda: frozen(Seq(nn.Linear(5, 5), nn.ConvTranspose1d(4, 3, 3)), "1.weight"), features(4, 5)
    ),
    "conv_transpose1d, frozen bias": Case(
        lambda: frozen(Seq(nn.Linear(5, 5), nn.ConvTranspose1d(4, 3, 3)), "1.bias"), features(4, 5)
    ),
    "conv and its transpose, tied": Case(
        lambda: Fn(lambda s, x: F.conv_transpose1d(F.conv1d(x, s.w).tanh(), s.w), w=par(3, 4, 3)), features(4, 7)
    ),
    "conv_transpose1d on folded frames": Case(
        lambda: Fn(
            lambda s, x: s.c(s.a(x).view(-1, 4, 5)).view(x.shape[0], -1),
            a=nn.Linear(5, 5),
            c=nn.ConvTranspose1d(4, 3, 3),
        ),
        features(3, 4, 5),
        folded=True,
    ),
    "bag, mean": _bag(),
    "bag, sum": _bag(mode="sum"),
    "bag, padding": _bag(mode="mean", padding_idx=3),
    "bag, padding from the end, sum": _bag(mode="sum", padding_idx=-1),
    "bag, nothing but padding": Case(
        lambda: Fn(
            lambda s, x: s.bag(x * 0 + 3) + s.l(s.bag(x)), bag=nn.EmbeddingBag(V, D, padding_idx=3), l=nn.Linear(D, D)
        ),
        tokens(),
    ),
    "bag, weights with gradient": Case(
        lambda: Fn(_weighted_bag, bag=nn.EmbeddingBag(V, D, mode="sum"), gate=nn.Linear(1, 1)), tokens()
    ),
    "bag, weights from a parameter": Case(
        lambda: Fn(
            lambda s, x: s.b(x, per_sample_weights=s.w.expand(len(x), -1)),
            b=nn.EmbeddingBag(V, D, mode="sum"),
            w=par(1, T),
        ),
        tokens(),
    ),
    "bag, offsets": Case(lambda: Fn(_cut_bag, bag=nn.EmbeddingBag(V, D)), tokens()),
    "bag, offsets, sum and padding": Case(
        lambda: Fn(_cut_bag, bag=nn.EmbeddingBag(V, D, mode="sum", padding_idx=5)), tokens()
    ),
    "bag tied to a head": Case(
        lambda: Fn(lambda s, x: s.bag(x) @ s.bag.weight.t(), bag=nn.EmbeddingBag(V, D)), tokens()
    ),
    "prelu, one slope": Case(lambda: Seq(nn.Linear(D, D), nn.PReLU()), features(T, D)),
    "prelu, one slope per channel": Case(lambda: Seq(nn.Conv1d(3, 4, 3), nn.PReLU(4)), features(3, 8)),
    "prelu, two axes": Case(lambda: Seq(nn.Linear(D, 4), nn.PReLU(4)), features(D)),
    "prelu, one axis": Case(
        lambda: Fn(lambda s, x: s.p(s.l(x).squeeze(1)).unsqueeze(1), l=nn.Linear(D, 1), p=nn.PReLU()), features(D)
    ),
    "prelu, folded": Case(
        lambda: Fn(lambda s, x: s.p(s.l(x).view(-1, 4, 2)).view(x.shape[0], -1), l=nn.Linear(D, D), p=nn.PReLU(4)),
        features(4, D),
        folded=True,
    ),
    "bilinear": Case(lambda: Fn(lambda s, x: s.l(x, x.flip(1)), l=nn.Bilinear(D, D, 3)), features(D)),
    "bilinear over positions": Case(
        lambda: Fn(lambda s, x: s.l(s.a(x)[..., :2], x), l=nn.Bilinear(2, D, 3), a=nn.Linear(D, D)), features(T, D)
    ),
    "bilinear, frozen weight": Case(
        lambda: frozen(Fn(lambda s, x: s.l(s.a(x), x), l=nn.Bilinear(D, D, 3), a=nn.Linear(D, D)), "l.weight"),
        features(T, D),
    ),
    "einsum, linear": _einsum("btd,dk->btk", (D, 3), T, D),
    "einsum, implicit output": _einsum("btd,dk", (D, 3), T, D),
    "einsum, weight stored out first": _einsum("btd,kd->btk", (3, D), T, D),
    "einsum, ellipsis": _einsum("...d,dk->...k", (D, 3), T, D),
    "einsum, implicit ellipsis": _einsum("...d,dk", (D, 3), T, D),
    "einsum, heads": _einsum("btd,dhk->bhtk", (D, 2, 3), T, D),
    "einsum, heads joined": _einsum("bhtk,hkd->btd", (2, 3, D), 2, T, 3),
    "einsum, groups": _einsum("begi,eio->bego", (3, D, 2), 3, T, D),
    "einsum, groups, out first": _einsum("begi,eoi->bego", (3, 2, D), 3, T, D),
    "einsum, groups last": _einsum("bgie,ioe->bgoe", (D, 2, 3), T, D, 3),
    "einsum, every expert on every token": _einsum("bti,eio->beto", (3, D, 2), T, D),
    "einsum, diagonal map": _einsum("btd,d->btd", (D,), T, D),
    "einsum, batch last in the output": Case(
        lambda: Fn(lambda s, x: torch.einsum("btd,dk->tkb", x, s.w).permute(2, 0, 1), w=par(D, 3)), features(T, D)
    ),
    "einsum, weight first": Case(
        lambda: Fn(lambda s, x: torch.einsum("kt,btd->bkd", s.w, x).tanh(), w=par(3, T)), features(T, D)
    ),
    "einsum, list of operands": Case(
        lambda: Fn(lambda s, x: torch.einsum("btd,dk->btk", [x, s.w]), w=par(D, 3)), features(T, D)
    ),
    "einsum attention, ellipsis, shared over heads": Case(
        lambda: Fn(_heads, q=par(D, 2, 3), k=par(D, 2, 3), v=par(D, 2, 3), o=par(2, 3, D)), features(T, D)
    ),
    "einsum, one weight used in two ways": Case(
        lambda: Fn(
            lambda s, x: torch.einsum("beo,eio->bei", torch.einsum("bei,eio->beo", x, s.w).tanh(), s.w), w=par(3, D, D)
        ),
        features(3, D),
    ),
    "matmul, stack of matrices": Case(
        lambda: Fn(_dense_experts, up=par(3, D, 4), down=par(3, 4, D), router=nn.Linear(D, 3)),
        features(T, D),
    ),
    "matmul, parameter on the left": Case(lambda: Fn(lambda s, x: s.w @ x.tanh(), w=par(3, T)), features(T, D)),
    "matmul, stack on the left": Case(
        lambda: Fn(lambda s, x: torch.matmul(s.w, x.unsqueeze(1)), w=par(2, 3, T)), features(T, D)
    ),
    "matmul, vector": Case(lambda: Fn(lambda s, x: x @ s.w, w=par(D)), features(T, D)),
    "matrix-vector": Case(
        lambda: Fn(lambda s, x: torch.mv(s.l(x), s.w).unsqueeze(1), w=par(D), l=nn.Linear(D, D)), features(D)
    ),
    "instance norm": Case(
        lambda: Seq(nn.Conv1d(3, 4, 2, bias=False), nn.InstanceNorm1d(4, affine=True)), features(3, 6)
    ),
    "instance norm, 2-D": Case(
        lambda: Seq(nn.Conv2d(3, 4, 2, bias=False), nn.InstanceNorm2d(4, affine=True)), features(3, 5, 4)
    ),
    "instance norm, fixed statistics": Case(
        lambda: Seq(nn.Conv1d(3, 4, 2), nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval()),
        features(3, 6),
    ),
    "instance norm, folded": Case(
        lambda: Fn(
            lambda s, x: s.n(s.a(x).view(-1, 4, 5)).view(x.shape[0], -1),
            a=nn.Linear(5, 5),
            n=nn.InstanceNorm1d(4, affine=True),
        ),
        features(3, 4, 5),
        folded=True,
    ),
    "comparisons decide": Case(
        lambda: Fn(
            lambda s, x: s.l(x) * (x[..., :3] > s.w) * (1 if bool((s.w == s.w).all()) else 0) + s.w.isnan().sum(),
            w=par(3),
            l=nn.Linear(D, 3),
        ),
        features(T, D),
    ),
    "pick from a stack of tables": Case(lambda: Fn(lambda s, x: s.w[x].tanh(), w=par(V, 2, 3)), tokens()),
    "pick from a vector": Case(lambda: Fn(lambda s, x: s.w[x].tanh(), w=par(V)), tokens()),
    "pick transitions": Case(lambda: Fn(lambda s, x: s.w[x[:, :-1], x[:, 1:]].tanh(), w=par(V, V)), tokens()),
    "pick transitions at one place": Case(lambda: Fn(lambda s, x: s.w[x[:, 0], x[:, 1] - V], w=par(V, V, 2)), tokens()),
    "pick by three": Case(
        lambda: Fn(
            lambda s, x: s.w[x[:, 0], x[:, 1], x[:, 2] // 2].unsqueeze(1) + s.w[x[:, 3], x[:, 1]], w=par(V, V, 6)
        ),
        tokens(),
    ),
    "a token stacked for each example": Case(
        lambda: Fn(lambda s, x: s.l(torch.cat([torch.stack([s.w] * len(x)), x], 1)), w=par(2, D), l=nn.Linear(D, 3)),
        features(T, D),
    ),
    "a token for each frame": Case(
        lambda: Fn(
            lambda s, x: s.l(
                torch.cat([s.w.expand(x.shape[0] * x.shape[1], -1, -1), s.a(x.flatten(0, 1))], 1).tanh()
            ).view(x.shape[0], -1),
            w=par(1, 1, D),
            a=nn.Linear(D, D),
            l=nn.Linear(D, 2),
        ),
        features(3, 2, D),
        folded=True,
    ),
    "a sign and a straight-through estimator": Case(
        lambda: Fn(lambda s, x: F.linear(x, s.w + (s.w.sign() * s.w.abs().mean() - s.w).detach()), w=par(3, D)),
        features(T, D),
    ),
    "rounded at a learnt scale": Case(
        lambda: Fn(lambda s, x: F.linear(x, ((s.w / s.a).round() - s.w).detach() * s.a + s.w), w=par(3, D), a=par(1)),
        features(T, D),
    ),
    "noise of the shape of a weight": Case(
        lambda: Fn(lambda s, x: F.linear(x, s.w + s.a * torch.rand_like(s.w).gt(2)), w=par(3, D), a=par(3, D)),
        features(T, D),
    ),
}
EVERY = pytest.mark.parametrize("name", list(MORE))


@EVERY
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_clipped_sum_equals_brute_force(name, dtype, tolerance):
    case = MORE[name]
    model, batch = case.build(dtype)
    exact_model, exact_batch = case.build(torch.float64)
    gradients = alone(exact_model, loss, exact_batch, size=B)
    norm_B = norms(gradients)
    layout = check(model, loss, batch).layout if case.folded else None
    bound = 0.8 * float(norm_B.median())
    found = clipped_gradient(model, loss, batch, clipping=Clipping.abadi(bound), layout=layout)
    factor_B = abadi(norm_B, bound)
    shrunk = torch.where(factor_B == 1, factor_B, factor_B * ROUNDING_MARGIN)
    assert relative_gap(found.tensors, weighted(gradients, shrunk)) < tolerance


@EVERY
def test_the_self_check_passes(name):
    model, batch = MORE[name].build(torch.float32)
    report = check(model, loss, batch)
    assert report.passed, report.table()


REFUSED = {
    "the largest of a bag": (lambda: Fn(lambda s, x: s.b(x), b=nn.EmbeddingBag(V, D, mode="max")), tokens(), "mode"),
    "a bag that counts": (
        lambda: Fn(lambda s, x: s.b(x), b=nn.EmbeddingBag(V, D, scale_grad_by_freq=True)),
        tokens(),
        "scale_grad_by_freq",
    ),
    "a bag that renormalises": (
        lambda: Fn(lambda s, x: s.b(x), b=nn.EmbeddingBag(V, D, max_norm=1.0)),
        tokens(),
        "max_norm",
    ),
    "a sparse bag": (lambda: Fn(lambda s, x: s.b(x), b=nn.EmbeddingBag(V, D, sparse=True)), tokens(), "sparse"),
    "bags in other numbers than examples": (
        lambda: Fn(
            lambda s, x: s.b(x.flatten(), torch.arange(2 * len(x)) * (x.numel() // 2 // len(x))).view(len(x), -1),
            b=nn.EmbeddingBag(V, D),
        ),
        tokens(6),
        "bag",
    ),
    "a parameter as weights of a bag": (
        lambda: Fn(
            lambda s, x: s.b(x, per_sample_weights=s.w),
            b=nn.EmbeddingBag(V, D, mode="sum"),
            w=par(B, T),
        ),
        tokens(),
        "per_sample_weights",
    ),
    "statistics that learn": (
        lambda: Fn(lambda s, x: s.n(x), n=nn.InstanceNorm1d(3, affine=True, track_running_stats=True)),
        features(3, 5),
        "running statistics",
    ),
    "experts in place of the batch": (
        lambda: Fn(lambda s, x: torch.bmm(x.tanh(), s.w), w=par(B, D, 3)),
        features(T, D),
        "axis 0",
    ),
    "the batch in the weight": (
        lambda: Fn(lambda s, x: torch.einsum("btd,bdk->btk", x, s.w), w=par(B, D, 3)),
        features(T, D),
        "the batch",
    ),
    "the batch summed away": (
        lambda: Fn(lambda s, x: torch.einsum("btd,dk->tk", x, s.w).expand(len(x), -1, -1), w=par(D, 3)),
        features(T, D),
        "the batch",
    ),
    "an index of the weight alone": (
        lambda: Fn(lambda s, x: torch.einsum("btd,dk->bt", x, s.w), w=par(D, 3)),
        features(T, D),
        "one operand alone",
    ),
    "a diagonal": (
        lambda: Fn(lambda s, x: torch.einsum("btd,dd->btd", x, s.w), w=par(D, D)),
        features(T, D),
        "repeated",
    ),
    "three operands": (
        lambda: Fn(lambda s, x: torch.einsum("btd,dk,kl->btl", x, s.w, s.v), w=par(D, 3), v=par(3, 2)),
        features(T, D),
        "two operands",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_exact_is_refused_by_name(name):
    build, batch, word = REFUSED[name]
    torch.manual_seed(5)
    with pytest.raises(UnsupportedUse, match=word):
        clipped_gradient(build(), loss, batch(), clipping=Clipping.automatic())
