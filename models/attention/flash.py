"""Blockwise (flash) attention in XLA operations, on one device or as ring attention over sharded rows.

The scores of a full row are never materialized: each block of queries processes the keys block by block, with a running
maximum, sum and output (Milakov & Gimelshein 2018; FlashAttention-2, Dao 2023 [2307.08691], algorithms 1 and 2). The
backward pass saves the output and the logsumexp of the scores, and recomputes the scores. In a ring, keys and values
rotate between devices while each device computes on its current shard (Ring Attention, Liu et al. 2023 [2310.01889]).

Masks are computed for each pair of blocks from positions and segments, which rotate with the keys. The order of tokens
in a row therefore does not matter, and pairs of blocks without a visible key are skipped.

Shape letters: B batch, L length, S key length, N query heads, K kv heads, G queries of a kv head (N = K G), H head dim,
W width of values, I blocks of queries of U each, J blocks of keys of T each.
"""

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.attention.kernels import kernel_attention
from models.attention.ops import F32, HIDDEN, OnlineSoftmax, attention, attention_mask
from models.config import AttentionImplementation, ContextParallel
from models.logical_axes import Cut, ShardingConstraint
from models.matmul import einsum_f32
from models.remat import checkpoint_name, checkpoint_name_fwd

MAX_FULL_ROW = 2048  # tokens of a row up to which the default materializes all scores
BLOCK = 1024  # default block size of longer rows; large enough for efficient matmuls
NUM_CHUNKS, MIN_CHUNK = 4, 64  # query chunks of a full causal row, and their minimum length
PAD_SEGMENT = -1  # segment of padding in the last block of keys; no token has it


class Keys(NamedTuple):
    """Keys and values of a row, or of a device's shard of it."""

    keys: jax.Array  # [B, S, K, H]; in blocks [J, B, K, T, H]
    values: jax.Array  # [B, S, K, W]; in blocks [J, B, K, T, W]
    positions: jax.Array  # [B, S] i32; in blocks [J, B, T], and so the next two
    segments: jax.Array  # [B, S] i32
    shown: jax.Array | None  # [B, S] bool: keys visible to earlier tokens of their document


class Queries(NamedTuple):
    """Queries in blocks."""

    queries: jax.Array  # [I, B, K, G, U, H], scaled
    positions: jax.Array  # [I, B, U]
    segments: jax.Array  # [I, B, U]


class Options(NamedTuple):
    """Static options of blockwise attention."""

    soft_cap: float | None
    along: tuple[str, ...]  # mesh axes of the ring; empty: no ring


