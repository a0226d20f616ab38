"""The attention of a layer: queries, keys and values from its input, plain or out of one narrow vector, and back.

Shape letters: B batch, L length, S key length, D model, N query heads, K kv heads, H head dim, A latent.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import kernels
from models.attention.flash import Keys, row_attention
from models.attention.ops import attention, attention_mask, cached_attention, per_head_weights
from models.config import ModelConfig, QKNorm
from models.forward_context import Context, LayerFlags
from models.kv_cache import write_cache
from models.layers import Linear, Normalization, param, rope_temperature, rotate, score_temperature
from models.remat import checkpoint_name


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, out_std: float):
        a, D = config.attention, config.embed_dim
        N, H = a.num_heads, a.v_head_dim or a.head_dim
        self.config = config
        self.make_inputs(rngs, config)
        out_axes = ("heads", "head_dim", "embed")
        self.out = Linear(rngs, config, "BLNH,NHD->BLD", (N, H, D), out_axes, std=out_std, bias_dims=int(a.out_bias))
        self.sinks = param(rngs, (N,), ("heads",), 0, config) if a.sinks else None

    def make_inputs(self, rngs: nnx.Rngs, config: ModelConfig) -> None:
        """What makes queries, keys and values."""
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

    def inputs(self, x_BLD, context: Context, layer: LayerFlags) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, L, N, H], keys [B, L, K, H] and values [B, L, K, H], normalised and rotated."""
        q_BLNH, k_BLKH, v_BLKH = self.query(x_BLD), self.key(x_BLD), self.value(x_BLD)
        if self.query_norm is not None and self.key_norm is not None:
            q_BLNH, k_BLKH = self.query_norm(q_BLNH), self.key_norm(k_BLKH)
        return self.rotate(q_BLNH, context, layer), self.rotate(k_BLKH, context, layer), v_BLKH

    def rotate(self, x_BLNH, context: Context, layer: LayerFlags) -> jax.Array:
        """Rotary positions, in the layers that have them."""
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

    def __call__(self, x_BLD, context: Context, layer: LayerFlags, cached, rng):
        """Returns the output [B, L, D], the keys and values of this layer, cached ones included, and its weights
        [B, N, L, S] where they are asked for.
        """
        a = self.config.attention
        q_BLNH, k_BLKH, v_BLKH = self.inputs(x_BLD, context, layer)
        q_BLNH = checkpoint_name("qkv_proj", context.constrain(q_BLNH, ("batch", "length", "heads", "head_dim")))
        k_BLKH = checkpoint_name("qkv_proj", context.constrain(k_BLKH, ("batch", "length", "kv_heads", "head_dim")))
        v_BLKH = checkpoint_name("qkv_proj", context.constrain(v_BLKH, ("batch", "length", "kv_heads", "head_dim")))
        scale = (a.head_dim**-0.5 if a.scale is None else a.scale) * score_temperature(self.config.rope)
        options = {
            "scale": scale,
            "soft_cap": a.logit_softcap,
            "sinks_N": None if self.sinks is None else self.sinks[...],
        }
        weights_BNLS = None
        positions, segments = context.positions, context.segments
        if cached is not None:
            cached = write_cache(cached, k_BLKH, v_BLKH, positions, context.first_row)
            rows = cached, positions, context.first_row
            out = cached_attention(q_BLNH, *rows, window=layer.window, shown=context.shown, **options)
        elif context.shows_attention or (a.dropout and rng is not None):  # they need the weights of whole rows
            mask = attention_mask(positions, positions, segments, segments, layer.window, context.shown)
            out = attention(q_BLNH, k_BLKH, v_BLKH, mask, dropout_rate=a.dropout, rng=rng, **options)
            out = checkpoint_name("attn_out", out)
            if context.shows_attention:
                weights_BNLS = per_head_weights(q_BLNH, k_BLKH, mask, **options)
        else:
            rows = Keys(k_BLKH, v_BLKH, positions, segments, context.shown)
            how = {"block": a.block_size, "across": a.context_parallel, "window": layer.window}
            kernel = kernels.select_implementation(self.config, q_BLNH.shape[1], context.constrain.platform)
            how |= {"kernel": kernel, "windows": kernels.windows(self.config)}
            out = row_attention(context.constrain, q_BLNH, rows, **how, **options)
        return self.out(out), cached, weights_BNLS


class LatentAttention(Attention):
    """Keys and values grow out of one narrow vector; one rotated key serves all heads (DeepSeek-V2, section 2.1)."""

    def make_inputs(self, rngs: nnx.Rngs, config: ModelConfig) -> None:
        a, D, std = config.attention, config.embed_dim, config.init_std
        latent, N, H = a.mla, a.num_heads, a.head_dim
        V = a.v_head_dim or H
        down = lambda width, bias: Linear(
            rngs, config, "BLD,DA->BLA", (D, width), ("embed", "latent"), std=std, bias_dims=bias
        )
        up = lambda rank, width: Linear(
            rngs, config, "BLA,ANH->BLNH", (rank, N, width), ("latent", "heads", "head_dim"), std=std
        )
        norm = lambda rank: Normalization(rngs, config, (rank,), ("latent",))
        R, rank = latent.q_lora_rank, latent.kv_lora_rank
        self.query_down = down(R, int(a.out_bias)) if R else None
        self.query_down_norm = norm(R) if R else None
        heads = (D, N, H), ("embed", "heads", "head_dim")
        self.query = up(R, H) if R else Linear(rngs, config, "BLD,DNH->BLNH", *heads, std=std)
        self.key_value_down = down(rank + latent.qk_rope_head_dim, int(a.out_bias))
        self.key_value_down_norm = norm(rank)
        self.key_value = up(rank, H - latent.qk_rope_head_dim + V)

    def inputs(self, x_BLD, context: Context, layer: LayerFlags) -> tuple[jax.Array, jax.Array, jax.Array]:
        a = self.config.attention
        rank, plain = a.mla.kv_lora_rank, a.head_dim - a.mla.qk_rope_head_dim
        q_BLA = x_BLD
        if self.query_down is not None and self.query_down_norm is not None:
            q_BLA = self.query_down_norm(self.query_down(x_BLD))
        q_BLNH = self.query(q_BLA)
        down_BLA = self.key_value_down(x_BLD)
        kv_BLNH = self.key_value(self.key_value_down_norm(down_BLA[..., :rank]))
        k_BL1H = self.rotate(down_BLA[:, :, None, rank:], context, layer)
        k_BLNH = jnp.broadcast_to(k_BL1H, (*kv_BLNH.shape[:3], k_BL1H.shape[-1]))
        q_BLNH = jnp.concatenate([q_BLNH[..., :plain], self.rotate(q_BLNH[..., plain:], context, layer)], -1)
        return q_BLNH, jnp.concatenate([kv_BLNH[..., :plain], k_BLNH], -1), kv_BLNH[..., plain:]
