"""Attention block by block, on one device or around a ring of devices that hold a row in pieces.

The scores of a whole row never exist: each block of queries meets the keys block by block, with a running maximum, sum
and output (Milakov & Gimelshein 2018; FlashAttention-2, Dao 2023 [2307.08691], algorithms 1 and 2). The backward pass
keeps the output and the logsumexp of the scores, and makes the scores anew. Around a ring, keys and values travel from
device to device while each works on those it has (Ring Attention, Liu et al. 2023 [2310.01889]).

Masks are made for each pair of blocks from positions and segments, which travel with the keys: so the order in which
tokens lie in a row does not matter, and a pair in which no query can see a key is passed over.

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

WHOLE = 2048  # tokens of a row up to which its scores are made at once where nothing else is asked for
BLOCK = 1024  # else: large enough for products that keep a device busy
PIECES, PIECE = 4, 64  # in how many such a row's queries are cut, and what each has at least
NOBODYS = -1  # segment of what fills up the last block of keys; no token has it


class Keys(NamedTuple):
    """What queries meet: a row, or a device's piece of it."""

    keys: jax.Array  # [B, S, K, H]; in blocks [J, B, K, T, H]
    values: jax.Array  # [B, S, K, W]; in blocks [J, B, K, T, W]
    positions: jax.Array  # [B, S] i32; in blocks [J, B, T], and so the next two
    segments: jax.Array  # [B, S] i32
    shown: jax.Array | None  # [B, S] bool: keys that earlier tokens of their document see as well


class Queries(NamedTuple):
    queries: jax.Array  # [I, B, K, G, U, H], scaled
    positions: jax.Array  # [I, B, U]
    segments: jax.Array  # [I, B, U]


