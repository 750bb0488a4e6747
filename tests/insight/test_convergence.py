"""The theorems of arXiv:2106.07830 in numbers: kernels, slopes, rising losses, dead ends, stationary points."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from discreet.core.clipping import Clipping
from discreet.core.gradient import clipped_gradient, trainable
from discreet.core.style import Style
from discreet.errors import ConfigError
from discreet.insight.convergence import (
    MOST_ROWS,
    convergence_report,
    descend,
    flow,
    stationary_probability,
    tangent_kernel,
)
from discreet.insight.origin import Origin


def _network(seed: int, outputs: int = 1) -> tuple[nn.Module, Tensor, Tensor]:
    """12 points and a 5-64-K tanh network, float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, outputs)).double()
        inputs, targets = torch.randn(12, 5, dtype=torch.float64), 3 * torch.randn(12, outputs, dtype=torch.float64)
    return model, inputs, targets


def _square(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs.reshape(targets.shape) - targets).square().reshape(len(targets), -1).sum(1)


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_kernel_is_that_of_the_jacobian(outputs: int) -> None:
    model, inputs, _ = _network(0, outputs)
    parameters = dict(model.named_parameters())
    jacobian = vmap(jacrev(lambda p, x: functional_call(model, p, (x[None],))[0]), (None, 0))(parameters, inputs)
    found = tangent_kernel(model, inputs)
    assert found.keys() == parameters.keys()
    for name, each in jacobian.items():
        flat = each.reshape(12 * outputs, -1)
        torch.testing.assert_close(found[name], (flat @ flat.T).detach(), rtol=1e-9, atol=1e-9)


