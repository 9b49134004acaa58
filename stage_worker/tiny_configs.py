"""Tiny configurations: what a field's name means, and what each model type needs beyond that.

Data, not logic. `common_fields` gives a tiny value for every field name that means the same in most
types; `type_fields` adds or replaces what is particular to one. Sizes are consistent with each
other: four heads of sixteen make a hidden size of 64, windows and chunks are short enough that the
sweep's eleven positions reach past them, and at least one layer of each kind falls on either side
of every cut.
"""

from __future__ import annotations

from typing import Any

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_WIDTH = 4, 2, 32
WINDOW = 8
CONTEXT_LENGTH = 4096
ROPE_THETA = 10000.0

_BY_VALUE: tuple[tuple[Any, str], ...] = (
    (
        HEADS,
        (
            "num_attention_heads n_heads n_head num_heads mamba_n_heads linear_num_value_heads "
            "mamba_num_heads index_n_heads swa_num_attention_heads num_swa_attention_heads"
        ),
    ),
    (
        KV_HEADS,
        (
            "num_key_value_heads n_kv_heads num_kv_heads linear_num_key_heads num_attention_groups "
            "num_swa_key_value_heads swa_num_key_value_heads num_global_key_value_heads"
        ),
    ),
    (
        HEAD_DIM,
        (
            "head_dim v_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head "
            "mamba_head_dim "
            "kv_channels swa_head_dim swa_v_head_dim index_head_dim global_head_dim "
            "hidden_size_per_head kv_lora_rank q_lora_rank qk_head_dim"
        ),
    ),
    (
        WINDOW,
        (
            "qk_rope_head_dim qk_nope_head_dim rotary_dim mamba_d_state ssm_state_size state_size "
            "time_step_rank mamba_dt_rank sliding_window sliding_window_size attention_window_size "
            "window_size mamba_chunk_size attention_chunk_size o_lora_rank index_topk "
            "a_low_rank_dim v_low_rank_dim gate_low_rank_dim decay_low_rank_dim laurel_rank"
        ),
    ),
    (
        128,
        (
            "intermediate_size n_inner ffn_hidden_size ff_intermediate_size intermediate_size_mlp "
            "block_ff_dim shared_intermediate_size dense_intermediate_size"
        ),
    ),
    (
        EXPERT_WIDTH,
        (
            "moe_intermediate_size shared_expert_intermediate_size share_expert_dim "
            "moe_hidden_size moe_shared_expert_intermediate_size expert_ffn_hidden_size"
        ),
    ),
    (EXPERTS, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (
        EXPERTS_PER_TOKEN,
        "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts",
    ),
    (
        1,
        (
            "num_shared_experts n_shared_experts n_group topk_group mamba_n_groups n_groups "
            "num_expert_group moe_layer_freq decoder_sparse_step num_dense_layers "
            "first_k_dense_replace num_shared_expert"
        ),
    ),
    (2, "mamba_expand layer_group_size group_norm_size full_attention_interval conv_window"),
    (3, "conv_L_cache sliding_window_pattern"),
    (4, "conv_kernel mamba_d_conv linear_conv_kernel_dim conv1d_width short_conv_kernel_size"),
    (64, "mamba_d_ssm"),
    (
        1e-5,
        (
            "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps layernorm_epsilon "
            "norm_epsilon "
            "post_norm_eps"
        ),
    ),
    (
        ROPE_THETA,
        "rope_theta rotary_emb_base rope_embedding_base swa_rope_theta rope_local_base_freq",
    ),
    (
        CONTEXT_LENGTH,
        (
            "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length "
            "model_max_length original_max_position_embeddings"
        ),
    ),
    (
        1.0,
        (
            "routed_scaling_factor logits_scaling attention_multiplier embedding_multiplier "
            "residual_multiplier logit_scale scale_emb scale_depth output_multiplier"
        ),
    ),
    (0.5, "partial_rotary_factor rotary_pct"),
    (30.0, "logits_soft_cap final_logit_softcapping attn_logit_softcapping"),
    (
        False,
        (
            "tie_word_embeddings attention_bias mlp_bias use_bias conv_bias mamba_proj_bias "
            "use_conv_bias use_qkv_bias"
        ),
    ),
    (True, "norm_topk_prob use_qk_norm mla_scale_q_lora mla_scale_kv_lora"),
)

_HIDDEN = "hidden_size d_model n_embd model_dim hidden_dim block_dim"
_LAYERS = "num_hidden_layers n_layers n_layer num_layers num_transformer_layers"
_VOCABULARY = "vocab_size num_vocab vocab_size_per_layer_input"

TEXT_TYPES = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n:TextConfig",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_k3": "kimi_k3:TextArgs",
    "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "llama4": "llama4:TextArgs",
    "minimax_m3_vl": "minimax_m3_vl:TextArgs",
    "mistral3": "llama",
    "muse_spark": "muse_spark:TextArgs",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_5": "qwen3_5:TextModelArgs",
    "qwen3_5_moe": "qwen3_5:TextModelArgs",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}
