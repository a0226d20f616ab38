"""What a command and its experiment choose, and what init_from may bring along therefore."""

from launch.inherit_config import with_experiment


def test_what_an_experiment_chooses_comes_before_the_command():
    assert with_experiment(["run=a"]) == ["run=a"]
    assert with_experiment(["experiment=nobody"]) == ["experiment=nobody"], "Hydra names it"
    hello = with_experiment(["experiment=hello", "tokenizer.vocab_size=9"])
    assert {"model=hello", "tokenizer=sentencepiece", "optimizer=muon"} <= set(hello)
    assert hello.index("tokenizer.vocab_size=2048") < hello.index("tokenizer.vocab_size=9")


def test_an_experiment_without_a_model_leaves_it_to_init_from():
    named = {override.partition("=")[0] for override in with_experiment(["experiment=sft_smollm2"])}
    assert "model" not in named and "tokenizer" not in named and "tokenizer.chat_template" in named
