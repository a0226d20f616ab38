"""Mapping of published checkpoint tensors to parameters, with the order of their dims.

The letters of a pattern are those of `LETTERS`; dims in parentheses are flattened: `(NH)D` is a matrix of N x H rows
and D columns. Rotary pairs are halves, as in transformers, so nothing is permuted. If a format stores interleaved
pairs, its pattern has h instead of H: `(Nh)D`.
"""

from dataclasses import dataclass, replace

from models.config import LoadBalancing, ModelConfig, QKNorm

LETTERS = {
    "embed": "D", "heads": "N", "kv_heads": "K", "head_dim": "H", "mlp": "F", "vocab": "V", "positions": "P",
    "latent": "A", "experts": "E", "router": "R", "outputs": "O",
}  # fmt: skip


@dataclass(frozen=True)
class TensorMapping:
    """Mapping of a checkpoint tensor. `{i}` in its name is the layer index, `{e}` the expert index."""

    name: str
    # (parameter path, dim pattern of the tensor); several are concatenated along `axis`
    parts: tuple[tuple[str, str], ...]
    axis: int = 0
    interleaved: bool = False  # the parts are interleaved along `axis` instead of concatenated
    stack: str = "layers"  # layer stack (models.transformer.stacks)


def tensor_mapping(name: str, *parts: str, axis: int = 0, interleaved: bool = False) -> TensorMapping:
    """Shorthand: `tensor_mapping(name, path, pattern, path, pattern, ...)`."""
    return TensorMapping(name, tuple(zip(parts[::2], parts[1::2], strict=True)), axis, interleaved)


def _head(config: ModelConfig) -> list[TensorMapping]:
    if config.num_labels:
        return [tensor_mapping("score.weight", "score", "OD")]
    return [] if config.tied_embeddings else [tensor_mapping("lm_head.weight", "head", "VD")]


def _ends(config: ModelConfig) -> list[TensorMapping]:
    return [
        tensor_mapping("model.embed_tokens.weight", "embedding", "VD"),
        tensor_mapping("model.norm.weight", "final_norm.scale", "D"),
        *_head(config),
    ]


def _attention(config: ModelConfig) -> list[TensorMapping]:
    layer, a = "model.layers.{i}.", config.attention
    rules = [
        tensor_mapping(layer + "self_attn.q_proj.weight", "attention.query.kernel", "(NH)D"),
        tensor_mapping(layer + "self_attn.k_proj.weight", "attention.key.kernel", "(KH)D"),
        tensor_mapping(layer + "self_attn.v_proj.weight", "attention.value.kernel", "(KH)D"),
        tensor_mapping(layer + "self_attn.o_proj.weight", "attention.out.kernel", "D(NH)"),
    ]
    if a.qkv_bias:
        rules += [
            tensor_mapping(layer + "self_attn.q_proj.bias", "attention.query.bias", "(NH)"),
            tensor_mapping(layer + "self_attn.k_proj.bias", "attention.key.bias", "(KH)"),
            tensor_mapping(layer + "self_attn.v_proj.bias", "attention.value.bias", "(KH)"),
        ]
    if a.out_bias:
        rules.append(tensor_mapping(layer + "self_attn.o_proj.bias", "attention.out.bias", "D"))
    if a.qk_norm is not QKNorm.none:
        all_heads = a.qk_norm is QKNorm.projection
        rules += [
            tensor_mapping(
                layer + "self_attn.q_norm.weight", "attention.query_norm.scale", "(NH)" if all_heads else "H"
            ),
            tensor_mapping(layer + "self_attn.k_norm.weight", "attention.key_norm.scale", "(KH)" if all_heads else "H"),
        ]
    return rules


def _feed_forward(config: ModelConfig) -> list[TensorMapping]:
    rules = _gated("mlp.", "mlp.")
    if config.mlp.bias:
        layer = "model.layers.{i}."
        rules += [
            tensor_mapping(layer + "mlp.gate_proj.bias", "mlp.gate.bias", "F"),
            tensor_mapping(layer + "mlp.up_proj.bias", "mlp.up.bias", "F"),
            tensor_mapping(layer + "mlp.down_proj.bias", "mlp.down.bias", "D"),
        ]
    return rules


