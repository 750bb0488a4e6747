"""Your model, your optimizer, your loop: private training on scikit-learn's digits, then a look at the ledger.

python examples/own_loop.py [steps]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import discreet

TRAINING_ROWS = 1400


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One loss per example, shape (B,)."""
    pixels, digit = batch
    return F.cross_entropy(model(pixels), digit, reduction="none")


def main(steps: int) -> None:
    pixels, digit = load_digits(return_X_y=True)
    inputs = torch.from_numpy(pixels).float() / 8 - 1  # 0..16 is public: it is the format of the images
    labels = torch.from_numpy(digit).long()
    train = torch.utils.data.TensorDataset(inputs[:TRAINING_ROWS], labels[:TRAINING_ROWS])

    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    report = discreet.check(model, loss, train[:4])
    print(report.table())
    report.raise_if_failed()

    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "digits"
        private = discreet.make_private(
            model,
            torch.optim.Adam(model.parameters()),
            train,
            loss=loss,
            epsilon=3.0,
            batch_size=700,
            steps=steps,
            learning_rate=0.02,
            run_dir=run_dir,
        )
        for step in private:
            if (step.index + 1) % 50 == 0:
                print(f"step {step.index + 1}: epsilon at most {step.epsilon:.2f}, rate {step.learning_rate:.4f}")

        with torch.no_grad():
            right = model(inputs[TRAINING_ROWS:]).argmax(1) == labels[TRAINING_ROWS:]
        print(f"test accuracy {right.float().mean():.3f}")
        verified = discreet.verify(run_dir)
        print(f"verified: epsilon {verified.epsilon:.3f} at delta {verified.delta:.2e}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
