"""Conversations to examples: ids, and a mask of the tokens that are to be learnt.

An example is never longer than a row, so that no answer is learnt without its question. Which of its tokens count is
`data.loss_mask`; what becomes of a longer one is `data.on_overflow`.

Shape letters: L tokens of an example.
"""

import enum
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data.records.chat_encoding import encode_chat
from data.records.chat_formats import BadRow, Conversation, count_bad, read_conversations
from data.records.labels import Labelled, Match, read_labelled, read_matches
from data.records.preference import Pair, read_pairs
from data.records.record import BadRecords, Record
from data.records.unpaired_preference import UnpairedExample, pair_with_next, read_unpaired
from data.sources.readers import SourceConfig, SourceShard
from data.tokenizers.tokenizer import Tokenizer


class DataFormat(enum.Enum):
    """What the records of all sources are."""

    text = "text"  # one text each: every token is learnt
    chat = "chat"  # `data.records.chat_formats` lists their formats: what data.loss_mask names is learnt
    unpaired_preference = "unpaired_preference"  # `data.records.unpaired_preference` lists theirs: an answer to a prompt, and whether it is good
    preference = (
        "preference"  # `data.records.preference` lists theirs: two answers to a prompt, of which the first is preferred
    )
    classification = "classification"  # `data.records.labels`: a text or a conversation, and its class
    retrieval = "retrieval"  # `data.records.labels`: texts that belong together


NOUNS = {DataFormat.classification: "texts"}  # of records, for people; the others are called by their own names


class LossMask(enum.Enum):
    """What a model learns of a conversation."""

    assistant = "assistant"  # all that the assistant says, and to end its turns
    last_turn = "last_turn"  # the assistant's last turn only
    all = "all"  # every token, as in pretraining


class OnOverflow(enum.Enum):
    """What becomes of a conversation that is longer than a row."""

    truncate_turns = (
        "truncate_turns"  # it ends with the last learnt turn that fits whole; without such a turn it is left out
    )
    truncate = "truncate"  # its end is cut off, an answer's with it: what is left has no end of turn
    drop = "drop"  # it is left out


class EncodingConfig(NamedTuple):
    """How records become examples."""

    loss_on: LossMask
    overlong: OnOverflow
    max_length: int  # tokens
    records: DataFormat = DataFormat.chat
    classes: tuple[str, ...] = ()  # of labelled records
    margins: bool = False  # pairs say how much better the chosen answer is
    negatives: int = 0  # further texts of a match

    @property
    def examples_per_record(self) -> int:
        """Examples of one record, which are never parted."""
        return examples_per_record(self.records, self.negatives)


def examples_per_record(records: DataFormat, negatives: int = 0) -> int:
    """Examples of one record, which are never parted."""
    return {DataFormat.preference: 2, DataFormat.unpaired_preference: 2, DataFormat.retrieval: 2 + negatives}.get(
        records, 1
    )


class Example(NamedTuple):
    ids: np.ndarray  # [L] i32
    loss_mask: np.ndarray  # [L] bool: tokens that are targets of the loss; never the first alone
    truncated: bool = False
    value: float = 0.0  # the margin of a pair


Said = Conversation | Pair | Labelled | Match | str


def read_said(
    source: SourceConfig, unit: SourceShard, bad: BadRecords, rules: EncodingConfig
) -> Iterator[tuple[Record, Said]]:
    """Every usable record of a unit with what it holds; the others are counted."""
    if rules.records is DataFormat.preference:
        return read_pairs(source, unit, bad, margins=rules.margins)
    if rules.records is DataFormat.classification:
        return read_labelled(source, unit, bad, rules.classes)
    if rules.records is DataFormat.retrieval:
        return read_matches(source, unit, bad, rules.negatives)
    if rules.records is DataFormat.unpaired_preference:
        return read_unpaired(source, unit, bad)
    return read_conversations(source, unit, bad)


def read_examples(
    source: SourceConfig, unit: SourceShard, bad: BadRecords, tokenizer: Tokenizer, rules: EncodingConfig
) -> Iterator[tuple[Said, tuple[Example, ...]]]:
    """What was said and its examples, `encoding.examples_per_record`, for every usable record of a unit; the others are counted.

    Raises: ValueError for a tokenizer without a chat template, at the first conversation.
    """
    if rules.records is DataFormat.unpaired_preference:
        yield from _judged_examples(source, unit, bad, tokenizer, rules)
        return
    for record, said in read_said(source, unit, bad, rules):
        first = said.chosen if isinstance(said, Pair) else said.said if isinstance(said, Labelled) else said
        if isinstance(first, Conversation) and tokenizer.chat_template is None:
            encode_chat(tokenizer, first.messages)  # says what to do
        try:
            yield said, encode_said(tokenizer, said, rules)
        except BadRow as error:
            count_bad(bad, record, error)
        except ValueError as error:
            count_bad(bad, record, _refused(error))


