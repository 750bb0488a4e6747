"""Which sum each step stood for: the last guard against the same noise on two sums.

A step may be repeated under its key only if its sum is the same, bit by bit. The record of the environment names what
is known to change a sum; this journal compares the sums themselves, and so catches everything else: a constant in a
closure, another mode of a module, a transform with its own random numbers, an accelerator that adds in another order.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from discreet.core.clipping import ClippedSum
from discreet.core.kernels import dispatch
from discreet.core.rng import subkey
from discreet.privacy.ledger import key_id
from discreet.train.secret_files import append_secret, cut_secret, replace_secret, sync

_DIGEST_BYTES = 16


class SumJournal:
    """Keyed digests of the sums that were released under one key, in the private half of a run.

    **Guarantees.** A digest is with the operating system before the noise of its step exists, so the death of the
    process loses none. They are synced before further steps are charged: a power failure can lose those of the block
    of steps that was charged last, for which the record of the environment then stands alone; if others are missing,
    it is seen. The digests are keyed, so that they tell nothing once the key is destroyed.

    Attributes:
        whole: the file was there and every finished line was readable. A new file is whole only when nothing was
        released.

    Args:
        path: the file, shared by all keys of the run; created with the first digest.
        key: the run's key.
    """

    def __init__(self, path: Path, *, key: bytes) -> None:
        self._path = path
        self._key_id = key_id(key)
        self._digest_key = subkey(key, "digests of sums")
        self._known: dict[int, str] = {}
        self.whole = path.exists()
        if self.whole:
            self._read(path.read_bytes())

    @property
    def steps(self) -> frozenset[int]:
        """Steps of the key whose sums are noted."""
        return frozenset(self._known)

    def sync(self) -> None:
        """Make everything that is noted durable."""
        sync(self._path)

    def restart(self) -> None:
        """Begin an empty journal, durably: for a key under which nothing was released yet."""
        replace_secret(self._path, b"")
        self._known.clear()
        self.whole = True

    def admits(self, step: int, total: ClippedSum) -> bool:
        """Note the sum of a step, ahead of its release. False when another one was noted under this key.

        Raises:
            OSError: it cannot be noted; nothing may be released.
        """
        digest = self._digest(total)
        if step in self._known:
            return self._known[step] == digest
        append_secret(self._path, f"{self._key_id} {step} {digest}\n".encode("ascii"))
        self._known[step] = digest
        return True

    def _digest(self, total: ClippedSum) -> str:
        digest = hashlib.blake2b(key=self._digest_key, digest_size=_DIGEST_BYTES)
        # The same draw on one sum at two scales would give the sum away; a moving bound or a probe changes the scale.
        digest.update(repr((total.sensitivity, sorted(total.noise_weights.items()))).encode())
        tensors = dict(sorted(total.tensors.items()))
        for name, value in tensors.items():
            digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        values = [value.detach().contiguous() for value in tensors.values()]
        values = [value for value in values if value.numel()]
        if values and dispatch.draw(*values) and len({value.device for value in values}) == 1:
            # An accelerator reads them faster than they could be sent; what is sent is told apart as well.
            key = subkey(self._digest_key, "digests on a device")[:_DIGEST_BYTES]
            values = [dispatch.digests(values, key)]
            digest.update(b"on a device|")
        for value in values:
            digest.update(value.cpu().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _read(self, content: bytes) -> None:
        """Take in all lines; cut an unfinished last one off: its write never returned, so nothing was released."""
        finished = content[: content.rfind(b"\n") + 1]
        if finished != content:
            cut_secret(self._path, len(finished))
        for line in finished.decode("ascii", errors="replace").splitlines():
            name, _, rest = line.partition(" ")
            step, _, digest = rest.partition(" ")
            if not step.isdecimal() or len(digest) != 2 * _DIGEST_BYTES:
                self.whole = False
            elif name == self._key_id:
                self._known[int(step)] = digest
