"""Language models that predict the next token, from transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoo.model import V, ZooModel, next_token, tokens

_SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
_GROUPED: dict[str, Any] = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
_EXPERTS: dict[str, Any] = {**_GROUPED, "num_experts_per_tok": 2}
_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _build(architecture: str, **options: Any) -> nn.Module:
    """``<architecture>Config`` and the language model that belongs to it."""
    import transformers

    config = getattr(transformers, f"{architecture}Config")(**_IDS, **options)
    suffix = "LMHeadModel" if architecture == "GPT2" else "ForCausalLM"
    model: nn.Module = getattr(transformers, f"{architecture.removesuffix('Text')}{suffix}")(config)
    return model.eval()


def _row(name: str, architecture: str, notes: str, **options: Any) -> ZooModel:
    return ZooModel(
        name=name,
        family="transformers",
        build=lambda: _build(architecture, **options),
        batch=tokens(),
        loss=next_token,
        notes=notes,
    )


def gpt2(**options: Any) -> nn.Module:
    """The GPT-2 of this zoo, which adapters and modes of training share."""
    return _build("GPT2", vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=24, **options)


def mixtral(*, experts_implementation: str) -> nn.Module:
    """The Mixtral of this zoo, with its products of experts done in one of transformers' ways."""
    return _build("Mixtral", num_local_experts=4, experts_implementation=experts_implementation, **_EXPERTS)


MODELS = (
    ZooModel("GPT-2", "transformers", gpt2, tokens(), next_token, "tied head, addmm, positions (1, T)"),
    _row("GPT-Neo", "GPTNeo", "tied head, local attention", vocab_size=V, hidden_size=32, num_layers=2, num_heads=4,
         attention_types=[[["global", "local"], 1]], max_position_embeddings=24, window_size=4),
    _row("GPT-NeoX", "GPTNeoX", "parallel residual, rotary", intermediate_size=48, **_SIZES),
    _row("Llama", "Llama", "rotary, grouped queries, RMSNorm, gate", **_GROUPED),
    _row("Mistral", "Mistral", "sliding window", sliding_window=4, **_GROUPED),
    _row("Qwen3", "Qwen3", "norms of query and key by head", **_GROUPED),
    _row("Gemma 2", "Gemma2", "tied, 1 + w, capped logits", query_pre_attn_scalar=8, sliding_window=4,
         attn_implementation="eager", **_GROUPED),
    _row("Gemma 3", "Gemma3Text", "tied, 1 + w, two rotary bases", query_pre_attn_scalar=8, sliding_window=4,
         **_GROUPED),
    _row("Phi", "Phi", "partial rotary, biases, parallel block", intermediate_size=48, **_SIZES),
    _row("OPT", "OPT", "tied head, shifted positions", ffn_dim=48, dropout=0.0, word_embed_proj_dim=32, **_SIZES),
    ZooModel("Mixtral", "transformers", lambda: mixtral(experts_implementation="batched_mm"), tokens(), next_token,
             "mixture of experts: a copy of the weights for each token"),
    ZooModel("Mixtral (expert by expert)", "transformers", lambda: mixtral(experts_implementation="eager"), tokens(),
             next_token, "mixture of experts: rows picked from the batch"),
    _row("Qwen3-MoE", "Qwen3Moe", "mixture of experts, norms of query and key", num_experts=4,
         moe_intermediate_size=16, decoder_sparse_step=1, experts_implementation="eager", **_EXPERTS),
    _row("Mamba", "Mamba", "state space: depthwise conv, A_log, D", vocab_size=V, hidden_size=32, num_hidden_layers=2,
         state_size=4, time_step_rank=4),
)  # fmt: skip
