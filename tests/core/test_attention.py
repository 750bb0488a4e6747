"""Multi-head attention: torch's function, brute force's per-example gradients, misuse refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from blocks import frozen, loss, par
from core.attended import A, E, S, T, shaken_model, verified
from core.brute_force import B, gap, random_batch
from discreet.core.axes import Axis
from discreet.core.book import Book
from discreet.core.clipping import Clipping
from discreet.core.gradient import clipped_gradient, trainable
from discreet.core.meeting import guard
from discreet.core.rules.attention import packed_linear
from discreet.errors import UnsupportedUse
from discreet.train.check import check
from oracles import rows

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors:UserWarning"  # said by torch's own fast path, in an unguarded evaluation
)


def _refused(model, batch, *words: str) -> None:
    with pytest.raises(UnsupportedUse) as caught:
        clipped_gradient(model, loss, batch, clipping=Clipping.abadi(1.0))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert all(type(p) is nn.Parameter for p in model.parameters())


# ------------------------------------------------------------------------------------------------------- the function


def _padding(kind: torch.dtype | None, size: int) -> torch.Tensor | None:
    closed = torch.arange(S) >= S - torch.arange(size).remainder(S).unsqueeze(1)
    if kind is None or kind is torch.bool:
        return closed if kind else None
    return closed.to(kind).masked_fill(closed, -torch.inf) + 0.3 * (~closed)


def _attn_mask(kind: str | None, dtype: torch.dtype, size: int, heads: int) -> torch.Tensor | None:
    torch.manual_seed(8)
    causal = torch.ones(T, S, dtype=torch.bool).tril().logical_not()
    if kind == "2-D":
        return causal if dtype is torch.bool else torch.randn(T, S, dtype=dtype)
    if kind == "3-D":
        each = torch.randn(size * heads, T, S, dtype=torch.float64)
        return each > 1 if dtype is torch.bool else each.to(dtype)
    return None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "extra", [{}, {"add_bias_kv": True}, {"add_zero_attn": True, "add_bias_kv": True, "bias": False}]
)
@pytest.mark.parametrize("weights", ["none", "mean", "each"])
@pytest.mark.parametrize("masks", ["none", "padding", "2-D", "3-D", "padding and 3-D", "boolean"])
def test_the_function_is_torchs_and_so_are_its_dropout_masks(masks, weights, extra, dropout):
    model = shaken_model(lambda s, x: None, a=nn.MultiheadAttention(E, A, dropout=dropout, **extra)).train()
    query, key = (torch.randn(n, B, E, dtype=torch.float64, requires_grad=True) for n in (T, S))
    kind = torch.bool if masks == "boolean" else torch.float64
    named = {
        "key_padding_mask": _padding(kind if "padding" in masks or masks == "boolean" else None, B),
        "attn_mask": _attn_mask("3-D" if masks in ("padding and 3-D", "boolean") else masks, kind, B, A),
        "need_weights": weights != "none",
        "average_attn_weights": weights == "mean",
    }

    def run():
        torch.manual_seed(1)
        return model.a(query, key, key.flip(0), **named)

    wanted, wanted_weights = run()
    with guard(Book(trainable(model), examples=B)):
        found, found_weights = run()
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12, equal_nan=True)
    assert found.stride() == wanted.stride()
    assert (found_weights is None) == (wanted_weights is None)
    if found_weights is not None:
        assert torch.allclose(found_weights, wanted_weights, rtol=0, atol=1e-12, equal_nan=True)
    ours = torch.autograd.grad(found.nan_to_num().cos().sum(), (query, key))
    theirs = torch.autograd.grad(wanted.nan_to_num().cos().sum(), (query, key))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_causal_hint_means_what_it_means_in_torch(need_weights, padded):
    model = shaken_model(lambda s, x: None, a=nn.MultiheadAttention(E, A, batch_first=True))
    x = torch.randn(B, S, E, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
    named = {
        "attn_mask": mask + (0 if need_weights or padded else 7.0),  # ignored in favour of the hint in one case
        "is_causal": True,
        "need_weights": need_weights,
        "key_padding_mask": (torch.arange(S) >= 3).expand(B, -1).double() if padded else None,
    }
    wanted = model.a(x, x, x, **named)[0]
    with guard(Book(trainable(model), examples=B)):
        assert torch.allclose(model.a(x, x, x, **named)[0], wanted, rtol=0, atol=1e-12)
        with pytest.raises((ValueError, RuntimeError), match="attn_mask"):
            model.a(x, x, x, is_causal=True)


def test_packed_linear_is_three_linear_maps():
    x, w, b = (torch.randn(size, dtype=torch.float64) for size in ((B, 3, T, 4), (15, 4), (15,)))
    wanted = torch.stack([F.linear(x[:, k], w[5 * k : 5 * k + 5], b[5 * k : 5 * k + 5]) for k in range(3)], 1)
    assert torch.allclose(packed_linear(x, w, b), wanted, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------- per-example gradients


def _same(s, x):
    return s.a(x, x, x, need_weights=False)[0]


def _weights_too(s, x):
    out, weights = s.a(x, x, x)
    return torch.cat([out.flatten(1), weights.flatten(1)], 1)


def _memory(s, x):
    return s.a(x, x[:, :S], x[:, :S])[0]


def _three(s, x):
    return s.a(x[:, :S], x, x.tanh())[0]


def _time_major(s, x):
    return s.a(x.transpose(0, 1), x[:, :S].transpose(0, 1), x[:, :S].cos().transpose(0, 1))[0].transpose(0, 1)


def _other_widths(s, x):
    return s.a(x, x[:, :S, :5], x[:, 1 : S + 1, :3])[0]


def _masked_by_parameter(s, x):
    return s.a(x, x, x, attn_mask=s.m, need_weights=s.weights)[0]


def _with_mask(weights: bool):
    def build():
        parts = {"a": nn.MultiheadAttention(E, A, batch_first=True), "m": par(T, T)}
        return {**parts, "weights": weights}

    return build


def _attention(**options):
    return lambda: {"a": nn.MultiheadAttention(E, A, **{"batch_first": True, **options})}


CASES = {
    "self": (_same, _attention()),
    "self, weights used": (_weights_too, _attention()),
    "self, no bias": (_same, _attention(bias=False)),
    "another memory": (_memory, _attention()),
    "another memory, no bias": (_memory, _attention(bias=False)),
    "three sequences": (_three, _attention()),
    "time major": (_time_major, _attention(batch_first=False)),
    "other widths": (_other_widths, _attention(kdim=5, vdim=3)),
    "other widths, no bias": (_other_widths, _attention(kdim=5, vdim=3, bias=False)),
    "learned key and value": (_memory, _attention(add_bias_kv=True, add_zero_attn=True)),
    "called twice": (lambda s, x: _same(s, _memory(s, x)), _attention()),
    "trained mask": (_masked_by_parameter, _with_mask(False)),
    "trained mask, weights": (_masked_by_parameter, _with_mask(True)),
    "in a linear map as well": (lambda s, x: F.linear(_memory(s, x), s.a.in_proj_weight), _attention()),
    "checkpointed": (
        lambda s, x: s.o(checkpoint(lambda h: s.a(h, h[:, :S], h[:, :S])[0], s.i(x), use_reentrant=False)),
        lambda: {"a": nn.MultiheadAttention(E, A, batch_first=True), "i": nn.Linear(E, E), "o": nn.Linear(E, 2)},
    ),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", list(CASES))
def test_clipped_sum_equals_brute_force(name, dtype, tolerance):
    forward, parts = CASES[name]
    assert gap(shaken_model(forward, dtype, **parts()), random_batch(T, E, dtype=dtype)) < tolerance


@pytest.mark.parametrize("name", list(CASES))
def test_the_self_check_passes(name):
    forward, parts = CASES[name]
    model, batch = shaken_model(forward, **parts()), random_batch(T, E)
    assert gap(model, batch, layout=verified(model, rows(batch, [0, 1, 2, 3], B))) < 1e-9


@pytest.mark.parametrize("name", ["self", "another memory", "time major"])
@pytest.mark.parametrize("length", [B - 1, B, B + 1, 2 * B])
def test_no_length_is_taken_for_the_batch(name, length):
    forward, parts = CASES[name]
    assert gap(shaken_model(forward, **parts()), random_batch(length, E)) < 1e-9


@pytest.mark.parametrize("name", list(CASES))
def test_one_example(name):
    forward, parts = CASES[name]
    assert gap(shaken_model(forward, **parts()), rows(random_batch(T, E), [1], B), size=1) < 1e-9


FROZEN = {
    "in_proj weight": ("a.in_proj_weight",),
    "in_proj bias": ("a.in_proj_bias",),
    "all weights (BiTFiT)": ("a.in_proj_weight", "a.out_proj.weight"),
    "projections": ("a.in_proj_weight", "a.in_proj_bias"),
    "output": ("a.out_proj.weight", "a.out_proj.bias"),
    "learned key": ("a.bias_k",),
}


@pytest.mark.parametrize("frozen_part", list(FROZEN))
@pytest.mark.parametrize("forward", [_same, _memory])
def test_partly_frozen(forward, frozen_part):
    parts = _attention(add_bias_kv=True)()
    assert gap(frozen(shaken_model(forward, **parts), *FROZEN[frozen_part]), random_batch(T, E)) < 1e-9


def test_weights_of_other_widths_partly_frozen():
    for names in (("a.q_proj_weight",), ("a.k_proj_weight", "a.v_proj_weight"), ("a.in_proj_bias", "a.k_proj_weight")):
        model = shaken_model(_other_widths, **_attention(kdim=5, vdim=3)())
        assert gap(frozen(model, *names), random_batch(T, E)) < 1e-9


# --------------------------------------------------------------------------------------------- the batch in dimension 1


class _TimeMajor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.n = nn.Embedding(11, E), nn.LayerNorm(E)
        self.r, self.l = nn.RMSNorm(E), nn.Linear(E, 3)

    def forward(self, x):
        return self.l(self.r(self.n(self.e(x.t())).tanh())).transpose(0, 1)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 12, 20])
def test_time_major_layers_are_exact_once_they_are_verified(length):
    torch.manual_seed(2)
    model = _TimeMajor().double()
    batch = {"x": torch.randint(0, 11, (B, length)), "target": torch.randn(B, dtype=torch.float64)}
    layout = verified(model, rows(batch, [0, 1, 2, 3], B))
    assert gap(model, batch, layout=layout) < 1e-9
    assert any(Axis.SECOND in axes for axes in layout.axes.values())


def test_a_reshape_that_scrambles_the_examples_fails_the_check():
    """(B, T) read as (T, B) has the right lengths at every batch size, and other examples' positions in its columns."""

    def scrambled(s, x):
        h = s.a(x)
        return s.l(h.reshape(x.shape[1], x.shape[0], E)).reshape(x.shape[0], x.shape[1], 2)

    model, batch = shaken_model(scrambled, a=nn.Linear(E, E), l=nn.Linear(E, 2)), random_batch(T, E)
    _refused(model, batch, "l.weight")
    report = check(model, loss, batch)
    assert not report.passed
    assert "l.weight" in {row.name for row in report.rows if row.status.value == "failed"}


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_attention_refuses():
    _refused(
        shaken_model(lambda s, x: s.a(x[:, 0], x[:, 0], x[:, 0])[0], **_attention()()),
        random_batch(T, E),
        "no batch axis",
    )
    model = shaken_model(lambda s, x: s.a(s.q, x, x)[0], q=par(T, 1, E), **_attention()())
    _refused(model, random_batch(T, E), "expand")

    def static(s, x):
        q, a = x.transpose(0, 1), s.a
        kept = torch.zeros(x.shape[0] * A, T, E // A, dtype=x.dtype)
        given = (E, A, a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0, a.out_proj.weight, a.out_proj.bias)
        return F.multi_head_attention_forward(q, q, q, *given, static_k=kept)[0].transpose(0, 1)

    _refused(shaken_model(static, **_attention()()), random_batch(T, E), "static_k")


def test_swapped_axes_fail_the_check():
    model = shaken_model(lambda s, x: s.a(x, x, x)[0], torch.float32, **_attention(batch_first=False)())
    for length in (B, T, 2 * B):
        assert not check(model, loss, random_batch(length, E, dtype=torch.float32)).passed
