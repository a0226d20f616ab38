"""One decoder for every dense family: the file to read first.

Flax NNX modules are used for construction only. At the border everything is a nested dict of arrays: `init_params`
makes it, `param_axes` names its dims, `make_apply` gives a pure function of it. Layers are stacked on a leading
`layers` dim and run by one scan, so that compile time does not grow with depth.

Shape letters: B batch, L length, S key length, D model, N query heads, K kv heads, H head dim, F mlp, V vocab.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models.attention import UNLIMITED, attention, cached_attention, visible
from models.cache import Cache, LayerCache, write_cache
from models.config import LayerKind, ModelConfig, NormPlacement, Position, QKNorm, Remat
from models.layers import (
    MLP,
    Normalize,
    Projection,
    dropout,
    inverse_frequencies,
    param,
    rope_temperature,
    rotate,
    transposed,
)
from models.partition import Constrain, no_constraint

Params = Any  # a nested dict of arrays


class Output(NamedTuple):
    """What a forward pass gives: logits are `softcap(hidden @ head)`, made where they are needed and in pieces."""

    hidden_BLD: jax.Array
    head_DV: jax.Array  # in the parameters' dtype: cast at use, so that its gradient is summed in it
    logit_soft_cap: float | None


class Apply(Protocol):
    """A model as the training core sees it. `rng` None: no dropout."""

    def __call__(
        self,
        params: Params,
        tokens_BL: jax.Array,
        *,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        rng: jax.Array | None = None,
    ) -> Output: ...


class Context(NamedTuple):
    """What all layers of one forward pass share."""

    angles_local: jax.Array | None  # [B, L, R] of sliding layers
    angles_full: jax.Array | None
    positions: jax.Array  # [B, L]
    segments: jax.Array  # [B, L]
    first_row: jax.Array | int  # of the cache, where there is one: the row that belongs to the first of the batch
    constrain: Constrain


class PerLayer(NamedTuple):
    """What differs between layers besides weights: arrays, so that one scan serves every pattern."""

    window: Any  # [layers] i32
    sliding: Any  # [layers] bool


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, out_std: float):
        a, D, std = config.attention, config.embed_dim, config.init_std
        N, K, H = a.num_heads, a.num_kv_heads, a.head_dim
        self.config = config
        bias = 2 * int(a.qkv_bias)
        q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.query = Projection(rngs, config, "BLD,DNH->BLNH", (D, N, H), q_axes, std=std, bias_dims=bias)
        self.key = Projection(rngs, config, "BLD,DKH->BLKH", (D, K, H), kv_axes, std=std, bias_dims=bias)
        self.value = Projection(rngs, config, "BLD,DKH->BLKH", (D, K, H), kv_axes, std=std, bias_dims=bias)
        out_axes = ("heads", "head_dim", "embed")
        self.out = Projection(
            rngs, config, "BLNH,NHD->BLD", (N, H, D), out_axes, std=out_std, bias_dims=int(a.out_bias)
        )
        whole = a.qk_norm is QKNorm.projection
        norm = lambda count, name: (
            None
            if a.qk_norm is QKNorm.none
            else Normalize(rngs, config, (count, H) if whole else (H,), (name, "head_dim") if whole else ("head_dim",))
        )
        self.query_norm, self.key_norm = norm(N, "heads"), norm(K, "kv_heads")

    def __call__(self, x_BLD, context: Context, layer: PerLayer, cached: LayerCache | None, rng):
        """Returns the output [B, L, D] and the cache with these tokens in it."""
        a = self.config.attention
        q_BLNH, k_BLKH, v_BLKH = self.query(x_BLD), self.key(x_BLD), self.value(x_BLD)
        if self.query_norm is not None and self.key_norm is not None:
            q_BLNH, k_BLKH = self.query_norm(q_BLNH), self.key_norm(k_BLKH)
        if context.angles_full is not None and context.angles_local is not None:
            angles = jnp.where(layer.sliding, context.angles_local, context.angles_full)
            temperature = rope_temperature(self.config.rope)
            q_BLNH, k_BLKH = rotate(q_BLNH, angles, temperature), rotate(k_BLKH, angles, temperature)
        q_BLNH = checkpoint_name(context.constrain(q_BLNH, ("batch", "length", "heads", "head_dim")), "qkv")
        k_BLKH = checkpoint_name(context.constrain(k_BLKH, ("batch", "length", "kv_heads", "head_dim")), "qkv")
        v_BLKH = checkpoint_name(context.constrain(v_BLKH, ("batch", "length", "kv_heads", "head_dim")), "qkv")
        scale = a.head_dim**-0.5 if a.scale is None else a.scale
        if cached is None:
            positions, segments = context.positions, context.segments
            mask = visible(positions, positions, segments, segments, layer.window)
            out = attention(
                q_BLNH, k_BLKH, v_BLKH, mask, scale=scale, soft_cap=a.soft_cap, dropout_rate=a.dropout, rng=rng
            )
        else:
            cached = write_cache(cached, k_BLKH, v_BLKH, context.positions, context.first_row)
            out = cached_attention(
                q_BLNH,
                cached,
                context.positions,
                context.first_row,
                window=layer.window,
                scale=scale,
                soft_cap=a.soft_cap,
            )
        return self.out(checkpoint_name(out, "attention")), cached


class Block(nnx.Module):
    """One layer: attention and a feed-forward, each with its norms and its residual sum."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig):
        out_std = config.init_std
        if config.init_scaled_residual:
            out_std /= (2 * config.num_layers) ** 0.5
        self.config = config
        self.attention = Attention(rngs, config, out_std)
        self.mlp = MLP(rngs, config, out_std)
        before = config.norm_placement is not NormPlacement.post
        after = config.norm_placement is not NormPlacement.pre
        norm = lambda use: Normalize(rngs, config, (config.embed_dim,), ("embed",)) if use else None
        self.attention_norm, self.attention_post_norm = norm(before), norm(after)
        self.mlp_norm, self.mlp_post_norm = norm(before), norm(after)

    def __call__(self, x_BLD, context: Context, layer: PerLayer, cached, rng):
        rngs = (None,) * 3 if rng is None else jax.random.split(rng, 3)
        rate = self.config.dropout
        norm = lambda module, x: x if module is None else module(x)
        y_BLD, cached = self.attention(norm(self.attention_norm, x_BLD), context, layer, cached, rngs[0])
        x_BLD = x_BLD + dropout(norm(self.attention_post_norm, y_BLD), rate, rngs[1])
        y_BLD = self.mlp(norm(self.mlp_norm, x_BLD), context.constrain)
        x_BLD = x_BLD + dropout(norm(self.mlp_post_norm, y_BLD), rate, rngs[2])
        return context.constrain(x_BLD, ("batch", "length", "embed")), cached


