"""A table of small models that together use every rule, and every way of sharing a parameter that we know of.

`CASES` maps a name to a `Case`: a builder of the model, a builder of the batch, a per-example loss, and what it needs
(a layout from the self-check when it folds axes). All are deterministic and run in any dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

B, T, D, V = 5, 7, 6, 11


@dataclass(frozen=True)
class Case:
    """One row: how to build it, and how to feed it."""

    model: Callable[[], nn.Module]
    batch: Callable[[], Any]
    folded: bool = False

    def build(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
        """Model and batch in a dtype, from a fixed seed. Starting values that are zero or one are shaken."""
        torch.manual_seed(7)
        model = self.model()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
        batch = self.batch()
        return model.to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Per example: a curved function of everything that the model puts out, different for each example."""
    out = model(**{k: v for k, v in batch.items() if k != "target"})
    return (out.flatten(1) - batch["target"].unsqueeze(1)).square().mean(1) + out.flatten(1).tanh().sum(1)


def features(*shape: int) -> Callable[[], Any]:
    """Gaussian features (B, *shape) and a target."""
    return lambda: {"x": torch.randn(B, *shape), "target": torch.randn(B)}


def tokens(length: int = T, low: int = 0) -> Callable[[], Any]:
    """Token ids (B, length), with repeats, and a target."""
    return lambda: {"x": torch.randint(low, V, (B, length)), "target": torch.randn(B)}


