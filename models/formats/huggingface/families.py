"""Registry of published model families: config.json and weight mappings in both directions."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.config import (
    COMPUTE_KEYS,
    NON_CAUSAL_MASKS,
    LayerKind,
    LoadBalancing,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    Position,
    QKNorm,
    RopeConfig,
    RopeScaling,
)
from models.formats.huggingface import config_map as configs
from models.formats.huggingface import weight_map as rules
from models.formats.huggingface.config_map import HFConfig
from models.formats.huggingface.dequantize import refusal
from models.formats.huggingface.weight_map import TensorMapping

CLASSIFIER = "ForSequenceClassification"


@dataclass(frozen=True)
class Family:
    """A model family. `read` converts config.json to `ModelConfig`; `write` returns its architecture keys."""

    architecture: str
    model_type: str
    read: Callable[[HFConfig], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    rules: Callable[[ModelConfig], list[TensorMapping]]

    @property
    def classifier(self) -> str:
        """Name of its sequence classification class."""
        stem = self.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        return ("Gemma3Text" if stem == "Gemma3" else stem) + CLASSIFIER


_write_llama = lambda c: configs.write_common(c) | {"mlp_bias": c.mlp.bias}
_qwen2 = lambda hf: configs.read_common(hf, attention={"qkv_bias": True})
_gemma2 = lambda hf: configs.read_gemma(hf, QKNorm.none)
_gemma3 = lambda hf: configs.read_gemma(hf, QKNorm.head)

# In the order in which an export looks for a family that can represent the model.
FAMILIES = (
    Family("LlamaForCausalLM", "llama", configs.read_llama, _write_llama, rules.llama_rules),
    Family("MistralForCausalLM", "mistral", configs.read_common, configs.write_common, rules.llama_rules),
    Family("Qwen2ForCausalLM", "qwen2", _qwen2, configs.write_qwen2, rules.llama_rules),
    Family("Qwen3ForCausalLM", "qwen3", configs.read_qwen3, configs.write_qwen2, rules.llama_rules),
    Family("Gemma2ForCausalLM", "gemma2", _gemma2, configs.write_gemma, rules.gemma_rules),
    Family("Gemma3ForCausalLM", "gemma3_text", _gemma3, configs.write_gemma, rules.gemma_rules),
    Family("Olmo2ForCausalLM", "olmo2", configs.read_olmo2, configs.write_common, rules.olmo2_rules),
    Family("Phi3ForCausalLM", "phi3", configs.read_common, configs.write_phi3, rules.phi3_rules),
    Family("SmolLM3ForCausalLM", "smollm3", configs.read_smollm3, configs.write_smollm3, rules.llama_rules),
    Family("MixtralForCausalLM", "mixtral", configs.read_mixtral, configs.write_mixtral, rules.mixtral_rules),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", configs.read_qwen3_moe, configs.write_qwen3_moe, rules.qwen3_moe_rules),
    Family("OlmoeForCausalLM", "olmoe", configs.read_olmoe, configs.write_olmoe, rules.qwen3_moe_rules),
    Family("GptOssForCausalLM", "gpt_oss", configs.read_gpt_oss, configs.write_gpt_oss, rules.gpt_oss_rules),
    Family("DeepseekV2ForCausalLM", "deepseek_v2", configs.read_deepseek, configs.write_deepseek, rules.deepseek_rules),
    Family("DeepseekV3ForCausalLM", "deepseek_v3", configs.read_deepseek, configs.write_deepseek, rules.deepseek_rules),
    Family("GPT2LMHeadModel", "gpt2", configs.read_gpt2, configs.write_gpt2, rules.gpt2_rules),
)


def family_of(hf: HFConfig) -> Family:
    """Returns the family of a config.json. Raises: ValueError if it is not supported."""
    if why := refusal(hf.get("quantization_config")):
        raise ValueError(why)
    for family in FAMILIES:
        if family.model_type == hf.get("model_type"):
            return family
    known = ", ".join(f.model_type for f in FAMILIES)
    raise ValueError(f"config.json: model_type={hf.get('model_type')}: not supported; known: {known}")


def family_for(config: ModelConfig) -> Family:
    """Returns the first family whose config.json, read back, represents `config` exactly.

    Raises: ValueError if there is none.
    """
    config.refuse_masks(
        *NON_CAUSAL_MASKS, why="transformers runs these classes as causal models, so this model cannot be exported"
    )
    for family in FAMILIES:
        try:
            if architecture_name(read_model(write_config(family, config))) == architecture_name(config):
                return family
        except (KeyError, ValueError, StopIteration):
            continue
    known = ", ".join(f.architecture for f in FAMILIES)
    raise ValueError(f"no supported transformers class represents this model; supported: {known}")


def read_model(hf: HFConfig) -> ModelConfig:
    """Converts config.json to `ModelConfig`. Raises: ValueError for unsupported values."""
    model = family_of(hf).read(hf)
    if not (hf.get("architectures") or [""])[0].endswith(CLASSIFIER):
        return model
    # Two labels are the default and are not stored
    return dataclasses.replace(model, num_labels=len(hf.get("id2label") or "ab"))


def write_config(family: Family, config: ModelConfig) -> dict[str, Any]:
    """Returns the content of config.json."""
    hf = {"architectures": [family.architecture], "model_type": family.model_type, **family.write(config)}
    if not config.num_labels:
        return hf
    names = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
    return hf | {
        "architectures": [family.classifier],
        "id2label": names,
        "label2id": {name: int(i) for i, name in names.items()},
    }


def architecture_name(config: ModelConfig) -> ModelConfig:
    """Normalizes a config to the fields that define the function of the model, for comparison.

    Resets dtypes, dropout, initialization, remat, and the training and dispatch of experts.
    """
    plain = ModelConfig()
    ignored = ["dtype", "param_dtype", "dropout", "init_std", "init_scaled_residual", "mup_base_width"]
    ignored += [key for key in COMPUTE_KEYS if "." not in key]
    of_attention = [key.removeprefix("attention.") for key in COMPUTE_KEYS if key.startswith("attention.")]
    a = dataclasses.replace(
        config.attention, dropout=0.0, **{key: getattr(plain.attention, key) for key in of_attention}
    )
    pattern = [a.layer_types[i % len(a.layer_types)] for i in range(config.num_layers)]
    window = a.sliding_window if LayerKind.sliding in pattern else 0
    a = dataclasses.replace(
        a,
        layer_types=pattern,
        sliding_window=window,
        scale=a.scale or a.head_dim**-0.5,
        v_head_dim=a.v_head_dim or a.head_dim,
        mla=a.mla if a.mla.kv_lora_rank else MLAConfig(),
    )
    rope = config.rope if config.position is Position.rope else RopeConfig()
    rope = dataclasses.replace(
        rope, layer_pattern=[rope.layer_pattern[i % len(rope.layer_pattern)] for i in range(config.num_layers)]
    )
    if rope.scaling in (RopeScaling.none, RopeScaling.linear):
        rope = dataclasses.replace(rope, original_max_seq_len=0)
    if rope.scaling is not RopeScaling.yarn:
        rope = dataclasses.replace(rope, truncate=True, mscale=1.0, mscale_all_dim=0.0)
    experts, mlp = config.moe, config.mlp
    if not experts.num_experts:
        experts = MoEConfig()
    elif not experts.first_num_dense_layers:
        mlp = dataclasses.replace(mlp, intermediate_dim=0)
    trained = MoEConfig(
        load_balancing=LoadBalancing.bias if experts.load_balancing is LoadBalancing.bias else LoadBalancing.none
    )
    for name in ("load_balancing", "aux_loss_weight", "router_z_loss_weight", "dispatch", "capacity_factor"):
        experts = dataclasses.replace(experts, **{name: getattr(trained, name)})
    if experts.num_groups == 1:
        experts = dataclasses.replace(experts, topk_groups=1, group_score_topk=2)
    parts = {"attention": a, "rope": rope, "mlp": mlp, "moe": experts}
    return dataclasses.replace(config, **parts, **{name: getattr(plain, name) for name in ignored})