class Ends(nnx.Module):
    """What stands around the layers: embeddings, the last norm, the head."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig):
        D, V, std = config.embed_dim, config.vocab_size, config.init_std
        self.config = config
        self.embedding = param(rngs, (V, D), ("vocab", "embed"), std, config)
        learned = config.position is Position.learned
        table = (config.max_seq_len, D), ("length", "embed")
        self.position_embedding = param(rngs, *table, std, config) if learned else None
        self.final_norm = Normalize(rngs, config, (D,), ("embed",))
        self.head = None if config.tied_embeddings else param(rngs, (D, V), ("embed", "vocab"), std, config)

    def embed(self, tokens_BL, positions_BL, rng: jax.Array | None, constrain: Constrain) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype.name)
        # Whole vectors for the look-up: gathering from a table that is split along them defeats the partitioner.
        table_VD = constrain(self.embedding[...].astype(dtype), ("vocab", None))
        x_BLD = table_VD[tokens_BL]
        if config.scale_embeddings:
            x_BLD = x_BLD * jnp.asarray(config.embed_dim**0.5, dtype)
        if self.position_embedding is not None:
            x_BLD = x_BLD + self.position_embedding[...][positions_BL].astype(dtype)
        return dropout(x_BLD, config.dropout, rng)

    def output(self, x_BLD: jax.Array) -> Output:
        head_DV = transposed(self.embedding[...]) if self.head is None else self.head[...]
        return Output(self.final_norm(x_BLD), head_DV, self.config.final_soft_cap)


def _abstract_modules(config: ModelConfig) -> tuple[Ends, Block]:
    return nnx.eval_shape(lambda: (Ends(nnx.Rngs(0), config), Block(nnx.Rngs(0), config)))


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh weights as a nested dict; those of the layers have a leading dim `layers`.

    Normal with `init_std`, output projections scaled by depth, biases 0, norms 1 (GPT-2, section 2.3).
    """
    ends_key, layers_key = jax.random.split(key)
    ends = nnx.to_pure_dict(nnx.state(Ends(nnx.Rngs(ends_key), config), nnx.Param))
    block = lambda k: nnx.to_pure_dict(nnx.state(Block(nnx.Rngs(k), config), nnx.Param))
    return {**ends, "layers": jax.vmap(block)(jax.random.split(layers_key, config.num_layers))}


