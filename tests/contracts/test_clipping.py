"""Every clipping function keeps the contract: factor times norm within the bound for any norm, 0 for bad ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.core.clipping import BELOW, STEEPNESS_BELOW, ClippedSum, Clipping, ClippingKind, Following
from discreet.core.style import Style
from discreet.errors import ConfigError

BOUNDED = [
    *(Clipping.abadi(bound) for bound in (1e-9, 1e-8, 0.1, 1.0, 3.5, 1e8, 1e12)),
    *(Clipping.automatic(gamma) for gamma in (1e-9, 0.01, 1.0, 1e6)),
    Clipping.normalized(),
    *(Clipping.psac(r) for r in (1e-9, 0.01, 0.1, 0.9, 1.0, 30.0, 1e8)),
    *(Clipping.global_(bound) for bound in (1e-9, 0.1, 3.5, 1e8)),
    *(Clipping.quantile(0.9, clip_bound=bound) for bound in (1e-9, 1.0, 1e8)),
]
EXTREMES = [0.0, 1e-320, 1e-45, 1e-38, 1e-10, 1e-6, 1.0, math.pi, 1e10, 1e30, 1e38, 1e154, 1e300, 1.7e308]


@pytest.mark.parametrize("clipping", BOUNDED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factor_times_norm_is_within_the_bound(clipping, dtype):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.rand(10_000, generator=generator, dtype=torch.float64) * 70 - 35
    near = clipping.clip_bound * (1 + torch.linspace(-1e-4, 1e-4, 2001, dtype=torch.float64))
    norm_B = torch.cat([torch.tensor(EXTREMES, dtype=torch.float64), 10.0**exponents, near]).to(dtype)
    factor_B = clipping.factor(norm_B)
    assert factor_B.shape == norm_B.shape
    assert factor_B.dtype == dtype
    assert torch.isfinite(factor_B).all()
    assert (factor_B >= 0).all()
    finite = torch.isfinite(norm_B)
    product = factor_B[finite].double() * norm_B[finite].double()
    assert (product <= clipping.sensitivity * (1 - 2.0**-24) + 1e-300).all()
    # Rounded as a sum would round it: the product itself, in its own precision.
    assert ((factor_B[finite] * norm_B[finite]).double() <= clipping.sensitivity).all()


@given(st.floats(min_value=0, allow_nan=False), st.sampled_from(BOUNDED))
@settings(max_examples=300)
def test_any_norm_at_all(norm, clipping):
    factor = float(clipping.factor(torch.tensor([norm], dtype=torch.float64)))
    assert factor >= 0
    if math.isfinite(norm):
        assert factor * norm <= clipping.sensitivity
    else:
        assert factor == 0


@pytest.mark.parametrize("clipping", [*BOUNDED, Clipping.none()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_that_is_not_finite_gets_nothing(clipping, dtype):
    # 0.5 of the smallest bound or more than 1e-6: a norm to which every rule gives something.
    good = min(1.0, clipping.clip_bound / 2)
    factor = clipping.factor(torch.tensor([math.nan, math.inf, -math.inf, good], dtype=dtype))
    assert not factor[:3].any()
    assert factor[3] > 0


@pytest.mark.parametrize("clipping", BOUNDED, ids=str)
def test_larger_norms_get_no_larger_factors(clipping):
    norm_B = torch.logspace(-20, 20, 500, dtype=torch.float64)
    change = clipping.factor(norm_B).diff()
    if clipping.kind is ClippingKind.PSAC:
        peak = max(0.0, math.sqrt(clipping.gamma) - clipping.gamma)
        change = change[norm_B[:-1] > peak]
    if clipping.kind is ClippingKind.NORMALIZED:
        change = change[norm_B[:-1] >= 2e-6]
    assert (change <= 1e-15).all()


@pytest.mark.parametrize("clipping", BOUNDED, ids=str)
def test_no_rule_jumps(clipping):
    """A norm is rounded otherwise in other company: no share may hang on its last bits, at whatever length."""
    edges = [
        1e-6,
        2e-6,
        clipping.clip_bound * (1 - 2.0**-15),
        clipping.clip_bound,
        clipping.clip_bound * 9 / 8,
        1e15,
        1e17,
    ]
    around = torch.linspace(-1e-6, 1e-6, 41, dtype=torch.float64)
    norm_B = torch.cat([torch.logspace(-12, 40, 40_001, dtype=torch.float64), *(edge * (1 + around) for edge in edges)])
    near_B = norm_B * (1 + 1e-7)
    moved_B = (clipping.factor(norm_B) * norm_B - clipping.factor(near_B) * near_B).abs()
    assert (moved_B <= 1e-6 * clipping.sensitivity).all()
    if clipping.following is not None:
        for norm, near in zip(norm_B[40_001:].split(1), near_B[40_001:].split(1), strict=True):
            assert abs(float(clipping.below(norm) - clipping.below(near))) <= 1e-6


@pytest.mark.parametrize("clipping", BOUNDED, ids=str)
def test_what_may_be_infinite_in_float32_gets_nothing(clipping):
    norm_B = torch.tensor([1e17, 1e19, 1e30, 1e300], dtype=torch.float64)
    assert not clipping.factor(norm_B).any()
    before = norm_B[:1] * min(0.9, 900 * clipping.clip_bound)
    assert clipping.factor(before) > 0 or clipping.kind is ClippingKind.GLOBAL
    if clipping.following is not None:
        assert float(clipping.below(norm_B)) == 0.0


def test_what_each_function_is():
    norm_B = torch.tensor([0.0, 0.5, 2.0, 4.0], dtype=torch.float64)
    inner = norm_B + 0.1 / (norm_B + 0.1)
    expected = {
        Clipping.abadi(2.0): torch.tensor([1, 1, 1, 0.5], dtype=torch.float64),
        Clipping.quantile(clip_bound=2.0): torch.tensor([1, 1, 1, 0.5], dtype=torch.float64),
        Clipping.automatic(0.01): 1 / (norm_B + 0.01),
        Clipping.normalized(): torch.tensor([0, 2, 0.5, 0.25], dtype=torch.float64),
        Clipping.psac(0.1): 1 / inner,
        Clipping.global_(3.0): torch.tensor([1, 1, 1, 0], dtype=torch.float64),
        Clipping.none(): torch.ones(4, dtype=torch.float64),
    }
    assert {rule.kind for rule in expected} == set(ClippingKind)
    for rule, factors in expected.items():
        torch.testing.assert_close(rule.factor(norm_B), factors, rtol=4e-5, atol=0)


def test_the_largest_factor_of_psac_is_where_theory_has_it():
    r = 0.09
    norm_B = torch.linspace(0, 2, 200_001, dtype=torch.float64)
    factor_B = Clipping.psac(r).factor(norm_B)
    at = int(factor_B.argmax())
    assert float(norm_B[at]) == pytest.approx(math.sqrt(r) - r, abs=1e-4)
    assert float(factor_B[at]) == pytest.approx(1 / (2 * math.sqrt(r) - r), rel=1e-4)


@pytest.mark.parametrize("clipping", BOUNDED, ids=str)
def test_the_bound_is_attained_or_approached(clipping):
    """The stated sensitivity is exact and not just an upper bound: some norm gets within 0.01 % of it."""
    norm_B = torch.cat(
        [torch.logspace(-12, 40, 4001, dtype=torch.float64), torch.tensor([clipping.clip_bound * 0.99996])]
    )
    assert float((clipping.factor(norm_B) * norm_B).max()) >= clipping.sensitivity * (1 - 1e-4)


def test_norms_well_below_the_bound_are_left_alone_exactly():
    assert torch.equal(Clipping.abadi(2.0).factor(torch.tensor([0.0, 1e-40, 1.0, 1.99])), torch.ones(4))
    assert torch.equal(Clipping.global_(2.0).factor(torch.tensor([0.0, 1e-40, 1.0, 1.99])), torch.ones(4))


@pytest.mark.parametrize(
    "make",
    [
        *(lambda bad=bad: Clipping.abadi(bad) for bad in (0.0, -1.0, math.nan, math.inf, 1e13)),
        *(lambda bad=bad: Clipping.automatic(bad) for bad in (0.0, -0.01, math.nan, math.inf)),
        *(lambda bad=bad: Clipping.psac(bad) for bad in (0.0, -0.01, math.nan, math.inf, 1e-10)),
        *(lambda bad=bad: Clipping.global_(bad) for bad in (0.0, -1.0, math.nan, math.inf, 1e-10)),
        *(lambda bad=bad: Clipping.quantile(bad) for bad in (0.0, 1.0, -0.1, math.nan)),
        *(lambda bad=bad: Clipping.quantile(clip_bound=bad) for bad in (0.0, math.inf, 1e-10)),
        *(lambda bad=bad: Clipping.quantile(rate=bad) for bad in (0.0, math.nan, math.inf)),
        *(lambda bad=bad: Clipping.quantile(count_share=bad) for bad in (0.0, math.nan, math.inf)),
        lambda: Clipping(ClippingKind.QUANTILE, 1.0),
        lambda: Clipping(ClippingKind.ABADI, 1.0, following=Following(0.5)),
    ],
)
def test_bounds_that_bound_nothing_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_the_record_names_the_rule_and_its_numbers():
    assert Clipping.abadi(2.0).describe() == {"kind": "abadi", "style": "flat", "clip_bound": 2.0}
    assert Clipping.automatic(0.1).describe() == {"kind": "automatic", "style": "flat", "clip_bound": 1.0, "gamma": 0.1}
    assert Clipping.normalized().describe() == {"kind": "normalized", "style": "flat", "clip_bound": 1.0}
    assert Clipping.psac(0.1).describe() == {"kind": "psac", "style": "flat", "clip_bound": 1.0, "r": 0.1}
    assert Clipping.global_(4.0).describe() == {"kind": "global", "style": "flat", "clip_bound": 4.0}
    quantile = {"kind": "quantile", "style": "flat", "clip_bound": 2.0, "quantile": 0.9, "rate": 0.2}
    assert Clipping.quantile(0.9, clip_bound=2.0).describe() == {**quantile, "count_share": 0.2}
    assert Clipping.none().describe() == {"kind": "none", "style": "flat"}


def test_sums_add_only_under_one_bound_and_over_one_model():
    one = ClippedSum({"a": torch.ones(2)}, sensitivity=1.0)
    assert torch.equal((one + one).tensors["a"], torch.full((2,), 2.0))
    assert (one + one).sensitivity == 1.0
    others = (
        ClippedSum({"a": torch.ones(2)}, sensitivity=2.0),
        ClippedSum({"b": torch.ones(2)}, sensitivity=1.0),
        ClippedSum({"a": torch.ones(2)}, sensitivity=1.0, noise_weights={"a": 2.0}),
    )
    for other in others:
        with pytest.raises(ConfigError):
            _ = one + other


NAMES = ("body.weight", "body.bias", "head.weight")


@pytest.mark.parametrize("clipping", BOUNDED[::3], ids=str)
def test_groups_share_the_bound_in_any_proportion(clipping):
    for style in (
        Style.per_layer(),
        Style.per_parameter(),
        Style.groups("head", bounds=(3.0, 1.0)),
        Style.groups("head", bounds=(3.0, 1.0), noise_weights=(2.0, 0.5)),
    ):
        rule = Clipping(clipping.kind, clipping.clip_bound, clipping.gamma, style, clipping.following)
        division = rule.divide(NAMES)
        assert sorted(name for group in division.groups for name in group) == sorted(NAMES)
        bounds = [each.clip_bound for each in division.rules.values()]
        assert math.hypot(*bounds) == pytest.approx(rule.clip_bound, rel=1e-12)
        weights = [division.noise_weights.get(group[0], 1.0) for group in division.groups]
        whitened = math.hypot(*(bound / weight for bound, weight in zip(bounds, weights, strict=True)))
        if rule.following is not None:
            whitened = math.hypot(whitened, 0.5 / division.noise_weights[BELOW])
        assert division.sensitivity == pytest.approx(whitened, rel=1e-12)


def test_equal_proportions_leave_the_bound_as_it_is_to_the_last_bit():
    for count in (1, 2, 7, 300):
        names = [f"layer{index}.weight" for index in range(count)]
        division = Clipping.abadi(3.0, style=Style.per_layer()).divide(names)
        assert division.sensitivity == 3.0
        assert division.noise_weights == {}
        for share in division.rules.values():
            assert math.sqrt(count) * share.clip_bound == pytest.approx(3.0, rel=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Clipping.abadi(1.0, style=Style.groups("head", bounds=(1e-20, 1.0))),
        lambda: Clipping.quantile(style=Style.groups("head", bounds=(1e-20, 1.0))),
        lambda: Clipping.abadi(1e-9, style=Style.groups("head", bounds=(1.0, 1e-4))),
        lambda: Clipping(ClippingKind.ABADI, 1e-30),
        lambda: Clipping(ClippingKind.AUTOMATIC, 1.0, gamma=1e-30),
    ],
)
def test_a_group_is_not_bounded_below_what_norms_can_tell(make):
    """A norm of 1e-23 was taken for zero, so that an example moved a group of bound 1e-30 by 3e11 times as much."""
    with pytest.raises(ConfigError):
        make()


def test_a_bound_that_follows_a_quantile_keeps_every_group_above_what_norms_can_tell():
    rule = Clipping.quantile(0.01, clip_bound=1.0, rate=30.0, style=Style.groups("head", bounds=(1e-6, 1.0)))
    for _ in range(10):
        rule = rule.followed(0.5)
    assert min(each.clip_bound for each in rule.divide(NAMES).rules.values()) >= 1e-12 * (1 - 1e-9)
    assert rule.followed(0.5) == rule


def test_equal_budget_gives_every_group_the_same_ratio_of_bound_to_noise():
    """Noise weights equal to the bounds: S = sqrt(K), and noise sigma sqrt(K) R_r in group r."""
    style = Style.groups("head", bounds=(3.0, 4.0), noise_weights=(3.0, 4.0))
    division = Clipping.abadi(5.0, style=style).divide(NAMES)
    assert division.sensitivity == pytest.approx(math.sqrt(2))
    for group, rule in division.rules.items():
        noise = division.sensitivity * division.noise_weights[group[0]]
        assert noise == pytest.approx(math.sqrt(2) * rule.clip_bound)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Style.groups("head", bounds=(1.0,)),
        lambda: Style.groups("head", bounds=(1.0, 0.0)),
        lambda: Style.groups("head", bounds=(1.0, math.inf)),
        lambda: Style.groups("head", noise_weights=(1.0, math.nan)),
        lambda: Style.parse("groups:head=1"),
        lambda: Style.parse("groups:head=one,=1"),
        lambda: Style.parse("groups:head=1,2"),
        lambda: Style.parse("flat:a=1,=2"),
    ],
)
def test_proportions_that_mean_nothing_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_the_record_of_proportions_can_be_read_back():
    for style in (
        Style.groups("head", bounds=(3.0, 0.1), noise_weights=(2.0, 1 / 3)),
        Style.groups("head", "body", bounds=(3.0, 0.1, 1.0)),
        Style.groups("head", noise_weights=(3.0, 0.1)),
    ):
        assert Style.parse(style.describe()).describe() == style.describe()
        assert Style.parse(style.describe()).proportions((("head.w",), ("a",))) == style.proportions(
            (("head.w",), ("a",))
        )


def test_count_and_gradient_are_one_gaussian_query():
    """sigma^-2 = sigma_gradient^-2 + (2 sigma_count)^-2, for add/remove: the count moves by 1/2."""
    sigma, rule = 1.7, Clipping.quantile(0.9, clip_bound=4.0, count_share=0.3)
    division = rule.divide(NAMES)
    gradient_noise = sigma * division.sensitivity / rule.clip_bound
    count_noise = sigma * division.sensitivity * division.noise_weights[BELOW]
    assert gradient_noise**-2 + (2 * count_noise) ** -2 == pytest.approx(sigma**-2, rel=1e-12)
    assert gradient_noise == pytest.approx(sigma * math.sqrt(1 + 0.3**2 / 4), rel=1e-12)
    assert count_noise == pytest.approx(sigma * math.sqrt(1 + 0.3**2 / 4) / 0.3, rel=1e-12)


def test_the_bound_follows_the_share_below_it_geometrically():
    """Eq. 1, arXiv:1905.03871."""
    rule = Clipping.quantile(0.9, clip_bound=2.0, rate=0.2)
    assert rule.followed(0.5).clip_bound == pytest.approx(2.0 * math.exp(-0.2 * 0.1))
    assert rule.followed(-0.5).clip_bound == pytest.approx(2.0 * math.exp(0.2 * 0.9))
    assert rule.followed(0.4).clip_bound == pytest.approx(2.0)
    assert rule.followed(1e9) == rule.followed(0.5)  # noise may say anything
    assert rule.followed(-1e9) == rule.followed(-0.5)
    low = Clipping.quantile(0.01, clip_bound=1e-9)
    assert low.followed(0.5).clip_bound == 1e-9


def test_the_count_of_norms_below_the_bound():
    rule = Clipping.quantile(0.9, clip_bound=2.0)
    norm_B = torch.tensor([0.0, 1.0, 1.8, 2.0, 2.2, math.nan, math.inf], dtype=torch.float64)
    assert float(rule.below(norm_B)) == 3 * 0.5 + 0.0 - 0.5
    assert float(rule.below(torch.tensor([2.05]))) == pytest.approx(-0.2)
    assert rule.below(norm_B).dtype is torch.float64
    for row in norm_B:
        assert abs(float(rule.below(row.reshape(1)))) <= 0.5


def test_the_bound_finds_the_quantile_of_fixed_norms():
    norm_B = torch.linspace(0, 10, 1001)
    rule = Clipping.quantile(0.8, clip_bound=0.1)
    for _ in range(300):
        rule = rule.followed(float(rule.below(norm_B)) / 1001)
    assert rule.clip_bound == pytest.approx(8.0, rel=0.02)


@pytest.mark.parametrize("clipping", BOUNDED, ids=str)
def test_a_share_follows_its_norm_as_steeply_as_is_said_and_no_more(clipping):
    edges = (1e-6, 2e-6, clipping.clip_bound, 1e15, 1e17)
    norm_B = torch.cat([torch.linspace(0.9, 1.3, 20_001, dtype=torch.float64) * edge for edge in edges])
    near_B, rise = norm_B * (1 + 1e-9), 1e-9
    share_B, other_B = (clipping.factor(n) * n / clipping.clip_bound for n in (norm_B, near_B))
    steepest = float((other_B - share_B).abs().max()) / rise
    assert steepest <= clipping.steepness * (1 + 1e-6)
    if clipping.kind in (ClippingKind.GLOBAL, ClippingKind.NORMALIZED):
        assert steepest >= clipping.steepness * 0.999
    if clipping.following is not None:
        counts = [torch.stack([clipping.below(n) for n in x[40_002:60_003:40].split(1)]) for x in (norm_B, near_B)]
        steepest = float((counts[1] - counts[0]).abs().max()) / 0.5 / rise
        assert STEEPNESS_BELOW * 0.999 <= steepest <= STEEPNESS_BELOW * (1 + 1e-6)


@pytest.mark.parametrize(
    "rule", [*BOUNDED, *(Clipping.quantile(count_share=k) for k in (0.05, 0.2, 1.0, 3.0))], ids=str
)
@pytest.mark.parametrize("examples", [10, 4096, 65_536, 1_000_000])
def test_gradient_and_count_together_stay_within_the_sensitivity_when_all_norms_are_rounded(rule, examples):
    """One example more, and all others change by one spacing, as steeply as they can: over the noise weights."""
    rounded = examples * torch.finfo(torch.float32).eps
    share = 0.0 if rule.following is None else rule.following.count_share
    gradient = rule.margin(examples) * (1 + rule.steepness * rounded)
    count = share / 2 * (1 + STEEPNESS_BELOW * rounded)
    within = math.hypot(gradient, count) * rule.clip_bound <= rule.divide(["w"]).sensitivity * (1 + 1e-12)
    assert within or rule.margin(examples) == 0.0  # nothing is learned where a count alone may move by so much
    if examples == 4096 and share <= 1:
        assert rule.margin(examples) > 0.99
