"""The ways to make one update: without privacy, with Discreet, and with Opacus.

Each contestant prepares a workload and returns a step; the step tells a stopwatch when each of its phases is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

import discreet
from bench.engine.imported import Logits
from bench.engine.models import Positions
from bench.engine.stopwatch import Stopwatch
from bench.engine.workloads import Workload
from discreet.core.axes import Layout
from discreet.core.book import Book
from discreet.core.gradient import backward, trainable
from discreet.core.meeting import guard
from discreet.core.replay import Replay
from discreet.core.style import Style
from discreet.train.step import forget_gradients, write_gradient

Step = Callable[[Stopwatch], None]
Contestant = Callable[[Workload], Step]
_CHECKED = 4
"""Examples that the self-check runs on, once, before the first step, as in training."""


def ordinary(work: Workload) -> Step:
    """Updates without privacy and without any hook."""
    optimizer = work.optimizer(work.model.parameters())

    def step(watch: Stopwatch) -> None:
        losses_B = work.loss(work.model, work.batch)
        watch.lap("forward")
        losses_B.mean().backward()
        watch.lap("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.lap("optimizer")

    return step


def noise(work: Workload) -> Step:
    """An ordinary update, and the draw and addition of noise: the floor under any private update."""
    parameters, optimizer = trainable(work.model), work.optimizer(work.model.parameters())
    source = discreet.NoiseSource.system()

    def step(watch: Stopwatch) -> None:
        work.loss(work.model, work.batch).mean().backward()
        watch.lap("forward and backward")
        buffers = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        total = discreet.ClippedSum(tensors=buffers, sensitivity=1.0)
        released = discreet.release(total, noise_multiplier=1.0, source=source, into=buffers)
        write_gradient(released, parameters)
        watch.lap("release")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.lap("optimizer")

    return step


def floor(work: Workload) -> Step:
    """What no private update by these norms can do without: an ordinary one, the noise, and the norms.

    They are taken of gradients that were booked once, before the first step. What a private update costs beyond this
    is booking itself, the factors, and sums that are made apart from the backward.
    """
    parameters, rule = trainable(work.model), discreet.Clipping.automatic()
    book = Book(trainable(work.model), examples=len(work.batch[0]), layout=_checked_layout(work, clipping=rule))
    with guard(book):
        backward(book, work.loss(work.model, work.batch))
    parts, ordinary_and_noise = book.parts(tuple(parameters)), noise(work)

    def step(watch: Stopwatch) -> None:
        norm2_B = sum(part.quick_norm2() for part in parts)
        assert torch.isfinite(torch.as_tensor(norm2_B)).all()
        watch.lap("norms")
        ordinary_and_noise(watch)

    return step


def private(work: Workload, *, style: Callable[[nn.Module], Style] | None = None, replayed: bool = False) -> Step:
    """Updates with clipping (flat, or in the groups of a style) and noise, as the training loop makes them."""
    rule = discreet.Clipping.automatic(style=style(work.model) if style else Style.flat())
    source = discreet.NoiseSource.system()
    parameters, optimizer = trainable(work.model), work.optimizer(work.model.parameters())
    layout = _checked_layout(work, clipping=rule)
    clipped = partial(discreet.clipped_gradient, work.model, work.loss, clipping=rule, layout=layout)
    if replayed:
        assert layout is not None
        clipped = Replay(work.model, work.loss, clipping=rule, layout=layout).clipped_gradient

    def step(watch: Stopwatch) -> None:
        forget_gradients(parameters)
        total = clipped(work.batch)
        watch.lap("clipped gradient")
        released = discreet.release(
            total, noise_multiplier=1.0, source=source, divisor=len(work.batch[0]), into=total.tensors
        )
        watch.lap("release")
        write_gradient(released, parameters)
        watch.lap("write")
        optimizer.step()
        watch.lap("optimizer")

    return step


def _checked_layout(work: Workload, *, clipping: discreet.Clipping) -> Layout | None:
    """What the self-check finds about the axes, as before training.

    Raises:
        CheckFailed: an example is not alone, or a norm is wrong.
    """
    inputs, targets = work.batch
    report = discreet.check(work.model, work.loss, (inputs[:_CHECKED], targets[:_CHECKED]), clipping=clipping)
    report.raise_if_failed()
    return report.layout


def _per_layer(_: nn.Module) -> Style:
    return Style.per_layer()


def compiled(work: Workload, *, contestant: Contestant) -> Step:
    """Another contestant, on the compiled model; compiled before its first step, and privately for any batch size."""
    return contestant(replace(work, model=torch.compile(work.model)))


def opacus_hooks(work: Workload) -> Step:
    """Opacus: per-example gradients are kept for every parameter, then clipped and summed (flat)."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = GradSampleModule(_suits_opacus(work.model).train(), batch_first=True, loss_reduction="mean", strict=False)
    optimizer = DPOptimizer(
        work.optimizer(model.parameters()),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=len(work.batch[0]),
    )

    def step(watch: Stopwatch) -> None:
        work.loss(model, work.batch).mean().backward()
        watch.lap("forward and backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.lap("clipping, noise and optimizer")

    return step


def opacus_ghost(work: Workload) -> Step:
    """Opacus: norms without per-example gradients where it knows the layer, and a second backward (flat)."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    model = GradSampleModuleFastGradientClipping(
        _suits_opacus(work.model).train(), batch_first=True, loss_reduction="mean", strict=False, max_grad_norm=1.0
    )
    optimizer = DPOptimizerFastGradientClipping(
        work.optimizer(model.parameters()),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=len(work.batch[0]),
    )

    def step(watch: Stopwatch) -> None:
        losses_B = work.loss(model, work.batch)
        watch.lap("forward")
        DPTensorFastGradientClipping(model, optimizer, losses_B, "mean").backward()
        watch.lap("two backwards")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.lap("noise and optimizer")

    return step


def _suits_opacus(model: nn.Module) -> nn.Module:
    """The same model in the form that Opacus asks for: the batch in every operand, and its own LSTM."""
    from opacus.layers import DPLSTM

    for module in list(model.modules()):
        if isinstance(module, (Positions, Logits)):
            module.per_example = True
        for name, child in module.named_children():
            if isinstance(child, nn.LSTM):
                weight = child.weight_ih_l0
                own = DPLSTM(child.input_size, child.hidden_size, batch_first=child.batch_first)
                setattr(module, name, own.to(device=weight.device, dtype=weight.dtype))
    return model


CONTESTANTS: Mapping[str, Contestant] = {
    "ordinary": ordinary,
    "noise": noise,
    "floor": floor,
    "private": private,
    "per_layer": partial(private, style=_per_layer),
    "blocks": partial(private, style=Style.blocks),
    "replayed": partial(private, replayed=True),
    "blocks_replayed": partial(private, style=Style.blocks, replayed=True),
    "ordinary_compiled": partial(compiled, contestant=ordinary),
    "private_compiled": partial(compiled, contestant=private),
    "opacus_hooks": opacus_hooks,
    "opacus_ghost": opacus_ghost,
}
BASELINE = "ordinary"
BASELINE_OF = {"private_compiled": "ordinary_compiled"}
"""What a contestant is measured against, where that is not the ordinary update."""
