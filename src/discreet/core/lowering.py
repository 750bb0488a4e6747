"""What compiles the traced form of a region: PyTorch's own compilers, as the user's `torch.compile` asked for them.

While a model is guarded every compiled function comes to one backend of ours (`discreet.core.compiled`), whatever it
was compiled with. So the wish is read off the call: Inductor runs with its mode and options, ``aot_eager`` and
``eager`` are what they are, and any other backend is refused, because the rules would not be in what it compiles.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from discreet.core.traced import BOOKED
from discreet.errors import UnsupportedUse

Graph = fx.GraphModule
Options = Mapping[str, Any]
Deliver = Callable[[Sequence[Any], Mapping[int, int], int], None]
"""Takes what a compiled backward returned beyond the gradients: see `discreet.core.compiled.Region.deliver`."""
Compiler = Callable[[Graph, Sequence[Any], "Deliver | None", Options], Callable[..., Any]]

INDUCTOR, WITHOUT_KERNELS, AS_RECORDED = "inductor", "aot_eager", "eager"


@dataclass(frozen=True)
class Wish:
    """What the user's `torch.compile` was given.

    Attributes:
        name: of the backend.
        options: Inductor's, those of its mode included.
        backend: the function itself, for what is not guarded.
    """

    name: str = INDUCTOR
    options: Options = field(default_factory=dict)
    backend: Callable[..., Any] | None = None

    @classmethod
    def of_caller(cls) -> Wish:
        """The wish of the compiled function that is being called: its wrapper is on the stack, and knows."""
        from torch._dynamo import eval_frame

        frame = sys._getframe()
        while frame is not None and not (
            frame.f_code.co_filename == eval_frame.__file__ and _CALLBACK in frame.f_locals
        ):
            frame = frame.f_back
        if frame is None:
            return cls()
        backend = frame.f_locals[_CALLBACK]
        while (inner := getattr(backend, "_torchdynamo_orig_backend", None)) is not None:
            backend = inner
        named = getattr(backend, "compiler_name", None) or getattr(backend, "__qualname__", type(backend).__name__)
        options = {**getattr(backend, "config", {}), **getattr(backend, "kwargs", {})}
        return cls(name=str(named), options=options, backend=backend)

    def refusal(self, inputs: Sequence[Any]) -> UnsupportedUse | None:
        """The error for what cannot be had with the rules inside."""
        if self.name not in (INDUCTOR, WITHOUT_KERNELS, AS_RECORDED):
            return UnsupportedUse(
                f"torch.compile(backend={self.name!r}): the rules cannot be compiled by it; leave backend out, or pass "
                f"one of {INDUCTOR!r}, {WITHOUT_KERNELS!r}, {AS_RECORDED!r}."
            )
        if self.name != INDUCTOR and self.options:
            return UnsupportedUse(
                f"torch.compile(backend={self.name!r}, options={dict(self.options)}): it has none; leave them out."
            )
        if self._asks_for_graphs() and any(isinstance(each, Tensor) and each.is_cuda for each in inputs):
            return UnsupportedUse(
                "torch.compile with CUDA graphs (mode='reduce-overhead' or 'max-autotune', TORCHINDUCTOR_CUDAGRAPHS): "
                "they reuse the memory of what is booked; pass mode='default' or 'max-autotune-no-cudagraphs'."
            )
        return None

    def _asks_for_graphs(self) -> bool:
        import torch._inductor.config as kernels

        return self.name == INDUCTOR and bool(self.options.get("triton.cudagraphs", kernels.triton.cudagraphs))


_CALLBACK = "callback"


def by_inductor(graph: Graph, inputs: Sequence[Any], deliver: Deliver | None, options: Options) -> Callable[..., Any]:
    """PyTorch's own compiler, with the options that the user gave it."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(part: Graph, given: Sequence[Any], **how: Any) -> Any:
        if deliver is None or not how.get("is_backward"):
            return compile_fx_inner(part, given, **how)
        return _delivering(part, deliver, lambda changed: compile_fx_inner(changed, given, **how))

    return compile_fx(graph, list(inputs), inner_compile=inner, config_patches=dict(options))


def without_kernels(
    graph: Graph, inputs: Sequence[Any], deliver: Deliver | None, options: Options
) -> Callable[..., Any]:
    """The same traces, run operator by operator: what a kernel compiler is compared with."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def backward(part: Graph, given: Sequence[Any]) -> Any:
        if deliver is None:
            return make_boxed_func(part.forward)
        return _delivering(part, deliver, lambda changed: make_boxed_func(changed.forward))

    return aot_autograd(fw_compiler=lambda part, given: make_boxed_func(part.forward), bw_compiler=backward)(
        graph, list(inputs)
    )


def _delivering(backward: Graph, deliver: Deliver, finish: Callable[[Graph], Any]) -> Any:
    """Compile a backward whose booked tensors are outputs of its own, and deliver them whenever it has run."""
    (booked,) = backward.graph.find_nodes(op="call_function", target=BOOKED)
    end = next(iter(backward.graph.find_nodes(op="output")))
    tensors, (serial, *sizes) = booked.args
    wanted = dict(enumerate(tensors)) | {-1 - at: node for at, node in enumerate(sizes)}
    nodes = list(dict.fromkeys(node for node in wanted.values()))
    places = {at: nodes.index(node) for at, node in wanted.items()}
    with backward.graph.inserting_before(booked):
        value = booked.meta["val"]
        zero = backward.graph.call_function(
            torch.ops.aten.full.default, ([], 0.0), {"dtype": value.dtype, "device": value.device}
        )
        zero.meta.update(booked.meta)
    booked.replace_all_uses_with(zero)
    before = tuple(end.args[0])
    end.args = ((*before, *nodes),)
    backward.graph.erase_node(booked)
    backward.recompile()
    compiled = finish(backward)

    def run(args: list[Any]) -> Any:
        results = compiled(args)
        deliver(results[len(before) :], places, serial)
        return results[: len(before)]

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Exactness before the last per cent: saved tensors are not written over, dropout is drawn as in eager code."""
    import torch._functorch.config as traces
    import torch._inductor.config as kernels

    wanted = {"donated_buffer": False, "enable_autograd_cache": False, "backward_pass_autocast": "off"}
    known = {name: value for name, value in wanted.items() if getattr(traces, name, None) is not None}
    with traces.patch(known), kernels.patch(fallback_random=True):
        yield
