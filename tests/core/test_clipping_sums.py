"""Every clipping function in every style, in the engine: sums against brute force, and measured sensitivity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from discreet.core.clipping import BELOW, ClippedSum, Clipping
from discreet.core.gradient import clipped_gradient, zero_sum
from discreet.core.noise import release
from discreet.core.rng import NoiseSource
from discreet.core.style import Style
from discreet.errors import ConfigError

B = 6
RULES = {
    "abadi": lambda style: Clipping.abadi(0.7, style=style),
    "automatic": lambda style: Clipping.automatic(0.1, style=style),
    "normalized": lambda style: Clipping.normalized(style=style),
    "psac": lambda style: Clipping.psac(0.1, style=style),
    "global": lambda style: Clipping.global_(2.0, style=style),
    "quantile": lambda style: Clipping.quantile(0.8, clip_bound=0.7, style=style),
}
STYLES = {
    "flat": Style.flat(),
    "layers": Style.per_layer(),
    "parameters": Style.per_parameter(),
    "proportions": Style.groups("0", bounds=(1.0, 5.0)),
    "weights": Style.groups("0", bounds=(1.0, 5.0), noise_weights=(4.0, 0.5)),
}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def _batch(size: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor([1e-3, 0.1, 1.0, 3.0, 30.0, 1e6], dtype=torch.float64)[:size, None]
    return torch.randn(size, 4, generator=generator, dtype=torch.float64) * scale, torch.arange(size) % 3


def _rows(batch: tuple[torch.Tensor, ...], rows: list[int]) -> tuple[torch.Tensor, ...]:
    return tuple(each[rows] for each in batch)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", RULES)
def test_the_sum_is_that_of_brute_force(name: str, style: str) -> None:
    model, batch, rule = _model(), _batch(), RULES[name](STYLES[style])
    found = clipped_gradient(model, _loss, batch, clipping=rule)
    division = rule.divide(dict(model.named_parameters()))
    expected = {key: torch.zeros_like(value) for key, value in model.named_parameters()}
    below = 0.0
    for row in range(B):
        gradients = torch.autograd.grad(_loss(model, _rows(batch, [row])).sum(), list(model.parameters()))
        each = dict(zip(expected, gradients, strict=True))
        for group, share in division.rules.items():
            norm = torch.stack([each[key].norm() for key in group]).norm().reshape(1)
            factor = share.factor(norm)[0]
            below += float(norm <= share.clip_bound) / len(division.groups)
            for key in group:
                expected[key] += factor * each[key]
        below -= 0.5
    for key, value in expected.items():
        torch.testing.assert_close(found.tensors[key], value.detach(), rtol=1e-7, atol=1e-9)
    assert (BELOW in found.tensors) == (name == "quantile")
    if name == "quantile":
        assert float(found.tensors[BELOW]) == pytest.approx(below, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", RULES)
def test_no_example_moves_the_whitened_sum_by_more_than_the_sensitivity(
    name: str, style: str, dtype: torch.dtype
) -> None:
    """Gradients and count together, each over its noise weight: what one Gaussian query is about."""
    model, rule = _model().to(dtype), RULES[name](STYLES[style])
    batch = (_batch()[0].to(dtype), _batch()[1])
    whole = clipped_gradient(model, _loss, batch, clipping=rule)
    largest = 0.0
    for out in range(B):
        rest = clipped_gradient(model, _loss, _rows(batch, [row for row in range(B) if row != out]), clipping=rule)
        assert rest.sensitivity == whole.sensitivity
        assert rest.noise_weights == whole.noise_weights
        largest = max(largest, _distance(whole, rest))
    assert largest <= whole.sensitivity
    # The control: the bound is near enough that noise weights left out of it would be seen.
    assert largest >= 0.5 * whole.sensitivity


def _distance(one: ClippedSum, other: ClippedSum) -> float:
    return math.hypot(
        *(
            float((value.double() - other.tensors[name].double()).norm()) / one.noise_weights.get(name, 1.0)
            for name, value in one.tensors.items()
        )
    )


@pytest.mark.parametrize("name", RULES)
def test_the_sum_of_no_example_has_the_same_tensors_and_bound(name: str) -> None:
    model, rule = _model(), RULES[name](Style.per_layer())
    found = clipped_gradient(model, _loss, _batch(), clipping=rule)
    empty = zero_sum(dict(model.named_parameters()), rule)
    total = empty + found
    for key, value in found.tensors.items():
        assert torch.equal(total.tensors[key], value)
        assert not empty.tensors[key].any()


def test_an_example_that_is_not_finite_counts_as_nothing() -> None:
    model, (features, targets), rule = _model(), _batch(), Clipping.quantile(0.8)
    features[2] = float("nan")
    found = clipped_gradient(model, _loss, (features, targets), clipping=rule)
    rest = clipped_gradient(model, _loss, _rows((features, targets), [0, 1, 3, 4, 5]), clipping=rule)
    assert torch.equal(found.tensors[BELOW], rest.tensors[BELOW])


def test_noise_follows_the_weights_and_nothing_else() -> None:
    """The same draws, each tensor's at its own scale."""
    values = {"a": torch.zeros(70_000), "b": torch.zeros(50, dtype=torch.float64), "c": torch.zeros(7)}
    noises = []
    for weights in ({}, {"a": 3.0, "b": 0.25}):
        source = NoiseSource.keyed(bytes(range(32)), private=False)
        total = ClippedSum(values, sensitivity=2.0, noise_weights=weights)
        noises.append(release(total, noise_multiplier=1.5, source=source, divisor=4.0).tensors)
    for name, weight in {"a": 3.0, "b": 0.25, "c": 1.0}.items():
        torch.testing.assert_close(noises[1][name], noises[0][name] * weight, rtol=1e-6, atol=0)
    assert float(noises[1]["a"].std()) == pytest.approx(3.0 * 1.5 * 2.0 / 4.0, rel=0.02)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_noise_weights_that_are_none_are_refused(bad: float) -> None:
    total = ClippedSum({"a": torch.zeros(3)}, sensitivity=1.0, noise_weights={"a": bad})
    with pytest.raises(ConfigError):
        release(total, noise_multiplier=1.0, source=NoiseSource.keyed(bytes(32), private=False))
