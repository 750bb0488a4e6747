"""Where the kernels are used, what the engine is with them, and what the compiler makes of them for real GPUs."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blocks import Fn, loss, par
from cases import CASES
from contracts.products import needs_triton
from discreet.core.clipping import ROUNDING_MARGIN, Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.kernels import dispatch, processor
from discreet.core.outer import Outer
from discreet.core.route import ACCELERATOR, CPU, KERNELS, PANELS, TENSOR_CORES, Cost, Route
from discreet.train.check import check
from oracles import abadi, alone, flat, norms, relative_gap, rows, weighted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REACH = ("gram_products", "product_squares", "products", "weighted_sum")


@pytest.fixture
def used(monkeypatch) -> list[str]:
    """Every tensor counts as one on an accelerator; the names of the kernels that were called."""
    called: list[str] = []

    def spy(name):
        plain = getattr(dispatch, name)

        def kernel(*operands):
            called.append(name)
            return plain(*operands)

        return kernel

    monkeypatch.setattr(dispatch, "_on_accelerator", lambda value: True)
    for name in REACH:
        monkeypatch.setattr(dispatch, name, spy(name))
    with np.errstate(all="ignore"):
        yield called


def test_a_cpu_has_kernels_of_its_own_for_float32():
    value = torch.ones(2, 1, 20, 3)
    assert dispatch.suit(value) == dispatch.suit(value, value) == processor._is_there()
    assert not dispatch.suit_sums(value.bfloat16())
    for other in (
        value.bfloat16(),
        value.double(),
        value.to("meta"),
        value[:0],
        torch.complex(value, value).conj().imag,
    ):
        assert not dispatch.suit(other)
    assert not dispatch.suit(*[value] * 17)
    assert not dispatch.suit(value.expand(2, 1, 20, 3)[:, :, :1].expand(2, 1, 2049, 3))
    assert dispatch.prices(value, value) == (PANELS if processor._is_there() else CPU)
    assert dispatch.plain_prices(value) == CPU


def test_without_compiled_code_everything_is_as_before(monkeypatch):
    form = Outer(torch.randn(3, 1, 20, 40), torch.randn(3, 1, 20, 50), torch.Size((50, 40)))
    compiled = form.quick_norm2()
    monkeypatch.setattr(processor, "_is_there", lambda: False)
    assert dispatch.prices(form.input, form.grad) == CPU
    torch.testing.assert_close(replace(form).quick_norm2(), compiled, rtol=1e-3, atol=0.0)


@needs_triton
def test_dtype_and_shape_decide(used):
    value = torch.ones(2, 1, 20, 3)
    assert dispatch.suit(value, value.bfloat16(), value.half())
    assert not dispatch.suit(value, value.double())
    assert not dispatch.suit(value[:0])
    assert not dispatch.suit(value[:, :, :0])
    assert dispatch.suit_sums(value.bfloat16())
    assert not dispatch.suit_sums(value.bfloat16(), value)
    assert not dispatch.suit_sums(value[:, :, :15].bfloat16())
    assert dispatch.prices(value, value) == KERNELS
    assert dispatch.prices(value.bfloat16(), value.bfloat16()) == TENSOR_CORES
    assert dispatch.prices(value.double(), value.double()) == dispatch.plain_prices(value) == ACCELERATOR


def test_without_triton_everything_is_as_before(used, monkeypatch):
    monkeypatch.setattr(dispatch, "_found", lambda: False)
    form = Outer(torch.randn(3, 1, 20, 40), torch.randn(3, 1, 20, 50), torch.Size((50, 40)))
    assert form.choice.route is Route.GRAM
    assert dispatch.prices(form.input, form.grad) == ACCELERATOR
    torch.testing.assert_close(form.quick_norm2(), form.norm2(), rtol=1e-3, atol=0.0)
    assert used == []


@pytest.mark.parametrize(
    ("version", "found"), [("3.3.1", False), ("3.4.0", True), ("3.10.0+git1", True), (None, False)]
)
def test_an_old_triton_is_no_triton(version, found, monkeypatch):
    def installed(name):
        assert name == "triton"
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert dispatch._found.__wrapped__() is found


@pytest.mark.parametrize(
    ("capability", "hip", "interpreted", "stored"),
    [
        ((9, 0), None, "0", {torch.float32, torch.float16, torch.bfloat16}),
        ((8, 0), None, "0", {torch.float32, torch.float16, torch.bfloat16}),
        ((7, 5), None, "0", {torch.float32, torch.float16}),
        ((6, 1), None, "0", set()),
        ((9, 4), "6.4", "0", set()),  # AMD's cards, which have other wavefronts and less shared memory
        ((9, 0), None, "1", set()),  # the interpreter would follow addresses of the device
    ],
)
def test_only_cards_that_the_kernels_were_compiled_for_have_them(capability, hip, interpreted, stored, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    assert set(dispatch._stored.__wrapped__(torch.device("cuda", 1))) == stored


@needs_triton
def test_what_a_card_does_not_take_is_left_to_pytorch(used, monkeypatch):
    value = torch.ones(2, 1, 20, 3)
    monkeypatch.setattr(dispatch, "_stored", lambda device: (torch.float32,))
    assert dispatch.suit(value)
    assert dispatch.draw(value)
    assert not dispatch.suit(value, value.bfloat16())
    assert not dispatch.suit_scales(value.bfloat16(), positions=20)
    assert dispatch.prices(value.bfloat16(), value.bfloat16()) == ACCELERATOR
    monkeypatch.setattr(dispatch, "_stored", lambda device: ())
    assert not dispatch.draw(value)


@pytest.mark.parametrize("prices", [CPU, PANELS, ACCELERATOR, KERNELS, TENSOR_CORES])
@pytest.mark.parametrize("positions", [2, 128, 1024, 8192])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (768, 3072), (768, 50257)])
def test_the_cheapest_route_is_taken(prices, positions, inputs, outputs):
    cost = Cost(positions, inputs, outputs, 8, prices=prices)
    choice = cost.choose()
    price = {Route.GRAM: choice.gram, Route.KEEP: choice.keep, Route.DIRECT: choice.direct}[choice.route]
    assert price == min(
        v for v in (choice.gram, choice.direct, choice.keep if cost.kept <= choice.booked else None) if v
    )
    assert (choice.direct is None) != prices.direct
    assert choice.direct in (None, positions * inputs * outputs)


@needs_triton
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("linear 3-D gram", {"gram_products"}),
        ("tied head", {"product_squares"}),
        ("ALBERT", set()),
        ("addmm, flattened tokens (GPT-2)", set()),
        ("called twice, other lengths", set()),
        ("conv2d gram", set()),
        ("low rank (LoRA)", set()),
    ],
)
def test_the_engine_with_kernels_equals_brute_force(name, kernels, used):
    model, batch = CASES[name].build(torch.float32)
    exact_model, exact_batch = CASES[name].build(torch.float64)
    gradients = alone(exact_model, loss, exact_batch, size=len(batch["target"]))
    norm_B = norms(gradients)
    model, batch = model.to(DEVICE), {key: value.to(DEVICE) for key, value in batch.items()}
    layout = check(model, loss, batch).layout if CASES[name].folded else None
    bound = 0.8 * float(norm_B.median())
    found = clipped_gradient(model, loss, batch, clipping=Clipping.abadi(bound), layout=layout)
    tensors = {key: value.cpu() for key, value in found.tensors.items()}
    factor = abadi(norm_B, bound)
    shrunk = torch.where(factor == 1, factor, factor * ROUNDING_MARGIN)
    assert relative_gap(tensors, weighted(gradients, shrunk)) < 1e-3
    assert kernels <= set(used)


@needs_triton
@pytest.mark.parametrize(
    ("positions", "width", "kernels"),
    [
        (20, 200, {"gram_products", "weighted_sum"}),
        (300, 70, {"product_squares", "weighted_sum"}),
        (1100, 16, {"products"}),
    ],
)
def test_bfloat16_needs_no_wide_copy(positions, width, kernels, used, monkeypatch):
    """All three routes, and norms and sums as the plain path has them."""
    monkeypatch.setattr("discreet.core.outer.wide", None)
    input, grad = (torch.randn(3, 1, positions, width).bfloat16().to(DEVICE) for _ in range(2))
    form, factor = Outer(input, grad, torch.Size((width, width))), torch.rand(3).to(DEVICE)
    held = form.reduced()
    found, summed = held.quick_norm2(), held.weighted_sum(factor)
    assert set(used) == kernels
    each = grad.double()[:, 0].mT @ input.double()[:, 0]
    torch.testing.assert_close(found, each.square().flatten(1).sum(1), rtol=1e-2, atol=0.0)
    torch.testing.assert_close(summed, torch.einsum("b,boi->oi", factor.double(), each).float(), rtol=1e-4, atol=1e-3)


def _pair_loss(model: nn.Module, batch) -> torch.Tensor:
    return (model(batch["x"]) * batch["g"]).flatten(1).sum(1)


def _hostile(generator: torch.Generator, positions: int, width: int) -> list[dict[str, torch.Tensor]]:
    """Opposed positions, NaN, infinity, huge features with tiny gradients, 1e38, subnormal, zero, and a plain one."""
    batches = []
    for magnitude in (1.0, 1e4, 1e12):
        x, g = (torch.randn(8, positions, width, generator=generator) for _ in range(2))
        x[0], g[0] = x[0, :1] * magnitude, g[0] - g[0].mean(0)
        x[1, 1, 2], g[2, 0, 0] = float("nan"), float("inf")
        x[3], g[3] = x[3] * 1e18, g[3] * 3e-23
        x[4] = x[4].sign() * 1e38
        x[5], g[5] = x[5] * 1e-42 * magnitude, g[5] * 1e-3
        x[6] = 0
        batches.append({"x": x, "g": g})
    return batches


@needs_triton
@pytest.mark.parametrize("positions", [4, 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_example_moves_the_sum_by_more_than_the_bound_with_kernels(positions, dtype, used):
    width = 20
    models = {
        "one layer": nn.Linear(width, width),
        "used twice": Fn(lambda s, x: s.l(x) - s.l(x.flip(1)), l=nn.Linear(width, width)),
        "shared input": Fn(lambda s, x: s.a(x) - s.b(x), a=nn.Linear(width, width), b=nn.Linear(width, width)),
        "linear and matmul": Fn(lambda s, x: F.linear(x, s.w) - x.flip(1) @ s.w, w=par(width, width)),
    }
    generator = torch.Generator().manual_seed(positions)
    for name, model in models.items():
        model.to(DEVICE, dtype)
        for batch in _hostile(generator, positions, width):
            batch = {key: value.to(DEVICE, dtype) for key, value in batch.items()}
            whole = _sum(model, batch)
            assert torch.isfinite(whole).all()
            for out in range(8):
                moved = float((whole - _sum(model, rows(batch, [i for i in range(8) if i != out], 8))).norm())
                assert moved <= 1.0, f"{name}, example {out}: {moved} of the bound"
    assert ("gram_products" if positions == 4 else "product_squares") in used
    assert ("weighted_sum" in used) == (positions >= 16 and dtype is torch.bfloat16)


def _sum(model: nn.Module, batch) -> torch.Tensor:
    return flat(clipped_gradient(model, _pair_loss, batch, clipping=Clipping.abadi(1.0)).tensors)


def _summed(terms: torch.Tensor, depth: int, runs: int, *, cut: bool) -> float:
    """A sum as a GPU may make it: runs of float32 additions, or of products that are cut where the largest ends."""
    total = np.float32(0)
    for block in terms.split(depth * runs):
        several = np.float32(0)
        for run in block.split(depth):
            part = np.float32(0)
            for first in range(0, len(run), 16 if cut else 1):
                step = np.append(run[first : first + (16 if cut else 1)].numpy(), np.float64(part))
                if cut:
                    spacing = np.spacing(np.float32(np.abs(step).max())).astype(np.float64)
                    part = np.float32((np.trunc(step / spacing) * spacing).sum())
                else:
                    part = np.float32(step.sum())
            several = np.float32(several + part)
        total = np.float32(total + several)
    return float(total)


@needs_triton
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("width", [16, 100, 768, 4096, 5000, 20_000])
def test_the_bound_on_chains_holds_for_sums_as_gpus_make_them(cut, width):
    """Products of one sign, constant or falling, whose roundings all go one way."""
    from discreet.core.kernels.operands import RUNS, chain, is_long

    depth = 64 if cut else 32
    runs = RUNS if is_long([width]) else width
    for terms in (torch.full((width,), 1.1), torch.linspace(1, 1e-4, width), torch.rand(width) + 1e-3):
        exact = float(terms.double().sum())
        error = abs(_summed(terms.double(), depth, runs, cut=cut) - exact)
        assert error <= chain([width], depth) * 2.0**-23 * exact


COMPILE = """
import sys, re, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class NoDevice:
    architecture = 80
    def get_current_device(self): return self.architecture
    def get_current_stream(self, device=None): return 0
    def get_current_target(self): return GPUTarget("cuda", self.architecture, 32)

