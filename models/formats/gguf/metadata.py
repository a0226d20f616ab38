"""Registry of llama.cpp architectures: GGUF headers and tensor names in both directions.

An architecture refers to a family of `models/formats/huggingface/families.py`. It maps keys of the GGUF header to keys
of config.json, and lists the values that llama.cpp assumes and its tensor names. Format: docs/gguf.md of ggml.
"""

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from models.config import NON_CAUSAL_MASKS, ModelConfig, Position, RopeConfig, RopeScaling
from models.formats.huggingface.families import (
    FAMILIES,
    Family,
    HFConfig,
    TensorMapping,
    architecture_name,
    write_config,
)
from models.layers import inverse_frequencies, rope_temperature

# RoPE scaling factors: [H / 2] f32 divisors of the frequencies; constants, not weights.
LLAMA3_FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"  # LongRoPE
ROPE_TENSORS = (LLAMA3_FACTORS, SHORT_FACTORS, LONG_FACTORS)


class Header(NamedTuple):
    """Header of a GGUF file."""

    metadata: Mapping[str, Any]
    names: frozenset[str]  # tensor names
    rope_factors: Mapping[str, np.ndarray]  # `ROPE_TENSORS` in the file


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp. Keys and values of config.json are those of transformers."""

    name: str  # general.architecture
    model_type: str  # family in transformers
    keys: Mapping[str, str]  # header key without `NAME.`: key of config.json
    tensors: Mapping[str, str]  # tensor stem in transformers: tensor stem in the file
    fixed: Mapping[str, Any] = field(default_factory=dict)  # values of config.json that llama.cpp assumes
    biases: Mapping[str, str] = field(default_factory=dict)  # key of config.json: tensor present if it is true
    interleaved: bool = False  # interleaved rotary pairs in queries and keys
    transposed: bool = False  # kernels are [in, out] in transformers
    norm_offset: int = 0  # added to norm scales in the file
    rope_factors: tuple[str, ...] = ()  # `ROPE_TENSORS` that llama.cpp reads
    local_theta: float | None = None  # RoPE base of sliding layers if not in the header
    windows: bool = True  # llama.cpp applies sliding windows
    large: int | None = None  # number of layers of the size whose scores are scaled by width / heads, not head_dim

    @property
    def family(self) -> Family:
        return next(family for family in FAMILIES if family.model_type == self.model_type)

    @property
    def has_experts(self) -> bool:
        return "expert_count" in self.keys

    def rules(self, config: ModelConfig) -> list[TensorMapping]:
        return [self._rule(rule) for rule in self.family.rules(config)]

    def _rule(self, rule: TensorMapping) -> TensorMapping:
        stem, _, suffix = rule.name.rpartition(".")
        _, layered, part = stem.partition("{i}.")
        name = f"blk.{{i}}.{self.tensors[part]}" if layered else self.tensors[stem]
        parts, axis = rule.parts, rule.axis
        if "{e}" in part:  # one matrix per expert in transformers, stacked in the file
            parts = tuple((path, f"E{pattern}") for path, pattern in parts)
        if self.interleaved:
            rotated = ("attention.query.", "attention.key.")
            parts = tuple((path, p.replace("H", "h") if path.startswith(rotated) else p) for path, p in parts)
        if self.transposed and parts[0][0].endswith("kernel"):
            parts, axis = tuple((path, _reversed(pattern)) for path, pattern in parts), 1 - axis
        return TensorMapping(f"{name}.{suffix}", parts, axis)

    def offset(self, name: str) -> int:
        """Returns the offset of a stored tensor relative to the parameter."""
        return self.norm_offset if name.endswith("norm.weight") else 0


def _reversed(pattern: str) -> str:
    """Reverses a pattern: `D(NH)` to `(NH)D`."""
    return pattern[1:] + pattern[0] if pattern[1:2] == "(" else pattern[-1] + pattern[:-1]


KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
HEAD_KEYS = KEYS | {"attention.key_length": "head_dim"}  # without it llama.cpp uses width / heads
GEMMA_KEYS = HEAD_KEYS | {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# For architectures in which llama.cpp assumes num_kv_heads = num_heads.
ALIKE_KEYS = {key: hf_key for key, hf_key in KEYS.items() if key != "attention.head_count_kv"}
EXPERT_KEYS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
GPT2_KEYS = {
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "context_length": "n_positions",
    "vocab_size": "vocab_size",
}
TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.{e}.gate_proj": "ffn_gate_exps",
    "mlp.experts.{e}.up_proj": "ffn_up_exps",
    "mlp.experts.{e}.down_proj": "ffn_down_exps",
}
MIXTRAL_EXPERTS = {
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.{e}.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.{e}.w3": "ffn_up_exps",
    "block_sparse_moe.experts.{e}.w2": "ffn_down_exps",
}
AFTER = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GPT2_TENSORS = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
}
SILU, GELU = {"hidden_act": "silu"}, {"hidden_activation": "gelu_pytorch_tanh"}
LLAMA_BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"}

# In the order in which an export looks for an architecture that can represent the model.
ARCHITECTURES = (
    Architecture(
        "llama", "llama", HEAD_KEYS, TENSORS, SILU, LLAMA_BIASES, interleaved=True, rope_factors=(LLAMA3_FACTORS,)
    ),
    Architecture(
        "llama",
        "mixtral",
        HEAD_KEYS | EXPERT_KEYS | {"expert_count": "num_local_experts"},
        TENSORS | MIXTRAL_EXPERTS,
        SILU,
        interleaved=True,
        rope_factors=(LLAMA3_FACTORS,),
    ),
    Architecture("qwen2", "qwen2", KEYS, TENSORS, SILU, windows=False),
    Architecture("qwen3", "qwen3", HEAD_KEYS, TENSORS, SILU),
    Architecture(
        "qwen3moe",
        "qwen3_moe",
        HEAD_KEYS | EXPERT_KEYS | {"expert_feed_forward_length": "moe_intermediate_size"},
        TENSORS | EXPERTS,
        SILU | {"norm_topk_prob": True},
    ),
    Architecture("olmoe", "olmoe", ALIKE_KEYS | EXPERT_KEYS, TENSORS | EXPERTS, SILU | {"norm_topk_prob": False}),
    Architecture("gemma2", "gemma2", GEMMA_KEYS, TENSORS | AFTER, GELU, norm_offset=1, large=46),
    Architecture(
        "gemma3", "gemma3_text", GEMMA_KEYS, TENSORS | AFTER, GELU, norm_offset=1, large=62, local_theta=10_000.0
    ),
    Architecture("olmo2", "olmo2", KEYS, TENSORS | AFTER, SILU),
    Architecture(
        "phi3",
        "phi3",
        KEYS | {"attention.sliding_window": "sliding_window"},
        TENSORS | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
        SILU,
        windows=False,
        rope_factors=(SHORT_FACTORS, LONG_FACTORS),
    ),
    Architecture("gpt2", "gpt2", GPT2_KEYS, GPT2_TENSORS, {"activation_function": "gelu_new"}, transposed=True),
)


def architecture_of(metadata: Mapping[str, Any]) -> Architecture:
    """Returns the architecture of a file. Raises: ValueError if it is not supported."""
    name = metadata.get("general.architecture")
    experts = bool(metadata.get(f"{name}.expert_count"))
    for row in ARCHITECTURES:
        if row.name == name and row.has_experts == experts:
            return row
    which = f"{name} with experts" if experts else name
    raise ValueError(f"general.architecture={which}: not supported; known: {known()}")


def known() -> str:
    """Returns the names of all supported architectures."""
    return ", ".join(dict.fromkeys(row.name for row in ARCHITECTURES))


# From a header to a config


def shortest_decimal(value: Any) -> Any:
    """Returns the shortest decimal that rounds to the same f32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def read_config(header: Header) -> ModelConfig:
    """Converts a header to a config. Raises: ValueError naming a missing or unsupported key."""
    row = architecture_of(header.metadata)
    found = {
        key.removeprefix(f"{row.name}."): shortest_decimal(value)
        for key, value in header.metadata.items()
        if key.startswith(f"{row.name}.")
    }
    hf: dict[str, Any] = {"model_type": row.model_type, **row.fixed}
    hf |= {hf_key: found[key] for key, hf_key in row.keys.items() if key in found}
    hf |= {key: tensor in header.names for key, tensor in row.biases.items()}
    hf["tie_word_embeddings"] = "output.weight" not in header.names
    needed = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length")
    for key in (*needed, *(key for key in row.keys if key.endswith("_epsilon"))):
        if key not in found:
            raise ValueError(f"{row.name}.{key}: missing in the header; the model cannot be built without it")
    for key, value in found.items():
        if isinstance(value, list) and key in row.keys:
            if len(set(value)) != 1:
                raise ValueError(f"{row.name}.{key}={value}: differs between layers, which is not supported")
            hf[row.keys[key]] = value[0]
    if found.get("attention.value_length", (key_length := found.get("attention.key_length"))) != key_length:
        raise ValueError(
            f"{row.name}.attention.value_length={found['attention.value_length']}: must equal attention.key_length"
        )
    if "n_layer" not in hf:
        hf |= _read_positions(row, header, found, hf)
    if row.large is not None:
        large = hf["num_hidden_layers"] == row.large
        hf["query_pre_attn_scalar"] = hf["hidden_size"] // hf["num_attention_heads"] if large else hf["head_dim"]
        if "attention.sliding_window_pattern" in found:
            hf["sliding_window_pattern"] = found["attention.sliding_window_pattern"]
    return row.family.read(hf)


