"""Parity with TRL's preference trainers: loss, gradient and metrics for the same weights and tokens."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
datasets = pytest.importorskip("datasets")

from data.batch import TokenBatch  # noqa: E402
from models.config import Dtype  # noqa: E402
from models.formats.huggingface.checkpoint_files import Folder, load_params  # noqa: E402
from models.formats.huggingface.families import family_of  # noqa: E402
from models.transformer import abstract_params, make_apply  # noqa: E402
from trainer.objective import REFERENCE  # noqa: E402
from trainer.objectives.preference import LOSSES, FDivergence, Loss, Pairs, PreferenceConfig  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # theirs

V = 48
NAMES = {Loss.exo: "exo_pair", Loss.nca: "nca_pair", Loss.bco: "bco_pair", Loss.sppo: "sppo_hard"}
SMOOTHING = {Loss.robust: 0.1, Loss.exo: 0.1, Loss.aot: 0.1}
CASES = [loss for loss in Loss if loss not in (Loss.simpo, Loss.cpo, Loss.orpo)]


def llama(folder, seed: int):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).float()
    for parameter in model.parameters():  # far enough from each other for margins that differ from 0
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def ours(folder):
    there = Folder(folder)
    config = family_of(there.config).read(there.config)
    config.dtype = Dtype.float32
    return config, load_params(there, config, abstract_params(config))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, V)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    rng = np.random.default_rng(0)
    text = lambda least, most: " ".join(f"w{i}" for i in rng.integers(2, V, rng.integers(least, most)))
    rows = [{"prompt": text(2, 7), "chosen": " " + text(1, 12), "rejected": " " + text(1, 12)} for _ in range(4)]
    return folder, tokenizer, datasets.Dataset.from_list(rows)


def as_batch(inputs) -> TokenBatch:
    """Converts TRL's rows, all chosen then all rejected, to pairs."""
    of_pairs = lambda x: np.stack(np.split(x.numpy(), 2), axis=1)
    tokens, inside, said = (of_pairs(inputs[name]) for name in ("input_ids", "attention_mask", "completion_mask"))
    mask = np.pad(said[..., 1:], ((0, 0), (0, 0), (0, 1)))
    positions = np.broadcast_to(np.arange(tokens.shape[-1]), tokens.shape)
    whole = lambda x, dtype=np.int32: jnp.asarray(x.astype(dtype))
    return TokenBatch(
        whole(tokens), whole(np.roll(tokens, -1, -1)), whole(mask, np.float32), whole(inside), whole(positions)
    )


def theirs(home, tmp_path, **options):
    """Returns TRL's loss, its gradient in our parameter tree, its metrics and the batch."""
    folder, tokenizer, rows = home
    policy, reference = llama(folder / "policy", 0), llama(folder / "reference", 1)
    args = trl.DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=None,
        bf16=False, per_device_train_batch_size=4, disable_dropout=True, **options,
    )  # fmt: skip
    trainer = trl.DPOTrainer(policy, ref_model=reference, args=args, train_dataset=rows, processing_class=tokenizer)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    policy.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    for parameter in policy.parameters():
        parameter.data = parameter.grad
    policy.save_pretrained(tmp_path / "gradient")
    metrics = {key: float(np.mean(values)) for key, values in trainer._metrics["train"].items()}
    return float(loss), ours(tmp_path / "gradient")[1], metrics, as_batch(inputs)


def compare(home, tmp_path, measured, name: str, config: PreferenceConfig, **options):
    """Compares loss and metrics relative to TRL's, the gradient relative to its largest entry."""
    want, gradient, metrics, batch = theirs(home, tmp_path, beta=config.beta, **options)
    model, params = ours(home[0] / "policy")
    _, reference = ours(home[0] / "reference")
    objective, apply = config.build(None), make_apply(model)

    def loss(params):
        mean, found = objective.loss(apply, params, {REFERENCE: reference}, batch, None)
        return mean.value(), found

    (found, ours_metrics), grad = jax.value_and_grad(loss, has_aux=True)(params)
    assert float(found) == pytest.approx(want, rel=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    apart = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (grad, gradient)), strict=True))
    assert apart <= 1e-4 * scale
    measured("Preference losses vs. TRL", name, loss=abs(float(found) / want - 1), gradient=apart / scale)
    reported = {key: float(mean.value()) for key, mean in ours_metrics.items()}
    for mine, other in {"reward_margin": "rewards/margins", "reward_chosen": "rewards/chosen",
                        "reward_rejected": "rewards/rejected", "reward_accuracy": "rewards/accuracies",
                        "logprob_chosen": "logps/chosen", "logprob_rejected": "logps/rejected"}.items():  # fmt: skip
        assert reported[mine] == pytest.approx(metrics[other], rel=1e-4, abs=1e-5), mine


