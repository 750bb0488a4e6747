"""Half precision: what it is recognised by, and how the self-check compares models in it, where rounding hides much."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import Fn, loss
from discreet.core import rules
from discreet.core.precision import (
    computes_narrowly,
    full_precision,
    ieee_products,
    in_float32,
    precision_now,
    refuse_forced_tf32,
    widened,
)
from discreet.errors import ConfigError
from discreet.train.check import check

B, D = 4, 6


def _features(*shape: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(B, *shape), "target": torch.randn(B)}


def _model(f, **parts) -> nn.Module:
    torch.manual_seed(1)
    return Fn(f, **parts)


def test_half_precision_is_seen_where_it_is_computed_in():
    layer, x = nn.Linear(D, 2), torch.randn(B, D)

    def mixed():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x).float().sum()

    assert computes_narrowly(mixed)
    assert computes_narrowly(lambda: x.half().float())
    assert not computes_narrowly(lambda: F.gelu(layer(x)).double().sum())


def test_the_copy_in_float32_shares_nothing_and_ties_what_was_tied():
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)).bfloat16()
    model[1].weight = model[0].weight
    twin = in_float32(model)
    assert twin[1].weight is twin[0].weight
    assert all(value.dtype is torch.float32 for value in twin.parameters())
    with torch.no_grad():
        twin[0].weight.zero_()
    assert model[0].weight.abs().sum() > 0
    assert {
        key: value.dtype for key, value in widened({"a": torch.ones(1).half(), "b": torch.ones(1).int()}).items()
    } == {
        "a": torch.float32,
        "b": torch.int32,
    }


class OtherKernels(nn.Module):
    """Rounds as a GPU does, whose kernels change with the shape: alone, an example's outcome is a little different."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.01 if len(x) == 1 else 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_that_change_with_the_batch_are_no_coupling_in_half_precision(dtype):
    model = _model(lambda s, x: s.o(s.a(x)), a=nn.Linear(D, 2), o=OtherKernels()).to(dtype)
    report = check(model, loss, {key: value.to(dtype) for key, value in _features(D).items()})
    assert report.passed == (dtype is torch.bfloat16), report.table()


