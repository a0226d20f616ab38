"""Softmax attention over all earlier tokens or over a window of them: queries, keys and values, and back.

Shape letters: B batch, L length, S key length, D model, N query heads, K kv heads, H head dim.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import kernels
from models.attention.flash import Keys, row_attention
from models.attention.ops import attention, attention_mask, cached_attention, per_head_weights
from models.config import AttentionMask, ModelConfig, QKNorm
from models.forward_context import Context, LayerFlags
from models.kv_cache import LayerKVCache, init_layer_cache, write_cache
from models.layers import Linear, Normalization, param, rope_temperature, rotate, score_temperature
from models.logical_axes import ShardingConstraint
from models.mixers.mixer import Mixer
from models.remat import checkpoint_name


class QKV(NamedTuple):
    queries_BLNH: jax.Array
    keys_BLKH: jax.Array
    values_BLKH: jax.Array


class Attention(Mixer):
    """Multi-head and grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023), full or sliding."""

    rewindable: ClassVar[bool] = True

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, out_std: float):
        a, D = config.attention, config.embed_dim
        N, H = a.num_heads, a.v_head_dim or a.head_dim
        self.config = config
        self.make_inputs(rngs, config)
        out_axes = ("heads", "head_dim", "embed")
        self.out = Linear(rngs, config, "BLNH,NHD->BLD", (N, H, D), out_axes, std=out_std, bias_dims=int(a.out_bias))
        self.sinks = param(rngs, (N,), ("heads",), 0, config) if a.sinks else None

    def make_inputs(self, rngs: nnx.Rngs, config: ModelConfig) -> None:
        """Creates the parameters that queries, keys and values are computed with."""
        a, D, std = config.attention, config.embed_dim, config.init_std
        N, K, H = a.num_heads, a.num_kv_heads, a.head_dim
        bias = 2 * int(a.qkv_bias)
        q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.query = Linear(rngs, config, "BLD,DNH->BLNH", (D, N, H), q_axes, std=std, bias_dims=bias)
        self.key = Linear(rngs, config, "BLD,DKH->BLKH", (D, K, H), kv_axes, std=std, bias_dims=bias)
        self.value = Linear(rngs, config, "BLD,DKH->BLKH", (D, K, H), kv_axes, std=std, bias_dims=bias)
        whole = a.qk_norm is QKNorm.projection
        norm = lambda count, name: (
            None
            if a.qk_norm is QKNorm.none
            else Normalization(
                rngs, config, (count, H) if whole else (H,), (name, "head_dim") if whole else ("head_dim",)
            )
        )
        self.query_norm, self.key_norm = norm(N, "heads"), norm(K, "kv_heads")

    def inputs(self, x_BLD, context: Context, layer: LayerFlags) -> QKV:
        """Queries, keys and values, normalized and rotated."""
        q_BLNH, k_BLKH, v_BLKH = self.query(x_BLD), self.key(x_BLD), self.value(x_BLD)
        if self.query_norm is not None and self.key_norm is not None:
            q_BLNH, k_BLKH = self.query_norm(q_BLNH), self.key_norm(k_BLKH)
        return QKV(self.rotate(q_BLNH, context, layer), self.rotate(k_BLKH, context, layer), v_BLKH)

    def rotate(self, x_BLNH, context: Context, layer: LayerFlags) -> jax.Array:
        """Applies rotary positions in the layers that have them."""
        rope = self.config.rope
        angles = context.angles_full
        if angles is None:
            return x_BLNH
        if context.angles_local is not None:
            angles = jnp.where(layer.sliding, context.angles_local, angles)
        temperature = rope_temperature(rope)
        if not all(rope.layer_pattern):
            angles, temperature = jnp.where(layer.rotated, angles, 0.0), jnp.where(layer.rotated, temperature, 1.0)
        return rotate(x_BLNH, angles, temperature, rope.interleaved)

    def _constrained_inputs(self, x_BLD, context: Context, layer: LayerFlags) -> QKV:
        """`inputs`, pinned to the mesh and named for `model.remat`."""
        qkv = self.inputs(x_BLD, context, layer)
        pin = lambda x, heads: checkpoint_name("qkv_proj", context.constrain(x, ("batch", "length", heads, "head_dim")))
        return QKV(pin(qkv.queries_BLNH, "heads"), pin(qkv.keys_BLKH, "kv_heads"), pin(qkv.values_BLKH, "kv_heads"))

    def _options(self) -> dict:
        a = self.config.attention
        scale = (a.head_dim**-0.5 if a.scale is None else a.scale) * score_temperature(self.config.rope)
        return {"scale": scale, "soft_cap": a.logit_softcap, "sinks_N": None if self.sinks is None else self.sinks[...]}

    def __call__(self, x_BLD, context: Context, layer: LayerFlags, rng):
        a, options = self.config.attention, self._options()
        q_BLNH, k_BLKH, v_BLKH = self._constrained_inputs(x_BLD, context, layer)
        positions, segments = context.positions, context.segments
        weights_BNLS = None
        if context.shows_attention or (a.dropout and rng is not None):  # both need the weights of whole rows
            mask = attention_mask(positions, positions, segments, segments, layer.window, context.shown)
            out = attention(q_BLNH, k_BLKH, v_BLKH, mask, dropout_rate=a.dropout, rng=rng, **options)
            out = checkpoint_name("attn_out", out)
            if context.shows_attention:
                weights_BNLS = per_head_weights(q_BLNH, k_BLKH, mask, **options)
        else:
            rows = Keys(k_BLKH, v_BLKH, positions, segments, context.shown)
            how = {"block": a.block_size, "across": a.context_parallel, "window": layer.window}
            cut = context.constrain.num_shards("length") > 1
            kernel = kernels.select_implementation(
                self.config, q_BLNH.shape[1], context.constrain.platform, rows_cut=cut
            )
            how |= {"kernel": kernel, "windows": kernels.windows(self.config)}
            out = row_attention(context.constrain, q_BLNH, rows, **how, **options)
        return self.out(out), weights_BNLS

    def step(self, x_BLD, cache: LayerKVCache, context: Context, layer: LayerFlags):
        q_BLNH, k_BLKH, v_BLKH = self._constrained_inputs(x_BLD, context, layer)
        cache = write_cache(cache, k_BLKH, v_BLKH, context.positions, context.first_row)
        rows = cache, context.positions, context.first_row
        out = cached_attention(q_BLNH, *rows, window=layer.window, shown=context.shown, **self._options())
        return self.out(out), cache

    @classmethod
    def init_cache(cls, config: ModelConfig, rows: int, capacity: int, constrain: ShardingConstraint) -> LayerKVCache:
        return init_layer_cache(config, rows, capacity, constrain)

    @classmethod
    def flops_per_token(cls, config: ModelConfig, layer: LayerFlags, seq_len: int) -> float:
        """Two products, as wide as all heads together, over the keys that a query sees.

        In a causal model these are on average half of the row, or fewer in a window; an encoder sees as many after it.
        What a prompt's tokens see of later ones (mask=prefix) is not counted.
        """
        a = config.attention
        window = min(int(layer.window), seq_len)
        before = window - window**2 / (2 * seq_len)  # query i sees min(i + 1, window) keys
        keys = 2 * before if a.mask is AttentionMask.bidirectional else before
        return 2 * a.num_heads * (a.head_dim + (a.v_head_dim or a.head_dim)) * keys