def test_the_kernel_of_a_parameter_that_is_used_twice_has_its_cross_terms() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x))).sum(1, keepdim=True)

    torch.manual_seed(0)
    model, inputs = Twice(), torch.randn(5, 4, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    jacobian = vmap(jacrev(lambda p, x: functional_call(model, p, (x[None],))[0]), (None, 0))(parameters, inputs)
    flat = jacobian["layer.weight"].reshape(5, -1)
    torch.testing.assert_close(tangent_kernel(model, inputs)["layer.weight"], (flat @ flat.T).detach())


RULES = {
    "none": Clipping.none(),
    "flat 1": Clipping.abadi(1.0),
    "flat .1": Clipping.abadi(0.1),
}
OTHERS = {
    "automatic": Clipping.automatic(),
    "psac": Clipping.psac(0.5),
    "layers": Clipping.abadi(1.0, style=Style.per_layer()),
    "proportions": Clipping.abadi(1.0, style=Style.groups("0", bounds=(1.0, 4.0))),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", [*RULES, *OTHERS])
def test_the_loss_falls_or_rises_as_the_form_says(name: str, seed: int) -> None:
    """dL/dt = -l'^T M l', against the change of the loss along the engine's own clipped sum. Nine of nine and more."""
    rule = {**RULES, **OTHERS}[name]
    model, inputs, targets = _network(seed, outputs=1 + seed)
    report = convergence_report(model, inputs, targets, rules={name: rule}, origin=Origin.PUBLIC, loss=_square).flows[
        name
    ]
    total = clipped_gradient(model, lambda m, b: _square(m(b[0]), b[1]), (inputs, targets), clipping=rule)
    dt, values = 1e-6, []
    with torch.no_grad():
        for sign in (-1, 1, 0):
            for key, parameter in trainable(model).items():
                parameter -= sign * dt * total.tensors[key]
            values.append(float(_square(model(inputs), targets).sum()))
            for key, parameter in trainable(model).items():
                parameter += sign * dt * total.tensors[key]
    slope = (values[1] - values[0]) / (2 * dt)
    assert report.loss == pytest.approx(values[2])
    assert report.slope == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_flat_clipping_keeps_eigenvalues_and_loses_symmetry(seed: int) -> None:
    """Table 1: no clipping, or a bound above all norms: symmetric, definite. A small bound: neither, but real > 0."""
    model, inputs, targets = _network(seed)
    rules = {**RULES, "large": Clipping.abadi(1e4)}
    flows = convergence_report(model, inputs, targets, rules=rules, origin=Origin.PUBLIC, loss=_square).flows
    for name in ("none", "large"):
        assert flows[name].asymmetry < 1e-12
        assert flows[name].definite == pytest.approx(min(flows[name].eigenvalues), rel=1e-6)
        assert flows[name].definite > 0
        assert flows[name].clipped == (0.0 if name == "none" else flows[name].clipped)
        assert flows[name].falls
    for name in ("flat 1", "flat .1"):
        assert flows[name].asymmetry > 0.1
        assert flows[name].definite < 0
        assert min(flows[name].eigenvalues) > 0
        assert flows[name].rotation < 1e-6 * max(flows[name].eigenvalues)


def test_clipping_by_groups_can_have_a_negative_eigenvalue() -> None:
    """Two points, two blocks of rank one: eigenvalues 35.43 and -0.951, though H is definite."""
    a, b = torch.tensor([-4.017, -10.208]).double(), torch.tensor([2.182, 1.581]).double()
    slopes = torch.tensor([-0.0181, -0.8676]).double()
    kernels = {"a": torch.outer(a, a), "b": torch.outer(b, b)}
    rule = Clipping.abadi(math.sqrt(2.0), style=Style.per_parameter())
    found = flow(kernels, torch.zeros(2, 1), slopes, rule=rule, loss=lambda f, t: f[:, 0] * t)
    assert found.eigenvalues == pytest.approx((35.43, -0.951), rel=1e-3)
    whole = flow(kernels, torch.zeros(2, 1), slopes, rule=Clipping.none(), loss=lambda f, t: f[:, 0] * t)
    assert min(whole.eigenvalues) == pytest.approx(2.02, rel=5e-3)


def test_a_clipped_loss_may_rise_before_it_goes_to_zero() -> None:
    """Nineteen small gradients against one outlier that shares a feature with them: 452 rises, and then falls to 0."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 100, generator=generator, dtype=torch.float64) / 10
    inputs[:, 0] = 1.0
    targets = torch.full((20, 1), -0.3, dtype=torch.float64)
    targets[0] = 30.0
    model = nn.Linear(100, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    curve = descend(model, inputs, targets, rule=Clipping.abadi(0.1), loss=_square, steps=30, rate=0.3)
    assert curve[0] == pytest.approx(450.0 + 19 * 0.045)
    assert max(curve) > curve[0] + 1.0
    assert not model.weight.any()  # put back
    plain = descend(model, inputs, targets, rule=Clipping.abadi(1e9), loss=_square, steps=30, rate=0.03)
    assert all(after <= before for before, after in itertools.pairwise(plain))
    # Flat clipping has no other stationary point than zero loss: a step that shrinks geometrically gets there.
    weight, step = torch.zeros(100, dtype=torch.float64), 3.0
    value = math.inf
    for _ in range(6000):
        gap = inputs @ weight - targets[:, 0]
        value = float(0.5 * gap.square().sum())
        gradient = gap[:, None] * inputs
        factor = Clipping.abadi(0.1).factor(gradient.norm(dim=1))
        weight -= step * (factor[:, None] * gradient).sum(0)
        step *= 0.9985
    assert value < 1e-6


class _TwoScalars(nn.Module):
    """f = w1 x1 + w2 x2, each weight a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
        nn.init.zeros_(self.one.weight)
        nn.init.zeros_(self.two.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x[:, :1]) + self.two(x[:, 1:])


def test_clipping_by_layers_can_stop_at_any_loss() -> None:
    """f1 = w1 + w2, f2 = -w1 - 2 w2, y = -10: every clipped block sum is 1 - 1 = 0, and the loss stays at 100."""
    model = _TwoScalars()
    inputs = torch.tensor([[1.0, 1.0], [-1.0, -2.0]], dtype=torch.float64)
    targets = torch.full((2, 1), -10.0, dtype=torch.float64)
    rules = {"layers": Clipping.abadi(math.sqrt(2.0), style=Style.per_layer()), "flat": Clipping.abadi(1.0)}
    rules["none"] = Clipping.none()
    report = convergence_report(
        model, inputs, targets, rules=rules, origin=Origin.PUBLIC, loss=_square, steps=1000, rate=0.2
    )
    assert report.curves["layers"] == pytest.approx([100.0] * 1000, abs=1e-9)
    assert report.flows["layers"].slope == pytest.approx(0.0, abs=1e-9)
    assert min(abs(value) for value in report.flows["layers"].eigenvalues) < 1e-9
    assert report.flows["none"].definite > 0
    assert report.curves["none"][-1] < 5.0
    assert report.curves["flat"][-1] < 90.0


STATIONARY = [
    *(Clipping.abadi(bound) for bound in (0.1, 0.5, 0.97, 2.0)),
    Clipping.quantile(0.9, clip_bound=0.5),
    *(Clipping.automatic(gamma) for gamma in (0.01, 0.1, 1.0)),
    *(Clipping.psac(r) for r in (0.01, 0.1, 1.0)),
    *(Clipping.global_(bound) for bound in (0.3, 0.46, 0.75, 0.93, 0.99)),
    Clipping.normalized(),
    Clipping.none(),
]


def _drift(rule: Clipping, s_N: Tensor, p: float) -> Tensor:
    return p * (1 - s_N) * rule.factor(1 - s_N) - (1 - p) * s_N * rule.factor(s_N)


@pytest.mark.parametrize("p", [0.6, 0.8, 0.95])
@pytest.mark.parametrize("rule", STATIONARY, ids=lambda rule: f"{rule.kind.value} {rule.clip_bound} {rule.gamma}")
def test_stationary_points_are_those_of_the_rule_itself(rule: Clipping, p: float) -> None:
    """To 1e-3: the first place, from s = 1/2 upwards, where the drift that the rule's own factors make is at an end."""
    s_N = torch.linspace(0.5 + 1e-9, 1.0 - 1e-6, 50_001, dtype=torch.float64)
    rising_N = _drift(rule, s_N, p) > 0
    at_an_end = s_N[-1] if bool(rising_N.all()) else s_N[int((~rising_N).int().argmax())]
    assert stationary_probability(rule, p) == pytest.approx(float(at_an_end), abs=1e-3)


def test_stationary_points_have_the_published_values() -> None:
    """Section 1.4 of the specification: derived there, and simulated."""
    expected = {
        Clipping.abadi(0.1): (0.9333, 0.9750, 0.9947),
        Clipping.abadi(0.5): (0.6667, 0.8750, 0.9737),
        Clipping.abadi(0.95): (0.6, 0.8, 0.95),
        Clipping.automatic(0.01): (0.9806, 0.9967, 0.9995),
        Clipping.automatic(0.1): (0.8521, 0.9707, 0.9950),
        Clipping.automatic(1.0): (0.6458, 0.8685, 0.9733),
        Clipping.psac(0.1): (0.688, 0.873, 0.963),
        Clipping.global_(0.75): (0.6, 1.0, 1.0),
    }
    for rule, values in expected.items():
        for p, value in zip((0.6, 0.8, 0.95), values, strict=True):
            assert stationary_probability(rule, p) == pytest.approx(value, abs=6e-4), (rule, p)


@pytest.mark.parametrize(
    "rule",
    [Clipping.abadi(0.2), Clipping.abadi(2.0), Clipping.automatic(0.3), Clipping.psac(0.1), Clipping.global_(1.9)],
    ids=lambda rule: rule.kind.value,
)
def test_the_engine_stops_where_the_formula_says(rule: Clipping) -> None:
    """Ten equal inputs of length 2, eight of them positive, through `clipped_gradient`."""
    inputs = torch.full((10, 1), 2.0, dtype=torch.float64)
    targets = torch.tensor([1.0] * 8 + [0.0] * 2, dtype=torch.float64)
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(network(batch[0])[:, 0], batch[1], reduction="none")

    for step in range(500):
        total = clipped_gradient(model, loss, (inputs, targets), clipping=rule)
        with torch.no_grad():
            model.weight -= 0.5 / rule.clip_bound / math.sqrt(1 + step / 20) * total.tensors["weight"] / 2
    found = float(torch.sigmoid(model(inputs[:1]).detach()))
    assert stationary_probability(rule, 0.8, feature_norm=2.0) == pytest.approx(found, abs=1e-3)


def test_private_examples_are_stamped_and_public_ones_are_not() -> None:
    model, inputs, targets = _network(0)
    for origin in Origin:
        report = convergence_report(model, inputs, targets, rules=RULES, origin=origin, loss=_square)
        stamped = origin is Origin.PRIVATE
        assert report.table().startswith("NON-PRIVATE") == stamped
        assert bool(report.to_json()["stamp"]) == stamped


def test_what_is_too_large_or_outside_is_refused() -> None:
    with pytest.raises(ConfigError, match="take fewer"):
        tangent_kernel(nn.Linear(2, MOST_ROWS), torch.zeros(2, 2))
    for p, norm in ((0.4, 1.0), (1.0, 1.0), (0.8, 0.0), (0.8, math.inf)):
        with pytest.raises(ConfigError):
            stationary_probability(Clipping.none(), p, feature_norm=norm)
