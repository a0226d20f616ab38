"""Tokenizers round-trip through a GGUF header with the same ids."""

import json
from pathlib import Path

import pytest

from data.tokenizers.gguf_tokenizer import NO_MERGE, PRE_TOKENIZERS, read_tokenizer, write_tokenizer
from data.tokenizers.kinds import Bytes, Characters, SentencePiece, SentencePieceConfig, TokenizerJson

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra tokenizers")

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizers"
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind: it's 1234567 years old.\n" * 20,
    "def add(a, b):\n    return a + b\n\n\nclass Thing:\n\tpass  # 3.14159\n" * 20,
    "Größe, naïve café; привет, мир! 今日は世界。 (hello) [world] {12}\r\n" * 20,
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "a",
    "  two spaces  and   more ",
    "\n\n\t mixed \n whitespace\r\n",
    "I'LL SAY it's THEIRS, don't you think? HelloWorld camelCase",
    "0 00 000 0000 12345678901234567890 3.5e-10 ½ ² Ⅷ",
    "emoji 🎉🧑‍🚀 and ẑ̷ combined ñ n\u0303, \u200bzero width",
    "العربية हिन्दी 한국어 日本語",
    "<|im_start|> <s> </s> <unk> [INST]",
]
LETTERS = tokenizers.pre_tokenizers.ByteLevel.alphabet()


@pytest.fixture(scope="module")
def pieces() -> SentencePiece:
    found = SentencePieceConfig(vocab_size=600).build(lambda: iter(CORPUS))
    assert isinstance(found, SentencePiece)
    return found


def byte_level(pre_tokenizer) -> TokenizerJson:
    """A tokenizer trained with one way of cutting text, as the tokenizers library builds it."""
    pre = tokenizers.pre_tokenizers
    steps = [pre.Digits(individual_digits=True)] if "digits" in pre_tokenizer.steps else []
    steps += [pre.Split(tokenizers.Regex(s), "isolated") for s in pre_tokenizer.steps if s not in ("digits", "gpt2")]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=pre_tokenizer.ignore_merges))
    inner.normalizer = tokenizers.normalizers.NFC() if pre_tokenizer.nfc else None
    inner.pre_tokenizer = pre.Sequence(
        [*steps, pre.ByteLevel(add_prefix_space=False, use_regex="gpt2" in pre_tokenizer.steps)]
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=LETTERS, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    return TokenizerJson(inner.to_str().encode(), {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|endoftext|>"})


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_tokenizers_round_trip_with_their_ids(name):
    before = byte_level(PRE_TOKENIZERS[name])
    header = write_tokenizer(before, before.vocab_size + 12)
    assert header["tokenizer.ggml.pre"] == name and header["tokenizer.ggml.model"] == "gpt2"
    assert len(header["tokenizer.ggml.tokens"]) == len(header["tokenizer.ggml.token_type"]) == before.vocab_size + 12
    after = read_tokenizer(header)
    assert after.vocab_size == before.vocab_size
    assert (after.bos_id, after.eos_id, after.pad_id) == (before.bos_id, before.eos_id, before.pad_id)
    for text in TEXTS:
        assert after.encode(text) == before.encode(text), text
        assert after.decode(after.encode(text)) == before.decode(before.encode(text))
    assert write_tokenizer(after, before.vocab_size + 12) == header
    assert (after.token_bytes() == before.token_bytes()).all()


def test_a_sentencepiece_model_round_trips_with_its_ids(pieces):
    header = write_tokenizer(pieces, 640)
    assert header["tokenizer.ggml.model"] == "llama" and not header["tokenizer.ggml.add_space_prefix"]
    after = read_tokenizer(header)
    assert (after.vocab_size, after.eos_id, after.bos_id) == (pieces.vocab_size, pieces.eos_id, None)
    for text in TEXTS[:-1]:  # in the last, only a tokenizer.json reads texts of special tokens as such
        assert after.encode(text) == pieces.encode(text), text
        assert after.decode(after.encode(text)) == text
    again = read_tokenizer(write_tokenizer(after, 640))
    assert all(again.encode(text) == after.encode(text) for text in TEXTS)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data")
def test_llama_2_round_trips_with_its_ids():
    before = SentencePiece((SHARED / "llama2" / "tokenizer.model").read_bytes())
    header = write_tokenizer(before, 32_000)
    assert header["tokenizer.ggml.add_space_prefix"]
    after = read_tokenizer(header)
    assert (after.bos_id, after.eos_id, after.vocab_size) == (1, 2, 32_000)
    for text in TEXTS[:-1]:
        assert after.encode(text) == before.encode(text), text
    scores = read_tokenizer(write_tokenizer(after, 32_000))
    assert all(scores.encode(text) == after.encode(text) for text in TEXTS)


def test_bytes_are_a_tokenizer_of_llama_cpp_too():
    header = write_tokenizer(Bytes(), 264)
    assert header["tokenizer.ggml.merges"] == [NO_MERGE] and header["tokenizer.ggml.tokens"][263] == "[PAD263]"
    after = read_tokenizer(header)
    assert after.vocab_size == 257 and after.eos_id == 256
    assert all(after.encode(text) == Bytes().encode(text) for text in TEXTS)


def test_texts_start_with_bos_if_the_header_sets_it():
    header = write_tokenizer(byte_level(PRE_TOKENIZERS["gpt-2"]), 500)
    assert header["tokenizer.ggml.add_bos_token"] is False
    after = read_tokenizer(header | {"tokenizer.ggml.add_bos_token": True})
    assert after.inner.encode("fox").ids == [after.bos_id, *after.encode("fox")]
    assert write_tokenizer(after, 500)["tokenizer.ggml.add_bos_token"] is True
    assert read_tokenizer(header).inner.encode("fox").ids == after.encode("fox")


def test_unsupported_tokenizers_are_refused_with_the_reason(pieces):
    header = write_tokenizer(pieces, pieces.vocab_size)
    for key, value, reason in (
        ("model", "bert", r"tokenizer\.ggml\.model=bert: not supported; known: gpt2, llama"),
        ("scores", None, r"tokenizer\.ggml\.scores: is missing"),
        ("tokens", ["a", "b", "a"], "holds 'a' twice"),
    ):
        changed = {**header, f"tokenizer.ggml.{key}": value}
        if key == "tokens":
            changed["tokenizer.ggml.token_type"] = [1, 1, 1]
        with pytest.raises(ValueError, match=reason):
            read_tokenizer(changed)
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre=chameleon: .* known: gpt-2, smollm"):
        read_tokenizer(write_tokenizer(Bytes(), 257) | {"tokenizer.ggml.pre": "chameleon"})
    with pytest.raises(
        ValueError, match=r"tokenizer\.kind=characters: llama\.cpp does not support it; try to=hf:FOLDER"
    ):
        write_tokenizer(Characters("abc"), 3)
    with pytest.raises(ValueError, match="has 257 tokens, but the embedding only 256 rows"):
        write_tokenizer(Bytes(), 256)
    found = byte_level(PRE_TOKENIZERS["gpt-2"])
    content = json.loads(found.content)
    content["pre_tokenizer"] = {"type": "Whitespace"}
    with pytest.raises(ValueError, match=r'pre_tokenizer \{"type": "Whitespace"\}: not supported by llama\.cpp'):
        write_tokenizer(TokenizerJson(json.dumps(content).encode(), found.special), 500)
    with pytest.raises(ValueError, match="has no EOS token"):
        write_tokenizer(TokenizerJson(found.content, {"bos": None, "eos": None, "pad": None}), 500)
