"""The tasks: public data, the program's models, and sizes that two CPU cores can afford.

Batches are the planner's, but at most `LARGEST_BATCH`; the number of updates is 300, on the toy 600 as in its source;
`SMALL` cuts all of it down.
The noise is solved for epsilon at these sizes. Statistics of tables are computed without noise and not charged: every
contestant gets the same features, and it is rates that are compared.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discreet.app import models
from discreet.app.data import Prepared, Preprocessing
from discreet.app.data import digits as load_digits
from discreet.app.data.source import Examples
from discreet.app.models import ModelKind
from discreet.app.options import DataOptions, open_data
from discreet.core.gradient import LossFunction
from discreet.core.rng import NoiseSource
from discreet.privacy.plan import Plan
from discreet.privacy.planner import plan as planned

LARGEST_BATCH = 2048
UPDATES = 300


@dataclass(frozen=True)
class Size:
    """What a task is cut to: the first rows in the order of the data, and an upper limit of the planner's batch."""

    train: int
    test: int
    updates: int
    batch: int


SMALL = {
    "toy": Size(20_000, 4_000, 300, 500),
    "transfer": Size(20_000, 4_000, 300, 500),
    "digits": Size(1_447, 350, 300, 256),
    "adult": Size(32_561, 16_281, 150, 1_024),
    "mnist": Size(12_000, 5_000, 150, 256),
    "fashion_mnist": Size(12_000, 5_000, 150, 256),
    "sms": Size(4_462, 1_112, 150, 256),
    "names": Size(29_033, 3_000, 150, 128),
    "lora": Size(29_033, 3_000, 150, 128),
}
"""Sizes at which every task has a grid and three seeds in an hour or two of one core."""
ADULT = (
    "age,workclass,fnlwgt,education,education_num,marital_status,occupation,relationship,race,sex,capital_gain,"
    "capital_loss,hours_per_week,native_country,income"
)


@dataclass(frozen=True)
class Task:
    """What is trained. ``accuracy`` is the share of right answers on held-out rows, or of right next characters."""

    name: str
    train: Examples
    test: Examples
    build: Callable[[], nn.Module]
    loss: LossFunction = models.loss
    updates: int = UPDATES
    batch: int | None = None
    largest_batch: int = LARGEST_BATCH

    def plan(self, epsilon: float) -> Plan:
        """Sizes and noise at this epsilon; delta 1 / N^1.1, on the toy 1e-5."""
        examples = len(self.train)
        delta = 1e-5 if self.name in ("toy", "transfer") else None
        usual = planned(examples=examples, epsilon=epsilon, delta=delta, usual_steps=self.updates)
        batch = min(self.largest_batch, usual.batch_size if self.batch is None else self.batch)
        return Plan.solve(examples=examples, batch_size=batch, steps=self.updates, epsilon=epsilon, delta=delta)

    def model(self, seed: int) -> nn.Module:
        """Fresh weights, the same for every contestant of a seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build()

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """In evaluation mode, on the held-out rows."""
        model.eval()
        right = total = 0.0
        for start in range(0, len(self.test), 1024):
            features, targets = self.test.batch(torch.arange(start, min(start + 1024, len(self.test))))
            guesses = model(features).argmax(-1)
            counted = targets >= 0
            right += float(((guesses == targets) & counted).sum())
            total += float(counted.sum())
        model.train()
        return right / total


def load(name: str, data: Path, *, small: bool = False) -> Task:
    """A task by its name, at full size or cut to `SMALL`; real data are read below ``data``."""
    task = TASKS[name](data)
    return cut(task, SMALL[name]) if small else task


def cut(task: Task, size: Size) -> Task:
    """The task with fewer rows and updates, and smaller batches."""

    def first(examples: Examples, rows: int) -> Examples:
        return Examples(features=examples.features[:rows], targets=examples.targets[:rows])

    train, test = first(task.train, size.train), first(task.test, size.test)
    return dataclasses.replace(task, train=train, test=test, updates=size.updates, largest_batch=size.batch)


def _toy(data: Path) -> Task:
    """Section 6 of the specification: 10 classes of 3 Gaussian modes in 40 dimensions, MLP 40-64-10."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 3, 40, generator=generator) * 0.55

    def draw(count: int) -> Examples:
        targets = torch.randint(10, (count,), generator=generator)
        modes = torch.randint(3, (count,), generator=generator)
        features = centres[targets, modes] + torch.randn(count, 40, generator=generator)
        return Examples(features=features, targets=targets)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 10))

    return Task("toy", draw(20_000), draw(4_000), build, updates=600, batch=500)


def _transfer(data: Path) -> Task:
    """Fine-tuning: the toy's network, trained without noise on public data, with all features shifted by one vector."""
    toy = _toy(data)
    generator = torch.Generator().manual_seed(9)
    public = toy.train.features + 0.6 * torch.randn(40, generator=generator)
    model = _trained(toy.model(0), toy.loss, Examples(features=public, targets=toy.train.targets))
    return dataclasses.replace(toy, name="transfer", build=lambda: copy.deepcopy(model))


def _trained(model: nn.Module, loss: LossFunction, public: Examples, *, updates: int = 1500) -> nn.Module:
    """The model after ordinary training on public data."""
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(updates):
        batch = public.batch(torch.randint(len(public), (256,), generator=generator))
        optimizer.zero_grad()
        loss(model, batch).mean().backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model


def _digits(data: Path) -> Task:
    return _program("digits", load_digits(), ModelKind.MLP)


def _adult(data: Path) -> Task:
    options = DataOptions(
        data / "adult" / "adult.data",
        target="income",
        test=data / "adult" / "adult.test",
        columns=tuple(ADULT.split(",")),
    )
    return _program("adult", _prepared(options, ModelKind.MLP), ModelKind.MLP)


