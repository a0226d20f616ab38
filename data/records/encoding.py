"""Encodes records as examples: token ids and a loss mask.

An example never exceeds a row, so no answer is trained on without its question. `data.loss_mask` selects the tokens
that contribute to the loss; `data.on_overflow` decides how longer conversations are handled.

Shape letters: L tokens of an example.
"""

import enum
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.records.chat_encoding import encode_chat
from data.records.chat_formats import Conversation, InvalidRecord, count_bad, read_conversations
from data.records.labels import Labelled, Match, read_labelled, read_matches
from data.records.preference_pairs import Pair, read_pairs
from data.records.record import BadRecords, Record
from data.records.unpaired_preference import UnpairedExample, pair_with_next, read_unpaired
from data.sources.readers import SourceConfig, SourceShard
from data.tokenizers.tokenizer import Tokenizer


class DataFormat(enum.Enum):
    """Record type of all sources; the named modules list the accepted fields."""

    text = "text"  # plain documents; every token contributes to the loss
    chat = "chat"  # conversations (data.records.chat_formats); data.loss_mask selects the tokens of the loss
    unpaired_preference = "unpaired_preference"  # a completion labeled good or bad (data.records.unpaired_preference)
    preference = "preference"  # a chosen and a rejected answer to one prompt (data.records.preference_pairs)
    classification = "classification"  # a text or conversation and its class (data.records.labels)
    retrieval = "retrieval"  # an anchor, a positive and optional negatives (data.records.labels)


NOUNS = {  # plural noun for the records of a format, in log lines
    DataFormat.text: "documents",
    DataFormat.chat: "conversations",
    DataFormat.unpaired_preference: "completions",
    DataFormat.preference: "pairs",
    DataFormat.classification: "texts",
    DataFormat.retrieval: "matches",
}


class LossMask(enum.Enum):
    """Tokens of a conversation that contribute to the loss."""

    assistant = "assistant"  # all assistant turns, including their end-of-turn tokens
    last_turn = "last_turn"  # only the last assistant turn
    all = "all"  # every token, as in pretraining


class OnOverflow(enum.Enum):
    """Handling of conversations longer than `data.seq_len`."""

    truncate_turns = "truncate_turns"  # truncate after the last complete turn; drop the conversation if none fits
    truncate = "truncate"  # truncate at seq_len tokens, even within an answer, which then has no end of turn
    drop = "drop"  # drop the conversation


@dataclass(frozen=True)
class DataNeeds:
    """What an objective needs of records and of the rows made from them."""

    formats: tuple[DataFormat, ...] = (DataFormat.text, DataFormat.chat)  # valid data.format
    phase: str | None = None  # the preset that sets objective and records together
    transform: str | None = None  # kind of the transform that makes the targets; None: targets are next tokens
    margins: bool = False  # pairs say how much better the chosen answer is: column `margin`
    pairs_per_row: int = 1  # at most; 1: each pair is padded to a row of its own
    num_negatives: int = 0  # further texts of each match

    @property
    def texts(self) -> int:
        """Texts of one record, each a side of a row: fields [B, texts, L], or [B, L] of one."""
        return examples_per_record(self.formats[0], self.num_negatives)

    @property
    def columns(self) -> dict[str, tuple[int, ...]]:
        """Shape in one row of each f32 column that comes with the records."""
        margins = {"margin": (self.pairs_per_row,)} if self.margins else {}
        return margins | ({"label": ()} if DataFormat.unpaired_preference in self.formats else {})


NO_NEEDS = DataNeeds()


class EncodingConfig(NamedTuple):
    """Encoding of records as examples."""

    loss_mask: LossMask
    on_overflow: OnOverflow
    max_length: int  # tokens
    format: DataFormat = DataFormat.chat
    classes: tuple[str, ...] = ()  # of labelled records
    margins: bool = False  # pairs say how much better the chosen answer is
    negatives: int = 0  # further texts of a match

    @property
    def examples_per_record(self) -> int:
        """Number of examples per record; they are never split up."""
        return examples_per_record(self.format, self.negatives)


