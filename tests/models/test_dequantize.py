"""Published 4- and 8-bit weights are dequantized on load."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.formats.huggingface.checkpoint_files import Folder, first_difference, load_params, save_params
from models.formats.huggingface.dequantize import E2M1
from models.formats.huggingface.families import family_of
from models.transformer import abstract_params, init_params

safetensors = pytest.importorskip("safetensors.numpy", reason="needs the extra safetensors")
COMMON = dict(
    vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
    num_experts_per_tok=2, tie_word_embeddings=False, rms_norm_eps=1e-5,
)  # fmt: skip
GPT_OSS = COMMON | dict(
    model_type="gpt_oss", architectures=["GptOssForCausalLM"], intermediate_size=96, num_local_experts=3, head_dim=16,
    num_key_value_heads=2, sliding_window=8, hidden_act="silu", layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
DEEPSEEK = COMMON | dict(
    model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"], intermediate_size=80, hidden_act="silu",
    moe_intermediate_size=40, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10, q_lora_rank=20, n_group=1, topk_group=1,
)  # fmt: skip
BLOCK = (24, 32)  # divides nothing here


def published(folder, hf, quantize):
    """Saves a checkpoint of random weights, some of which `quantize(name, array)` replaces by quantized tensors."""
    family = family_of(hf)
    config = family.read(hf)
    save_params(folder, config, init_params(config, jax.random.key(0)), family, dtype="bfloat16", shard_bytes=10**9)
    path = folder / "model.safetensors"
    there = safetensors.load_file(path)
    there = {name: array for old in there for name, array in quantize(old, there[old]).items()}
    safetensors.save_file(there, path)
    method = hf["quantization_config"]
    (folder / "config.json").write_text(json.dumps(hf | {"quantization_config": method}))
    return there


def to_mxfp4(name, array):
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: array}
    experts, ins, outs = array.shape
    rng = np.random.default_rng(len(name))
    blocks = rng.integers(0, 256, (experts, outs, ins // 32, 16), np.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": rng.integers(118, 130, blocks.shape[:3], np.uint8)}


def to_fp8(name, array):
    if not (name.endswith("proj.weight") or "kv_a_proj" in name):
        return {name: array}
    blocks = [-(-size // block) for size, block in zip(array.shape, BLOCK, strict=True)]
    factors = np.random.default_rng(len(name)).uniform(1e-3, 1e-2, blocks).astype(np.float32)
    numbers = np.clip(np.asarray(array, np.float32) * 1000, -400, 400).astype(jnp.float8_e4m3fn)
    return {name: numbers, f"{name}_scale_inv": factors}


def mxfp4_by_hand(blocks, scales):
    experts, outs, groups, _ = blocks.shape
    full = np.zeros((experts, groups * 32, outs), np.float32)
    for e, o, g, i in itertools.product(range(experts), range(outs), range(groups), range(16)):
        for at, four in enumerate((int(blocks[e, o, g, i]) % 16, int(blocks[e, o, g, i]) // 16)):
            full[e, g * 32 + 2 * i + at, o] = E2M1[four] * 2.0 ** (int(scales[e, o, g]) - 127)
    return full


def test_four_bits_are_dequantized(tmp_path):
    there = published(tmp_path, GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}}, to_mxfp4)
    folder = Folder(tmp_path)
    config = family_of(folder.config).read(folder.config)
    params = load_params(folder, config, abstract_params(config))
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts."
        wide = mxfp4_by_hand(there[f"{name}gate_up_proj_blocks"], there[f"{name}gate_up_proj_scales"])
        narrow = mxfp4_by_hand(there[f"{name}down_proj_blocks"], there[f"{name}down_proj_scales"])
        mlp = params["layers"]["mlp"]
        np.testing.assert_array_equal(mlp["gate"]["kernel"][layer], wide[..., ::2])
        np.testing.assert_array_equal(mlp["up"]["kernel"][layer], wide[..., 1::2])
        np.testing.assert_array_equal(mlp["down"]["kernel"][layer], narrow)
    full = folder.slice(f"{name}gate_up_proj")
    np.testing.assert_array_equal(full[1:, 7:70, 5:9], wide[1:, 7:70, 5:9])
    assert full.get_shape() == (3, 64, 192)
    assert first_difference(folder, config, params) is None


def test_eight_bits_in_blocks_are_dequantized(tmp_path):
    method = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "fmt": "e4m3"}
    there = published(tmp_path, DEEPSEEK | {"quantization_config": method}, to_fp8)
    folder = Folder(tmp_path)
    config = family_of(folder.config).read(folder.config)
    params = load_params(folder, config, abstract_params(config))

    def by_hand(name):
        numbers, factors = np.asarray(there[name], np.float32), there[f"{name}_scale_inv"]
        rows, columns = (np.arange(size) // block for size, block in zip(numbers.shape, BLOCK, strict=True))
        return (numbers * factors[np.ix_(rows, columns)]).astype(jnp.bfloat16).astype(np.float32)

    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    np.testing.assert_array_equal(params["layers"]["mlp"]["down"]["kernel"][0, 2], by_hand(name).T)
    name = "model.layers.0.mlp.gate_proj.weight"
    np.testing.assert_array_equal(params["dense_layers"]["mlp"]["gate"]["kernel"][0], by_hand(name).T)
    np.testing.assert_array_equal(folder.slice(name)[23:50, 31:33], by_hand(name)[23:50, 31:33])
    assert first_difference(folder, config, params) is None


@pytest.mark.parametrize("method", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}])
def test_other_methods_are_refused_with_the_fix(method):
    with pytest.raises(ValueError, match=f"quant_method={method['quant_method']}.*dequantize=True"):
        family_of(GPT_OSS | {"quantization_config": method})


@pytest.mark.parity
def test_transformers_reads_the_same_numbers_out_of_four_bits(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle needs transformers and torch")
    torch = pytest.importorskip("torch")
    published(tmp_path, GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}}, to_mxfp4)
    how = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how, dtype=torch.bfloat16)
    folder = Folder(tmp_path)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(np.asarray(folder.slice(name)[:], np.float32), tensor.float().numpy(), name)
