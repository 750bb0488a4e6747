"""Whose row is it? The examples behind rows that a model picked from its batch, as a mixture of experts does.

A router sends each token to a few experts; what reaches an expert is ``x[index]``, in an order and a number that the
data decide. The autograd graph remembers the index. So the rows' examples are read off the graph: from the operand
back, through operations that keep rows apart, to the picking. Where it says nothing, nothing is concluded; where it
contradicts itself, the use is refused.

What was picked from is (B, k) rows, taken as any folded axis is: declared by a verified layout.

Shape legend: B = examples, S = picked rows, N = rows that they were picked from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_NODES = 64
_LAST = (1 << 64) - 1  # how the graph writes axis -1

_ROWWISE = frozenset(
    f"{name}Backward{version}"
    for name in (
        *("Mul", "Add", "Sub", "Div", "Neg", "Pow", "Exp", "Log", "Abs", "Sqrt", "Rsqrt", "Reciprocal", "Clamp"),
        *("ClampMin", "ClampMax", "Silu", "Gelu", "Relu", "LeakyRelu", "Elu", "Sigmoid", "Tanh", "Softplus", "Mish"),
        *("Hardswish", "Hardtanh", "Sin", "Cos", "ToCopy", "Clone", "MaskedFill", "NativeDropout", "NativeLayerNorm"),
    )
    for version in (0, 1)
)
_BY_AXIS = frozenset(
    f"{name}Backward0" for name in ("Split", "SplitWithSizes", "Slice", "Softmax", "Unsqueeze", "Select")
)
_PRODUCTS = {"MmBackward0": 0, "AddmmBackward0": 1}
_TURNS = frozenset({"FlipBackward0", "RollBackward0", "Rot90Backward0"})
_MIXES = frozenset({"GatherBackward0", "SortBackward0", "TopkBackward0"})
_JOINS = frozenset({"CatBackward0", "StackBackward0"})
_PIECES = frozenset({"SplitBackward0", "SplitWithSizesBackward0", "UnbindBackward0"})
_VIEWS = frozenset({"ViewBackward0", "ReshapeAliasBackward0"})


class Given:
    """The tensors of a batch, by their memory: a view of one of them says by itself whose its rows are.

    ``ids.view(-1, T)`` or ``frames.flatten(0, 1)`` of what the data set gave has no graph to walk back through, but
    each of its rows lies in the memory of an example.
    """

    def __init__(self, batch: Any, examples: int) -> None:
        self._examples = examples
        self._leaves = [leaf for leaf in tree_leaves(batch) if _is_whole(leaf, examples)]

    def in_order(self, operand: Tensor) -> bool:
        """Whether row i of an operand lies in the memory of example ``i // (rows / B)`` of one of the tensors."""
        rows = operand.shape[0] if type(operand) is Tensor and operand.dim() else 0
        if rows == 0 or rows % self._examples or operand.layout is not torch.strided:
            return False
        folds, (step, *inner) = rows // self._examples, operand.stride()
        reach = (folds - 1) * step + sum((n - 1) * gap for n, gap in zip(operand.shape[1:], inner, strict=True))
        return any(
            leaf.dtype == operand.dtype
            and leaf.untyped_storage().data_ptr() == operand.untyped_storage().data_ptr()
            and leaf.stride(0) == folds * step
            and 0 <= operand.storage_offset() - leaf.storage_offset() < leaf.stride(0) - reach
            for leaf in self._leaves
        )


def _is_whole(leaf: object, examples: int) -> bool:
    """Whether this is a tensor of B rows that lie one after the other in memory."""
    dense = isinstance(leaf, Tensor) and type(leaf.data) is Tensor and leaf.layout is torch.strided
    if not dense or leaf.dim() == 0 or leaf.shape[0] != examples or leaf.numel() == 0:
        return False
    reach = sum((size - 1) * step for size, step in zip(leaf.shape[1:], leaf.stride()[1:], strict=True))
    return reach < leaf.stride(0)


@dataclass(frozen=True)
class Picking:
    """Where the rows of an operand come from.

    Attributes:
        owner: the example behind each row, (S,); None when the graph contradicts itself.
        source_rows: N.
    """

    owner: Tensor | None
    source_rows: int

    def in_order(self, examples: int) -> bool:
        """Whether row i belongs to example ``i // (S / B)``, as in any folded axis."""
        if self.owner is None or len(self.owner) % examples:
            return False
        straight = torch.arange(len(self.owner), device=self.owner.device) // (len(self.owner) // examples)
        return bool(torch.equal(self.owner, straight))


def _is_first(node: Any, dim: int) -> bool:
    """Whether this is dimension 0 of what the node returns: the graph writes -2 as it was written."""
    return dim in (0, _LAST + 1 - len(node._input_metadata[0].shape))


def _place(node: Any, at: int) -> int | None:
    """Where a piece of rows begins, or how many come before it; None of what is no such piece."""
    name = node.name() if node is not None else ""
    if name in _PIECES and node._saved_dim == 0:
        return at
    if name in ("SliceBackward0", "SelectBackward0") and node._saved_dim == 0:
        return int(node._saved_start if name == "SliceBackward0" else node._saved_index)
    return None


