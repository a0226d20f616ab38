"""How the parts of a run are put together where rows are cut over devices."""

import pytest
import yaml
from hydra import compose, initialize_config_module

from configs.schema import register, to_plain, to_typed
from launch.build import build_core
from launch.run_folder import RunFolder


@pytest.fixture(scope="module", autouse=True)
def hydra():
    register()
    with initialize_config_module("configs", version_base="1.3"):
        yield


def config(*changes):
    shared = ["model=tiny", "model.vocab_size=64", "mesh.data=2", "mesh.context=4", "data.seq_len=32"]
    return to_typed(compose("root", overrides=[*shared, *changes]))


@pytest.mark.parametrize(
    ("changes", "balanced"),
    [
        ([], True),
        (["objective=multi_token", "model.mtp_num_layers=1"], False),
        (["model.dropout=0.1"], False),
        (["model=tiny_moe", "model.moe.dispatch=capacity"], False),
        (["objective=preference", "data.format=preference"], False),
    ],
)
def test_rows_are_balanced_only_where_nothing_depends_on_their_order(changes, balanced):
    assert build_core(config(*changes), None).balanced is balanced


def test_a_length_that_does_not_cut_is_refused_before_anything_is_compiled():
    message = r"data\.seq_len=30: not divisible by mesh\.context=4, .* nearest valid: 28, 32; or mesh\.context=1 or 2"
    with pytest.raises(ValueError, match=message):
        build_core(config("data.seq_len=30"), None)


@pytest.mark.parametrize(("old", "new"), [("runs", "output_dir"), ("spikes", "loss_spikes")])
def test_a_run_folder_with_old_key_names_is_refused_with_a_way_out(tmp_path, old, new):
    saved = to_plain(config())
    saved[old] = saved.pop(new)
    folder = RunFolder(tmp_path / "a")
    folder.path.mkdir()
    folder.config.write_text(yaml.safe_dump(saved))
    with pytest.raises(ValueError, match=rf"a: config\.yaml: .*{old}.*convert from=RUN to=hf:FOLDER"):
        folder.saved_config()
