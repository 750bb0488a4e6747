"""Rules for contractions by index: einsum, matmul with stacked or left-hand weights, and bilinear.

With one guarded operand ``w`` and one activation ``x``, an index is one of four things, and the batch is none of them:

    group     in x, w and y     experts, heads           K
    input     in x and w        contracted               I
    output    in w and y                                 O
    position  in x and y        tokens, pixels           S

So ``y = einsum(x, w)`` is K linear maps side by side, and its per-example gradient is a sum of outer products over S.
An index that the weight shares with the batch, or that only one operand has, is refused.

Shape legend: N = rows of the input (B examples, or B folded).
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from discreet.core.derived import derive
from discreet.core.forms import Form
from discreet.core.outer import Outer
from discreet.core.parameter import Guarded, Use, rule
from discreet.core.rules.contraction import Operation, contract
from discreet.core.rules.linear import Linear
from discreet.core.rules.rows import by_row, lies_along

_REMEDY = (
    "keep the batch as the first index of the activations and out of the weight, as in "
    "torch.einsum('bti,eio->beto', x, w)."
)


@dataclass(frozen=True)
class Indexed(Operation):
    """``y = einsum("input,weight->output")``, one letter per axis; the weight's are (K, O, I) or (K, I, O)."""

    input: str
    weight: str
    output: str

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.einsum(f"{self.input},{self.weight}->{self.output}", input, weight)

    def input_grad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum(f"{self.output},{self.weight}->{self.input}", grad, weight)

    def weight_form(self, grad: Tensor, input: Tensor, weight: Tensor, examples: int) -> Form:
        groups, outputs, inputs = self.parts()
        input_BKSI = self._canonical(input, self.input, groups, inputs, examples)
        grad_BKSO = self._canonical(grad, self.output, groups, outputs, examples)
        if self.weight == groups + outputs + inputs:
            return Outer(input_BKSI, grad_BKSO, weight.shape)
        return Outer(grad_BKSO, input_BKSI, weight.shape)

    def bias_form(self, grad: Tensor, examples: int) -> Form:
        raise AssertionError("an einsum has no bias")

    def parts(self) -> tuple[str, str, str]:
        """The weight's letters as (groups, outputs, inputs), each in the weight's order."""
        return (
            "".join(axis for axis in self.weight if axis in self.input and axis in self.output),
            "".join(axis for axis in self.weight if axis not in self.input),
            "".join(axis for axis in self.weight if axis not in self.output),
        )

    def _canonical(self, value: Tensor, letters: str, groups: str, last: str, examples: int) -> Tensor:
        """(B, K, S, last): rows of one example are further positions of it."""
        batch, *positions = (axis for axis in self.input if axis not in self.weight)
        order = [letters.index(axis) for axis in (batch, *groups, *positions, *last)]
        permuted = value.permute(order)
        rows, *sizes = permuted.shape
        group_size = math.prod(sizes[: len(groups)])
        position_size = math.prod(sizes[len(groups) : len(groups) + len(positions)])
        width = math.prod(sizes[len(groups) + len(positions) :])
        by_example = permuted.reshape(examples, rows // examples, group_size, position_size, width)
        return by_example.transpose(1, 2).reshape(examples, group_size, rows // examples * position_size, width)


@dataclass(frozen=True)
class Bilinear(Linear):
    """``y_o = x1^T weight_o x2 + bias_o`` as a linear map of the outer product of x1 and x2, flattened."""

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super().forward(input, weight.flatten(1), bias)

    def input_grad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        return super().input_grad(grad, input, weight.flatten(1))


@rule(F.bilinear)
def bilinear(use: Use, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.bilinear`` of two activations. With one position, the norm is ``|x1| |x2| |g|``."""
    if isinstance(input1, Guarded) or isinstance(input2, Guarded) or input1.dim() < 2:
        raise use.refuse(f"operands of shapes {tuple(input1.shape)}, {tuple(input2.shape)}", "pass two activations.")
    products = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
    leading = input1 if use.is_batched(input1) else input2
    return contract(use.renamed(leading, products), Bilinear(transposed=False), products, weight, bias)


@rule(torch.einsum)
def einsum(use: Use, equation: str, *operands: Tensor) -> Tensor:
    """``torch.einsum`` of activations and one guarded value, in either order; an ellipsis stands in the activations."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    guarded = [at for at, operand in enumerate(operands) if isinstance(operand, Guarded)]
    if not isinstance(equation, str) or len(operands) != 2 or len(guarded) != 1:
        raise use.refuse("other than an equation, activations and one parameter", "contract two operands at a time.")
    terms, output = _parsed(use, equation, operands)
    at = guarded[0]
    return _indexed(use, operands[1 - at], operands[at], terms[1 - at], terms[at], output)


@rule(torch.matmul, torch.mm, torch.mv, Tensor.matmul, Tensor.mm, Tensor.mv, Tensor.__matmul__, Tensor.__rmatmul__)
def matmul(use: Use, input: Tensor, other: Tensor) -> Tensor:
    """``input @ other`` with the guarded one on either side: a matrix, a vector, or a stack of matrices."""
    if use.function is Tensor.__rmatmul__:
        input, other = other, input
    if isinstance(other, Guarded) and not isinstance(input, Guarded) and other.dim() == 2 and input.dim() > 1:
        return contract(use, Linear(transposed=True), input, other, None)
    terms, output = _matmul_terms(input.dim(), other.dim())
    if isinstance(other, Guarded):
        return _indexed(use, input, other, terms[0], terms[1], output)
    return _indexed(use, other, input, terms[1], terms[0], output)


def _matmul_terms(one: int, two: int) -> tuple[tuple[str, str], str]:
    """``matmul`` of operands with these numbers of axes as an einsum."""
    stack = string.ascii_lowercase[: max(one, two, 2) - 2]
    first = stack[len(stack) - (one - 2) :] + "RI" if one > 1 else "I"
    second = stack[len(stack) - (two - 2) :] + "IC" if two > 1 else "I"
    return (first, second), stack + "R" * (one > 1) + "C" * (two > 1)


@rule(torch.bmm, Tensor.bmm)
def stacked(use: Use, input: Tensor, mat2: Tensor) -> Tensor:
    """``bmm`` pairs dimension 0 of both operands: a parameter cannot stand there, but what lies along the batch can."""
    operands, rows = (input, mat2), input.shape[0]
    if all(lies_along(one, rows) for one in operands if isinstance(one, Guarded)):
        return torch.bmm(*(by_row(use, one) if isinstance(one, Guarded) else one for one in operands))
    raise use.refuse(f"operands of shapes {[tuple(operand.shape) for operand in operands]} share axis 0", _REMEDY)


def _indexed(use: Use, input: Tensor, weight: Tensor, x: str, w: str, y: str) -> Tensor:
    """Run the contraction, with the weight's axes in an order that a form can hold."""
    sizes = dict(zip(w, weight.shape, strict=True))
    if any(size == 1 and sizes.get(axis, 1) > 1 for axis, size in zip(x, input.shape, strict=True)):
        spread = input.expand(
            [sizes.get(axis, 1) if size == 1 else size for axis, size in zip(x, input.shape, strict=True)]
        )
        use, input = use.renamed(input, spread), spread
    problem = _problem(input, weight, x, w, y)
    if isinstance(input, Guarded) or problem:
        raise use.refuse(problem or "two parameters", _REMEDY)
    operation = Indexed(x, w, y)
    groups, outputs, inputs = operation.parts()
    if w not in (groups + outputs + inputs, groups + inputs + outputs):
        order = groups + outputs + inputs
        axes = tuple(w.index(axis) for axis in order)
        weight = derive(replace(use, function=Tensor.permute), (weight, axes), {}, isometric=True)
        operation = replace(operation, weight=order)
    return contract(use, operation, input, weight, None)


def _problem(input: Tensor, weight: Tensor, x: str, w: str, y: str) -> str:
    """Why this contraction has no form, or nothing."""
    if any(len(set(term)) != len(term) for term in (x, w, y)):
        return f"a repeated index in {x},{w}->{y}"
    sizes = dict(zip(x, input.shape, strict=True))
    for axis, size in zip(w, weight.shape, strict=True):
        if sizes.get(axis, size) != size:
            return f"index {axis} has size {sizes[axis]} and {size}"
    if not x or x[0] in w or x[0] not in y:
        return f"the batch, the first index of {x or 'a scalar'}, must be in {y} and not in {w}"
    lonely = sorted(axis for axis in {*x, *w, *y} if (axis in x) + (axis in w) + (axis in y) < 2)
    return f"index {lonely[0]} is in one operand alone" if lonely else ""


def _parsed(use: Use, equation: str, operands: tuple[Tensor, ...]) -> tuple[list[str], str]:
    """Terms and output with an ellipsis written out, and an implicit output made explicit."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        output = "..." * ("..." in left) + "".join(sorted(axis for axis in set(letters) if letters.count(axis) == 1))
    spare = [letter for letter in string.ascii_letters if letter not in equation]
    for at, operand in enumerate(operands):
        if "..." not in terms[at]:
            continue
        if isinstance(operand, Guarded):
            raise use.refuse(f"an ellipsis for the parameter in {equation}", "name its indices.")
        written = "".join(spare[: operand.dim() - (len(terms[at]) - 3)])
        terms[at], output = terms[at].replace("...", written), output.replace("...", written)
    if len(terms) != len(operands) or any(len(t) != o.dim() for t, o in zip(terms, operands, strict=True)):
        raise use.refuse(f"{equation!r} does not fit its operands", "one letter per axis.")
    return terms, output
