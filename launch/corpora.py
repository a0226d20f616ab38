"""Tokenizer and token shards of a run: built once by process 0, then read by every process."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from configs.schema import RunConfig, to_plain
from data.object_store import is_url
from data.records.chat_encoding import configured
from data.records.encoding import NOUNS, EncodingConfig, extract_texts, read_content
from data.records.record import BadRecords
from data.sources.readers import SourceConfig, SourceShard
from data.tokenize_shards import Manifest, ShardCache, TokenCorpus, read_manifest, shard_folder, tokenize_source
from data.tokenizers.kinds import build_tokenizer, load_tokenizer, save_tokenizer
from data.tokenizers.tokenizer import Tokenizer
from launch.multihost import Say, is_main_process, publish_files, sync_processes
from launch.run_folder import RunFolder, local_copy, write_whole


@dataclass(frozen=True)
class Corpora:
    """The tokenized sources of a run."""

    tokenizer: Tokenizer
    manifests: dict[str, Manifest]
    train: dict[str, TokenCorpus]
    validation: dict[str, TokenCorpus]  # validation split of each source that has one

    @property
    def bad_records(self) -> dict[str, Any]:
        """Unusable records by source, file and reason."""
        return {name: m.bad for name, m in self.manifests.items() if m.bad}


MADE_OF = "made_of.json"  # in a tokenizer folder: the settings and sources that it was trained on


def get_tokenizer(config: RunConfig, folder: RunFolder, say: Say) -> Tokenizer:
    """Returns the tokenizer in the run folder; without one, process 0 builds it from the config and the sources.

    It has the special tokens that the transform needs. A tokenizer that was built from other settings is rebuilt, as
    long as no checkpoint depends on it.
    """
    missing = partial(config.data.transform.missing_special_tokens, seq_len=config.data.seq_len)
    made_of = to_plain({"tokenizer": config.tokenizer, "sources": config.data.sources, "more": missing([])})
    note = folder.tokenizer / MADE_OF
    found = load_tokenizer(folder.tokenizer)
    stale = note.exists() and json.loads(note.read_text()) != made_of and not folder.has_checkpoints()
    sync_processes("tokenizer read")
    if (found is None or stale) and is_main_process():
        say(f"building the tokenizer: {config.tokenizer.kind}")
        made = configured(build_tokenizer(config.tokenizer, partial(_documents, config), missing), config.tokenizer)
        save_tokenizer(made, folder.tokenizer)
        write_whole(note, json.dumps(made_of, indent=1) + "\n")
    if found is None or stale:
        publish_files(folder, "tokenizer")
        found = load_tokenizer(folder.tokenizer)
    assert found is not None
    return found


def _documents(config: RunConfig) -> Iterator[str]:
    """Yields documents of all sources in turn, so that a tokenizer that reads only the first ones sees every source."""
    bad, rules = BadRecords(), config.data.encoding(config.objective.data_needs)  # counted when the source is prepared
    streams = [
        (text for unit in source.units() for text in _texts(source, unit, bad, rules))
        for source in config.data.sources.values()
    ]
    while streams:
        for stream in list(streams):
            document = next(stream, None)
            if document is None:
                streams.remove(stream)
            else:
                yield document


def _texts(source: SourceConfig, unit: SourceShard, bad: BadRecords, rules: EncodingConfig | None) -> Iterator[str]:
    if rules is None:
        return source.read(unit, bad)
    return (text for _, said in read_content(source, unit, bad, rules) for text in extract_texts(said))


def load_corpora(config: RunConfig, folder: RunFolder, say: Say) -> Corpora:
    """Loads the token shards of every source; process 0 tokenizes those that are missing.

    Raises: ValueError if a source has nothing to train on.
    """
    if not config.data.sources:
        raise ValueError("source=[]: name at least one source, for example source=[text]")
    tokenizer = get_tokenizer(config, folder, say)
    root, rules = prepared_root(config), config.data.encoding(config.objective.data_needs)
    prepared = {
        name: shard_folder(root, name, source, tokenizer, rules) for name, source in config.data.sources.items()
    }
    copies = ShardCache(prepared_url(config), root, list(prepared.values()))
    if is_main_process():
        copies.fetch()
        _prepare_all(config, tokenizer, root, say)
        copies.send()
    sync_processes("prepared")
    if not is_main_process():
        copies.fetch()
    manifests = {name: read_manifest(folder) for name, folder in prepared.items()}
    train = {name: TokenCorpus(manifest, "train") for name, manifest in manifests.items()}
    validation = {name: TokenCorpus(manifest, "validation") for name, manifest in manifests.items()}
    validation = {name: corpus for name, corpus in validation.items() if corpus.num_tokens}
    return Corpora(tokenizer, manifests, train, validation)


def prepared_root(config: RunConfig) -> Path:
    """Returns the folder of token shards; for an object store, that of the local copy."""
    url = prepared_url(config)
    return local_copy(url) if url else Path(config.data.cache_dir or Path(config.output_dir) / "prepared")


def prepared_url(config: RunConfig) -> str | None:
    """Returns the URL of the token shards, if they are in an object store."""
    if config.data.cache_dir is not None:
        return config.data.cache_dir if is_url(config.data.cache_dir) else None
    return f"{config.output_dir.rstrip('/')}/prepared" if is_url(config.output_dir) else None


def _prepare_all(config: RunConfig, tokenizer: Tokenizer, root: Path, say: Say) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console, rules = Console(), config.data.encoding(config.objective.data_needs)
    share = 1.0 if rules is None else config.data.max_bad_fraction
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        for name, source in config.data.sources.items():
            task = bar.add_task(f"tokenizing {name}", total=None, note="")

            def show(done: int, total: int, tokens: int, task: Any = task) -> None:
                bar.update(task, completed=done, total=total, note=f"{tokens:,} tokens")

            folder = shard_folder(root, name, source, tokenizer, rules)
            manifest = tokenize_source(source, tokenizer, folder, show, encoding=rules, max_bad_share=share)
            bad = sum(e["count"] for reasons in manifest.bad.values() for e in reasons.values())
            said = f"; {bad:,} bad records skipped, see summary.json" if bad else ""
            documents, tokens = manifest.count("train", "documents"), manifest.count("train", "tokens")
            held = TokenCorpus(manifest, "validation").num_tokens
            if rules is not None:
                cut = sum(manifest.count(split, "truncated") for split in ("train", "validation"))
                tokens_to = f"{tokens:,} tokens"
                if config.objective.model_needs.is_token_level:
                    tokens_to += f", {manifest.count('train', 'loss_tokens'):,} of them in the loss"
                ended = f"; {cut:,} truncated at data.seq_len={rules.max_length} (data.on_overflow)" if cut else ""
                noun = NOUNS.get(rules.format, rules.format.name)
                counted = f"{documents // rules.examples_per_record:,} {noun}, {tokens_to}"
                say(f"source {name}: {counted}, {held:,} for validation{ended}{said}")
                continue
            say(f"source {name}: {documents:,} documents, {tokens:,} tokens, {held:,} for validation{said}")