def examples_per_record(format: DataFormat, negatives: int = 0) -> int:
    """Returns the number of examples per record; they are never split up."""
    return {DataFormat.preference: 2, DataFormat.unpaired_preference: 2, DataFormat.retrieval: 2 + negatives}.get(
        format, 1
    )


class Example(NamedTuple):
    ids: np.ndarray  # [L] i32
    loss_mask: np.ndarray  # [L] bool: tokens that contribute to the loss as targets; never only the first
    truncated: bool = False
    value: float = 0.0  # margin of a preference pair


Content = Conversation | Pair | Labelled | Match | str


def read_content(
    source: SourceConfig, unit: SourceShard, bad: BadRecords, encoding: EncodingConfig
) -> Iterator[tuple[Record, Content]]:
    """Yields every usable record of a shard with its parsed content; counts the others in `bad`."""
    if encoding.format is DataFormat.preference:
        return read_pairs(source, unit, bad, margins=encoding.margins)
    if encoding.format is DataFormat.classification:
        return read_labelled(source, unit, bad, encoding.classes)
    if encoding.format is DataFormat.retrieval:
        return read_matches(source, unit, bad, encoding.negatives)
    if encoding.format is DataFormat.unpaired_preference:
        return read_unpaired(source, unit, bad)
    return read_conversations(source, unit, bad)


def read_examples(
    source: SourceConfig, unit: SourceShard, bad: BadRecords, tokenizer: Tokenizer, encoding: EncodingConfig
) -> Iterator[tuple[Content, tuple[Example, ...]]]:
    """Yields the content of every usable record with its `examples_per_record` examples; counts the others in `bad`.

    Raises: ValueError at the first conversation if the tokenizer has no chat template.
    """
    if encoding.format is DataFormat.unpaired_preference:
        yield from _unpaired_examples(source, unit, bad, tokenizer, encoding)
        return
    for record, content in read_content(source, unit, bad, encoding):
        first = (
            content.chosen
            if isinstance(content, Pair)
            else content.content
            if isinstance(content, Labelled)
            else content
        )
        if isinstance(first, Conversation) and tokenizer.chat_template is None:
            encode_chat(tokenizer, first.messages)  # raises with instructions
        try:
            yield content, encode_content(tokenizer, content, encoding)
        except InvalidRecord as error:
            count_bad(bad, record, error)
        except ValueError as error:
            count_bad(bad, record, _refused(error))


def _unpaired_examples(
    source: SourceConfig, unit: SourceShard, bad: BadRecords, tokenizer: Tokenizer, encoding: EncodingConfig
) -> Iterator[tuple[Conversation, tuple[Example, Example]]]:
    """Yields each prompt with its two examples; the prompt keeps all of its completions in one split."""
    for record, unpaired, other in pair_with_next(read_unpaired(source, unit, bad)):
        conversation = unpaired.conversation
        if tokenizer.chat_template is None:
            encode_chat(tokenizer, conversation.messages)  # raises with instructions
        try:
            if other is None:
                raise InvalidRecord("no other record to take a mismatched completion from")
            yield (
                conversation._replace(messages=conversation.messages[:-1]),
                encode_unpaired(tokenizer, unpaired, other, encoding),
            )
        except InvalidRecord as error:
            count_bad(bad, record, error)
        except ValueError as error:
            count_bad(bad, record, _refused(error))


def encode_content(tokenizer: Tokenizer, content: Content, encoding: EncodingConfig) -> tuple[Example, ...]:
    """Encodes the content of a record as `examples_per_record` examples. Raises: as `encode_example`."""
    if isinstance(content, Pair):
        return encode_pair(tokenizer, content, encoding)
    if isinstance(content, Labelled):
        return (encode_labelled(tokenizer, content, encoding),)
    if isinstance(content, Match):
        return tuple(encode_full_text(tokenizer, text, encoding) for text in content.texts)
    return (encode_example(tokenizer, content, encoding),)


