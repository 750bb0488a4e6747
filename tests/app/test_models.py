"""Default models: the engine covers them, they rebuild from their record, and no example depends on another."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from discreet.app.data import IGNORED, ImageInput, TableInput, TextInput, TextUnits, digits
from discreet.app.models import ModelKind, ModelSpec, build, defaults, loss, rebuild, resolve, specify, text_units
from discreet.core.clipping import Clipping
from discreet.core.gradient import clipped_gradient
from discreet.errors import ConfigError

TABLE, IMAGE, COLOUR = TableInput(features=13), ImageInput(1, 28, 28), ImageInput(3, 33, 20)
TINY, TEXT = ImageInput(1, 8, 8), TextInput(vocabulary=200, length=12)

CASES = [
    (ModelKind.LINEAR, TABLE),
    (ModelKind.MLP, TABLE),
    (ModelKind.LINEAR, TINY),
    (ModelKind.MLP, COLOUR),
    (ModelKind.CNN, TINY),
    (ModelKind.CNN, IMAGE),
    (ModelKind.CNN, COLOUR),
    (ModelKind.LINEAR, TEXT),
    (ModelKind.MLP, TEXT),
    (ModelKind.TRANSFORMER, TEXT),
]


def _batch(input_spec, count=4):
    draws = torch.Generator().manual_seed(1)
    if isinstance(input_spec, TextInput):
        features = torch.randint(1, input_spec.vocabulary, (count, input_spec.length), generator=draws)
        features[:, 9:] = 0
        features[1] = 0  # a text without any token
    elif isinstance(input_spec, TableInput):
        features = torch.randn(count, input_spec.features, generator=draws)
    else:
        features = torch.randn(count, input_spec.channels, input_spec.height, input_spec.width, generator=draws)
    return features, torch.arange(count) % 3


def _one_by_one(model, batch, gamma=0.01):
    """Brute force: each example's own gradient, normalised, and summed."""
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for i in range(len(batch[1])):
        value = loss(model, tuple(part[i : i + 1] for part in batch)).sum()
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters.values(), strict=True)]
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient / (norm + gamma)
    return total


@pytest.mark.parametrize(("kind", "input_spec"), CASES)
def test_the_engine_clips_it_exactly(kind, input_spec):
    spec = specify(kind, input_spec=input_spec, classes=3)
    model = build(spec)
    batch = _batch(input_spec)
    batch[1][2] = IGNORED
    expected = _one_by_one(model, batch)
    found = clipped_gradient(model, loss, batch, clipping=Clipping.automatic())
    assert found.tensors.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found.tensors[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "input_spec"), CASES)
def test_no_example_depends_on_another(kind, input_spec):
    model = build(specify(kind, input_spec=input_spec, classes=3))
    batch = _batch(input_spec)
    together = loss(model, batch)
    alone = torch.cat([loss(model, tuple(part[i : i + 1] for part in batch)) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "input_spec"), CASES)
def test_it_is_rebuilt_from_its_record(kind, input_spec):
    spec = specify(kind, input_spec=input_spec, classes=3)
    model = build(spec)
    again = rebuild(json.loads(json.dumps(spec.to_json())))
    again.load_state_dict(model.state_dict())
    batch = _batch(input_spec)
    assert torch.equal(model(batch[0]), again(batch[0]))


@pytest.mark.parametrize(("kind", "input_spec"), CASES)
def test_every_parameter_is_used(kind, input_spec):
    model = build(specify(kind, input_spec=input_spec, classes=3))
    loss(model, _batch(input_spec)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) < 300_000


@pytest.mark.parametrize(("kind", "input_spec"), CASES)
def test_an_ignored_example_contributes_exactly_nothing(kind, input_spec):
    model = build(specify(kind, input_spec=input_spec, classes=3))
    features, _ = _batch(input_spec)
    batch = (features, torch.full((4,), IGNORED))
    assert loss(model, batch).tolist() == [0.0] * 4
    found = clipped_gradient(model, loss, batch, clipping=Clipping.automatic())
    assert all(float(value.abs().max()) == 0.0 for value in found.tensors.values())


