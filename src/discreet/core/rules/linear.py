"""Rules for linear and addmm: ``y = x W^T + b`` and ``y = x W + b``.

Shape legend: B = examples, S = positions (axes between the first and the last; folded rows), I = inputs, O = outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from discreet.core.forms import Dense, Form, wide_dtype
from discreet.core.outer import Outer
from discreet.core.parameter import Guarded, Use, rule
from discreet.core.rules.contraction import Operation, contract


@dataclass(frozen=True)
class Linear(Operation):
    """``y = input @ weight.mT + bias``, or ``input @ weight + bias`` when ``transposed``."""

    transposed: bool

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, weight.mT if self.transposed else weight, bias)

    def input_grad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        return grad @ (weight.mT if self.transposed else weight)

    def weight_form(self, grad: Tensor, input: Tensor, weight: Tensor, examples: int) -> Form:
        input_BSI = input.reshape(examples, 1, -1, input.shape[-1])
        grad_BSO = grad.reshape(examples, 1, -1, grad.shape[-1])
        if self.transposed:
            return Outer(grad_BSO, input_BSI, weight.shape)
        return Outer(input_BSI, grad_BSO, weight.shape)

    def bias_form(self, grad: Tensor, examples: int) -> Form:
        grad_BSO = grad.reshape(examples, -1, grad.shape[-1])
        if grad_BSO.shape[1] == 1:
            return Dense(grad_BSO[:, 0])
        return Dense(grad_BSO.sum(1, dtype=wide_dtype(grad)))


@rule(F.linear)
def linear(use: Use, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, whichever of weight and bias is guarded; positions may be any axes between first and last."""
    _need_matrix(use, input, weight)
    return contract(use, Linear(transposed=False), input, weight, bias)


@rule(torch.addmm, Tensor.addmm)
def addmm(use: Use, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``bias + mat1 @ weight``, the form of GPT-2's Conv1D."""
    if beta != 1 or alpha != 1:
        raise use.refuse(f"beta={beta}, alpha={alpha}", "scale the operands instead; the rule covers beta = alpha = 1.")
    if input.dim() != 1:
        raise use.refuse(f"a bias of shape {tuple(input.shape)}", "the rule covers a bias with one dimension.")
    _need_matrix(use, mat1, mat2)
    return contract(use, Linear(transposed=True), mat1, mat2, input)


def _need_matrix(use: Use, input: Tensor, weight: Tensor) -> None:
    if isinstance(input, Guarded) or input.dim() < 2 or weight.dim() != 2:
        raise use.refuse(
            f"operands of shapes {tuple(input.shape)} and {tuple(weight.shape)}",
            "the rule covers activations [batch, ..., features] times a two-dimensional weight.",
        )
