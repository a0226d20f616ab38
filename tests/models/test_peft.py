"""Adapters compared with PEFT: equal logits, after loading and after saving its files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.adapters.lora import Method, bind_adapters, init_adapters, merge
from models.config import Dtype
from models.formats.huggingface.checkpoint_files import Folder, load_params
from models.formats.huggingface.families import family_of
from models.formats.huggingface.peft import Folder as AdapterFolder
from models.formats.huggingface.peft import first_difference, save_adapters
from models.transformer import abstract_params, logits, make_apply, param_axes

# PEFT uses a deprecated name of transformers.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")]
transformers = pytest.importorskip("transformers", reason="the oracle needs transformers and torch")
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft", reason="the reference of adapters")

L = 16
IDS = np.random.default_rng(0).integers(0, 96, (2, L))
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "lora": dict(target_modules=[*EVERY, "embed_tokens", "lm_head"]),
    "rslora": dict(target_modules=["q_proj", "v_proj"], use_rslora=True),
    "dora": dict(target_modules=[*EVERY, "lm_head"], use_dora=True),
    "lora, tied head": dict(target_modules=EVERY),
}


@pytest.fixture(scope="module", params=list(CASES))
def theirs(request, tmp_path_factory):
    """(folder of the base, folder of adapters, their logits)."""
    folder = tmp_path_factory.mktemp("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings="tied" in request.param,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    settings = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **CASES[request.param])
    model = peft.get_peft_model(base, settings).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn_like(parameter) * 0.1
            parameter.data += noise.abs() if "magnitude" in name else noise
    model.save_pretrained(folder / "adapters", save_embedding_layers=False)
    with torch.no_grad():
        wanted = model(torch.tensor(IDS)).logits.numpy()
    return folder, wanted


def ours(folder):
    """(model, family, adapter, base, adapters) of the folders."""
    there = Folder(folder / "base")
    family = family_of(there.config)
    model = family.read(there.config)
    model.dtype = Dtype.float32
    base = load_params(there, model, abstract_params(model))
    found = AdapterFolder(folder / "adapters")
    adapter = found.config(model, family)
    axes = param_axes(model)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda key: init_adapters(adapter, axes, key, base), jax.random.key(0))
    abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes)
    return model, family, adapter, base, found.load(model, adapter, family, abstract)


def test_adapters_of_peft_give_its_logits_bound_and_merged(theirs, measured, request):
    folder, wanted = theirs
    assert str(AdapterFolder(folder / "adapters").base) == str(folder / "base")
    model, _, adapter, base, adapters = ours(folder)
    axes, apply = param_axes(model), make_apply(model)
    positions, segments = np.arange(L, dtype=np.int32)[None].repeat(2, 0), np.ones((2, L), np.int32)

    @jax.jit
    def forward(params):
        return logits(apply(params, IDS.astype(np.int32), positions_BL=positions, segment_ids_BL=segments))

    bound = np.abs(forward(bind_adapters(adapter, axes, base, adapters)) - wanted).max()
    inside = np.abs(forward(merge(adapter, axes, base, adapters, jnp.dtype("float32"))) - wanted).max()
    assert bound < 1e-5 and inside < 1e-5
    measured("Adapters vs. PEFT", request.node.callspec.id, logits=bound, merged_logits=inside)


def test_what_is_written_is_loaded_by_peft_with_the_same_logits(theirs, tmp_path):
    folder, wanted = theirs
    model, family, adapter, _, adapters = ours(folder)
    base = str(folder / "base")
    save_adapters(tmp_path, model, adapter, adapters, family, base=base, dtype="float32")
    assert first_difference(tmp_path, model, adapter, adapters, family) is None
    loaded = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(base), tmp_path).eval()
    with torch.no_grad():
        np.testing.assert_allclose(loaded(torch.tensor(IDS)).logits.numpy(), wanted, atol=1e-6)
    settings = peft.LoraConfig.from_pretrained(tmp_path)
    assert settings.r == 4 and settings.lora_alpha == 6 and settings.base_model_name_or_path == base
    assert settings.use_dora == (adapter.method is Method.dora) and settings.target_modules


def test_gradients_are_those_of_peft(theirs):
    """The column norms of DoRA are constants in the backward pass, which affects gradients but not logits."""
    folder, _ = theirs
    model, _, adapter, base, adapters = ours(folder)
    axes, apply = param_axes(model), make_apply(model)
    positions, segments = np.arange(L, dtype=np.int32)[None].repeat(2, 0), np.ones((2, L), np.int32)

    @jax.jit
    @jax.grad
    def gradient(adapters):
        params = bind_adapters(adapter, axes, base, adapters)
        x = logits(apply(params, IDS.astype(np.int32), positions_BL=positions, segment_ids_BL=segments))
        return jnp.mean(jax.nn.logsumexp(x, axis=-1))

    found = gradient(adapters)["layers"]["attention"]["query"]["kernel"]
    model_there = peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM.from_pretrained(folder / "base"), folder / "adapters", is_trainable=True
    ).eval()
    model_there(torch.tensor(IDS)).logits.logsumexp(-1).mean().backward()
    grads = {name: p.grad.numpy() for name, p in model_there.named_parameters() if p.grad is not None}
    of = lambda what: next(g for name, g in grads.items() if f"layers.1.self_attn.q_proj.{what}" in name)
    np.testing.assert_allclose(found["a"][1].T, of("lora_A"), atol=1e-6)
    np.testing.assert_allclose(found["b"][1].reshape(4, -1).T, of("lora_B"), atol=1e-6)
    if adapter.method is Method.dora:
        np.testing.assert_allclose(found["magnitude"][1].ravel(), of("lora_magnitude_vector"), atol=1e-6)
