"""Tokenizers give back the text that they were given."""

import json

import pytest

from data.tokenizer import (
    Bytes,
    BytesConfig,
    CharactersConfig,
    SentencePieceConfig,
    StreamDecoder,
    TokenizerJsonConfig,
    from_files,
    load_tokenizer,
    save_tokenizer,
)
from data.tokenizer_contract import fingerprint

CODE = 'def f(x):\n\treturn  x +  1\n\n\nclass A:\n    """Doc."""\n\n    y = [1, 23]  \n'
TEXTS = [CODE, "  two spaces", "a\n\nb", "日本語 und Ümläute", "\U0001f600 emoji\n", "", "</s> <unk> [PAD]"]


def documents():
    return iter([CODE * 20, "the cat sees the tree. " * 50])


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    inner.train_from_iterator(documents(), trainer)
    folder = tmp_path_factory.mktemp("hf")
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    return folder


@pytest.fixture(scope="module", params=["sentencepiece", "bytes", "tokenizer_json"])
def tokenizer(request, hf_folder):
    config = {
        "sentencepiece": SentencePieceConfig(vocab_size=400),
        "bytes": BytesConfig(),
        "tokenizer_json": TokenizerJsonConfig(path=str(hf_folder)),
    }[request.param]
    return config.build(documents)


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_back_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_add_up_to_the_bytes_of_the_text(tokenizer, text):
    assert sum(tokenizer.token_bytes()[tokenizer.encode(text)]) == len(text.encode())


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_tokens_are_the_bytes_of_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.piece, ids)).decode().removeprefix(" ") == text.removeprefix(" ")
    assert [len(tokenizer.piece(i)) for i in ids] == tokenizer.token_bytes()[ids].tolist()
    assert all(tokenizer.piece(i) == b"" for i in tokenizer.special_tokens.values())


def test_a_batch_is_encoded_as_its_texts_are(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_a_tokenizer_comes_back_from_its_files(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again is not None
    assert fingerprint(again) == fingerprint(tokenizer)
    assert again.encode(CODE) == tokenizer.encode(CODE)
    assert (again.eos_id, again.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)


def test_a_stream_never_shows_half_a_character(tokenizer):
    stream = StreamDecoder(tokenizer)
    text = "né 日本 \U0001f600 x"
    pieces = [stream.push(i) for i in tokenizer.encode(text)] + [stream.flush()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_training_twice_gives_the_same_tokenizer():
    config = SentencePieceConfig(vocab_size=400)
    assert fingerprint(config.build(documents)) == fingerprint(config.build(documents))


def test_the_hf_tokenizer_takes_eos_from_the_file_beside_it(hf_folder):
    found = TokenizerJsonConfig(path=str(hf_folder)).build(documents)
    assert found.eos_id == 0 and found.bos_id is None


def test_characters_cover_the_corpus_and_nothing_else():
    found = CharactersConfig().build(lambda: iter(["cab", "a\n"]))
    assert (found.vocab_size, found.eos_id) == (4, None)
    assert found.decode(found.encode("abc\n")) == "abc\n"
    with pytest.raises(ValueError, match="'z' did not occur"):
        found.encode("z")


def test_an_unknown_kind_of_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer.kind='magic'"):
        from_files({"tokenizer_config.json": b'{"kind": "magic"}'})


def test_a_missing_tokenizer_file_is_named():
    with pytest.raises(ValueError, match=r"tokenizer.path=nowhere.model"):
        SentencePieceConfig(path="nowhere.model").build(documents)


def test_bytes_end_documents_with_a_token_of_their_own():
    assert Bytes().eos_id == 256 and Bytes().decode([104, 256, 105]) == "hi"