"""Types that wrap another one's text model: the module, and the class if it is not
``ModelArgs``."""


def common_fields(layers: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    """A tiny value for every field name that means the same in most model types."""
    values: dict[str, Any] = {
        **dict.fromkeys(_HIDDEN.split(), hidden),
        **dict.fromkeys(_LAYERS.split(), layers),
        **dict.fromkeys(_VOCABULARY.split(), vocabulary),
    }
    for value, names in _BY_VALUE:
        values.update(dict.fromkeys(names.split(), value))
    return values


def alternating(layers: int, *kinds: Any) -> list[Any]:
    """``kinds`` repeated over ``layers`` layers."""
    return [kinds[index % len(kinds)] for index in range(layers)]


def type_fields(name: str, layers: int) -> dict[str, Any]:
    """What the type ``name`` (or ``module:Class`` of a nested one) needs beyond the common
    fields."""
    return _per_type(layers).get(name, {})


_YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": CONTEXT_LENGTH // 2,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "rope_theta": ROPE_THETA,
    "llama_4_scaling_beta": 0.1,
}


def _windows(layers: int) -> list[str]:
    return alternating(layers, "sliding_attention", "full_attention")


def _rope_by_kind() -> dict[str, Any]:
    kinds = ("sliding_attention", "full_attention")
    return {kind: {"rope_type": "default", "rope_theta": ROPE_THETA} for kind in kinds}


def _linear_attention(layers: int) -> dict[str, Any]:
    return {
        "kda_layers": [index + 1 for index in range(layers) if index % 2 == 0],
        "full_attn_layers": [index + 1 for index in range(layers) if index % 2],
        "num_heads": HEADS,
        "head_dim": HEAD_DIM,
        "short_conv_kernel_size": 4,
    }


def _per_type(layers: int) -> dict[str, dict[str, Any]]:
    return {
        **_from_klear_to_iquestloopcoder(layers),
        **_from_jamba_to_minicpm(layers),
        **_from_minicpm3_to_openelm(layers),
        **_from_phi3small_to_spark2(layers),
    }


def _from_klear_to_iquestloopcoder(layers: int) -> dict[str, dict[str, Any]]:
    return {
        "Klear": {"mlp_only_layers": []},
        "afm7": {"num_kv_reuse_layers": 2},
        "afmoe": {"layer_types": _windows(layers)},
        "apertus": {"post_norm": False, "qk_norm": True},
        "baichuan_m1": {"sliding_window_layers": list(range(0, layers, 2))},
        "dbrx": {
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": ROPE_THETA},
        },
        "deepseek_v2": {"rope_scaling": _YARN},
        "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LLG"},
        "exaone_moe": {
            "layer_types": _windows(layers),
            "is_moe_layer": alternating(layers, False, True),
        },
        "gemma3n:TextConfig": {
            "layer_types": _windows(layers),
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.0] * layers,
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
        },
        "gemma4_text": {
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
            "layer_types": _windows(layers),
        },
        "gear": {"layer_types": _windows(layers)},
        "glm4_moe": {"rope_scaling": None},
        "glm_moe_dsa": {
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        },
        "granitemoehybrid": {"layer_types": alternating(layers, "mamba", "attention")},
        "hunyuan": {
            "use_mixed_mlp_moe": True,
            "use_cla": True,
            "cla_share_factor": 2,
            "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
        },
        "iquestloopcoder": {"loop_window_size": WINDOW},
    }


