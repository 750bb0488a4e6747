"""What one forward drew is given to another with other examples: each keeps its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from discreet.core.draws import Draws
from discreet.core.layout import frozen_state

B, D, T = 4, 3, 5
NOTHING = nn.Identity()


def _two_forwards(forward, rows):
    """What the forward makes of B examples, of these rows of them, and whether all draws were followed."""
    draws, x = Draws(B), torch.randn(B, T, D)
    with frozen_state(NOTHING), draws.written():
        whole = forward(x)
    with frozen_state(NOTHING), draws.given(rows):
        part = forward(x[list(rows)])
    return whole, part, draws.followed


FORWARDS = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "dropout in one launch": lambda x: torch.native_dropout(x, 0.4, True)[0],
    "dropout of features": lambda x: F.dropout1d(x, 0.5),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.4, training=True),
    "noise": lambda x: x + torch.randn_like(x) + torch.rand(x.shape) + torch.empty_like(x).normal_(2.0),
    "a level for each example": lambda x: x * torch.rand(len(x), 1, 1),
    "whole numbers": lambda x: x + torch.randint(0, 100, (len(x), 1, 1)),
    "Gumbel": lambda x: F.gumbel_softmax(x),
    "paths": lambda x: x * torch.empty(len(x), 1, 1).bernoulli_(0.5),
    "time first": lambda x: x + torch.randn(T, len(x), D).transpose(0, 1),
    "folded": lambda x: x + torch.randn(len(x) * T, D).view_as(x),
    "an order of the features": lambda x: x[:, :, torch.randperm(D)],
    "one for all": lambda x: x * torch.rand(()) + torch.randn(D),
    "chances": lambda x: torch.bernoulli(torch.sigmoid(x)) + torch.bernoulli(x, 0.5),
    "classes": lambda x: x * torch.multinomial(x.softmax(-1).flatten(0, 1), 2, replacement=True).sum(1).view(-1, T, 1),
    "a policy": lambda x: x * torch.distributions.Categorical(logits=x).sample()[..., None],
    "a mixture with itself": lambda x: x * torch.distributions.Beta(0.4, 0.4).sample((len(x), 1, 1)),
    "means": lambda x: torch.normal(x, x.abs()) + torch.normal(x, 0.1) + torch.poisson(x.abs()),
    "an attention that drops nothing": lambda x: F.scaled_dot_product_attention(x, x, x) + torch.randn_like(x),
    "an attention that drops weights": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "nothing at all": lambda x: x * 2,
}


@pytest.mark.parametrize("name", list(FORWARDS))
@pytest.mark.parametrize("rows", [[2], [3, 1], [0, 1, 2, 3, 0, 1, 2, 3]])
def test_each_example_keeps_its_own(name, rows):
    whole, part, followed = _two_forwards(FORWARDS[name], rows)
    assert followed
    assert torch.allclose(part, whole[rows], atol=1e-6)


def test_who_takes_the_place_of_an_example_takes_its_numbers():
    whole, part, followed = _two_forwards(lambda x: torch.randn_like(x), [0, 1, 1, 3])
    assert followed
    assert torch.equal(part, whole)


UNKNOWN = {
    "counts": lambda x: x + torch.binomial(torch.full_like(x, 5.0), x.sigmoid()),
    "as many as the data say": lambda x: x + torch.randn(2 + int(x.sum() > x[:1].sum())).sum(),
    "an order of the batch": lambda x: x + torch.randperm(len(x))[:, None, None],
    "places in the batch": lambda x: x + torch.randint(0, len(x), (len(x), 1, 1)),
    "as much as there are examples": lambda x: x + torch.empty_like(x).normal_(0.0, len(x)),
    "one more": lambda x: x + sum(torch.randn(()) for _ in range(len(x))),
}


@pytest.mark.parametrize("name", list(UNKNOWN))
def test_what_cannot_be_followed_is_said(name):
    torch.manual_seed(4)
    assert not all(_two_forwards(UNKNOWN[name], [row])[2] for row in (0, 2))


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: (torch.manual_seed(7), torch.randn_like(x))[1],
        lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(7)),
    ],
)
def test_numbers_under_a_seed_of_its_own_stay_at_their_places(draw):
    whole, part, followed = _two_forwards(lambda x: draw(x) + 0 * x, [2])
    assert followed
    assert not torch.allclose(part, whole[[2]])


@pytest.mark.parametrize("longer", [3, 9])
def test_an_example_keeps_its_own_when_all_are_padded_to_another_length(longer):
    """A mask for all of a padded batch: what both lengths have stays, and only that."""
    draws = Draws(B)
    with frozen_state(NOTHING), draws.written():
        noise, mask = torch.randn(B, T, D), torch.bernoulli(torch.full((B, T), 0.5))
    with frozen_state(NOTHING), draws.given(range(B)):
        other, turned = torch.randn(B, longer, D), torch.bernoulli(torch.full((B, longer), 0.5))
    both = min(longer, T)
    assert not draws.followed
    assert torch.equal(other[:, :both], noise[:, :both])
    assert torch.equal(turned[:, :both], mask[:, :both])


def test_what_is_made_of_chances_has_them():
    draws = Draws(1)
    with frozen_state(NOTHING), draws.written():
        heads = torch.bernoulli(torch.full((10_000,), 0.2)).mean()
        classes = torch.multinomial(torch.tensor([0.1, 0.0, 0.3, 0.6]), 10_000, replacement=True).bincount() / 10_000
    assert abs(heads - 0.2) < 0.03
    assert torch.allclose(classes, torch.tensor([0.1, 0.0, 0.3, 0.6]), atol=0.03)


def test_chances_that_follow_from_other_examples_show():
    whole, part, followed = _two_forwards(lambda x: torch.bernoulli((x - x.mean()).sigmoid()), [2])
    assert followed
    assert not torch.equal(part, whole[[2]])
