"""What a decoder is: sizes and choices. Every family is a point in this space."""

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
    dynamic = "dynamic"  # a larger base for rows longer than `original_max_seq_len`: "NTK-aware", from transformers
    longrope = "longrope"  # each wavelength by a factor of its own: Ding et al. 2024; Phi-3 and Phi-4-mini


class Activation(enum.Enum):
    silu = "silu"
    gelu = "gelu"
    gelu_tanh = "gelu_tanh"
    gelu_sigmoid = "gelu_sigmoid"  # x sigmoid(1.702 x): Hendrycks & Gimpel 2016, section 2; GPT-OSS
    relu = "relu"
    relu2 = "relu2"


class LayerKind(enum.Enum):
    full = "full"  # attends to everything before, in its document
    sliding = "sliding"  # attends to the last `sliding_window` tokens


class AttentionMask(enum.Enum):
    """Which tokens of its document a token sees."""

    causal = "causal"  # itself and those before: a decoder
    prefix = "prefix"  # those of the prompt, too: Raffel et al. 2020, section 3.2.1. The prompt is what is not learnt
    bidirectional = "bidirectional"  # all: an encoder


OTHER_MASKS = (AttentionMask.prefix, AttentionMask.bidirectional)


class ContextParallel(enum.Enum):
    """How queries come to keys on other devices, where `mesh.context` cuts rows."""

    ring = "ring"  # keys travel around, a piece at a time: Liu et al. 2023 [2310.01889]
    all_gather = "all_gather"  # all keys of a row come to each device: Llama 3 (2024, section 3.3.2)


class AttentionImplementation(enum.Enum):
    """What computes attention in training, where rows are not cut (models/attention/kernels.py)."""

    auto = "auto"  # the platform's kernel where it supports the case and agrees with xla, else xla
    xla = "xla"  # plain operations, block by block where rows are long
    splash = "splash"  # of TPUs
    triton = "triton"  # of GPUs


class RouterScore(enum.Enum):
    softmax = "softmax"  # over all experts. Over the chosen ones (GPT-OSS) is the same, renormalised
    sigmoid = "sigmoid"  # of each expert by itself: DeepSeek-V3


class LoadBalancing(enum.Enum):
    none = "none"
    aux_loss = "aux_loss"  # an auxiliary loss: Fedus et al. 2021, section 2.2, within each row
    bias = "bias"  # a bias that counts in the choice only, moved against the load: DeepSeek-V3, section 2.1.2


class Dispatch(enum.Enum):
    dropless = "dropless"  # every token reaches all its experts: tokens sorted, one grouped product (MegaBlocks)
    capacity = "capacity"  # an expert takes so many tokens of each row and no more (GShard); shapes never vary


