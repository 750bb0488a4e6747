"""What a forward must leave alone: parameters, and the buffers that it left alone in the self-check.

A buffer that follows only some examples, such as the largest value so far, stands still on the few that the self-check
sees. Later it would carry private statistics from one batch into the next, and into the released model, without noise.
A buffer that moves whatever the examples are, such as a counter, tells by how often it moved how many were drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from discreet.errors import ConfigError, UnsupportedUse

WHOLE, SAMPLED = 4_096, 512
"""Tensors of up to so many entries are compared whole; of larger ones so many entries, evenly spaced."""


@dataclass(frozen=True)
class Allowed:
    """What a forward may write, because the self-check saw it do so whatever the data were.

    Attributes:
        moving: buffers that each forward moves, such as a counter; each update moves them once (`Moving`).
        tables: buffers that are not saved, and take another size as the model meets one.
    """

    moving: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()


class Watch:
    """Sees what the forwards of a model write: through torch, past autograd (``.data``), or by another tensor instead.

    Writes through torch are counted by torch. The others show in the values, of which at least `SAMPLED` of each tensor
    are compared: a write past autograd to a few rows of a large table may stay unseen. Values are read where they are,
    and compared all at once, so that an accelerator is waited for once in a batch.
    """

    def __init__(self, model: nn.Module, allowed: Allowed) -> None:
        self.allowed = allowed
        self._model = model
        self._face = _face(model)
        self._views: dict[tuple[str, ...], _Views] = {}

    @contextmanager
    def still(self, *, but: tuple[str, ...] = ()) -> Iterator[None]:
        """Refuse what the forwards inside write.

        Args:
            but: names of what the caller itself writes meanwhile.

        Raises:
            UnsupportedUse: a parameter or a buffer was written, exchanged, added or removed.
            ConfigError: the model is no longer the one that the self-check saw (`refuse_another`).
        """
        before = self._values(but)
        views = self._views.get(but)
        if views is None or views.places != _places(before):
            views = self._views[but] = _Views.of(before)
        versions, contents = _versions(before), views.contents()
        yield
        self.refuse_another()
        after = self._values(but)
        places, now = _places(after), _versions(after)
        names = [name for name in before | after if views.places.get(name) != places.get(name)]
        names = names or [name for name in before if versions[name] != now[name]] or views.unlike(contents)
        if names:
            raise UnsupportedUse(
                f"{', '.join(names)}: a forward wrote it, as no example of the self-check made it do (or the loop, "
                "between a batch and its backward): it would carry private statistics, and be saved without noise; use "
                "a layer that keeps none, and exchange averaged weights after optimizer.step(). Its batch is not "
                "released."
            )

    def refuse_another(self) -> None:
        """Refuse a model whose forward may do something else than the self-check saw.

        Raises:
            ConfigError: a module is in another mode, has other hooks, another forward, or is another one.
        """
        now = _face(self._model)
        changed = [name or "the model" for name in now | self._face if now.get(name) != self._face.get(name)]
        if changed:
            others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ConfigError(
                f"{changed[0]}{others}: not in the mode (train or eval), or not with the hooks and the forward, that "
                "the self-check saw; call model.train() and change modules before make_private, and put the mode back "
                "after an evaluation. This batch is not released."
            )

    @contextmanager
    def unmoved(self, *, but: tuple[str, ...] = ()) -> Iterator[None]:
        """`still`, and what every forward moves is put back as well: for a question that is no update of the model."""
        moving = self.moving(lambda: None)
        with self.still(but=but):
            yield
        moving.put_back()

    def moving(self, forward: Callable[[], object]) -> Moving:
        """What every forward moves, as it stands before a batch."""
        return Moving(self._model, self.allowed.moving, forward=forward)

    def _values(self, but: tuple[str, ...]) -> dict[str, Tensor]:
        apart = {*self.allowed.moving, *self.allowed.tables, *but}
        values = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        return {name: value for name, value in values.items() if name not in apart}


class Moving:
    """Buffers that every forward moves, over one batch.

    Each microbatch finds them where the batch began, and a made-up example moves them in the end: so they are the same
    whichever examples were drawn, how many, and in how many microbatches.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], *, forward: Callable[[], object]) -> None:
        self._forward = forward
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        for name in names:
            prefix, _, key = name.rpartition(".")
            buffer = model.get_buffer(name)
            self._kept.append((model.get_submodule(prefix), key, buffer, buffer.detach().clone()))

    def put_back(self) -> None:
        """Put them where the batch began; before every microbatch."""
        with torch.no_grad():
            for module, key, buffer, value in self._kept:
                buffer.copy_(value)
                module._buffers[key] = buffer

    def move(self) -> None:
        """Move them by a forward that no example takes part in; once for each batch."""
        if self._kept:
            self.put_back()
            self._forward()


@dataclass(frozen=True)
class _Views:
    """The memory of some tensors, and which of its entries are compared.

    Attributes:
        places: name -> which tensor it is, and where its memory is.
        tensors: held, so that no other takes the place of one that was let go of.
        groups: views of what is compared, by name, for each device and type.
    """

    places: dict[str, tuple[int, int]]
    tensors: tuple[Tensor, ...]
    groups: tuple[dict[str, Tensor], ...]

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> _Views:
        groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for name, value in values.items():
            view = _view(value.detach()) if _is_plain(value) else None
            if view is not None:
                groups.setdefault((value.device, value.dtype), {})[name] = view
        return cls(_places(values), tuple(values.values()), tuple(groups.values()))

    def contents(self) -> list[Tensor]:
        """The compared entries as they are now, one tensor of bytes for each group."""
        return [torch.cat(list(group.values())).view(torch.uint8) for group in self.groups]

    def unlike(self, before: list[Tensor]) -> list[str]:
        """Names of tensors whose entries are not what they were."""
        names = []
        for group, old, now in zip(self.groups, before, self.contents(), strict=True):
            if not torch.equal(old, now):
                lengths = [view.numel() * view.element_size() for view in group.values()]
                pairs = zip(group, old.split(lengths), now.split(lengths), strict=True)
                names += [name for name, one, other in pairs if not torch.equal(one, other)]
        return names


def _face(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """All modules, and what besides parameters and buffers decides what they do: modes, hooks, exchanged forwards."""
    return {
        name: (
            module,
            module.training,
            vars(module).get("forward"),
            *module._forward_pre_hooks.values(),
            *module._forward_hooks.values(),
            *module._backward_pre_hooks.values(),
            *module._backward_hooks.values(),
        )
        for name, module in model.named_modules()
    }


def _view(value: Tensor) -> Tensor | None:
    """Entries of a tensor, in the order of its memory; None where other things may stand between them."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    if value.numel() == 0 or reach > value.numel():
        return None
    step = 1 if reach <= WHOLE else -(-reach // SAMPLED)
    return value.as_strided((-(-reach // step),), (step,))


def _is_plain(value: Tensor) -> bool:
    return value.layout is torch.strided and type(value.data) is Tensor and not value.is_meta


def _places(values: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    return {name: (id(value), value.data_ptr() if _is_plain(value) else 0) for name, value in values.items()}


def _versions(values: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: value._version for name, value in values.items()}