def encode_full_text(tokenizer: Tokenizer, content: Conversation | str, encoding: EncodingConfig) -> Example:
    """Encodes a text or conversation for pooling: the loss mask selects only its last token.

    With `data.on_overflow=truncate` a longer text is truncated but keeps its end token.
    Raises: BadRow if it is empty, or too long with another `data.on_overflow`; ValueError as `encode_chat`.
    """
    if isinstance(content, str):
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        ids = np.array(tokenizer.add_bos_token(tokenizer.encode(content)) + end, np.int32)
    else:
        ids, _ = encode_chat(tokenizer, content.messages, tools=content.tools)
        end = ids[-1:].tolist()
    long = len(ids) > encoding.max_length
    if long and encoding.on_overflow is not OnOverflow.truncate:
        raise InvalidRecord(f"longer than data.seq_len={encoding.max_length}", f"{len(ids)} tokens")
    if long:
        ids = np.concatenate([ids[: encoding.max_length - len(end)], np.array(end, np.int32)])
    if not len(ids):
        raise InvalidRecord("empty document")
    return Example(ids, np.arange(len(ids)) == len(ids) - 1, long)


def encode_labelled(tokenizer: Tokenizer, labelled: Labelled, encoding: EncodingConfig) -> Example:
    """Encodes a text followed by its class, which is the target of the last token. Raises: as `encode_whole`."""
    ids, _, truncated, _ = encode_full_text(tokenizer, labelled.content, encoding)
    ids = np.append(ids, np.int32(labelled.label))
    return Example(ids, np.arange(len(ids)) == len(ids) - 1, truncated)


def _refused(error: ValueError) -> InvalidRecord:
    # Errors of templates and tokenizers include the position, which would make every reason unique.
    return InvalidRecord(re.sub(r"messages\[\d+\]", "a message", str(error))[:160], str(error)[:300])


def encode_example(tokenizer: Tokenizer, conversation: Conversation | str, encoding: EncodingConfig) -> Example:
    """Encodes a conversation with its loss mask, or a text as a pretraining document.

    A text may have any length: packing cuts it.
    Raises: BadRow if no token contributes to the loss; ValueError as `encode_chat`.
    """
    if isinstance(conversation, str):
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        ids = np.array(tokenizer.add_bos_token(tokenizer.encode(conversation)) + end, np.int32)
        return _checked(Example(ids, np.ones(len(ids), bool)))
    ids, assistant = encode_chat(tokenizer, conversation.messages, tools=conversation.tools)
    assistant = with_ends(ids, assistant, tokenizer.stop_ids)
    mask = {
        LossMask.assistant: assistant,
        LossMask.last_turn: last_turn(assistant),
        LossMask.all: np.ones(len(ids), bool),
    }[encoding.loss_mask]
    if len(ids) <= encoding.max_length:
        return _checked(Example(ids, mask))
    turns = assistant if encoding.loss_mask is LossMask.all else mask
    length = _truncated_length(turns, encoding)
    if not length:
        raise InvalidRecord(f"longer than data.seq_len={encoding.max_length}", f"{len(ids)} tokens")
    return _checked(Example(ids[:length], mask[:length], truncated=True))


def encode_pair(tokenizer: Tokenizer, pair: Pair, encoding: EncodingConfig) -> tuple[Example, Example]:
    """Encodes both answers of a preference pair; the loss mask selects the last turn, the prompt ids are equal.

    If one answer exceeds a row, the pair is dropped; with data.on_overflow=truncate both are truncated.
    Raises: BadRow if the answers cannot be compared; ValueError as `encode_chat`.
    """
    on_overflow = encoding.on_overflow if encoding.on_overflow is OnOverflow.truncate else OnOverflow.drop
    of_last = encoding._replace(loss_mask=LossMask.last_turn, on_overflow=on_overflow)
    chosen, rejected = (encode_example(tokenizer, side, of_last) for side in (pair.chosen, pair.rejected))
    starts = [int(np.argmax(side.loss_mask)) for side in (chosen, rejected)]
    if starts[0] != starts[1] or not np.array_equal(chosen.ids[: starts[0]], rejected.ids[: starts[0]]):
        raise InvalidRecord("the chat template renders the prompt differently for the two answers")
    if np.array_equal(chosen.ids, rejected.ids):
        raise InvalidRecord("chosen equals rejected" + (" before data.seq_len" if chosen.truncated else ""))
    return chosen._replace(value=pair.margin), rejected


