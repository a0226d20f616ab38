"""SHA-256 of checkpoint files (to detect damage) and of states in memory (to compare runs bit for bit)."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

DIGESTS = "digests.json"
# Orbax writes the last two at commit time, after the digests, and does not read them on restore.
_UNCHECKED = {DIGESTS, DIGESTS + ".tmp", "_CHECKPOINT_METADATA", "commit_success.txt"}
_CHUNK = 1 << 22  # bytes per read


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _hash_all(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        return dict(zip(names, pool.map(lambda name: _sha256(folder / name), names), strict=True))


def write_digests(folder: Path) -> None:
    """Writes `digests.json` into `folder`: size and SHA-256 of each file below it."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = [name for name in names if name not in _UNCHECKED]
    hashes = _hash_all(folder, names)
    content = {name: {"bytes": (folder / name).stat().st_size, "sha256": hashes[name]} for name in names}
    half = folder / (DIGESTS + ".tmp")
    half.write_text(json.dumps({"algorithm": "sha256", "files": content}, indent=1))
    os.replace(half, folder / DIGESTS)


def verify_digests(folder: Path) -> str | None:
    """Returns the first difference from `digests.json`, naming the file; None if all files match."""
    try:
        files = json.loads((folder / DIGESTS).read_text())["files"]
        sizes = {name: int(entry["bytes"]) for name, entry in files.items()}
        hashes = {name: str(entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{DIGESTS} cannot be read"
    for name, size in sizes.items():  # cheap checks first
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    for name, now in _hash_all(folder, list(hashes)).items():
        if now != hashes[name]:
            return f"{name} does not match its SHA-256"
    return None


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf, or its spec, is a typed PRNG key."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_data(leaf: Any) -> Any:
    """Returns the bits of a typed PRNG key, and any other leaf unchanged."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def leaf_paths(tree: Any) -> dict[str, Any]:
    """Returns leaves by path (`params.layers.mlp.up`), the same for a NamedTuple and its Orbax form."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def state_hash(tree: Any) -> str:
    """Returns the SHA-256 over path, dtype, shape and little-endian bytes of all leaves, sorted by path.

    Independent of the mesh and the number of processes; every process must call it. Gathers one leaf at a time to the
    host.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(leaf_paths(tree).items()):
        name = str(leaf.dtype) if hasattr(leaf, "dtype") else str(np.asarray(leaf).dtype)
        array = on_host(key_data(leaf))
        digest.update(f"{path}\0{name}\0{','.join(map(str, array.shape))}\0".encode())
        digest.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).tobytes())
    return digest.hexdigest()


def on_host(leaf: Any) -> np.ndarray:
    """Returns the full (unsharded) array on every process."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)