def _judged_examples(
    source: SourceConfig, unit: SourceShard, bad: BadRecords, tokenizer: Tokenizer, rules: EncodingConfig
) -> Iterator[tuple[Conversation, tuple[Example, Example]]]:
    """Beside each pair of examples the prompt, by which answers to one prompt stay on one side of a split."""
    for record, judged, other in pair_with_next(read_unpaired(source, unit, bad)):
        conversation = judged.conversation
        if tokenizer.chat_template is None:
            encode_chat(tokenizer, conversation.messages)  # says what to do
        try:
            if other is None:
                raise BadRow("no other record whose answer it could be compared with")
            yield (
                conversation._replace(messages=conversation.messages[:-1]),
                encode_judged(tokenizer, judged, other, rules),
            )
        except BadRow as error:
            count_bad(bad, record, error)
        except ValueError as error:
            count_bad(bad, record, _refused(error))


def encode_said(tokenizer: Tokenizer, said: Said, rules: EncodingConfig) -> tuple[Example, ...]:
    """`encoding.examples_per_record` examples. Raises: as `encode_example`."""
    if isinstance(said, Pair):
        return encode_pair(tokenizer, said, rules)
    if isinstance(said, Labelled):
        return (encode_labelled(tokenizer, said, rules),)
    if isinstance(said, Match):
        return tuple(encode_whole(tokenizer, text, rules) for text in said.texts)
    return (encode_example(tokenizer, said, rules),)


def encode_whole(tokenizer: Tokenizer, said: Conversation | str, rules: EncodingConfig) -> Example:
    """All of it to be read, and its last token to be told by. A longer text loses its end, but not the token of the
    end, or is left out, as `data.on_overflow` says.

    Raises: BadRow for one that is too long or empty; ValueError as `encode_chat`.
    """
    if isinstance(said, str):
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        ids = np.array(tokenizer.begin(tokenizer.encode(said)) + end, np.int32)
    else:
        ids, _ = encode_chat(tokenizer, said.messages, tools=said.tools)
        end = ids[-1:].tolist()
    long = len(ids) > rules.max_length
    if long and rules.overlong is not OnOverflow.truncate:
        raise BadRow(f"longer than data.seq_len={rules.max_length}", f"{len(ids)} tokens")
    if long:
        ids = np.concatenate([ids[: rules.max_length - len(end)], np.array(end, np.int32)])
    if not len(ids):
        raise BadRow("empty document")
    return Example(ids, np.arange(len(ids)) == len(ids) - 1, long)


def encode_labelled(tokenizer: Tokenizer, labelled: Labelled, rules: EncodingConfig) -> Example:
    """The ids of a text, and its class in the place of a next token: what is to be said after the last one.

    Raises: as `encode_whole`.
    """
    ids, _, shortened, _ = encode_whole(tokenizer, labelled.said, rules)
    ids = np.append(ids, np.int32(labelled.label))
    return Example(ids, np.arange(len(ids)) == len(ids) - 1, shortened)


def _refused(error: ValueError) -> BadRow:
    # Messages of templates and tokenizers tell the place; as a reason it would make every record a kind of its own.
    return BadRow(re.sub(r"messages\[\d+\]", "a message", str(error))[:160], str(error)[:300])


def encode_example(tokenizer: Tokenizer, conversation: Conversation | str, rules: EncodingConfig) -> Example:
    """Ids and mask. A text is encoded as a document of pretraining, however long it is: packing cuts it.

    Raises: BadRow for one in which nothing can be learnt; ValueError as `encode_chat`.
    """
    if isinstance(conversation, str):
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        ids = np.array(tokenizer.begin(tokenizer.encode(conversation)) + end, np.int32)
        return _checked(Example(ids, np.ones(len(ids), bool)))
    ids, said = encode_chat(tokenizer, conversation.messages, tools=conversation.tools)
    said = with_ends(ids, said, tokenizer.stop_ids)
    learnt = {LossMask.assistant: said, LossMask.last_turn: last_turn(said), LossMask.all: np.ones(len(ids), bool)}[
        rules.loss_on
    ]
    if len(ids) <= rules.max_length:
        return _checked(Example(ids, learnt))
    turns = said if rules.loss_on is LossMask.all else learnt
    length = _kept_length(turns, rules)
    if not length:
        raise BadRow(f"longer than data.seq_len={rules.max_length}", f"{len(ids)} tokens")
    return _checked(Example(ids[:length], learnt[:length], truncated=True))


