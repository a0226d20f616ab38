"""Tokenizers decode to the encoded text, and saved files are verified on load."""

import json
import re

import pytest

from data.records.chat_template import render
from data.tokenizers.kinds import (
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
from data.tokenizers.tokenizer import DESCRIPTION, fingerprint, first_difference

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
def test_decoding_restores_the_text(tokenizer, text):
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


def test_a_tokenizer_is_restored_from_its_files(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again is not None
    assert fingerprint(again) == fingerprint(tokenizer)
    assert again.encode(CODE) == tokenizer.encode(CODE)
    assert (again.eos_id, again.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)


def test_a_stream_never_shows_an_incomplete_character(tokenizer):
    stream = StreamDecoder(tokenizer)
    text = "né 日本 \U0001f600 x"
    pieces = [stream.push(i) for i in tokenizer.encode(text)] + [stream.flush()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_training_twice_gives_the_same_tokenizer():
    config = SentencePieceConfig(vocab_size=400)
    assert fingerprint(config.build(documents)) == fingerprint(config.build(documents))


def test_the_hf_tokenizer_reads_eos_from_tokenizer_config(hf_folder):
    found = TokenizerJsonConfig(path=str(hf_folder)).build(documents)
    assert found.eos_id == 0 and found.bos_id is None


def test_characters_cover_the_corpus_and_nothing_else():
    found = CharactersConfig().build(lambda: iter(["cab", "a\n"]))
    assert (found.vocab_size, found.eos_id) == (4, None)
    assert found.decode(found.encode("abc\n")) == "abc\n"
    with pytest.raises(ValueError, match="'z' is not in the training text"):
        found.encode("z")


def test_an_unknown_kind_of_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer.kind='magic'"):
        from_files({"tokenizer_config.json": b'{"kind": "magic"}'})


def test_a_missing_tokenizer_file_is_named():
    with pytest.raises(ValueError, match=r"tokenizer.path=nowhere.model"):
        SentencePieceConfig(path="nowhere.model").build(documents)


def test_bytes_have_an_end_of_document_token():
    assert Bytes().eos_id == 256 and Bytes().decode([104, 256, 105]) == "hi"


# Saved files


TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def altered(files, **changes):
    description = json.loads(files[DESCRIPTION])
    return {**files, DESCRIPTION: json.dumps(description | changes).encode()}


def test_the_policy_is_restored_from_the_files(tokenizer, tmp_path):
    given = tokenizer.with_policy(stop_ids=(5, 7), chat_template=TEMPLATE)
    save_tokenizer(given, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again is not None and again.policy == given.policy
    assert again.stop_ids == (again.eos_id, 5, 7)
    assert again.files() == given.files() and again.special_tokens == given.special_tokens
    assert first_difference(given, again) is None


def test_a_template_changes_no_prepared_data_and_a_bos_does(hf_folder):
    plain = TokenizerJsonConfig(path=str(hf_folder), bos="<|end|>").build(documents)
    assert fingerprint(plain.with_policy(chat_template=TEMPLATE, stop_ids=(3,))) == fingerprint(plain)
    assert fingerprint(plain.with_policy(add_bos=True)) != fingerprint(plain)
    assert first_difference(plain, plain.with_policy(chat_template=TEMPLATE)) == "chat_template"
    assert first_difference(plain, plain.with_policy(add_bos=True)) == "add_bos"
    assert first_difference(plain, Bytes()) == "vocabulary"


def test_files_without_a_policy_still_load(tokenizer):
    description = json.loads(tokenizer.files()[DESCRIPTION])
    old = {key: description[key] for key in ("kind", "special", "alphabet") if key in description}
    again = from_files({**tokenizer.own_files(), DESCRIPTION: json.dumps(old).encode()})
    assert fingerprint(again) == fingerprint(tokenizer) and again.policy == tokenizer.policy


def test_a_probe_with_other_ids_is_refused_with_both(tokenizer):
    files = tokenizer.files()
    probes = json.loads(files[DESCRIPTION])["probes"]
    probes[3]["ids"] = [1, 2, 3]
    with pytest.raises(ValueError, match=r"'0123456789.*' was encoded as \[1, 2, 3\] and is now \[\d+, .*was changed"):
        from_files(altered(files, probes=probes))


def test_another_version_of_the_library_is_the_likely_reason(hf_folder):
    files = TokenizerJsonConfig(path=str(hf_folder)).build(documents).files()
    probes = json.loads(files[DESCRIPTION])["probes"]
    assert from_files(altered(files, library="tokenizers 0.1")), "another version with the same ids is accepted"
    probes[0]["ids"] = [0]
    with pytest.raises(
        ValueError, match=r"saved with tokenizers 0.1, but tokenizers .* is installed: install tokenizers==0.1"
    ):
        from_files(altered(files, library="tokenizers 0.1", probes=probes))


def test_a_changed_file_is_named_with_what_it_changed(hf_folder):
    files = TokenizerJsonConfig(path=str(hf_folder)).build(documents).with_policy(chat_template=TEMPLATE).files()
    content = json.loads(files["tokenizer.json"])
    content["model"]["merges"] = content["model"]["merges"][:10]
    with pytest.raises(ValueError, match=r"was encoded as .* and is now .*; tokenizer.json was changed after"):
        from_files({**files, "tokenizer.json": json.dumps(content).encode()})
    with pytest.raises(ValueError, match=r"tokenizer.json was changed after it was saved"):
        from_files({**files, "tokenizer.json": b"no json"})
    with pytest.raises(ValueError, match=r"chat_template.jinja was changed after it was saved"):
        from_files({**files, "chat_template.jinja": b"x"})
    with pytest.raises(ValueError, match=r"chat_template.jinja is missing"):
        from_files({name: content for name, content in files.items() if name != "chat_template.jinja"})
    with pytest.raises(ValueError, match=r"eos_id was 1 and is now 0"):
        policy = json.loads(files[DESCRIPTION])["policy"]
        from_files(altered(files, policy=policy | {"eos_id": 1}))


def test_texts_of_special_tokens_are_matched_in_chats(tokenizer):
    text, i = next(iter(tokenizer.special_tokens.items()))
    chat = f"a{text}né \U0001f600{text}{text}"
    ids, characters = tokenizer.encode_special(chat)
    assert [at for token, at in zip(ids, characters, strict=True) if token == i] == [
        (m.start(), m.end()) for m in re.finditer(re.escape(text), chat)
    ]
    assert tokenizer.decode(ids) == "ané \U0001f600"
    assert tokenizer.encode_special(CODE).ids == tokenizer.encode(CODE)


def test_bos_is_prepended_once_if_the_policy_sets_it(hf_folder):
    found = TokenizerJsonConfig(path=str(hf_folder), bos="<|end|>").build(documents)
    assert found.add_bos_token([5]) == [5]
    with_bos = found.with_policy(add_bos=True)
    assert (
        with_bos.add_bos_token([5]) == [0, 5]
        and with_bos.add_bos_token([0, 5]) == [0, 5]
        and with_bos.add_bos_token([]) == [0]
    )
    with pytest.raises(ValueError, match=r"tokenizer.add_bos=true: this tokenizer has no BOS"):
        Bytes().with_policy(add_bos=True)


# Folders of published checkpoints


@pytest.fixture
def published(hf_folder, tmp_path):
    def write(**files):
        (tmp_path / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes())
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return TokenizerJsonConfig(path=str(tmp_path)).build(documents)

    return write


def test_a_published_folder_sets_bos_stop_ids_and_template(published):
    named = {"eos_token": {"content": "<|end|>"}, "bos_token": "<|end|>"}
    assert not published(tokenizer_config=named).add_bos, "its tokenizer.json does not prepend BOS"
    found = published(
        tokenizer_config=named | {"add_bos_token": True, "chat_template": TEMPLATE},
        generation_config={"eos_token_id": [7, 9]},
        config={"eos_token_id": 9},
    )
    assert (found.add_bos, found.stop_ids, found.chat_template) == (True, (0, 7, 9), TEMPLATE)


def test_the_post_processor_decides_whether_bos_is_added(published, hf_folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    published(tokenizer_config={})
    inner.save(str(tmp_path / "tokenizer.json"))
    assert TokenizerJsonConfig(path=str(tmp_path), bos="<|end|>").build(documents).add_bos
    assert not TokenizerJsonConfig(path=str(tmp_path)).build(documents).add_bos


def test_named_templates_become_one(published):
    listed = [
        {"name": "default", "template": "\nplain\n"},
        {"name": "tool_use", "template": "{% set x = 1 %}tools{{ x }}"},
    ]
    found = published(tokenizer_config={"chat_template": listed})
    messages = [{"role": "user", "content": "a"}]
    assert render(found.chat_template, messages, special_tokens={}) == "\nplain"
    assert render(found.chat_template, messages, tools=[], special_tokens={}) == "tools1"
    assert published(tokenizer_config={}, chat_template={"chat_template": "older"}).chat_template == "older"


def test_a_folder_with_sentencepiece_alone_is_read_with_its_added_tokens(tmp_path):
    own = SentencePieceConfig(vocab_size=400).build(documents)
    (tmp_path / "tokenizer.model").write_bytes(own.own_files()["tokenizer.model"])
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": own.vocab_size + 2}))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    found = SentencePieceConfig(path=str(tmp_path)).build(documents)
    assert found.vocab_size == own.vocab_size + 3 == len(found.token_bytes())
    assert found.chat_template == TEMPLATE and not found.add_bos
    ids = found.encode_special("the cat<|im_end|>").ids
    assert ids[-1] == own.vocab_size + 2 and found.decode(ids) == "the cat"
    assert from_files(found.files()).files() == found.files()


def test_the_tokenizer_folder_of_a_run_can_be_loaded(hf_folder, tmp_path):
    made = TokenizerJsonConfig(path=str(hf_folder)).build(documents).with_policy(chat_template=TEMPLATE)
    save_tokenizer(made, tmp_path)
    assert TokenizerJsonConfig(path=str(tmp_path)).build(documents).files() == made.files()
