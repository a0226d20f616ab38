"""What a checkpoint stores of a state, and what is asked of it: the same leaves under the same names, keys as bits."""

from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from trainer.checkpoint.checksums import is_key

Tree = Any  # nested dicts, lists and tuples of arrays


def prng_free_spec(spec: Any) -> jax.ShapeDtypeStruct:
    """What is stored for a leaf: a typed random key is stored as its bits."""
    sharding = getattr(spec, "sharding", None)
    if sharding is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    bare = jax.ShapeDtypeStruct(spec.shape, spec.dtype)
    raw = jax.eval_shape(jax.random.key_data, bare) if is_key(spec) else bare
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)


def wrap_keys(spec: Any, array: jax.Array) -> jax.Array:
    if not is_key(spec):
        return array
    kinds: list[Any] = []  # the kind of key is told by tracers, but not by a ShapeDtypeStruct
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(spec.shape, spec.dtype))
    return jax.random.wrap_key_data(array, impl=kinds[0])


def shaped_like(stored: Tree, wanted: Tree) -> Tree:
    """`memory_from_error`, with lists (None where nothing is asked) wherever the checkpoint stores a list."""
    if isinstance(stored, list | tuple) and isinstance(wanted, dict):
        return [shaped_like(part, wanted[str(i)]) if str(i) in wanted else None for i, part in enumerate(stored)]
    if isinstance(stored, dict) and isinstance(wanted, dict):
        return {name: shaped_like(stored.get(name), part) for name, part in wanted.items()}
    return wanted


def check_structure(where: str, saved: dict[str, Any], wanted: dict[str, Any], *, whole: bool) -> None:
    problems = [f"{name} is missing there" for name in wanted if name not in saved]
    if whole:
        problems += [f"{name} is there and unknown here" for name in saved if name not in wanted]
    for name in wanted.keys() & saved.keys():
        there, here = saved[name], wanted[name]
        if tuple(there.shape) != tuple(here.shape):
            problems.append(f"{name} is {list(there.shape)} there and {list(here.shape)} here")
        elif whole and there.dtype != here.dtype:
            problems.append(f"{name} is {there.dtype} there and {here.dtype} here")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{where} was saved by another model or optimizer: {'; '.join(sorted(problems)[:3])}{more}; "
            "set the config back to that of the checkpoint, or begin another run"
        )
