"""Every way to make a noise source keeps the contract: a function of (key, position, name), each position once."""

from __future__ import annotations

import abc
import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from discreet.core.clipping import ClippedSum
from discreet.core.noise import release
from discreet.core.rng import KEY_BYTES, NoiseSource, seed_key, subkey
from discreet.errors import ConfigError, DiscreetError


class NoiseSourceContract(abc.ABC):
    private: bool

    @abc.abstractmethod
    def make(self) -> NoiseSource:
        """A source at position 0."""

    @abc.abstractmethod
    def again(self, source: NoiseSource) -> NoiseSource | None:
        """Another source over the same key, or None when that is impossible by design."""

    def test_draws_are_float64_and_finite(self):
        draws = self.make().normal(100_000, position=0, name="w")
        assert draws.dtype is torch.float64
        assert draws.shape == (100_000,)
        assert torch.isfinite(draws).all()

    def test_the_same_position_and_name_give_the_same_bits(self):
        source = self.make()
        first = source.normal(1000, position=3, name="a")
        assert torch.equal(first, source.normal(1000, position=3, name="a"))
        twin = self.again(source)
        if twin is not None:
            assert torch.equal(first, twin.normal(1000, position=3, name="a"))

    @pytest.mark.parametrize(("position", "name"), [(0, "b"), (1, "a"), (10, "a"), (0, "a|0"), (0, "")])
    def test_any_other_label_gives_other_draws(self, position, name):
        source = self.make()
        one, two = source.normal(4096, position=0, name="a"), source.normal(4096, position=position, name=name)
        assert not (one == two).any()

    def test_positions_are_handed_out_once(self):
        source = self.make()
        assert [source.claim() for _ in range(5)] == [0, 1, 2, 3, 4]
        assert source.position == 5

    def test_going_back_is_refused(self):
        source = self.make()
        source.claim()
        source.claim()
        with pytest.raises(DiscreetError, match="never repeats"):
            source.seek(1)
        source.seek(2)
        source.seek(7)
        assert source.claim() == 7

    def test_each_release_claims_a_position_even_without_noise(self):
        source, total = self.make(), ClippedSum({"w": torch.zeros(100)}, sensitivity=1.0)
        one = release(total, noise_multiplier=1.0, source=source)
        release(total, noise_multiplier=0.0, source=source)
        two = release(total, noise_multiplier=1.0, source=source)
        assert source.position == 3
        assert not (one.tensors["w"] == two.tensors["w"]).any()
        assert one.private is self.private

    def test_every_count_works(self):
        source = self.make()
        for count in (0, 1, 2, 3, 17):
            assert source.normal(count, position=0, name="n").shape == (count,)


class TestSystem(NoiseSourceContract):
    private = True

    def make(self):
        return NoiseSource.system()

    def again(self, source):
        return None

    def test_two_sources_share_nothing(self):
        one, two = (NoiseSource.system().normal(1000, position=0, name="w") for _ in range(2))
        assert not (one == two).any()


class TestKeyed(NoiseSourceContract):
    private = True

    def make(self):
        return NoiseSource.keyed(bytes(range(32)))

    def again(self, source):
        return self.make()

    def test_one_bit_of_the_key_changes_everything(self):
        other = NoiseSource.keyed(bytes([1, *range(1, 32)]))
        assert not (other.normal(1000, position=0, name="w") == self.make().normal(1000, position=0, name="w")).any()

    @pytest.mark.parametrize("length", [0, 16, 31, 33])
    def test_other_lengths_of_key_are_refused(self, length):
        with pytest.raises(ConfigError, match=str(KEY_BYTES)):
            NoiseSource.keyed(bytes(length))

    def test_a_resumed_run_goes_on_where_it_was(self):
        total = ClippedSum({"w": torch.zeros(64)}, sensitivity=1.0)
        whole = self.make()
        tensors = [release(total, noise_multiplier=1.0, source=whole).tensors["w"] for _ in range(4)]
        resumed = NoiseSource.keyed(bytes(range(32)), position=2)
        for wanted in tensors[2:]:
            assert torch.equal(release(total, noise_multiplier=1.0, source=resumed).tensors["w"], wanted)


class TestSeeded(NoiseSourceContract):
    private = False

    def make(self):
        return NoiseSource.insecure_seed(5)

    def again(self, source):
        return self.make()


class TestKeyedForTests(TestKeyed):
    private = False

    def make(self):
        return NoiseSource.keyed(seed_key(1), private=False)

    def test_a_resumed_run_goes_on_where_it_was(self):
        assert NoiseSource.keyed(seed_key(1), position=9, private=False).claim() == 9


def test_subkeys_differ_by_label_and_by_key():
    key = bytes(32)
    labels = ["noise", "sampling", "noise|0|w", "noise|1|w", ""]
    made = {subkey(key, label) for label in labels} | {subkey(bytes([1] * 32), label) for label in labels}
    assert len(made) == 10
    assert all(len(each) == KEY_BYTES for each in made)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda source: pickle.dumps(source)])
def test_no_source_is_copied(copied):
    """A copy would go on at the same position, and put the same noise on another sum."""
    with pytest.raises(ConfigError, match="used twice"):
        copied(NoiseSource.system())


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
def test_a_fork_does_not_draw_from_the_source_of_its_parent(monkeypatch):
    source = NoiseSource.system()
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(ConfigError, match="fork"):
        source.claim()


def test_positions_are_handed_out_once_to_any_number_of_threads():
    source = NoiseSource.system()
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: source.claim(), range(2000)))
    assert sorted(claimed) == list(range(2000))
