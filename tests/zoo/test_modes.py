"""Modes of training on some of the zoo: half precision, activation checkpointing, dropout, parameters without a use."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from discreet.core.clipping import ROUNDING_MARGIN, Clipping
from discreet.core.gradient import clipped_gradient, trainable
from discreet.errors import UnsupportedUse
from discreet.train.check import check
from oracles import Gradients, abadi, alone, norms, relative_gap, weighted
from zoo.compare import gap, parameter_norms
from zoo.model import B, Batch, Loss, ZooModel
from zoo.models_language import mixtral
from zoo.packages import THIRD_PARTY_WARNINGS
from zoo.table_of_models import ZOO

pytestmark = [pytest.mark.filterwarnings(text) for text in THIRD_PARTY_WARNINGS]

SEED = 3
HALF = ("GPT-2", "Llama", "Gemma 3", "BERT", "T5", "ViT", "Swin", "ConvNeXt", "WRN-16-4", "LSTM", "LoRA on GPT-2")
CHECKPOINTED = ("GPT-2", "Llama", "Qwen3", "BERT", "DeBERTa-v2", "Pegasus", "BART", "Whisper", "ViT", "Swin", "Mixtral")
STOCHASTIC = ("GPT-2", "OPT", "BERT", "DeBERTa-v2", "ALBERT", "T5", "BART", "ViT", "timm Swin", "LoRA on GPT-2")


def _chosen(names: tuple[str, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", names)


def _zoo(name: str) -> ZooModel:
    zoo = ZOO[name]
    if not zoo.installed:
        pytest.skip(f"{zoo.family} is not installed; pip install 'discreet[zoo]'")
    return zoo


def _seeded(loss: Loss) -> Loss:
    """The same dropout masks in every forward of a batch of this size."""

    def seeded(model: nn.Module, batch: Batch) -> Tensor:
        torch.manual_seed(SEED)
        return loss(model, batch)

    return seeded


def _within_batch(model: nn.Module, loss: Loss, batch: Batch) -> Gradients:
    """Per-example gradients by autograd from one forward of the whole batch: what keeps the masks of each example."""
    losses_B = loss(model, batch)
    parameters = trainable(model)
    stacked: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for value in losses_B:
        row = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), row, strict=True):
            stacked[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    return {name: torch.stack(rows) for name, rows in stacked.items()}


def _set_dropout(model: nn.Module, p: float) -> None:
    """Dropout of a probability wherever the model has some, as a module or as a number that it hands on."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        for name, value in vars(module).items():
            if isinstance(value, float) and name in (
                "dropout",
                "attention_dropout",
                "activation_dropout",
                "dropout_prob",
            ):
                setattr(module, name, p)


