"""Probabilities that mean what they say, at no extra budget: a temperature and a floor, trained beside the model.

Clipping each example's gradient is descent on another loss than the one that was asked for (a Huberised one for a
binary linear model): once most examples are right, the wrong ones are cut short, and confidence grows without end. The
accuracy hardly suffers. Nearly all of the damage is one factor on the logits; where labels are wrong at random, it is
also that no answer should ever be surer than the labels are. So the model is trained as always, and two more numbers
are trained on the loss of

    p = (1 - e) softmax(z / T) + e / K        e: the floor, a share of all answers that is spread over the classes

through which no gradient flows back to z. It changes no answer. Each of the two is a group with a generous bound of its
own, so that its gradient is hardly ever clipped, and a noise weight that makes it a small part of the same Gaussian
query:

    S^2 = R^2 + 2 (k R)^2      one event in the ledger; all other noise grows by sqrt(1 + 2 k^2), one percent at k = .1

Temperature scaling is that of arXiv:1706.04599, section 4.2; that clipping and not noise is what needs it is the point
of arXiv:2106.07830. The floor is the noise model of symmetric label noise (arXiv:1406.2080) with one number.

Shape legend: B = examples, K = classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discreet.core.clipping import Clipping, ClippingKind
from discreet.core.style import Style
from discreet.errors import ConfigError

TEMPERATURE = "temperature"
"""Name of the submodule."""

GROUPS = (f"{TEMPERATURE}.log", f"{TEMPERATURE}.floor")
"""The prefixes of its two groups."""

BOUND, SMALL_BOUND = 6.0, 0.5
"""Clip bound of the model's gradient, with many examples and with few. Under cross entropy and with a bias in the last
layer no gradient is shorter than the error in the probabilities, which is near 1 at first. The larger bound is better
calibrated in shape; the smaller keeps signal above noise. See docs/lab-notes.md."""

TEMPERATURE_BOUND = 10.0
"""Clip bound of ``d loss / d log(1 / T)``, in nats; an example passes it when it is wrong by more than ten of them."""

FLOOR_BOUND = 10.0
"""Clip bound of ``d loss / d e``. A right answer pulls e down by 1, a wrong one up by as much as 1 / e: below a tenth
of the labels at random, the floor is left to the temperature."""

STEEPNESS, FLOOR_STEEPNESS = 3.0, 0.2
"""Adam moves every number at one rate: the temperature must go further than a weight, and the floor less far."""

FLOOR_SOFTNESS, FLOOR_START = 0.003, 0.02
"""The floor is even in its parameter, and linear beyond .003: one that nothing needs goes quickly, none is ever out of
reach, and noise about 0 does not matter. It starts at .002."""

_LEAST_FLOOR = 1e-6
"""Keeps the logarithm of a probability that float32 rounds to 0."""

MANY_EXAMPLES = 20_000


class Temperature(nn.Module):
    """From logits to log-probabilities with two trained numbers: T, 1 at first, and the floor e, .002 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(1))
        self.floor = nn.Parameter(torch.full((1,), FLOOR_START))

    def forward(self, logits_BK: Tensor) -> Tensor:
        """Logs of ``(1 - e) softmax(z / T) + e / K``, shape (B, K); logits whose softmax is these probabilities."""
        floor = self._floor()
        cooled_BK = torch.softmax(logits_BK * torch.exp(self.log * STEEPNESS), 1)
        return torch.log(cooled_BK * (1.0 - floor) + floor * (1.0 / logits_BK.shape[1]))

    @property
    def value(self) -> float:
        """T; above 1 where the logits alone were too sure. As public as the model is."""
        return float(torch.exp(-self.log.detach() * STEEPNESS))

    @property
    def share(self) -> float:
        """e, in (0, 1): near the share of labels that are random, where that is above a tenth; else near 0."""
        with torch.no_grad():
            return float(self._floor())

    def _floor(self) -> Tensor:
        place = self.floor * FLOOR_STEEPNESS
        odds = torch.sqrt(place * place + FLOOR_SOFTNESS**2) - FLOOR_SOFTNESS
        return odds / (1.0 + odds) + _LEAST_FLOOR


