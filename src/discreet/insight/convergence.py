"""What clipping does to gradient descent: the tangent kernel, its spectrum, whether the loss falls, where it stops.

For small steps the outputs of a model move by ``f' = -M l'`` with ``l' = dL / df`` and (arXiv:2106.07830)

    M = H = J J^T                 no clipping: symmetric, positive; the loss falls, to zero where H is definite
    M = H C                       one norm over all parameters: real eigenvalues >= 0, but not symmetric
    M = sum_r H_r C_r             norms by group: no property is left
    dL / dt = -l'^T M l'          so the loss rises whenever this form is negative

The kernel comes from the engine: each example is entered once for every output, and the Gram matrices of its booked
gradients are the blocks ``H_r``, by the same forms that training takes norms from.

Two cautions that the paper leaves out: noise is harmless only at fixed sigma; at a fixed budget its total does not
shrink with the step. And dropping what is above R (the 0/1 rule) leaves zero eigenvalues: it is never learned.

Shape legend: N = examples, K = outputs, P = N * K rows of the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discreet.core.book import Book
from discreet.core.clipping import FADING, Clipping, ClippingKind
from discreet.core.gradient import backward, clipped_gradient, trainable
from discreet.core.meeting import guard
from discreet.errors import ConfigError
from discreet.insight.origin import Origin

MOST_ROWS = 2048
"""Largest kernel that is taken apart; beyond it eigenvalues take minutes."""

OutputLoss = Callable[[Tensor, Tensor], Tensor]
"""``loss(outputs (N, K), targets) -> (N,)``."""


def cross_entropy(outputs_NK: Tensor, targets_N: Tensor) -> Tensor:
    """Cross entropy of each example, shape (N,)."""
    return F.cross_entropy(outputs_NK, targets_N, reduction="none")


def tangent_kernel(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """``J_r J_r^T`` of each parameter, name -> (P, P), row ``n * K + k`` for output k of example n.

    Args:
        model: from inputs to outputs of shape (N, K) or (N,); best in float64.
        inputs: dimension 0 is N.

    Raises:
        ConfigError: N * K is above `MOST_ROWS`.
    """
    with torch.no_grad():
        outputs = model(inputs[:1])
    count = outputs.numel()
    rows = len(inputs) * count
    if rows > MOST_ROWS:
        raise ConfigError(f"{len(inputs)} examples with {count} outputs: at most {MOST_ROWS} in all; take fewer.")
    index_P = torch.arange(rows, device=inputs.device)
    book = Book(trainable(model), examples=rows)
    with guard(book):
        outputs = model(inputs.repeat_interleave(count, 0)).reshape(rows, count)
        backward(book, outputs.gather(1, (index_P % count)[:, None]).squeeze(1))
    grams = book.grams()
    book.discard()
    zeros = torch.zeros(rows, rows, dtype=torch.float64, device="cpu")
    return {name: grams[name].double().cpu() if name in grams else zeros for name in trainable(model)}


@dataclass(frozen=True)
class Flow:
    """How the outputs of a model move under one clipping rule, at its present weights.

    Attributes:
        rule: its record.
        eigenvalues: real parts of those of M, descending, (P,).
        rotation: largest imaginary part; above 0 the outputs also turn.
        definite: smallest eigenvalue of the symmetric part of M; below 0 some loss could rise.
        asymmetry: ``|M - M^T| / |M|``, Frobenius.
        loss: at present, summed over the examples.
        slope: dL / dt of this loss; above 0 it rises although each example's own step is downhill.
        clipped: share of the examples whose factor is below 1 in some group.
    """

    rule: Mapping[str, str | float]
    eigenvalues: tuple[float, ...]
    rotation: float
    definite: float
    asymmetry: float
    loss: float
    slope: float
    clipped: float

    @property
    def falls(self) -> bool:
        """Whether the loss falls right now."""
        return self.slope <= 0


@dataclass(frozen=True)
class Convergence:
    """One `Flow` for each rule, over the same model and examples.

    Attributes:
        flows: name of the rule -> flow.
        curves: name of the rule -> loss along noise-free clipped descent, one value a step.
        examples: N. outputs: K. origin: of the examples.
    """

    flows: Mapping[str, Flow]
    curves: Mapping[str, tuple[float, ...]]
    examples: int
    outputs: int
    origin: Origin

    @property
    def stamp(self) -> str:
        """What must stand above every print and picture; empty for public and for made-up examples."""
        return "" if self.origin is Origin.PUBLIC else "NON-PRIVATE: computed on private examples without noise"

    def table(self) -> str:
        """One line for each rule."""
        head = f"{'rule':24s} {'min eig M':>10s} {'min eig sym':>12s} {'asymmetry':>10s} {'dL/dt':>11s} {'clipped':>8s}"
        lines = [*([self.stamp] if self.stamp else []), head]
        for name, flow in self.flows.items():
            lines.append(
                f"{name:24s} {min(flow.eigenvalues):10.3g} {flow.definite:12.3g} {flow.asymmetry:10.3g} "
                f"{flow.slope:11.4g} {100 * flow.clipped:7.0f}%  {'falls' if flow.falls else 'RISES'}"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """The record, stamp included."""
        flows = {
            name: {
                "rule": dict(flow.rule),
                "smallest eigenvalue": min(flow.eigenvalues),
                "largest eigenvalue": max(flow.eigenvalues),
                "rotation": flow.rotation,
                "smallest eigenvalue of the symmetric part": flow.definite,
                "asymmetry": flow.asymmetry,
                "loss": flow.loss,
                "slope": flow.slope,
                "clipped": flow.clipped,
            }
            for name, flow in self.flows.items()
        }
        return {"stamp": self.stamp, "examples": self.examples, "outputs": self.outputs, "flows": flows}


def flow(
    kernels: Mapping[str, Tensor], outputs_NK: Tensor, targets: Tensor, *, rule: Clipping, loss: OutputLoss
) -> Flow:
    """The spectrum and the slope of one rule from the blocks of a tangent kernel."""
    outputs = outputs_NK.detach().double().cpu().reshape(len(outputs_NK), -1).requires_grad_(True)
    value = loss(outputs, targets.cpu()).sum()
    (slope_NK,) = torch.autograd.grad(value, [outputs])
    examples, count = outputs.shape
    slope_P = slope_NK.reshape(-1)
    matrix = torch.zeros(examples * count, examples * count, dtype=torch.float64, device="cpu")
    clipped_N = torch.zeros(examples, dtype=torch.bool, device="cpu")
    for group, share in rule.divide(kernels).rules.items():
        kernel = sum((kernels[name] for name in group), torch.zeros_like(matrix))
        blocks = kernel.reshape(examples, count, examples, count).diagonal(dim1=0, dim2=2)  # (K, K, N)
        norm2_N = torch.einsum("nj,jkn,nk->n", slope_NK, blocks, slope_NK)
        factor_N = share.factor(norm2_N.clamp(min=0.0).sqrt())
        clipped_N |= factor_N < 1.0
        matrix += kernel * factor_N.repeat_interleave(count)[None, :]
    spectrum = torch.linalg.eigvals(matrix)
    return Flow(
        rule=rule.describe(),
        eigenvalues=tuple(spectrum.real.sort(descending=True).values.tolist()),
        rotation=float(spectrum.imag.abs().max()),
        definite=float(torch.linalg.eigvalsh((matrix + matrix.T) / 2).min()),
        asymmetry=float((matrix - matrix.T).norm() / matrix.norm().clamp(min=1e-300)),
        loss=float(value.detach()),
        slope=-float(slope_P @ matrix @ slope_P),
        clipped=float(clipped_N.double().mean()),
    )


def convergence_report(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    rules: Mapping[str, Clipping],
    origin: Origin,
    loss: OutputLoss = cross_entropy,
    steps: int = 0,
    rate: float = 0.05,
) -> Convergence:
    """The tangent kernel of a model, and what each clipping rule makes of it.

    **Guarantees.** None: everything here is a function of the examples. Pass public or made-up ones; with others the
    report is stamped.

    Args:
        model: from inputs to outputs; left as it is.
        inputs, targets: N of each.
        rules: name -> rule.
        origin: where the examples come from.
        loss: of outputs and targets, one value per example.
        steps: of noise-free clipped descent for the curves; the rate of step t is ``rate / sqrt(1 + t)``.
    """
    kernels = tangent_kernel(model, inputs)
    with torch.no_grad():
        outputs = model(inputs)
    flows = {name: flow(kernels, outputs, targets, rule=rule, loss=loss) for name, rule in rules.items()}
    curves = {
        name: descend(model, inputs, targets, rule=rule, loss=loss, steps=steps, rate=rate)
        for name, rule in rules.items()
        if steps
    }
    return Convergence(flows, curves, len(inputs), outputs[0].numel(), origin)


def descend(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, rule: Clipping, loss: OutputLoss, steps: int, rate: float
) -> tuple[float, ...]:
    """Summed loss at each step of clipped descent without noise; the model's weights are put back afterwards."""
    parameters = trainable(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    seen = []

    def losses(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(network(batch[0]), batch[1])

    try:
        for step in range(steps):
            total = clipped_gradient(model, losses, (inputs, targets), clipping=rule)
            with torch.no_grad():
                seen.append(float(losses(model, (inputs, targets)).sum()))
                for name, parameter in parameters.items():
                    parameter -= rate / math.sqrt(1.0 + step) * total.tensors[name]
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
    return tuple(seen)


def stationary_probability(rule: Clipping, probability: float, *, feature_norm: float = 1.0) -> float:
    """Where clipped descent leaves a logistic model whose examples share one input: the s of

        p (1 - s) c((1 - s) n) = (1 - p) s c(s n),    n = |x|, p >= 1/2 the true probability

    so that ``s = p`` is calibrated, and ``s > p`` too sure. With ``rho = R / n`` and ``g = gamma / n``:

    - abadi: p for rho >= p, else ``1 - rho (1 - p) / p``; none: p; normalized: 1;
    - automatic: ``[a - g + sqrt((a - g)^2 + 4 a g p)] / (2 a)``, ``a = 2 p - 1``;
    - global, which fades over d = 1/8 of its bound: p for rho >= p; for rho >= 1 / (1 + d) the s at which the minority
      that has not quite faded holds the balance; 1 for smaller rho, the minority being dropped for ever; and 1/2 for
      rho <= 1 / (2 + 2 d), where nothing moves;
    - psac: the root of the equation, by bisection.

    Derived here; the idea that clipping is descent on another loss is that of arXiv:2106.07830.

    Args:
        rule: any; the quantile rule is taken at its present bound.
        probability: p, in [1/2, 1).
        feature_norm: n, the constant input of the bias included.
    """
    p = probability
    if not 0.5 <= p < 1 or not 0 < feature_norm < math.inf:
        raise ConfigError(f"probability {p}, feature norm {feature_norm}: must be in [1/2, 1), and finite above 0.")
    rho, g = rule.clip_bound / feature_norm, rule.gamma / feature_norm
    if rule.kind is ClippingKind.NONE or p == 0.5:
        return p
    if rule.kind in (ClippingKind.ABADI, ClippingKind.QUANTILE):
        return p if rho >= p else 1.0 - rho * (1.0 - p) / p
    if rule.kind is ClippingKind.NORMALIZED:
        return 1.0
    if rule.kind is ClippingKind.GLOBAL:
        return _where_fading_ends(rho, p)
    if rule.kind is ClippingKind.AUTOMATIC:
        a = 2.0 * p - 1.0
        return (a - g + math.sqrt((a - g) ** 2 + 4.0 * a * g * p)) / (2.0 * a)

    def drift(s: float) -> float:
        return p * _pull((1.0 - s) * feature_norm, rule.gamma) - (1.0 - p) * _pull(s * feature_norm, rule.gamma)

    return _root(drift)


def _where_fading_ends(rho: float, p: float) -> float:
    """Under the global rule: between rho and (1 + d) rho, ``p (1 - s) = (1 - p) (rho - (s - rho) / d)``."""
    if rho >= p:
        return p
    if 2 * rho * (1 + FADING) <= 1:
        return 0.5
    steeper = (1 - p) / FADING - p
    s = ((1 - p) * rho * (1 + 1 / FADING) - p) / steeper if steeper else 1.0
    return s if rho < s < min(1.0, rho * (1 + FADING)) else 1.0


def _pull(norm: float, r: float) -> float:
    """Length of a clipped gradient under PSAC; grows with the norm."""
    return norm / (norm + r / (norm + r))


def _root(drift: Callable[[float], float]) -> float:
    """Where a falling function of s crosses zero between 0 and 1."""
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if drift(middle) > 0 else (low, middle)
    return (low + high) / 2