def encode_unpaired(
    tokenizer: Tokenizer, unpaired: UnpairedExample, other: UnpairedExample, encoding: EncodingConfig
) -> tuple[Example, Example]:
    """Encodes a prompt with its own completion, and with that of `other`, truncated to fit a row.

    The first example ends with one extra id, the label (1 desirable, 0 undesirable); it is masked out of the loss.
    Raises: BadRow if the completions cannot be compared; ValueError as `encode_chat`.
    """
    conversation, answer = unpaired.conversation, other.conversation.messages[-1]
    mixed = conversation._replace(messages=[*conversation.messages[:-1], answer])
    on_overflow = encoding.on_overflow if encoding.on_overflow is OnOverflow.truncate else OnOverflow.drop
    of_last = encoding._replace(loss_mask=LossMask.last_turn, on_overflow=on_overflow)
    own = encode_example(tokenizer, conversation, of_last)
    mismatched = encode_example(tokenizer, mixed, of_last._replace(on_overflow=OnOverflow.truncate))
    starts = [int(np.argmax(side.loss_mask)) for side in (own, mismatched)]
    if starts[0] != starts[1] or not np.array_equal(own.ids[: starts[0]], mismatched.ids[: starts[0]]):
        raise InvalidRecord("the chat template renders the prompt differently for another answer")
    label = np.array([unpaired.label], own.ids.dtype)
    return own._replace(ids=np.append(own.ids, label), loss_mask=np.append(own.loss_mask, False)), mismatched


def _truncated_length(turns: np.ndarray, encoding: EncodingConfig) -> int:
    if encoding.on_overflow is OnOverflow.truncate:
        return encoding.max_length
    if encoding.on_overflow is OnOverflow.drop:
        return 0
    return max((stop for _, stop in runs(turns) if stop <= encoding.max_length), default=0)


def _checked(example: Example) -> Example:
    if not example.loss_mask[1:].any():  # the first token is never a target
        raise InvalidRecord("no token contributes to the loss" + (" before data.seq_len" if example.truncated else ""))
    return example


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Returns [start, stop) of every run of True values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def last_turn(mask: np.ndarray) -> np.ndarray:
    """Returns the mask restricted to its last run."""
    last = np.zeros_like(mask)
    for start, stop in runs(mask)[-1:]:
        last[start:stop] = True
    return last


def with_ends(ids: np.ndarray, mask: np.ndarray, stop_ids: Sequence[int]) -> np.ndarray:
    """Extends each turn of the mask to its end token if the chat template leaves it out.

    Without that token in the loss a model would not learn to stop.
    """
    mask = mask.copy()
    for _, stop in runs(mask):
        if stop < len(ids) and int(ids[stop]) in stop_ids and int(ids[stop - 1]) not in stop_ids:
            mask[stop] = True
    return mask


def extract_texts(content: Content) -> list[str]:
    """Returns the texts of a record, for tokenizer training."""
    if isinstance(content, Pair):
        return [*extract_texts(content.chosen), *extract_texts(content.rejected)]
    if isinstance(content, Labelled):
        return extract_texts(content.content)
    if isinstance(content, UnpairedExample):
        return extract_texts(content.conversation)
    if isinstance(content, Match):
        return list(content.texts)
    if isinstance(content, str):
        return [content]
    return [message["content"] for message in content.messages if message["content"]]


def marked_text(tokenizer: Tokenizer, ids: Sequence[int], loss_mask: Sequence[bool]) -> str:
    """Renders an example for display: special tokens by name, tokens of the loss between ⟦ and ⟧."""
    names = {i: text for text, i in tokenizer.special_tokens.items()}
    text, start = "", 0
    mask = np.asarray(loss_mask, bool)
    for at in range(1, len(ids) + 1):
        first = int(ids[start])
        same = at < len(ids) and mask[at] == mask[start] and first not in names and int(ids[at]) not in names
        if same:
            continue
        opens = mask[start] and (start == 0 or not mask[start - 1])
        closes = mask[start] and (at == len(ids) or not mask[at])
        piece = names[first] if first in names else tokenizer.decode(list(map(int, ids[start:at])))
        text += ("⟦" if opens else "") + piece + ("⟧" if closes else "")
        start = at
    return text