# Neutral values of YaRN parameters, some of which llama.cpp omits for these architectures.
FINER = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
}


def _read_positions(row: Architecture, header: Header, found: Mapping[str, Any], hf: HFConfig) -> dict[str, Any]:
    """Converts the RoPE keys of a header to those of config.json."""
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    kind = found.get("rope.scaling.type", "none")
    neutral = {
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.yarn_attn_factor": 1.0,
        "rope.scaling.yarn_ext_factor": 1.0,
    }
    longrope = LONG_FACTORS in header.rope_factors
    for key, value in neutral.items():
        if not longrope and found.get(key, value) != value:
            raise ValueError(f"{row.name}.{key}={found[key]}: not supported")
    if longrope:
        kind = "none" if kind == "longrope" else kind  # llama.cpp reads the tensors instead
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{row.name}.rope.scaling.type={kind}: not supported; known: none, linear, yarn")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": found.get("rope.freq_base", 10_000.0)}
    if kind != "none":
        rope |= {"rope_type": kind, "factor": found.get("rope.scaling.factor", 1.0)}
    elif "rope.scale_linear" in found:  # older name
        rope |= {"rope_type": "linear", "factor": found["rope.scale_linear"]}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = found.get("rope.scaling.original_context_length")
    rope["partial_rotary_factor"] = found.get("rope.dimension_count", head_dim) / head_dim
    if row.interleaved and rope["partial_rotary_factor"] != 1:
        raise ValueError(f"{row.name}.rope.dimension_count={found['rope.dimension_count']}: must be {head_dim}")
    for name in header.rope_factors:
        if name not in row.rope_factors:
            raise ValueError(f"{name}: not supported in {row.name}")
    if LLAMA3_FACTORS in header.rope_factors:
        rope |= _read_factors(row, found, header.rope_factors[LLAMA3_FACTORS], rope["rope_theta"])
    if longrope:
        rope |= _read_longrope(row, header, found)
    local = found.get("rope.freq_base_swa", row.local_theta)
    return {"head_dim": head_dim, "rope_parameters": rope, "rope_local_base_freq": local}


