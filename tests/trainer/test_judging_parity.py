"""Parity with TRL and transformers reward and classification models: loss, gradient and scores."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
datasets = pytest.importorskip("datasets")

from data.batch import ColumnBatch, TokenBatch  # noqa: E402
from models.config import Dtype  # noqa: E402
from models.formats.huggingface.checkpoint_files import Folder, first_difference, load_params, save_params  # noqa: E402
from models.formats.huggingface.families import family_for, read_model  # noqa: E402
from models.transformer import abstract_params, make_apply  # noqa: E402
from trainer.objectives.classification import ClassificationConfig  # noqa: E402
from trainer.objectives.reward import RewardConfig  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # theirs

V = 48
SIZES = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, eos_token_id=1)
FAMILIES = {"Llama": SIZES, "Qwen3": SIZES | {"head_dim": 16}, "Gemma3Text": SIZES | {"head_dim": 16}, "GPT2": GPT2}


def judge(folder, name: str = "Llama", labels: int = 1):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**FAMILIES[name], num_labels=labels)
    model = getattr(transformers, f"{name.removesuffix('Text')}{'Text' if 'Text' in name else ''}"
                    "ForSequenceClassification")(config).float().eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def ours(folder):
    there = Folder(folder)
    config = read_model(there.config)
    config.dtype = Dtype.float32
    return there, config, load_params(there, config, abstract_params(config))


def rows(rng, count: int, length: int = 20) -> TokenBatch:
    """Returns rows of one text each, padded on the right with token 0."""
    sizes = rng.integers(3, length, count)
    inside = (np.arange(length)[None] < sizes[:, None]).astype(np.int32)
    tokens = (rng.integers(2, V, (count, length)) * inside).astype(np.int32)
    positions = np.arange(length, dtype=np.int32)[None] * inside
    return TokenBatch(tokens, np.zeros_like(tokens), np.zeros(tokens.shape, np.float32), inside, positions)


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_equal_those_of_transformers_and_files_come_back(tmp_path, measured, name):
    model, batch = judge(tmp_path / "theirs", name, 3), rows(np.random.default_rng(0), 4)
    there, config, params = ours(tmp_path / "theirs")
    assert config.num_labels == 3 and first_difference(there, config, params) is None
    with torch.no_grad():
        given = {"input_ids": batch.tokens, "attention_mask": batch.segment_ids}
        want = model(**{key: torch.tensor(value).long() for key, value in given.items()}).logits.numpy()
    found = ClassificationConfig().build(None).read(make_apply(config), params, batch)
    want = np.exp(want - want.max(-1, keepdims=True))
    want /= want.sum(-1, keepdims=True)
    apart = float(np.abs(np.asarray(found) - want).max())
    assert apart < 1e-5
    measured("Classes vs. transformers", name, probabilities=apart)
    save_params(tmp_path / "mine", config, params, family_for(config), dtype="float32", shard_bytes=10**9)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "mine")
    assert type(loaded) is type(model) and loaded.config.num_labels == 3
    for (key, mine), (other, theirs) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == other and torch.equal(mine, theirs)
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["label2id"]["LABEL_2"] == 2


@pytest.mark.parametrize("margins", [False, True])
def test_reward_loss_and_gradient_equal_those_of_trl(tmp_path, measured, margins):
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, V)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    rng = np.random.default_rng(0)
    text = lambda: " ".join(f"w{i}" for i in rng.integers(2, V, rng.integers(2, 14)))
    given = [{"chosen": text(), "rejected": text()} | ({"margin": float(i) / 3} if margins else {}) for i in range(4)]
    model = judge(tmp_path / "theirs")
    args = trl.RewardConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=None, bf16=False,
        per_device_train_batch_size=4, center_rewards_coefficient=0.05, disable_dropout=True,
    )  # fmt: skip
    data = datasets.Dataset.from_list(given)
    trainer = trl.RewardTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    model.train()
    want = trainer.compute_loss(trainer.model, inputs)
    want.backward()
    _, config, params = ours(tmp_path / "theirs")
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model.save_pretrained(tmp_path / "gradient")
    gradient = ours(tmp_path / "gradient")[2]
    inside, tokens = (np.stack(np.split(inputs[key].numpy(), 2), 1) for key in ("attention_mask", "input_ids"))
    positions = np.broadcast_to(np.arange(tokens.shape[-1]), tokens.shape)
    made = TokenBatch(*(jnp.asarray(x, jnp.int32) for x in (tokens, tokens)), jnp.zeros(tokens.shape),
                      *(jnp.asarray(x, jnp.int32) for x in (inside, positions)))  # fmt: skip
    if margins:
        made = ColumnBatch(*made, {"margin": jnp.asarray(inputs["margin"].numpy(), jnp.float32)})
    objective = RewardConfig(center_rewards_coefficient=0.05, margins=margins).build(None)
    value = lambda params: objective.loss(make_apply(config), params, {}, made, None)[0].value()
    found, grad = jax.value_and_grad(value)(params)
    assert float(found) == pytest.approx(float(want), rel=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    apart = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (grad, gradient)), strict=True))
    assert apart <= 1e-4 * scale
    name = "Bradley-Terry, centred" + (", with margins" if margins else "")
    off = abs(float(found) / float(want) - 1)
    measured("Rewards vs. TRL", name, loss=off, gradient=apart / scale)
