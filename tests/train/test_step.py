from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from discreet.core.clipping import ClippedSum, Clipping
from discreet.core.gradient import clipped_gradient, trainable
from discreet.core.noise import release
from discreet.core.rng import NoiseSource
from discreet.errors import ConfigError
from discreet.train.check import check
from discreet.train.examples import Examples
from discreet.train.make_private import _microbatch_size
from discreet.train.step import ClippedStep, Microbatch, is_out_of_memory, whole_batch, write_gradient
from discreet.train.stillness import Allowed, Watch
from discreet.train.throughput import CPU_MICROBATCH
from train import toys


def _step(model: nn.Module, *, microbatch: int, dtype: torch.dtype, loss=toys.loss) -> ClippedStep:
    examples = Examples(toys.data(dtype))
    return ClippedStep(
        model=model,
        loss=loss,
        fetch=lambda indices: examples.fetch(indices, device=torch.device("cpu")),
        parameters=trainable(model),
        clipping=Clipping.abadi(0.5),
        layout=None,
        microbatch=Microbatch(microbatch),
        watch=Watch(model, Allowed()),
    )


@pytest.mark.parametrize("microbatch", [1, 2, 7, 33, 1000])
def test_microbatch_size_never_changes_the_result(microbatch: int) -> None:
    model = toys.model(torch.float64)
    indices = np.arange(0, toys.EXAMPLES, 2)
    whole = clipped_gradient(model, toys.loss, toys.data(torch.float64)[indices], clipping=Clipping.abadi(0.5))
    split = _step(model, microbatch=microbatch, dtype=torch.float64).clipped_sum(indices)
    for name, value in whole.tensors.items():
        torch.testing.assert_close(split.tensors[name], value, rtol=1e-12, atol=1e-13)
    assert split.sensitivity == 0.5


def test_empty_batch_sums_to_zero_for_every_parameter() -> None:
    total = _step(toys.model(), microbatch=8, dtype=torch.float32).clipped_sum(np.empty(0, dtype=np.int64))
    assert set(total.tensors) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert all(not value.any() for value in total.tensors.values())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError()])
@pytest.mark.parametrize("fits", [1, 5, 20])
def test_out_of_memory_halves_and_drops_no_example(error: BaseException, fits: int) -> None:
    attempts: list[int] = []
    sizes: list[int] = []

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        attempts.append(len(batch[0]))
        if len(batch[0]) > fits:
            raise error
        return toys.loss(model, batch)

    model = toys.model(torch.float64)
    indices = np.arange(50)
    step = _step(model, microbatch=4096, dtype=torch.float64, loss=loss)
    step.microbatch.on_halving = lambda: sizes.append(step.microbatch.size)
    total = step.clipped_sum(indices)
    whole = clipped_gradient(model, toys.loss, toys.data(torch.float64)[indices], clipping=Clipping.abadi(0.5))
    for name, value in whole.tensors.items():
        torch.testing.assert_close(total.tensors[name], value, rtol=1e-12, atol=1e-13)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 25
    assert sizes[-1] <= fits
    assert type(next(model.parameters())) is nn.Parameter


def test_out_of_memory_on_a_single_example_is_an_error() -> None:
    def loss(model: nn.Module, batch: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        _step(toys.model(), microbatch=8, dtype=torch.float32, loss=loss).clipped_sum(np.arange(8))


def test_other_errors_are_not_taken_for_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(RuntimeError("out of resource: shared memory, Required: 180264, Limit: 101376"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail] DefaultCPUAllocator: can't allocate memory",
        "CUDA error: out of memory",  # what the driver takes for itself: a context, a graph, a stack for a kernel
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "MPS backend out of memory (MPS allocated: 17.00 GB)",
    ],
)
def test_memory_that_libraries_and_drivers_miss_is_memory(said: str) -> None:
    assert is_out_of_memory(RuntimeError(said))


def test_gradient_is_divided_by_the_expected_batch() -> None:
    model = toys.model()
    total = _step(model, microbatch=64, dtype=torch.float32).clipped_sum(np.arange(13))
    released = release(total, noise_multiplier=0.0, source=NoiseSource.insecure_seed(0), divisor=40)
    write_gradient(released, trainable(model))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, total.tensors[name] / 40)


