"""Adapters from peft: a few trained parameters in a frozen model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from zoo.model import ZooModel, classes, images, next_token, tokens
from zoo.models_language import gpt2
from zoo.models_vision import vit


def _adapted(base: Callable[[], nn.Module], config: str, **options: Any) -> nn.Module:
    import peft

    model: nn.Module = peft.get_peft_model(base(), getattr(peft, config)(**options))
    return model.eval()


def _row(name: str, config: str, notes: str, **options: Any) -> ZooModel:
    return ZooModel(
        name=name,
        family="peft",
        build=lambda: _adapted(gpt2, config, task_type="CAUSAL_LM", **options),
        batch=tokens(),
        loss=next_token,
        notes=notes,
        shake=0.1,
    )


_LAYERS: dict[str, Any] = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}

MODELS = (
    _row("LoRA on GPT-2", "LoraConfig", "two thin factors", r=4, **_LAYERS),
    _row("LoRA on an embedding", "LoraConfig", "lookup in a transposed factor", r=4, target_modules=["wte", "c_attn"],
         fan_in_fan_out=True),
    _row("DoRA on GPT-2", "LoraConfig", "norm of a sum of weights", r=4, use_dora=True, **_LAYERS),
    _row("VeRA on GPT-2", "VeraConfig", "scales between frozen factors", r=4, target_modules=["c_attn"],
         fan_in_fan_out=True),
    _row("IA3 on GPT-2", "IA3Config", "scales of activations", feedforward_modules=["c_fc"], **_LAYERS),
    _row("Prompt tuning on GPT-2", "PromptTuningConfig", "virtual tokens for all examples", num_virtual_tokens=4),
    _row("Prefix tuning on GPT-2", "PrefixTuningConfig", "keys and values of every layer", num_virtual_tokens=4),
    ZooModel("LoRA on ViT", "peft", lambda: _adapted(vit, "LoraConfig", r=4, target_modules=["q_proj", "v_proj"],
                                                     modules_to_save=["classifier"]),
             images(), classes, "adapters and a trained head", shake=0.1),
)  # fmt: skip
