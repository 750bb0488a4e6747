"""Encoders of text, encoder-decoders, and models of speech, from transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from zoo.model import Batch, Loss, V, ZooModel, classes, curved, masked_token, signals, tokens, translation

_SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
_BART: dict[str, Any] = {
    "vocab_size": V,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}


def _build(architecture: str, head: str, **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{architecture}Config")(**options)
    model: nn.Module = getattr(transformers, f"{architecture}{head}")(config)
    return model.eval()


def _row(
    name: str,
    architecture: str,
    head: str,
    notes: str,
    loss: Loss,
    batch: Callable[[], Batch] | None = None,
    **options: Any,
) -> ZooModel:
    return ZooModel(
        name=name,
        family="transformers",
        build=lambda: _build(architecture, head, **options),
        batch=batch or tokens(),
        loss=loss,
        notes=notes,
    )


def speech_to_text(model: nn.Module, batch: Batch) -> Tensor:
    """Whisper: frames in, and a target that the frames' signs spell."""
    target = (batch["input_features"][:, :5, 0] > 0).long() + 3
    return curved(model(**batch, decoder_input_ids=target, use_cache=False).logits)


def bert(**options: Any) -> nn.Module:
    """The BERT of this zoo, with a classification head."""
    return _build("Bert", "ForSequenceClassification", **{**_SIZES, **options})


_WAV: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "num_labels": 3,
    "apply_spec_augment": False,
}

MODELS = (
    ZooModel("BERT", "transformers", bert, tokens(), classes, "three tables, pooler"),
    _row("BERT (masked words)", "Bert", "ForMaskedLM", "tied decoder", masked_token, **_SIZES),
    _row("RoBERTa", "Roberta", "ForMaskedLM", "positions from padding, tied", masked_token,
         **{**_SIZES, "pad_token_id": 1}),
    _row("DistilBERT", "DistilBert", "ForSequenceClassification", "no pooler", classes, vocab_size=V, dim=32,
         n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=24),
    _row("ELECTRA", "Electra", "ForSequenceClassification", "factorised embedding", classes, embedding_size=16,
         **_SIZES),
    _row("DeBERTa-v2", "DebertaV2", "ForSequenceClassification", "relative table without batch axis, disentangled",
         classes, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm",
         share_att_key=True, max_relative_positions=8, **_SIZES),
    _row("ALBERT", "Albert", "ForSequenceClassification", "one block used twice", classes, embedding_size=16, **_SIZES),
    _row("ModernBERT", "ModernBert", "ForSequenceClassification", "rotary, gate, local attention", classes,
         local_attention=4, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2, **_SIZES),
    _row("T5", "T5", "ForConditionalGeneration", "tied three times, shared relative bias", translation, vocab_size=V,
         d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
         relative_attention_num_buckets=8, feed_forward_proj="gated-gelu"),
    _row("BART", "Bart", "ForConditionalGeneration", "tied three times, learnt positions", translation, **_BART),
    _row("mBART", "MBart", "ForConditionalGeneration", "tied, final norms", translation, **_BART),
    _row("Pegasus", "Pegasus", "ForConditionalGeneration", "tied, sinusoids", translation, **_BART),
    _row("Whisper", "Whisper", "ForConditionalGeneration", "conv stem, raw positions, cross attention",
         speech_to_text, signals(8, 16, name="input_features"), num_mel_bins=8, max_source_positions=8,
         max_target_positions=12, suppress_tokens=None, begin_suppress_tokens=None, eos_token_id=2, bos_token_id=1,
         **{name: value for name, value in _BART.items() if name != "max_position_embeddings"}),
    _row("Wav2Vec2", "Wav2Vec2", "ForSequenceClassification", "weight-normed positional conv", classes,
         signals(160, name="input_values"), **_WAV),
)  # fmt: skip
