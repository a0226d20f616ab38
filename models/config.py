"""Model configuration: sizes and architecture choices that cover all supported model families."""

import enum
from dataclasses import dataclass, field


class Norm(enum.Enum):
    rms = "rms"  # Zhang & Sennrich 2019
    layer = "layer"  # Ba et al. 2016


class NormPlacement(enum.Enum):
    pre = "pre"  # before each sub-layer: GPT-2, Llama
    post = "post"  # after each sub-layer, before the residual add: OLMo 2
    sandwich = "sandwich"  # before and after each sub-layer: Gemma 2 and 3


class QKNorm(enum.Enum):
    none = "none"
    head = "head"  # per head, over head_dim: Qwen3, Gemma 3
    projection = "projection"  # over all heads together: OLMo 2


class Position(enum.Enum):
    rope = "rope"  # rotary: Su et al. 2021
    learned = "learned"  # an embedding table of max_seq_len positions: GPT-2
    none = "none"


class RopeScaling(enum.Enum):
    none = "none"
    linear = "linear"  # divides positions by `factor`: Chen et al. 2023
    llama3 = "llama3"  # scales long wavelengths, keeps short ones, interpolates between: Llama 3.1
    yarn = "yarn"  # Peng et al. 2023, including its attention temperature
    dynamic = "dynamic"  # "dynamic NTK": a larger base for rows longer than `original_max_seq_len`
    longrope = "longrope"  # one factor per wavelength: Ding et al. 2024; Phi-3 and Phi-4-mini


class Activation(enum.Enum):
    silu = "silu"
    gelu = "gelu"
    gelu_tanh = "gelu_tanh"
    gelu_sigmoid = "gelu_sigmoid"  # x sigmoid(1.702 x): Hendrycks & Gimpel 2016, section 2; GPT-OSS
    relu = "relu"
    relu2 = "relu2"


class LayerKind(enum.Enum):
    full = "full"  # attends to all earlier tokens of the document
    sliding = "sliding"  # attends to the last `sliding_window` tokens of the document


class AttentionMask(enum.Enum):
    """Tokens of its document that a token attends to."""

    causal = "causal"  # itself and earlier tokens: a decoder
    prefix = "prefix"  # also all prompt tokens, which are excluded from the loss: Raffel et al. 2020, section 3.2.1
    bidirectional = "bidirectional"  # all tokens: an encoder


NON_CAUSAL_MASKS = (AttentionMask.prefix, AttentionMask.bidirectional)


class ContextParallel(enum.Enum):
    """Exchange of keys and values between devices when `mesh.context` shards rows."""

    ring = "ring"  # shards of keys and values rotate around a ring of devices: Liu et al. 2023 [2310.01889]
    all_gather = "all_gather"  # each device gathers all keys and values of a row: Llama 3 (2024, section 3.3.2)


class AttentionImplementation(enum.Enum):
    """Attention implementation in training, for rows that are not sharded (models/attention/kernels.py)."""

    auto = "auto"  # the kernel of the platform if it supports the model and agrees with xla, otherwise xla
    xla = "xla"  # XLA operations, computed block by block for long rows
    splash = "splash"  # Pallas splash attention, TPU
    triton = "triton"  # Pallas FlashAttention-2 in Triton, GPU


class RouterScore(enum.Enum):
    softmax = "softmax"  # over all experts; with norm_topk_prob equal to a softmax over the selected experts (GPT-OSS)
    sigmoid = "sigmoid"  # of each expert independently: DeepSeek-V3


class LoadBalancing(enum.Enum):
    none = "none"
    aux_loss = "aux_loss"  # auxiliary load-balancing loss, computed per row: Fedus et al. 2021, section 2.2
    bias = "bias"  # auxiliary-loss-free: a per-expert bias, used for selection only: DeepSeek-V3, section 2.1.2


class Dispatch(enum.Enum):
    dropless = "dropless"  # no token is dropped: tokens sorted by expert, one grouped matmul (MegaBlocks)
    capacity = "capacity"  # limited tokens per expert and row, the rest is dropped (GShard); static shapes


