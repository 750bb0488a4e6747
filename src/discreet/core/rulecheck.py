"""check_rule(): is the rule of a function right? The contract that a rule of the user's own must keep.

Shape legend: B = examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from discreet.core.book import Book
from discreet.core.clipping import Clipping
from discreet.core.gradient import trainable
from discreet.core.isolation import examine_isolation
from discreet.core.layout import frozen_state, take
from discreet.core.meeting import guard
from discreet.core.parameter import Guarded, function_name
from discreet.core.register import targets_of
from discreet.core.selftest import compare_with_brute_force
from discreet.errors import CheckFailed, ConfigError

Function = Callable[..., Any]


def check_rule(
    function: Function,
    arguments: Sequence[Any],
    *,
    named: Mapping[str, Any] | None = None,
    examples: int | None = None,
    reference: Function | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
) -> None:
    """Compare the rule of a function with autograd, and raise when they differ.

    The guarded output is compared with the plain one; per-example norms and the clipped sum with one example at a time,
    for B examples, for another number of them and for one, in every dtype, with all parameters trained and with each
    alone, and with the function used twice, the second time with a gradient that is not contiguous; and examples are
    replaced and removed, to see that it keeps them apart. A test and no proof: it sees these arguments.

    Args:
        function: as it was registered, or any function that has a rule.
        arguments: what to call it with. Each ``nn.Parameter`` is trained; every other tensor with dimension 0 = B holds
            examples, all different.
        named: keyword arguments, in the same way.
        examples: B >= 2, when it is not dimension 0 of the first tensor that is no parameter.
        reference: the same function with ordinary gradients, when this one has none for its parameters.
        dtypes: which to convert parameters and floating-point examples to.

    Raises:
        CheckFailed: what differs.
        UnsupportedUse: the rule refuses these arguments.
        ConfigError: no parameter, or fewer than two examples, among the arguments.
    """
    leaves, spec = tree_flatten((tuple(arguments), dict(named or {})))
    trained = [at for at, leaf in enumerate(leaves) if isinstance(leaf, nn.Parameter)]
    sizes = [leaf.shape[0] for leaf in leaves if _is_example(leaf) and leaf.dim() > 0]
    size = examples if examples is not None else (sizes or [0])[0]
    if not trained or size < 2:
        raise ConfigError(
            f"{function_name(function)}: {len(trained)} parameters and {size} examples; a rule is about both: pass an "
            "nn.Parameter, and tensors of at least 2 examples."
        )
    _check_reached(function, leaves, spec)
    subsets = [trained, *([at] for at in trained if len(trained) > 1)]
    for dtype in dtypes:
        for subset in subsets:
            for uses in (1, 2):
                model = _Caller(function, reference or function, leaves, spec, trained=subset, size=size, uses=uses)
                failed = model.to(dtype).failures(dtype)
                if failed:
                    raise CheckFailed(
                        f"{function_name(function)} in {dtype} on parameters {subset}, used {uses} times: "
                        f"{'; '.join(failed)}; correct the rule before training with it."
                    )


class _Caller(nn.Module):
    """A model that is one function, with a curved loss of all that it puts out."""

    def __init__(
        self, function: Function, reference: Function, leaves: list[Any], spec: TreeSpec, *, trained: list[int],
        size: int, uses: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.function, self.reference, self.leaves, self.spec = function, reference, leaves, spec
        self.size, self.uses = size, uses
        kept = {
            str(at): nn.Parameter(leaf.detach().clone(), requires_grad=at in trained)
            for at, leaf in enumerate(leaves)
            if isinstance(leaf, nn.Parameter)
        }
        self.weights = nn.ParameterDict(kept)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The function, or its reference when nothing is guarded."""
        guarded = any(isinstance(weight, Guarded) for weight in self.weights.values())
        called = self.function if guarded else self.reference
        leaves = [self._leaf(at, leaf, batch) for at, leaf in enumerate(self.leaves)]
        args, named = tree_unflatten(leaves, self.spec)
        return called(*args, **named)

    def _leaf(self, at: int, leaf: Any, batch: dict[str, Tensor]) -> Any:
        if isinstance(leaf, nn.Parameter):
            return self.weights[str(at)]
        return batch.get(str(at), leaf)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """One number per example that depends on every entry, curved so that scales and signs matter."""
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for use in range(self.uses):
            scaled = {k: v * (1 - 0.3 * use) if v.is_floating_point() else v for k, v in batch.items()}
            flat = model(scaled).reshape(len(batch["count"]), -1)
            flat = flat.T.contiguous().T if use else flat  # the gradient of the second use lies in another order
            direction = torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype, device=flat.device)
            total = total + (flat * direction).sum(1) + (flat * direction.flip(0)).tanh().square().sum(1)
        return total

    def failures(self, dtype: torch.dtype) -> list[str]:
        """What is wrong with the function's rule in this dtype, in words."""
        batch = {
            str(at): leaf.detach().to(dtype) if leaf.is_floating_point() else leaf
            for at, leaf in enumerate(self.leaves)
            if _is_example(leaf) and leaf.dim() > 0 and leaf.shape[0] == self.size
        }
        batch["count"] = torch.arange(self.size, device="cpu")
        found = []
        isolation = examine_isolation(self, self.loss, batch)
        if not (isolation.by_substitution and isolation.by_removal):
            found.append("examples are not kept apart")
        if not self._same_output(batch):
            found.append("the guarded output differs from the plain one")
        for part, count in ((batch, self.size), (take(batch, [0], self.size), 1)):
            verdict = compare_with_brute_force(self, self.loss, part, clipping=Clipping.automatic(), examples=count)
            wrong = [row.name.removeprefix("weights.") for row in verdict.parameters if not row.norms_agree]
            if wrong:
                found.append(f"per-example norms of parameters {', '.join(wrong)} differ for {count} examples")
            elif not verdict.sum_agrees:
                found.append(f"the clipped sum differs for {count} examples")
        return found

    def _same_output(self, batch: dict[str, Tensor]) -> bool:
        with frozen_state(self):
            plain = self(batch)
        with frozen_state(self), guard(Book(trainable(self), examples=self.size)):
            guarded = self(batch)
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(plain.dtype, 5e-2)
        scale = float(plain.detach().abs().max()) if plain.numel() else 0.0
        return plain.shape == guarded.shape and torch.allclose(guarded, plain, rtol=0, atol=tolerance * scale)


def _is_example(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter)


class _Reached(Exception):
    """Carries the first function that a parameter met."""

    def __init__(self, function: Function) -> None:
        super().__init__(function_name(function))
        self.function = function


def _raise_reached(
    cls: type, func: Function, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Any:
    raise _Reached(func)


class _Probe(Tensor):
    """Stands for a parameter, and stops at the first function that it meets."""

    __torch_function__ = classmethod(_raise_reached)


def _check_reached(function: Function, leaves: list[Any], spec: TreeSpec) -> None:
    """Raise unless the function is the first to meet its parameters: otherwise its rule is never asked."""
    args, named = tree_unflatten(
        [leaf.detach().as_subclass(_Probe) if isinstance(leaf, nn.Parameter) else leaf for leaf in leaves], spec
    )
    met = "nothing"
    try:
        function(*args, **named)
    except _Reached as reached:
        if reached.function in targets_of(function):
            return
        met = function_name(reached.function)
    raise CheckFailed(
        f"{function_name(function)}: its parameters meet {met} first, so a rule for it is never asked; decorate it "
        "with torch.overrides.wrap_torch_function(lambda ...: (every tensor argument,))."
    )