def test_gradient_of_another_set_of_parameters_is_refused() -> None:
    model = toys.model()
    total = _step(model, microbatch=64, dtype=torch.float32).clipped_sum(np.arange(3))
    released = release(total, noise_multiplier=0.0, source=NoiseSource.insecure_seed(0))
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(ConfigError, match="different parameters"):
        write_gradient(released, trainable(model))


@pytest.mark.parametrize(("size", "count"), [(64, 1024), (1, 4096)])
def test_no_example_of_a_large_batch_moves_the_sum_of_its_microbatches_by_more_than_the_bound(
    size: int, count: int
) -> None:
    """All examples alike, the worst that rounding can do: float32 sums moved by 1.0044 bounds, and by 1.0001."""
    worst = 0.0
    for bound in (1.0, 0.77, 0.51):
        model = nn.Linear(32, 4, bias=False)
        clipping = Clipping.abadi(bound)
        x = torch.ones(size, 32)

        def share(x: torch.Tensor, model: nn.Module = model, clipping: Clipping = clipping) -> ClippedSum:
            layout = check(model, _summed, torch.randn(4, 32)).layout
            return clipped_gradient(model, _summed, x, clipping=clipping, layout=layout, examples=len(x))

        each, less = share(x), share(x[1:])
        whole, without = (first + each for first in (each, less))
        for _ in range(count - 2):
            whole += each
            without += each
        moved = (whole.tensors["weight"] - without.tensors["weight"]).norm()
        worst = max(worst, float(moved) / bound)
    assert 0.999 < worst <= 1.0


def _summed(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).sum(1)


def test_a_sum_of_sums_leaves_those_that_it_was_made_from_alone() -> None:
    one, two = (ClippedSum({"w": torch.full((3,), value)}, sensitivity=1.0) for value in (1.0, 2.0))
    total = one + two
    total += two
    assert total.tensors["w"].dtype is torch.float64
    assert total.tensors["w"].tolist() == [5.0] * 3
    assert one.tensors["w"].tolist() == [1.0] * 3
    assert two.tensors["w"].tolist() == [2.0] * 3
    with pytest.raises(ConfigError, match="one Clipping"):
        total += ClippedSum({"w": torch.zeros(3)}, sensitivity=2.0)


def test_memory_that_runs_out_for_one_example_more_does_not_move_the_shares_of_all_others() -> None:
    """What is taken off for rounding was told by the microbatch that fitted: half of it moved 4,096 by one share."""
    full = 4096

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > full:
            raise torch.OutOfMemoryError("no room")
        return model(batch).squeeze(1)

    torch.manual_seed(0)
    rows = torch.full((full + 1, 4), 10.0)
    sums = []
    for count in (full, full + 1):
        model = nn.Linear(4, 1, bias=False)
        step = ClippedStep(
            model=model,
            loss=loss,
            fetch=lambda indices: rows[torch.from_numpy(indices)],
            parameters=trainable(model),
            clipping=Clipping.abadi(1.0),
            layout=None,
            microbatch=Microbatch(2 * full),
            watch=None,
        )
        sums.append(step.clipped_sum(np.arange(count)).tensors["weight"].double())
    assert step.microbatch.size < full
    assert float((sums[1] - sums[0]).norm()) <= 1.0


def test_a_microbatch_that_is_restored_is_never_above_the_most() -> None:
    asked = Microbatch(8, batch=100)
    asked.restore(64)
    assert (asked.size, asked.at_most) == (64, 64)
    asked.halve(realised=64)
    assert (asked.size, asked.at_most) == (32, 64)
    larger = Microbatch(500, batch=100)
    assert (larger.size, larger.at_most) == (500, 100)
    for size in (20, 500, 512):
        larger.restore(size)
        assert (larger.size, larger.at_most) == (size, 100)


@pytest.mark.parametrize("asked", [None, 7])
def test_an_accelerator_tries_a_whole_batch_and_a_processor_does_not(asked: int | None) -> None:
    most = whole_batch(100)
    assert most == 176
    sizes = [_microbatch_size(asked, torch.device(kind), most) for kind in ("cuda", "cpu")]
    assert sizes == ([asked, asked] if asked else [most, CPU_MICROBATCH])