class Tempered(nn.Module):
    """A classifier with a temperature and a floor after its logits. Train it with `tempered_cross_entropy`.

    Its output is logits whose softmax is its probabilities; they are logs of probabilities already.

    Args:
        body: the model, from inputs to logits of shape (B, K).
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.temperature = Temperature()

    def forward(self, inputs: Any) -> Tensor:
        return self.temperature(self.body(inputs))


def tempered_cross_entropy(model: Tempered, inputs: Any, targets_B: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Cross entropy of each example under the untempered logits, shape (B,), in nats.

    Its gradient in the body is that of the plain loss; its gradient in temperature and floor is that of the tempered
    loss, the logits held fixed. Neither knows of the other.

    Args:
        model: guarded or not.
        inputs: what the body takes.
        targets_B: class indices.
        ignore_index: examples with this target have loss and gradients zero.
    """
    logits_BK = model.body(inputs)
    plain_B = F.cross_entropy(logits_BK, targets_B, reduction="none", ignore_index=ignore_index)
    tempered_BK = model.temperature(logits_BK.detach())
    tempered_B = F.nll_loss(tempered_BK, targets_B, reduction="none", ignore_index=ignore_index)
    return plain_B + (tempered_B - tempered_B.detach())


def tempered_clipping(examples: int) -> Clipping:
    """The rule for a `Tempered` model: Abadi at `BOUND`, and temperature and floor as groups of their own.

    A function of the number of examples alone. Where there are few, a batch is small beside the noise: then the bound
    is small, and temperature and floor get larger shares of the query (k = .15 and not .1; all noise grows by 2.2 %).

    Args:
        examples: N, public.
    """
    body, share = (BOUND, 0.1) if examples >= MANY_EXAMPLES else (SMALL_BOUND, 0.15)
    bounds = (TEMPERATURE_BOUND * STEEPNESS, FLOOR_BOUND * FLOOR_STEEPNESS)
    weights = [bound / (share * body) for bound in bounds]
    style = Style.groups(*GROUPS, bounds=(*bounds, body), noise_weights=(*weights, 1.0))
    return Clipping.abadi(math.hypot(*bounds, body), style=style)


def numbers_beside(model: nn.Module) -> frozenset[int]:
    """Identities (`id`) of the temperatures and floors in a model: parameters, but no weights of it.

    Displacing them changes no answer and no gradient of a weight, so they say nothing about how much noise weights
    bear; and far out they make the tempered loss infinite.
    """
    return frozenset(
        id(parameter)
        for module in model.modules()
        if isinstance(module, Temperature)
        for parameter in module.parameters()
    )


def is_tempered(clipping: Clipping) -> bool:
    """Whether a rule sets a temperature apart."""
    return set(GROUPS) <= set(clipping.style.prefixes)


def body_bound(clipping: Clipping) -> float:
    """The clip bound of the model's own gradient; the record's ``clip_bound`` is that of all groups together."""
    if not is_tempered(clipping):
        return clipping.clip_bound
    return clipping.clip_bound * clipping.style.bounds[-1] / math.hypot(*clipping.style.bounds)


def check_tempered(model: nn.Module, clipping: Clipping) -> None:
    """Refuse a tempered model under a rule that would let the temperature's gradient decide over all others.

    Raises:
        ConfigError: there is a temperature without groups of its own, or groups without a temperature.
    """
    if isinstance(model, Tempered) == is_tempered(clipping) or clipping.kind is ClippingKind.NONE:
        return
    if isinstance(model, Tempered):
        raise ConfigError(
            f"clipping {clipping.describe()} for a Tempered model: its temperature and floor need groups of their own; "
            "leave clipping out, or train the bare model."
        )
    raise ConfigError("clipping sets a temperature apart, and the model has none; wrap it in discreet.Tempered.")


def reason(clipping: Clipping, examples: int) -> str:
    """Why `tempered_clipping` was chosen, for the record and the report."""
    body = body_bound(clipping)
    more = clipping.divide([*GROUPS, "body"]).sensitivity / body - 1.0
    return (
        f"clipping: abadi at {body:g}, chosen from public facts alone (cross entropy, {examples:,} examples). It makes "
        "a model too sure of itself and leaves its accuracy; so a temperature and a floor under all probabilities are "
        f"trained inside the same query, which makes all other noise {100 * more:.2g} % larger. They are bounded apart."
    )
