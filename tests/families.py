"""Tiny random models of the families of decoders that transformers knows, by name.

Each is in the shape of its family where that matters to quantization block by block: attention of
several kinds, tied heads, fused projections, experts, layers that are no attention.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCAB = 384
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention"] * 2
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
TIED = {"tie_word_embeddings": True}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, **TIED}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SMALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@dataclass(frozen=True)
class Family:
    """model_type: as in config.json. options: beside `SIZES`, or all where `sizes` is False."""

    name: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    sizes: bool = True

    def config(self) -> Any:
        from transformers import AutoConfig

        options = {**(SIZES if self.sizes else {}), **self.options}
        return AutoConfig.for_model(self.model_type, **options)


FAMILIES = [
    Family("Llama 3", "llama", {"rope_parameters": LLAMA3_ROPE}),
    Family("Llama, tied (Llama 3.2)", "llama", TIED),
    Family("Llama, YaRN", "llama", {"rope_parameters": YARN}),
    Family("Llama with biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Family("Llama, own head size", "llama", {"head_dim": 24}),
    Family("Mistral", "mistral", {"head_dim": 16, "sliding_window": 16}),
    Family("Ministral", "ministral", {"head_dim": 16, "sliding_window": 16}),
    Family("Qwen 2", "qwen2"),
    Family(
        "Qwen 2, sliding",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ),
    Family("Qwen 3", "qwen3", {"head_dim": 32}),
    Family(
        "Qwen 3, sliding",
        "qwen3",
        {
            "head_dim": 32,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 2,
        },
    ),
    Family("Phi 3", "phi3", {"sliding_window": None}),
    Family("Phi", "phi"),
    Family("Gemma", "gemma", {"head_dim": 32, **TIED}),
    Family("Gemma 2", "gemma2", GEMMA),
    Family("Gemma 3", "gemma3_text", {**GEMMA, "layer_types": MIXED}),
    Family("SmolLM 3", "smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    Family("Granite", "granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22}),
    Family("OLMo", "olmo"),
    Family("OLMo 2", "olmo2"),
    Family("OLMo 3", "olmo3", {"sliding_window": 16, "layer_types": MIXED}),
    Family("Cohere", "cohere", TIED),
    Family("Cohere 2", "cohere2", {**TIED, "sliding_window": 16, "layer_types": MIXED}),
    Family("EXAONE 4", "exaone4", {"sliding_window": 16, "layer_types": MIXED}),
    Family("GLM 4", "glm4", {"head_dim": 16}),
    Family("StableLM", "stablelm"),
    Family("StarCoder 2", "starcoder2", {"sliding_window": None}),
    Family("Helium", "helium", {"head_dim": 16}),
    Family("Arcee", "arcee"),
    Family("HunYuan", "hunyuan_v1_dense", {"head_dim": 16}),
    Family("ERNIE 4.5", "ernie4_5", {"head_dim": 16}),
    Family("Seed-OSS", "seed_oss", {"head_dim": 16}),
    Family("Apertus", "apertus"),
    Family("Nemotron", "nemotron"),
    Family(
        "OPT",
        "opt",
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
        sizes=False,
    ),
    Family("LFM 2", "lfm2"),
    Family("Jamba", "jamba", {**EXPERTS, "num_experts": 4}),
    Family("Bamba", "bamba", {"attn_layer_indices": [1, 3]}),
    Family("Falcon H1", "falcon_h1"),
    Family("Gemma 3n", "gemma3n_text", {"num_kv_shared_layers": 0, "head_dim": 16}),
    Family(
        "GPT-2",
        "gpt2",
        {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128},
        sizes=False,
    ),
    Family("GPT-OSS", "gpt_oss", {**EXPERTS, "head_dim": 16, "sliding_window": 16}),
    Family("Granite MoE", "granitemoe", EXPERTS),
    Family("Mixtral", "mixtral", EXPERTS),
    Family("Qwen 2 MoE", "qwen2_moe", {**SMALL_EXPERTS, "shared_expert_intermediate_size": 64}),
    Family("Qwen 3 MoE", "qwen3_moe", {**SMALL_EXPERTS, "head_dim": 16}),
    Family("OLMoE", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Family(
        "DeepSeek V3",
        "deepseek_v3",
        {
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "qk_nope_head_dim": 16,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
    ),
    Family("Llama 4", "llama4_text", {"intermediate_size_mlp": 128, "num_local_experts": 2}),
]
BY_NAME = {family.name: family for family in FAMILIES}


def make_model(family: Family) -> Any:
    """A random model of the family, fp32, whose attention is far from even."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(family.config())
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                size = 0.5 if "embed" in name else 0.15
                parameter.copy_(size * torch.randn(parameter.shape, generator=random))
    return model.eval()


def save_model(family: Family, folder: Path) -> Path:
    """The same in a folder."""
    make_model(family).save_pretrained(folder)
    return folder