def abstract_params(config: ModelConfig) -> Params:
    """The tree of `init_params` as `jax.ShapeDtypeStruct`s; costs no memory at any size."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def param_axes(config: ModelConfig) -> Params:
    """The tree of `init_params` with a tuple of logical axis names for each array."""
    ends, block = _abstract_modules(config)
    named = lambda module, lead: nnx.to_pure_dict(
        jax.tree.map(
            lambda p: p.replace((*lead, *p.get_metadata()["axes"])),
            nnx.state(module, nnx.Param),
            is_leaf=lambda p: isinstance(p, nnx.Variable),
        )
    )
    return {**named(ends, ()), "layers": named(block, ("layers",))}


def make_apply(config: ModelConfig, constrain: Constrain = no_constraint) -> Apply:
    """The forward pass over whole rows as a pure function of the parameters."""

    def apply(params, tokens_BL, *, positions_BL, segment_ids_BL, rng=None) -> Output:
        return forward(params, tokens_BL, positions_BL, segment_ids_BL, config=config, constrain=constrain, rng=rng)

    return apply


def _modules(params: Params, config: ModelConfig) -> tuple[Ends, Any]:
    """The ends with their weights, and a layer without."""
    abstract_ends, abstract_block = _abstract_modules(config)
    weights = nnx.State({k: v for k, v in params.items() if k != "layers"})
    return nnx.merge(nnx.split(abstract_ends)[0], weights), nnx.split(abstract_block)[0]


def forward(
    params: Params,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    segment_ids_BL: jax.Array,
    *,
    config: ModelConfig,
    constrain: Constrain = no_constraint,
    rng: jax.Array | None = None,
) -> Output:
    """One pass over whole rows."""
    ends, block_graph = _modules(params, config)
    embed_rng, layer_rng = (None, None) if rng is None else jax.random.split(rng)
    x_BLD = constrain(ends.embed(tokens_BL, positions_BL, embed_rng, constrain), ("batch", "length", "embed"))
    context = _context(config, positions_BL, segment_ids_BL, 0, constrain)

    def body(x_BLD, scanned):
        weights, layer, index = scanned
        key = None if layer_rng is None else jax.random.fold_in(layer_rng, index)
        return nnx.merge(block_graph, nnx.State(weights))(x_BLD, context, layer, None, key)

    layers = (params["layers"], jax.tree.map(jnp.asarray, per_layer(config)), jnp.arange(config.num_layers))
    x_BLD, _ = jax.lax.scan(_remat(body, config.remat), x_BLD, layers)
    return ends.output(x_BLD)


def forward_cached(
    params: Params,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    cache: Cache,
    *,
    config: ModelConfig,
    constrain: Constrain = no_constraint,
    first_row: jax.Array | int = 0,
) -> tuple[Output, Cache]:
    """One pass with the keys and values of earlier tokens; each row is one document.

    Rows of the batch are those of the cache from `first_row` on. The layers of `params` are a tuple, one tree each
    (see `models.decode.decoding_params`): a scan would copy what it cuts out of a stack.
    """
    ends, block_graph = _modules(params, config)
    x_BLD = constrain(ends.embed(tokens_BL, positions_BL, None, constrain), ("batch", "length", "embed"))
    context = _context(config, positions_BL, jnp.ones_like(tokens_BL), first_row, constrain)
    of_all, filled = per_layer(config), []
    for index, (weights, cached) in enumerate(zip(params["layers"], cache, strict=True)):
        layer = jax.tree.map(lambda x, index=index: x[index], of_all)
        x_BLD, cached = nnx.merge(block_graph, nnx.State(weights))(x_BLD, context, layer, cached, None)
        filled.append(cached)
    return ends.output(x_BLD), tuple(filled)


def per_layer(config: ModelConfig) -> PerLayer:
    pattern = config.attention.pattern
    sliding = np.array([pattern[i % len(pattern)] is LayerKind.sliding for i in range(config.num_layers)])
    window = np.where(sliding, config.attention.sliding_window, UNLIMITED).astype(np.int32)
    return PerLayer(window, sliding)


def logits(output: Output) -> jax.Array:
    """[B, L, V] f32, whole: for decoding and for tests; training makes them in pieces."""
    hidden_BLD = output.hidden_BLD
    head_DV = output.head_DV.astype(hidden_BLD.dtype)
    x_BLV = jnp.einsum("BLD,DV->BLV", hidden_BLD, head_DV, preferred_element_type=jnp.float32)
    cap = output.logit_soft_cap
    return x_BLV if cap is None else cap * jnp.tanh(x_BLV / cap)


def _context(config, positions_BL, segment_ids_BL, first_row, constrain: Constrain) -> Context:
    local = full = None
    if config.position is Position.rope:
        rope, H = config.rope, config.attention.head_dim
        two = rope.local_theta is not None
        freqs = inverse_frequencies(rope, H, theta=rope.theta, scaled=True)
        local_freqs = inverse_frequencies(rope, H, theta=rope.local_theta or rope.theta, scaled=not two)
        position = positions_BL[:, :, None].astype(jnp.float32)
        full = position * jnp.asarray(freqs, jnp.float32)[None, None]
        local = position * jnp.asarray(local_freqs, jnp.float32)[None, None]
    return Context(local, full, positions_BL, segment_ids_BL, first_row, constrain)


def _remat(body, remat: Remat):
    """The named menu: what a layer keeps for its backward pass."""
    if remat is Remat.none:
        return body
    policies = jax.checkpoint_policies
    policy = {
        Remat.full: policies.nothing_saveable,
        Remat.dots: policies.dots_with_no_batch_dims_saveable,
        Remat.qkv: policies.save_only_these_names("qkv", "attention"),
        Remat.attention: policies.save_only_these_names("attention"),
    }[remat]
    return jax.checkpoint(body, policy=policy, prevent_cse=False)
