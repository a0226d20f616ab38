"""Parity with TRL's KTO trainer: the same weights, tokens, labels and mismatched answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from data.batch import ColumnBatch  # noqa: E402
from models.transformer import make_apply  # noqa: E402
from tests.trainer.test_preference_trl import home, llama, ours  # noqa: E402, F401
from trainer.objective import REFERENCE  # noqa: E402
from trainer.objectives.kto import LABEL, KtoConfig, Loss  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # theirs

THEIRS = {Loss.kto: "kto", Loss.apo_zero: "apo_zero_unpaired"}


def side(inputs, prefix: str, length: int):
    """Returns the five fields [B, L] of a TRL batch."""
    get = lambda name: inputs[prefix + name].numpy()
    pad = lambda x: np.pad(x, ((0, 0), (0, length - x.shape[1])))
    tokens, inside, said = (pad(get(name)) for name in ("input_ids", "attention_mask", "completion_mask"))
    mask = np.pad(said[:, 1:], ((0, 0), (0, 1)))
    positions = np.broadcast_to(np.arange(length), tokens.shape)
    return [tokens, np.roll(tokens, -1, -1), mask.astype(np.float32), inside, positions]


@pytest.mark.parametrize("loss", Loss, ids=lambda loss: loss.name)
def test_loss_gradient_and_metrics_equal_those_of_trl(home, tmp_path, measured, loss):  # noqa: F811
    folder, tokenizer, pairs = home
    rows = [{"prompt": p["prompt"], "completion": p["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
            for i, p in enumerate(pairs)]  # fmt: skip
    policy, reference = llama(folder / "policy", 0), llama(folder / "reference", 1)
    args = trl.KTOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=None, bf16=False, beta=0.3,
        per_device_train_batch_size=4, disable_dropout=True, loss_type=THEIRS[loss], desirable_weight=1.3,
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    trainer = trl.KTOTrainer(policy, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    policy.train()
    want = trainer.compute_loss(trainer.model, inputs)
    want.backward()
    for parameter in policy.parameters():
        parameter.data = parameter.grad
    policy.save_pretrained(tmp_path / "gradient")
    gradient = ours(tmp_path / "gradient")[1]

    other = "KL_" if "KL_input_ids" in inputs else ""  # without z0 they have none
    length = max(inputs["input_ids"].shape[1], inputs[other + "input_ids"].shape[1])
    fields = [np.stack(both, 1) for both in zip(side(inputs, "", length), side(inputs, other, length), strict=True)]
    fields = [jnp.asarray(x, jnp.float32 if i == 2 else jnp.int32) for i, x in enumerate(fields)]
    batch = ColumnBatch(*fields, {LABEL: jnp.asarray(np.array(inputs["label"]), jnp.float32)})
    model, params = ours(folder / "policy")
    objective = KtoConfig(loss_type=loss, beta=0.3, desirable_weight=1.3).build(None)
    frozen = {REFERENCE: ours(folder / "reference")[1]}

    def value(params):
        mean, metrics = objective.loss(make_apply(model), params, frozen, batch, None)
        return mean.value(), metrics

    (found, metrics), grad = jax.value_and_grad(value, has_aux=True)(params)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    apart = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (grad, gradient)), strict=True))
    assert float(found) == pytest.approx(want.item(), rel=1e-5) and apart <= 1e-4 * scale
    measured("KTO vs. TRL", loss.name, loss=abs(float(found) / want.item() - 1), gradient=apart / scale)
    reported = {key: float(np.mean(values)) for key, values in trainer._metrics["train"].items()}
    for mine, theirs in {"z0": "kl", "reward_good": "rewards/chosen", "reward_bad": "rewards/rejected"}.items():
        assert float(metrics[mine].value()) == pytest.approx(reported[theirs], rel=1e-4, abs=1e-5), mine
