"""A published checkpoint in, trained on, and out again, from the command line."""

import json
import shutil

import numpy as np
import pytest

from tests.end_to_end.run import inspect, losses, meshwright, metrics

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers", reason="the oracle needs transformers and torch")
torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "the cat sat on the mat and the dog ran after the cat while the old man read a book by the river. " * 40


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    config = transformers.LlamaConfig(
        vocab_size=304,  # padded beyond the tokenizer's
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    fast.save_pretrained(folder)
    return folder


def tensors(folder):
    from safetensors.numpy import load_file

    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def test_in_and_out_again_is_exact_and_writes_the_same_text(published, tmp_path):
    out, _ = meshwright(tmp_path, "convert", f"from=hf:{published}", "to=llama")
    assert "all tensors bit-identical" in out
    out, _ = meshwright(tmp_path, "convert", "from=llama", f"to=hf:{tmp_path / 'back'}")
    assert "LlamaForCausalLM" in out and "bfloat16" in out
    before, after = tensors(published), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[n].view(np.uint16), after[n].view(np.uint16)) for n in before)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    prompt = tokenizer("the cat", return_tensors="pt")
    want = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :].tolist()
    # The run keeps its weights in f32; so that near-ties fall alike it is asked to compute in f32, too.
    config = tmp_path / "runs" / "llama" / "config.yaml"
    config.write_text(config.read_text().replace("  dtype: bfloat16", "  dtype: float32"))
    arguments = ["run=llama", "prompt=the cat", "task.temperature=0", "task.max_new_tokens=20", "format=json"]
    out, _ = meshwright(tmp_path, "generate", *arguments)
    assert json.loads(out)["tokens"] == want


def test_training_begins_from_it_with_its_model_and_tokenizer(published, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 20)
    common = ["source=[text]", f"data.sources.text.paths=[{tmp_path / 'text.txt'}]", "data.batch_size=4"]
    common += ["data.seq_len=32", "task.sample_tokens=0", "schedule.warmup_steps=0", "optimizer.learning_rate=1e-3"]
    origin = f"init_from=hf:{published}"
    meshwright(tmp_path, "train", "run=tuned", origin, *common, "task.num_steps=4", "model.remat=full")
    config = (tmp_path / "runs" / "tuned" / "config.yaml").read_text()
    assert "embed_dim: 64" in config and "remat: full" in config and "kind: tokenizer_json" in config
    meshwright(tmp_path, "train", "run=tuned", origin, *common, "task.num_steps=8", "model.remat=full")  # it resumes
    assert sorted(losses(tmp_path, "tuned")) == list(range(1, 9))
    assert any("eval/text/loss" in row for row in metrics(tmp_path, "tuned"))
    meshwright(tmp_path, "convert", f"from=hf:{published}", "to=llama")
    meshwright(tmp_path, "train", "run=same", "init_from=llama", *common, "task.num_steps=4")
    assert losses(tmp_path, "same")[1] == pytest.approx(losses(tmp_path, "tuned")[1], rel=1e-3)
    assert inspect(tmp_path, "llama")["step"] == 0
    meshwright(tmp_path, "convert", "from=tuned", f"to=hf:{tmp_path / 'tuned'}", "task.dtype=float32")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")


def test_a_chat_template_and_stop_tokens_go_in_and_out(published, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(published, source)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>\n{% endfor %}"
    template += "{% if add_generation_prompt %}a:{% endif %}"
    (source / "chat_template.jinja").write_text(template)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 70], "temperature": 0.5}))
    meshwright(tmp_path, "convert", f"from=hf:{source}", "to=chat")
    out, _ = meshwright(tmp_path, "generate", "run=chat", "chat=the cat", "task.max_new_tokens=3", "format=json")
    assert json.loads(out)["prompt"] == "user: the cat<end>\na:"
    meshwright(tmp_path, "convert", "from=chat", f"to=hf:{tmp_path / 'back'}")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back.chat_template == template and back.eos_token == "<end>"
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == {
        "bos_token_id": None,
        "eos_token_id": [0, 70],
        "pad_token_id": None,
        "temperature": 0.5,
    }
    meshwright(tmp_path, "convert", f"from=hf:{published}", "to=plain", "tokenizer.chat_template=plain")
    meshwright(tmp_path, "convert", "from=plain", f"to=hf:{tmp_path / 'given'}")
    given = transformers.AutoTokenizer.from_pretrained(tmp_path / "given")
    chat = given.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    assert chat == "User: a\n\nAssistant:"


def test_mistakes_are_named(published, tmp_path):
    _, err = meshwright(tmp_path, "convert", "from=hf:nowhere", "to=x", expect=2)
    assert "config.json not found" in err
    _, err = meshwright(tmp_path, "convert", f"from=hf:{published}", f"to=hf:{tmp_path}", expect=2)
    assert "from=hf:FOLDER to=RUN" in err
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((published / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    _, err = meshwright(tmp_path, "convert", f"from=hf:{pickled}", "to=x", expect=2)
    assert "pytorch_model.bin is a pickle, which can execute code and is never opened" in err
    assert not (tmp_path / "runs" / "x" / "config.yaml").exists()