def _gated(
    theirs: str, ours: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> list[TensorMapping]:
    patterns = (("gate", "FD"), ("up", "FD"), ("down", "DF"))
    return [
        tensor_mapping(f"model.layers.{{i}}.{theirs}{name}.weight", f"{ours}{part}.kernel", pattern)
        for name, (part, pattern) in zip(names, patterns, strict=True)
    ]


def _projections(config: ModelConfig) -> list[TensorMapping]:
    return [*_attention(config), *_feed_forward(config)]


def _norms(**names: str) -> list[TensorMapping]:
    return [
        tensor_mapping(f"model.layers.{{i}}.{theirs}.weight", f"{ours}.scale", "D") for ours, theirs in names.items()
    ]


def llama_rules(config: ModelConfig) -> list[TensorMapping]:
    norms = _norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
    return [*_ends(config), *_projections(config), *norms]


def _with_experts(
    config: ModelConfig, attention: list[TensorMapping], experts: list[TensorMapping]
) -> list[TensorMapping]:
    """Mappings of dense and MoE layers with pre-norms."""
    both = [*attention, *_norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")]
    dense = [*both, *_feed_forward(config)] if config.moe.first_num_dense_layers else []
    return [*_ends(config), *both, *experts, *(replace(r, stack="dense_layers") for r in dense)]


def mixtral_rules(config: ModelConfig) -> list[TensorMapping]:
    router = tensor_mapping("model.layers.{i}.block_sparse_moe.gate.weight", "mlp.router.kernel", "RD")
    experts = _gated("block_sparse_moe.experts.{e}.", "mlp.", ("w1", "w3", "w2"))
    return _with_experts(config, _attention(config), [router, *experts])


def _routed() -> list[TensorMapping]:
    router = tensor_mapping("model.layers.{i}.mlp.gate.weight", "mlp.router.kernel", "RD")
    return [router, *_gated("mlp.experts.{e}.", "mlp.")]


def qwen3_moe_rules(config: ModelConfig) -> list[TensorMapping]:
    return _with_experts(config, _attention(config), _routed())


def gpt_oss_rules(config: ModelConfig) -> list[TensorMapping]:
    layer = "model.layers.{i}."
    fused = lambda name, leaf, pattern: tensor_mapping(
        layer + name, f"mlp.gate.{leaf}", pattern, f"mlp.up.{leaf}", pattern, axis=len(pattern) - 1, interleaved=True
    )
    experts = [
        tensor_mapping(layer + "mlp.router.weight", "mlp.router.kernel", "RD"),
        tensor_mapping(layer + "mlp.router.bias", "mlp.router.bias", "R"),
        fused("mlp.experts.gate_up_proj", "kernel", "EDF"),
        fused("mlp.experts.gate_up_proj_bias", "bias", "EF"),
        tensor_mapping(layer + "mlp.experts.down_proj", "mlp.down.kernel", "EFD"),
        tensor_mapping(layer + "mlp.experts.down_proj_bias", "mlp.down.bias", "ED"),
    ]
    sinks = tensor_mapping(layer + "self_attn.sinks", "attention.sinks", "N")
    return _with_experts(config, [*_attention(config), sinks], experts)


def deepseek_rules(config: ModelConfig) -> list[TensorMapping]:
    layer, a = "model.layers.{i}.self_attn.", config.attention
    attention = [
        tensor_mapping(layer + "kv_a_proj_with_mqa.weight", "attention.key_value_down.kernel", "AD"),
        tensor_mapping(layer + "kv_a_layernorm.weight", "attention.key_value_down_norm.scale", "A"),
        tensor_mapping(layer + "kv_b_proj.weight", "attention.key_value.kernel", "(NH)A"),
        tensor_mapping(layer + "o_proj.weight", "attention.out.kernel", "D(NH)"),
    ]
    if a.mla.q_lora_rank:
        attention += [
            tensor_mapping(layer + "q_a_proj.weight", "attention.query_down.kernel", "AD"),
            tensor_mapping(layer + "q_a_layernorm.weight", "attention.query_down_norm.scale", "A"),
            tensor_mapping(layer + "q_b_proj.weight", "attention.query.kernel", "(NH)A"),
        ]
    else:
        attention.append(tensor_mapping(layer + "q_proj.weight", "attention.query.kernel", "(NH)D"))
    if a.out_bias:
        attention.append(tensor_mapping(layer + "o_proj.bias", "attention.out.bias", "D"))
        attention.append(tensor_mapping(layer + "kv_a_proj_with_mqa.bias", "attention.key_value_down.bias", "A"))
        if a.mla.q_lora_rank:
            attention.append(tensor_mapping(layer + "q_a_proj.bias", "attention.query_down.bias", "A"))
    experts = _routed()
    if config.moe.shared_intermediate_dim:
        experts += _gated("mlp.shared_experts.", "mlp.shared.")
    if config.moe.load_balancing is LoadBalancing.bias:
        experts.append(tensor_mapping("model.layers.{i}.mlp.gate.e_score_correction_bias", "mlp.balance_bias", "R"))
    return _with_experts(config, attention, experts)


def olmo2_rules(config: ModelConfig) -> list[TensorMapping]:
    norms = _norms(attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm")
    return [*_ends(config), *_projections(config), *norms]


def gemma_rules(config: ModelConfig) -> list[TensorMapping]:
    norms = _norms(
        attention_norm="input_layernorm",
        attention_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    )
    return [*_ends(config), *_projections(config), *norms]


def phi3_rules(config: ModelConfig) -> list[TensorMapping]:
    layer = "model.layers.{i}."
    apart = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    qkv = ("attention.query.kernel", "(NH)D", "attention.key.kernel", "(KH)D", "attention.value.kernel", "(KH)D")
    return [
        *(r for r in llama_rules(config) if not any(name in r.name for name in apart)),
        tensor_mapping(layer + "self_attn.qkv_proj.weight", *qkv),
        tensor_mapping(layer + "mlp.gate_up_proj.weight", "mlp.gate.kernel", "FD", "mlp.up.kernel", "FD"),
    ]


def gpt2_rules(config: ModelConfig) -> list[TensorMapping]:
    layer = "transformer.h.{i}."
    # Conv1D stores [in, out].
    kernels = ("attention.query.kernel", "D(NH)", "attention.key.kernel", "D(KH)", "attention.value.kernel", "D(KH)")
    biases = ("attention.query.bias", "(NH)", "attention.key.bias", "(KH)", "attention.value.bias", "(KH)")
    return [
        tensor_mapping("transformer.wte.weight", "embedding", "VD"),
        tensor_mapping("transformer.wpe.weight", "position_embedding", "PD"),
        tensor_mapping("transformer.ln_f.weight", "final_norm.scale", "D"),
        tensor_mapping("transformer.ln_f.bias", "final_norm.bias", "D"),
        *_head(config),
        tensor_mapping(layer + "attn.c_attn.weight", *kernels, axis=1),
        tensor_mapping(layer + "attn.c_attn.bias", *biases),
        tensor_mapping(layer + "attn.c_proj.weight", "attention.out.kernel", "(NH)D"),
        tensor_mapping(layer + "attn.c_proj.bias", "attention.out.bias", "D"),
        tensor_mapping(layer + "mlp.c_fc.weight", "mlp.up.kernel", "DF"),
        tensor_mapping(layer + "mlp.c_fc.bias", "mlp.up.bias", "F"),
        tensor_mapping(layer + "mlp.c_proj.weight", "mlp.down.kernel", "FD"),
        tensor_mapping(layer + "mlp.c_proj.bias", "mlp.down.bias", "D"),
        tensor_mapping(layer + "ln_1.weight", "attention_norm.scale", "D"),
        tensor_mapping(layer + "ln_1.bias", "attention_norm.bias", "D"),
        tensor_mapping(layer + "ln_2.weight", "mlp_norm.scale", "D"),
        tensor_mapping(layer + "ln_2.bias", "mlp_norm.bias", "D"),
    ]
