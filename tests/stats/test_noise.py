"""The noise that is really added, measured. Every test has a negative control that it must reject.

The draws are keyed, so each figure here is one fixed number and no test can fail by chance; a false-alarm rate says how
often a *fresh* key would fail, that is, how sharp a test is.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from discreet.core import chacha, noise, normal, rng
from discreet.core.clipping import ClippedSum, Clipping
from discreet.core.gradient import clipped_gradient, zero_sum
from discreet.core.noise import release
from discreet.core.rng import NoiseSource
from discreet.errors import ConfigError

COUNT = 2_000_000
FALSE_ALARM = 1e-6


def _draws(count: int = COUNT, *, position: int = 0, name: str = "w") -> np.ndarray:
    return NoiseSource.keyed(bytes(range(1, 33))).normal(count, position=position, name=name).numpy()


def std_is(draws: np.ndarray, sigma: float) -> bool:
    """Chi-square test of the variance, two-sided, at the false-alarm rate."""
    statistic, degrees = float(np.square(draws / sigma).sum()), len(draws)
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], degrees)
    return bool(low <= statistic <= high)


def normal_is(draws: np.ndarray, sigma: float) -> bool:
    """Kolmogorov-Smirnov test against N(0, sigma^2)."""
    return bool(stats.kstest(draws, "norm", args=(0, sigma)).pvalue > FALSE_ALARM)


def test_std_is_one_and_not_one_percent_off():
    draws = _draws()
    assert std_is(draws, 1.0)
    for wrong in (0.98, 0.99, 1.01, 1.02):
        assert not std_is(draws, wrong)
        assert not std_is(draws * wrong, 1.0)


def test_mean_is_zero():
    bound = stats.norm.ppf(1 - FALSE_ALARM / 2) / math.sqrt(COUNT)
    assert abs(_draws().mean()) < bound
    assert abs((_draws() + 0.01).mean()) > bound


def test_distribution_is_normal_and_nothing_like_it():
    draws = _draws()
    assert normal_is(draws, 1.0)
    generator = np.random.default_rng(0)
    assert not normal_is(draws * 0.98, 1.0)
    assert not normal_is(draws * 1.02, 1.0)
    assert not normal_is(generator.laplace(scale=math.sqrt(0.5), size=COUNT), 1.0)
    assert not normal_is(generator.uniform(-math.sqrt(3), math.sqrt(3), size=COUNT), 1.0)
    assert not normal_is(generator.standard_t(30, size=COUNT) * math.sqrt(28 / 30), 1.0)


def test_higher_moments():
    draws = _draws()
    assert abs(float((draws**3).mean())) < 5 * math.sqrt(15 / COUNT)
    assert abs(float((draws**4).mean()) - 3) < 5 * math.sqrt(96 / COUNT)


def test_no_correlation_at_any_lag():
    """64 lags, Bonferroni. Neighbouring outputs share a Box-Muller pair, its cosine and its sine: still independent."""
    draws = _draws()
    bound = stats.norm.ppf(1 - FALSE_ALARM / 128)
    for lag in range(1, 65):
        value = float((draws[:-lag] * draws[lag:]).mean()) * math.sqrt(COUNT - lag)
        assert abs(value) < bound
        squares = float(((draws[:-lag] ** 2 - 1) * (draws[lag:] ** 2 - 1)).mean()) * math.sqrt(COUNT - lag) / 2
        assert abs(squares) < bound
    mixed = (draws[1:] + 0.01 * draws[:-1]) / math.sqrt(1 + 1e-4)
    assert abs(float((mixed[:-1] * mixed[1:]).mean()) * math.sqrt(COUNT)) > bound


@pytest.mark.parametrize(
    ("one", "two"), [((0, "a"), (0, "b")), ((0, "a"), (1, "a")), ((1, "a"), (0, "b")), ((1, "1"), (11, ""))]
)
def test_names_and_positions_are_independent(one, two):
    count = 500_000
    a, b = (_draws(count, position=position, name=name) for position, name in (one, two))
    bound = stats.norm.ppf(1 - FALSE_ALARM / 8)
    for shift in range(4):
        value = float((a[: count - shift] * b[shift:]).sum()) / math.sqrt(count)
        assert abs(value) < bound
    assert abs(float((a * (b + 0.02 * a)).sum()) / math.sqrt(count)) > bound


def test_the_boundary_of_a_chunk_cannot_be_seen():
    """The draws around the internal chunk size have the law of all others, and do not repeat each other."""
    chunk = rng.PIECE
    around = np.concatenate([_draws(chunk + 100, position=p)[chunk - 100 :] for p in range(25)])
    assert std_is(around, 1.0) is True
    assert abs(float((around[:-1] * around[1:]).mean()) * math.sqrt(len(around))) < stats.norm.ppf(1 - FALSE_ALARM)
    assert len(np.unique(_draws(2 * chunk))) == 2 * chunk


def test_the_draws_of_a_long_tensor_begin_like_themselves():
    whole = _draws(rng.PIECE * 2 + 5)
    assert np.array_equal(whole, _draws(rng.PIECE * 2 + 5))
    assert np.array_equal(whole[: rng.PIECE], _draws(rng.PIECE * 2)[: rng.PIECE])


def test_pieces_drawn_apart_are_the_whole():
    source, count = NoiseSource.keyed(bytes(range(1, 33))), 3 * rng.PIECE + 17
    whole = source.normal(count, position=0, name="w")
    for start in range(0, count, rng.PIECE):
        piece = source.normal(min(rng.PIECE, count - start), position=0, name="w", start=start)
        assert torch.equal(piece, whole[start : start + rng.PIECE])


def test_layers_are_independent_streams():
    source = NoiseSource.keyed(bytes(range(1, 33)))
    one, two = (source.normal(500_000, position=0, name="w", layer=layer).numpy() for layer in (0, 1))
    assert abs(float((one * two).sum()) / math.sqrt(len(one))) < stats.norm.ppf(1 - FALSE_ALARM / 2)


def test_sines_and_cosines_of_a_pair_are_independent():
    """The two halves of a piece come from the same pairs: no correlation, of values or of squares."""
    draws = _draws(64 * rng.PIECE).reshape(64, 2, -1)
    sine, cosine = draws[:, 0].ravel(), draws[:, 1].ravel()
    bound = stats.norm.ppf(1 - FALSE_ALARM / 4) / math.sqrt(len(sine))
    assert abs(float((sine * cosine).mean())) < bound
    assert abs(float(((sine**2 - 1) * (cosine**2 - 1)).mean())) / 2 < bound
    assert abs(float((sine * (cosine + 0.01 * sine)).mean())) > bound
    assert stats.kstest(np.arctan2(sine, cosine), "uniform", args=(-math.pi, 2 * math.pi)).pvalue > FALSE_ALARM


def test_tails_beyond_the_edge_of_float32():
    """A float32 sampler stops at 5.768 sigma. Here the smallest uniform gives 8.49, and the tail at 4 has its mass."""
    assert math.sqrt(-2 * math.log(2.0**-52)) > 8.48
    uniforms = normal.uniform(rng._keystream(rng.Scratch(), bytes(32), 0, rng.PIECE))
    assert uniforms.dtype == np.float64
    assert uniforms.min() >= 1
    assert uniforms.max() < 2
    assert np.any(uniforms * 2.0**24 != np.round(uniforms * 2.0**24))  # finer than the grid of float32
    expected = 2 * stats.norm.sf(4) * COUNT
    low, high = stats.poisson.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], expected)
    draws = np.abs(_draws())
    assert low <= (draws > 4).sum() <= high
    assert not low <= (np.minimum(draws, 3.99) > 4).sum()


SHAPES = {"w": (300, 200), "b": (1000,), "scalar": (), "token": (1, 1, 50), "bf16": (64,)}


def _zeros(dtype: torch.dtype = torch.float32) -> ClippedSum:
    return ClippedSum({name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}, sensitivity=0.5)


def test_every_entry_of_every_tensor_gets_noise_of_the_stated_size():
    released = release(_zeros(), noise_multiplier=3.0, source=NoiseSource.insecure_seed(1))
    assert released.noise_std == 1.5
    every = np.concatenate([released.tensors[name].double().flatten().numpy() for name in SHAPES])
    assert len(every) == sum(math.prod(shape) for shape in SHAPES.values())
    assert (every != 0).all()
    assert std_is(every, 1.5)
    for wrong in (1.5 * 2 / 3, 3.0, 0.5, 1.45):
        assert not std_is(every, wrong)


def test_tensors_of_one_release_do_not_share_draws():
    twin = ClippedSum({"a": torch.zeros(1000), "b": torch.zeros(1000)}, sensitivity=1.0)
    released = release(twin, noise_multiplier=1.0, source=NoiseSource.insecure_seed(1)).tensors
    assert not (released["a"] == released["b"]).any()


def test_unused_parameters_and_empty_batches_get_the_same_noise():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(40, 40), "never": torch.nn.Linear(40, 40)})
    clipping = Clipping.abadi(1e-9)
    loss = lambda m, b: m["used"](b).sum(1)  # noqa: E731
    total = clipped_gradient(model, loss, torch.randn(3, 40), clipping=clipping)
    empty = clipped_gradient(model, loss, torch.randn(0, 40), clipping=clipping)
    zeros = zero_sum(dict(model.named_parameters()), clipping)
    every = [release(each, noise_multiplier=1e9, source=NoiseSource.insecure_seed(2)) for each in (total, empty, zeros)]
    for name in zeros.tensors:
        assert (every[0].tensors[name] != 0).all()
        for other in every[1:]:
            torch.testing.assert_close(every[0].tensors[name], other.tensors[name], rtol=0, atol=1e-5)


def test_noise_is_added_in_float64_and_rounded_once():
    value = torch.full((10_000,), 300.0)
    total = ClippedSum({"w": value}, sensitivity=1.0)
    source = NoiseSource.insecure_seed(3)
    released = release(total, noise_multiplier=1.0, source=source).tensors["w"]
    exact = 300.0 + NoiseSource.insecure_seed(3).normal(10_000, position=0, name="w")
    assert released.dtype is torch.float32
    assert torch.equal(released, exact.to(torch.float32))
    assert len(released.unique()) > 9_500


def test_a_float64_release_adds_two_draws():
    total = ClippedSum({"w": torch.zeros(50_000, dtype=torch.float64)}, sensitivity=1.0)
    released = release(total, noise_multiplier=2.0, source=NoiseSource.insecure_seed(3)).tensors["w"]
    twin = NoiseSource.insecure_seed(3)
    one, two = (twin.normal(50_000, position=0, name="w", layer=layer) for layer in (0, 1))
    torch.testing.assert_close(released, (one + two) * math.sqrt(2), rtol=1e-12, atol=1e-12)
    assert std_is(released.numpy(), 2.0)


def test_a_release_into_given_memory_divides_and_is_the_same():
    total = ClippedSum({"w": torch.randn(50, 3), "b": torch.randn(70_000), "h": torch.randn(4)}, sensitivity=1.0)
    given = {"w": torch.ones(50, 3), "b": torch.ones(70_000), "h": torch.ones(4, dtype=torch.bfloat16)}
    plain = release(total, noise_multiplier=2.0, source=NoiseSource.insecure_seed(3))
    mean = release(total, noise_multiplier=2.0, source=NoiseSource.insecure_seed(3), divisor=8, into=given)
    assert mean.noise_std == plain.noise_std / 8
    for name in total.tensors:
        assert torch.equal(mean.tensors[name], plain.tensors[name] / 8)
        assert (mean.tensors[name].data_ptr() == given[name].data_ptr()) is (name != "h")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads):
    total = ClippedSum({"w": torch.randn(5 * rng.PIECE + 3), "b": torch.randn(3)}, sensitivity=1.0)
    before = torch.get_num_threads()
    alone = release(total, noise_multiplier=1.0, source=NoiseSource.insecure_seed(3)).tensors
    try:
        torch.set_num_threads(threads)
        shared = release(total, noise_multiplier=1.0, source=NoiseSource.insecure_seed(3)).tensors
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(alone[name], shared[name]) for name in alone)


def _device_draws(count: int = COUNT) -> np.ndarray:
    key = bytes(range(1, 33))
    return np.concatenate([chacha.piece(key, number) for number in range(-(-count // chacha.PIECE))])[:count]


def test_draws_for_an_accelerator_have_the_law_of_all_others():
    draws = _device_draws()
    assert std_is(draws, 1.0)
    assert normal_is(draws, 1.0)
    assert abs(draws.mean()) < stats.norm.ppf(1 - FALSE_ALARM / 2) / math.sqrt(COUNT)
    assert abs(float((draws**4).mean()) - 3) < 5 * math.sqrt(96 / COUNT)
    assert len(np.unique(draws)) == COUNT
    bound = stats.norm.ppf(1 - FALSE_ALARM / 20)
    for lag in (1, 2, chacha.LANES - 1, chacha.LANES, 4 * chacha.LANES, chacha.PIECE):  # 4: a sine and its cosine
        for values in (draws, (draws**2 - 1) / math.sqrt(2)):
            assert abs(float((values[:-lag] * values[lag:]).mean()) * math.sqrt(COUNT - lag)) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_elsewhere_get_their_noise_in_float64_rounded_once(dtype, monkeypatch):
    """The way of sums on an accelerator without Triton, on the CPU."""
    total = ClippedSum({"w": torch.randn(2 * rng.PIECE + 3, dtype=dtype), "b": torch.randn(3, dtype=dtype)}, 0.7)
    monkeypatch.setattr(noise, "_on_host", lambda value: False)
    released = [
        release(total, source=NoiseSource.insecure_seed(3), noise_multiplier=1.3, divisor=48.0) for _ in range(2)
    ]
    for name, value in total.tensors.items():
        found = released[0].tensors[name]
        assert found.dtype is dtype
        assert torch.equal(found, released[1].tensors[name])
        noise_N = (found.double() - value.double() / 48).numpy() / released[0].noise_std
        assert std_is(noise_N, 1.0)
        assert not std_is(noise_N, 1.3) or name == "b"
    assert not (released[0].tensors["w"][:3] - total.tensors["w"][:3] / 48 == released[0].tensors["b"]).any()


@pytest.mark.parametrize("divisor", [0.0, -1.0, math.inf, math.nan])
def test_divisors_that_mean_nothing_are_refused(divisor):
    with pytest.raises(ConfigError, match="divisor"):
        release(_zeros(), noise_multiplier=1.0, source=NoiseSource.insecure_seed(0), divisor=divisor)


def test_a_release_leaves_the_sum_alone():
    total = _zeros(torch.float64)
    release(total, noise_multiplier=1.0, source=NoiseSource.insecure_seed(0))
    assert not any(value.any() for value in total.tensors.values())


@pytest.mark.parametrize("sigma", [-1.0, math.nan, math.inf, -math.inf])
def test_noise_multipliers_that_mean_nothing_are_refused(sigma):
    source = NoiseSource.insecure_seed(0)
    with pytest.raises(ConfigError, match="noise_multiplier"):
        release(_zeros(), noise_multiplier=sigma, source=source)


def test_no_noise_is_marked_not_private():
    released = release(_zeros(), noise_multiplier=0.0, source=NoiseSource.system())
    assert not released.private
    assert released.noise_std == 0
    assert not any(value.any() for value in released.tensors.values())


@pytest.mark.parametrize("sensitivity", [math.inf, 0.0, -1.0, math.nan])
def test_noise_on_a_sum_whose_bound_is_none_is_refused(sensitivity):
    """At 0 the bare sum came back, and was said to be private."""
    source = NoiseSource.system()
    with pytest.raises(ConfigError, match="sensitivity"):
        release(ClippedSum({"w": torch.ones(3)}, sensitivity=sensitivity), noise_multiplier=1.0, source=source)
    assert source.claim() == 0  # refused before a position is taken


def test_a_float64_sum_released_as_float32_is_rounded_once_and_takes_one_draw():
    """What several microbatches add up to gets the noise of a float32 sum, bit by bit."""
    value = torch.randn(70_001)
    narrow, wide = (ClippedSum({"w": v}, sensitivity=1.0) for v in (value, value.double()))
    given = {"w": torch.empty_like(value)}
    found = release(wide, noise_multiplier=2.0, source=NoiseSource.insecure_seed(3), divisor=3, into=given)
    assert found.tensors["w"].data_ptr() == given["w"].data_ptr()
    wanted = release(narrow, noise_multiplier=2.0, source=NoiseSource.insecure_seed(3), divisor=3)
    assert torch.equal(found.tensors["w"], wanted.tensors["w"])
    bare = release(wide, noise_multiplier=0.0, source=NoiseSource.insecure_seed(3), divisor=3, into=given)
    assert torch.equal(bare.tensors["w"], (value.double() / 3).float())