class Dtype(enum.Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Remat(enum.Enum):
    none = "none"  # save all activations
    full = "full"  # save layer inputs only, recompute everything else
    save_dots = "save_dots"  # save the outputs of matmuls with weights
    save_qkv = "save_qkv"  # save queries, keys, values and the attention output
    save_attn_out = "save_attn_out"  # save the attention output


SAVED_NAMES: dict[Remat, tuple[str, ...]] = {  # in addition to "layer_input", which is always saved
    Remat.full: (),
    Remat.save_attn_out: ("attn_out",),
    Remat.save_qkv: ("qkv_proj", "attn_out"),
    Remat.save_dots: ("product",),
    Remat.none: ("product", "qkv_proj", "attn_out", "attn_weights"),
}
# All names that `models.remat.checkpoint_name` accepts
CHECKPOINT_NAMES = ("layer_input", *SAVED_NAMES[Remat.none])


class MatmulPrecision(enum.Enum):
    """Precision of matmuls with layer weights in training (models/quantization/matmul_8bit.py)."""

    full = "full"  # in model.dtype
    int8 = "int8"  # TPU, or GPU since Ampere
    fp8 = "fp8"  # GPU since Hopper


class ActivationOffload(enum.Enum):
    """Saved activations that can be offloaded to host memory until the backward pass."""

    layer_input = "layer_input"  # input of each layer
    qkv_proj = "qkv_proj"  # queries, keys and values; needs model.remat=save_qkv
    attn_out = "attn_out"  # attention output; needs model.remat=save_qkv or save_attn_out


@dataclass
class RopeConfig:
    theta: float = 10_000.0  # Base of the rotary frequencies
    local_theta: float | None = None  # Base of sliding-window layers; null: theta
    partial_rotary_factor: float = 1.0  # Fraction of head_dim that is rotated
    scaling: RopeScaling = RopeScaling.none  # Context extension method; with local_theta it applies to full layers only
    factor: float = 1.0  # Factor by which scaling extends the context
    original_max_seq_len: int = 8192  # llama3, yarn, dynamic, longrope: context length of pretraining, in tokens
    low_freq_factor: float = 1.0  # llama3: rotations below which a wavelength is fully scaled
    high_freq_factor: float = 4.0  # llama3: rotations above which a wavelength is not scaled
    beta_fast: float = 32.0  # yarn: rotations at the high-frequency end of the ramp
    beta_slow: float = 1.0  # yarn: rotations at the low-frequency end of the ramp
    truncate: bool = True  # yarn: round the ends of the ramp to integer dims; false for GPT-OSS
    short_factors: list[float] = field(default_factory=list)  # longrope: per pair, rows up to original_max_seq_len
    long_factors: list[float] = field(default_factory=list)  # longrope: per pair, longer rows
    mscale: float = 1.0  # yarn: coefficient of the attention temperature; DeepSeek-V2
    mscale_all_dim: float = 0.0  # yarn: coefficient of the temperature applied to the score scale
    interleaved: bool = False  # Rotate pairs (2i, 2i + 1) instead of halves: DeepSeek
    # Layers that apply RoPE, repeated over the layers; false is NoPE: SmolLM3
    layer_pattern: list[bool] = field(default_factory=lambda: [True])


@dataclass
class MLAConfig:
    """Multi-head latent attention (MLA; DeepSeek-V2, section 2.1): keys and values from one low-rank vector."""

    kv_lora_rank: int = 0  # Rank of the shared key-value projection; 0: standard attention
    q_lora_rank: int = 0  # Rank of the query projection; 0: queries are projected at full rank
    qk_rope_head_dim: int = 16  # Rotated dims at the end of head_dim; their key is shared by all heads


@dataclass
class AttentionConfig:
    num_heads: int = 4  # Number of query heads
    num_kv_heads: int = 4  # Number of key-value heads; fewer than num_heads: grouped-query attention
    head_dim: int = 16  # Head width of queries and keys
    v_head_dim: int | None = None  # Head width of values (MLA only); null: head_dim
    mla: MLAConfig = field(default_factory=MLAConfig)
    qk_norm: QKNorm = QKNorm.none  # Normalization of queries and keys
    qkv_bias: bool = False  # Bias of the query, key and value projections
    out_bias: bool = False  # Bias of the output projection
    mask: AttentionMask = AttentionMask.causal  # Attention mask
    sliding_window: int = 4096  # Window of sliding layers, in tokens, including the query's own
    # Kind of each layer, repeated over the layers
    layer_types: list[LayerKind] = field(default_factory=lambda: [LayerKind.full])
    logit_softcap: float | None = None  # Soft cap of scores, cap * tanh(score / cap): Gemma 2
    scale: float | None = None  # Scale of scores; null: head_dim ** -0.5
    sinks: bool = False  # Attention sinks: one learned extra logit per head in the softmax: GPT-OSS
    # Dropout rate of attention weights
    dropout: float = field(default=0.0, metadata={"min": 0, "below": 1})
    # Block size of blockwise attention in tokens (implementation=xla); 0: full rows; null: 1024 for rows above 2048
    # tokens, otherwise full rows, split for causal models into four query blocks that skip later keys
    block_size: int | None = field(default=None, metadata={"min": 0, "hint": "0: full rows; null: by length"})
    context_parallel: ContextParallel = ContextParallel.ring  # Method of context parallelism, mesh.context > 1
    implementation: AttentionImplementation = AttentionImplementation.auto  # Attention kernel used in training


@dataclass
class MLPConfig:
    intermediate_dim: int = 256  # Width of the hidden layer
    gated: bool = True  # Gated MLP (GLU), activation(x Wg) * (x Wu): Shazeer 2020
    activation: Activation = Activation.silu  # Activation function
    bias: bool = False  # Bias of the projections
    # Upper bound of the gate and absolute bound of the up projection; null: no clamp; GPT-OSS
    activation_clamp: float | None = None
    up_offset: float = 0.0  # Added to the up projection before the gating product; 1 for GPT-OSS


@dataclass
class MoEConfig:
    """Mixture of experts in place of the feed-forward layer; the activation is that of `mlp`."""

    num_experts: int = 0  # Number of routed experts; 0: dense model
    first_num_dense_layers: int = 0  # Number of initial layers with a dense MLP: DeepSeek
    experts_per_token: int = 2  # Experts per token (top-k)
    intermediate_dim: int = 256  # Width of the hidden layer of each expert
    shared_intermediate_dim: int = 0  # Total hidden width of shared experts; 0: no shared experts
    bias: bool = False  # Bias of the expert projections: GPT-OSS
    router_bias: bool = False  # Bias of the router: GPT-OSS
    router_score: RouterScore = RouterScore.softmax  # Score function of the router
    norm_topk_prob: bool = True  # Divide the top-k weights by their sum
    routed_scaling_factor: float = 1.0  # Factor of the top-k weights after normalization: DeepSeek
    num_groups: int = 1  # Expert groups for group-limited routing: DeepSeek-V2, section 2.2.2
    topk_groups: int = 1  # Groups selected per token
    group_score_topk: int = 2  # Top scores summed to rank a group; 2 for DeepSeek-V3, 1 for DeepSeek-V2
    load_balancing: LoadBalancing = LoadBalancing.aux_loss  # Load balancing method
    # Weight of the auxiliary load-balancing loss, which is 1 at equal load
    aux_loss_weight: float = field(default=0.01, metadata={"min": 0})
    # Weight of the router z-loss, the squared logsumexp of router logits: ST-MoE, section 3.2 (1e-3)
    router_z_loss_weight: float = field(default=0.0, metadata={"min": 0})
    dispatch: Dispatch = Dispatch.dropless  # Token dispatch
    # dispatch=capacity: expert capacity per row, relative to an equal share of the tokens
    capacity_factor: float = field(default=1.25, metadata={"above": 0})


# Fields that change the computation but not the model: a run may resume with other values.
COMPUTE_KEYS = (
    "remat", "scan_unroll", "matmul_precision", "activation_offload", "pipeline",
    "attention.block_size", "attention.context_parallel", "attention.implementation",
)  # fmt: skip


@dataclass
class PipelineConfig:
    """Pipeline parallelism, mesh.stage > 1."""

    # Microbatches per batch, a multiple of mesh.stage; 0: up to 4 per stage
    num_microbatches: int = 0
    num_repeats: int = 1  # Layer groups per stage (circular schedule); more reduce the bubble, add transfers


@dataclass
class ModelConfig:
    """A decoder-only transformer."""

    num_layers: int = field(default=2, metadata={"min": 1})  # Number of transformer layers
    embed_dim: int = field(default=64, metadata={"min": 1})  # Width of the residual stream
    vocab_size: int = 0  # Rows of the embedding; 0: size of the tokenizer's vocabulary
    # Width of the score head that replaces the LM head (reward, classes); set by the objective; 0: LM head
    num_labels: int = field(default=0, metadata={"min": 0})
    # Size of the learned position table and maximum length of generated text, in tokens
    max_seq_len: int = field(default=8192, metadata={"min": 1})
    norm: Norm = Norm.rms  # Normalization
    norm_placement: NormPlacement = NormPlacement.pre  # Position of the norms in a layer
    norm_eps: float = 1e-5  # Epsilon of the norms
    norm_unit_offset: bool = False  # Store norm scales as w and apply 1 + w: Gemma
    norm_bias: bool = True  # Bias of layer norm
    position: Position = Position.rope  # Position embedding
    rope: RopeConfig = field(default_factory=RopeConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mlp: MLPConfig = field(default_factory=MLPConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    # Multi-token prediction (MTP) modules, objective=multi_token: DeepSeek-V3, section 2.2
    mtp_num_layers: int = field(default=0, metadata={"min": 0})
    tied_embeddings: bool = True  # Share the weights of the embedding and the output head
    scale_embeddings: bool = False  # Multiply embeddings by sqrt(embed_dim): Gemma
    final_logit_softcap: float | None = None  # Soft cap of output logits: Gemma 2
    # Dropout rate of embeddings and sub-layer outputs
    dropout: float = field(default=0.0, metadata={"min": 0, "below": 1})
    init_std: float = 0.02  # Standard deviation of initial weights
    init_scaled_residual: bool = True  # Scale init of output projections by 1/sqrt(2 num_layers): GPT-2
    # muP: embed_dim at which learning rate and init_std were tuned (models/mup.py); null: no transfer
    mup_base_width: int | None = field(default=None, metadata={"min": 1})
    dtype: Dtype = Dtype.bfloat16  # Dtype of activations
    param_dtype: Dtype = Dtype.float32  # Dtype of parameters
    matmul_precision: MatmulPrecision = MatmulPrecision.full  # Precision of layer matmuls in training
    remat: Remat = Remat.none  # Activation checkpointing: activations to save
    # Layers per iteration of the layer scan; more run slightly faster and compile slower; 0: unroll all
    scan_unroll: int = field(default=1, metadata={"min": 0, "hint": "1: a loop; 0: no loop"})
    # Saved activations to offload to host memory; needs model.remat=full, save_qkv or save_attn_out
    activation_offload: list[ActivationOffload] = field(default_factory=list)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)

    @property
    def width_ratio(self) -> float:
        """Width relative to `mup_base_width`; 1 without it."""
        return 1.0 if self.mup_base_width is None else self.embed_dim / self.mup_base_width

    @property
    def layers_before_experts(self) -> int:
        """Number of initial dense layers of a mixture of experts; they form a separate stack."""
        return self.moe.first_num_dense_layers if self.moe.num_experts else 0

    def refuse_masks(self, *masks: AttentionMask, why: str) -> None:
        """Checks that `attention.mask` is none of `masks`. Raises: ValueError with `why`."""
        if self.attention.mask in masks:
            raise ValueError(f"model.attention.mask={self.attention.mask.name}: {why}")

    def validate(self) -> None:
        """Checks the configuration. Raises: ValueError naming key, value, reason and valid values."""
        a = self.attention
        if a.num_heads % a.num_kv_heads:
            valid = [k for k in range(1, a.num_heads + 1) if a.num_heads % k == 0]
            raise ValueError(
                f"model.attention.num_kv_heads={a.num_kv_heads}: must divide num_heads={a.num_heads}; valid: {valid}"
            )
        if self.position is Position.rope:
            rotated = (
                int(a.head_dim * self.rope.partial_rotary_factor) if not a.mla.kv_lora_rank else a.mla.qk_rope_head_dim
            )
            if rotated < 2 or rotated % 2:
                raise ValueError(
                    f"model.attention.head_dim={a.head_dim}: model.rope.partial_rotary_factor="
                    f"{self.rope.partial_rotary_factor} rotates {rotated} dims; must be even and at least 2"
                )
        if not a.layer_types:
            raise ValueError("model.attention.layer_types=[]: must list at least one of full, sliding")
        for name in ("short_factors", "long_factors"):
            count, longrope = len(getattr(self.rope, name)), self.rope.scaling is RopeScaling.longrope
            if self.position is Position.rope and longrope and count != rotated // 2:
                raise ValueError(
                    f"model.rope.{name}: has {count} values; must have {rotated // 2}, one per rotated pair"
                )
        if not self.rope.layer_pattern:
            raise ValueError("model.rope.layer_pattern=[]: must have at least one value, e.g. [true]")
        self._validate_latent()
        if self.moe.num_experts:
            self._validate_experts()
        no_offload = self.remat in (Remat.none, Remat.save_dots)
        offloadable = () if no_offload else ("layer_input", *SAVED_NAMES[self.remat])
        for name in self.activation_offload:
            if name.name not in offloadable:
                raise ValueError(
                    f"model.activation_offload: {name.name} is not saved, or cannot be offloaded, with model.remat="
                    f"{self.remat.name}; valid: {', '.join(offloadable) or 'nothing'}; layer_input needs "
                    "model.remat=full, save_qkv or save_attn_out"
                )

    def _validate_latent(self) -> None:
        a = self.attention
        if not a.mla.kv_lora_rank:
            if a.v_head_dim not in (None, a.head_dim):
                raise ValueError(
                    f"model.attention.v_head_dim={a.v_head_dim}: a width other than head_dim={a.head_dim} needs latent "
                    "attention; set model.attention.mla.kv_lora_rank, or v_head_dim=null"
                )
            return
        if a.num_kv_heads != a.num_heads:
            raise ValueError(
                f"model.attention.num_kv_heads={a.num_kv_heads}: latent attention has one key per query head; "
                f"set num_kv_heads={a.num_heads}"
            )
        if not 0 < a.mla.qk_rope_head_dim <= a.head_dim:
            raise ValueError(
                f"model.attention.mla.qk_rope_head_dim={a.mla.qk_rope_head_dim}: must be 2 to head_dim={a.head_dim}"
            )
        if a.qk_norm is not QKNorm.none or a.qkv_bias or self.position is not Position.rope:
            raise ValueError(
                "model.attention.mla.kv_lora_rank: latent attention supports only model.position=rope, "
                "model.attention.qk_norm=none and model.attention.qkv_bias=false"
            )

    def _validate_experts(self) -> None:
        e = self.moe
        if not 1 <= e.experts_per_token <= e.num_experts:
            raise ValueError(
                f"model.moe.experts_per_token={e.experts_per_token}: must be 1 to num_experts={e.num_experts}"
            )
        if not 0 <= e.first_num_dense_layers < self.num_layers:
            raise ValueError(
                f"model.moe.first_num_dense_layers={e.first_num_dense_layers}: must leave at least one MoE layer; "
                f"valid: 0 to {self.num_layers - 1}, or num_experts=0"
            )
        if e.num_experts % e.num_groups:
            valid = [n for n in range(1, e.num_experts + 1) if e.num_experts % n == 0]
            raise ValueError(
                f"model.moe.num_groups={e.num_groups}: must divide num_experts={e.num_experts}; valid: {valid}"
            )
        size = e.num_experts // e.num_groups
        if not 1 <= e.topk_groups <= e.num_groups or e.topk_groups * size < e.experts_per_token:
            least = -(-e.experts_per_token // size)
            raise ValueError(
                f"model.moe.topk_groups={e.topk_groups}: experts_per_token={e.experts_per_token} needs "
                f"at least {least} groups of {size} experts; valid: {least} to {e.num_groups}"
            )
        if e.num_groups > 1 and not 1 <= e.group_score_topk <= size:
            raise ValueError(
                f"model.moe.group_score_topk={e.group_score_topk}: a group has {size} experts; valid: 1 to {size}"
            )
