"""`meshwright prepare`: trains the tokenizer and writes token shards ahead of training."""

from pathlib import Path

from configs.schema import RunConfig
from launch.corpora import load_corpora
from launch.inherit_config import inherit_model_config, inherit_tokenizer
from launch.multihost import is_main_process
from launch.run_folder import run_folder


def run(config: RunConfig, overrides: list[str]) -> int:
    """Prepares missing data; `train` with the same run name, sources and tokenizer reuses it."""
    folder, say = run_folder(config), lambda text: print(text, flush=True) if is_main_process() else None
    config = inherit_model_config(config, overrides, folder, say)
    inherit_tokenizer(config, overrides, folder, say)
    corpora = load_corpora(config, folder, say)
    if is_main_process():
        for name, manifest in corpora.manifests.items():
            print(f"{name}: {Path(manifest.folder) / 'manifest.json'}")
            for file, reasons in manifest.bad.items():
                for reason, entry in reasons.items():
                    print(f"  skipped: {file}: {reason}, {entry['count']} times; first: {entry['first'] or 'the file'}")
    return 0
