"""A table of small models that together use every rule, and every way of sharing a parameter that we know of.

`CASES` maps a name to a `Case`: a builder of the model, a builder of the batch, a per-example loss, and what it needs
(a layout from the self-check when it folds axes). All are deterministic and run in any dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from blocks import B, Case, D, Fn, Seq, T, V, features, frozen, par, tokens
from case_models import (
    Rms,
    WithParametrisation,
    albert,
    beit,
    ckpt_model,
    conv1d_gpt2,
    old_weight_norm,
    siamese,
    siamese_folded,
    silently,
    tied,
    vit,
    windows,
)


def _conv(kind: type[nn.Module], axes: int, **options: Any) -> Case:
    inputs, outputs = options.pop("inputs", 4), options.pop("outputs", 6)
    kernel = options.pop("kernel", 3)
    shape = (inputs, *((9, 8, 7)[:axes]))
    return Case(lambda: Seq(kind(inputs, outputs, kernel, **options), nn.Tanh(), kind(outputs, 3, 1)), features(*shape))


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
        lambda: Fn(conv1d_gpt2, wte=nn.Embedding(V, D), w=par(D, 9), b=par(9), w2=par(9, D), b2=par(D)),
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
    "query bias (BEiT)": Case(lambda: Fn(beit, qkv=par(24, D), q_bias=par(8), v_bias=par(8)), features(T, D)),
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
    "conv2d, every other pixel": Case(
        lambda: Seq(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 1, stride=(2, 3))), features(3, 8, 9)
    ),
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
            vit,
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
    "tied head": Case(tied(lambda s, x: s.head(s.mid(s.e(x)).tanh())), tokens()),
    "tied head, functional": Case(tied(lambda s, x: F.linear(s.mid(s.e(x)), s.e.weight)), tokens()),
    "tied head, matmul": Case(tied(lambda s, x: s.mid(s.e(x)) @ s.e.weight.t() * 0.1), tokens()),
    "tied embeddings": Case(tied(lambda s, x: s.mid(s.e(x)) + s.e(x.flip(1)).tanh()), tokens()),
    "called twice": Case(lambda: Fn(lambda s, x: s.l(s.l(x).tanh()), l=nn.Linear(D, D)), features(T, D)),
    "called twice, 2-D": Case(lambda: Fn(lambda s, x: s.l(s.l(x).tanh()), l=nn.Linear(D, D)), features(D)),
    "called twice, other lengths": Case(
        lambda: Fn(lambda s, x: s.l(s.l(x).tanh().mean(1)), l=nn.Linear(20, 20)), features(2, 20)
    ),
    "conv called twice": Case(lambda: Fn(lambda s, x: s.c(s.c(x).tanh()), c=nn.Conv1d(3, 3, 3)), features(3, 9)),
    "ALBERT": Case(
        lambda: Fn(
            albert,
            e=nn.Embedding(V, D),
            norm=nn.LayerNorm(D),
            block=nn.Sequential(nn.Linear(D, 9), nn.GELU(), nn.Linear(9, D)),
        ),
        tokens(),
    ),
    "siamese on a second axis": Case(lambda: Fn(siamese, net=nn.Linear(D, 4)), features(D)),
    "siamese, folded": Case(
        lambda: Fn(siamese_folded, first=nn.Linear(D, D), net=nn.Sequential(nn.Linear(D, 4), nn.LayerNorm(4))),
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
            windows,
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
    "weight norm, old": Case(old_weight_norm, features(3, 8)),
    "checkpoint": Case(ckpt_model(False), features(T, D)),
    "an eval forward inside": Case(
        lambda: Fn(lambda s, x: s.l(x) * (1 + silently(s.l, x).mean(-1, keepdim=True)), l=nn.Linear(D, 3)),
        features(T, D),
    ),
    "detached and data copies": Case(
        lambda: Fn(lambda s, x: F.linear(x, s.w) * s.w.detach().sum() + F.linear(x, s.w.data), w=par(4, D)),
        features(T, D),
    ),
    "one example tall": Case(lambda: Fn(lambda s, x: s.l(x), l=nn.Linear(1, 1)), features(1)),
}