def _factors(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Returns the frequency divisors of llama3 scaling, [H / 2] f32."""
    with_scale, without = (inverse_frequencies(rope, head_dim, theta=rope.theta, scaled=s) for s in (True, False))
    return (without / with_scale).astype(np.float32)


def _read_factors(row: Architecture, found: Mapping[str, Any], factors: np.ndarray, theta: float) -> dict[str, Any]:
    """Returns the parameters of llama3 scaling, from the header or those of Llama 3.1; a file has only the factors.

    Raises: ValueError if the parameters do not reproduce the factors.
    """
    rope = RopeConfig(
        theta,
        scaling=RopeScaling.llama3,
        factor=float(found.get("rope.scaling.llama3_factor", shortest_decimal(float(factors.max())))),
        original_max_seq_len=int(found.get("rope.scaling.original_context_length", 8192)),
        low_freq_factor=float(found.get("rope.scaling.low_freq_factor", 1.0)),
        high_freq_factor=float(found.get("rope.scaling.high_freq_factor", 4.0)),
    )
    if not np.allclose(_factors(rope, 2 * factors.size), factors, rtol=1e-4):
        raise ValueError(
            f"{LLAMA3_FACTORS}: does not match Llama 3.1 scaling (factor {rope.factor}, original context length "
            f"{rope.original_max_seq_len}); other scalings need their parameters in {row.name}.rope.scaling.*"
        )
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_seq_len,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
    }


def _read_longrope(row: Architecture, header: Header, found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of LongRoPE; a file has the attention temperature instead of the factor.

    Raises: ValueError if one is missing.
    """
    first, limit = found.get("rope.scaling.original_context_length"), found["context_length"]
    if SHORT_FACTORS not in header.rope_factors or first is None:
        missing = f"{row.name}.rope.scaling.original_context_length" if first is None else SHORT_FACTORS
        raise ValueError(f"{missing}: missing, but required with {LONG_FACTORS}")
    factor, temperature = limit / first, found.get("rope.scaling.attn_factor", 1.0)
    of = lambda factor: rope_temperature(
        RopeConfig(scaling=RopeScaling.longrope, factor=factor, original_max_seq_len=first)
    )
    if not np.isclose(of(factor), temperature, rtol=1e-6):
        factor = shortest_decimal(float(np.exp((temperature**2 - 1) * np.log(first))))
    numbers = {name: [shortest_decimal(float(x)) for x in data] for name, data in header.rope_factors.items()}
    return {
        "rope_type": "longrope",
        "factor": factor,
        "original_max_position_embeddings": first,
        "short_factor": numbers[SHORT_FACTORS],
        "long_factor": numbers[LONG_FACTORS],
    }


# From a config to a header


def write_header(row: Architecture, config: ModelConfig) -> Header:
    """Converts a config to a header of this architecture; `lossy_keys` lists what the header cannot represent.

    Raises: KeyError, StopIteration if the family cannot represent the config at all.
    """
    hf = write_config(row.family, config)
    found = {key: hf[hf_key] for key, hf_key in row.keys.items() if hf.get(hf_key) is not None}
    factors: dict[str, np.ndarray] = {}
    if config.position is Position.rope:
        rope, head_dim = config.rope, config.attention.head_dim
        if "attention.key_length" in row.keys:
            found["attention.value_length"] = head_dim
        found["rope.dimension_count"] = int(head_dim * rope.partial_rotary_factor)
        found["rope.freq_base"] = rope.theta
        if rope.local_theta is not None:
            found["rope.freq_base_swa"] = rope.local_theta
        if rope.scaling in (RopeScaling.linear, RopeScaling.yarn):
            found |= {"rope.scaling.type": rope.scaling.name, "rope.scaling.factor": rope.factor}
        if rope.scaling in (RopeScaling.llama3, RopeScaling.yarn, RopeScaling.longrope):
            found["rope.scaling.original_context_length"] = rope.original_max_seq_len
        if rope.scaling is RopeScaling.llama3:
            factors[LLAMA3_FACTORS] = _factors(rope, head_dim)
            # llama.cpp reads only the factors; these three keys make the parameters readable again.
            found["rope.scaling.llama3_factor"] = rope.factor
            found["rope.scaling.low_freq_factor"] = rope.low_freq_factor
            found["rope.scaling.high_freq_factor"] = rope.high_freq_factor
        if rope.scaling is RopeScaling.longrope:
            found["rope.scaling.attn_factor"] = rope_temperature(rope)
            factors[SHORT_FACTORS] = np.asarray(rope.short_factors, np.float32)
            factors[LONG_FACTORS] = np.asarray(rope.long_factors, np.float32)
    names = frozenset(rule.name.format(i=0) for rule in row.rules(config))
    return Header(
        {"general.architecture": row.name, **{f"{row.name}.{k}": v for k, v in found.items()}}, names, factors
    )


def _leaves(value: Any, path: str = "model") -> dict[str, Any]:
    """Returns all values of a config by path, with floats rounded as in a header."""
    if dataclasses.is_dataclass(value):
        parts = [_leaves(getattr(value, f.name), f"{path}.{f.name}") for f in dataclasses.fields(value)]
        return {key: leaf for part in parts for key, leaf in part.items()}
    if isinstance(value, enum.Enum):
        return {path: value.name}
    if isinstance(value, list):
        return {path: [getattr(item, "name", item) for item in value]}
    return {path: shortest_decimal(value)}


def lossy_keys(row: Architecture, config: ModelConfig) -> list[str]:
    """Lists the values of `config` that llama.cpp would interpret differently in this architecture."""
    try:
        read = read_config(write_header(row, config))
    except ValueError as error:
        return [str(error)]
    want, got = _leaves(architecture_name(config)), _leaves(architecture_name(read))
    wrong = [f"{key}={want[key]} would become {got[key]}" for key in want if want[key] != got[key]]
    if not row.windows and "sliding" in want["model.attention.layer_types"]:
        wrong.append("model.attention.layer_types contains sliding, which llama.cpp ignores for this architecture")
    return wrong


def architecture_for(config: ModelConfig) -> Architecture:
    """Returns the first architecture that represents `config` exactly.

    Raises: ValueError if there is none, with the differences of the closest one.
    """
    config.refuse_masks(*NON_CAUSAL_MASKS, why="llama.cpp runs this model as a causal model, so it cannot be exported")
    closest: tuple[Architecture, list[str]] | None = None
    for row in ARCHITECTURES:
        if row.has_experts != bool(config.moe.num_experts):
            continue
        try:
            wrong = lossy_keys(row, config)
        except (KeyError, StopIteration):
            continue
        if not wrong:
            return row
        if closest is None or len(wrong) < len(closest[1]):
            closest = row, wrong
    why = "" if closest is None else f"; closest is {closest[0].name}, but {'; '.join(closest[1][:3])}"
    raise ValueError(f"llama.cpp has no architecture for this model (supported: {known()}){why}; try to=hf:FOLDER")
