"""Published families compared with transformers: equal logits, and bitwise equal files after a round trip."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import Dtype
from models.formats.huggingface.checkpoint_files import Folder, first_difference, load_params, save_params
from models.formats.huggingface.families import FAMILIES, architecture_name, family_for, family_of
from models.layers import inverse_frequencies, rope_temperature
from models.transformer import abstract_params, logits, make_apply

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers", reason="the reference needs transformers and torch")
torch = pytest.importorskip("torch")

L = 24
SMALL = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
YARN = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 16}
YARN_SCORES = YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e3, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 2.0, 4.0],
    "original_max_position_embeddings": 16, "partial_rotary_factor": 0.75,
}  # fmt: skip
EXPERTS = dict(moe_intermediate_size=16, num_experts_per_tok=2)
LATENT = EXPERTS | dict(
    num_key_value_heads=4, n_routed_experts=8, n_shared_experts=2, first_k_dense_replace=1, kv_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10, topk_group=1,
)  # fmt: skip
CASES = {
    "llama": ("Llama", {}),
    "llama 3.1, tied": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama, biases and yarn": ("Llama", dict(attention_bias=True, mlp_bias=True, rope_parameters=YARN)),
    "llama, dynamic": (
        "Llama",
        dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e3, "factor": 2.0}, max_position_embeddings=16),
    ),
    "mistral": ("Mistral", dict(sliding_window=8, head_dim=16)),
    "qwen2": ("Qwen2", {}),
    "qwen2, windows": ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "gemma2": ("Gemma2", dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=24)),
    "gemma3": ("Gemma3Text", dict(head_dim=16, sliding_window=8, rope_parameters=GEMMA3_ROPE, num_hidden_layers=7)),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", dict(sliding_window=None)),
    "phi4-mini": (
        "Phi3",
        dict(sliding_window=None, tie_word_embeddings=True, partial_rotary_factor=0.75, rope_parameters=LONGROPE)
        | dict(original_max_position_embeddings=16),
    ),
    "smollm3": ("SmolLM3", dict(no_rope_layers=[1, 0, 1], bos_token_id=0, eos_token_id=0)),
    "mixtral": ("Mixtral", dict(num_local_experts=4)),
    "qwen3 moe": ("Qwen3Moe", dict(**EXPERTS, num_experts=4, head_dim=8, norm_topk_prob=True)),
    "qwen3 moe, first layer dense": ("Qwen3Moe", dict(**EXPERTS, num_experts=4, head_dim=8, mlp_only_layers=[0])),
    "olmoe": ("Olmoe", dict(num_experts=4, num_experts_per_tok=2, eos_token_id=0)),
    "gpt-oss": (
        "GptOss",
        dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8, swiglu_limit=0.5)
        | dict(rope_parameters=YARN | {"truncate": False}),
    ),
    "deepseek v2": ("DeepseekV2", LATENT | dict(q_lora_rank=None, rope_parameters=YARN)),
    "deepseek v2, groups": (
        "DeepseekV2",
        LATENT | dict(q_lora_rank=20, topk_method="group_limited_greedy", n_group=4, topk_group=2),
    ),
    "deepseek v3": ("DeepseekV3", LATENT | dict(q_lora_rank=20, n_group=4, topk_group=2, rope_parameters=YARN_SCORES)),
    "deepseek v3, halves": ("DeepseekV3", LATENT | dict(q_lora_rank=None, n_group=1, rope_interleave=False)),
    "gpt2": (
        "GPT2",
        dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0),
    ),
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def published(request, tmp_path_factory):
    """A tiny random checkpoint of each family, saved by transformers, and its logits."""
    name, changes = CASES[request.param]
    config = getattr(transformers, f"{name}Config")(**(changes if name == "GPT2" else SMALL | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():  # also norms and biases, which are initialized to ones and zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder)
    tokens = np.random.default_rng(0).integers(1, 96, (2, L))
    with torch.no_grad():
        return folder, tokens, model(torch.tensor(tokens)).logits.numpy()


def load(path, abstract=None):
    folder = Folder(path)
    config = family_of(folder.config).read(folder.config)
    config.dtype = Dtype.float32
    return folder, config, load_params(folder, config, abstract or abstract_params(config))


def test_logits_equal_those_of_transformers(published, measured, request):
    path, tokens, want = published
    _, config, params = load(path)
    positions = jnp.broadcast_to(jnp.arange(L), tokens.shape)
    output = make_apply(config)(params, tokens, positions_BL=positions, segment_ids_BL=jnp.ones_like(positions))
    apart = np.abs(logits(output) - want).max() / max(1, np.abs(want).max())
    assert apart < 1e-4
    measured("Families vs. transformers", request.node.callspec.id, logits=apart)


def test_export_equals_the_import_bitwise_and_loads_in_transformers(published, tmp_path):
    path, tokens, want = published
    folder, config, params = load(path)
    assert first_difference(folder, config, params) is None
    family = family_for(config)
    save_params(tmp_path, config, params, family, dtype="float32", shard_bytes=20_000)
    again, config_again, params_again = load(tmp_path)
    assert architecture_name(config_again) == architecture_name(config)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, params_again))
    if family.model_type == folder.config["model_type"]:
        assert again.names() == folder.names()
        for name in folder.names():
            assert np.array_equal(folder.slice(name)[:], again.slice(name)[:]), name
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.tensor(tokens)).logits.numpy(), want, atol=1e-5, rtol=1e-5)


def test_slices_loaded_onto_a_mesh_equal_the_full_parameters(published):
    path, _, _ = published
    _, config, whole = load(path)
    from models.transformer import param_axes
    from trainer.mesh import MeshConfig, make_mesh
    from trainer.sharding import ShardingRules, param_shardings

    abstract = abstract_params(config)
    experts = 2 if config.moe.num_experts else 1
    mesh = make_mesh(MeshConfig(1, 2, 2, experts), jax.devices()[: 4 * experts])
    shardings = param_shardings(param_axes(config), abstract, mesh, ShardingRules())
    specs = jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), abstract, shardings)
    _, _, cut = load(path, specs)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(cut))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), whole, cut))


def test_missing_unexpected_and_misshapen_tensors_are_named(published):
    path, _, _ = published
    config = json.loads((path / "config.json").read_text())
    changed = "n_layer" if "n_layer" in config else "num_hidden_layers"
    folder = Folder(path)
    wrong = {**config, changed: config[changed] + 1}
    if "layer_types" in wrong:
        wrong["layer_types"] = [*wrong["layer_types"], wrong["layer_types"][0]]
    folder.config = wrong
    read = family_of(wrong).read(wrong)
    with pytest.raises(ValueError, match=rf"\.{config[changed]}\..* is missing"):
        load_params(folder, read, abstract_params(read))
    narrow = {**config, "vocab_size": 95}
    folder.config, read = narrow, family_of(narrow).read(narrow)
    with pytest.raises(ValueError, match=r"has shape \[96, 32\], but config.json requires \[95, 32\]"):
        load_params(folder, read, abstract_params(read))


def test_every_family_is_tried():
    tried = {getattr(transformers, f"{name}Config").model_type for name, _ in CASES.values()}
    assert tried == {family.model_type for family in FAMILIES}


@pytest.mark.parametrize("length", [16, 100, 5000])
@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "dynamic", "longrope"])
def test_frequencies_equal_those_of_transformers(kind, length):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {"rope_type": kind, "rope_theta": 1e4, "factor": 8.0}
    if kind != "dynamic":
        given["original_max_position_embeddings"] = 64
    if kind == "llama3":
        given |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        given |= {f"{name}_factor": [a + 0.1 * i for i in range(16)] for name, a in (("short", 1.0), ("long", 2.0))}
    hf = transformers.LlamaConfig(**SMALL | dict(hidden_size=128, head_dim=32), rope_parameters=given)
    want, temperature = ROPE_INIT_FUNCTIONS[kind](hf, "cpu", seq_len=length)
    rope = family_of(hf.to_dict()).read(hf.to_dict()).rope
    found = inverse_frequencies(rope, 32, theta=rope.theta, scaled=True, length=length)
    np.testing.assert_allclose(found, want.numpy(), rtol=1e-6)
    assert rope_temperature(rope) == pytest.approx(temperature, rel=1e-6)
