"""The architectures that the benchmark builds itself. Random weights, no dropout.

Shape legend: B = examples, T = positions, D = width, V = vocabulary, C = channels, H and W = height and width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Positions(nn.Module):
    """Learned positions, looked up once for all examples.

    Attributes:
        per_example: look them up once per example instead: a library that needs the batch in every operand sets this.
    """

    def __init__(self, *, length: int, width: int) -> None:
        super().__init__()
        self.table, self.per_example = nn.Embedding(length, width), False

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Add position t's vector to every example's vector t."""
        places = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
        if self.per_example:
            places = places.repeat(hidden_BTD.shape[0], 1)
        return hidden_BTD + self.table(places)


class ClassToken(nn.Module):
    """One learned vector, put before every example's sequence."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T + 1, D)."""
        return torch.cat([self.token.expand(hidden_BTD.shape[0], -1, -1), hidden_BTD], dim=1)


class Block(nn.Module):
    """A pre-norm transformer block, of linear layers around PyTorch's fused attention."""

    def __init__(self, *, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm_mix, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.causal = heads, causal

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        batch, length, width = hidden_BTD.shape
        parts = self.mix(self.norm_mix(hidden_BTD)).reshape(batch, length, 3, self.heads, width // self.heads)
        mixed = F.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4), is_causal=self.causal)
        hidden_BTD = hidden_BTD + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return hidden_BTD + self.down(F.gelu(self.up(self.norm_feed(hidden_BTD))))


class Decoder(nn.Module):
    """A language model: token ids (B, T) -> logits (B, T, V). The head is not tied to the embedding."""

    def __init__(self, *, vocabulary: int, width: int, depth: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), Positions(length=length, width=width)
        self.blocks = nn.ModuleList(Block(width=width, heads=heads, causal=True) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        hidden_BTD = self.places(self.tokens(ids_BT))
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        return self.head(self.norm(hidden_BTD))


class VisionTransformer(nn.Module):
    """Images (B, 3, H, W) -> logits, from a class token before the patches (arXiv:2010.11929)."""

    def __init__(self, *, image: int, patch: int, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = ClassToken(width=width)
        self.places = Positions(length=(image // patch) ** 2 + 1, width=width)
        self.blocks = nn.ModuleList(Block(width=width, heads=heads, causal=False) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes)."""
        hidden_BTD = self.patches(image_BCHW).flatten(2).transpose(1, 2)
        hidden_BTD = self.places(self.token(hidden_BTD))
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        return self.head(self.norm(hidden_BTD)[:, 0])


class Recurrent(nn.Module):
    """Token ids (B, T) -> logits, from the last state of an LSTM."""

    def __init__(self, *, vocabulary: int, embedding: int, width: int, classes: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, embedding)
        self.memory = nn.LSTM(embedding, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) -> (B, classes)."""
        hidden_BTD, _ = self.memory(self.tokens(ids_BT))
        return self.head(hidden_BTD[:, -1])


class Residual(nn.Module):
    """``relu(branch(x) + shortcut(x))`` (arXiv:1512.03385)."""

    def __init__(self, *, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H / stride, W / stride)."""
        return F.relu(self.branch(image_BCHW) + self.shortcut(image_BCHW))


def _normed(channels: int, out: int, *, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(channels, out, kernel, stride=stride, padding=kernel // 2, bias=False)
    return convolution, nn.GroupNorm(32, out)


def _basic(channels: int, out: int, *, stride: int) -> nn.Sequential:
    first, second = _normed(channels, out, kernel=3, stride=stride), _normed(out, out, kernel=3)
    return nn.Sequential(*first, nn.ReLU(), *second)


def _bottleneck(channels: int, out: int, *, stride: int) -> nn.Sequential:
    inner = out // 4
    first, second = _normed(channels, inner, kernel=1), _normed(inner, inner, kernel=3, stride=stride)
    return nn.Sequential(*first, nn.ReLU(), *second, nn.ReLU(), *_normed(inner, out, kernel=1))


def _resnet(
    branch: Callable[..., nn.Module], *, stem: tuple[nn.Module, ...], widths: list[int], counts: list[int], classes: int
) -> nn.Sequential:
    layers, channels = [*stem], 64
    for stage, (out, count) in enumerate(zip(widths, counts, strict=True)):
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            changes = stride != 1 or channels != out
            shortcut = nn.Sequential(*_normed(channels, out, kernel=1, stride=stride)) if changes else nn.Identity()
            layers.append(Residual(branch=branch(channels, out, stride=stride), shortcut=shortcut))
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def resnet18(*, classes: int) -> nn.Sequential:
    """ResNet-18 with GroupNorm in 32 groups, and with the stem for 32x32 images."""
    stem = (*_normed(3, 64, kernel=3), nn.ReLU())
    return _resnet(_basic, stem=stem, widths=[64, 128, 256, 512], counts=[2, 2, 2, 2], classes=classes)


def resnet50(*, classes: int) -> nn.Sequential:
    """ResNet-50 with GroupNorm in 32 groups, for images of 224x224."""
    stem = (*_normed(3, 64, kernel=7, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
    return _resnet(_bottleneck, stem=stem, widths=[256, 512, 1024, 2048], counts=[3, 4, 6, 3], classes=classes)


class WideBlock(nn.Module):
    """A pre-activation residual block with GroupNorm in 16 groups (arXiv:2204.13650)."""

    def __init__(self, *, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(16, channels), nn.GroupNorm(16, out)
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1, stride=stride) if channels != out else nn.Identity()

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H / stride, W / stride)."""
        active = F.relu(self.norm1(image_BCHW))
        changed = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return changed + self.shortcut(active if self.conv1.in_channels != self.conv1.out_channels else image_BCHW)


def wide_resnet(*, depth: int, widening: int, classes: int) -> nn.Sequential:
    """WRN-depth-widening for 32x32 images, with GroupNorm (arXiv:2204.13650)."""
    per_stage = (depth - 4) // 6
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1)]
    channels = 16
    for stage in range(3):
        out = 16 * widening * 2**stage
        for index in range(per_stage):
            layers.append(WideBlock(channels=channels, out=out, stride=2 if stage > 0 and index == 0 else 1))
            channels = out
    pooled = (nn.GroupNorm(16, channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, *pooled, nn.Linear(channels, classes))


def small_cnn() -> nn.Sequential:
    """The CNN of 26,010 parameters with which DP on MNIST is usually shown (arXiv:2007.14191)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def perceptron(*, inputs: int, hidden: int, classes: int) -> nn.Sequential:
    """A perceptron with two hidden layers."""
    hidden_layers = (nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
    return nn.Sequential(*hidden_layers, nn.Linear(hidden, classes))
