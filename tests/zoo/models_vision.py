"""Models of images from transformers and diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.model import B, Batch, Loss, ZooModel, classes, curved, hidden_state, images

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def _build(architecture: str, head: str, **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{architecture}Config")(**options)
    model: nn.Module = getattr(transformers, f"{architecture}{head}")(config)
    return model.eval()


def _row(name: str, architecture: str, head: str, notes: str, loss: Loss = classes, **options: Any) -> ZooModel:
    return ZooModel(
        name=name,
        family="transformers",
        build=lambda: _build(architecture, head, **options),
        batch=images(),
        loss=loss,
        notes=notes,
    )


def vit(**options: Any) -> nn.Module:
    """The ViT of this zoo."""
    return _build("ViT", "ForImageClassification", num_labels=5, **_SIZES, **options)


def _diffusers(name: str, **options: Any) -> nn.Module:
    import diffusers

    model: nn.Module = getattr(diffusers, name)(**options)
    return model.eval()


def noisy_images(*, labels: bool) -> Batch:
    """Images at a noise level of their own, and for class-conditional models a class."""
    batch = {"sample": torch.randn(B, 3, 16, 16), "timestep": torch.randint(1, 900, (B,))}
    return {**batch, "class_labels": torch.randint(0, 4, (B,))} if labels else batch


def denoising(model: nn.Module, batch: Batch) -> Tensor:
    """A diffusion model's prediction against a fixed ramp."""
    names = {"sample": "hidden_states"} if "class_labels" in batch else {}
    return curved(model(**{names.get(name, name): x for name, x in batch.items()}).sample)


def reconstruction(model: nn.Module, batch: Batch) -> Tensor:
    """Evidence bound of an autoencoder at the mode of its posterior, with the divergence of each example alone."""
    posterior = model.encode(batch["sample"]).latent_dist
    decoded = model.decode(posterior.mode()).sample
    return (decoded - batch["sample"]).square().flatten(1).mean(1) + 0.01 * posterior.kl()


_UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
_DIT: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 3,
    "num_layers": 2,
    "sample_size": 16,
    "patch_size": 4,
    "num_embeds_ada_norm": 8,
    "norm_num_groups": 4,
}
_VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "norm_num_groups": 4,
    "sample_size": 16,
}

MODELS = (
    ZooModel("ViT", "transformers", vit, images(), classes, "class token, raw positions"),
    _row("DeiT", "DeiT", "ForImageClassification", "distillation token", **_SIZES, num_labels=5),
    _row("BEiT", "Beit", "ForImageClassification", "relative bias, LayerScale", use_relative_position_bias=True,
         layer_scale_init_value=0.1, num_labels=5, **_SIZES),
    _row("Swin", "Swin", "ForImageClassification", "windows, shifted; relative tables", image_size=32, patch_size=4,
         embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5),
    _row("ConvNeXt", "ConvNext", "ForImageClassification", "depthwise conv, LayerScale", hidden_sizes=[8, 12, 16, 24],
         depths=[1, 1, 1, 1], num_labels=5, layer_scale_init_value=0.1),
    _row("CLIP vision tower", "CLIPVision", "Model", "class token, pre-norm", hidden_state, **_SIZES),
    _row("DINOv2", "Dinov2", "ForImageClassification", "LayerScale, interpolated positions", num_labels=5, **_SIZES),
    ZooModel("UNet2DModel", "diffusers", lambda: _diffusers("UNet2DModel", **_UNET), lambda: noisy_images(labels=False),
             denoising, "time embedding, skips, attention on pixels"),
    ZooModel("DiT", "diffusers", lambda: _diffusers("DiTTransformer2DModel", **_DIT),
             lambda: noisy_images(labels=True), denoising, "adaptive norms from time and class"),
    ZooModel("AutoencoderKL", "diffusers", lambda: _diffusers("AutoencoderKL", **_VAE),
             lambda: {"sample": torch.randn(B, 3, 16, 16)}, reconstruction, "encoder and decoder, posterior"),
)  # fmt: skip
