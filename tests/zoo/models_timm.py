"""Models of images from timm, as small as their constructors allow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from zoo.model import ZooModel, images, plain_classes


def _build(name: str, **options: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=5, **options)
    return model.eval()


def _mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=5, img_size=32, patch_size=8, embed_dim=32, num_blocks=2).eval()


def _resnet() -> nn.Module:
    from timm.layers import GroupNorm

    return _build("resnet10t", norm_layer=partial(GroupNorm, num_groups=4), channels=(16, 16, 32, 32))


def _mobilenet() -> nn.Module:
    """Two inverted residual blocks with squeeze-and-excite, between a stem and a head of MobileNetV3's shape."""
    from timm.layers import GroupNormAct
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.mobilenetv3 import MobileNetV3

    blocks = [["ds_r1_k3_s2_e1_c16_se0.25_nre"], ["ir_r2_k5_s2_e4_c24_se0.25"], ["cn_r1_k1_s1_c32"]]
    options: dict[str, Any] = {"stem_size": 16, "num_features": 32, "norm_layer": partial(GroupNormAct, num_groups=4)}
    return MobileNetV3(decode_arch_def(blocks), num_classes=5, act_layer=nn.Hardswish, **options).eval()


def _row(name: str, model: str | Callable[[], nn.Module], notes: str, side: int = 32, **options: Any) -> ZooModel:
    return ZooModel(
        name=name,
        family="timm",
        build=(lambda: _build(model, **options)) if isinstance(model, str) else model,
        batch=images(side),
        loss=plain_classes,
        notes=notes,
    )


_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}

MODELS = (
    _row("timm ViT", "vit_tiny_patch16_224", "class token, positions", **_VIT),
    _row("timm DeiT", "deit_tiny_distilled_patch16_224", "two tokens, two heads", **_VIT),
    _row("timm BEiT", "beit_base_patch16_224", "cat(q_bias, 0, v_bias), relative tables", init_values=0.1, **_VIT),
    _row("timm EVA-02", "eva02_tiny_patch14_224", "rotary, gated, biases by parts", **_VIT),
    _row("timm Swin", "swin_tiny_patch4_window7_224", "windows, shifted", img_size=32, window_size=4, embed_dim=16,
         depths=(2, 2), num_heads=(2, 4)),
    _row("timm ConvNeXt", "convnext_atto", "depthwise conv, LayerScale", depths=(1, 1, 1, 1), dims=(8, 12, 16, 24),
         ls_init_value=0.1),
    _row("timm Mixer", _mixer, "linear over positions"),
    _row("timm NFNet", "dm_nfnet_f0", "standardised weights, gains", depths=(1, 1, 1, 1), channels=(16, 16, 32, 32),
         stem_chs=16, group_size=8, num_features=32),
    _row("timm ResNet-10 (GroupNorm)", _resnet, "GroupNorm for BatchNorm"),
    _row("timm MobileNetV3 (GroupNorm)", _mobilenet, "depthwise, squeeze and excite"),
    _row("timm MaxViT", "maxvit_rmlp_pico_rw_256", "blocks and grids of windows", side=64, img_size=64,
         embed_dim=(32, 32), depths=(1, 1), block_type=("M", "M"), stem_width=(16, 16), conv_norm_layer="groupnorm1",
         transformer_norm_layer="layernorm2d", head_hidden_size=32),
)  # fmt: skip
