"""Converts the RoPE parameters of config.json to `RopeConfig` and back."""

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, RopeConfig, RopeScaling

HFConfig = Mapping[str, Any]  # the content of config.json


def one_of(hf: HFConfig, *names: str, default: Any = None) -> Any:
    """Returns the first of these keys that is set and not null."""
    return next((hf[name] for name in names if hf.get(name) is not None), default)


def read_rope(hf: HFConfig, *, latent: bool = False) -> RopeConfig:
    """Reads the RoPE parameters. `latent`: DeepSeek attention, which supports mscale and mscale_all_dim.

    Raises: ValueError for an unsupported scaling method or key.
    """
    found = hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta"), **(hf.get("rope_scaling") or {})}
    local = hf.get("rope_local_base_freq")
    if "full_attention" in found:
        local = (found.get("sliding_attention") or {}).get("rope_theta", local)
        found = found["full_attention"]
    kind = one_of(found, "rope_type", "type", default="default")
    kinds = {"default": "none", "su": "longrope"} | {kind.name: kind.name for kind in RopeScaling}
    if kind not in kinds:
        raise ValueError(f"config.json: rope_type={kind}: not supported; known: {', '.join(kinds)}")
    for key in ("attention_factor",) if latent else ("attention_factor", "mscale", "mscale_all_dim"):
        if found.get(key) is not None:
            raise ValueError(f"config.json: {key}={found[key]} in the rope parameters: not supported")
    mscale, mscale_all_dim = found.get("mscale") or 1.0, found.get("mscale_all_dim") or 0.0
    if mscale_all_dim and not found.get("mscale"):
        raise ValueError(f"config.json: mscale_all_dim={mscale_all_dim} without mscale: not supported")
    defaults = RopeConfig()
    fraction = float(one_of(found, "partial_rotary_factor", default=hf.get("partial_rotary_factor") or 1.0))
    if fraction < 1 and hf.get("model_type", "phi3") != "phi3":
        raise ValueError(f"config.json: partial_rotary_factor={fraction}: transformers supports it only in Phi-3")
    limit = hf.get("max_position_embeddings")
    first = one_of(found, "original_max_position_embeddings", default=hf.get("original_max_position_embeddings"))
    first = limit if kind == "dynamic" else first or limit
    stretched = limit / first if kinds[kind] == "longrope" and limit and first else 1.0
    return RopeConfig(
        theta=float(one_of(found, "rope_theta", default=one_of(hf, "rope_theta", default=10_000.0))),
        local_theta=None if local is None else float(local),
        partial_rotary_factor=fraction,
        scaling=RopeScaling[kinds[kind]],
        factor=float(one_of(found, "factor", default=stretched)),
        original_max_seq_len=defaults.original_max_seq_len if kinds[kind] in ("none", "linear") else int(first),
        short_factors=[float(x) for x in found.get("short_factor") or []],
        long_factors=[float(x) for x in found.get("long_factor") or []],
        low_freq_factor=float(one_of(found, "low_freq_factor", default=defaults.low_freq_factor)),
        high_freq_factor=float(one_of(found, "high_freq_factor", default=defaults.high_freq_factor)),
        beta_fast=float(one_of(found, "beta_fast", default=defaults.beta_fast)),
        beta_slow=float(one_of(found, "beta_slow", default=defaults.beta_slow)),
        truncate=bool(found.get("truncate", True)),
        mscale=float(mscale) if mscale_all_dim else 1.0,
        mscale_all_dim=float(mscale_all_dim),
    )


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Writes the keys of transformers 5 and the older ones, which other tools still read."""
    rope, new = config.rope, {}
    new = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling is not RopeScaling.none:
        new |= {"rope_type": rope.scaling.name, "factor": rope.factor}
    if rope.scaling in (RopeScaling.llama3, RopeScaling.yarn, RopeScaling.longrope):
        new["original_max_position_embeddings"] = rope.original_max_seq_len
    if rope.scaling is RopeScaling.longrope:
        new |= {"short_factor": rope.short_factors, "long_factor": rope.long_factors}
    if rope.scaling is RopeScaling.llama3:
        new |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling is RopeScaling.yarn:
        new |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if not rope.truncate:
            new["truncate"] = False
        if rope.mscale_all_dim:
            new |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
    old = {k: v for k, v in new.items() if k != "rope_theta"} if rope.scaling is not RopeScaling.none else None
    if rope.partial_rotary_factor != 1:
        new["partial_rotary_factor"] = rope.partial_rotary_factor
    written: dict[str, Any] = {"rope_parameters": new, "rope_theta": rope.theta, "rope_scaling": old}
    if rope.partial_rotary_factor != 1:
        written["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.scaling is RopeScaling.longrope:  # location read by the Phi-3 class
        written["original_max_position_embeddings"] = rope.original_max_seq_len
    if rope.local_theta is not None:
        local = {"rope_type": "default", "rope_theta": rope.local_theta}
        written["rope_parameters"] = {"full_attention": new, "sliding_attention": local}
        written["rope_local_base_freq"] = rope.local_theta
    return written
