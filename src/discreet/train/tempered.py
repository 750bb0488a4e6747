"""Probabilities that mean what they say, at no extra budget: a temperature that is trained beside the model.

Clipping each example's gradient is descent on another loss than the one that was asked for (a Huberised one for a
binary linear model): once most examples are right, the wrong ones are cut short, and confidence grows without end. The
accuracy hardly suffers; nearly all of the damage is one factor on the logits. So the model is trained as always, and
one more parameter, the logarithm of an inverse temperature, is trained on the loss of the *tempered* logits, through
which no gradient flows back. Its group has a generous bound of its own, so that its gradient is hardly ever clipped,
and a noise weight that makes it a small part of the same Gaussian query:

    S^2 = R^2 + (k R)^2        one event in the ledger; all other noise grows by sqrt(1 + k^2), half a percent at k = .1

Temperature scaling is that of arXiv:1706.04599, section 4.2; that clipping and not noise is what needs it is the point
of arXiv:2106.07830.

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
"""Name of the submodule, and so the prefix of its group."""

BOUND, SMALL_BOUND = 2.0, 0.5
"""Clip bound of the model's gradient, with many examples and with few. Under cross entropy and with a bias in the last
layer no gradient is shorter than the error in the probabilities, which is near 1 at first: both are near the first
norms or below them. The larger is a little better calibrated in shape; the smaller keeps signal above noise."""

TEMPERATURE_BOUND = 10.0
"""Clip bound of ``d loss / d log(1 / T)``, in nats; an example passes it when it is wrong by more than ten of them."""

STEEPNESS = 3.0
"""Adam moves every number at one rate; the temperature must go further than a weight."""

MANY_EXAMPLES = 20_000


class Temperature(nn.Module):
    """Divide logits by one trained number: ``logits exp(3 s)``, s = 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(1))

    def forward(self, logits_BK: Tensor) -> Tensor:
        return logits_BK * torch.exp(self.log * STEEPNESS)

    @property
    def value(self) -> float:
        """T; above 1 where the logits alone were too sure. As public as the model is."""
        return float(torch.exp(-self.log.detach() * STEEPNESS))


class Tempered(nn.Module):
    """A classifier with a temperature after its logits. Train it with `tempered_cross_entropy`.

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

    Its gradient in the body is that of the plain loss; its gradient in the temperature is that of the tempered loss,
    the logits held fixed. Neither knows of the other.

    Args:
        model: guarded or not.
        inputs: what the body takes.
        targets_B: class indices.
        ignore_index: examples with this target have loss and gradients zero.
    """
    logits_BK = model.body(inputs)
    plain_B = F.cross_entropy(logits_BK, targets_B, reduction="none", ignore_index=ignore_index)
    tempered_BK = model.temperature(logits_BK.detach())
    tempered_B = F.cross_entropy(tempered_BK, targets_B, reduction="none", ignore_index=ignore_index)
    return plain_B + (tempered_B - tempered_B.detach())


def tempered_clipping(examples: int) -> Clipping:
    """The rule for a `Tempered` model: Abadi at `BOUND`, and the temperature as a group of its own.

    A function of the number of examples alone. Where there are few, a batch is small beside the noise: then the bound
    is small, and the temperature gets a larger share of the query (k = .25 and not .1; all noise grows by 3 %).

    Args:
        examples: N, public.
    """
    body, share = (BOUND, 0.1) if examples >= MANY_EXAMPLES else (SMALL_BOUND, 0.25)
    bound = TEMPERATURE_BOUND * STEEPNESS
    style = Style.groups(TEMPERATURE, bounds=(bound, body), noise_weights=(bound / (share * body), 1.0))
    return Clipping.abadi(math.hypot(bound, body), style=style)


def is_tempered(clipping: Clipping) -> bool:
    """Whether a rule sets a temperature apart."""
    return TEMPERATURE in clipping.style.prefixes


def check_tempered(model: nn.Module, clipping: Clipping) -> None:
    """Refuse a tempered model under a rule that would let the temperature's gradient decide over all others.

    Raises:
        ConfigError: there is a temperature without a group of its own, or a group without a temperature.
    """
    if isinstance(model, Tempered) == is_tempered(clipping) or clipping.kind is ClippingKind.NONE:
        return
    if isinstance(model, Tempered):
        raise ConfigError(
            f"clipping {clipping.describe()} for a Tempered model: its temperature needs a group of its own; leave "
            "clipping out, or train the bare model."
        )
    raise ConfigError("clipping sets a temperature apart, and the model has none; wrap it in discreet.Tempered.")


def reason(clipping: Clipping, examples: int) -> str:
    """Why `tempered_clipping` was chosen, for the record and the report."""
    body = clipping.style.bounds[-1]
    share = clipping.divide([f"{TEMPERATURE}.log", "body"]).sensitivity / body - 1.0
    return (
        f"clipping: abadi at {body:g}, chosen from public facts alone (cross entropy, {examples:,} examples). It "
        "makes a model too sure of itself and leaves its accuracy; so a temperature is trained inside the same query, "
        f"which makes all other noise {100 * share:.2g} % larger. It is bounded apart, at {TEMPERATURE_BOUND:g} nats."
    )