class Options(NamedTuple):
    """What a compiled program depends on."""

    soft_cap: float | None
    along: tuple[str, ...]  # the mesh axes of the ring; empty: there is none


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
    """Attention of the tokens of rows to each other, [B, L, N, W] in q's dtype; each device has the queries it holds.

    `block`, `across`: see `models.config.AttentionConfig`. `kernel`, with the `windows` that layers have: what
    computes rows that are not cut.
    """

    def attend(cut: Cut, q_BLNH, k_BSKH, v_BSKW, positions_BL, segments_BL, shown_BL, sinks_N, window):
        keys = Keys(k_BSKH, v_BSKW, positions_BL, segments_BL, shown_BL)
        keys = _of_heads(keys, q_BLNH.shape[2], cut)
        along = cut.get("length", ())
        whole = block == 0 or (block is None and keys.keys.shape[1] * _ring_size(along) <= WHOLE)
        if along and across is ContextParallel.all_gather:
            keys, along = jax.tree.map(lambda x: jax.lax.all_gather(x, along, axis=1, tiled=True), keys), ()
        options: Any = {"scale": scale, "soft_cap": soft_cap, "sinks_N": sinks_N}
        if kernel is not AttentionImplementation.xla and not cut.get("length"):
            how = {"window": window, "windows": windows, "interpret": constrain.platform == "cpu"}
            out = kernel_attention(kernel, q_BLNH, keys.keys, keys.values, segments_BL, **how, **options)
            return checkpoint_name("attn_out", out)
        if whole and not along:
            if block is None and keys.shown is None and not cut.get("length"):
                at, pieces = (positions_BL, segments_BL), min(PIECES, q_BLNH.shape[1] // PIECE)
                out = causal_attention(q_BLNH, keys, *at, window=window, pieces=pieces, **options)
                return checkpoint_name("attn_out", out)
            mask = attention_mask(positions_BL, keys.positions, segments_BL, keys.segments, window, keys.shown)
            return checkpoint_name("attn_out", attention(q_BLNH, keys.keys, keys.values, mask, **options))
        # Balanced rows (trainer.mesh.row_order) have two stretches in each piece, which are seen or not apart.
        stretch = max(q_BLNH.shape[1] // 2, 1) if cut.get("length") else keys.keys.shape[1]
        size = stretch if whole else min(block or BLOCK, stretch)
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
    """What `models.attention.ops.attention` gives of whole rows in their order, [B, L, N, W] in q's dtype.

    No query sees what lies after it, so each of `pieces` stretches of queries meets the keys up to its own end: with
    four of them, five eighths of all pairs. With fewer than two the row is not cut.
    """
    L, pieces, outs = q_BLNH.shape[1], max(pieces, 1), []
    for start, end in pairwise(i * L // pieces for i in range(pieces + 1)):
        own, met = jnp.s_[:, start:end], jnp.s_[:, :end]
        at = positions_BL[own], keys.positions[met], segments_BL[own], keys.segments[met]
        outs.append(attention(q_BLNH[own], keys.keys[met], keys.values[met], attention_mask(*at, window), **options))
    return jnp.concatenate(outs, axis=1)


def _of_heads(keys: Keys, num_heads: int, cut: Cut) -> Keys:
    """Where a device has some of the query heads and all kv heads: for each of its queries the head that it reads."""
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
    """What `models.attention.ops.attention` gives without dropout, [B, L, N, W] in q's dtype, from f32 scores.

    `block`: queries, and keys, of a block; neither length need be a multiple of it. `along`, inside a `shard_map`: the
    mesh axes along which the row is cut; `keys` are then those of this device's piece, and all pieces are of one size.
    """
    B, L, N, H = q_BLNH.shape
    K = keys.keys.shape[2]
    q_BKGLH = (q_BLNH * jnp.asarray(scale, q_BLNH.dtype)).swapaxes(1, 2).reshape(B, K, N // K, L, H)
    queries = Queries(*_in_blocks((q_BKGLH, positions_BL, segments_BL), (3, 1, 1), (0, 0, 0), block))
    arrays = (keys.keys.swapaxes(1, 2), keys.values.swapaxes(1, 2), *keys[2:])
    blocks = Keys(*_in_blocks(arrays, (2, 2, 1, 1, 1), (0, 0, 0, NOBODYS, False), block))
    sinks_KG = None if sinks_N is None else sinks_N.astype(F32).reshape(K, N // K)
    o_IBKGUW: Any = _flash(Options(soft_cap, along), queries, blocks, sinks_KG, jnp.asarray(window))
    o_BKGLW = jnp.moveaxis(o_IBKGUW, 0, 3).reshape(B, N, -1, o_IBKGUW.shape[-1])
    return o_BKGLW[:, :, :L].swapaxes(1, 2)


def _in_blocks(arrays: tuple, dims: tuple[int, ...], fill: tuple, block: int) -> list[Any]:
    """Each array with its dim of the length cut in blocks, which come first; filled up with `fill`. None stays None."""

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
        """All queries of this device, and one piece of keys."""

        def of_queries(_, block):
            queries_i, running_i, seen_J = block

            def of_keys(running_i, block):
                keys_j, seen = block
                merge = lambda running_i: _merge(options, running_i, queries_i, keys_j, window)
                return jax.lax.cond(seen, merge, lambda running_i: running_i, running_i), None

            return None, jax.lax.scan(of_keys, running_i, (keys, seen_J))[0]

        return jax.lax.scan(of_queries, None, (queries, running, block_is_visible(queries, keys, window)))[1]

    def turn(carried, _):
        running, here = carried
        coming = _ppermute_next(here, options.along)  # sent off before it is read, so that links and cores work at once
        return (meet(running, here), coming), None

    (running, last), _ = _repeat(turn, (start, keys), _ring_size(options.along) - 1)
    running = meet(running, last)
    # Named, so that a layer that is computed anew may keep both and need no attention for the second time.
    o_IBKGUW = checkpoint_name_fwd("attn_out", (running.output / running.total[..., None]).astype(q_IBKGUH.dtype))
    logsumexp_IBKGU = checkpoint_name_fwd("attn_out", running.max + jnp.log(running.total))
    return o_IBKGUW, (queries, keys, sinks_KG, window, o_IBKGUW, logsumexp_IBKGU)


def _flash_backward(options: Options, saved, do_IBKGUW):
    """A second turn of the ring, with the gradients of keys and values travelling beside them in f32.

    A rule of its own, rather than the transposition of the first turn: that would keep each piece of keys that came by,
    and with them the whole row on each device.
    """
    queries, keys, sinks_KG, window, o_IBKGUW, logsumexp_IBKGU = saved
    # sum_S p dp of the softmax's gradient p (dp - sum_S p dp) is what the output had to do with its gradient.
    delta_IBKGU = jnp.sum(do_IBKGUW.astype(F32) * o_IBKGUW.astype(F32), axis=-1)
    zeros = lambda x: jnp.zeros(x.shape, F32)

    def meet(dq_IBKGUH, keys: Keys):
        """dq with what one piece of keys adds to it, and (dk, dv) of this piece by the queries of this device."""

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

    def turn(carried, _):
        dq_IBKGUH, gradient, here = carried
        # Both set off before the products, the gradients without what these will add: it joins them one hop on.
        coming, gradient = _ppermute_next(here, options.along), _ppermute_next(gradient, options.along)
        dq_IBKGUH, more = meet(dq_IBKGUH, here)
        return (dq_IBKGUH, jax.tree.map(jnp.add, gradient, more), coming), None

    start = zeros(queries.queries), (zeros(keys.keys), zeros(keys.values)), keys
    (dq_IBKGUH, gradient, last), _ = _repeat(turn, start, _ring_size(options.along) - 1)
    gradient = _ppermute_next(gradient, options.along)
    dq_IBKGUH, more = meet(dq_IBKGUH, last)
    dk, dv = _ppermute_next(jax.tree.map(jnp.add, gradient, more), options.along)  # the last hop brings them home
    dsinks_KG = None
    if sinks_KG is not None:
        p_IBKGU = jnp.exp(sinks_KG[None, None, :, :, None] - logsumexp_IBKGU)
        dsinks_KG = -jnp.sum(p_IBKGU * delta_IBKGU, axis=(0, 1, 4))
    dqueries = Queries(dq_IBKGUH.astype(queries.queries.dtype), None, None)  # type: ignore[arg-type]
    dkeys = Keys(dk.astype(keys.keys.dtype), dv.astype(keys.values.dtype), None, None, None)  # type: ignore[arg-type]
    return dqueries, dkeys, dsinks_KG, None


_flash.defvjp(_flash_forward, _flash_backward)


def block_is_visible(queries: Queries, keys: Keys, window: jax.Array) -> jax.Array:
    """[I, J] bool: false only where no query of block i sees a key of block j, by the ranges of both."""
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
    """(scores, slope of the soft cap, mask) of a block of each: [B, K, G, U, T] f32, the mask [B, 1, 1, U, T]."""
    s_BKGUT = einsum_f32("BKGUH,BKTH->BKGUT", queries.queries, keys.keys, F32)
    slope_BKGUT = None
    if options.soft_cap is not None:
        tanh_BKGUT = jnp.tanh(s_BKGUT / options.soft_cap)
        s_BKGUT, slope_BKGUT = options.soft_cap * tanh_BKGUT, 1 - jnp.square(tanh_BKGUT)
    mask_BUT = attention_mask(queries.positions, keys.positions, queries.segments, keys.segments, window, keys.shown)
    return s_BKGUT, slope_BKGUT, mask_BUT[:, None, None]


def _merge(options: Options, running: OnlineSoftmax, queries: Queries, keys: Keys, window) -> OnlineSoftmax:
    """The softmax of one block of queries with one more block of keys."""
    s_BKGUT, _, mask_B11UT = _scores(options, queries, keys, window)
    return running.update(jnp.where(mask_B11UT, s_BKGUT, HIDDEN), keys.values)


def _add_gradients(options: Options, dq_BKGUH, gradient, given, keys: Keys, window):
    """(dq, (dk, dv)), f32, with what one block of each adds to them. `given`: of the block of queries."""
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
    """What the device before this one holds."""
    if not along:
        return tree
    size = _ring_size(along)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, along, [(d, (d + 1) % size) for d in range(size)]), tree)


def _repeat(body: Any, start: Any, times: int) -> tuple[Any, None]:
    return jax.lax.scan(body, start, None, length=times) if times else (start, None)
