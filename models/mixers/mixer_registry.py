"""All sequence mixers by kind, and which kind each layer of a model uses."""

from models.config import LayerKind, ModelConfig
from models.forward_context import MTP_LAYER, LayerFlags, layer_flags
from models.kv_cache import BLOCK
from models.logical_axes import ShardingConstraint, no_constraint
from models.mixers.latent_attention import LatentAttention
from models.mixers.mixer import Cache, Mixer
from models.mixers.multi_head_attention import Attention

MIXERS: dict[str, type[Mixer]] = {
    "full_attention": Attention,
    "sliding_attention": Attention,  # the window is an array (`LayerFlags`), so one scan runs both kinds
    "latent_attention": LatentAttention,
}


def mixer_kind(config: ModelConfig, layer: int) -> str:
    """The key in `MIXERS` of layer `layer`. Layers of multi-token prediction come after the last and are full."""
    a = config.attention
    if a.mla.kv_lora_rank:
        return "latent_attention"
    sliding = layer < config.num_layers and a.layer_types[layer % len(a.layer_types)] is LayerKind.sliding
    return "sliding_attention" if sliding else "full_attention"


def mixer_class(config: ModelConfig, layer: int) -> type[Mixer]:
    return MIXERS[mixer_kind(config, layer)]


def init_cache(config: ModelConfig, rows: int, length: int, constrain: ShardingConstraint = no_constraint) -> Cache:
    """An empty cache of all layers for `rows` sequences of up to `length` tokens, rounded up to whole blocks."""
    capacity = -(-length // BLOCK) * BLOCK
    layers = range(config.num_layers)
    return Cache(tuple(mixer_class(config, i).init_cache(config, rows, capacity, constrain) for i in layers), capacity)


def rewindable(config: ModelConfig) -> bool:
    """Whether decoding may continue a cached row from any earlier position."""
    return all(mixer_class(config, i).rewindable for i in range(config.num_layers))


def mixer_flops(config: ModelConfig, seq_len: int) -> float:
    """Forward FLOPs of a token in all mixers other than matmuls with weights, on average over a row of `seq_len`.

    Modules of multi-token prediction included.
    """
    layers = layer_flags(config)
    kinds = [LayerFlags(*(x[i] for x in layers)) for i in range(config.num_layers)]
    kinds += [MTP_LAYER] * config.mtp_num_layers
    return sum(mixer_class(config, i).flops_per_token(config, kind, seq_len) for i, kind in enumerate(kinds))