def _images(name: str) -> Callable[[Path], Task]:
    return lambda data: _program(name, _prepared(DataOptions(data / name), ModelKind.CNN), ModelKind.CNN)


def _sms(data: Path) -> Task:
    options = DataOptions(data / "sms_spam" / "SMSSpamCollection", target="label", columns=("label", "text"))
    return _program("sms", _prepared(options, ModelKind.LINEAR), ModelKind.LINEAR)


def _prepared(options: DataOptions, kind: ModelKind) -> Prepared:
    source = open_data(options, kind=kind)
    return source.prepare(
        noise_source=NoiseSource.insecure_seed(0), preprocessing=Preprocessing.share(epsilon=math.inf, delta=1e-5)
    )


def _program(name: str, prepared: Prepared, kind: ModelKind) -> Task:
    """The program's model of a kind, on data as the program prepares them."""
    spec = models.specify(kind, input_spec=prepared.input, classes=len(prepared.classes))
    assert prepared.test is not None
    return Task(name, prepared.train, prepared.test, lambda: models.build(spec))


LENGTH, LETTERS = 16, 28
"""Characters of a name with its end; the end, and letters a to z, and anything else."""


class NameModel(nn.Module):
    """A character model of names: two causal pre-norm blocks of width 32 with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(LETTERS, 32), nn.Embedding(LENGTH, 32)
        self.blocks = nn.ModuleList(
            [
                nn.ModuleList([nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32), nn.LayerNorm(32), _mlp(32)])
                for _ in range(2)
            ]
        )
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, LETTERS)
        for table in (self.letters, self.places):
            nn.init.normal_(table.weight, std=32**-0.5)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Logits of the next character at every place, shape (B, L, letters)."""
        batch, length = ids_BL.shape
        place_BL = torch.arange(length).expand(batch, length)
        hidden_BLD = self.letters(ids_BL) + self.places(place_BL)
        for norm, mix, out, norm_mlp, mlp in self.blocks:  # type: ignore[misc]
            parts = mix(norm(hidden_BLD)).reshape(batch, length, 3, 2, 16).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
            hidden_BLD = hidden_BLD + out(mixed.transpose(1, 2).reshape(batch, length, 32))
            hidden_BLD = hidden_BLD + mlp(norm_mlp(hidden_BLD))
        return self.head(self.norm(hidden_BLD))


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def name_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One loss per name: the mean over its own characters, shape (B,)."""
    ids_BL, targets_BL = batch
    losses_BL = F.cross_entropy(model(ids_BL).transpose(1, 2), targets_BL, reduction="none", ignore_index=-1)
    return losses_BL.sum(1) / (targets_BL >= 0).sum(1).clamp(min=1)


def _names(data: Path) -> Task:
    ids, targets = _spelled((data / "names" / "makemore_names.txt").read_text().split())
    return Task(
        "names",
        Examples(features=ids[3000:], targets=targets[3000:]),
        Examples(features=ids[:3000], targets=targets[:3000]),
        NameModel,
        loss=name_loss,
        batch=512,
    )


def _lora(data: Path) -> Task:
    """The model of names, trained in public on surnames of 18 languages, learns first names by adapters of rank 4."""
    lines = [
        line
        for file in sorted((data / "names" / "by_language").glob("*.txt"))
        for line in file.read_text(encoding="utf-8").split()
    ]
    ids, targets = _spelled(lines)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _trained(NameModel(), name_loss, Examples(features=ids, targets=targets))

    def build() -> nn.Module:
        adapted = copy.deepcopy(model)
        for parameter in adapted.parameters():
            parameter.requires_grad_(False)
        for block in adapted.blocks:
            block[1], block[2] = Adapted(block[1]), Adapted(block[2])  # type: ignore[index]
            block[4][0], block[4][2] = Adapted(block[4][0]), Adapted(block[4][2])  # type: ignore[index]
        return adapted

    return dataclasses.replace(_names(data), name="lora", build=build)


class Adapted(nn.Module):
    """``W x + B A x``, W frozen: a low-rank adapter (arXiv:2106.09685) that starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of the base layer, and the adapter's on top."""
        return self.base(inputs) + self.up(self.down(inputs))


def _spelled(lines: list[str]) -> tuple[Tensor, Tensor]:
    """Names as ids and next characters, shuffled, each of shape (N, LENGTH); -1 behind the end."""
    ids = torch.zeros(len(lines), LENGTH, dtype=torch.int64)
    targets = torch.full((len(lines), LENGTH), -1)
    for row, line in enumerate(lines):
        codes = [ord(letter) - 96 if "a" <= letter <= "z" else 27 for letter in line.lower()[: LENGTH - 1]]
        ids[row, 1 : len(codes) + 1] = torch.tensor(codes)
        targets[row, : len(codes) + 1] = torch.tensor([*codes, 0])
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))
    return ids[order], targets[order]


TASKS: dict[str, Callable[[Path], Task]] = {
    "toy": _toy,
    "transfer": _transfer,
    "digits": _digits,
    "adult": _adult,
    "mnist": _images("mnist"),
    "fashion_mnist": _images("fashion_mnist"),
    "sms": _sms,
    "names": _names,
    "lora": _lora,
}

NAMES = {
    "toy": "toy",
    "transfer": "toy, fine-tuned",
    "digits": "digits",
    "adult": "Adult",
    "mnist": "MNIST, CNN",
    "fashion_mnist": "Fashion-MNIST, CNN",
    "sms": "SMS spam",
    "names": "names, transformer",
    "lora": "names, LoRA",
}
"""What the documentation calls the tasks."""
