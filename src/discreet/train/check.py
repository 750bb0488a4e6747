"""The self-check before step 0: is every parameter met, are norms right, is every example alone?

Run on a few examples, it decides by behaviour: the engine against one-example-at-a-time autograd, and the losses of
some examples against changes of the others. It catches BatchNorm, token-mean losses, auxiliary losses over the batch,
missed uses of a parameter and wrong layouts, whatever their class is called.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from discreet.core.axes import Layout
from discreet.core.clipping import Clipping
from discreet.core.gradient import LossFunction, batch_size_of
from discreet.core.isolation import IsolationVerdict, examine_isolation, first_losses_agree
from discreet.core.layout import frozen_state, take
from discreet.core.register import is_own
from discreet.core.selftest import NormVerdict, compare_with_brute_force
from discreet.errors import CheckFailed, ConfigError, UnsupportedUse
from discreet.train.elsewhere import elsewhere
from discreet.train.examples import made_up
from discreet.train.step import gradients_kept
from discreet.train.stillness import Allowed
from discreet.train.tempered import GROUPS, TEMPERATURE, Tempered


class Status(enum.Enum):
    """Outcome of one row of the check."""

    PASSED = "passed"
    UNUSED = "unused"
    FAILED = "failed"


@dataclass(frozen=True)
class CheckRow:
    """One line of the table: what was checked, how it went, and why.

    Attributes:
        own: the line is about one parameter.
    """

    name: str
    what: str
    status: Status
    detail: str
    own: bool = False


_LARGER = 8
_NOT_TAKEN = (ValueError, RuntimeError, LookupError, TypeError, ArithmeticError, AssertionError)
"""What a model may raise for a batch that nobody gave."""
_REACHED = "norms agree wherever the examples of the check reach it; it gets noise in any case"


@dataclass(frozen=True)
class CheckReport:
    """Result of the self-check. Holds verdicts, names and shapes only: nothing in it is a value from the data.

    Yet some of it follows from the examples of the check: which parameters they use, what their lengths are. So what a
    run publishes of it is `released`, and nothing else.

    Attributes:
        rows: in the order in which they were checked.
        layout: how each use carries the batch; hand it to `clipped_gradient` to accept folded axes. None when anything
            failed: a layout is what the norms have shown it to be.
        allowed: what a forward writes, whatever the data are: counters, and tables that follow from sizes.
    """

    rows: tuple[CheckRow, ...]
    layout: Layout | None
    allowed: Allowed = field(default_factory=Allowed)

    @property
    def passed(self) -> bool:
        """Whether nothing failed. Unused parameters are no failure: they get noise."""
        return all(row.status is not Status.FAILED for row in self.rows)

    def table(self) -> str:
        """The rows as aligned text."""
        header = ("name", "checked", "status", "detail")
        cells = [header, *((row.name, row.what, row.status.value, row.detail) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(3)]
        return "\n".join(
            "  ".join([*(text.ljust(width) for text, width in zip(line[:3], widths, strict=True)), line[3]]).rstrip()
            for line in cells
        )

    def to_json(self) -> dict[str, Any]:
        """All rows, for whoever may see the examples of the check."""
        rows = [
            {"name": row.name, "what": row.what, "status": row.status.value, "detail": row.detail} for row in self.rows
        ]
        return {"passed": self.passed, "rows": rows}

    def released(self) -> dict[str, Any]:
        """The record of a check that passed, as it stands in ``check.json``: the same for all examples.

        Names and shapes are those of the model. Which parameters the examples reached, by which functions and at what
        lengths is left out: on private examples that is a release without noise.
        """
        assert self.passed
        rows = [
            {"name": row.name, "what": row.what, "status": Status.PASSED.value, "detail": _REACHED if row.own else "ok"}
            for row in self.rows
        ]
        return {"passed": True, "rows": rows}

    def with_data_set(self, *, again: bool, alone: bool) -> CheckReport:
        """The same, and whether the data set gives each example again, and whichever are fetched with it."""
        detail = (
            "what the data set or its collate function makes of an example depends on those that are fetched with it "
            "(mixup, a standardisation, a number of the whole batch); do it within each example."
        )
        row = _verdict_row("isolation", "examples when others are fetched with them", alone, detail)
        detail = (
            "the data set gives another example each time, under the same seeds of torch, numpy and random (a "
            "generator of its own, as some augmentation packages have, a counter, a change in place), so that nothing "
            "of it can be checked or repeated; seed that in __getitem__, from torch: rng = "
            "numpy.random.default_rng(int(torch.randint(2**31, ())))."
        )
        first = _verdict_row("data", "examples when they are fetched again", again, detail)
        return replace(self, rows=(*self.rows, first, row))

    def raise_if_failed(self) -> None:
        """Raise `CheckFailed` with every failed row, if any; what two rows say alike is said once."""
        failed = dict.fromkeys(f"{row.name}: {row.detail}" for row in self.rows if row.status is Status.FAILED)
        if failed:
            raise CheckFailed("the self-check failed, so no private training starts: " + " | ".join(failed))


def check(
    model: nn.Module,
    loss: LossFunction,
    batch: Any,
    *,
    clipping: Clipping | None = None,
    examples: int | None = None,
) -> CheckReport:
    """Check a model and a loss on one small batch, without changing either.

    **Guarantees.** Coverage, norms and the clipped sum are compared with autograd at two batch sizes, and on examples
    made up from these; isolation is tested by replacing, removing and adding examples; buffers that a forward changes
    depending on the data are named, and parameters that it writes at all; the loss of a `Tempered` model must depend on
    its temperature. The check is a test and no proof: it sees the control flow that these examples take.

    Args:
        model: as it will be trained (its mode is kept; buffers, gradients and random state are put back; a parameter
            that its own forward writes is not).
        loss: per-example losses, ``loss(model, batch) -> (B,)``.
        batch: 2 to about 8 examples, all different.
        clipping: the clipping function to compare the sum under; automatic by default.
        examples: B, when it cannot be read off the batch.
    """
    size = examples if examples is not None else batch_size_of(batch)
    if size < 2:
        raise ConfigError(f"a check batch of {size}: isolation needs at least 2 examples; pass 4.")
    with gradients_kept(model):
        return _checked(model, _unchanging(loss), batch, clipping or Clipping.automatic(), size)


def _unchanging(loss: LossFunction) -> LossFunction:
    """The same loss, refused where it changes its batch: what asks for losses twice, as this check does, gets others.

    Raises:
        ConfigError: it takes something out, puts something in, or writes into a tensor.
    """

    def versions(leaves: Sequence[Any]) -> list[int]:
        return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]

    def watched(model: nn.Module, batch: Any) -> Tensor:
        leaves, structure = tree_flatten(batch)
        written = versions(leaves)
        losses = loss(model, batch)
        after, other = tree_flatten(batch)
        same = structure == other and all(one is two for one, two in zip(leaves, after, strict=True))
        if not same or versions(leaves) != written:
            raise ConfigError(
                "the loss changes its batch (takes labels out of it, writes into a tensor): asked again, it would give "
                "other losses; let it begin with a copy, batch = dict(batch) or x = x.clone()."
            )
        return losses

    return watched


def _checked(model: nn.Module, loss: LossFunction, batch: Any, clipping: Clipping, size: int) -> CheckReport:
    alone = examine_isolation(model, loss, batch, examples=size)
    moving = _moving_rows(model, loss, batch, size, alone.moving)
    isolation = (*_isolation_rows(alone), *moving)
    if alone.resized:
        # No gradient can be compared with one that a forward of another size has.
        return CheckReport(rows=isolation, layout=None)
    isolation = (*isolation, _larger_row(model, loss, batch, size))
    others = elsewhere(batch, size=size, takes=lambda other: _takes(model, loss, other))
    try:
        verdict = compare_with_brute_force(model, loss, batch, clipping=clipping, examples=size, elsewhere=others)
    except UnsupportedUse as refusal:
        row = CheckRow("coverage", "every use of a parameter has a rule", Status.FAILED, str(refusal))
        return CheckReport(rows=(*isolation, row), layout=None)
    detail = (
        "an example's gradient depends on other examples although its loss does not (a hook, or a straight-through "
        "estimator, scaled by a statistic of the batch); scale it by a constant, or within each example."
    )
    alone_row = _verdict_row("isolation", "gradients when the others are replaced", verdict.isolated, detail)
    detail = (
        "on examples made up from these, gradients are not those of autograd: the model puts its batch in an order "
        "that follows from the data (sorted by a key or a length), or couples examples that these leave apart; keep "
        "each example at its place."
    )
    elsewhere_row = _verdict_row("isolation", "gradients of made-up examples", verdict.agrees_elsewhere, detail)
    rows = (*isolation, alone_row, elsewhere_row, *_norm_rows(verdict), *_tempered_rows(model, verdict))
    report = CheckReport(rows=rows, layout=verdict.layout, allowed=Allowed(alone.moving, alone.tables))
    return report if report.passed else replace(report, layout=None)


def _isolation_rows(verdict: IsolationVerdict) -> tuple[CheckRow, ...]:
    remedy = (
        "an example's loss depends on other examples (batch statistics, a mean over the batch's tokens, an auxiliary "
        "or contrastive loss); use GroupNorm or LayerNorm, and average within each example. Random numbers of numpy or "
        "of a generator of its own look like that: draw them by torch, unseeded."
    )
    rows = [
        _verdict_row("isolation", "losses when another example is replaced", verdict.by_substitution, remedy),
        _verdict_row("isolation", "losses when other examples are removed", verdict.by_removal, remedy),
    ]
    detail = (
        f"{', '.join(verdict.buffers)}: a forward writes private statistics here, and they would be saved without "
        "noise; use a layer without running statistics, and let no forward write a parameter."
    )
    what = "no buffer learns from the data, and no forward writes a parameter"
    rows.append(_verdict_row("buffers", what, not verdict.buffers, detail))
    detail = (
        f"{', '.join(verdict.resized)}: a forward gives it another size, and how large it is when it is saved would "
        "tell of the examples; make it as large as it will be before training, or, where it follows from sizes alone, "
        "register it with persistent=False."
    )
    rows.append(_verdict_row("buffers", "no buffer that is saved changes its size", not verdict.resized, detail))
    return tuple(rows)


def _larger_row(model: nn.Module, loss: LossFunction, batch: Any, size: int) -> CheckRow:
    """Whether losses stay what they are in a batch as large as those of training, made of the same examples again."""
    larger = take(batch, [row % size for row in range(_LARGER * size)], size)
    try:
        same = first_losses_agree(model, loss, (batch, size), (larger, _LARGER * size), first=size)
    except _NOT_TAKEN:
        same = True  # nor would it be in training
    detail = (
        "in a larger batch an example's loss is another one (negatives or statistics from so many examples on, room "
        "for so many tokens); take each example by itself at every size."
    )
    return _verdict_row("isolation", "losses in a larger batch", same, detail)


def _moving_rows(
    model: nn.Module, loss: LossFunction, batch: Any, size: int, moving: tuple[str, ...]
) -> tuple[CheckRow, ...]:
    """Whether a made-up example can move what every forward moves, as it will once for each update."""
    if not moving:
        return ()
    what, works = (
        "a made-up example moves what every forward moves",
        _takes(model, loss, made_up(take(batch, [0], size))),
    )
    detail = (
        f"{', '.join(moving)}: every forward moves it, so it would tell how many examples were drawn; training moves "
        "it by a made-up example instead (random numbers, zeros for whole ones), which this model does not take; count "
        "in your own loop."
    )
    return (_verdict_row("buffers", what, works, detail),)


def _takes(model: nn.Module, loss: LossFunction, batch: Any) -> bool:
    """Whether a model has losses for a batch that nobody gave."""
    try:
        with frozen_state(model):
            loss(model, batch)
    except _NOT_TAKEN:
        return False
    return True


def _norm_rows(verdict: NormVerdict) -> tuple[CheckRow, ...]:
    rows = []
    for parameter in verdict.parameters:
        if parameter.norms_agree and not (parameter.functions and parameter.reached):
            met = ", ".join(parameter.functions)
            detail = f"met by {met}; no gradient of these examples reaches it, so there was nothing to compare"
            if not parameter.functions:
                detail = "not used by these examples; it is part of every release and gets noise"
            rows.append(CheckRow(parameter.name, _shape(parameter.shape), Status.UNUSED, detail, own=True))
            continue
        met = ", ".join(parameter.functions) or "no function"
        name, shape = parameter.name, _shape(parameter.shape)
        if parameter.norms_agree:
            how = "".join(f"; {route}" for route in parameter.routes)
            rows.append(CheckRow(name, shape, Status.PASSED, f"norms agree; {met}{how}", own=True))
            continue
        own = [name for name in parameter.functions if is_own(name)]
        remedy = f"correct the rule of {', '.join(own)} (discreet.check_rule)" if own else "report it"
        detail = f"met by {met}; norms differ from autograd by more than {verdict.tolerance:g}: do not train; {remedy}."
        rows.append(CheckRow(name, shape, Status.FAILED, detail, own=True))
    detail = f"differs from brute force by more than {verdict.tolerance:g}: do not train; report it."
    rows.append(_verdict_row("clipped sum", "against one example at a time", verdict.sum_agrees, detail))
    return tuple(rows)


def _tempered_rows(model: nn.Module, verdict: NormVerdict) -> tuple[CheckRow, ...]:
    """Whether a loss knows of the temperature beside the model, which has a share of the budget and is believed later.

    Asked of the graph and not of the numbers: a gradient may well be zero on these examples, such as those that the
    loss ignores, or where all logits are equal.
    """
    if not isinstance(model, Tempered):
        return ()
    unknown = [each.name for each in verdict.parameters if each.name in GROUPS and not each.connected]
    detail = (
        f"{', '.join(unknown)}: no loss depends on it, so it would stay as it began, and noise would be paid for it; "
        "train with discreet.tempered_cross_entropy, or train the bare model."
    )
    return (_verdict_row(TEMPERATURE, "the loss depends on temperature and floor", not unknown, detail),)


def _verdict_row(name: str, what: str, passed: bool, failure: str) -> CheckRow:
    return CheckRow(name, what, Status.PASSED if passed else Status.FAILED, "ok" if passed else failure)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape) or "scalar"