compile, built = JITFunction.run, []
JITFunction.run = lambda self, *args, grid, warmup, **named: built.append(
    compile(self, *args, grid=grid, warmup=True, **named))
driver.set_active(NoDevice())
from discreet.core.kernels import affine, digest, dispatch, noise, operands
operands._copies = lambda device: NoDevice.architecture == 90
for value, count in ((torch.ones(9), 1), (torch.ones(9).double(), 1), (torch.ones(9), 3)):
    keys = (bytes(32),) * (1 + (value.dtype is torch.float64))
    noise.add([noise.Stretch(value, value, keys, 1.5)] * count, share=0.3)
    code = built.pop().asm["ptx"]
    assert "sqrt.rn.f64" in code and "div.rn.f64" in code
    assert not re.search(r"\\bfma|[.]f32x|[.]ftz|[.]local[.]|[.]approx", code), "not the bits of the definition"
for count in (1, 3):
    digest.digests([torch.ones(9)] * count, bytes(16))
    assert ".local." not in built.pop().asm["ptx"]
ROOM = {75: 64, 80: 99, 90: 227, 120: 99}  # KiB; of those of one generation, the least: sm_86 for 80
CARDS = ((75, torch.float32), (80, torch.float32), *((card, torch.bfloat16) for card in (80, 90, 120)))
for NoDevice.architecture, dtype in CARDS:
    a, g = torch.ones(2, 1, 130, 70, dtype=dtype), torch.ones(2, 1, 130, 40, dtype=dtype)
    dispatch.gram_products([a], [g, g[..., 1:]])
    dispatch.gram_products([a], [g])
    dispatch.gram_products([a], [torch.ones(2, 1, 130, 5000, dtype=dtype)])
    dispatch.product_squares(a, g)
    dispatch.products(a, g)
    affine.scale_grads(a[:, 0], a[:, 0], torch.ones(2, 130), torch.ones(2, 130))
    room = ROOM[NoDevice.architecture]
    for kernel in built:
        assert kernel.metadata.shared <= room * 1024, kernel.metadata
    for kernel in built[:-1]:
        code = kernel.asm["ptx"]
        assert not re.search(r"tf32|[.]ftz|\\batom[.]|\\bred[.]|[.]local[.]|[.]approx", code), "not exact"
        dots = re.findall(r"(?:tt.dot|warp_group_dot) %\\w+, %\\w+, (%\\w+)", kernel.asm["ttgir"])
        assert dots and all(start.startswith("%cst") for start in dots), "an accumulator was carried on"
        tensor_cores = "mma" in code
        assert tensor_cores == (dtype is torch.bfloat16)
    built.clear()
    if dtype is torch.bfloat16:
        for positions in (130, 128):
            dispatch.weighted_sum(*(torch.ones(2, 1, positions, size, dtype=dtype) for size in (72, 40)), torch.ones(2))
            dispatch.weighted_sum(*(torch.ones(2, 1, positions, size, dtype=dtype) for size in (71, 40)), torch.ones(2))
        for kernel in built:
            code = kernel.asm["ptx"]
            assert kernel.metadata.shared <= room * 1024 // 2, "two of them on a processor"
            assert not re.search(r"tf32|[.]ftz|\\batom[.]|\\bred[.]|[.]local[.]|[.]approx", code), "not exact"
        print(NoDevice.architecture, len(built))
        built.clear()
"""
"""What the real compiler makes of the kernels, without a GPU: the driver is told of one, and nothing is launched."""


@needs_triton
@pytest.mark.slow
def test_they_compile_without_tf32_atomics_or_long_chains(tmp_path, repository):
    path = os.pathsep.join([str(repository / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path), "PATH": os.environ["PATH"]}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**environment, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines()] == ["80", "90", "120"]
