"""Attention in kernels of an accelerator: scores stay on the chip, and blocks of keys that nobody sees are passed over.

JAX's own: splash attention on TPUs, and FlashAttention-2 in Triton on GPUs. They mask by the place in the row and by
document, and so want each row in its order: a document's tokens one after the other, as data packs them. What they must
equal is `models.attention.ops.attention`; `max_error_vs_reference` holds them to it on the devices themselves.

Shape letters: B batch, L length, N query heads, K kv heads, H head dim, W width of values.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.attention.ops import UNLIMITED, attention, attention_mask
from models.config import AttentionImplementation, AttentionMask, LayerKind, ModelConfig

LANES = 128  # of a TPU's vector unit, and the least block of keys
PLATFORMS = {
    "tpu": AttentionImplementation.splash,
    "gpu": AttentionImplementation.triton,
    "cuda": AttentionImplementation.triton,
}
TOLERANCE = 0.05  # of bf16 gradients relative to their largest; one that ignores documents is above 0.1
BLOCKS = (512, 256, 128)  # of queries and of keys; the largest that divides a row


class Decision(NamedTuple):
    """What computes attention, and why it is not the kernel that the platform has (None: it is, or there is none)."""

    kernel: AttentionImplementation
    reason: str | None = None


def decide(config: ModelConfig, length: int, platform: str, *, rows_cut: bool = False) -> Decision:
    """What computes attention in rows of `length` tokens on devices of `platform` (cpu, gpu, cuda, tpu).

    `rows_cut`: devices hold rows in pieces (mesh.context), which no kernel takes. With `model.attention.implementation=auto`
    the platform's kernel is taken where it supports the case. On CPUs an explicit kernel runs interpreted, for tests.
    Raises: ValueError where an explicit kernel does not support the model or the rows.
    """
    a = config.attention
    explicit = a.implementation is not AttentionImplementation.auto
    kernel = a.implementation if explicit else PLATFORMS.get(platform, AttentionImplementation.xla)
    if kernel is AttentionImplementation.xla:
        return Decision(AttentionImplementation.xla)
    reason = unsupported_reason(kernel, config, length)
    if explicit and reason is not None:
        raise ValueError(f"model.attention.implementation={kernel.name}: cannot do {reason}; valid: auto, xla")
    if rows_cut:
        reason = "rows that are cut over devices (mesh.context)"
    elif not explicit and reason is None:
        if a.block_size is not None:
            reason = f"model.attention.block_size={a.block_size}"
        elif a.dropout:
            reason = f"model.attention.dropout={a.dropout}"
    return Decision(kernel) if reason is None else Decision(AttentionImplementation.xla, reason)


def select_implementation(
    config: ModelConfig, length: int, platform: str, *, rows_cut: bool = False
) -> AttentionImplementation:
    """That of `decide`."""
    return decide(config, length, platform, rows_cut=rows_cut).kernel


def without_kernel(config: ModelConfig) -> ModelConfig:
    """The model with attention in plain operations: where nothing has compared the platform's kernel with them."""
    return replace(config, attention=replace(config.attention, implementation=AttentionImplementation.xla))


def unsupported_reason(kernel: AttentionImplementation, config: ModelConfig, length: int) -> str | None:
    """What the kernel does not support of this model's attention to rows of `length` tokens; None: it supports all."""
    a = config.attention
    if a.mask is not AttentionMask.causal:
        return f"model.attention.mask={a.mask.name}"
    if length % LANES:
        return f"rows of {length} tokens, which are no multiple of {LANES}"
    if kernel is AttentionImplementation.triton:
        if windows(config) != (UNLIMITED,):
            return "windows (model.attention.layer_types)"
        for key in ("logit_softcap", "sinks", "v_head_dim"):
            value = getattr(a, key) or None
            if value is not None and value != a.head_dim:
                return f"model.attention.{key}={value}"
        if config.dtype.name == "float32":
            return "model.dtype=float32, whose products it rounds"
    return None


def windows(config: ModelConfig) -> tuple[int, ...]:
    """Those of all layers, each once."""
    a = config.attention
    return tuple(sorted({a.sliding_window if kind is LayerKind.sliding else UNLIMITED for kind in a.layer_types}))


