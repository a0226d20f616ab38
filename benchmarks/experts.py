"""Grouped matmul benchmark, forward and backward, compared with XLA's `ragged_dot`.

    python benchmarks/experts.py [--repeats 5]

Group sizes are uneven, like those of a trained and of an untrained router with many experts. Alternating runs, medians;
results are compared first (relative to the largest). Each implementation runs once untimed before it is timed, because
the allocator state that `ragged_dot` leaves slows the next run.
"""

import argparse
import time
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

from models.grouped_matmul import block_size_for, grouped

# Rows, groups, width before and after.
SHAPES = [(4096, 8, 256, 512), (8192, 64, 512, 256), (32768, 64, 256, 128)]
UNEVEN = (8.0, 0.2)  # concentration of a Dirichlet distribution


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print("| rows | groups | product | dtype | largest group over mean | ragged_dot, ms | in turns, ms | ratio |")
    print("|---:|---:|---|---|---:|---:|---:|---:|")
    for (rows, groups, before, after), uneven in product(SHAPES, UNEVEN):
        rng = np.random.default_rng(0)
        sizes = jnp.asarray(rng.multinomial(rows, rng.dirichlet(np.full(groups, uneven))), jnp.int32)
        for dtype in (jnp.float32, jnp.bfloat16):
            x, kernel = (
                jnp.asarray(rng.standard_normal(shape), kind)
                for shape, kind in (((rows, before), dtype), ((groups, before, after), jnp.float32))
            )
            blocks = None, block_size_for(rows / groups, "cpu")
            ways = [jax.jit(jax.grad(partial(loss, sizes=sizes, block=block), (0, 1))) for block in blocks]
            compare(*(way(x, kernel) for way in ways))
            taken: list[list[float]] = [[], []]
            for _ in range(options.repeats):
                for way, seconds in zip(ways, taken, strict=True):
                    jax.block_until_ready(way(x, kernel))
                    start = time.perf_counter()
                    jax.block_until_ready(way(x, kernel))
                    seconds.append(1e3 * (time.perf_counter() - start))
            a, b = (float(np.median(seconds)) for seconds in taken)
            print(
                f"| {rows} | {groups} | {before} x {after} | {jnp.dtype(dtype).name} "
                f"| {float(sizes.max()) * groups / rows:.2f} | {a:.0f} | {b:.0f} | {a / b:.1f} |",
                flush=True,
            )


def loss(x: jax.Array, kernel: jax.Array, *, sizes: jax.Array, block: int | None) -> jax.Array:
    return jnp.square(grouped(x, kernel, sizes, x.dtype, block).astype(jnp.float32)).sum()


def compare(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        a, b = (np.asarray(each, np.float32) for each in (a, b))
        assert np.abs(a - b).max() <= (1e-5 if one[0].dtype == jnp.float32 else 2e-2) * np.abs(a).max()


if __name__ == "__main__":
    main()
