"""What one backward pass books, and how it is settled into a clipped sum.

Every use of a guarded parameter books the per-example gradient of the value it used, as a `Form`. When the backward is
over, the records of each parameter give its per-example norm, all norms give the factors, and the factors give each
parameter's weighted gradient. Norms belong to the parameter and not to the use: a parameter used twice gets one norm,
cross terms included.

Shape legend: B = examples of the microbatch.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from discreet.core.axes import Layout
from discreet.core.classifier import Classifier
from discreet.core.clipping import BELOW, Clipping, Division
from discreet.core.forms import Dense, Form, drop_vanishing, wide_dtype
from discreet.core.precision import full_precision
from discreet.core.recording import Recording
from discreet.core.route import Route
from discreet.core.routing import Trail
from discreet.core.uses import Derivation, Part, Record, Uses, arranged, identity_of, zeros_like_sums
from discreet.errors import UnsupportedUse


def _stream_of(value: Tensor) -> torch.cuda.Stream | None:
    """Where work on a value is queued now; None on a processor, which does it at once."""
    return torch.cuda.current_stream(value.device) if value.is_cuda else None


class Book(Classifier):
    """Records of one microbatch, from its forward to its settlement.

    Args:
        parameters: name -> guarded parameter; each object once.
        examples, layout, trust_folds, batch: as for a `Classifier`.
        clipping: how it will be settled. With it, groups of parameters are settled as soon as their norms are complete.
        recording: the settlement is recorded, and asks the data nothing.
        at_most: the most examples that any microbatch of this batch may have: its factors must not tell how it is cut.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        examples: int,
        layout: Layout | None = None,
        trust_folds: bool = False,
        clipping: Clipping | None = None,
        recording: Recording | None = None,
        at_most: int = 0,
        batch: Any = None,
    ) -> None:
        super().__init__(examples=examples, layout=layout, trust_folds=trust_folds, batch=batch)
        self.parameters = dict(parameters)
        self.compiled = self.as_written = False
        self.casts: set[torch.dtype] = set()
        self.holds: list[object] = []
        self.trail = Trail(examples)
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._records: dict[str, list[tuple[int, Record]]] = defaultdict(list)
        self._expected: dict[str, int] = defaultdict(int)
        self._collecting = False
        self._clipping, self._recording = clipping, recording
        self._company = max(examples, at_most)
        self._sums: dict[str, Tensor] = {}
        self._division = clipping.divide(self.parameters) if clipping is not None else Division({}, {}, 0.0)
        groups = self._division.groups
        self._group_of = {name: group for group in groups for name in group} if len(groups) > 1 else {}
        # Asked for now: of a guarded parameter every attribute is a call that is met.
        self._dtypes = {name: wide_dtype(parameter) for name, parameter in self.parameters.items()}
        self._rounds = torch.float32 in self._dtypes.values()
        self._derivations: dict[int, tuple[object, Derivation]] = {}
        first = next(iter(self.parameters.values()))
        self.sink = torch.zeros(examples, device=first.device, requires_grad=True)
        self._end = torch.autograd.graph.get_gradient_edge(self.sink).node
        self._streams: set[torch.cuda.Stream] = set()

    @property
    def settles_early(self) -> bool:
        """Whether a record may be the last of its group, and free all that the group has booked."""
        return bool(self._group_of)

    def name_of(self, parameter: Tensor) -> str:
        """The name under which a parameter is guarded."""
        try:
            return self._names[id(parameter)]
        except KeyError:
            raise UnsupportedUse(
                f"a guarded parameter of shape {tuple(parameter.shape)} does not belong to this model: it was copied "
                "or added after guarding; make the copy before training starts."
            ) from None

    def derivation_of(self, parameter: Tensor) -> Derivation:
        """A guarded parameter as the origin of itself; known anew where its memory was exchanged (``p.data = ...``)."""
        known, memory = self._derivations.get(id(parameter)), identity_of(parameter)
        if known is None or known[0] != memory:
            name = self.name_of(parameter)
            known = self._derivations[id(parameter)] = (memory, Derivation.of(name, parameter))
            if wide_dtype(parameter) is torch.float32:  # whatever the book was opened with
                self._dtypes[name] = torch.float32
        return known[1]

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Book what backward passes inside report; others (``autograd.grad`` within a forward) train nothing."""
        self._collecting = True
        self.trail.forget()  # the backward frees the graph as it goes
        try:
            yield
        finally:
            self._collecting = False
            self._catch_up()

    def _catch_up(self) -> None:
        """Let the accelerator's queue wait for those of a forward's own: its backward made there what is booked."""
        here = _stream_of(self.sink)
        if here is not None:
            for other in self._streams - {here}:
                here.wait_stream(other)

    def expect(self, derivation: Derivation) -> None:
        """Announce, from the forward, a use that will be recorded in the backward."""
        for name in derivation.names:
            self._expected[name] += 1
        if self._collecting:
            # A forward inside the backward (activation checkpointing): what is still to come can no longer be counted.
            self._group_of = {}

    def record(self, derivation: Derivation, form: Form) -> None:
        """Book one use; called from inside the backward.

        Raises:
            UnsupportedUse: its group has been settled, so that its norm did not know of this use; or the gradients are
                of another shape than the parameter.
        """
        if not self._collecting or not torch._C._will_engine_execute_node(self._end):
            return  # asked for other gradients than the parameters', maybe from inside the backward that trains
        if derivation.identity and form.shape != derivation.sources[0].shape:
            raise UnsupportedUse(
                f"{', '.join(derivation.names)}: its shape {tuple(derivation.sources[0].shape)} is spread over "
                f"{tuple(form.shape)} by the function that it meets; give it that shape, or expand it before."
            )
        late = [name for name in derivation.names if name in self._sums] if self._sums else []
        if late:
            raise UnsupportedUse(
                f"{', '.join(late)}: another gradient came after its group was settled (a backward through part of the "
                "graph, or activation checkpointing that splits a group); use the flat clipping style."
            )
        if (stream := _stream_of(self.sink)) is not None:
            self._streams.add(stream)
        form = form.detached()
        self._rounds = self._rounds or form.rounds  # also where a float64 parameter was cast, or got other memory
        is_dense = type(form) is Dense  # most records are, and to ask an abstract class takes longer
        choice = None if is_dense else form.choice
        if not is_dense and (choice is None or choice.route is Route.KEEP):
            with full_precision():
                form = form.reduced()
        record = Record.of(derivation, form, choice)
        for position, name in enumerate(derivation.names):
            self._expected[name] -= 1
            self._records[name].append((position, record))
        if self._group_of:
            for group in {self._group_of[name]: None for name in derivation.names}:
                if all(self._expected[name] <= 0 for name in group):
                    self._catch_up()
                    with full_precision():
                        self._settle_group(group)

    def kept(self, constant: object) -> object:
        """What to remember of an argument that a derivation will be replayed with: itself."""
        return constant

    def discard(self) -> None:
        """Forget what was booked."""
        self._records.clear()
        self.trail.forget()

    def settle(self, clipping: Clipping) -> dict[str, Tensor]:
        """Clip and sum: name -> ``sum_b factor_b G_b``, at least float32; the records are freed.

        Parameters that this microbatch did not use get zeros: they are part of every sum.
        """
        assert self._clipping in (None, clipping)
        if self.verified is not None:
            self.verified.check_counts(self._meetings)
        self._division = clipping.divide(self.parameters)
        with full_precision():
            for group in self._division.groups:
                if group[0] not in self._sums:
                    self._settle_group(group)
        sums, self._sums = self._sums, {}
        self.discard()
        count = {BELOW: sums[BELOW]} if BELOW in sums else {}
        return {name: sums[name] for name in self.parameters} | count

    def _settle_group(self, group: tuple[str, ...]) -> None:
        """Norms over these parameters, factors, and their sums."""
        rule = self._division.rules[group]
        parts = self.parts(group)
        norm_B, all_finite = self._norms(parts)
        factor_B = drop_vanishing(rule.factor(norm_B), bound=rule.clip_bound, largest=rule.largest_factor)
        if self._rounds:
            factor_B = factor_B * rule.margin(self._company)
        if self._recording is not None:
            factor_B = torch.where(self._recording.takes_part_B, factor_B, 0.0)
        if rule.following is not None:
            # The mean over groups, so that one example counts once; exact, but for 2^-53 where K is no power of 2.
            count = rule.below(norm_B).reshape(1) / len(self._division.groups)
            self._sums[BELOW] = self._sums[BELOW] + count if BELOW in self._sums else count
        bad = None if all_finite else ~torch.isfinite(norm_B)
        summands = [summand for part in parts for summand in part.summands()]
        parts.clear()
        while summands:
            for name, total in summands.pop().weighted_sums(factor_B, bad):
                self._sums[name] = total.to(self._dtypes[name])
                del self._records[name]
        unused = {name: self.parameters[name] for name in group if name not in self._sums}
        self._sums.update(zeros_like_sums(unused))

    def parts(self, names: tuple[str, ...]) -> list[Part]:
        """What these parameters' norms are taken from; asked for once, as joining uses may overwrite them."""
        changed = {name: None for name in names for _, record in self._records.get(name, ()) if record.changed}
        if changed:
            raise UnsupportedUse(
                f"{', '.join(changed)}: a gradient or an activation was changed in place after it was booked (by a "
                "hook or a custom Function); change a copy of it."
            )
        return arranged(names, self._records, self.examples, self._company)

    def _norms(self, parts: Sequence[Part]) -> tuple[Tensor, bool]:
        """Norms over these parts, (B,), float64, and whether all are known to be finite.

        The fast way first; the sure way for the examples that it has a doubt about, and for no other: what it adds for
        rounding is part of an example's factor, which must not change with the company that the example keeps. The
        doubt is all that is ever asked of the data: an accelerator is waited for once a group.
        """
        if parts:
            norm_B = torch.stack([part.quick_norm2() for part in parts]).sum(0).sqrt()
        else:
            norm_B = torch.zeros(self.examples, dtype=torch.float64, device=self.sink.device)
        if self._recording is not None and self._recording.answer is not None:
            self._recording.note(norm_B, groups=len(self._division.groups))
            return norm_B, True
        if math.isfinite(norm_B.sum()):
            return norm_B, True
        sure_B = torch.stack([part.doubted_norm2() for part in parts]).sum(0).sqrt()
        return torch.where(torch.isfinite(norm_B), norm_B, sure_B), False

    def parameter_norms(self, *, sure: bool = False) -> dict[str, Tensor]:
        """Per-example norms of each used parameter, name -> (B,), as training takes them, or the sure way.

        For the self-check.
        """
        norms = {}
        with full_precision():
            for name, records in self._records.items():
                uses = Uses.of(name, records, self.examples, self._company)
                if uses.joined is not None:
                    self._records[name] = [(0, uses.joined)]  # joining may overwrite what it joins: once, and no more
                norms[name] = uses.norm2().sqrt() if sure else self._norms([uses])[0]
        return norms

    def grams(self) -> dict[str, Tensor]:
        """Inner products between the gradients of a used parameter, name -> (B, B): the tangent kernel of the losses.

        For a handful of public examples: where uses are not of one form, their gradients are instantiated.
        """
        with full_precision():
            return {
                name: Uses.of(name, records, self.examples, self._company).gram()
                for name, records in self._records.items()
            }

    def routes(self) -> dict[str, tuple[str, ...]]:
        """For each used parameter, how its norms are taken and why, from shapes alone: name -> one line a use."""
        return {
            name: tuple(dict.fromkeys(str(record.choice) for _, record in self._records[name] if record.choice))
            for name in self.parameters
            if name in self._records
        }

    def open_routes(self) -> tuple[Route, ...]:
        """All routes that some norm of this book could have taken at other sizes."""
        choices = [record.choice for records in self._records.values() for _, record in records]
        return tuple(dict.fromkeys(route for choice in choices if choice is not None for route in choice.routes))
