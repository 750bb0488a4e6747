"""The architectures that transformers builds, from a configuration: nothing is downloaded.

The package is imported on use, so that the other models run without it.

Shape legend: B = examples, T = positions.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from torch import Tensor, nn


class Logits(nn.Module):
    """A transformers model as a function from token ids (B, T) to its logits.

    Attributes:
        tables: arguments that look up a learned table besides the tokens', such as ``position_ids``.
        per_example: pass those arguments, with shape (B, T); without, a model makes its own, of shape (1, T).
    """

    def __init__(self, model: nn.Module, *, tables: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.model, self.tables, self.per_example = model, tables, False

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Token ids (B, T) -> logits."""
        tables = {name: _rows(name, ids_BT) for name in self.tables} if self.per_example else {}
        return self.model(input_ids=ids_BT, **tables).logits


def _rows(name: str, ids_BT: Tensor) -> Tensor:
    if name == "position_ids":
        return torch.arange(ids_BT.shape[1], device=ids_BT.device).repeat(ids_BT.shape[0], 1)
    return torch.zeros_like(ids_BT)


def _transformers() -> ModuleType:
    # It imports torchvision wherever it finds one, for images that no model here has: that would cost memory, and a
    # torchvision built for another torch would stop it.
    sys.modules.setdefault("torchvision", None)
    import transformers

    return transformers


def gpt2(*, vocabulary: int, width: int, depth: int, heads: int, length: int) -> nn.Module:
    """GPT2LMHeadModel: the head is the embedding."""
    transformers = _transformers()
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        n_positions=length,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return Logits(transformers.GPT2LMHeadModel(config), tables=("position_ids",))


def roberta(*, vocabulary: int, width: int, depth: int, heads: int, feed: int, length: int) -> nn.Module:
    """RobertaForSequenceClassification with two classes."""
    transformers = _transformers()
    config = transformers.RobertaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=feed,
        max_position_embeddings=length + 2,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    return Logits(transformers.RobertaForSequenceClassification(config), tables=("token_type_ids",))


def llama(*, vocabulary: int, width: int, depth: int, heads: int, key_heads: int, feed: int, length: int) -> nn.Module:
    """LlamaForCausalLM with its head tied to the embedding, as in the 1B model of Llama 3.2."""
    transformers = _transformers()
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=feed,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return Logits(transformers.LlamaForCausalLM(config))