def test_padding_changes_nothing():
    bag = build(specify(ModelKind.LINEAR, input_spec=TEXT, classes=2))
    short = torch.zeros(1, 12, dtype=torch.int64)
    short[0, :3] = torch.tensor([5, 6, 7])
    mixed = torch.zeros(1, 12, dtype=torch.int64)
    mixed[0, [1, 5, 9]] = torch.tensor([7, 5, 6])
    torch.testing.assert_close(bag(short), bag(mixed))
    transformer = build(specify(ModelKind.TRANSFORMER, input_spec=TEXT, classes=2))
    longer = build(specify(ModelKind.TRANSFORMER, input_spec=TEXT, classes=2))
    longer.load_state_dict(transformer.state_dict())
    with torch.no_grad():
        longer.words.weight[0] += 100.0
    torch.testing.assert_close(transformer(short), longer(short))


def test_a_transformer_reads_order():
    model = build(specify(ModelKind.TRANSFORMER, input_spec=TEXT, classes=2))
    words = torch.tensor([[5, 6, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    assert not torch.allclose(model(words), model(words[:, [2, 1, 0, *range(3, 12)]]))


@pytest.mark.parametrize(
    ("input_spec", "expected"), [(TABLE, ModelKind.MLP), (IMAGE, ModelKind.CNN), (TEXT, ModelKind.LINEAR)]
)
def test_auto(input_spec, expected):
    assert resolve(ModelKind.AUTO, input_spec) is expected
    assert specify(ModelKind.AUTO, input_spec=input_spec, classes=2).kind is expected


@pytest.mark.parametrize(
    ("kind", "input_spec"),
    [(ModelKind.CNN, TABLE), (ModelKind.CNN, TEXT), (ModelKind.TRANSFORMER, TABLE), (ModelKind.TRANSFORMER, IMAGE)],
)
def test_models_that_do_not_fit_the_data(kind, input_spec):
    with pytest.raises(ConfigError, match=kind.value):
        specify(kind, input_spec=input_spec, classes=2)


def test_text_is_cut_as_the_model_reads_it():
    assert text_units(ModelKind.TRANSFORMER) is TextUnits.WORDS
    assert text_units(ModelKind.AUTO) is TextUnits.NGRAMS


@pytest.mark.parametrize("side", [1, 2, 7, 8, 9, 16, 17, 32, 64, 100])
def test_images_of_any_size(side):
    size = ImageInput(channels=1, height=side, width=max(1, side // 2))
    model = build(specify(ModelKind.CNN, input_spec=size, classes=4))
    assert model(torch.zeros(2, 1, size.height, size.width)).shape == (2, 4)
    last = [layer for layer in model if isinstance(layer, nn.Linear)][-1]
    assert last.in_features <= 32 * 64


@pytest.mark.parametrize("change", [{"kind": "auto"}, {"kind": "rnn"}, {"classes": "3"}, {"width": None}, {"input": 3}])
def test_records_that_no_training_wrote(change):
    record = {**ModelSpec(ModelKind.MLP, TABLE, 3, 8).to_json(), **change}
    with pytest.raises(ConfigError, match="model record"):
        rebuild(record)


@pytest.mark.parametrize("kind", [kind for kind in ModelKind if kind is not ModelKind.AUTO])
def test_defaults_are_given_for_every_model(kind):
    found = defaults(kind)
    assert 0 < found.learning_rate < 0.1
    assert 50 <= found.steps <= 1000


def test_defaults_want_a_definite_kind():
    with pytest.raises(ConfigError, match="kind_for"):
        defaults(ModelKind.AUTO)


def test_defaults_learn_digits_without_privacy():
    """The upper end: plain Adam with the default rate and far fewer steps is above the private target."""
    data = digits()
    model = build(specify(ModelKind.AUTO, input_spec=data.input, classes=10))
    chosen = defaults(ModelKind.CNN)
    optimizer = torch.optim.Adam(model.parameters(), lr=chosen.learning_rate)
    for _ in range(40):
        optimizer.zero_grad()
        loss(model, data.train.batch(torch.arange(len(data.train)))).mean().backward()
        optimizer.step()
    features, targets = data.test.batch(torch.arange(len(data.test)))
    assert float((model(features).argmax(1) == targets).float().mean()) > 0.93
