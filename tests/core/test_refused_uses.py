"""Uses of a parameter that no rule covers are refused by name: custom functions, scripts, overloads, options."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from blocks import B, D, Fn, T, loss, par, tokens
from core.unseen import CLIP, built, drawn, expect_exact, expect_refused
from discreet.core.gradient import clipped_gradient
from discreet.errors import ConfigError


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum((0, 1))


def test_custom_autograd_function_on_a_parameter_is_refused():
    expect_refused(
        built(lambda s, x: s.l(_Scale.apply(x, s.w)), w=par(D), l=nn.Linear(D, 2)), drawn(T, D), "w", "past every rule"
    )


def test_custom_autograd_function_on_a_derived_value_is_refused():
    model = built(lambda s, x: s.l(_Scale.apply(x, s.w * 2)), w=par(D), l=nn.Linear(D, 2))
    expect_refused(model, drawn(T, D), "w", "past every rule")


def test_scripted_part_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(D, 3).double())
    expect_refused(built(lambda s, x: s.inner(x), inner=scripted), drawn(D))


@torch.library.custom_op("discreet_tests::scale", mutates_args=())
def _scale_op(x: Tensor, w: Tensor) -> Tensor:
    return x * w


_scale_op.register_autograd(
    lambda ctx, grad: (grad * ctx.saved_tensors[1], (grad * ctx.saved_tensors[0]).sum((0, 1))),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_custom_op_is_refused():
    expect_refused(built(lambda s, x: _scale_op(x, s.w), w=par(D)), drawn(T, D))


def test_aten_overload_is_refused():
    expect_refused(built(lambda s, x: torch.ops.aten.linear(x, s.w), w=par(3, D)), drawn(T, D), "linear", "w")


UNRULED = {
    "distances": (lambda: built(lambda s, x: torch.cdist(x, s.w), w=par(3, D)), "cdist"),
    "packed sequence": (lambda: built(_packed, r=nn.LSTM(D, 3, batch_first=True)), "packed"),
    "batch norm": (lambda: built(lambda s, x: s.n(x), n=nn.BatchNorm1d(T)), "batch_norm"),
    "batch norm, functional": (
        lambda: built(lambda s, x: F.batch_norm(x, None, None, s.w, training=True), w=par(T)),
        "batch_norm",
    ),
    "setitem": (lambda: built(lambda s, x: _written(x, s.w), w=par(D)), "__setitem__"),
    "copy into": (lambda: built(lambda s, x: x + torch.zeros(D).double().copy_(s.w), w=par(D)), "copy_"),
    "cat with activations": (
        lambda: built(lambda s, x: torch.cat([s.w, s.l(x)])[2:], w=par(2, T, D), l=nn.Linear(D, D)),
        "cat",
    ),
    "bits of another type": (
        lambda: built(lambda s, x: x * s.w.view(torch.float32).double()[::2], w=par(D)),
        "view",
        "no gradient",
    ),
    "complex": (lambda: built(lambda s, x: (x * s.w.to(torch.complex128)).real, w=par(D)), "w", "complex"),
    "in-place activation of a parameter": (lambda: built(lambda s, x: x * F.relu(s.w, inplace=True), w=par(D)), "w"),
    "parameter changed in place": (lambda: built(lambda s, x: x * s.w.mul_(2), w=par(D)), "mul_"),
    "copied inside": (lambda: built(lambda s, x: copy.deepcopy(s.l)(x), l=nn.Linear(D, 3)), "does not belong"),
    "addmm with factors": (
        lambda: built(lambda s, x: torch.addmm(s.b, x[:, 0], s.w, beta=0.5), w=par(D, 3), b=par(3)),
        "beta",
    ),
}


def _packed(self, x: Tensor) -> Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), T), batch_first=True)
    return nn.utils.rnn.pad_packed_sequence(self.r(packed)[0], batch_first=True)[0]


def _written(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    h[:, 0] = w
    return h


@pytest.mark.parametrize("name", list(UNRULED))
def test_no_rule_no_norm(name):
    build, *words = UNRULED[name]
    expect_refused(build(), drawn(T, D), *words)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_norm": 1.0}, "max_norm"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
        ({"sparse": True}, "sparse"),
    ],
)
def test_embedding_options_that_break_the_bound_are_refused(options, word):
    model = Fn(lambda s, x: s.e(x), e=nn.Embedding(11, D, **options))
    expect_refused(model, tokens()(), word)


def test_a_position_table_that_renormalises_itself_is_refused():
    model = Fn(lambda s, x: s.e(x) + s.p(torch.arange(T)), e=nn.Embedding(11, D), p=nn.Embedding(T, D, max_norm=0.1))
    expect_refused(model, tokens()(), "p.weight", "in place")


class _Tripled(nn.Parameter):
    """Acts as three times its values wherever torch asks its class."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            args = [3 * a.as_subclass(Tensor) if isinstance(a, cls) and func is F.linear else a for a in args]
            return func(*args, **(kwargs or {}))