@pytest.mark.parametrize("loss", CASES, ids=lambda loss: loss.name)
def test_loss_gradient_and_metrics_equal_those_of_trl(home, tmp_path, measured, loss):
    smoothing = SMOOTHING.get(loss, 0.0)
    config = PreferenceConfig(loss_type=loss, label_smoothing=smoothing, beta=0.3)
    options = {"loss_type": [NAMES.get(loss, loss.name)], "label_smoothing": smoothing}
    compare(home, tmp_path, measured, loss.name, config, **options)


def test_length_desensitised_dpo_equals_that_of_trl(home, tmp_path, measured):
    config = PreferenceConfig(ld_alpha=0.4)
    compare(home, tmp_path, measured, "sigmoid, length_weight 0.4", config, loss_type=["sigmoid"], ld_alpha=0.4)


@pytest.mark.parametrize("loss", [Loss.sigmoid, Loss.ipo, Loss.apo_zero], ids=lambda loss: loss.name)
def test_weighted_preference_optimisation_equals_that_of_trl(home, tmp_path, measured, loss):
    config = PreferenceConfig(loss_type=loss, use_weighting=True)
    compare(home, tmp_path, measured, f"{loss.name}, wpo", config, loss_type=[loss.name], use_weighting=True)


@pytest.mark.parametrize("kind,theirs", [("forward_kl", "forward_kl"), ("jensen_shannon", "js_divergence")])
@pytest.mark.parametrize("loss", [Loss.sigmoid, Loss.ipo], ids=lambda loss: loss.name)
def test_f_divergences_equal_those_of_trl(home, tmp_path, measured, loss, kind, theirs):
    config = PreferenceConfig(loss_type=loss, f_divergence=FDivergence[kind])
    options = {"loss_type": [loss.name], "f_divergence_type": theirs}
    compare(home, tmp_path, measured, f"{loss.name}, {kind}", config, **options)


@pytest.mark.parametrize("loss", [Loss.simpo, Loss.cpo, Loss.orpo], ids=lambda loss: loss.name)
def test_losses_without_a_reference_equal_those_of_trl(loss, measured):
    """Compares with TRL's methods on log-probabilities, per token if the loss is."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 20, (6, 2))
    policy = -rng.uniform(0.1, 4, (6, 2)) * lengths
    config = PreferenceConfig(loss_type=loss, beta=0.7, simpo_gamma=0.4)
    given = torch.tensor(policy if loss is Loss.cpo else policy / lengths, requires_grad=True)
    options = SimpleNamespace(
        alpha=0.0, beta=0.7, simpo_gamma=0.4, label_smoothing=0.0, accelerator=SimpleNamespace(device="cpu"),
        loss_type="sigmoid" if loss is Loss.cpo else "simpo",
    )  # fmt: skip
    method = ORPOTrainer.odds_ratio_loss if loss is Loss.orpo else CPOTrainer.cpo_loss
    want = method(options, given[:, 0], given[:, 1])[0] * (-1 if loss is Loss.orpo else 1)
    want.sum().backward()
    gradient = given.grad.numpy() / (1 if loss is Loss.cpo else lengths)

    def total(policy):
        found = LOSSES[loss](Pairs(policy, jnp.zeros((6, 2)), jnp.asarray(lengths, jnp.float32)), config)
        return found.sum(), found

    grad, found = jax.grad(total, has_aux=True)(jnp.asarray(policy, jnp.float32))
    apart, far = np.abs(found / want.detach().numpy() - 1).max(), np.abs(grad - gradient).max() / np.abs(gradient).max()
    assert apart < 1e-5 and far < 1e-4
    measured("Preference losses vs. TRL", loss.name, loss=apart, gradient=far)
