"""Multi-head latent attention (MLA): keys and values from one narrow vector (DeepSeek-V2 2024, section 2.1).

Shape letters: B batch, L length, D model, N heads, H head dim, A latent.
"""

import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig
from models.forward_context import Context, LayerFlags
from models.layers import Linear, Normalization
from models.mixers.multi_head_attention import QKV, Attention


class LatentAttention(Attention):
    """One rotated key serves all heads. The cache holds full keys and values, as that of `Attention`."""

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

    def inputs(self, x_BLD, context: Context, layer: LayerFlags) -> QKV:
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
        return QKV(q_BLNH, jnp.concatenate([kv_BLNH[..., :plain], k_BLNH], -1), kv_BLNH[..., plain:])
