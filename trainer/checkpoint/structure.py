"""Tree structure and dtypes of saved state; typed PRNG keys are stored as raw bits."""

from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from trainer.checkpoint.checksums import is_key

Tree = Any  # nested dicts, lists and tuples of arrays


def prng_free_spec(spec: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape, dtype and sharding stored for a leaf; a typed PRNG key is stored as its bits."""
    sharding = getattr(spec, "sharding", None)
    if sharding is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    bare = jax.ShapeDtypeStruct(spec.shape, spec.dtype)
    raw = jax.eval_shape(jax.random.key_data, bare) if is_key(spec) else bare
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)


def wrap_keys(spec: Any, array: jax.Array) -> jax.Array:
    """Turns restored bits back into a typed PRNG key where `spec` is one; returns other arrays unchanged."""
    if not is_key(spec):
        return array
    kinds: list[Any] = []  # a tracer knows the key implementation, a ShapeDtypeStruct does not
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(spec.shape, spec.dtype))
    return jax.random.wrap_key_data(array, impl=kinds[0])


def shaped_like(stored: Tree, wanted: Tree) -> Tree:
    """Returns `wanted` with lists where the checkpoint stores lists; entries that are not wanted are None."""
    if isinstance(stored, list | tuple) and isinstance(wanted, dict):
        return [shaped_like(part, wanted[str(i)]) if str(i) in wanted else None for i, part in enumerate(stored)]
    if isinstance(stored, dict) and isinstance(wanted, dict):
        return {name: shaped_like(stored.get(name), part) for name, part in wanted.items()}
    return wanted


def check_structure(where: str, saved: dict[str, Any], wanted: dict[str, Any], *, strict: bool) -> None:
    """Compares leaves by path. `strict`: extra saved leaves and other dtypes are errors, too.

    Raises: ValueError naming up to three leaves that differ.
    """
    problems = [f"{name} is missing in the checkpoint" for name in wanted if name not in saved]
    if strict:
        problems += [f"{name} exists only in the checkpoint" for name in saved if name not in wanted]
    for name in wanted.keys() & saved.keys():
        stored, expected = saved[name], wanted[name]
        if tuple(stored.shape) != tuple(expected.shape):
            problems.append(f"{name} has shape {list(stored.shape)}, this run expects {list(expected.shape)}")
        elif strict and stored.dtype != expected.dtype:
            problems.append(f"{name} has dtype {stored.dtype}, this run expects {expected.dtype}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{where} was saved by another model or optimizer: {'; '.join(sorted(problems)[:3])}{more}; "
            "restore the config of the checkpoint, or start a new run"
        )
