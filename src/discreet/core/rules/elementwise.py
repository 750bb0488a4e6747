"""Rules for elementwise uses of bare parameters, and the list of functions that may act on parameters alone.

``w * x``, ``x + b`` and their kin run on one copy of the parameter per example; autograd then yields exact per-example
gradients, at the cost of B times the parameter's numbers. ``p.expand(B, -1, -1)`` and ``p.repeat(B, 1, 1)`` are where a
token or a position table meets the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from discreet.core.derived import cast, derive
from discreet.core.parameter import Guarded, Use, derivable, observation, plain, rule, sized
from discreet.core.rules.rows import by_row, lies_along

_POINTWISE = (
    *(torch.add, torch.sub, torch.mul, torch.div, torch.true_divide, torch.rsub, torch.pow, torch.where, torch.lerp),
    *(torch.maximum, torch.minimum, torch.addcmul, torch.addcdiv),
    *(Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.true_divide, Tensor.pow, Tensor.where, Tensor.lerp),
    *(Tensor.maximum, Tensor.minimum, Tensor.addcmul, Tensor.addcdiv),
    *(Tensor.__add__, Tensor.__radd__, Tensor.__sub__, Tensor.__rsub__, Tensor.__mul__, Tensor.__rmul__),
    *(Tensor.__truediv__, Tensor.__rtruediv__, Tensor.__pow__, Tensor.__rpow__),
)
_IN_PLACE = (
    *(Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.div_),
    *(Tensor.__iadd__, Tensor.__isub__, Tensor.__imul__, Tensor.__itruediv__),
)


@rule(*_POINTWISE)
def pointwise(use: Use, *args: Any, **named: Any) -> Tensor:
    """A broadcasting elementwise function of activations and guarded values."""
    leaves, _ = tree_flatten((args, named))
    batched = [leaf for leaf in leaves if isinstance(leaf, Tensor) and use.is_batched(leaf)]
    axes = max(operand.dim() for operand in batched)
    row_count, *others = [operand.shape[0] for operand in batched if operand.dim() == axes]
    if any(rows != row_count for rows in others) or any(
        operand.dim() < axes and operand.requires_grad for operand in batched
    ):
        raise use.refuse(
            f"operands of shapes {[tuple(operand.shape) for operand in batched]} align their batch axes differently",
            "give every activation the same number of axes, with the batch first.",
        )
    substituted, names = tree_map(lambda leaf: spread(use, leaf, axes, row_count), (args, named))
    return use.function(*substituted, **names)


@rule(*_IN_PLACE)
def in_place(use: Use, target: Tensor, other: Any, **named: Any) -> Tensor:
    """``x += b``: an activation changed in place by a guarded value."""
    if isinstance(target, Guarded):
        raise use.refuse("a parameter is changed in place by activations", "write it out of place.")
    return pointwise(use, target, other, **named)


def spread(use: Use, leaf: Any, axes: int, rows: int) -> Any:
    """A guarded value as per-example copies that broadcast against ``axes`` axes with ``rows`` rows."""
    if not isinstance(leaf, Guarded):
        return leaf
    if leaf.dim() == axes and leaf.shape[0] != 1 and lies_along(leaf, rows):
        return by_row(use, leaf)
    if leaf.dim() > axes or (leaf.dim() == axes and leaf.shape[0] != 1):
        raise use.refuse(
            f"a parameter of shape {tuple(leaf.shape)} reaches into the batch axis of {axes}-dimensional activations",
            "give it a leading axis of 1, or fewer axes.",
        )
    inner = leaf.shape[1:] if leaf.dim() == axes else leaf.shape
    return use.expand(leaf, rows).reshape(rows, *[1] * (axes - 1 - len(inner)), *inner)


@rule(F.prelu, Tensor.prelu)
def prelu(use: Use, input: Tensor, weight: Tensor) -> Tensor:
    """``F.prelu`` with one slope, or one per entry of axis 1. Infinite inputs leave the slope's gradient finite."""
    if isinstance(input, Guarded) or not use.is_batched(input):
        raise use.refuse("its input does not carry the batch", "pass the activations as the first argument.")
    channels = [-1, *[1] * (input.dim() - 2)] if input.dim() > 1 else []
    slope = use.expand(weight, input.shape[0]).reshape(input.shape[0], *channels)
    return torch.where(input > 0, input, slope * input.clamp(max=0))