class Fn(nn.Module):
    """A model made of named parameters, modules and a forward function ``f(self, x)``."""

    def __init__(self, f: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.f = f
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def par(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name, p in module.named_parameters():
        if name in names:
            p.requires_grad_(False)
    return module


def _conv1d_gpt2(self: Any, x: Tensor) -> Tensor:
    h = self.wte(x)
    h = torch.addmm(self.b, h.view(-1, h.size(-1)), self.w).view(*x.shape, -1)
    return torch.addmm(self.b2, h.tanh().view(-1, h.size(-1)), self.w2).view(*x.shape, -1)


def _windows(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)  # (B, 8, D) -> (B * 2, 4, D)
    w = h.view(-1, 2, 4, D).flatten(0, 1)
    q = self.norm(w)
    bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()
    attention = (self.q(q) @ q.transpose(1, 2) + bias.unsqueeze(0).mean(1)).softmax(-1)
    return (self.scale * (attention @ w) + self.o(w)).view(x.shape[0], -1)


def _albert(self: Any, x: Tensor) -> Tensor:
    h = self.e(x)
    for _ in range(3):
        h = self.norm(h + self.block(h))
    return h


def _siamese(self: Any, x: Tensor) -> Tensor:
    both = self.net(torch.cat([x, x.roll(1, -1)], 1).view(x.shape[0], 2, D))
    return both[:, 0] - both[:, 1]


def _siamese_folded(self: Any, x: Tensor) -> Tensor:
    h = self.first(x)
    pair = torch.stack([h, h.roll(1, -1).tanh()], 1).flatten(0, 1)
    both = self.net(pair).view(x.shape[0], 2, -1)
    return both[:, 0] * both[:, 1]


def _vit(self: Any, x: Tensor) -> Tensor:
    h = self.patch(x).flatten(2).transpose(1, 2)
    h = torch.cat([self.cls.expand(x.shape[0], -1, -1), h], 1) + self.pos
    h = h + self.gamma * self.mlp(self.norm(h))
    return h[:, 0]


def _beit(self: Any, x: Tensor) -> Tensor:
    bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
    return F.linear(x, self.qkv, bias)


class WithParametrisation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.utils.parametrizations.weight_norm(nn.Linear(D, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Seq(nn.utils.weight_norm(nn.Conv1d(3, 4, 3)), nn.Tanh())


class Seq(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Rms(nn.Module):
    """Gemma's norm: ``x_hat * (1 + w)``, computed in float32 or better, and cast back."""

    def __init__(self, *, plus_one: bool) -> None:
        super().__init__()
        self.weight, self.plus_one = par(D), plus_one

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        h = x.to(wide)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        w = 1.0 + self.weight.to(wide) if self.plus_one else self.weight
        return (w * h).type_as(x)


def _tied(f: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Fn(f, e=nn.Embedding(V, D), mid=nn.Linear(D, D), head=nn.Linear(D, V, bias=False))
        model.head.weight = model.e.weight
        return model

    return build


def _conv(kind: type[nn.Module], axes: int, **options: Any) -> Case:
    inputs, outputs = options.pop("inputs", 4), options.pop("outputs", 6)
    kernel = options.pop("kernel", 3)
    shape = (inputs, *((9, 8, 7)[:axes]))
    return Case(lambda: Seq(kind(inputs, outputs, kernel, **options), nn.Tanh(), kind(outputs, 3, 1)), features(*shape))


def _ckpt(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    h = checkpoint(self.b, h, use_reentrant=self.reentrant)
    return self.c(checkpoint(self.b, h, use_reentrant=self.reentrant))


def _ckpt_model(reentrant: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        block = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D))
        model = Fn(_ckpt, a=nn.Linear(D, D), b=block, c=nn.Linear(D, 2))
        model.reentrant = reentrant
        return model

    return build


CASES: dict[str, Case] = {
    # linear and its kin
    "linear 2-D": Case(lambda: Seq(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3)), features(D)),
    "linear 3-D": Case(lambda: Seq(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3)), features(T, D)),
    "linear 3-D gram": Case(lambda: Seq(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 30)), features(3, 30)),
    "linear 4-D": Case(lambda: Seq(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3)), features(3, 2, D)),
    "linear no bias": Case(
        lambda: Seq(nn.Linear(D, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)), features(D)
    ),
    "bias only (BiTFiT)": Case(
        lambda: frozen(Seq(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3)), "0.weight", "2.weight"), features(T, D)
    ),
    "weights only": Case(
        lambda: frozen(Seq(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3)), "0.bias", "2.bias"), features(T, D)
    ),
    "first layer frozen": Case(
        lambda: frozen(Seq(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3)), "0.weight", "0.bias"), features(T, D)
    ),
    "addmm": Case(lambda: Fn(lambda s, x: torch.addmm(s.b, x, s.w), w=par(D, 4), b=par(4)), features(D)),
    "addmm, flattened tokens (GPT-2)": Case(
        lambda: Fn(_conv1d_gpt2, wte=nn.Embedding(V, D), w=par(D, 9), b=par(9), w2=par(9, D), b2=par(D)),
        tokens(),
        folded=True,
    ),
    "matmul": Case(lambda: Fn(lambda s, x: x @ s.w, w=par(D, 4)), features(T, D)),
    "matmul, method and function": Case(
        lambda: Fn(lambda s, x: torch.matmul(x.matmul(s.w).tanh(), s.v), w=par(D, 4), v=par(4, 4)), features(T, D)
    ),
    "matmul of a transpose": Case(lambda: Fn(lambda s, x: x @ s.w.t(), w=par(4, D)), features(T, D)),
    "matmul of a transpose, T": Case(lambda: Fn(lambda s, x: x @ s.w.T, w=par(4, D)), features(T, D)),
    "matmul of a slice": Case(lambda: Fn(lambda s, x: x @ s.w[:, :4] @ s.w[:4, 2:], w=par(D, 6)), features(T, D)),
    "linear by keyword": Case(
        lambda: Fn(lambda s, x: F.linear(input=x, weight=s.w, bias=s.b), w=par(4, D), b=par(4)), features(T, D)
    ),
    "linear with a split weight": Case(
        lambda: Fn(lambda s, x: sum(F.linear(x, w) for w in s.w.chunk(3, 0)), w=par(12, D)), features(T, D)
    ),
    "linear with the weight's cast": Case(
        lambda: Fn(lambda s, x: F.linear(x, s.w.to(x.dtype), s.b.type(x.dtype)), w=par(4, D), b=par(4)), features(T, D)
    ),
    "linear with a scaled cast": Case(
        lambda: Fn(lambda s, x: F.linear(x, (s.w * 2).type(x.dtype), (s.b * 3).type_as(x)), w=par(4, D), b=par(4)),
        features(T, D),
    ),
    "low rank (LoRA)": Case(
        lambda: Fn(
            lambda s, x: s.base(x) + 2 * s.up(s.down(x)),
            base=frozen(nn.Linear(D, 4), "weight", "bias"),
            down=nn.Linear(D, 2, bias=False),
            up=nn.Linear(2, 4, bias=False),
        ),
        features(T, D),
    ),
    "merged low rank": Case(lambda: Fn(lambda s, x: F.linear(x, s.u @ s.v), u=par(4, 2), v=par(2, D)), features(T, D)),
    "query bias (BEiT)": Case(lambda: Fn(_beit, qkv=par(24, D), q_bias=par(8), v_bias=par(8)), features(T, D)),
    # embedding
    "embedding": Case(lambda: Fn(lambda s, x: s.e(x), e=nn.Embedding(V, D)), tokens()),
    "embedding of one id": Case(lambda: Fn(lambda s, x: s.e(x[:, 0]), e=nn.Embedding(V, D)), tokens()),
    "embedding, padding": Case(lambda: Fn(lambda s, x: s.e(x), e=nn.Embedding(V, D, padding_idx=3)), tokens()),
    "embedding, negative padding": Case(
        lambda: Fn(lambda s, x: F.embedding(x, s.w, padding_idx=-2), w=par(V, D)), tokens()
    ),
    "embedding, bag of features": Case(lambda: Fn(lambda s, x: s.e(x).mean(1), e=nn.Embedding(V, D)), tokens(20)),
    "position ids (T,)": Case(
        lambda: Fn(lambda s, x: s.e(x) + s.p(torch.arange(x.shape[1])), e=nn.Embedding(V, D), p=nn.Embedding(20, D)),
        tokens(),
    ),
    "position ids (T,), T equal to B": Case(
        lambda: Fn(lambda s, x: s.e(x) + s.p(torch.arange(x.shape[1])), e=nn.Embedding(V, D), p=nn.Embedding(20, D)),
        tokens(B),
    ),
    "position ids (1, T)": Case(
        lambda: Fn(
            lambda s, x: s.e(x) + s.p(torch.arange(x.shape[1]).unsqueeze(0)),
            e=nn.Embedding(V, D),
            p=nn.Embedding(20, D),
        ),
        tokens(),
    ),
    "rows by index": Case(lambda: Fn(lambda s, x: s.w[x], w=par(V, D)), tokens()),
    "rows by negative index": Case(lambda: Fn(lambda s, x: s.w[x - V], w=par(V, D)), tokens()),
    "vector by index": Case(lambda: Fn(lambda s, x: s.w[x], w=par(V)), tokens()),
    "matrices by index (experts)": Case(lambda: Fn(lambda s, x: s.w[x[:, 0]].tanh().sum(-1), w=par(V, 3, D)), tokens()),
    "constant relative positions": Case(
        lambda: Fn(
            lambda s, x: x @ s.table[s.index].permute(2, 0, 1).mean(0),
            table=par(5, 3),
            index=torch.randint(0, 5, (D, D)),
        ),
        features(T, D),
    ),
    "one-hot times table": Case(lambda: Fn(lambda s, x: F.one_hot(x, V).to(s.w.dtype) @ s.w, w=par(V, D)), tokens()),
    # normalisation
    "layer norm": Case(lambda: Seq(nn.Linear(D, D), nn.LayerNorm(D)), features(T, D)),
    "layer norm, two axes": Case(lambda: Seq(nn.Linear(D, D), nn.LayerNorm((T, D))), features(T, D)),
    "layer norm, no bias": Case(lambda: Seq(nn.Linear(D, D), nn.LayerNorm(D, bias=False)), features(T, D)),
    "layer norm, frozen weight": Case(
        lambda: frozen(Seq(nn.Linear(D, D), nn.LayerNorm(D)), "1.weight"), features(T, D)
    ),
    "layer norm, not affine": Case(
        lambda: Seq(nn.Linear(D, D), nn.LayerNorm(D, elementwise_affine=False)), features(T, D)
    ),
    "layer norm, first and 2-D": Case(lambda: Seq(nn.LayerNorm(D), nn.Linear(D, 2)), features(D)),
    "group norm": Case(lambda: Seq(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6)), features(3, 5, 5)),
    "group norm, frozen weight": Case(
        lambda: frozen(Seq(nn.Conv1d(3, 6, 3), nn.GroupNorm(2, 6)), "1.weight"), features(3, 5)
    ),
    "RMS norm": Case(lambda: Seq(nn.Linear(D, D), nn.RMSNorm(D, eps=1e-6)), features(T, D)),
    "RMS norm by hand": Case(lambda: Seq(nn.Linear(D, D), Rms(plus_one=False)), features(T, D)),
    "RMS norm, 1 + w": Case(lambda: Seq(nn.Linear(D, D), Rms(plus_one=True)), features(T, D)),
    # convolution
    "conv1d": _conv(nn.Conv1d, 1),
    "conv2d": _conv(nn.Conv2d, 2),
    "conv3d": _conv(nn.Conv3d, 3),
    "conv2d gram": _conv(nn.Conv2d, 2, inputs=24, outputs=48, kernel=7),
    "conv1d, stride and padding": _conv(nn.Conv1d, 1, stride=2, padding=2),
    "conv2d, stride and padding": _conv(nn.Conv2d, 2, stride=(2, 1), padding=(1, 2)),
    "conv2d, dilation": _conv(nn.Conv2d, 2, dilation=(2, 1)),
    "conv1d, same, even kernel": _conv(nn.Conv1d, 1, kernel=4, padding="same"),
    "conv2d, same, even kernel": _conv(nn.Conv2d, 2, kernel=(2, 4), padding="same", dilation=(1, 3)),
    "conv2d, valid": _conv(nn.Conv2d, 2, padding="valid", bias=False),
    "conv2d, groups": _conv(nn.Conv2d, 2, groups=2, stride=2, padding=1),
    "conv1d, depthwise": _conv(nn.Conv1d, 1, outputs=8, groups=4, padding=1),
    "conv3d, groups and dilation": _conv(nn.Conv3d, 3, groups=2, dilation=2, padding=2),
    "conv2d, circular": _conv(nn.Conv2d, 2, padding=1, padding_mode="circular"),
    "conv1d, reflect": _conv(nn.Conv1d, 1, padding=2, padding_mode="reflect"),
    "conv2d, patches": _conv(nn.Conv2d, 2, kernel=2, stride=2),
    "conv2d, frozen weight": Case(lambda: frozen(Seq(nn.Conv2d(3, 4, 3), nn.Tanh()), "0.weight"), features(3, 5, 5)),
    "conv2d, scaled weight": Case(
        lambda: Fn(lambda s, x: F.conv2d(x, s.w * s.g, s.b), w=par(4, 3, 3, 3), g=par(4, 1, 1, 1), b=par(4)),
        features(3, 5, 5),
    ),
    "conv2d, standardised weight": Case(
        lambda: Fn(
            lambda s, x: F.conv2d(x, (s.w - s.w.mean((1, 2, 3), keepdim=True)) / s.w.std((1, 2, 3), keepdim=True)),
            w=par(4, 3, 3, 3),
        ),
        features(3, 5, 5),
    ),
    # bare parameters
    "scale and shift": Case(lambda: Fn(lambda s, x: s.w * x + s.b, w=par(D), b=par(D)), features(T, D)),
    "scale from the right, divide, subtract": Case(
        lambda: Fn(lambda s, x: (x / (2 + s.w * s.w)) - s.b + (1 - s.w) * x, w=par(D), b=par(D)), features(T, D)
    ),
    "scalar residual scale": Case(
        lambda: Fn(lambda s, x: x + s.alpha * s.l(x), alpha=par(), l=nn.Linear(D, D)), features(T, D)
    ),
    "logit scale": Case(lambda: Fn(lambda s, x: s.l(x) * s.t.exp(), t=par(), l=nn.Linear(D, 3)), features(D)),
    "in-place add": Case(
        lambda: Fn(lambda s, x: s.l(x).add_(s.b).mul_(s.g), b=par(D), g=par(D), l=nn.Linear(D, D)), features(T, D)
    ),
    "whole-example parameter": Case(lambda: Fn(lambda s, x: x * s.w, w=par(1, T, D)), features(T, D)),
    "where and lerp": Case(
        lambda: Fn(lambda s, x: torch.where(x > 0, x, s.w) + torch.lerp(x, s.w, 0.3), w=par(D)), features(T, D)
    ),
    "powers": Case(lambda: Fn(lambda s, x: (1 + x * x) ** s.w + torch.addcmul(x, x, s.w), w=par(D)), features(T, D)),
    "token and positions (ViT)": Case(
        lambda: Fn(
            _vit,
            patch=nn.Conv2d(3, D, 2, stride=2),
            cls=par(1, 1, D),
            pos=par(1, 5, D),
            gamma=par(D),
            norm=nn.LayerNorm(D),
            mlp=nn.Sequential(nn.Linear(D, 9), nn.GELU(), nn.Linear(9, D)),
        ),
        features(3, 4, 4),
    ),
    "token by repeat": Case(
        lambda: Fn(lambda s, x: torch.cat([s.t.repeat(x.shape[0], 2, 1), x], 1).tanh(), t=par(1, D)), features(T, D)
    ),
    "prompt by unsqueeze and expand": Case(
        lambda: Fn(lambda s, x: torch.cat([s.t.unsqueeze(0).expand(x.size(0), -1, -1), x], 1).tanh(), t=par(3, D)),
        features(T, D),
    ),
    "position table slice": Case(
        lambda: Fn(lambda s, x: s.l(x + s.pos[:, : x.shape[1]]), pos=par(1, 20, D), l=nn.Linear(D, 2)), features(T, D)
    ),
    "position table slice, T equal to B": Case(
        lambda: Fn(lambda s, x: s.l(x + s.pos[: x.shape[1]]), pos=par(20, D), l=nn.Linear(D, 2)), features(B, D)
    ),
    "expand to T, T equal to B": Case(
        lambda: Fn(lambda s, x: (x + s.t.expand(x.shape[1], -1)).tanh(), t=par(1, D)), features(B, D)
    ),
    "constant grid through a layer": Case(
        lambda: Fn(lambda s, x: x + s.l(s.grid).tanh(), l=nn.Linear(2, D), grid=torch.randn(T, 2)), features(T, D)
    ),
    "stack, unbind, softmax": Case(
        lambda: Fn(
            lambda s, x: sum(
                w * h for w, h in zip(torch.stack([s.a, s.b]).softmax(0).unbind(0), x.unbind(1), strict=True)
            ),
            a=par(),
            b=par(),
        ),
        features(2, D),
    ),
    "penalty on the weights": Case(
        lambda: Fn(
            lambda s, x: s.l(x) + sum(p.pow(2).sum() for p in s.parameters()) + s.l.weight.abs().mean(),
            l=nn.Linear(D, 2),
        ),
        features(D),
    ),
    # sharing
    "tied head": Case(_tied(lambda s, x: s.head(s.mid(s.e(x)).tanh())), tokens()),
    "tied head, functional": Case(_tied(lambda s, x: F.linear(s.mid(s.e(x)), s.e.weight)), tokens()),
    "tied head, matmul": Case(_tied(lambda s, x: s.mid(s.e(x)) @ s.e.weight.t() * 0.1), tokens()),
    "tied embeddings": Case(_tied(lambda s, x: s.mid(s.e(x)) + s.e(x.flip(1)).tanh()), tokens()),
    "called twice": Case(lambda: Fn(lambda s, x: s.l(s.l(x).tanh()), l=nn.Linear(D, D)), features(T, D)),
    "called twice, 2-D": Case(lambda: Fn(lambda s, x: s.l(s.l(x).tanh()), l=nn.Linear(D, D)), features(D)),
    "called twice, other lengths": Case(
        lambda: Fn(lambda s, x: s.l(s.l(x).tanh().mean(1)), l=nn.Linear(20, 20)), features(2, 20)
    ),
    "conv called twice": Case(lambda: Fn(lambda s, x: s.c(s.c(x).tanh()), c=nn.Conv1d(3, 3, 3)), features(3, 9)),
    "ALBERT": Case(
        lambda: Fn(
            _albert,
            e=nn.Embedding(V, D),
            norm=nn.LayerNorm(D),
            block=nn.Sequential(nn.Linear(D, 9), nn.GELU(), nn.Linear(9, D)),
        ),
        tokens(),
    ),
    "siamese on a second axis": Case(lambda: Fn(_siamese, net=nn.Linear(D, 4)), features(D)),
    "siamese, folded": Case(
        lambda: Fn(_siamese_folded, first=nn.Linear(D, D), net=nn.Sequential(nn.Linear(D, 4), nn.LayerNorm(4))),
        features(D),
        folded=True,
    ),
    "siamese, concatenated after": Case(
        lambda: Fn(lambda s, x: s.l(x).tanh() - s.l(x.flip(1)).tanh(), l=nn.Linear(D, 4)), features(D)
    ),
    "weight in linear and as a penalty": Case(
        lambda: Fn(lambda s, x: F.linear(x, s.w) + (s.w * s.w).sum(), w=par(4, D)), features(T, D)
    ),
    "weight in linear and in convolution": Case(
        lambda: Fn(lambda s, x: F.conv1d(F.linear(x, s.w.flatten(1)), s.w), w=par(4, 2, 3)), features(2, 6)
    ),
    "autoencoder with a tied decoder": Case(
        lambda: Fn(lambda s, x: F.linear(x, s.w).tanh() @ s.w + s.b, w=par(4, D), b=par(D)), features(T, D)
    ),
    "windows (Swin)": Case(
        lambda: Fn(
            _windows,
            a=nn.Linear(D, D),
            norm=nn.LayerNorm(D),
            q=nn.Linear(D, D),
            o=nn.Linear(D, D),
            table=par(9, 2),
            scale=par(D),
            index=torch.randint(0, 9, (4, 4)),
        ),
        features(8, D),
        folded=True,
    ),
    "conv on folded frames": Case(
        lambda: Fn(
            lambda s, x: s.c(s.a(x).view(-1, 4, 5)).view(x.shape[0], -1), a=nn.Linear(5, 5), c=nn.Conv1d(4, 3, 3)
        ),
        features(3, 4, 5),
        folded=True,
    ),
    "group norm on folded frames": Case(
        lambda: Fn(
            lambda s, x: s.n(s.a(x).view(-1, 4, 5)).view(x.shape[0], -1), a=nn.Linear(5, 5), n=nn.GroupNorm(2, 4)
        ),
        features(3, 4, 5),
        folded=True,
    ),
    # odds and ends
    "in-place relu": Case(
        lambda: Seq(nn.Linear(D, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(inplace=True)), features(T, D)
    ),
    "in-place relu after convolution": Case(
        lambda: Seq(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 2)), features(3, 5, 5)
    ),
    "unused parameter": Case(
        lambda: Fn(lambda s, x: s.l(x), l=nn.Linear(D, 3), never=nn.Linear(D, 3), token=par(4)), features(D)
    ),
    "weight norm": Case(WithParametrisation, features(T, D)),
    "weight norm, old": Case(_old_weight_norm, features(3, 8)),
    "checkpoint": Case(_ckpt_model(False), features(T, D)),
    "an eval forward inside": Case(
        lambda: Fn(lambda s, x: s.l(x) * (1 + _silently(s.l, x).mean(-1, keepdim=True)), l=nn.Linear(D, 3)),
        features(T, D),
    ),
    "detached and data copies": Case(
        lambda: Fn(lambda s, x: F.linear(x, s.w) * s.w.detach().sum() + F.linear(x, s.w.data), w=par(4, D)),
        features(T, D),
    ),
    "one example tall": Case(lambda: Fn(lambda s, x: s.l(x), l=nn.Linear(1, 1)), features(1)),
}


def _silently(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)
