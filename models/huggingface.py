"""Names and shapes of published checkpoints: one table a family, read in both directions.

A rule says which arrays of ours stand in one tensor of theirs, and in which order of dims. The letters are those of
`LETTERS`; dims in brackets are flattened into one: `(NH)D` is a matrix of N x H rows and D columns. Rotary halves are
paired as transformers pairs them, so that nothing is permuted; where a format has the two numbers of a pair side by
side, its pattern says R for H: `(NR)D`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.config import (
    Activation,
    AttentionConfig,
    LayerKind,
    MLPConfig,
    ModelConfig,
    Norm,
    NormPlacement,
    Position,
    QKNorm,
    RopeConfig,
    RopeScaling,
)

HFConfig = Mapping[str, Any]  # the content of config.json

LETTERS = {
    "embed": "D", "heads": "N", "kv_heads": "K", "head_dim": "H", "mlp": "F", "vocab": "V", "length": "P",
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """One tensor of a checkpoint. `{i}` in its name is the number of the layer."""

    name: str
    parts: tuple[tuple[str, str], ...]  # (path of ours, pattern of theirs); several: joined along `axis`
    axis: int = 0


def rule(name: str, *parts: str, axis: int = 0) -> Rule:
    """`rule(name, path, pattern, path, pattern, ...)`."""
    return Rule(name, tuple(zip(parts[::2], parts[1::2], strict=True)), axis)


@dataclass(frozen=True)
class Family:
    """`read` makes our config of theirs; `write` gives the keys of theirs that are not common to all families."""

    architecture: str
    model_type: str
    read: Callable[[HFConfig], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    rules: Callable[[ModelConfig], list[Rule]]


ACTIVATIONS = {
    "silu": Activation.silu,
    "gelu": Activation.gelu,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
    "gelu_new": Activation.gelu_tanh,
    "relu": Activation.relu,
    "relu2": Activation.relu2,
}


# Configs


def _one_of(hf: HFConfig, *names: str, default: Any = None) -> Any:
    return next((hf[name] for name in names if hf.get(name) is not None), default)


def _activation(hf: HFConfig) -> Activation:
    name = _one_of(hf, "hidden_activation", "hidden_act", "activation_function")
    if name not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act={name}: must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _rope(hf: HFConfig) -> RopeConfig:
    found = hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta"), **(hf.get("rope_scaling") or {})}
    local = hf.get("rope_local_base_freq")
    if "full_attention" in found:
        local = (found.get("sliding_attention") or {}).get("rope_theta", local)
        found = found["full_attention"]
    kind = _one_of(found, "rope_type", "type", default="default")
    kinds = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
    if kind not in kinds:
        raise ValueError(f"config.json: rope_type={kind}: not supported; known: {', '.join(kinds)}")
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if found.get(key) is not None:
            raise ValueError(f"config.json: {key}={found[key]} in the rope parameters: not supported")
    defaults = RopeConfig()
    first = _one_of(found, "original_max_position_embeddings", default=hf.get("max_position_embeddings"))
    return RopeConfig(
        theta=float(_one_of(found, "rope_theta", default=_one_of(hf, "rope_theta", default=10_000.0))),
        local_theta=None if local is None else float(local),
        fraction=float(_one_of(found, "partial_rotary_factor", default=hf.get("partial_rotary_factor") or 1.0)),
        scaling=RopeScaling[kinds[kind]],
        factor=float(_one_of(found, "factor", default=1.0)),
        original_max_seq_len=int(first) if kind in ("llama3", "yarn") else defaults.original_max_seq_len,
        low_freq_factor=float(_one_of(found, "low_freq_factor", default=defaults.low_freq_factor)),
        high_freq_factor=float(_one_of(found, "high_freq_factor", default=defaults.high_freq_factor)),
        beta_fast=float(_one_of(found, "beta_fast", default=defaults.beta_fast)),
        beta_slow=float(_one_of(found, "beta_slow", default=defaults.beta_slow)),
    )


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
    kinds = [names[name] for name in types]
    period = next(n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds)))
    return kinds[:period]


def _common(hf: HFConfig, *, tied: bool = False, attention: Mapping[str, Any] | None = None, **changes: Any):
    """What all families but GPT-2 call alike."""
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    pattern = _pattern(hf)
    sliding = LayerKind.sliding in pattern
    fields: dict[str, Any] = dict(
        num_heads=heads,
        num_kv_heads=_one_of(hf, "num_key_value_heads", default=heads),
        head_dim=_one_of(hf, "head_dim", default=width // heads),
        pattern=pattern,
        sliding_window=hf["sliding_window"] if sliding else AttentionConfig().sliding_window,
    )
    return ModelConfig(
        **dict(
            num_layers=hf["num_hidden_layers"],
            embed_dim=width,
            vocab_size=hf["vocab_size"],
            max_seq_len=hf["max_position_embeddings"],
            norm_eps=hf["rms_norm_eps"],
            rope=_rope(hf),
            attention=AttentionConfig(**(fields | dict(attention or {}))),
            mlp=MLPConfig(hf["intermediate_size"], activation=_activation(hf), bias=bool(hf.get("mlp_bias", False))),
            tied_embeddings=bool(hf.get("tie_word_embeddings", tied)),
        )
        | changes
    )


def _without_windows(hf: HFConfig) -> HFConfig:
    """Their class has none, whatever stands in the file."""
    return {**hf, "sliding_window": None, "layer_types": None}


def _llama(hf: HFConfig) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return _common(_without_windows(hf), attention={"qkv_bias": bias, "out_bias": bias})


def _qwen3(hf: HFConfig) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return _common(hf, attention={"qkv_bias": bias, "out_bias": bias, "qk_norm": QKNorm.head})


def _olmo2(hf: HFConfig) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    fields = {"qkv_bias": bias, "out_bias": bias, "qk_norm": QKNorm.projection}
    return _common(_without_windows(hf), attention=fields, norm_placement=NormPlacement.post)


def _gemma(hf: HFConfig, qk_norm: QKNorm) -> ModelConfig:
    scale = float(hf.get("query_pre_attn_scalar") or 256) ** -0.5
    if hf.get("layer_types") is None:  # files of before transformers 4.53 give the period only
        period = hf.get("sliding_window_pattern") or (2 if qk_norm is QKNorm.none else 6)
        kinds = [*["sliding_attention"] * (period - 1), "full_attention"]
        hf = {**hf, "layer_types": [kinds[i % period] for i in range(hf["num_hidden_layers"])]}
    fields = {"qk_norm": qk_norm, "soft_cap": hf.get("attn_logit_softcapping"), "scale": scale}
    return _common(
        hf,
        tied=True,
        attention=fields,
        norm_placement=NormPlacement.sandwich,
        norm_unit_offset=True,
        scale_embeddings=True,
        final_soft_cap=hf.get("final_logit_softcapping"),
    )


def _gpt2(hf: HFConfig) -> ModelConfig:
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


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    """In the words of transformers 5 and in those before it, which other tools still read."""
    rope, new = config.rope, {}
    new = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling is not RopeScaling.none:
        new |= {"rope_type": rope.scaling.name, "factor": rope.factor}
    if rope.scaling in (RopeScaling.llama3, RopeScaling.yarn):
        new["original_max_position_embeddings"] = rope.original_max_seq_len
    if rope.scaling is RopeScaling.llama3:
        new |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling is RopeScaling.yarn:
        new |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    old = {k: v for k, v in new.items() if k != "rope_theta"} if rope.scaling is not RopeScaling.none else None
    if rope.fraction != 1:
        new["partial_rotary_factor"] = rope.fraction
    written: dict[str, Any] = {"rope_parameters": new, "rope_theta": rope.theta, "rope_scaling": old}
    if rope.fraction != 1:
        written["partial_rotary_factor"] = rope.fraction
    if rope.local_theta is not None:
        local = {"rope_type": "default", "rope_theta": rope.local_theta}
        written["rope_parameters"] = {"full_attention": new, "sliding_attention": local}
        written["rope_local_base_freq"] = rope.local_theta
    return written


def _write_common(config: ModelConfig) -> dict[str, Any]:
    a = config.attention
    act = next(name for name, kind in ACTIVATIONS.items() if kind is config.mlp.activation)
    kinds = [a.pattern[i % len(a.pattern)] for i in range(config.num_layers)]
    sliding = LayerKind.sliding in kinds
    return {
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp.hidden_dim,
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
        **_write_rope(config),
    }


def _layer_types(config: ModelConfig) -> dict[str, Any]:
    pattern = config.attention.pattern
    kinds = [pattern[i % len(pattern)] for i in range(config.num_layers)]
    return {"layer_types": [f"{kind.name}_attention" for kind in kinds]}


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    sliding = LayerKind.sliding in config.attention.pattern
    return _write_common(config) | _layer_types(config) | {"use_sliding_window": sliding}


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    scale = config.attention.scale or config.attention.head_dim**-0.5
    common = _write_common(config)
    return {
        **common,
        **_layer_types(config),
        "hidden_activation": common["hidden_act"],
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": config.attention.soft_cap,
        "final_logit_softcapping": config.final_soft_cap,
    }


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": config.num_layers,
        "n_embd": config.embed_dim,
        "n_head": config.attention.num_heads,
        "n_inner": config.mlp.hidden_dim,
        "n_positions": config.max_seq_len,
        "n_ctx": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new" if config.mlp.activation is Activation.gelu_tanh else "gelu",
        "tie_word_embeddings": config.tied_embeddings,
    }


# Tensors


def _ends(config: ModelConfig) -> list[Rule]:
    head = [] if config.tied_embeddings else [rule("lm_head.weight", "head", "VD")]
    return [
        rule("model.embed_tokens.weight", "embedding", "VD"),
        rule("model.norm.weight", "final_norm.scale", "D"),
        *head,
    ]


def _projections(config: ModelConfig) -> list[Rule]:
    layer, a = "model.layers.{i}.", config.attention
    rules = [
        rule(layer + "self_attn.q_proj.weight", "attention.query.kernel", "(NH)D"),
        rule(layer + "self_attn.k_proj.weight", "attention.key.kernel", "(KH)D"),
        rule(layer + "self_attn.v_proj.weight", "attention.value.kernel", "(KH)D"),
        rule(layer + "self_attn.o_proj.weight", "attention.out.kernel", "D(NH)"),
        rule(layer + "mlp.gate_proj.weight", "mlp.gate.kernel", "FD"),
        rule(layer + "mlp.up_proj.weight", "mlp.up.kernel", "FD"),
        rule(layer + "mlp.down_proj.weight", "mlp.down.kernel", "DF"),
    ]
    if a.qkv_bias:
        rules += [
            rule(layer + "self_attn.q_proj.bias", "attention.query.bias", "(NH)"),
            rule(layer + "self_attn.k_proj.bias", "attention.key.bias", "(KH)"),
            rule(layer + "self_attn.v_proj.bias", "attention.value.bias", "(KH)"),
        ]
    if a.out_bias:
        rules.append(rule(layer + "self_attn.o_proj.bias", "attention.out.bias", "D"))
    if config.mlp.bias:
        rules += [
            rule(layer + "mlp.gate_proj.bias", "mlp.gate.bias", "F"),
            rule(layer + "mlp.up_proj.bias", "mlp.up.bias", "F"),
            rule(layer + "mlp.down_proj.bias", "mlp.down.bias", "D"),
        ]
    if a.qk_norm is not QKNorm.none:
        whole = a.qk_norm is QKNorm.projection
        rules += [
            rule(layer + "self_attn.q_norm.weight", "attention.query_norm.scale", "(NH)" if whole else "H"),
            rule(layer + "self_attn.k_norm.weight", "attention.key_norm.scale", "(KH)" if whole else "H"),
        ]
    return rules


def _norms(**names: str) -> list[Rule]:
    return [rule(f"model.layers.{{i}}.{theirs}.weight", f"{ours}.scale", "D") for ours, theirs in names.items()]


def _llama_rules(config: ModelConfig) -> list[Rule]:
    norms = _norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
    return [*_ends(config), *_projections(config), *norms]


def _olmo2_rules(config: ModelConfig) -> list[Rule]:
    norms = _norms(attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm")
    return [*_ends(config), *_projections(config), *norms]


def _gemma_rules(config: ModelConfig) -> list[Rule]:
    norms = _norms(
        attention_norm="input_layernorm",
        attention_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    )
    return [*_ends(config), *_projections(config), *norms]


def _phi3_rules(config: ModelConfig) -> list[Rule]:
    layer = "model.layers.{i}."
    apart = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    qkv = ("attention.query.kernel", "(NH)D", "attention.key.kernel", "(KH)D", "attention.value.kernel", "(KH)D")
    return [
        *(r for r in _llama_rules(config) if not any(name in r.name for name in apart)),
        rule(layer + "self_attn.qkv_proj.weight", *qkv),
        rule(layer + "mlp.gate_up_proj.weight", "mlp.gate.kernel", "FD", "mlp.up.kernel", "FD"),
    ]


def _gpt2_rules(config: ModelConfig) -> list[Rule]:
    layer = "transformer.h.{i}."
    # Their Conv1D holds [in, out].
    kernels = ("attention.query.kernel", "D(NH)", "attention.key.kernel", "D(KH)", "attention.value.kernel", "D(KH)")
    biases = ("attention.query.bias", "(NH)", "attention.key.bias", "(KH)", "attention.value.bias", "(KH)")
    head = [] if config.tied_embeddings else [rule("lm_head.weight", "head", "VD")]
    return [
        rule("transformer.wte.weight", "embedding", "VD"),
        rule("transformer.wpe.weight", "position_embedding", "PD"),
        rule("transformer.ln_f.weight", "final_norm.scale", "D"),
        rule("transformer.ln_f.bias", "final_norm.bias", "D"),
        *head,
        rule(layer + "attn.c_attn.weight", *kernels, axis=1),
        rule(layer + "attn.c_attn.bias", *biases),
        rule(layer + "attn.c_proj.weight", "attention.out.kernel", "(NH)D"),
        rule(layer + "attn.c_proj.bias", "attention.out.bias", "D"),
        rule(layer + "mlp.c_fc.weight", "mlp.up.kernel", "DF"),
        rule(layer + "mlp.c_fc.bias", "mlp.up.bias", "F"),
        rule(layer + "mlp.c_proj.weight", "mlp.down.kernel", "FD"),
        rule(layer + "mlp.c_proj.bias", "mlp.down.bias", "D"),
        rule(layer + "ln_1.weight", "attention_norm.scale", "D"),
        rule(layer + "ln_1.bias", "attention_norm.bias", "D"),
        rule(layer + "ln_2.weight", "mlp_norm.scale", "D"),
        rule(layer + "ln_2.bias", "mlp_norm.bias", "D"),
    ]


_write_llama = lambda c: _write_common(c) | {"mlp_bias": c.mlp.bias}
_qwen2 = lambda hf: _common(hf, attention={"qkv_bias": True})
_gemma2 = lambda hf: _gemma(hf, QKNorm.none)
_gemma3 = lambda hf: _gemma(hf, QKNorm.head)

# In the order in which an export looks for one that can say what the model is.
FAMILIES = (
    Family("LlamaForCausalLM", "llama", _llama, _write_llama, _llama_rules),
    Family("MistralForCausalLM", "mistral", _common, _write_common, _llama_rules),
    Family("Qwen2ForCausalLM", "qwen2", _qwen2, _write_qwen2, _llama_rules),
    Family("Qwen3ForCausalLM", "qwen3", _qwen3, _write_qwen2, _llama_rules),
    Family("Gemma2ForCausalLM", "gemma2", _gemma2, _write_gemma, _gemma_rules),
    Family("Gemma3ForCausalLM", "gemma3_text", _gemma3, _write_gemma, _gemma_rules),
    Family("Olmo2ForCausalLM", "olmo2", _olmo2, _write_common, _olmo2_rules),
    Family("Phi3ForCausalLM", "phi3", _common, _write_common, _phi3_rules),
    Family("GPT2LMHeadModel", "gpt2", _gpt2, _write_gpt2, _gpt2_rules),
)


def family_of(hf: HFConfig) -> Family:
    """Raises: ValueError where no family reads this config.json."""
    for family in FAMILIES:
        if family.model_type == hf.get("model_type"):
            return family
    known = ", ".join(f.model_type for f in FAMILIES)
    raise ValueError(f"config.json: model_type={hf.get('model_type')}: not supported; known: {known}")


def family_for(config: ModelConfig) -> Family:
    """The first family that can say what `config` is: whose config.json, read back, gives it again.

    Raises: ValueError where there is none.
    """
    for family in FAMILIES:
        try:
            if shape_of(family.read(write_config(family, config))) == shape_of(config):
                return family
        except (KeyError, ValueError, StopIteration):
            continue
    known = ", ".join(f.architecture for f in FAMILIES)
    raise ValueError(f"this model is none that transformers knows by one of these classes: {known}")


def write_config(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The content of config.json."""
    return {"architectures": [family.architecture], "model_type": family.model_type, **family.write(config)}


def shape_of(config: ModelConfig) -> ModelConfig:
    """What defines the function that a model computes: without dtypes, dropout, initialisation and remat."""
    plain = ModelConfig()
    how = ("dtype", "param_dtype", "remat", "dropout", "init_std", "init_scaled_residual")
    a = dataclasses.replace(config.attention, dropout=0.0)
    pattern = [a.pattern[i % len(a.pattern)] for i in range(config.num_layers)]
    window = a.sliding_window if LayerKind.sliding in pattern else 0
    a = dataclasses.replace(a, pattern=pattern, sliding_window=window, scale=a.scale or a.head_dim**-0.5)
    rope = config.rope if config.position is Position.rope else RopeConfig()
    if rope.scaling not in (RopeScaling.llama3, RopeScaling.yarn):
        rope = dataclasses.replace(rope, original_max_seq_len=0)
    return dataclasses.replace(config, attention=a, rope=rope, **{name: getattr(plain, name) for name in how})
