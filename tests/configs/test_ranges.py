"""Range checks of single keys."""

from dataclasses import dataclass, field, fields, is_dataclass

import pytest

from configs.ranges import check_ranges
from configs.schema import GROUPS, RunConfig
from data.loader import DataConfig
from data.sources.readers import TextConfig
from trainer.objectives.classification import ClassificationConfig
from trainer.objectives.distillation import DistillationConfig
from trainer.objectives.feature_distillation import FeatureLossConfig


@dataclass
class Inner:
    share: float = field(default=0.5, metadata={"min": 0, "below": 1})
    limit: int | None = field(default=None, metadata={"min": 1, "hint": "null: none"})


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    many: dict[str, Inner] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list, metadata={"above": 0, "max": 4})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Outer(Inner(share=1.0)), "inner.share=1.0: must be at least 0 and below 1"),
        (Outer(Inner(limit=0)), "inner.limit=0: must be at least 1; nearest valid: 1; null: none"),
        (Outer(many={"a": Inner(share=-1.0)}), "many.a.share=-1.0: must be at least 0 and below 1; nearest valid: 0"),
        (Outer(sizes=[1, 5]), r"sizes=\[1, 5\]: must be above 0 and at most 4; nearest valid: 4"),
        (Outer(sizes=[0]), r"sizes=\[0\]: must be above 0 and at most 4$"),
        (Outer(Inner(share=float("nan"))), "inner.share=nan"),
    ],
)
def test_a_value_outside_is_refused_by_its_full_key(config, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        check_ranges(config)


def test_values_at_the_ends_and_null_are_valid():
    check_ranges(Outer(Inner(share=0.0, limit=1), {"a": Inner()}, [1, 4]))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (RunConfig(fake_devices=0), "fake_devices=0: must be at least 1"),
        (RunConfig(data=DataConfig(mixture_weights=[1.0, 0.0])), "data.mixture_weights="),
        (RunConfig(objective=ClassificationConfig(class_weights=[1.0, -1.0])), "objective.class_weights="),
        (
            RunConfig(objective=DistillationConfig(feature_loss=FeatureLossConfig(hidden_loss_weight=-1.0))),
            "objective.feature_loss.hidden_",
        ),
    ],
)
def test_keys_of_a_run_are_checked_wherever_they_are(config, said):
    with pytest.raises(ValueError, match=said):
        check_ranges(config)
    config = RunConfig()
    config.data.sources["a"] = TextConfig(weight=0.0)
    with pytest.raises(ValueError, match=r"data\.sources\.a\.weight=0\.0: must be above 0; leave the source out"):
        check_ranges(config)


def test_every_range_is_one_that_is_read_and_holds_for_the_default():
    """A misspelled bound would be ignored."""
    known = {"min", "max", "above", "below", "hint"}

    def classes(of: type):
        yield of
        for one in fields(of):
            if isinstance(one.default_factory, type) and is_dataclass(one.default_factory):
                yield from classes(one.default_factory)

    every = {found for group in GROUPS.values() for cls in group.values() for found in classes(cls)} | {RunConfig}
    assert {key for cls in every for one in fields(cls) for key in one.metadata} == known
    for cls in every:
        check_ranges(cls())
