"""Compatibility checks based on the requirements of objectives."""

from dataclasses import dataclass

import pytest

from configs.compatibility import check_compatibility, set_num_labels
from data.loader import DataConfig
from data.records.encoding import DataFormat, DataNeeds
from data.transforms import MlmConfig
from models.adapters.lora import AdapterConfig
from models.config import AttentionConfig, AttentionMask, ModelConfig
from trainer.objective import FrozenModelSpec, FrozenNeeds, ModelNeeds, ObjectiveConfig, Sync
from trainer.objectives.classification import ClassificationConfig
from trainer.objectives.distillation import DistillationConfig
from trainer.objectives.kto import KtoConfig
from trainer.objectives.masked_lm import MaskedLMConfig
from trainer.objectives.next_token import NextTokenConfig
from trainer.objectives.preference import Loss, PreferenceConfig
from trainer.objectives.reward import RewardConfig


@dataclass
class JudgedConfig(ObjectiveConfig):
    """An unregistered objective: checks read only its requirements."""

    kind: str = "judged"

    @property
    def data_needs(self) -> DataNeeds:
        return DataNeeds(formats=(DataFormat.preference,))

    @property
    def model_needs(self) -> ModelNeeds:
        return ModelNeeds(num_labels=3, masks=(AttentionMask.causal,))

    @property
    def frozen_needs(self) -> FrozenNeeds:
        synced = FrozenModelSpec(sync=Sync(2, 0.5))
        return FrozenNeeds({"reward": FrozenModelSpec("judge", "objective.reward", precompute=True), "critic": synced})


def check(
    objective: ObjectiveConfig, data: DataConfig | None = None, mask: AttentionMask = AttentionMask.causal
) -> ModelConfig:
    data, model = data or DataConfig(), ModelConfig(attention=AttentionConfig(mask=mask))
    set_num_labels(data, objective, model)
    check_compatibility(data, objective, model, AdapterConfig())
    return model


def test_any_objective_is_checked_by_its_needs():
    pairs = DataConfig(format=DataFormat.preference)
    assert check(JudgedConfig(), pairs).num_labels == 3
    with pytest.raises(ValueError, match=r"objective=judged needs data\.format=preference$"):
        check(JudgedConfig())
    with pytest.raises(ValueError, match=r"mask=bidirectional: objective=judged predicts the next token"):
        check(JudgedConfig(), pairs, AttentionMask.bidirectional)
    needs = JudgedConfig().frozen_needs
    assert (
        needs.precomputed == "reward" and needs.synced == {"critic": Sync(2, 0.5)} and list(needs.loaded) == ["reward"]
    )


@pytest.mark.parametrize(
    ("objective", "outputs"),
    [(NextTokenConfig(), 1), (RewardConfig(), 2), (ClassificationConfig(), 3)],
)
def test_a_head_that_the_objective_does_not_need_is_refused(objective, outputs):
    data, model = DataConfig(classes=["a", "b"]), ModelConfig(num_labels=outputs)
    with pytest.raises(ValueError, match=rf"model\.num_labels={outputs}: objective={objective.kind} needs \d"):
        set_num_labels(data, objective, model)


@pytest.mark.parametrize(
    ("objective", "mask", "transform", "said"),
    [
        (KtoConfig(), AttentionMask.bidirectional, None, "predicts the next token"),
        (PreferenceConfig(), AttentionMask.prefix, None, "does not support prefixes"),
        (MaskedLMConfig(), AttentionMask.causal, MlmConfig(), "needs a bidirectional model"),
        (NextTokenConfig(), AttentionMask.causal, MlmConfig(), "predicts next tokens; use transform=none, phase=mlm"),
        (
            MaskedLMConfig(),
            AttentionMask.bidirectional,
            None,
            "data.transform.kind=none: .* trains on tokens masked by transform=mlm",
        ),
    ],
)
def test_masks_and_targets_go_together(objective, mask, transform, said):
    data = DataConfig(format=objective.data_needs.formats[0])
    if transform is not None:
        data.transform = transform
    with pytest.raises(ValueError, match=said):
        check(objective, data, mask)


def test_frozen_needs_follow_the_loss():
    assert FrozenNeeds() == PreferenceConfig(loss_type=Loss.simpo).frozen_needs == DistillationConfig().frozen_needs
    assert PreferenceConfig(precompute_ref_log_probs=True).frozen_needs.precomputed == "reference"
    moving = PreferenceConfig(ref_model_sync_steps=3, ref_model_mixup_alpha=0.5).frozen_needs
    assert moving.synced == {"reference": Sync(3, 0.5)} and not moving.loaded
    [(role, spec)] = DistillationConfig(teacher="big").frozen_needs.loaded.items()
    assert (role, spec.source, spec.key) == ("teacher", "big", "objective.teacher")
