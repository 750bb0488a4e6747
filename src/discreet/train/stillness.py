"""What a forward must leave alone: parameters, and the buffers that it left alone in the self-check.

A buffer that follows only some examples, such as the largest value so far, stands still on the few that the self-check
sees. Later it would carry private statistics from one batch into the next, and into the released model, without noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from discreet.errors import UnsupportedUse


@contextmanager
def still(model: nn.Module, *, moving: tuple[str, ...] | None) -> Iterator[None]:
    """Refuse what the forwards inside write. No values are compared, so that an accelerator is not waited for.

    Args:
        moving: buffers that the self-check saw to move, and to depend on no example; None: nothing is refused.

    Raises:
        UnsupportedUse: a parameter or a buffer was written or exchanged. One of another size is a table that the model
            has made, or made longer, as it met a size.
    """
    held = {} if moving is None else _values(model)
    before = {name: (value, value._version) for name, value in held.items() if name not in (moving or ())}
    yield
    after = _values(model)
    for name, (value, version) in before.items():
        now = after.get(name, value)
        if (now is not value and now.shape == value.shape) or value._version != version:
            raise UnsupportedUse(
                f"{name}: a forward wrote it, as no example of the self-check made it do: it would carry private "
                "statistics, and be saved without noise; use a layer that keeps none. Its batch is not released."
            )


def _values(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
