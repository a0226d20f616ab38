"""What a decoder is: sizes and choices. Every dense family is a point in this space."""

import enum
from dataclasses import dataclass, field


class Norm(enum.Enum):
    rms = "rms"  # Zhang & Sennrich 2019
    layer = "layer"  # Ba et al. 2016


class NormPlacement(enum.Enum):
    pre = "pre"  # before each sub-layer: GPT-2, Llama
    post = "post"  # on each sub-layer's output, before the residual sum: OLMo 2
    sandwich = "sandwich"  # both: Gemma 2 and 3


class QKNorm(enum.Enum):
    none = "none"
    head = "head"  # over head_dim: Qwen3, Gemma 3
    projection = "projection"  # over all heads at once: OLMo 2


class Position(enum.Enum):
    rope = "rope"  # rotary: Su et al. 2021
    learned = "learned"  # a table of max_seq_len vectors: GPT-2
    none = "none"


class RopeScaling(enum.Enum):
    none = "none"
    linear = "linear"  # positions divided by `factor`: Chen et al. 2023
    llama3 = "llama3"  # long wavelengths divided, short ones kept, a ramp between: Llama 3.1
    yarn = "yarn"  # Peng et al. 2023, with its attention temperature


class Activation(enum.Enum):
    silu = "silu"
    gelu = "gelu"
    gelu_tanh = "gelu_tanh"
    relu = "relu"
    relu2 = "relu2"


class LayerKind(enum.Enum):
    full = "full"  # attends to everything before, in its document
    sliding = "sliding"  # attends to the last `sliding_window` tokens


class Dtype(enum.Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Remat(enum.Enum):
    none = "none"  # keep every activation
    full = "full"  # keep layer borders only, compute the rest again
    dots = "dots"  # keep matmul results of weights (Flax: dots_with_no_batch_dims_saveable)
    qkv = "qkv"  # keep queries, keys, values and the attention's result
    attention = "attention"  # keep the attention's result


@dataclass
class RopeConfig:
    theta: float = 10_000.0
    local_theta: float | None = None  # of sliding layers; null: theta
    fraction: float = 1.0  # of head_dim that is rotated
    scaling: RopeScaling = RopeScaling.none  # of full layers only where local_theta is set
    factor: float = 1.0
    original_max_seq_len: int = 8192  # llama3, yarn: what the model was first trained on
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn


@dataclass
class AttentionConfig:
    num_heads: int = 4
    num_kv_heads: int = 4  # fewer than num_heads: grouped queries
    head_dim: int = 16
    qk_norm: QKNorm = QKNorm.none
    qkv_bias: bool = False
    out_bias: bool = False
    sliding_window: int = 4096  # tokens that a sliding layer sees, its own included
    pattern: list[LayerKind] = field(default_factory=lambda: [LayerKind.full])  # repeated over the layers
    soft_cap: float | None = None  # cap * tanh(score / cap): Gemma 2
    scale: float | None = None  # of scores; null: head_dim ** -0.5
    dropout: float = 0.0  # of attention weights


@dataclass
class MLPConfig:
    hidden_dim: int = 256
    gated: bool = True  # activation(x Wg) * (x Wu), then Wd: Shazeer 2020
    activation: Activation = Activation.silu
    bias: bool = False


@dataclass
class ModelConfig:
    """A decoder-only transformer."""

    num_layers: int = 2
    embed_dim: int = 64
    vocab_size: int = 0  # rows of the embedding; 0: as many as the tokenizer has
    max_seq_len: int = 8192  # of learned positions, and the longest text to write
    norm: Norm = Norm.rms
    norm_placement: NormPlacement = NormPlacement.pre
    norm_eps: float = 1e-5
    norm_unit_offset: bool = False  # scales are stored as w and used as 1 + w: Gemma
    norm_bias: bool = True  # of layer norm
    position: Position = Position.rope
    rope: RopeConfig = field(default_factory=RopeConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mlp: MLPConfig = field(default_factory=MLPConfig)
    tied_embeddings: bool = True
    scale_embeddings: bool = False  # by sqrt(embed_dim): Gemma
    final_soft_cap: float | None = None  # of logits: Gemma 2
    dropout: float = 0.0  # of embeddings and of each sub-layer's output
    init_std: float = 0.02
    init_scaled_residual: bool = True  # output projections by 1/sqrt(2 num_layers): GPT-2
    dtype: Dtype = Dtype.bfloat16  # of activations; weights are kept in param_dtype
    param_dtype: Dtype = Dtype.float32
    remat: Remat = Remat.none

    def validate(self) -> None:
        """Raises: ValueError naming key, value, reason and what would be valid."""
        a = self.attention
        if a.num_heads % a.num_kv_heads:
            valid = [k for k in range(1, a.num_heads + 1) if a.num_heads % k == 0]
            raise ValueError(
                f"model.attention.num_kv_heads={a.num_kv_heads}: must divide num_heads={a.num_heads}; valid: {valid}"
            )
        if self.position is Position.rope:
            rotated = int(a.head_dim * self.rope.fraction)
            if rotated < 2 or rotated % 2:
                raise ValueError(
                    f"model.attention.head_dim={a.head_dim}: with model.rope.fraction={self.rope.fraction} "
                    f"{rotated} dims would be rotated; they must be even and at least 2"
                )
        if not a.pattern:
            raise ValueError("model.attention.pattern=[]: name at least one of full, sliding")
        for key, rate in (("dropout", self.dropout), ("attention.dropout", a.dropout)):
            if not 0 <= rate < 1:
                raise ValueError(f"model.{key}={rate}: must be at least 0 and below 1")
        for key in ("num_layers", "embed_dim", "max_seq_len"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)}: must be at least 1")
