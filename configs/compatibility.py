"""Checks that data format, transform, objective and model are compatible, based on the objective's requirements."""

from data.loader import DataConfig
from data.records.encoding import DataFormat
from models.adapters.lora import AdapterConfig
from models.config import AttentionMask, ModelConfig
from trainer.objective import ObjectiveConfig

# Reason and fix for each attention mask that an objective does not support.
MASK_REASONS = {
    AttentionMask.causal: "needs a bidirectional model; set model.attention.mask=bidirectional",
    AttentionMask.prefix: "does not support prefixes; set model.attention.mask=causal",
    AttentionMask.bidirectional: (
        "predicts the next token, which a bidirectional model sees; set model.attention.mask=causal, or use phase=mlm"
    ),
}


def set_num_labels(data: DataConfig, objective: ObjectiveConfig, model: ModelConfig) -> None:
    """Sets `model.num_labels` as required by the objective, so that checkpoints record the model's head.

    Raises: ValueError if `model.num_labels` is set to another number, or `data.classes` do not fit the objective.
    """
    objective.check_classes(len(data.classes))
    num_labels = objective.model_needs.num_labels
    needed = len(data.classes) if num_labels is None else num_labels
    if objective.kind and model.num_labels not in (0, needed):
        raise ValueError(
            f"model.num_labels={model.num_labels}: objective={objective.kind} needs {needed} (0: token logits); "
            "remove the key"
        )
    model.num_labels = needed


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
        raise ValueError(
            f"data.transform.kind={kind}: only supports data.format=text, not {data.format.name}; use transform=none"
        )
    if kind != "none" and objective.frozen_needs.precomputed:
        raise ValueError(
            f"data.transform.kind={kind}: changes tokens in every epoch, so outputs of a frozen model cannot be "
            "cached; set objective.cache_teacher_logits=false"
        )
    if needs.transform not in (None, kind):
        raise ValueError(
            f"data.transform.kind={kind}: {name} trains on tokens masked by transform={needs.transform}; set "
            f"transform={needs.transform}"
        )
    if data.transform.in_place and needs.transform is None:
        raise ValueError(
            f"data.transform.kind={kind}: its targets are masked tokens, but {name} predicts next tokens; use "
            "transform=none, phase=mlm or phase=masked_diffusion"
        )
    if model.attention.mask not in objective.model_needs.masks:
        mask = model.attention.mask
        raise ValueError(f"model.attention.mask={mask.name}: {name} {MASK_REASONS[mask]}")
    _check_multi_token(objective, model, adapter)


def _check_multi_token(objective: ObjectiveConfig, model: ModelConfig, adapter: AdapterConfig) -> None:
    count, name = model.mtp_num_layers, f"objective={objective.kind}"
    if not objective.model_needs.multi_token:
        if count:
            raise ValueError(
                f"model.mtp_num_layers={count}: {name} does not train MTP modules; use objective=multi_token, or "
                "model.mtp_num_layers=0"
            )
        return
    if not count:
        raise ValueError(f"model.mtp_num_layers=0: {name} needs multi-token prediction modules; set it to 1 or more")
    if adapter.active:
        raise ValueError(
            f"adapter.method={adapter.method.name}: {name} trains its prediction modules in full; use adapter=none"
        )
