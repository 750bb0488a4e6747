"""Models made of torch alone: recurrent ones, torch's own transformer, and small classics of private training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.model import Batch, V, ZooModel, curved, images, plain_classes, tokens

WIDTH = 32


class Recurrent(nn.Module):
    """Embedding, a recurrent layer, and a classifier on the mean over time."""

    def __init__(self, cell: type[nn.RNNBase], *, layers: int = 1, bidirectional: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, 16)
        self.rnn = cell(16, WIDTH, num_layers=layers, bidirectional=bidirectional, batch_first=True)
        self.head = nn.Linear(WIDTH * (1 + bidirectional), 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        output_BTD, _ = self.rnn(self.embed(input_ids))
        return self.head(output_BTD.mean(1))


class Encoder(nn.Module):
    """Tokens through nn.TransformerEncoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(input_ids)).mean(1))


class Translator(nn.Module):
    """nn.Transformer from the tokens to their reverse, with one table for source, target and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 1, 1, 48, dropout=0.0, batch_first=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        source, target = self.embed(input_ids), self.embed(input_ids.flip(1))
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=target.dtype)
        return F.linear(self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True), self.embed.weight)


class TextCnn(nn.Module):
    """Three widths of convolution over an embedding, maximum over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, 16)
        self.convs = nn.ModuleList(nn.Conv1d(16, 12, width) for width in (2, 3, 4))
        self.head = nn.Linear(36, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        embedded_BDT = self.embed(input_ids).transpose(1, 2)
        return self.head(torch.cat([conv(embedded_BDT).relu().amax(2) for conv in self.convs], 1))


class Residual(nn.Module):
    """Pre-activation residual block with GroupNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(min(16, inputs), inputs), nn.GroupNorm(16, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        matched = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if matched else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.norm1(x).relu()
        return self.shortcut(active) + self.conv2(self.norm2(self.conv1(active)).relu())


def residual_network(widths: tuple[int, ...], *, blocks: int) -> nn.Module:
    """A stem, stages of residual blocks of the given widths, and a classifier; each stage after the first halves."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
    before = 16
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(Residual(before, width, 2 if stage and not block else 1))
            before = width
    head = [nn.GroupNorm(16, before), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)]
    return nn.Sequential(*layers, *head).eval()


def reverse(model: nn.Module, batch: Batch) -> Tensor:
    """A curved function of every logit."""
    return curved(model(**batch))


def _recurrent(name: str, cell: type[nn.RNNBase], notes: str, *, layers: int = 1, both: bool = False) -> ZooModel:
    return ZooModel(
        name=name,
        family="torch",
        build=lambda: Recurrent(cell, layers=layers, bidirectional=both).eval(),
        batch=tokens(),
        loss=plain_classes,
        notes=notes,
    )


MODELS = (
    _recurrent("LSTM", nn.LSTM, "gates over time, two layers", layers=2),
    _recurrent("GRU", nn.GRU, "reset gate inside the product"),
    _recurrent("Bidirectional LSTM", nn.LSTM, "two directions", both=True),
    ZooModel("nn.TransformerEncoder", "torch", lambda: Encoder().eval(), tokens(), plain_classes,
             "nn.MultiheadAttention"),
    ZooModel("nn.Transformer", "torch", lambda: Translator().eval(), tokens(), reverse, "one table three times"),
    ZooModel("WRN-16-4", "torch", lambda: residual_network((64, 128, 256), blocks=2), images(8), plain_classes,
             "full size; GroupNorm"),
    ZooModel("ResNet-18", "torch", lambda: residual_network((16, 32, 64, 128), blocks=2), images(8), plain_classes,
             "a quarter of the width; GroupNorm"),
    ZooModel("TextCNN", "torch", lambda: TextCnn().eval(), tokens(), plain_classes, "maximum over time"),
)  # fmt: skip