class _Exponential(nn.Parameter):
    @property
    def T(self):
        return torch.t(self.exp())


@pytest.mark.parametrize("kind", [_Tripled, _Exponential])
def test_a_parameter_with_ways_of_its_own_is_refused(kind):
    """Its class makes room for that of guarded parameters, and the model would compute something else unseen."""
    model = built(lambda s, x: F.linear(x, s.w) if kind is _Tripled else x @ s.w.T, w=par(3, D))
    model.w = kind(model.w.data)
    with pytest.raises(ConfigError, match=f"w: of class {kind.__name__}"):
        clipped_gradient(model, loss, drawn(T, D), clipping=CLIP)
    assert type(model.w) is kind


def _dual(s, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(s.l(forward_ad.make_dual(x, x.sign()))).tangent


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by torch's own jvp
@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: torch.vmap(lambda row: s.l(row))(x),
        lambda s, x: torch.vmap(lambda row: row.unsqueeze(0).expand(B, -1) @ s.l.weight.T)(x).mean(1),
        lambda s, x: torch.func.vmap(torch.func.grad(lambda row: s.l(row).sum()))(x) @ s.l.weight.T,
        lambda s, x: torch.func.jvp(s.l, (x,), (x.sign(),))[1],
        _dual,
    ],
)
def test_a_parameter_inside_a_function_transform_is_refused(forward):
    """What has the size of the batch there may be anything."""
    expect_refused(built(forward, l=nn.Linear(D, 2)), drawn(D), "inside torch.func")


def test_a_function_transform_of_frozen_layers_is_nobodys_business():
    def slopes(s, x):
        return s.l(torch.func.vmap(torch.func.grad(lambda row: s.frozen(row).tanh().sum()))(x))

    model = built(slopes, frozen=nn.Linear(D, 3), l=nn.Linear(D, 2))
    model.frozen.requires_grad_(False)
    expect_exact(model, drawn(D))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by torch's own jvp
@pytest.mark.parametrize("last", [nn.Linear(D, 2), nn.LayerNorm(D), nn.GroupNorm(2, D)])
@pytest.mark.parametrize("transform", [torch.func.jvp, lambda f, at, _: torch.func.grad(lambda x: f(x).sum())(*at)])
def test_a_value_that_a_closure_kept_from_a_function_transform_is_what_it_was(transform, last):
    """It is wrapped still: a layer that took it as it was sent no gradient, or a wrong one, to what lies behind."""

    def kept(s, x):
        states = []

        def hidden(x):
            states.append(s.frozen(x).tanh())
            return states[0]

        transform(hidden, (s.l(x),), (x.sign(),))
        return s.last(states[0])

    model = built(kept, frozen=nn.Linear(D, D), l=nn.Linear(D, D), last=last)
    model.frozen.requires_grad_(False)
    expect_exact(model, drawn(D))


def test_a_parameter_that_becomes_rows_of_the_batch_is_refused():
    model = built(lambda s, x: s.l(torch.cat([s.l(x).tanh(), s.w * 2]))[: len(x)], w=par(B, D), l=nn.Linear(D, D))
    expect_refused(model, drawn(D), "w", "along axis 0")


def test_ids_out_of_range_are_not_wrapped_into_the_next_row():
    model = built(lambda s, x: s.w[x[:, 0] * 0, x[:, 1] * 0 + 4].tanh(), w=par(3, 4))
    with pytest.raises(IndexError):
        clipped_gradient(model, loss, tokens()(), clipping=CLIP)


def test_a_lazy_layer_is_refused_until_it_has_met_a_batch():
    model = built(lambda s, x: s.l(x), l=nn.Linear(D, 2))
    model.l = nn.LazyLinear(2, dtype=torch.float64)
    with pytest.raises(ConfigError, match="run one batch first"):
        clipped_gradient(model, loss, drawn(D), clipping=CLIP)
    model(drawn(D)["x"])
    clipped_gradient(model, loss, drawn(D), clipping=CLIP)
