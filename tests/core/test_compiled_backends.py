"""Which compiler was asked for is honoured, or refused by name."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo
from torch import fx, nn

from blocks import B, Fn, loss
from core.compiling import MARKS, RULE, Deliveries, agrees
from discreet.core import compiled, lowering
from discreet.core.gradient import clipped_gradient
from discreet.errors import UnsupportedUse

pytestmark = MARKS


def _toy() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    wrapped = Fn(lambda s, x: s.inner(x), inner=model)
    return wrapped, {"x": torch.randn(B, 3, 6).double(), "target": torch.randn(B).double()}


@pytest.mark.parametrize("given", [{"mode": "reduce-overhead"}, {"options": {"epilogue_fusion": False}}, {}])
def test_mode_and_options_reach_inductor(given: dict[str, Any], seen: Deliveries, monkeypatch) -> None:
    wished = []

    def noting(graph: Any, inputs: Any, deliver: Any, options: Any) -> Any:
        wished.append(dict(options))
        return compiled.without_kernels(graph, inputs, deliver, options)

    monkeypatch.setattr(compiled, "compiler", noting)
    model, batch = _toy()
    agrees(torch.compile(model, **given), batch)
    wanted = {"epilogue_fusion": False} if "options" in given else {"triton.cudagraphs": True} if given else {}
    assert wished
    assert all(wanted.items() <= options.items() and bool(options) is bool(wanted) for options in wished)


def test_inductor_is_configured_as_it_was_asked_to_be(monkeypatch) -> None:
    import torch._inductor.compile_fx as inductor

    found = {}
    monkeypatch.setattr(inductor, "compile_fx", lambda *_, **named: found.update(named))
    lowering.by_inductor(fx.GraphModule({}, fx.Graph()), [], None, {"epilogue_fusion": False})
    assert found["config_patches"] == {"epilogue_fusion": False}


@pytest.mark.parametrize(("backend", "compiles"), [("eager", False), ("aot_eager", True)])
def test_backends_without_kernels_are_what_was_asked_for(backend: str, compiles: bool, seen: Deliveries) -> None:
    model, batch = _toy()
    agrees(torch.compile(model, backend=backend), batch)
    assert bool(seen.compiled) is compiles
    assert bool(seen.delivered) is compiles


def _own_backend(graph: Any, inputs: Any) -> Any:
    return graph.forward


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"backend": _own_backend}, "backend='_own_backend'"),
        ({"backend": "aot_eager_decomp_partition"}, "aot_eager_decomp_partition"),
        ({"backend": "aot_eager", "options": {"a": 1}}, "options="),
    ],
)
def test_another_backend_is_refused_by_name_and_works_where_nothing_is_guarded(given, said, seen: Deliveries) -> None:
    model, batch = _toy()
    called = torch.compile(model, **given)
    with pytest.raises(UnsupportedUse, match=re.escape(said)):
        clipped_gradient(called, loss, batch, clipping=RULE)
    if "options" not in given:
        torch.testing.assert_close(called(batch["x"]), model(batch["x"]))


def test_cuda_graphs_are_refused_where_they_would_be_used() -> None:
    wish = lowering.Wish(options={"triton.cudagraphs": True})
    on_accelerator = mock.Mock(spec=torch.Tensor, is_cuda=True)
    assert "max-autotune-no-cudagraphs" in str(wish.refusal([on_accelerator]))
    assert wish.refusal([torch.zeros(3)]) is None


def test_so_are_they_where_the_process_asks_for_them() -> None:
    """By TORCHINDUCTOR_CUDAGRAPHS=1, or by Inductor's settings; unless the call says otherwise."""
    on_accelerator = [mock.Mock(spec=torch.Tensor, is_cuda=True)]
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        assert lowering.Wish().refusal(on_accelerator) is not None
        assert lowering.Wish(options={"triton.cudagraphs": False}).refusal(on_accelerator) is None
        assert lowering.Wish(name="aot_eager").refusal(on_accelerator) is None