@_chosen(HALF)
def test_norms_under_bfloat16_autocast(name):
    zoo = _zoo(name)
    exact_model, exact_batch = zoo.make(torch.float64)
    norm_B = norms(alone(exact_model, zoo.loss, exact_batch, size=B))

    def half(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return zoo.loss(model, batch)

    model, batch = zoo.make(torch.float32)
    report = check(model, zoo.loss, batch)  # in float32: its tolerance is not that of bfloat16
    report.raise_if_failed()
    assert report.layout is not None
    found = parameter_norms(model, half, batch, layout=report.layout)
    found_B = torch.stack([rows.double() for rows in found.values()]).norm(dim=0)
    assert float(((found_B - norm_B).abs() / norm_B).max()) < 2e-2


@_chosen(CHECKPOINTED)
def test_activation_checkpointing_changes_nothing(name):
    zoo = _zoo(name)
    sums = []
    for checkpointed in (False, True):
        model, batch = zoo.make(training=True)
        if checkpointed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        loss = _seeded(zoo.loss)
        report = check(model, zoo.loss, batch)
        report.raise_if_failed()
        sums.append(clipped_gradient(model, loss, batch, clipping=Clipping.abadi(0.5), layout=report.layout).tensors)
    assert relative_gap(sums[1], sums[0]) < 1e-9


def test_t5_with_activation_checkpointing_is_refused():
    """It then gives a zero bias of cross attention, made in its forward, a gradient: a leaf that no model owns."""
    zoo = _zoo("T5")
    model, batch = zoo.make(training=True)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(UnsupportedUse, match=r"\(1, 4, 9, 9\) is no parameter of this model"):
        clipped_gradient(model, zoo.loss, batch, clipping=Clipping.abadi(0.5))


@_chosen(STOCHASTIC)
def test_dropout_in_training_mode(name):
    zoo = _zoo(name)
    model, batch = zoo.make(training=True)
    _set_dropout(model, 0.2)
    report = check(model, zoo.loss, batch)
    report.raise_if_failed()
    loss = _seeded(zoo.loss)
    expected = _within_batch(model, loss, batch)
    norm_B = norms(expected)
    quiet_model, _ = zoo.make()
    assert float((norm_B - norms(_within_batch(quiet_model, loss, batch))).abs().max()) > 1e-3, "no dropout took place"
    bound = float(norm_B.min() + norm_B.max()) / 2
    clipping = Clipping.abadi(bound)
    total = clipped_gradient(model, loss, batch, clipping=clipping, layout=report.layout)
    factor_B = abadi(norm_B, bound)
    assert relative_gap(total.tensors, weighted(expected, _shrunk(factor_B))) < 1e-9
    for row in range(B):  # leave one out, with every other mask as it was
        keep_B = torch.arange(B) != row
        rest = clipped_gradient(
            model, lambda m, b, keep_B=keep_B: loss(m, b) * keep_B, batch, clipping=clipping, layout=report.layout
        )
        moved = {key: total.tensors[key] - rest.tensors[key] for key in total.tensors}
        size = float(torch.stack([value.norm() for value in moved.values()]).norm())
        assert size <= bound
        assert abs(size - float(norm_B[row] * _shrunk(factor_B)[row])) < 1e-9 * size


def _shrunk(factor_B: Tensor) -> Tensor:
    return torch.where(factor_B == 1, factor_B, factor_B * ROUNDING_MARGIN)


@_chosen(HALF)
def test_parameters_without_a_use_get_zeros(name):
    zoo = _zoo(name)
    model, batch = zoo.make()
    layout = check(model, zoo.loss, batch).layout
    before = clipped_gradient(model, zoo.loss, batch, clipping=Clipping.abadi(0.5), layout=layout).tensors
    model.register_parameter("spare", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    after = dict(clipped_gradient(model, zoo.loss, batch, clipping=Clipping.abadi(0.5), layout=layout).tensors)
    assert torch.equal(after.pop("spare"), torch.zeros(3, dtype=torch.float64))
    assert relative_gap(after, before) < 1e-12


def test_an_expert_that_no_token_chose_gets_zeros():
    zoo = _zoo("Qwen3-MoE")
    model, batch = zoo.make()
    batch = {"input_ids": torch.full_like(batch["input_ids"], 7)}  # one token, two experts a layer
    expected = alone(model, zoo.loss, batch, size=B)
    layout = check(model, zoo.loss, batch).layout
    total = clipped_gradient(model, zoo.loss, batch, clipping=Clipping.none(), layout=layout).tensors
    assert relative_gap(total, weighted(expected, torch.ones(B))) < 1e-9
    stacks = [total[name] for name in expected if name.endswith("experts.down_proj")]
    idle = sum(not expert.any() for stack in stacks for expert in stack)
    assert idle == 2 * len(stacks) > 0


def test_grouped_products_of_experts_in_float32():
    """The default of transformers, which torch does not offer in float64 on every device."""
    _zoo("Mixtral")
    zoo = dataclasses.replace(ZOO["Mixtral"], build=lambda: mixtral(experts_implementation="grouped_mm"))
    exact_model, exact_batch = ZOO["Mixtral"].make()  # the same weights: the name is the seed
    expected = alone(exact_model, zoo.loss, exact_batch, size=B)
    model, batch = zoo.make(torch.float32)
    found = gap(model, zoo.loss, batch, expected)
    assert max(dataclasses.asdict(found).values()) < 1e-4