class Dtype(enum.Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Remat(enum.Enum):
    none = "none"  # keep every activation
    full = "full"  # keep layer borders only, compute the rest again
    save_dots = "save_dots"  # keep what products with weights give
    save_qkv = "save_qkv"  # keep queries, keys, values and the attention's result
    save_attn_out = "save_attn_out"  # keep the attention's result


SAVED_NAMES = {  # names of `models.remat.checkpoint_name`
    Remat.full: (),
    Remat.save_attn_out: ("attention",),
    Remat.save_qkv: ("qkv", "attention"),
    Remat.save_dots: ("product",),
    Remat.none: ("product", "qkv", "attention", "weights"),  # "weights": of attention
}


class MatmulPrecision(enum.Enum):
    """How the weights of layers are multiplied with in training (models/quantization/matmul_8bit.py)."""

    full = "full"  # in the dtype of activations
    int8 = "int8"
    fp8 = "fp8"


class ActivationOffload(enum.Enum):
    """Of what is kept for the backward pass: what waits for it in the memory of the host."""

    layer_input = "layer_input"  # what goes from layer to layer
    qkv_proj = "qkv_proj"  # with model.remat=save_qkv
    attn_out = "attn_out"  # the attention's result, with model.remat=save_qkv or attention


@dataclass
class RopeConfig:
    theta: float = 10_000.0  # Base of the rotary frequencies
    local_theta: float | None = None  # of sliding layers; null: theta
    partial_rotary_factor: float = 1.0  # of head_dim that is rotated
    scaling: RopeScaling = RopeScaling.none  # of full layers only where local_theta is set
    factor: float = 1.0  # Factor by which scaling extends the context
    original_max_seq_len: int = 8192  # llama3, yarn, dynamic, longrope: what the model was first trained on
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: the blend begins and ends at whole dims; GPT-OSS: not
    short_factors: list[float] = field(default_factory=list)  # longrope: of each pair, in rows up to that length
    long_factors: list[float] = field(default_factory=list)  # longrope: in longer ones
    mscale: float = 1.0  # yarn: weight of the temperature; DeepSeek-V2
    mscale_all_dim: float = 0.0  # yarn: of the part that goes into the scale of scores, and over all dims
    interleaved: bool = False  # neighbours (2i, 2i + 1) are rotated together, not halves: DeepSeek
    layer_pattern: list[bool] = field(default_factory=lambda: [True])  # which layers rotate, repeated; SmolLM3


@dataclass
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values grow out of one narrow vector."""

    kv_lora_rank: int = 0  # width of that vector; 0: plain attention
    q_lora_rank: int = 0  # the same for queries; 0: queries come straight from the layer's input
    qk_rope_head_dim: int = 16  # the last dims of head_dim: rotated, and one key for all heads


@dataclass
class AttentionConfig:
    num_heads: int = 4  # Number of query heads
    num_kv_heads: int = 4  # fewer than num_heads: grouped queries
    head_dim: int = 16  # of queries and keys
    v_head_dim: int | None = None  # of values; null: head_dim. Latent attention only
    mla: MLAConfig = field(default_factory=MLAConfig)
    qk_norm: QKNorm = QKNorm.none  # Normalization of queries and keys
    qkv_bias: bool = False  # Bias of the query, key and value projections
    out_bias: bool = False  # Bias of the output projection
    mask: AttentionMask = AttentionMask.causal  # Tokens that a token attends to
    sliding_window: int = 4096  # tokens that a sliding layer sees, its own included
    layer_types: list[LayerKind] = field(default_factory=lambda: [LayerKind.full])  # repeated over the layers
    logit_softcap: float | None = None  # cap * tanh(score / cap): Gemma 2
    scale: float | None = None  # of scores; null: head_dim ** -0.5
    sinks: bool = False  # a learned logit for each head in its softmax, which takes weight from all keys: GPT-OSS
    # Of attention weights
    dropout: float = field(default=0.0, metadata={"min": 0, "below": 1})
    # Keys and queries whose scores exist at once; 0: those of a whole row. null: 1024 in rows of more than 2048 tokens,
    # and in shorter ones, where no token sees a later one, a quarter of the queries and the keys up to its end
    block_size: int | None = field(default=None, metadata={"min": 0, "hint": "0: whole rows; null: by length"})
    context_parallel: ContextParallel = ContextParallel.ring  # with mesh.context above 1
    implementation: AttentionImplementation = AttentionImplementation.xla  # Implementation of attention


@dataclass
class MLPConfig:
    intermediate_dim: int = 256  # Width of the hidden layer
    gated: bool = True  # activation(x Wg) * (x Wu), then Wd: Shazeer 2020
    activation: Activation = Activation.silu  # Activation function
    bias: bool = False  # Bias of the projections
    # the gate is at most this, the other side within plus and minus this: GPT-OSS
    activation_clamp: float | None = None
    up_offset: float = 0.0  # added to the other side before the product: GPT-OSS 1


@dataclass
class MoEConfig:
    """Mixture of experts in place of the feed-forward layer. Their activation is that of `mlp`."""

    num_experts: int = 0  # 0: no layer has any
    first_num_dense_layers: int = 0  # the first layers, which keep the plain feed-forward layer: DeepSeek
    experts_per_token: int = 2  # Experts that each token is routed to
    intermediate_dim: int = 256  # of each expert
    shared_intermediate_dim: int = 0  # of the experts that every token sees, together; 0: there are none
    bias: bool = False  # in the experts: GPT-OSS
    router_bias: bool = False  # GPT-OSS
    router_score: RouterScore = RouterScore.softmax  # Normalization of router scores
    norm_topk_prob: bool = True  # the weights of the chosen experts are divided by their sum
    routed_scaling_factor: float = 1.0  # of these weights, thereafter: DeepSeek
    num_groups: int = 1  # groups of experts; a token chooses within the best of them only: DeepSeek-V2, section 2.2.2
    topk_groups: int = 1  # Groups of experts that a token may choose from
    group_score_topk: int = 2  # a group is worth its so many best scores together: DeepSeek-V3 2, DeepSeek-V2 1
    load_balancing: LoadBalancing = LoadBalancing.aux_loss  # Method of load balancing
    # times the auxiliary loss, which is 1 where all experts have the same load
    aux_loss_weight: float = field(default=0.01, metadata={"min": 0})
    # times the squared logsumexp of the router's logits: ST-MoE, section 3.2 (1e-3)
    router_z_loss_weight: float = field(default=0.0, metadata={"min": 0})
    dispatch: Dispatch = Dispatch.dropless  # How tokens reach their experts
    # capacity: an expert's room in a row, in even shares of the row's tokens
    capacity_factor: float = field(default=1.25, metadata={"above": 0})


# Of a model's fields those that say how to compute, not what: a run may go on with others.
COMPUTE_KEYS = (
    "remat", "unroll", "products", "offload", "pipeline", "attention.block_size", "attention.context_parallel", "attention.implementation",
)  # fmt: skip


@dataclass
class PipelineConfig:
    """With mesh.stage above 1."""

    # in which rows go through the stages, a multiple of mesh.stage. 0: up to 4 for each stage
    num_microbatches: int = 0
    num_repeats: int = 1  # groups of layers of each stage; more wait less, and send more


@dataclass
class ModelConfig:
    """A decoder-only transformer."""

    num_layers: int = field(default=2, metadata={"min": 1})  # Number of transformer layers
    embed_dim: int = field(default=64, metadata={"min": 1})  # Width of the residual stream
    vocab_size: int = 0  # rows of the embedding; 0: as many as the tokenizer has
    # numbers for each token in place of logits: a reward, scores of classes. The objective sets it
    outputs: int = field(default=0, metadata={"min": 0})
    max_seq_len: int = field(default=8192, metadata={"min": 1})  # of learned positions, and the longest text to write
    norm: Norm = Norm.rms  # Kind of normalization
    norm_placement: NormPlacement = NormPlacement.pre  # Place of the norms in a layer
    norm_eps: float = 1e-5  # Epsilon of the norms
    norm_unit_offset: bool = False  # scales are stored as w and used as 1 + w: Gemma
    norm_bias: bool = True  # of layer norm
    position: Position = Position.rope  # Kind of position embedding
    rope: RopeConfig = field(default_factory=RopeConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mlp: MLPConfig = field(default_factory=MLPConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    # modules that predict one token more each: DeepSeek-V3, section 2.2. objective=multi_token
    mtp_num_layers: int = field(default=0, metadata={"min": 0})
    tied_embeddings: bool = True  # Share the weights of the embedding and the output head
    scale_embeddings: bool = False  # by sqrt(embed_dim): Gemma
    final_logit_softcap: float | None = None  # of logits: Gemma 2
    dropout: float = field(default=0.0, metadata={"min": 0, "below": 1})  # of embeddings and of each sub-layer's output
    init_std: float = 0.02  # Standard deviation of initial weights
    init_scaled_residual: bool = True  # output projections by 1/sqrt(2 num_layers): GPT-2
    # Embed_dim at which rate and init_std were chosen (models/mup.py); null: this one
    mup_base_width: int | None = field(default=None, metadata={"min": 1})
    dtype: Dtype = Dtype.bfloat16  # of activations; weights are kept in param_dtype
    param_dtype: Dtype = Dtype.float32  # Dtype of parameters
    matmul_precision: MatmulPrecision = MatmulPrecision.full  # of the weights of layers, in training
    remat: Remat = Remat.none  # Activations to keep for the backward pass
    # layers in a turn of the loop over them: more run a little faster, and compile longer. 0: all
    scan_unroll: int = field(default=1, metadata={"min": 0, "hint": "1: a loop; 0: no loop"})
    # kept activations in the host's memory; remat full and its like
    activation_offload: list[ActivationOffload] = field(default_factory=list)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)

    @property
    def width_ratio(self) -> float:
        """How many times as wide as where it was tuned."""
        return 1.0 if self.mup_base_width is None else self.embed_dim / self.mup_base_width

    @property
    def layers_before_experts(self) -> int:
        """The first layers that a mixture of experts keeps plain, in a stack of their own."""
        return self.moe.first_num_dense_layers if self.moe.num_experts else 0

    def refuse_masks(self, *masks: AttentionMask, why: str) -> None:
        """Raises: ValueError where `attention.mask` is one of them."""
        if self.attention.mask in masks:
            raise ValueError(f"model.attention.mask={self.attention.mask.name}: {why}")

    def validate(self) -> None:
        """Raises: ValueError naming key, value, reason and what would be valid."""
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
                    f"model.attention.head_dim={a.head_dim}: with model.rope.partial_rotary_factor={self.rope.partial_rotary_factor} "
                    f"{rotated} dims would be rotated; they must be even and at least 2"
                )
        if not a.layer_types:
            raise ValueError("model.attention.layer_types=[]: name at least one of full, sliding")
        for name in ("short_factors", "long_factors"):
            count, longrope = len(getattr(self.rope, name)), self.rope.scaling is RopeScaling.longrope
            if self.position is Position.rope and longrope and count != rotated // 2:
                raise ValueError(f"model.rope.{name}: holds {count} numbers, not one for each of {rotated // 2} pairs")
        if not self.rope.layer_pattern:
            raise ValueError("model.rope.layer_pattern=[]: say at least once whether layers rotate: [true]")
        self._validate_latent()
        if self.moe.num_experts:
            self._validate_experts()
        away = () if self.remat in (Remat.none, Remat.save_dots) else ("border", *SAVED_NAMES[self.remat])
        for name in self.activation_offload:
            if name.name not in away:
                raise ValueError(
                    f"model.activation_offload: model.remat={self.remat.name} keeps no {name.name} that could lie elsewhere; "
                    f"valid: {', '.join(away) or 'nothing'}; border goes with remat=full, qkv, attention"
                )

    def _validate_latent(self) -> None:
        a = self.attention
        if not a.mla.kv_lora_rank:
            if a.v_head_dim not in (None, a.head_dim):
                raise ValueError(
                    f"model.attention.v_head_dim={a.v_head_dim}: differs from head_dim={a.head_dim}, which needs latent "
                    "attention; set model.attention.mla.kv_lora_rank, or value_dim=null"
                )
            return
        if a.num_kv_heads != a.num_heads:
            raise ValueError(
                f"model.attention.num_kv_heads={a.num_kv_heads}: latent attention has a key for each query head; "
                f"set num_kv_heads={a.num_heads}"
            )
        if not 0 < a.mla.qk_rope_head_dim <= a.head_dim:
            raise ValueError(
                f"model.attention.mla.qk_rope_head_dim={a.mla.qk_rope_head_dim}: is a part of head_dim={a.head_dim}; "
                f"valid: 2 to {a.head_dim}"
            )
        if a.qk_norm is not QKNorm.none or a.qkv_bias or self.position is not Position.rope:
            raise ValueError(
                "model.attention.mla.kv_lora_rank: latent attention goes with rotary positions, qk_norm=none and "
                "qkv_bias=false only"
            )

    def _validate_experts(self) -> None:
        e = self.moe
        if not 1 <= e.experts_per_token <= e.num_experts:
            raise ValueError(
                f"model.moe.experts_per_token={e.experts_per_token}: must be 1 to num_experts={e.num_experts}"
            )
        if not 0 <= e.first_num_dense_layers < self.num_layers:
            raise ValueError(
                f"model.moe.first_num_dense_layers={e.first_num_dense_layers}: must leave layers with experts; valid: 0 to "
                f"{self.num_layers - 1}, or num_experts=0"
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
                f"model.moe.topk_groups={e.topk_groups}: of {e.num_groups} groups of {size} experts, "
                f"experts_per_token={e.experts_per_token} must come; valid: {least} to {e.num_groups}"
            )
        if e.num_groups > 1 and not 1 <= e.group_score_topk <= size:
            raise ValueError(f"model.moe.group_score_topk={e.group_score_topk}: a group has {size}; valid: 1 to {size}")
