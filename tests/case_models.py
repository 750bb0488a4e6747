"""Models and forward functions that are too long for a row of the table in `cases`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blocks import D, Fn, Seq, V, par


def conv1d_gpt2(self: Any, x: Tensor) -> Tensor:
    h = self.wte(x)
    h = torch.addmm(self.b, h.view(-1, h.size(-1)), self.w).view(*x.shape, -1)
    return torch.addmm(self.b2, h.tanh().view(-1, h.size(-1)), self.w2).view(*x.shape, -1)


def windows(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)  # (B, 8, D) -> (B * 2, 4, D)
    w = h.view(-1, 2, 4, D).flatten(0, 1)
    q = self.norm(w)
    bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()
    attention = (self.q(q) @ q.transpose(1, 2) + bias.unsqueeze(0).mean(1)).softmax(-1)
    return (self.scale * (attention @ w) + self.o(w)).view(x.shape[0], -1)


def albert(self: Any, x: Tensor) -> Tensor:
    h = self.e(x)
    for _ in range(3):
        h = self.norm(h + self.block(h))
    return h


def siamese(self: Any, x: Tensor) -> Tensor:
    both = self.net(torch.cat([x, x.roll(1, -1)], 1).view(x.shape[0], 2, D))
    return both[:, 0] - both[:, 1]


def siamese_folded(self: Any, x: Tensor) -> Tensor:
    h = self.first(x)
    pair = torch.stack([h, h.roll(1, -1).tanh()], 1).flatten(0, 1)
    both = self.net(pair).view(x.shape[0], 2, -1)
    return both[:, 0] * both[:, 1]


def vit(self: Any, x: Tensor) -> Tensor:
    h = self.patch(x).flatten(2).transpose(1, 2)
    h = torch.cat([self.cls.expand(x.shape[0], -1, -1), h], 1) + self.pos
    h = h + self.gamma * self.mlp(self.norm(h))
    return h[:, 0]


def beit(self: Any, x: Tensor) -> Tensor:
    bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
    return F.linear(x, self.qkv, bias)


class WithParametrisation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.utils.parametrizations.weight_norm(nn.Linear(D, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Seq(nn.utils.weight_norm(nn.Conv1d(3, 4, 3)), nn.Tanh())


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


def tied(f: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Fn(f, e=nn.Embedding(V, D), mid=nn.Linear(D, D), head=nn.Linear(D, V, bias=False))
        model.head.weight = model.e.weight
        return model

    return build


def _ckpt(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    h = checkpoint(self.b, h, use_reentrant=self.reentrant)
    return self.c(checkpoint(self.b, h, use_reentrant=self.reentrant))


def ckpt_model(reentrant: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        block = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D))
        model = Fn(_ckpt, a=nn.Linear(D, D), b=block, c=nn.Linear(D, 2))
        model.reentrant = reentrant
        return model

    return build


def silently(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)
