"""Building blocks of a layer: parameters with logical axes, linear layers, norms, RoPE, dropout, MLP.

Shape letters: B batch, L length, D model, N heads, H head dim, R rotated pairs, F mlp.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.config import Activation, MatmulPrecision, MLPConfig, ModelConfig, Norm, RopeConfig, RopeScaling
from models.cpu_workarounds import sum_of_rows
from models.matmul import einsum_f32
from models.mup import init_factor
from models.quantization.matmul_8bit import quantized_einsum
from models.remat import checkpoint_name
from models.weight_views import is_view


def param(rngs: nnx.Rngs, shape: Sequence[int], axes: tuple[str, ...], std: float | None, config: ModelConfig):
    """Creates a parameter with logical axes: normal with `std` (scaled by muP), ones for None, zeros for 0."""
    dtype = jnp.dtype(config.param_dtype.name)
    if std is None:
        value = jnp.ones(shape, dtype)
    elif std == 0:
        value = jnp.zeros(shape, dtype)
    else:
        value = std * init_factor(config, axes) * jax.random.normal(rngs.params(), tuple(shape), dtype)
    return nnx.Param(value, axes=axes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def add_bias(dtype: jnp.dtype, y: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns `y + bias` in `dtype`, added in f32; bias has the last dims of y."""
    return (y + bias.astype(jnp.float32).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)).astype(dtype)


def _bias_forward(dtype, y, bias):
    return add_bias(dtype, y, bias), (jnp.zeros((), y.dtype), bias)


def _bias_backward(dtype, saved, dy):
    like, bias = saved
    return dy.astype(like.dtype), sum_of_rows(dy, dy.ndim - bias.ndim).astype(bias.dtype)


add_bias.defvjp(_bias_forward, _bias_backward)


class Linear(nnx.Module):
    """`einsum(spec, x, kernel) + bias`, accumulated in f32 and returned in x's dtype."""

    def __init__(self, rngs, config: ModelConfig, spec: str, shape, axes, *, std: float, bias_dims: int = 0):
        self.spec, self.products = spec, config.matmul_precision
        self.kernel = param(rngs, shape, axes, std, config)
        self.bias = param(rngs, shape[-bias_dims:], axes[-bias_dims:], 0, config) if bias_dims else None

    @property
    def num_out(self) -> int:
        """Number of output dims of the kernel, which are its last dims."""
        _, kernel_dims, y_dims = self.spec.replace("->", ",").split(",")
        return sum(dim in y_dims for dim in kernel_dims)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        dtype = x.dtype if self.bias is None else jnp.float32
        if self.products is MatmulPrecision.full or is_view(kernel):
            y = einsum_f32(self.spec, x, kernel, dtype)
        else:
            y = quantized_einsum(self.products, self.spec, x, kernel)
        if self.bias is not None:
            y = add_bias(x.dtype, y, self.bias[...])
        return checkpoint_name("product", y)