def kernel_attention(
    kernel: AttentionImplementation,
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKW: jax.Array,
    segments_BL: jax.Array,
    *,
    window: jax.Array | int,
    windows: tuple[int, ...],
    scale: float,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """What `models.attention.ops.attention` gives of rows in their order: [B, L, N, W] in q's dtype.

    `window` is one of `windows`. `interpret`: as XLA's own operations, slowly, where there is no such device.
    """
    q_BLNH = q_BLNH * jnp.asarray(scale, q_BLNH.dtype)
    if kernel is AttentionImplementation.triton:
        return _triton(q_BLNH, k_BLKH, v_BLKW, segments_BL, interpret)
    run = partial(_splash, soft_cap=soft_cap, interpret=interpret)
    arrays = q_BLNH, k_BLKH, v_BLKW, segments_BL, sinks_N
    if len(windows) == 1:
        return run(windows[0], *arrays)
    near, far = windows  # a kernel's mask is a part of its program: a layer runs one of two
    return jax.lax.cond(window == near, partial(run, near), partial(run, far), *arrays)


def _splash(window: int, q_BLNH, k_BLKH, v_BLKW, segments_BL, sinks_N, *, soft_cap, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    _, L, N, _ = q_BLNH.shape
    shape = (L, L)
    local = splash_attention_mask.LocalMask(shape, (window - 1, 0), 0)
    mask = splash_attention_mask.CausalMask(shape) if window >= L else local
    block = next(size for size in BLOCKS if L % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute",
             "block_q_dq", "block_kv_dq")  # fmt: skip
    attend: Any = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * N),
        block_sizes=splash_attention_kernel.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name="attn_out",  # what remat may keep, so that the kernel need not run again
        interpret=interpret,
    )

    def of_row(q_NLH, k_KLH, v_KLW, segments_L):
        ids = splash_attention_kernel.SegmentIds(segments_L, segments_L)
        return attend(q_NLH, k_KLH, v_KLW, segment_ids=ids, sinks=sinks_N)

    heads_first = (x.swapaxes(1, 2) for x in (q_BLNH, k_BLKH, v_BLKW))
    rows: Any = jax.vmap(of_row)
    return rows(*heads_first, segments_BL).swapaxes(1, 2)


def _triton(q_BLNH, k_BLKH, v_BLKW, segments_BL, interpret: bool):
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    group = q_BLNH.shape[2] // k_BLKH.shape[2]
    k_BLNH, v_BLNW = (jnp.repeat(x, group, axis=2) for x in (k_BLKH, v_BLKW))
    # Defaults of the backward pass (32) are for chips of little shared memory.
    sizes = BlockSizes(block_q=128, block_k=128, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64)
    options = {"sm_scale": 1.0, "causal": True, "block_sizes": sizes, "interpret": interpret}
    return mha(q_BLNH, k_BLNH, v_BLNW, segments_BL, **options)


def max_error_vs_reference(kernel: AttentionImplementation, config: ModelConfig, *, interpret: bool = False) -> float:
    """Between the kernel and the plain form on the devices that are there, of a row of several documents: of the output
    and of each gradient, relative to its largest entry.
    """
    a, length = config.attention, 2 * LANES
    dtype, keys = jnp.dtype(config.dtype.name), jax.random.split(jax.random.key(0), 4)
    width = a.v_head_dim or a.head_dim
    shapes = [(1, length, a.num_heads, a.head_dim), (1, length, a.num_kv_heads, a.head_dim)]
    shapes += [(1, length, a.num_kv_heads, width), (1, length, a.num_heads, width)]
    q, k, v, weight = (jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))
    segments = np.repeat(np.array([1, 2, 3, 0], np.int32), [100, 29, 100, 27])[None]
    positions = np.concatenate([np.arange(n) for n in (100, 29, 100, 27)])[None]
    window = windows(config)[0]
    options = {"scale": a.head_dim**-0.5, "soft_cap": a.logit_softcap}
    sinks = jnp.zeros(a.num_heads) if a.sinks else None

    def plain(q, k, v):
        return attention(
            q, k, v, attention_mask(positions, positions, segments, segments, window), sinks_N=sinks, **options
        )

    def fused(q, k, v):
        how = {"window": window, "windows": (window,), "interpret": interpret}
        return kernel_attention(kernel, q, k, v, jnp.asarray(segments), sinks_N=sinks, **how, **options)

    def everything(attend):
        total = lambda *arrays: jnp.sum((attend(*arrays) * weight).astype(jnp.float32))
        return attend(q, k, v), *jax.grad(total, argnums=(0, 1, 2))(q, k, v)

    @jax.jit
    def compared():
        pairs = zip(everything(plain), everything(fused), strict=True)
        f32 = lambda x: x.astype(jnp.float32)
        return jnp.stack([jnp.abs(f32(a) - f32(b)).max() / jnp.abs(f32(a)).max() for a, b in pairs]).max()

    return float(compared())


def compile_rows(
    kernel: AttentionImplementation, config: ModelConfig, length: int, platform: str | None = None
) -> None:
    """Compiles the kernel with its gradient for rows of `length` tokens on the devices that are there.

    With `platform` (cuda, tpu) it is only lowered for that one. Raises: what the kernel or the compiler raises.
    """
    a, dtype = config.attention, jnp.dtype(config.dtype.name)
    row = lambda heads, width: jax.ShapeDtypeStruct((1, length, heads, width), dtype)
    keys, values = row(a.num_kv_heads, a.head_dim), row(a.num_kv_heads, a.v_head_dim or a.head_dim)
    sinks = jnp.zeros(a.num_heads) if a.sinks else None

    def total(q, k, v, segments, window):
        how = {"window": window, "windows": windows(config), "scale": a.head_dim**-0.5, "soft_cap": a.logit_softcap}
        return kernel_attention(kernel, q, k, v, segments, sinks_N=sinks, **how).astype(jnp.float32).sum()

    integers = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(row(a.num_heads, a.head_dim), keys, values, *integers)
    if platform is None:
        traced.lower().compile()
    else:
        traced.lower(lowering_platforms=(platform,))
