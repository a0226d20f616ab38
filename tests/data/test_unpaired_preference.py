import numpy as np
import pytest

from data.batch import ColumnBatch
from data.loader import UnpairedRows
from data.records.chat_encoding import configured
from data.records.chat_formats import Conversation, InvalidRecord
from data.records.encoding import DataFormat, EncodingConfig, LossMask, OnOverflow, encode_unpaired
from data.records.unpaired_preference import UnpairedExample, pair_with_next, to_unpaired
from data.tokenizers.kinds import BytesConfig, TokenizerConfig

TOKENIZER = configured(BytesConfig().build(lambda: iter(())), TokenizerConfig(chat_template="plain"))
ENCODING = EncodingConfig(LossMask.assistant, OnOverflow.truncate_turns, 64, DataFormat.unpaired_preference)
TURN = lambda role, text: {"role": role, "content": text}


def unpaired(question: str, answer: str, good: bool) -> UnpairedExample:
    return UnpairedExample(Conversation([TURN("user", question), TURN("assistant", answer)]), good)


@pytest.mark.parametrize(
    "fields,want",
    [
        ({"prompt": "q", "completion": "a", "label": True}, [True]),
        ({"messages": [TURN("user", "q"), TURN("assistant", "a")], "label": 0}, [False]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [True, False]),
        ({"instruction": "q", "output": "a", "label": 1}, [True]),
    ],
)
def test_layouts_are_detected_by_their_fields(fields, want):
    found = to_unpaired(fields)
    assert [one.label for one in found] == want
    assert all(one.conversation.messages[-1]["role"] == "assistant" for one in found)


@pytest.mark.parametrize(
    "fields,reason",
    [
        ({"prompt": "q", "completion": "a"}, "no field 'label'"),
        ({"prompt": "q", "completion": "a", "label": "yes"}, "field 'label' is neither true nor false"),
        ({"prompt": "q", "completion": "a", "label": None}, "field 'label' is neither true nor false"),
        ({"text": "t", "label": True}, "a text without a prompt"),
        ({"messages": [TURN("assistant", "a")], "label": True}, "an answer without a prompt"),
        ({"prompt": "q", "completion": "", "label": True}, "empty answer"),
    ],
)
def test_unusable_records_are_refused_with_the_reason(fields, reason):
    with pytest.raises(InvalidRecord) as error:
        to_unpaired(fields)
    assert error.value.reason == reason


def test_every_answer_is_paired_with_the_next_record_and_the_last_with_the_first():
    a, b, c = object(), object(), object()
    one = unpaired("1", "x", True)
    found = [(a, one), (b, unpaired("2", "y", True)), (b, unpaired("2", "z", False)), (c, unpaired("3", "w", False))]
    answers = [other.conversation.messages[-1]["content"] for _, _, other in pair_with_next(iter(found))]  # type: ignore
    assert answers == ["y", "w", "w", "x"]
    assert [other for *_, other in pair_with_next(iter(found[1:3]))] == [None, None]  # type: ignore


def test_rows_hold_the_completion_a_mismatched_one_and_the_label():
    examples = [
        example
        for good, text in ((True, "yes"), (False, "no no"))
        for example in encode_unpaired(TOKENIZER, unpaired("1?", text, good), unpaired("2?", "x" * 90, True), ENCODING)
    ]

    class Corpus:
        fingerprint = "x"
        lengths = np.array([len(example.ids) for example in examples])

        def document(self, index, start, stop):
            return examples[index].ids[start:stop]

        def loss_mask(self, index, start, stop):
            return examples[index].loss_mask[start:stop]

    rows = UnpairedRows(Corpus(), seq_len=64)
    assert len(rows) == 2
    for row, (label, text) in enumerate(((1, "yes"), (0, "no no"))):
        found = rows[row]
        assert isinstance(found, ColumnBatch) and found.columns["label"] == label
        targets = found.targets[0][found.loss_mask[0] > 0]
        assert TOKENIZER.decode([int(i) for i in targets if i < 256]).strip() == text
        size = int(found.segment_ids[0].sum())
        assert size == len(examples[2 * row].ids) - 1 and not found.loss_mask[0, size - 1 :].any()
        assert found.loss_mask[1].sum() > 20  # truncated at the end of the row, not dropped
        start = int(np.argmax(found.loss_mask[0]))
        np.testing.assert_array_equal(found.tokens[0, : start + 1], found.tokens[1, : start + 1])