def _from_jamba_to_minicpm(layers: int) -> dict[str, dict[str, Any]]:
    return {
        "jamba": {
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
        },
        "kimi_linear": {"linear_attn_config": _linear_attention(layers)},
        "kimi_k3:TextArgs": {
            "linear_attn_config": _linear_attention(layers),
            "activation_situ_beta": 1.0,
        },
        "lfm2": {
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
            "layer_types": alternating(layers, "conv", "full_attention"),
        },
        "lfm2_moe": {
            "use_expert_bias": True,
            "layer_types": alternating(layers, "conv", "full_attention"),
        },
        "lille-130m": {"block_size": 128},
        "llama4:TextArgs": {
            "interleave_moe_layer_step": 2,
            "rope_scaling": None,
            "num_experts_per_tok": 1,
        },
        "llama4_text": {"no_rope_layers": alternating(layers, 1, 0)},
        "longcat_flash": {
            "attention_method": "MLA",
            "zero_expert_type": "identity",
            "zero_expert_num": 1,
        },
        "longcat_flash_ngram": {"zero_expert_num": 1},
        "mamba2": {"time_step_limit": [0.0, 100.0]},
        "mellum": {"layer_types": _windows(layers), "rope_parameters": _rope_by_kind()},
        "mimo_v2_flash": {
            "hybrid_layer_pattern": alternating(layers, 0, 1),
            "moe_layer_freq": alternating(layers, 0, 1),
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        },
        "minicpm": {"dim_model_base": 32},
    }


def _from_minicpm3_to_openelm(layers: int) -> dict[str, dict[str, Any]]:
    return {
        "minicpm3": {
            "dim_model_base": 32,
            "rope_scaling": {
                "type": "longrope",
                "original_max_position_embeddings": CONTEXT_LENGTH,
                "short_factor": 1.0,
                "long_factor": 1.0,
            },
        },
        "minimax_m3_vl:TextArgs": {
            "moe_layer_freq": alternating(layers, 0, 1),
            "index_block_size": 4,
            "index_topk_blocks": 2,
        },
        "ministral3": {"rope_parameters": _YARN, "layer_types": _windows(layers)},
        "mistral4": {"rope_parameters": _YARN},
        "muse_spark:TextArgs": {
            "num_shared_experts": 0,
            "rope_parameters": {"rope_theta": ROPE_THETA},
            "layer_rope_theta": alternating(layers, ROPE_THETA, 0.0),
            "layer_types": _windows(layers),
        },
        "nemotron": {"hidden_act": "relu2"},
        "nemotron-nas": {
            "block_configs": alternating(
                layers,
                {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
                {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            )
        },
        "nemotron_h": {
            "layers_block_type": alternating(layers, "mamba", "mlp", "attention"),
            "n_routed_experts": None,
        },
        "olmo_hybrid": {
            "linear_allow_neg_eigval": True,
            "layer_types": alternating(layers, "linear_attention", "full_attention"),
        },
        "openelm": {
            "ffn_dim_divisor": 8,
            "num_query_heads": [HEADS] * layers,
            "num_kv_heads": [KV_HEADS] * layers,
            "ffn_multipliers": [1.0 + 0.5 * (index % 2) for index in range(layers)],
        },
    }


def _from_phi3small_to_spark2(layers: int) -> dict[str, dict[str, Any]]:
    return {
        "phi3small": {
            "dense_attention_every_n_layers": 2,
            "gegelu_limit": 20.0,
            "vocab_size": 100352,  # it masks fixed token ids just below this
        },
        "plamo": {"n_shared_head": 2},
        "qwen3_moe": {"mlp_only_layers": []},
        "qwen3_next": {"mlp_only_layers": []},
        "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
        "spark2_5": {"rope_parameters": _rope_by_kind(), "layer_types": _windows(layers)},
    }
