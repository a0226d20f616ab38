"""config.json of published families as our config, and back.

`read_*` makes our config of theirs; `write_*` gives the keys of theirs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import (
    Activation,
    AttentionConfig,
    LayerKind,
    LoadBalancing,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    Norm,
    NormPlacement,
    Position,
    QKNorm,
    RouterScore,
)
from models.formats.huggingface.rope_map import HFConfig, one_of, read_rope, write_rope

ACTIVATIONS = {
    "silu": Activation.silu,
    "gelu": Activation.gelu,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
    "gelu_new": Activation.gelu_tanh,
    "relu": Activation.relu,
    "relu2": Activation.relu2,
}


def _activation(hf: HFConfig) -> Activation:
    name = one_of(hf, "hidden_activation", "hidden_act", "activation_function")
    if name not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act={name}: must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _pattern(hf: HFConfig) -> list[LayerKind]:
    """The shortest list that, repeated, gives every layer its kind."""
    names = {"full_attention": LayerKind.full, "sliding_attention": LayerKind.sliding}
    types = hf.get("layer_types")
    if types is None:
        everywhere = hf.get("sliding_window") is not None and hf.get("use_sliding_window", True)
        full = hf.get("max_window_layers", 0) if everywhere else hf["num_hidden_layers"]  # Qwen2: the first ones
        types = ["full_attention" if i < full else "sliding_attention" for i in range(hf["num_hidden_layers"])]
    unknown = sorted(set(types) - set(names))
    if unknown:
        raise ValueError(f"config.json: layer_types holds {unknown[0]!r}: known: {', '.join(names)}")
    return _period([names[name] for name in types])


def _period(values: list[Any]) -> list[Any]:
    """The shortest list that, repeated, gives these."""
    period = next(n for n in range(1, len(values) + 1) if all(v == values[i % n] for i, v in enumerate(values)))
    return values[:period]


def read_common(hf: HFConfig, *, tied: bool = False, attention: Mapping[str, Any] | None = None, **changes: Any):
    """What all families but GPT-2 call alike."""
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    pattern = _pattern(hf)
    sliding = LayerKind.sliding in pattern
    fields: dict[str, Any] = dict(
        num_heads=heads,
        num_kv_heads=one_of(hf, "num_key_value_heads", default=heads),
        head_dim=one_of(hf, "head_dim", default=width // heads),
        layer_types=pattern,
        sliding_window=hf["sliding_window"] if sliding else AttentionConfig().sliding_window,
    )
    return ModelConfig(
        **dict(
            num_layers=hf["num_hidden_layers"],
            embed_dim=width,
            vocab_size=hf["vocab_size"],
            max_seq_len=hf["max_position_embeddings"],
            norm_eps=hf["rms_norm_eps"],
            rope=read_rope(hf),
            attention=AttentionConfig(**(fields | dict(attention or {}))),
            mlp=MLPConfig(hf["intermediate_size"], activation=_activation(hf), bias=bool(hf.get("mlp_bias", False))),
            tied_embeddings=bool(hf.get("tie_word_embeddings", tied)),
        )
        | changes
    )


def without_windows(hf: HFConfig) -> HFConfig:
    """Their class has none, whatever stands in the file."""
    return {**hf, "sliding_window": None, "layer_types": None}


def read_llama(hf: HFConfig) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return read_common(without_windows(hf), attention={"qkv_bias": bias, "out_bias": bias})


def read_qwen3(hf: HFConfig) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return read_common(hf, attention={"qkv_bias": bias, "out_bias": bias, "qk_norm": QKNorm.head})


def read_olmo2(hf: HFConfig) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    fields = {"qkv_bias": bias, "out_bias": bias, "qk_norm": QKNorm.projection}
    return read_common(without_windows(hf), attention=fields, norm_placement=NormPlacement.post)


def read_gemma(hf: HFConfig, qk_norm: QKNorm) -> ModelConfig:
    scale = float(hf.get("query_pre_attn_scalar") or 256) ** -0.5
    if hf.get("layer_types") is None:  # files of before transformers 4.53 give the period only
        period = hf.get("sliding_window_pattern") or (2 if qk_norm is QKNorm.none else 6)
        kinds = [*["sliding_attention"] * (period - 1), "full_attention"]
        hf = {**hf, "layer_types": [kinds[i % period] for i in range(hf["num_hidden_layers"])]}
    fields = {"qk_norm": qk_norm, "logit_softcap": hf.get("attn_logit_softcapping"), "scale": scale}
    return read_common(
        hf,
        tied=True,
        attention=fields,
        norm_placement=NormPlacement.sandwich,
        norm_unit_offset=True,
        scale_embeddings=True,
        final_logit_softcap=hf.get("final_logit_softcapping"),
    )


def read_smollm3(hf: HFConfig) -> ModelConfig:
    bias, layers = bool(hf.get("attention_bias", False)), hf["num_hidden_layers"]
    every = hf.get("no_rope_layer_interval") or 4
    rotated = hf.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    config = read_common(
        hf if hf.get("use_sliding_window") else without_windows(hf),
        tied=True,
        attention={"qkv_bias": bias, "out_bias": bias},
    )
    config.rope.layer_pattern = _period([bool(turns) for turns in rotated[:layers]])
    return config


def read_mixtral(hf: HFConfig) -> ModelConfig:
    experts = MoEConfig(hf["num_local_experts"], 0, hf["num_experts_per_tok"], hf["intermediate_size"])
    return read_common(hf, moe=experts)


def read_qwen3_moe(hf: HFConfig) -> ModelConfig:
    dense = list(hf.get("mlp_only_layers") or [])
    if hf.get("decoder_sparse_step", 1) != 1 or dense != list(range(len(dense))):
        raise ValueError(
            f"config.json: decoder_sparse_step={hf.get('decoder_sparse_step', 1)}, mlp_only_layers={dense}: only the "
            "first layers can be without experts"
        )
    experts = MoEConfig(
        one_of(hf, "num_experts", "num_local_experts"),
        len(dense),
        hf["num_experts_per_tok"],
        hf["moe_intermediate_size"],
        norm_topk_prob=bool(hf.get("norm_topk_prob", False)),
    )
    bias = bool(hf.get("attention_bias", False))
    fields = {"qkv_bias": bias, "out_bias": bias, "qk_norm": QKNorm.head}
    everywhere = {**hf, "layer_types": None, "max_window_layers": 0}
    return read_common(
        everywhere if hf.get("use_sliding_window") else without_windows(hf), attention=fields, moe=experts
    )


def read_olmoe(hf: HFConfig) -> ModelConfig:
    if hf.get("clip_qkv") is not None:
        raise ValueError(f"config.json: clip_qkv={hf['clip_qkv']}: not supported; only null is")
    experts = MoEConfig(
        one_of(hf, "num_experts", "num_local_experts"),
        0,
        hf["num_experts_per_tok"],
        hf["intermediate_size"],
        norm_topk_prob=bool(hf.get("norm_topk_prob", False)),
    )
    bias = bool(hf.get("attention_bias", False))
    fields = {"qkv_bias": bias, "out_bias": bias, "qk_norm": QKNorm.projection}
    return read_common(without_windows(hf), attention=fields, moe=experts)


def read_gpt_oss(hf: HFConfig) -> ModelConfig:
    if (alpha := hf.get("swiglu_alpha", 1.702)) != 1.702:
        raise ValueError(f"config.json: swiglu_alpha={alpha}: not supported; only 1.702 is")
    width, bias = hf["intermediate_size"], bool(hf.get("attention_bias", True))
    return read_common(
        hf,
        attention={"qkv_bias": bias, "out_bias": bias, "sinks": True},
        mlp=MLPConfig(
            width,
            activation=Activation.gelu_sigmoid,
            activation_clamp=float(one_of(hf, "swiglu_limit", default=7.0)),
            up_offset=1.0,
        ),
        moe=MoEConfig(hf["num_local_experts"], 0, hf["num_experts_per_tok"], width, bias=True, router_bias=True),
    )


def read_deepseek(hf: HFConfig) -> ModelConfig:
    """DeepSeek-V2, whose router is a softmax, and V3, whose router is a sigmoid with a balancing bias."""
    third = hf["model_type"] == "deepseek_v3"
    grouped = third or hf.get("topk_method") == "group_limited_greedy"
    if hf.get("mlp_bias") or (not third and hf.get("norm_topk_prob")):
        raise ValueError("config.json: mlp_bias and, in DeepSeek-V2, norm_topk_prob: not supported; only false is")
    groups = int(hf.get("n_group") or 1) if grouped else 1
    width = hf["moe_intermediate_size"]
    config = read_common(
        {**without_windows(hf), "rope_scaling": None, "rope_parameters": None},
        attention={
            "num_kv_heads": hf["num_attention_heads"],
            "head_dim": hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"],
            "v_head_dim": hf["v_head_dim"],
            "mla": MLAConfig(hf["kv_lora_rank"], hf.get("q_lora_rank") or 0, hf["qk_rope_head_dim"]),
            "out_bias": bool(hf.get("attention_bias", False)),
        },
        moe=MoEConfig(
            hf["n_routed_experts"],
            hf.get("first_k_dense_replace") or 0,
            hf["num_experts_per_tok"],
            width,
            shared_intermediate_dim=width * (hf.get("n_shared_experts") or 0),
            router_score=RouterScore.sigmoid if third else RouterScore.softmax,
            norm_topk_prob=third and bool(hf.get("norm_topk_prob", True)),
            routed_scaling_factor=float(hf.get("routed_scaling_factor", 1.0)),
            num_groups=groups,
            topk_groups=int(hf["topk_group"]) if groups > 1 else 1,
            group_score_topk=2 if third or groups == 1 else 1,
            load_balancing=LoadBalancing.bias if third else LoadBalancing.aux_loss,
        ),
    )
    config.rope = read_rope(hf, latent=True)
    config.rope.interleaved = bool(hf.get("rope_interleave", True)) if third else True
    return config


def read_gpt2(hf: HFConfig) -> ModelConfig:
    heads, width = hf["n_head"], hf["n_embd"]
    return ModelConfig(
        num_layers=hf["n_layer"],
        embed_dim=width,
        vocab_size=hf["vocab_size"],
        max_seq_len=hf["n_positions"],
        norm=Norm.layer,
        norm_eps=hf["layer_norm_epsilon"],
        position=Position.learned,
        attention=AttentionConfig(heads, heads, width // heads, qkv_bias=True, out_bias=True),
        mlp=MLPConfig(hf.get("n_inner") or 4 * width, gated=False, activation=_activation(hf), bias=True),
        tied_embeddings=bool(hf.get("tie_word_embeddings", True)),
    )


def write_common(config: ModelConfig) -> dict[str, Any]:
    a = config.attention
    act = next(name for name, kind in ACTIVATIONS.items() if kind is config.mlp.activation)
    kinds = [a.layer_types[i % len(a.layer_types)] for i in range(config.num_layers)]
    sliding = LayerKind.sliding in kinds
    return {
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp.intermediate_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": act,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": a.qkv_bias,
        "sliding_window": a.sliding_window if sliding else None,
        **write_rope(config),
    }


def _layer_types(config: ModelConfig) -> dict[str, Any]:
    pattern = config.attention.layer_types
    kinds = [pattern[i % len(pattern)] for i in range(config.num_layers)]
    return {"layer_types": [f"{kind.name}_attention" for kind in kinds]}


def write_phi3(config: ModelConfig) -> dict[str, Any]:
    return write_common(config) | {"pad_token_id": None}  # else transformers takes that of a larger vocabulary


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
    sliding = LayerKind.sliding in config.attention.layer_types
    return write_common(config) | _layer_types(config) | {"use_sliding_window": sliding}


def write_smollm3(config: ModelConfig) -> dict[str, Any]:
    turns = config.rope.layer_pattern
    rotated = [int(turns[i % len(turns)]) for i in range(config.num_layers)]
    # Their default for padding is token 128004, which must be a row of the embedding.
    return write_qwen2(config) | {"no_rope_layers": rotated, "mlp_bias": config.mlp.bias, "pad_token_id": None}


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
    experts = config.moe
    return write_common(config) | {
        "intermediate_size": experts.intermediate_dim,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
    }


def write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    experts = config.moe
    return write_common(config) | {
        "use_sliding_window": LayerKind.sliding in config.attention.layer_types,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.intermediate_dim,
        "norm_topk_prob": experts.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(experts.first_num_dense_layers)),
    }


def write_olmoe(config: ModelConfig) -> dict[str, Any]:
    experts = config.moe
    return write_common(config) | {
        "intermediate_size": experts.intermediate_dim,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "norm_topk_prob": experts.norm_topk_prob,
        "clip_qkv": None,
    }


def write_gpt_oss(config: ModelConfig) -> dict[str, Any]:
    named = dataclasses.replace(config, mlp=dataclasses.replace(config.mlp, activation=Activation.silu))
    return (
        write_mixtral(named)
        | _layer_types(config)
        | {"swiglu_alpha": 1.702, "swiglu_limit": config.mlp.activation_clamp}
    )


def write_deepseek(config: ModelConfig) -> dict[str, Any]:
    a, experts = config.attention, config.moe
    latent, grouped = a.mla, experts.num_groups > 1
    third = experts.router_score is RouterScore.sigmoid
    of_version = (
        {
            "norm_topk_prob": experts.norm_topk_prob,
            "rope_interleave": config.rope.interleaved,
            "num_nextn_predict_layers": 0,
        }
        if third
        else {"norm_topk_prob": False, "topk_method": "group_limited_greedy" if grouped else "greedy"}
    )
    return write_common(config) | {
        "attention_bias": a.out_bias,
        "head_dim": latent.qk_rope_head_dim,
        "kv_lora_rank": latent.kv_lora_rank,
        "q_lora_rank": latent.q_lora_rank or None,
        "qk_rope_head_dim": latent.qk_rope_head_dim,
        "qk_nope_head_dim": a.head_dim - latent.qk_rope_head_dim,
        "v_head_dim": a.v_head_dim or a.head_dim,
        "n_routed_experts": experts.num_experts,
        "n_shared_experts": experts.shared_intermediate_dim // experts.intermediate_dim,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.intermediate_dim,
        "first_k_dense_replace": experts.first_num_dense_layers,
        "routed_scaling_factor": experts.routed_scaling_factor,
        "n_group": experts.num_groups,
        "topk_group": experts.topk_groups,
        **of_version,
    }


def write_gemma(config: ModelConfig) -> dict[str, Any]:
    scale = config.attention.scale or config.attention.head_dim**-0.5
    common = write_common(config)
    return {
        **common,
        **_layer_types(config),
        "hidden_activation": common["hidden_act"],
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": config.attention.logit_softcap,
        "final_logit_softcapping": config.final_logit_softcap,
    }


def write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": config.num_layers,
        "n_embd": config.embed_dim,
        "n_head": config.attention.num_heads,
        "n_inner": config.mlp.intermediate_dim,
        "n_positions": config.max_seq_len,
        "n_ctx": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new" if config.mlp.activation is Activation.gelu_tanh else "gelu",
        "tie_word_embeddings": config.tied_embeddings,
    }
