"""Which records, transforms, objectives and models go together: who sees what, and who is to learn it."""

from data.loader import DataConfig
from data.records.encoding import DataFormat
from models.adapters.lora import AdapterConfig
from models.config import AttentionMask, ModelConfig
from trainer.objective import ObjectiveConfig
from trainer.objectives.distillation import DistillationConfig
from trainer.objectives.masked_lm import MaskedDiffusionConfig, MaskedLMConfig
from trainer.objectives.multi_token_prediction import MultiTokenConfig
from trainer.objectives.next_token import NextTokenConfig
from trainer.objectives.preference import PreferenceConfig

# Transforms whose targets are of the same place, and what learns them.
IN_PLACE: dict[str, type] = {"mlm": MaskedLMConfig, "diffusion": MaskedDiffusionConfig}


PHASES = {"dpo": "preference", "kto": "kto", "reward": "reward", "classify": "classification", "embed": "contrastive"}


def derive_fields(data: DataConfig, objective: ObjectiveConfig, model: ModelConfig) -> None:
    """Sets what the objective decides of records and of the model's head.

    Raises: ValueError where the records are not what it learns from.
    """
    if objective.kind and data.format not in objective.records:
        fitting = " or ".join(records.name for records in objective.records)
        phase = next((name for name, kind in PHASES.items() if kind == objective.kind), None)
        hint = f"; phase={phase} sets both" if phase else ""
        raise ValueError(
            f"data.format={data.format.name}: objective={objective.kind} needs data.format={fitting}{hint}"
        )
    data.margins, data.negatives = objective.reads_margins, objective.num_negatives
    data.pairs_per_row = objective.per_row
    model.outputs = objective.outputs(len(data.classes))


def check_compatibility(
    data: DataConfig, objective: ObjectiveConfig, model: ModelConfig, adapter: AdapterConfig
) -> None:
    """Raises: ValueError naming key, value, reason and fix."""
    kind, mask, told = data.transform.kind, model.attention.mask, f"objective={objective.kind}"
    if kind != "none" and data.format is not DataFormat.text:
        raise ValueError(f"data.transform.kind={kind}: is for data.format=text, not {data.format.name}; leave it out")
    if kind != "none" and objective.precomputed_model:
        raise ValueError(
            f"data.transform.kind={kind}: hides other tokens in each epoch, so that nothing said of a row can be kept; "
            "set objective.cache_teacher_logits=false"
        )
    if type(objective) in IN_PLACE.values() and IN_PLACE.get(kind) is not type(objective):
        name = next(name for name, cls in IN_PLACE.items() if cls is type(objective))
        raise ValueError(f"{told}: learns what transform={name} hides, not data.transform.kind={kind}")
    if kind in IN_PLACE and IN_PLACE[kind] is not type(objective):
        raise ValueError(f"data.transform.kind={kind}: is learnt by objective={IN_PLACE[kind].kind}, not {told}")
    if kind in IN_PLACE and mask is not AttentionMask.bidirectional:
        raise ValueError(
            f"model.attention.mask={mask.name}: {told} tells tokens from all around them; set "
            "model.attention.mask=bidirectional"
        )
    predicts = isinstance(objective, NextTokenConfig | PreferenceConfig | DistillationConfig)
    if predicts and mask is AttentionMask.bidirectional:
        raise ValueError(
            f"model.attention.mask=bidirectional: {told} predicts the next token, which such a model sees; set "
            "model.attention.mask=causal, or take phase=mlm"
        )
    if mask is AttentionMask.prefix and not isinstance(objective, NextTokenConfig | DistillationConfig):
        raise ValueError(f"model.attention.mask=prefix: {told} knows no prompts; set model.attention.mask=causal")
    _check_further(objective, model, adapter)


def _check_further(objective: ObjectiveConfig, model: ModelConfig, adapter: AdapterConfig) -> None:
    count, told = model.mtp_num_layers, f"objective={objective.kind}"
    if not isinstance(objective, MultiTokenConfig):
        if count:
            raise ValueError(f"model.mtp_num_layers={count}: {told} does not train them; take objective=multi_token")
        return
    if not count:
        raise ValueError(
            f"model.mtp_num_layers=0: {told} trains modules for further tokens, and there are none; set it to 1"
        )
    if model.attention.mask is not AttentionMask.causal:
        raise ValueError(f"model.attention.mask={model.attention.mask.name}: {told} is for causal models; set causal")
    if adapter.active:
        raise ValueError(f"adapter.method={adapter.method.name}: {told} trains whole modules; leave it out")