@pytest.mark.parametrize("error", [1.0, 1.03])
def test_a_rule_that_is_a_little_wrong_is_caught_in_half_precision(error, monkeypatch):
    """Rounding of bfloat16 would hide it: norms are compared in float32 as well."""
    before = rules.linear.Linear.weight_form

    def wrong(self, grad, input, weight, examples):
        return before(self, grad * error, input, weight, examples)

    monkeypatch.setattr(rules.linear.Linear, "weight_form", wrong)
    model = _model(lambda s, x: s.b(torch.tanh(s.a(x))), a=nn.Linear(D, D), b=nn.Linear(D, 2)).bfloat16()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = check(model, loss, {key: value.bfloat16() for key, value in _features(3, D).items()})
    assert report.passed == (error == 1.0), report.table()
    assert all(value.dtype is torch.bfloat16 for value in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_in_float64_of_a_model_in_float32_is_no_coupling(seed):
    """What changes with the number of examples is the rounding of the model, and not that of the loss."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    batch = (torch.randn(B, 64), torch.arange(B) % 3)
    report = check(model, lambda m, b: F.cross_entropy(m(b[0]).double(), b[1], reduction="none"), batch)
    assert report.passed, report.table()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float64_parameters_that_are_cast_are_compared_as_they_are_computed(dtype):
    model = _model(lambda s, x: F.linear(x.to(dtype), s.w.to(dtype)).float(), w=nn.Parameter(torch.randn(3, 64)))
    report = check(model.double(), loss, _features(64))
    assert report.passed, report.table()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_that_is_zero_by_symmetry_is_rounding_under_autocast(dtype):
    """That of an attention's key bias: what half precision leaves of it, 1e-4 of the norm, is another number each time.

    Parameters are float32 there, and so was what was taken for rounding.
    """

    def attend(s, x):
        q, k, v = (part(x).unflatten(2, (2, -1)).transpose(1, 2) for part in (s.q, s.k, s.v))
        return s.n(s.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))

    def autocast_loss(model, batch):
        with torch.autocast("cpu", dtype):
            out = model(batch["x"])
        return F.cross_entropy(out.float().mean(1), batch["y"], reduction="none")

    for seed in range(2):
        torch.manual_seed(seed)
        parts = {name: nn.Linear(8, 8) for name in "qkvo"}
        report = check(
            Fn(attend, n=nn.LayerNorm(8), **parts), autocast_loss, {"x": torch.randn(B, B, 8), "y": torch.arange(B)}
        )
        assert report.passed, report.table()


@pytest.mark.parametrize(
    ("forward", "layer"),
    [
        (lambda s, x: s.a(x.bfloat16()), lambda: nn.Linear(D, 2)),
        (lambda s, x: s.a(x.bfloat16())[0], lambda: nn.GRU(D, 2, batch_first=True)),
    ],
    ids=["linear", "gru"],
)
def test_a_model_that_asks_for_half_precision_itself_is_compared_in_it(forward, layer):
    model = _model(forward, a=layer()).bfloat16()
    report = check(model, loss, _features(3, D))
    assert report.passed, report.table()


FLOAT32 = {"ieee", "none"}
"""What PyTorch says where products are float32: told so, or told nothing."""


@pytest.fixture
def cuda_in_use(monkeypatch):
    """As after CUDA's first use: before it, its settings are left as they are."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)


@pytest.mark.parametrize("backend", ["cudnn", "mkldnn"])
def test_settings_of_cuda_count_from_its_first_use_on(backend, monkeypatch):
    setting = getattr(torch.backends, backend).conv
    kept, setting.fp32_precision = setting.fp32_precision, "tf32"
    try:
        with full_precision():
            assert (setting.fp32_precision in FLOAT32) is (backend == "mkldnn")
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        with full_precision():
            assert setting.fp32_precision in FLOAT32
    finally:
        setting.fp32_precision = kept


@pytest.mark.parametrize("precision", ["tf32", "ieee", "none"])
def test_products_and_convolutions_are_told_to_take_float32(precision, cuda_in_use):
    """cuDNN takes TF32 for convolutions of float32 unless it is told not to: sums were off by 2^-11 of all parts."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    settings = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)
    kept = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = precision
        before = [setting.fp32_precision for setting in settings]
        with full_precision():
            assert {setting.fp32_precision for setting in settings} <= FLOAT32
        assert [setting.fp32_precision for setting in settings] == before
    finally:
        for setting, value in zip(settings, kept, strict=True):
            setting.fp32_precision = value


def test_so_are_they_before_there_was_a_setting_for_each(monkeypatch):
    monkeypatch.setattr("discreet.core.precision._PER_BACKEND", False)
    assert torch.backends.cudnn.allow_tf32
    with full_precision():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("precision", ["tf32", "none"])
def test_the_self_check_compares_in_float32(precision):
    """What a GPU rounds by is another amount for each number of examples, and would be taken for a coupling of them."""
    seen = []

    def watched(model, batch):
        seen.append(torch.backends.cudnn.conv.fp32_precision)
        return loss(model, batch)

    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        model = _model(lambda m, x: m.layer(x), layer=nn.Linear(D, 2))
        assert check(model, watched, _features(D)).passed
        assert torch.backends.cudnn.conv.fp32_precision == precision
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert len(seen) > 20
    assert seen.count("ieee") > 0.8 * len(seen)


@pytest.fixture(params=["default", "older", "newer", "generic"])
def told(request):
    """PyTorch is told of TF32 in one of its ways."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    settings = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)
    kept = [setting.fp32_precision for setting in settings]
    if request.param == "older":
        torch.set_float32_matmul_precision("high")
    elif request.param == "newer":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    elif request.param == "generic":
        torch.backends.fp32_precision = "tf32"
    yield request.param
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for setting, precision in zip(settings, kept, strict=True):  # what inherited it was told so, when it was put back
        setting.fp32_precision = precision


@pytest.mark.parametrize("told", ["default", "older", "newer"], indirect=True)
def test_a_forward_that_holds_settings_of_cudnn_is_checked(told):
    """``cudnn.flags`` reads the older settings; where newer ones contradicted them, PyTorch refused and the check broke
    off."""

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.backends.cudnn.flags(enabled=True, deterministic=True):
                return self.inner(x)

    before = precision_now(), torch.backends.cudnn.allow_tf32
    assert check(_model(lambda s, x: s.h(x), h=Held()), loss, _features(D)).passed
    assert (precision_now(), torch.backends.cudnn.allow_tf32) == before


def test_a_forward_may_ask_for_the_older_settings_while_it_is_checked():
    torch.set_float32_matmul_precision("high")
    seen = set()

    def watched(model, batch):
        seen.add((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return loss(model, batch)

    try:
        assert check(_model(lambda s, x: s.a(x), a=nn.Linear(D, 2)), watched, _features(D)).passed
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (False, False) in seen


def test_float32_is_float32_however_the_process_was_told(told, cuda_in_use):
    before = precision_now()
    for exact in (full_precision, ieee_products):
        with exact():
            assert set(precision_now()) == {"ieee"}
        assert precision_now() == before


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "mps", "hpu"])
def test_autocast_ends_where_norms_begin(device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no such device here
        mixed = torch.autocast(device, dtype=torch.bfloat16)
        mixed._enabled = True
    with mixed:
        assert torch.is_autocast_enabled(device)
        with full_precision():
            assert not torch.is_autocast_enabled(device)
        assert torch.is_autocast_enabled(device)


def test_tf32_that_nobody_can_switch_off_is_refused(monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    refuse_forced_tf32(torch.device("cpu"))
    with pytest.raises(ConfigError, match="NVIDIA_TF32_OVERRIDE=1"):
        refuse_forced_tf32(torch.device("cuda"))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    refuse_forced_tf32(torch.device("cuda"))
