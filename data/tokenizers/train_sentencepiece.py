"""Trains a SentencePiece model on the text of a run."""

import io
from collections.abc import Iterable, Iterator, Sequence


def train_sentencepiece(
    documents: Iterable[str], *, vocab_size: int, limit: int, special_tokens: Sequence[str] = ()
) -> bytes:
    """Trains a BPE `tokenizer.model` with byte fallback and lossless decoding; returns its bytes.

    `limit`: maximum bytes of text to read. `special_tokens` become control tokens, never produced from text.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(documents, limit),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,  # every text can be encoded
        split_digits=True,
        allow_whitespace_only_pieces=True,  # indentation can be one token
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,  # decode(encode(x)) == x
        user_defined_symbols=["\n", "\t"],
        control_symbols=list(special_tokens),
        unk_id=0,
        bos_id=-1,
        eos_id=1,
        pad_id=-1,
        max_sentence_length=1 << 20,
        num_threads=1,  # the same model on every machine
        train_extremely_large_corpus=False,
        minloglevel=2,
    )
    return model.getvalue()


def _lines(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Yields lines: the trainer treats newlines as separators, and they have their own token."""
    seen = 0
    for document in documents:
        for line in document.split("\n"):
            if line:
                yield line.replace("\0", " ")
                seen += len(line.encode()) + 1
        if seen >= limit:
            return
