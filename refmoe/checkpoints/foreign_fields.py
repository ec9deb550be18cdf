# SPDX-License-Identifier: Apache-2.0
"""Fields of config.json that Mixtral does not have: those that change a model are refused, unless they change nothing.

transformers' Mixtral ignores them all, so a file that has one is loaded there without a word. An oracle must not guess
which of the two models is meant: the one that the file describes, or the one that the library computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from refmoe.files.json_file import JsonFile
from refmoe.spec.config import Config

Neutral = Callable[[Any, Config], bool]
"""Whether a value, which is not null, leaves a Mixtral of this configuration as it is."""


def one_of(*values: Any) -> Neutral:
    """The value is one of these. A boolean is no number: ``true`` is not 1."""
    return lambda found, _: any(
        found == value and isinstance(found, bool) == isinstance(value, bool) for value in values
    )


def value_of(field: str) -> Neutral:
    """The value is that of a field of the configuration."""
    return lambda found, config: not isinstance(found, bool) and found == getattr(config, field)


def _kinds_of_layers(found: Any, config: Config) -> bool:
    kind = "full_attention" if config.window is None else "sliding_attention"
    return isinstance(found, list) and len(found) == config.layers and all(each == kind for each in found)


def _without_window(found: Any, config: Config) -> bool:
    return config.window is None


def _plain_rope(found: Any, _: Config) -> bool:
    return isinstance(found, dict) and all(
        (name in ("rope_type", "type") and value == "default") or value is None for name, value in found.items()
    )


def _softmax_scale(found: Any, config: Config) -> bool:
    number = isinstance(found, int | float) and not isinstance(found, bool)
    return number and math.isclose(found, 1 / math.sqrt(config.head_dim), rel_tol=1e-12)


def _anything(found: Any, config: Config) -> bool:
    return True


OFF = one_of(False, 0, 0.0)
ONE = one_of(1, 1.0)

FOREIGN: dict[str, tuple[str, Neutral]] = {
    "Mixtral's projections have no biases": (
        "attention_bias mlp_bias qkv_bias use_bias use_qkv_bias bias add_bias_linear lm_head_bias router_bias "
        "moe_router_bias use_router_bias expert_bias use_expert_bias e_score_correction_bias",
        OFF,
    ),
    "weights that are not quantised were expected, or 'quantization_config'": (
        "quantization compression_config",
        one_of({}),
    ),
    "Mixtral's rotary embedding is not scaled": ("rope_scaling", _plain_rope),
    "Mixtral's rotary embedding is the default one": ("rope_type", one_of("default")),
    "Mixtral turns pairs of the two halves of a head": (
        "rope_interleaved rope_interleave use_interleaved_rope mla_rope_interleaved",
        OFF,
    ),
    "Mixtral turns whole heads": ("partial_rotary_factor rotary_pct rope_pct", ONE),
    "Mixtral turns the heads of every layer": (
        "no_rope_layers no_rope_layer_interval nope_layer_interval",
        one_of([], 0, False),
    ),
    "Mixtral has no other embedding of positions": ("alibi use_alibi use_absolute_position_embeddings use_mrope", OFF),
    "all layers of Mixtral attend alike": ("layer_types attn_layer_types", _kinds_of_layers),
    "all layers of Mixtral use the same window": (
        "sliding_window_pattern max_window_layers sliding_window_layers local_attention_layers "
        "global_attn_every_n_layers interleaved_sliding_window attention_chunk_size",
        _without_window,
    ),
    "the window of a Mixtral is used where it is given": (
        "use_sliding_window",
        lambda found, config: config.window is None or found is True,
    ),
    "Mixtral renormalises the weights of the chosen experts": (
        "norm_topk_prob normalize_expert_weights moe_renormalize renormalize",
        one_of(True, 1, 1.0),
    ),
    "Mixtral's router takes a softmax": ("scoring_func score_func moe_router_score_function", one_of("softmax")),
    "Mixtral's router chooses among all experts, by their logits alone": (
        "n_group num_expert_group num_expert_groups topk_group num_limited_groups",
        one_of(1, 0, 1.0),
    ),
    "Mixtral's router chooses the largest logits": ("topk_method", one_of("greedy")),
    "Mixtral has no shared experts": (
        "num_shared_experts n_shared_experts moe_num_shared_experts shared_expert_intermediate_size "
        "shared_intermediate_size use_shared_expert num_shared_expert zero_expert_num",
        OFF,
    ),
    "every layer of Mixtral has experts": (
        "first_k_dense_replace num_dense_layers moe_layer_start_index mlp_only_layers dense_layers",
        one_of(0, [], False),
    ),
    "every layer of Mixtral has experts, whatever its number": (
        "moe_layer_freq moe_layer_frequency decoder_sparse_step interleave_moe_layer_step moe_every_n_layers "
        "moe_layer_interval expert_layer_period",
        ONE,
    ),
    "Mixtral's experts are chosen from 'num_local_experts'": (
        "num_experts n_routed_experts moe_num_experts",
        value_of("experts"),
    ),
    "Mixtral's experts have 'intermediate_size' hidden units": (
        "moe_intermediate_size expert_intermediate_size ffn_hidden_size",
        value_of("hidden_dim"),
    ),
    "Mixtral does not scale there": (
        "logit_scale logits_scaling logits_scale embedding_multiplier embedding_scale emb_scale scale_emb "
        "residual_multiplier residual_scale routed_scaling_factor router_scale lm_head_multiplier "
        "key_multiplier query_multiplier attn_output_multiplier mup_base_width_scale "
        "moe_router_topk_scaling_factor output_multiplier_scale dim_model_base_scale rope_factor",
        ONE,
    ),
    "Mixtral's attention scales by 1 / sqrt(head_dim)": (
        "attention_multiplier attn_scale attention_scale softmax_scale",
        _softmax_scale,
    ),
    "Mixtral's attention scales by 1 / sqrt(head_dim), not by another size": (
        "query_pre_attn_scalar",
        value_of("head_dim"),
    ),
    "Mixtral caps and clips nothing": (
        "attn_logit_softcapping final_logit_softcapping router_logit_softcapping attn_logit_softcap "
        "final_logit_softcap logits_soft_cap softcap clip_qkv swiglu_limit expert_clip act_limit "
        "moe_router_z_clip",
        one_of(False, 0, 0.0),
    ),
    "Mixtral has no norms of queries and keys": ("use_qk_norm qk_norm qk_layernorm use_qk_layernorm qk_l2_norm", OFF),
    "Mixtral has a norm before attention and before the experts, and no other": (
        "use_post_norm post_norm sandwich_norm use_sandwich_norm apply_residual_connection_post_layernorm "
        "embedding_norm normalize_embedding use_embedding_norm rms_norm_add_unit_offset zero_centered_gamma",
        OFF,
    ),
    "Mixtral's experts follow its attention": (
        "use_parallel_residual parallel_attn parallel_attention parallel_block",
        OFF,
    ),
    "Mixtral attends to earlier tokens only": ("is_causal causal use_causal_mask", one_of(True)),
    "Mixtral is a decoder alone": ("is_encoder_decoder add_cross_attention use_bidirectional_attention", OFF),
    "Mixtral's attention has no sinks": ("attention_sinks use_attention_sinks attn_sink num_sink_tokens", OFF),
    "Mixtral's keys and values are shared by no other layers": (
        "num_kv_shared_layers kv_share_layers",
        one_of(0, [], False),
    ),
    "Mixtral's gate is activated by SiLU": (
        "hidden_activation activation_function ffn_act_fn",
        one_of("silu", "swish"),
    ),
}
"""The facts about Mixtral, the fields of other models that contradict each, and the values that do not."""


def by_field(table: dict[str, tuple[str, Neutral]]) -> dict[str, tuple[str, Neutral]]:
    """Per field the fact, and the test of its value."""
    return {name: (fact, neutral) for fact, (names, neutral) in table.items() for name in names.split()}


FIELDS = by_field(FOREIGN)

_HARMLESS = """
    _attn_implementation _name_or_path add_bos_token add_eos_token architectures attention_dropout attn_implementation
    auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id hidden_dropout id2label initializer_range is_decoder is_llama_config label2id length_penalty
    max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp
    problem_type pruned_heads remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    rope_parameters rope_theta router_aux_loss_coef router_jitter_noise router_z_loss_coef sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version transformers.js_config typical_p unsloth_fixed unsloth_version use_bfloat16
    use_cache use_return_dict hidden_act
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Fields that a Mixtral's file may have besides its dimensions, and that change no value of a forward pass."""


def refuse_foreign(file: JsonFile, config: Config, table: dict[str, tuple[str, Neutral]] = FIELDS) -> None:
    """Raises InputError for a field of another model that would change the result.   table: as `by_field` gives it"""
    for name, value in file.values.items():
        fact, neutral = table.get(name, ("", _anything))
        if value is not None and not neutral(value, config):
            raise file.refuse(name, value, fact)


def unknown_fields(file: JsonFile, used: frozenset[str]) -> tuple[str, ...]:
    """The fields that refmoe does not know, in the order of the file.   used: the fields of the dimensions"""
    known = used | HARMLESS | FIELDS.keys()
    return tuple(name for name, value in file.values.items() if name not in known and value is not None)