class Trail:
    """Walks back through the graph of one forward: what an earlier walk found is not looked for again.

    Each walk is bounded, because most activations were never picked.
    """

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self._known: dict[Any, Picking | None] = {}
        self._new: list[Any] = []

    def trace(self, operand: Tensor) -> Picking | None:
        """The examples behind the rows of an activation, or None when no picking is in sight."""
        if operand.dim() < 2 or operand.grad_fn is None or operand.shape[0] == 0:
            return None
        found = self.back(operand.grad_fn, operand.shape[0])
        if len(self._new) >= _NODES:  # cut short: a walk that begins further back would see further
            for node in self._new:
                del self._known[node]
        self._new = []
        return found

    def forget(self) -> None:
        """Let go of the graph: it holds the book that holds this, in a circle that no collector sees."""
        self._known.clear()

    def back(self, node: Any, rows: int) -> Picking | None:
        """What the graph says about the rows of this node's output."""
        walked, found = [], None
        while node is not None:
            if node in self._known:
                found = self._known[node]
                break
            if len(self._new) >= _NODES:
                break
            self._new.append(node)
            walked.append(node)
            self._known[node] = None
            name, sources = node.name(), node.next_functions
            if len(sources) == 1 and name in _ROWWISE:
                node = sources[0][0]
            elif isinstance(node, torch.autograd.function.BackwardCFunction):
                # One of ours names the input that has them.
                at = getattr(node, "rows_of", None)
                node = None if at is None else sources[at][0]
            else:
                found = self._through(node, name, rows)
                break
        for node in walked:
            self._known[node] = found
        return found

    def _through(self, node: Any, name: str, rows: int) -> Picking | None:
        if name in _ROWWISE:
            return self._agreed([self.back(following, rows) for following, _ in node.next_functions if following])
        if name == "IndexBackward0":
            return self._picked(node, node._saved_indices, rows)
        if name == "IndexSelectBackward0" and _is_first(node, node._saved_dim):
            return self._picked(node, (node._saved_index,), rows)
        moved = node._saved_dims if name in _TURNS else (node._saved_dim,) if name in _MIXES else ()
        if any(_is_first(node, dim) for dim in moved):
            return Picking(None, rows)
        if name in _PRODUCTS:  # by a frozen weight: the rows are those of the left operand
            left = node.next_functions[_PRODUCTS[name]][0]
            if left is None and name == "MmBackward0" and tuple(node._saved_self_sym_sizes) == (rows, rows) != (1, 1):
                return Picking(None, rows)  # by a frozen matrix from the left, which may put them anywhere
            return self.back(left, rows)
        if name in _JOINS and _is_first(node, node._saved_dim):
            places = [place for part, at in node.next_functions if (place := _place(part, at)) is not None]
            apart = places != sorted(places) or any(self.back(part, rows) for part, _ in node.next_functions)
            return Picking(None, rows) if apart else None
        keeps_rows = (name in _BY_AXIS and (0 < node._saved_dim < 8 or node._saved_dim == _LAST)) or (
            name in _VIEWS and node._saved_self_sym_sizes[0] == rows
        )
        return self.back(node.next_functions[0][0], rows) if keeps_rows else None

    def _agreed(self, pickings: list[Picking | None]) -> Picking | None:
        """What all operands of one operation say. One that says nothing is in the batch's order, or contradicts."""
        found = [picking for picking in pickings if picking is not None]
        if not found:
            return None
        if len(found) < len(pickings) and all(self._is_untouched(picking) for picking in found):
            return None
        head = found[0]
        same = len(found) == len(pickings) and all(
            head.owner is not None and picking.owner is not None and torch.equal(head.owner, picking.owner)
            for picking in found
        )
        return head if same else replace(head, owner=None)

    def _is_untouched(self, picking: Picking) -> bool:
        """Whether all rows were picked, in order: put back after a sort, or an expert that everyone goes to."""
        return (
            picking.in_order(self.examples) and picking.owner is not None and len(picking.owner) == picking.source_rows
        )

    def _picked(self, node: Any, indices: tuple[Tensor | None, ...], rows: int) -> Picking | None:
        source = node.next_functions[0][0]
        sizes = node._saved_self_sym_sizes
        first = indices[0]
        if first is None:
            return self.back(source, rows)
        count = int(sizes[0])
        if first.dtype is torch.bool:
            if first.dim() != 1:
                return Picking(None, count)
            first = first.nonzero()[:, 0]
        if first.dim() != 1 or len(first) != rows or any(i is not None and i.dim() > 1 for i in indices[1:]):
            return Picking(None, count)
        first = torch.where(first < 0, first + count, first)
        before = self.back(source, count)
        if before is not None:
            return replace(before, owner=None if before.owner is None else before.owner[first])
        return Picking(first // (count // self.examples) if count % self.examples == 0 else None, count)
