"""Recipe A: ten Gaussian classes in 20 dimensions, a linear softmax, DP-SGD on 20,000 rows at lr = 1 / R.

Bayes accuracy .81. At R = .03 every gradient is clipped, and the model is too sure; at R = 30 it has learned too
little."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor


def drawn(rows: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Features with a constant one at their end, and labels."""
    means = np.random.default_rng(0).normal(size=(10, 20))
    means *= 2.55 / np.linalg.norm(means, axis=1, keepdims=True)
    generator = np.random.default_rng(seed)
    label = generator.integers(0, 10, rows)
    features = np.concatenate([means[label] + generator.normal(size=(rows, 20)), np.ones((rows, 1))], 1)
    return torch.from_numpy(features), torch.from_numpy(label)


def logits_of(weights: Tensor, features: Tensor) -> Tensor:
    """Logits, shape (N, 10)."""
    return features @ weights


@functools.cache
def descended(*, clip_bound: float, sigma: float = 1.729, steps: int = 400, rate: float = 0.05) -> Tensor:
    """Weights after DP-SGD: Poisson batches of expected 1,000 rows, learning rate 1 / R."""
    features, label = drawn(20_000, seed=1)
    generator = torch.Generator().manual_seed(1)
    weights = torch.zeros(21, 10, dtype=torch.float64)
    for _ in range(steps):
        batch = torch.rand(len(features), generator=generator) < rate
        x, y = features[batch], label[batch]
        slope = torch.softmax(x @ weights, 1) - torch.nn.functional.one_hot(y, 10)
        factor = (clip_bound / (x.norm(dim=1) * slope.norm(dim=1))).clamp(max=1)
        noise = torch.randn(21, 10, generator=generator, dtype=torch.float64)
        total = x.T @ (slope * factor[:, None]) + sigma * clip_bound * noise
        weights = weights - total / clip_bound / (rate * len(features))
    return weights