class Normalization(nnx.Module):
    """RMS or layer normalization over the trailing dims of `shape`, computed in f32."""

    def __init__(self, rngs, config: ModelConfig, shape: Sequence[int], axes: tuple[str, ...], *, start: float = 1.0):
        """`start`: initial value of the effective scale."""
        self.eps, self.offset = config.norm_eps, config.norm_unit_offset
        self.center = config.norm is Norm.layer
        self.dims = tuple(range(-len(shape), 0))
        self.scale = param(rngs, shape, axes, 0 if self.offset else None, config)
        if start != 1:
            self.scale = nnx.Param(self.scale[...] + (start - 1), axes=axes)
        self.bias = param(rngs, shape, axes, 0, config) if self.center and config.norm_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        # Recomputed in the backward pass; otherwise f32 copies of x would be saved.
        return jax.checkpoint(self.of, prevent_cse=False)(x, self.scale[...], bias)

    def of(self, x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.center:
            y = y - y.mean(self.dims, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(self.dims, keepdims=True) + self.eps)
        lift = (1,) * (x.ndim - len(self.dims))
        scale = scale.astype(jnp.float32)
        y = y * (scale + 1 if self.offset else scale).reshape(lift + scale.shape)
        if bias is not None:
            y = y + bias.astype(jnp.float32).reshape(lift + bias.shape)
        return y.astype(x.dtype)


ACTIVATIONS = {
    Activation.silu: jax.nn.silu,
    Activation.gelu: lambda x: jax.nn.gelu(x, approximate=False),
    Activation.gelu_tanh: lambda x: jax.nn.gelu(x, approximate=True),
    Activation.gelu_sigmoid: lambda x: x * jax.nn.sigmoid(1.702 * x),
    Activation.relu: jax.nn.relu,
    Activation.relu2: lambda x: jnp.square(jax.nn.relu(x)),
}


def inverse_frequencies(
    config: RopeConfig, head_dim: int, *, theta: float, scaled: bool, length: int = 0
) -> np.ndarray:
    """Returns radians per position of each rotated pair: [rotated / 2] f64.

    `length`: tokens of a row, or capacity of the cache. Dynamic scaling and LongRoPE depend on it instead of on the
    contents of rows, so the result for a document does not depend on other documents. transformers uses the last
    position of a batch instead.
    """
    rotated = int(head_dim * config.partial_rotary_factor)
    if scaled and config.scaling is RopeScaling.dynamic:
        grown = config.factor * max(length / config.original_max_seq_len, 1) - (config.factor - 1)
        theta = theta * grown ** (rotated / (rotated - 2))
    freq = theta ** -(np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    if not scaled or config.scaling is RopeScaling.none:
        return freq
    if config.scaling is RopeScaling.linear:
        return freq / config.factor
    if config.scaling is RopeScaling.dynamic:
        return freq
    if config.scaling is RopeScaling.longrope:
        factors = config.long_factors if length > config.original_max_seq_len else config.short_factors
        return freq / np.asarray(factors, np.float64)
    wavelength = 2 * np.pi / freq
    if config.scaling is RopeScaling.llama3:
        rotations = config.original_max_seq_len / wavelength
        keep = (rotations - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    else:  # YaRN, appendix A.1: interpolates dims between beta_fast and beta_slow rotations
        dim = lambda turns: (
            rotated * math.log(config.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )
        low, high = dim(config.beta_fast), dim(config.beta_slow)
        if config.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotated - 1)
        keep = 1 - (np.arange(rotated // 2) - low) / max(high - low, 0.001)
    keep = np.clip(keep, 0, 1)
    return freq * keep + freq / config.factor * (1 - keep)


def rope_temperature(config: RopeConfig) -> float:
    """Returns the attention temperature applied to rotated queries and keys.

    YaRN: 0.1 mscale ln(factor) + 1 (section 3.4), except the part in `score_temperature`. LongRoPE:
    sqrt(1 + ln(factor) / ln(original length)) (section 3.2).
    """
    if config.scaling is RopeScaling.longrope:
        return math.sqrt(1 + math.log(max(config.factor, 1)) / math.log(config.original_max_seq_len))
    return _temperature(config, config.mscale) / _temperature(config, config.mscale_all_dim)


def score_temperature(config: RopeConfig) -> float:
    """Returns the temperature that DeepSeek-V2 applies to scores, over rotated and unrotated dims of a head."""
    return _temperature(config, config.mscale_all_dim) ** 2


def _temperature(config: RopeConfig, mscale: float) -> float:
    scaled = config.scaling is RopeScaling.yarn and config.factor > 1
    return 0.1 * mscale * math.log(config.factor) + 1 if scaled else 1.0


def rotate(x_BLNH: jax.Array, angles_BLR: jax.Array, temperature, interleaved: bool = False) -> jax.Array:
    """Applies RoPE to the first 2R dims of each head, with pairs (i, i + R).

    `interleaved`: pairs (2i, 2i + 1). The output has halves order, in queries and keys alike, so scores are unchanged.
    """
    half = angles_BLR.shape[-1]
    cos = (jnp.cos(angles_BLR) * temperature)[:, :, None, :]
    sin = (jnp.sin(angles_BLR) * temperature)[:, :, None, :]
    x = x_BLNH.astype(jnp.float32)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(x_BLNH.dtype)


def dropout(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Applies dropout; `rng` None: returns x."""
    if not rate or rng is None:
        return x
    return jnp.where(jax.random.bernoulli(rng, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def neftune_noise(x_BLD: jax.Array, segments_BL: jax.Array, alpha: float, rng: jax.Array | None) -> jax.Array:
    """Adds NEFTune noise to embeddings: uniform in +-alpha / sqrt(tokens of the document * D); none for padding.

    Jain et al. 2023 [2310.05914], algorithm 1; each document of a packed row uses its own length.
    """
    if not alpha or rng is None:
        return x_BLD
    tokens_BL = jnp.sum(segments_BL[:, :, None] == segments_BL[:, None, :], axis=-1)
    scale_BL = jnp.where(segments_BL > 0, alpha * jax.lax.rsqrt((tokens_BL * x_BLD.shape[-1]).astype(jnp.float32)), 0.0)
    noise_BLD = jax.random.uniform(jax.random.fold_in(rng, 1), x_BLD.shape, jnp.float32, -1, 1)
    return x_BLD + (noise_BLD * scale_BL[..., None]).astype(x_BLD.dtype)


def activate(mlp: MLPConfig, gate: jax.Array | None, up: jax.Array) -> jax.Array:
    """Applies the activation and gate of an MLP between its two matmuls, in f32. `gate` None: no gate."""
    act, dtype, up = ACTIVATIONS[mlp.activation], up.dtype, up.astype(jnp.float32)
    if gate is None:
        return act(up).astype(dtype)
    gate = gate.astype(jnp.float32)
    if mlp.activation_clamp is not None:
        gate, up = jnp.minimum(gate, mlp.activation_clamp), jnp.clip(up, -mlp.activation_clamp, mlp.activation_clamp)
    return (act(gate) * (up + mlp.up_offset if mlp.up_offset else up)).astype(dtype)


class MLP(nnx.Module):
    """Gated or plain feed-forward layer."""

    def __init__(self, rngs, config: ModelConfig, out_std: float, hidden_dim: int | None = None):
        """`hidden_dim` None: `config.mlp.intermediate_dim`."""
        mlp: MLPConfig = config.mlp
        D, F, std, bias = config.embed_dim, hidden_dim or mlp.intermediate_dim, config.init_std, int(mlp.bias)
        self.config = mlp
        widen = lambda: Linear(rngs, config, "BLD,DF->BLF", (D, F), ("embed", "mlp"), std=std, bias_dims=bias)
        self.up = widen()
        self.gate = widen() if mlp.gated else None
        self.down = Linear(rngs, config, "BLF,FD->BLD", (F, D), ("mlp", "embed"), std=out_std, bias_dims=bias)

    def __call__(self, x_BLD: jax.Array, constrain) -> jax.Array:
        gate_BLF = None if self.gate is None else self.gate(x_BLD)
        # Recomputed in the backward pass from the matmul outputs; otherwise several intermediates would be saved. The
        # next matmul is not included: with it, two processes, one with a cached program, reached collectives in
        # different orders (Gloo).
        hidden_BLF = jax.checkpoint(partial(activate, self.config), prevent_cse=False)(gate_BLF, self.up(x_BLD))
        return self.down(constrain(hidden_BLF, ("batch", "length", "mlp")))
