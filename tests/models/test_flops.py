"""Parameter counts of published models, and FLOPs compared with explicit counts."""

from dataclasses import replace

import pytest
from hydra import compose, initialize_config_module

from configs.schema import register, to_typed
from models.config import MoEConfig
from models.flops import cache_bytes, flops_per_token, num_active_params, num_params
from tests.models.test_transformer import BASE, FAMILIES

# Parameters of the published checkpoints.
PUBLISHED = {
    "gpt2": 124_439_808,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "mistral_7b": 7_241_732_096,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344,
    "olmo2_13b": 13_716_198_400,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_1b": 999_885_952,
    "smollm3_3b": 3_075_098_624,
    "mixtral_8x7b": 46_702_792_704,
    "qwen3_30b_a3b": 30_532_122_624,
    "olmoe_1b_7b": 6_919_161_856,
    "gpt_oss_20b": 20_914_757_184,
    "deepseek_v3": 671_026_419_200,  # without its multi-token prediction layer
}
# Active parameters per token, including embeddings: 12.9B, 3.3B, 1.3B and 37B on the model cards.
ACTIVE = {
    "mixtral_8x7b": 12_879_925_248,
    "qwen3_30b_a3b": 3_353_032_704,
    "olmoe_1b_7b": 1_282_017_280,
    "deepseek_v3": 37_552_297_472,
    "llama3_8b": 8_030_261_248,
}


@pytest.fixture(scope="module", autouse=True)
def hydra():
    register()
    with initialize_config_module(config_module="configs", version_base="1.3"):
        yield


def preset(name):
    return to_typed(compose("root", overrides=[f"model={name}"])).model


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name):
    assert num_params(preset(name))["total"] == PUBLISHED[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_a_preset_has_the_published_number_of_active_parameters(name):
    assert num_active_params(preset(name)) == ACTIVE[name]


def test_a_token_costs_only_the_experts_that_it_is_routed_to():
    config = FAMILIES["experts"]
    sparse, e = flops_per_token(config, 100), config.moe
    dense = flops_per_token(replace(config, moe=replace(e, experts_per_token=e.num_experts)), 100)
    one = 6 * config.num_layers * 3 * config.embed_dim * e.intermediate_dim
    assert dense - sparse == one * (e.num_experts - e.experts_per_token)
    router = 6 * config.num_layers * config.embed_dim * e.num_experts
    plain = replace(config, moe=MoEConfig(), mlp=replace(config.mlp, intermediate_dim=e.intermediate_dim))
    assert sparse == flops_per_token(plain, 100) + one * (e.experts_per_token - 1) + router


def test_flops_are_six_for_each_weight_of_a_product_and_causal_attention():
    c, a = BASE, BASE.attention
    weights = c.num_layers * (
        c.embed_dim * a.head_dim * 2 * (a.num_heads + a.num_kv_heads) + 3 * c.embed_dim * c.mlp.intermediate_dim
    )
    head = c.embed_dim * c.vocab_size
    attention = c.num_layers * 3 * 2 * 2 * a.num_heads * a.head_dim * 100 / 2
    assert flops_per_token(c, 100) == 6 * (weights + head) + attention


def test_a_window_costs_less():
    windowed = FAMILIES["gemma"]
    assert flops_per_token(windowed, 64) - flops_per_token(windowed, 4) < 60 * 3 * 4 * 32 * 3 / 2


def test_the_cache_holds_keys_and_values():
    assert cache_bytes(BASE, 3, 10) == 2 * 2 * 3 * 10 * 2 * 8 * 4
    assert cache_bytes(FAMILIES["latent"], 3, 10) == 2 * 3 * 10 * 4 * (12 + 6) * 4