def row_attention(
    constrain: ShardingConstraint,
    q_BLNH: jax.Array,
    rows: Keys,
    *,
    window: jax.Array | int,
    scale: float,
    block: int | None = None,
    across: ContextParallel = ContextParallel.ring,
    kernel: AttentionImplementation = AttentionImplementation.xla,
    windows: tuple[int, ...] = (),
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Self-attention of packed rows, [B, L, N, W] in q's dtype; each device computes its own queries.

    `block`, `across`: `block_size` and `context_parallel` of `models.config.AttentionConfig`. `kernel`: implementation
    for rows that are not sharded; `windows`: the distinct windows of all layers.
    """

    def attend(cut: Cut, q_BLNH, k_BSKH, v_BSKW, positions_BL, segments_BL, shown_BL, sinks_N, window):
        keys = Keys(k_BSKH, v_BSKW, positions_BL, segments_BL, shown_BL)
        keys = _of_heads(keys, q_BLNH.shape[2], cut)
        along = cut.get("length", ())
        full_rows = block == 0 or (block is None and keys.keys.shape[1] * _ring_size(along) <= MAX_FULL_ROW)
        if along and across is ContextParallel.all_gather:
            keys, along = jax.tree.map(lambda x: jax.lax.all_gather(x, along, axis=1, tiled=True), keys), ()
        options: Any = {"scale": scale, "soft_cap": soft_cap, "sinks_N": sinks_N}
        if kernel is not AttentionImplementation.xla and not cut.get("length"):
            how = {"window": window, "windows": windows, "interpret": constrain.platform == "cpu"}
            out = kernel_attention(kernel, q_BLNH, keys.keys, keys.values, segments_BL, **how, **options)
            return checkpoint_name("attn_out", out)
        if full_rows and not along:
            if block is None and keys.shown is None and not cut.get("length"):
                at, chunks = (positions_BL, segments_BL), min(NUM_CHUNKS, q_BLNH.shape[1] // MIN_CHUNK)
                out = causal_attention(q_BLNH, keys, *at, window=window, pieces=chunks, **options)
                return checkpoint_name("attn_out", out)
            mask = attention_mask(positions_BL, keys.positions, segments_BL, keys.segments, window, keys.shown)
            return checkpoint_name("attn_out", attention(q_BLNH, keys.keys, keys.values, mask, **options))
        # Rows balanced by trainer.sharding.balanced_token_order have two spans in each shard with separate visibility.
        span = max(q_BLNH.shape[1] // 2, 1) if cut.get("length") else keys.keys.shape[1]
        size = span if full_rows else min(block or BLOCK, span)
        at = positions_BL, segments_BL
        return blockwise_attention(q_BLNH, keys, *at, window=window, block=size, along=along, **options)

    of_keys, of_tokens = ("batch", "length", "kv_heads", None), ("batch", "length")
    axes = ("batch", "length", "heads", None), of_keys, of_keys, of_tokens, of_tokens, of_tokens, ("heads",), ()
    arguments = q_BLNH, *rows, sinks_N, jnp.asarray(window)
    names = [None if x is None else each for x, each in zip(arguments, axes, strict=True)]
    return constrain.per_device(attend, names, *arguments)


def causal_attention(
    q_BLNH: jax.Array,
    keys: Keys,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    *,
    window: jax.Array | int,
    pieces: int,
    **options: Any,
) -> jax.Array:
    """Causal attention of full rows in token order, as `models.attention.ops.attention`: [B, L, N, W] in q's dtype.

    Each of `pieces` chunks of queries uses only the keys up to its end, since later ones are masked: with four chunks,
    five eighths of all pairs. With fewer than two the row is not split.
    """
    L, pieces, outs = q_BLNH.shape[1], max(pieces, 1), []
    for start, end in pairwise(i * L // pieces for i in range(pieces + 1)):
        own, met = jnp.s_[:, start:end], jnp.s_[:, :end]
        at = positions_BL[own], keys.positions[met], segments_BL[own], keys.segments[met]
        outs.append(attention(q_BLNH[own], keys.keys[met], keys.values[met], attention_mask(*at, window), **options))
    return jnp.concatenate(outs, axis=1)


def _of_heads(keys: Keys, num_heads: int, cut: Cut) -> Keys:
    """Selects the kv head of each local query head, if query heads are sharded and kv heads are not."""
    if cut.get("heads", ()) == cut.get("kv_heads", ()):
        return keys
    devices = jax.lax.axis_size(cut["heads"])
    group = num_heads * devices // keys.keys.shape[2]
    mine_N = (jax.lax.axis_index(cut["heads"]) * num_heads + jnp.arange(num_heads)) // group
    return keys._replace(keys=keys.keys[:, :, mine_N], values=keys.values[:, :, mine_N])


def blockwise_attention(
    q_BLNH: jax.Array,
    keys: Keys,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    *,
    window: jax.Array | int,
    scale: float,
    block: int,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    along: tuple[str, ...] = (),
) -> jax.Array:
    """Blockwise attention, equal to `models.attention.ops.attention` without dropout: [B, L, N, W] in q's dtype.

    Scores are f32. `block`: queries and keys per block; lengths need not be multiples of it. `along`, inside a
    `shard_map`: mesh axes that shard the row; `keys` are then this device's shard, and all shards have the same size.
    """
    B, L, N, H = q_BLNH.shape
    K = keys.keys.shape[2]
    q_BKGLH = (q_BLNH * jnp.asarray(scale, q_BLNH.dtype)).swapaxes(1, 2).reshape(B, K, N // K, L, H)
    queries = Queries(*_in_blocks((q_BKGLH, positions_BL, segments_BL), (3, 1, 1), (0, 0, 0), block))
    arrays = (keys.keys.swapaxes(1, 2), keys.values.swapaxes(1, 2), *keys[2:])
    blocks = Keys(*_in_blocks(arrays, (2, 2, 1, 1, 1), (0, 0, 0, PAD_SEGMENT, False), block))
    sinks_KG = None if sinks_N is None else sinks_N.astype(F32).reshape(K, N // K)
    o_IBKGUW: Any = _flash(Options(soft_cap, along), queries, blocks, sinks_KG, jnp.asarray(window))
    o_BKGLW = jnp.moveaxis(o_IBKGUW, 0, 3).reshape(B, N, -1, o_IBKGUW.shape[-1])
    return o_BKGLW[:, :, :L].swapaxes(1, 2)


def _in_blocks(arrays: tuple, dims: tuple[int, ...], fill: tuple, block: int) -> list[Any]:
    """Splits the length dim of each array into leading blocks, padded with `fill`. None stays None."""

    def cut(x: jax.Array | None, dim: int, value: Any) -> jax.Array | None:
        if x is None:
            return None
        length = x.shape[dim]
        size = min(block, length)
        short = -length % size
        if short:
            x = jnp.pad(x, [(0, short if d == dim else 0) for d in range(x.ndim)], constant_values=value)
        return jnp.moveaxis(x.reshape(*x.shape[:dim], -1, size, *x.shape[dim + 1 :]), dim, 0)

    return [cut(x, dim, value) for x, dim, value in zip(arrays, dims, fill, strict=True)]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(options: Options, queries: Queries, keys: Keys, sinks_KG: jax.Array | None, window: jax.Array) -> jax.Array:
    return _flash_forward(options, queries, keys, sinks_KG, window)[0]


def _flash_forward(options: Options, queries: Queries, keys: Keys, sinks_KG, window):
    q_IBKGUH = queries.queries
    start = OnlineSoftmax.init(q_IBKGUH.shape[:-1], keys.values.shape[-1], sinks_KG)

    def meet(running: OnlineSoftmax, keys: Keys) -> OnlineSoftmax:
        """Attends from all local queries to one shard of keys."""

        def of_queries(_, block):
            queries_i, running_i, seen_J = block

            def of_keys(running_i, block):
                keys_j, seen = block
                merge = lambda running_i: _merge(options, running_i, queries_i, keys_j, window)
                return jax.lax.cond(seen, merge, lambda running_i: running_i, running_i), None

            return None, jax.lax.scan(of_keys, running_i, (keys, seen_J))[0]

        return jax.lax.scan(of_queries, None, (queries, running, block_is_visible(queries, keys, window)))[1]

    def hop(carried, _):
        running, current = carried
        coming = _ppermute_next(current, options.along)  # sent before use, so that transfer and compute overlap
        return (meet(running, current), coming), None

    (running, last), _ = _repeat(hop, (start, keys), _ring_size(options.along) - 1)
    running = meet(running, last)
    # Named, so that a remat policy can save both and recomputation of the layer skips attention.
    o_IBKGUW = checkpoint_name_fwd("attn_out", (running.output / running.total[..., None]).astype(q_IBKGUH.dtype))
    logsumexp_IBKGU = checkpoint_name_fwd("attn_out", running.max + jnp.log(running.total))
    return o_IBKGUW, (queries, keys, sinks_KG, window, o_IBKGUW, logsumexp_IBKGU)


def _flash_backward(options: Options, saved, do_IBKGUW):
    """A second pass around the ring, in which f32 gradients of keys and values rotate with them.

    A custom rule instead of the transposed forward pass, which would save every shard of keys that a device receives,
    and thereby the full row on each device.
    """
    queries, keys, sinks_KG, window, o_IBKGUW, logsumexp_IBKGU = saved
    # sum_S p dp in the softmax gradient p (dp - sum_S p dp) is the dot product of the output and its gradient.
    delta_IBKGU = jnp.sum(do_IBKGUW.astype(F32) * o_IBKGUW.astype(F32), axis=-1)
    zeros = lambda x: jnp.zeros(x.shape, F32)

    def meet(dq_IBKGUH, keys: Keys):
        """Adds the contribution of a shard of keys to dq; returns it with the (dk, dv) of the shard."""

        def of_queries(gradient, block):
            *given, dq_BKGUH, seen_J = block

            def of_keys(dq_BKGUH, block):
                keys_j, gradient_j, seen = block
                add = lambda dq, gradient: _add_gradients(options, dq, gradient, given, keys_j, window)
                return jax.lax.cond(seen, add, lambda *same: same, dq_BKGUH, gradient_j)

            dq_BKGUH, gradient = jax.lax.scan(of_keys, dq_BKGUH, (keys, gradient, seen_J))
            return gradient, dq_BKGUH

        blocks = (queries, do_IBKGUW, logsumexp_IBKGU, delta_IBKGU, dq_IBKGUH, block_is_visible(queries, keys, window))
        gradient, dq_IBKGUH = jax.lax.scan(of_queries, (zeros(keys.keys), zeros(keys.values)), blocks)
        return dq_IBKGUH, gradient

    def hop(carried, _):
        dq_IBKGUH, gradient, current = carried
        # Both are sent before the matmuls; the local contribution to the gradients is added after the hop.
        coming, gradient = _ppermute_next(current, options.along), _ppermute_next(gradient, options.along)
        dq_IBKGUH, more = meet(dq_IBKGUH, current)
        return (dq_IBKGUH, jax.tree.map(jnp.add, gradient, more), coming), None

    start = zeros(queries.queries), (zeros(keys.keys), zeros(keys.values)), keys
    (dq_IBKGUH, gradient, last), _ = _repeat(hop, start, _ring_size(options.along) - 1)
    gradient = _ppermute_next(gradient, options.along)
    dq_IBKGUH, more = meet(dq_IBKGUH, last)
    # The last hop returns them to their owner
    dk, dv = _ppermute_next(jax.tree.map(jnp.add, gradient, more), options.along)
    dsinks_KG = None
    if sinks_KG is not None:
        p_IBKGU = jnp.exp(sinks_KG[None, None, :, :, None] - logsumexp_IBKGU)
        dsinks_KG = -jnp.sum(p_IBKGU * delta_IBKGU, axis=(0, 1, 4))
    dqueries = Queries(dq_IBKGUH.astype(queries.queries.dtype), None, None)  # type: ignore[arg-type]
    dkeys = Keys(dk.astype(keys.keys.dtype), dv.astype(keys.values.dtype), None, None, None)  # type: ignore[arg-type]
    return dqueries, dkeys, dsinks_KG, None


_flash.defvjp(_flash_forward, _flash_backward)


def block_is_visible(queries: Queries, keys: Keys, window: jax.Array) -> jax.Array:
    """Returns [I, J] bool, false only if no query of block i sees a key of block j, judged by ranges of both."""
    low = lambda x: x.min(-1)
    high = lambda x: x.max(-1)
    q_segments, q_positions = queries.segments[:, None], queries.positions[:, None]
    k_segments, k_positions = keys.segments[None], keys.positions[None]
    together = (low(q_segments) <= high(k_segments)) & (low(k_segments) <= high(q_segments))
    before = high(q_positions) >= low(k_positions)
    if keys.shown is not None:
        before = before | keys.shown.any(-1)[None]
    near = (low(q_positions) - high(k_positions) < window) & (low(k_positions) - high(q_positions) < window)
    return (together & before & near).any(-1)


def _scores(options: Options, queries: Queries, keys: Keys, window):
    """Returns (scores, derivative of the soft cap, mask) of two blocks: [B, K, G, U, T] f32; mask [B, 1, 1, U, T]."""
    s_BKGUT = einsum_f32("BKGUH,BKTH->BKGUT", queries.queries, keys.keys, F32)
    slope_BKGUT = None
    if options.soft_cap is not None:
        tanh_BKGUT = jnp.tanh(s_BKGUT / options.soft_cap)
        s_BKGUT, slope_BKGUT = options.soft_cap * tanh_BKGUT, 1 - jnp.square(tanh_BKGUT)
    mask_BUT = attention_mask(queries.positions, keys.positions, queries.segments, keys.segments, window, keys.shown)
    return s_BKGUT, slope_BKGUT, mask_BUT[:, None, None]


def _merge(options: Options, running: OnlineSoftmax, queries: Queries, keys: Keys, window) -> OnlineSoftmax:
    """Updates the softmax of a block of queries with a block of keys."""
    s_BKGUT, _, mask_B11UT = _scores(options, queries, keys, window)
    return running.update(jnp.where(mask_B11UT, s_BKGUT, HIDDEN), keys.values)


def _add_gradients(options: Options, dq_BKGUH, gradient, given, keys: Keys, window):
    """Adds the contribution of two blocks to (dq, (dk, dv)), f32. `given`: tensors of the block of queries."""
    queries, do_BKGUW, logsumexp_BKGU, delta_BKGU = given
    dk_BKTH, dv_BKTW = gradient
    s_BKGUT, slope_BKGUT, mask_B11UT = _scores(options, queries, keys, window)
    p_BKGUT = jnp.where(mask_B11UT, jnp.exp(s_BKGUT - logsumexp_BKGU[..., None]), 0.0)
    dv_BKTW = dv_BKTW + einsum_f32("BKGUT,BKGUW->BKTW", p_BKGUT.astype(do_BKGUW.dtype), do_BKGUW, F32)
    dp_BKGUT = einsum_f32("BKGUW,BKTW->BKGUT", do_BKGUW, keys.values, F32)
    ds_BKGUT = p_BKGUT * (dp_BKGUT - delta_BKGU[..., None])
    if slope_BKGUT is not None:
        ds_BKGUT = ds_BKGUT * slope_BKGUT
    ds_BKGUT = ds_BKGUT.astype(keys.keys.dtype)
    dq_BKGUH = dq_BKGUH + einsum_f32("BKGUT,BKTH->BKGUH", ds_BKGUT, keys.keys, F32)
    dk_BKTH = dk_BKTH + einsum_f32("BKGUT,BKGUH->BKTH", ds_BKGUT, queries.queries, F32)
    return dq_BKGUH, (dk_BKTH, dv_BKTW)


def _ring_size(along: tuple[str, ...]) -> int:
    return jax.lax.axis_size(along) if along else 1


def _ppermute_next(tree: Any, along: tuple[str, ...]) -> Any:
    """Sends `tree` to the next device of the ring and returns that of the previous one."""
    if not along:
        return tree
    size = _ring_size(along)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, along, [(d, (d + 1) % size) for d in range(size)]), tree)


def _repeat(body: Any, start: Any, times: int) -> tuple[Any, None]:
    return jax.lax.scan(body, start, None, length=times) if times else (start, None)