@rule(Tensor.expand, Tensor.broadcast_to, torch.broadcast_to, Tensor.repeat)
def expand(use: Use, value: Tensor, *sizes: Any) -> Tensor:
    """``p.expand(B, ...)``: a leading axis of 1 (or a new one) that becomes the batch; else a view of ``p`` alone."""
    flat = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], (int, torch.SymInt)) else tuple(sizes)
    repeats = use.function is Tensor.repeat
    leading_is_free = len(flat) > value.dim() or value.shape[0] == 1
    examples = use.book.examples
    if not (flat and leading_is_free and use.meets_batch(flat[0])):
        return derive(use, (value, *sizes), {}, isometric=False)
    each = use.expand(value)
    inner = value.shape[1:] if len(flat) == value.dim() else value.shape
    each = each.reshape(examples, *[1] * (len(flat) - 1 - len(inner)), *inner)
    if repeats:
        return each.repeat(1, *flat[1:])
    return each.expand(examples, *flat[1:])


@rule(Tensor.type_as)
def type_as(use: Use, value: Tensor, other: Tensor) -> Tensor:
    """Only the dtype of ``other`` is used."""
    if isinstance(value, Guarded):
        return cast(use, value, plain(value).type_as(plain(other)))
    return value.to(other.dtype)


@rule(Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.contiguous)
def to(use: Use, value: Tensor, *args: Any, **named: Any) -> Tensor:
    """A cast or copy of a guarded value is that value; an activation cast to a guarded one only reads its dtype."""
    substituted, names = tree_map(plain, (args, named))
    if isinstance(value, Guarded):
        result = use.function(plain(value), *substituted, **names)
        return cast(use, value, result) if isinstance(result, Tensor) else result
    return use.function(value, *substituted, **names)


sized(Tensor.expand, Tensor.broadcast_to, torch.broadcast_to, Tensor.repeat)
sized(Tensor.type_as, Tensor.to, Tensor.type, Tensor.contiguous)
sized(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16)

derivable(*_POINTWISE)
derivable(
    *(Tensor.view, Tensor.reshape, torch.reshape, Tensor.t, torch.t, Tensor.transpose, torch.transpose),
    *(Tensor.permute, torch.permute, Tensor.flatten, torch.flatten, Tensor.unsqueeze, torch.unsqueeze),
    *(Tensor.squeeze, torch.squeeze, Tensor.clone, torch.clone, Tensor.T.__get__, Tensor.mT.__get__),
    *(Tensor.view_as, Tensor.reshape_as, Tensor.unflatten, torch.unflatten, Tensor.H.__get__, Tensor.mH.__get__),
    *(Tensor.swapaxes, torch.swapaxes, Tensor.swapdims, torch.swapdims, Tensor.movedim, torch.movedim, Tensor.roll),
    *(torch.roll, torch.ravel, Tensor.ravel, torch.adjoint, Tensor.adjoint, Tensor.moveaxis, torch.moveaxis),
    isometric=True,
)
derivable(
    *(Tensor.__getitem__, Tensor.narrow, torch.narrow, Tensor.select, torch.select, Tensor.index_select),
    *(torch.index_select, F.embedding, torch.embedding, Tensor.chunk, torch.chunk, Tensor.split, torch.split),
    *(Tensor.unbind, torch.unbind, torch.cat, torch.stack, torch.concat, Tensor.expand_as, torch.flip, Tensor.flip),
    *(Tensor.diagonal, torch.diagonal, Tensor.diag, torch.diag, Tensor.tril, torch.tril, Tensor.triu, torch.triu),
    *(Tensor.repeat_interleave, torch.repeat_interleave, Tensor.tile, torch.tile, Tensor.gather, torch.gather),
    *(Tensor.masked_fill, torch.masked_fill, F.pad, F.interpolate, torch.hstack, torch.vstack, torch.kron),
    *(Tensor.take_along_dim, torch.take_along_dim, torch.diag_embed, Tensor.diag_embed),
)
derivable(
    *(Tensor.exp, torch.exp, Tensor.log, torch.log, Tensor.neg, torch.neg, Tensor.__neg__, Tensor.sqrt, torch.sqrt),
    *(Tensor.rsqrt, torch.rsqrt, Tensor.tanh, torch.tanh, F.tanh, Tensor.sigmoid, torch.sigmoid, F.sigmoid),
    *(Tensor.softmax, torch.softmax, F.softmax, F.softplus, F.silu, F.gelu, F.relu, torch.relu, Tensor.relu),
    *(Tensor.log_softmax, torch.log_softmax, F.log_softmax, F.logsigmoid, F.elu, F.leaky_relu, F.mish, F.normalize),
    *(Tensor.clamp, torch.clamp, Tensor.abs, torch.abs, Tensor.square, torch.square, Tensor.reciprocal),
    *(Tensor.sin, torch.sin, Tensor.cos, torch.cos, Tensor.erf, torch.erf, Tensor.log1p, torch.log1p, Tensor.expm1),
    *(torch.expm1, torch.reciprocal, torch.clip, Tensor.clip, torch.clamp_min, Tensor.clamp_min, torch.atan),
    *(Tensor.clamp_max, torch.clamp_max, torch.exp2, Tensor.exp2, torch.log2, Tensor.log2, Tensor.__abs__),
    *(torch.sign, Tensor.sign, torch.round, Tensor.round, torch.floor, Tensor.floor, torch.ceil, Tensor.ceil),
)
derivable(
    *(Tensor.sum, torch.sum, Tensor.mean, torch.mean, Tensor.var, torch.var, Tensor.std, torch.std, torch.var_mean),
    *(torch.std_mean, Tensor.prod, torch.prod, Tensor.amax, torch.amax, Tensor.amin, torch.amin, Tensor.logsumexp),
    *(torch.logsumexp, Tensor.cumsum, torch.cumsum, Tensor.norm, torch.norm, torch.linalg.norm),
    *(torch.linalg.vector_norm, torch.linalg.matrix_norm, F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm),
    *(torch._weight_norm, Tensor.matmul, torch.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.mv, Tensor.mv),
    *(torch.dot, Tensor.dot, torch.vdot, Tensor.vdot, torch.bmm, Tensor.bmm, torch.addmm, Tensor.addmm, torch.outer),
    *(torch.ger, torch.einsum, torch.tensordot, torch.inner, F.linear, F.conv1d, F.conv2d, F.conv3d),
    *(torch.matrix_exp, torch.linalg.matrix_exp, torch.linalg.solve, torch.linalg.inv, torch.inverse),
    *(torch.linalg.householder_product, torch.linalg.multi_dot, torch.trace, Tensor.trace, Tensor.det, torch.det),
)