def encode_pair(tokenizer: Tokenizer, pair: Pair, rules: EncodingConfig) -> tuple[Example, Example]:
    """Ids of both, with the last turn as what is compared; the prompt has the same ids in both.

    A pair of which one is longer than a row is left out, or both ends are cut off (data.on_overflow=truncate).
    Raises: BadRow for one that cannot be compared; ValueError as `encode_chat`.
    """
    overlong = rules.overlong if rules.overlong is OnOverflow.truncate else OnOverflow.drop
    of_last = rules._replace(loss_on=LossMask.last_turn, overlong=overlong)
    chosen, rejected = (encode_example(tokenizer, side, of_last) for side in (pair.chosen, pair.rejected))
    begins = [int(np.argmax(side.loss_mask)) for side in (chosen, rejected)]
    if begins[0] != begins[1] or not np.array_equal(chosen.ids[: begins[0]], rejected.ids[: begins[0]]):
        raise BadRow("the chat template writes the prompt differently for the two answers")
    if np.array_equal(chosen.ids, rejected.ids):
        raise BadRow("chosen is the same as rejected" + (" before data.seq_len" if chosen.truncated else ""))
    return chosen._replace(value=pair.margin), rejected


def encode_judged(
    tokenizer: Tokenizer, judged: UnpairedExample, other: UnpairedExample, rules: EncodingConfig
) -> tuple[Example, Example]:
    """Ids of a prompt with its answer, and with that of `other`, whose end is cut off where a row has no room for it.

    After the first stands one id more, 1 where the answer is good and 0 where not: it is no token, and never learnt.
    Raises: BadRow for one that cannot be compared; ValueError as `encode_chat`.
    """
    conversation, answer = judged.conversation, other.conversation.messages[-1]
    mixed = conversation._replace(messages=[*conversation.messages[:-1], answer])
    overlong = rules.overlong if rules.overlong is OnOverflow.truncate else OnOverflow.drop
    of_last = rules._replace(loss_on=LossMask.last_turn, overlong=overlong)
    own = encode_example(tokenizer, conversation, of_last)
    apart = encode_example(tokenizer, mixed, of_last._replace(overlong=OnOverflow.truncate))
    begins = [int(np.argmax(side.loss_mask)) for side in (own, apart)]
    if begins[0] != begins[1] or not np.array_equal(own.ids[: begins[0]], apart.ids[: begins[0]]):
        raise BadRow("the chat template writes the prompt differently for another answer")
    label = np.array([judged.label], own.ids.dtype)
    return own._replace(ids=np.append(own.ids, label), loss_mask=np.append(own.loss_mask, False)), apart


def _kept_length(turns: np.ndarray, rules: EncodingConfig) -> int:
    if rules.overlong is OnOverflow.truncate:
        return rules.max_length
    if rules.overlong is OnOverflow.drop:
        return 0
    return max((stop for _, stop in runs(turns) if stop <= rules.max_length), default=0)


def _checked(example: Example) -> Example:
    if not example.loss_mask[1:].any():  # the first token is nobody's target
        raise BadRow("no token to learn" + (" before data.seq_len" if example.truncated else ""))
    return example


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """[begin, end) of every stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def last_turn(said: np.ndarray) -> np.ndarray:
    """The mask of its last stretch alone."""
    kept = np.zeros_like(said)
    for begin, end in runs(said)[-1:]:
        kept[begin:end] = True
    return kept


def with_ends(ids: np.ndarray, said: np.ndarray, stop_ids: Sequence[int]) -> np.ndarray:
    """The mask with the token that ends a turn, where a template leaves it outside its marks: without it a model would
    never learn to stop."""
    said = said.copy()
    for _, end in runs(said):
        if end < len(ids) and int(ids[end]) in stop_ids and int(ids[end - 1]) not in stop_ids:
            said[end] = True
    return said


def texts_of(said: Said) -> list[str]:
    """What is said in it, for a tokenizer to be trained on."""
    if isinstance(said, Pair):
        return [*texts_of(said.chosen), *texts_of(said.rejected)]
    if isinstance(said, Labelled):
        return texts_of(said.said)
    if isinstance(said, UnpairedExample):
        return texts_of(said.conversation)
    if isinstance(said, Match):
        return list(said.texts)
    if isinstance(said, str):
        return [said]
    return [message["content"] for message in said.messages if message["content"]]


def marked_text(tokenizer: Tokenizer, ids: Sequence[int], learnt: Sequence[bool]) -> str:
    """The text of an example for people: special tokens by their names, what is learnt between ⟦ and ⟧."""
    names = {i: text for text, i in tokenizer.special_tokens.items()}
    text, begin = "", 0
    spoken = np.asarray(learnt, bool)
    for at in range(1, len(ids) + 1):
        here = int(ids[begin])
        same = at < len(ids) and spoken[at] == spoken[begin] and here not in names and int(ids[at]) not in names
        if same:
            continue
        opens = spoken[begin] and (begin == 0 or not spoken[begin - 1])
        closes = spoken[begin] and (at == len(ids) or not spoken[at])
        piece = names[here] if here in names else tokenizer.decode(list(map(int, ids[begin:at])))
        text += ("⟦" if opens else "") + piece + ("⟧" if closes else "")
        begin = at
    return text
