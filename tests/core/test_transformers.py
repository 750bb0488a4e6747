"""PyTorch's own transformer layers, encoders and decoders: exact in every mode, whichever axis comes first."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from core.attended import A, E, S, T, shaken_model, verified
from core.brute_force import B, gap, random_batch
from discreet.core.book import Book
from discreet.core.gradient import trainable
from discreet.core.meeting import guard
from oracles import rows

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors:UserWarning"  # said by torch's own fast path, in an unguarded evaluation
)


def _encoder(norm_first: bool, batch_first: bool, dropout: float):
    layer = nn.TransformerEncoderLayer(E, A, 9, dropout, batch_first=batch_first, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # enable_nested_tensor is True by default, and says when it is not used
        return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(E))


def _decoder(norm_first: bool, batch_first: bool, dropout: float):
    layer = nn.TransformerDecoderLayer(E, A, 9, dropout, "gelu", batch_first=batch_first, norm_first=norm_first)
    return nn.TransformerDecoder(layer, 2)


def _whole(norm_first: bool, batch_first: bool, dropout: float):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Transformer(E, A, 1, 1, 9, dropout, norm_first=norm_first, batch_first=batch_first)


def _masks(x, batch_first):
    causal = nn.Transformer.generate_square_subsequent_mask(T, dtype=x.dtype)
    padding = torch.zeros(x.shape[0], T, dtype=x.dtype)
    padding[:, -2:] = -torch.inf
    return causal, padding


def _turned(x, batch_first):
    return x if batch_first else x.transpose(0, 1)


def _encode(s, x):
    causal, padding = _masks(x, s.bf)
    return _turned(s.m(_turned(x, s.bf), mask=causal, src_key_padding_mask=padding), s.bf)


def _encode_padded(s, x):
    padding = (torch.arange(T) >= T - 2).expand(x.shape[0], -1)
    return _turned(s.m(_turned(x, s.bf), src_key_padding_mask=padding), s.bf)[:, : T - 2]


def _decode(s, x):
    causal, _ = _masks(x, s.bf)
    return _turned(s.m(_turned(x, s.bf), _turned(x[:, :S].cos(), s.bf), tgt_mask=causal), s.bf)


def _translate(s, x):
    return _turned(s.m(_turned(x[:, :S].sin(), s.bf), _turned(x, s.bf)), s.bf)


TRANSFORMERS = {
    "encoder": (_encode, _encoder),
    "encoder, padded": (_encode_padded, _encoder),
    "decoder": (_decode, _decoder),
    "transformer": (_translate, _whole),
}


def _transformer(name, *, norm_first, batch_first, dropout, dtype=torch.float64):
    forward, build = TRANSFORMERS[name]
    torch.manual_seed(3)
    model = shaken_model(forward, dtype, m=build(norm_first, batch_first, dropout))
    model.bf = batch_first
    return model


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_transformers(name, batch_first, norm_first, mode):
    model = _transformer(name, norm_first=norm_first, batch_first=batch_first, dropout=0.0).train(mode == "train")
    batch = random_batch(T, E)
    layout = None if batch_first else verified(model, rows(batch, [0, 1, 2, 3], B))
    assert gap(model, batch, layout=layout) < 1e-9


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_transformers_with_dropout_pass_the_self_check(name, batch_first, norm_first):
    """Masks must be torch's own for that: brute force runs the model as it is, and draws them in torch's order."""
    model = _transformer(name, norm_first=norm_first, batch_first=batch_first, dropout=0.2, dtype=torch.float32)
    verified(model, random_batch(T, E, dtype=torch.float32))


def test_the_fast_path_is_not_taken_under_guard_and_needs_no_rule_without_gradient():
    model = _transformer("encoder, padded", norm_first=False, batch_first=True, dropout=0.0).eval()
    x = random_batch(T, E)["x"]
    with torch.no_grad():
        wanted = model(x)
    with guard(Book(trainable(model), examples=B)), torch.no_grad():
        assert torch.allclose(model(x), wanted, rtol=0, atol=1e-12)