observation(
    *(Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.layout.__get__, Tensor.ndim.__get__),
    *(Tensor.requires_grad.__get__, Tensor.is_leaf.__get__, Tensor.grad.__get__, Tensor.grad_fn.__get__),
    *(Tensor.grad.__set__, Tensor.data.__get__, Tensor.is_cuda.__get__, Tensor.is_sparse.__get__),
    *(Tensor.is_quantized.__get__, Tensor.is_meta.__get__, Tensor.is_nested.__get__, Tensor.is_mps.__get__),
    *(Tensor.itemsize.__get__, Tensor.nbytes.__get__, Tensor._version.__get__),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.is_contiguous, Tensor.__len__),
    *(Tensor.is_floating_point, torch.is_floating_point, torch.is_complex, Tensor.is_complex, Tensor.element_size),
    *(Tensor.detach, Tensor.item, Tensor.tolist, Tensor.__repr__, Tensor.__format__, Tensor.data_ptr),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor),
    *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.is_same_size, torch.numel),
    *(torch.rand_like, torch.randn_like),
    *(Tensor.get_device, Tensor.storage_offset, Tensor.untyped_storage, torch.is_tensor),
    *(torch.gt, torch.ge, torch.lt, torch.le, torch.eq, torch.ne, Tensor.gt, Tensor.ge, Tensor.lt, Tensor.le),
    *(Tensor.eq, Tensor.ne, Tensor.__gt__, Tensor.__ge__, Tensor.__lt__, Tensor.__le__, Tensor.__eq__),
    *(Tensor.__ne__, torch.greater, torch.less, Tensor.greater, Tensor.less, torch.not_equal, Tensor.not_equal),
    *(torch.isnan, torch.isinf, torch.isfinite, Tensor.isnan, Tensor.isinf, Tensor.isfinite, torch.isclose),
    *(Tensor.isclose, torch.allclose, Tensor.allclose, torch.equal, Tensor.equal, torch.any, Tensor.any, torch.all),
    *(Tensor.all, torch.argmax, Tensor.argmax, torch.argmin, Tensor.argmin, torch.argsort, Tensor.argsort),
    *(torch.count_nonzero, Tensor.count_nonzero, torch.nonzero, Tensor.nonzero, torch.signbit, Tensor.signbit),
    *(torch.logical_not, Tensor.logical_not, torch.is_nonzero, Tensor.is_nonzero, Tensor.__bool__, Tensor.__float__),
    *(Tensor.__int__, Tensor.bool, Tensor.int, Tensor.long, torch.result_type),
    Tensor.__contains__,
)
