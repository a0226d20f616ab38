"""Which records, transforms, objectives and models go together, read from what an objective needs."""

from data.loader import DataConfig
from data.records.encoding import DataFormat
from models.adapters.lora import AdapterConfig
from models.config import AttentionMask, ModelConfig
from trainer.objective import ObjectiveConfig

# Why an objective refuses a mask of attention, and what to do.
MASK_REASONS = {
    AttentionMask.causal: "predicts hidden tokens from both sides; set model.attention.mask=bidirectional",
    AttentionMask.prefix: "knows no prompts; set model.attention.mask=causal",
    AttentionMask.bidirectional: (
        "predicts the next token, which such a model sees; set model.attention.mask=causal, or take phase=mlm"
    ),
}


def settle_outputs(data: DataConfig, objective: ObjectiveConfig, model: ModelConfig) -> None:
    """Sets `model.outputs` to what the objective needs, so that checkpoints record the model's head.

    Raises: ValueError where another number was given, or `data.classes` do not fit.
    """
    objective.check_classes(len(data.classes))
    num_labels = objective.model_needs.num_labels
    needed = len(data.classes) if num_labels is None else num_labels
    if objective.kind and model.outputs not in (0, needed):
        raise ValueError(
            f"model.outputs={model.outputs}: objective={objective.kind} needs {needed} (0: logits of the vocabulary); "
            "leave it out"
        )
    model.outputs = needed


def check_compatibility(
    data: DataConfig, objective: ObjectiveConfig, model: ModelConfig, adapter: AdapterConfig
) -> None:
    """Raises: ValueError naming key, value, reason and fix."""
    needs, kind, name = objective.data_needs, data.transform.kind, f"objective={objective.kind}"
    if objective.kind and data.format not in needs.formats:
        fitting = " or ".join(records.name for records in needs.formats)
        hint = f"; phase={needs.phase} sets both" if needs.phase else ""
        raise ValueError(f"data.format={data.format.name}: {name} needs data.format={fitting}{hint}")
    if kind != "none" and data.format is not DataFormat.text:
        raise ValueError(f"data.transform.kind={kind}: is for data.format=text, not {data.format.name}; leave it out")
    if kind != "none" and objective.frozen_needs.precomputed:
        raise ValueError(
            f"data.transform.kind={kind}: changes tokens in every epoch, so that outputs of a frozen model cannot be "
            "stored; set objective.cache_teacher_logits=false"
        )
    if needs.transform not in (None, kind):
        raise ValueError(f"{name}: learns what transform={needs.transform} hides, not data.transform.kind={kind}")
    if data.transform.in_place and needs.transform is None:
        raise ValueError(
            f"data.transform.kind={kind}: its targets are the tokens that it hides, and {name} learns next tokens; "
            "leave it out, or take phase=mlm or phase=masked_diffusion"
        )
    if model.attention.mask not in objective.model_needs.masks:
        mask = model.attention.mask
        raise ValueError(f"model.attention.mask={mask.name}: {name} {MASK_REASONS[mask]}")
    _check_further(objective, model, adapter)


def _check_further(objective: ObjectiveConfig, model: ModelConfig, adapter: AdapterConfig) -> None:
    count, name = model.mtp_num_layers, f"objective={objective.kind}"
    if not objective.model_needs.multi_token:
        if count:
            raise ValueError(f"model.mtp_num_layers={count}: {name} does not train them; take objective=multi_token")
        return
    if not count:
        raise ValueError(
            f"model.mtp_num_layers=0: {name} trains modules for further tokens, and there are none; set it to 1"
        )
    if adapter.active:
        raise ValueError(f"adapter.method={adapter.method.name}: {name} trains all of its modules; leave it out")
