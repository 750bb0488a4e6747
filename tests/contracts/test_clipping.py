"""Every clipping function keeps the contract: factor times norm within the bound for any norm, 0 for bad ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.core.clipping import ClippedSum, Clipping, ClippingKind
from discreet.errors import ConfigError

BOUNDED = [
    *(Clipping.abadi(bound) for bound in (1e-9, 1e-8, 0.1, 1.0, 3.5, 1e8, 1e30)),
    *(Clipping.automatic(gamma) for gamma in (1e-9, 0.01, 1.0, 1e6)),
]
EXTREMES = [0.0, 1e-320, 1e-45, 1e-38, 1e-10, 1.0, math.pi, 1e10, 1e38, 1e154, 1e300, 1.7e308]


@pytest.mark.parametrize("clipping", BOUNDED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factor_times_norm_is_within_the_bound(clipping, dtype):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.rand(10_000, generator=generator, dtype=torch.float64) * 70 - 35
    norm_B = torch.cat([torch.tensor(EXTREMES, dtype=torch.float64), 10.0**exponents]).to(dtype)
    factor_B = clipping.factor(norm_B)
    assert factor_B.shape == norm_B.shape
    assert torch.isfinite(factor_B).all()
    assert (factor_B >= 0).all()
    finite = torch.isfinite(norm_B)
    product = factor_B[finite].double() * norm_B[finite].double()
    assert (product <= clipping.sensitivity * (1 - 2.0**-24) + 1e-300).all()


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
def test_a_norm_that_is_not_finite_gets_nothing(clipping):
    bad = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    factor = clipping.factor(bad)
    assert not factor[:3].any()
    assert factor[3] > 0


@pytest.mark.parametrize("clipping", BOUNDED, ids=str)
def test_larger_norms_get_no_larger_factors(clipping):
    norm_B = torch.logspace(-20, 20, 500, dtype=torch.float64)
    assert (clipping.factor(norm_B).diff() <= 0).all()


def test_what_each_function_is():
    norm_B = torch.tensor([0.0, 0.5, 2.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(
        Clipping.abadi(2.0).factor(norm_B), torch.tensor([1, 1, 1, 0.5], dtype=torch.float64), rtol=4e-5, atol=0
    )
    torch.testing.assert_close(Clipping.automatic(0.01).factor(norm_B), 1 / (norm_B + 0.01), rtol=4e-5, atol=0)
    assert torch.equal(Clipping.none().factor(norm_B), torch.ones(4, dtype=torch.float64))


def test_norms_well_below_the_bound_are_left_alone_exactly():
    assert torch.equal(Clipping.abadi(2.0).factor(torch.tensor([0.0, 1e-40, 1.0, 1.99])), torch.ones(4))


@pytest.mark.parametrize(
    "make",
    [
        *(lambda bad=bad: Clipping.abadi(bad) for bad in (0.0, -1.0, math.nan, math.inf)),
        *(lambda bad=bad: Clipping.automatic(bad) for bad in (0.0, -0.01, math.nan, math.inf)),
    ],
)
def test_bounds_that_bound_nothing_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_the_record_names_the_rule_and_its_numbers():
    assert Clipping.abadi(2.0).describe() == {"kind": "abadi", "style": "flat", "clip_bound": 2.0}
    assert Clipping.automatic(0.1).describe() == {"kind": "automatic", "style": "flat", "clip_bound": 1.0, "gamma": 0.1}
    assert Clipping.none().describe() == {"kind": "none", "style": "flat"}
    assert {kind.value for kind in ClippingKind} == {"abadi", "automatic", "none"}


def test_sums_add_only_under_one_bound_and_over_one_model():
    one = ClippedSum({"a": torch.ones(2)}, sensitivity=1.0)
    assert torch.equal((one + one).tensors["a"], torch.full((2,), 2.0))
    assert (one + one).sensitivity == 1.0
    for other in (ClippedSum({"a": torch.ones(2)}, sensitivity=2.0), ClippedSum({"b": torch.ones(2)}, sensitivity=1.0)):
        with pytest.raises(ConfigError):
            _ = one + other
