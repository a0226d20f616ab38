"""The parts of a block: parameters with named dims, projections, norms, rotary positions, dropout.

Shape letters: B batch, L length, D model, N heads, H head dim, R rotated pairs, F mlp.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.config import Activation, MLPConfig, ModelConfig, Norm, RopeConfig, RopeScaling
from models.width import init_factor


def param(rngs: nnx.Rngs, shape: Sequence[int], axes: tuple[str, ...], std: float | None, config: ModelConfig):
    """A parameter with the names of its dims: normal with `std` at the base width, ones for None, zeros for 0."""
    dtype = jnp.dtype(config.param_dtype.name)
    if std is None:
        value = jnp.ones(shape, dtype)
    elif std == 0:
        value = jnp.zeros(shape, dtype)
    else:
        value = std * init_factor(config, axes) * jax.random.normal(rngs.params(), tuple(shape), dtype)
    return nnx.Param(value, axes=axes)


def contract(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`einsum(spec, a, b)` in a's dtype, accumulated in f32 and returned as `dtype`.

    Both gradients are such products too, each returned in the dtype of its own operand: that of f32 master
    weights is never rounded to bf16, and no product mixes dtypes. `spec` names every dim in two of the three.
    """
    if isinstance(b, Kernel):
        return b.product(spec, a, dtype)
    return _contract(spec, a, b, dtype)  # type: ignore[return-value]


class Kernel:
    """A weight that is kept in another form than as its array, and read as a parameter is."""

    def __getitem__(self, _: object) -> "Kernel":
        return self

    def product(self, spec: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """What `contract` gives of `x` and this weight."""
        raise NotImplementedError

    def array(self) -> jax.Array:
        """The weight itself, for those that do more with it than multiply."""
        raise NotImplementedError


def as_array(weight: "jax.Array | Kernel") -> jax.Array:
    return weight.array() if isinstance(weight, Kernel) else weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowsFirst(Kernel):
    """A kernel [in..., out...] as a matrix [OUT, IN], to be multiplied from the left; without a gradient."""

    matrix: jax.Array
    num_in: int = field(metadata={"static": True})  # dims of x that are summed over: its last ones
    out_shape: tuple[int, ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, kernel: jax.Array, num_out: int) -> "RowsFirst":
        shape = kernel.shape[-num_out:]
        return cls(kernel.reshape(-1, math.prod(shape)).T, kernel.ndim - num_out, shape)

    def product(self, spec: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        rows = x.reshape(-1, self.matrix.shape[1])
        y = jnp.einsum("oi,ri->or", self.matrix, rows, preferred_element_type=jnp.float32).astype(dtype)
        # Else XLA folds the transposition into the product, as rows times matrix, and half the speed is lost again.
        y = jax.lax.optimization_barrier(y)
        return y.T.reshape(*x.shape[: x.ndim - self.num_in], *self.out_shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _contract(spec, a, b, dtype):
    return jnp.einsum(spec, a, b.astype(a.dtype), preferred_element_type=jnp.float32).astype(dtype)


def _contract_forward(spec, a, b, dtype):
    return _contract(spec, a, b, dtype), (a, b)


def _contract_backward(spec, dtype, operands, dy):
    a, b = operands
    a_dims, b_dims, y_dims = re.split(",|->", spec)
    # Both products below read dy: made once here, rather than anew, and transposed, inside each (half the time of
    # an MLP on CPUs).
    dy = jax.lax.optimization_barrier(dy.astype(a.dtype))
    da = jnp.einsum(f"{y_dims},{b_dims}->{a_dims}", dy, b.astype(a.dtype), preferred_element_type=jnp.float32)
    db = _of_weights(f"{a_dims},{y_dims}->{b_dims}", a, dy)
    return da.astype(a.dtype), db.astype(b.dtype)


def _of_weights(spec: str, a: jax.Array, dy: jax.Array) -> jax.Array:
    """`einsum(spec, a, dy)` f32, the gradient of weights: on CPUs with `a` turned around first.

    XLA's CPU backend has no bf16 product that reads its left side by columns, and converts both to f32; nor is it fast
    in f32. It folds a transposition back into the product, barrier or not, unless a dim is cut in two between them.
    """
    a_dims, y_dims, out_dims = re.split(",|->", spec)
    summed = "".join(d for d in a_dims if d in y_dims)
    own, y_own = "".join(d for d in a_dims if d not in y_dims), "".join(d for d in y_dims if d not in a_dims)
    plain = lambda a, dy: jnp.einsum(spec, a, dy, preferred_element_type=jnp.float32)
    if set(summed) & set(out_dims) or not own or a.shape[a_dims.index(own[-1])] % 2:
        return plain(a, dy)

    def turned(a: jax.Array, dy: jax.Array) -> jax.Array:
        a = jnp.einsum(f"{a_dims}->{own}{summed}", a)
        sizes, rest = a.shape[: len(own)], a.shape[len(own) :]
        a = jax.lax.optimization_barrier(a.reshape(*sizes[:-1], sizes[-1] // 2, 2, *rest))
        out = jnp.einsum(f"{own}z{summed},{y_dims}->{own}z{y_own}", a, dy, preferred_element_type=jnp.float32)
        return jnp.einsum(f"{own}{y_own}->{out_dims}", out.reshape(*sizes, *out.shape[len(own) + 1 :]))

    return jax.lax.platform_dependent(a, dy, cpu=turned, default=plain)


_contract.defvjp(_contract_forward, _contract_backward)


@jax.custom_vjp
def transposed(kernel: jax.Array) -> jax.Array:
    """`kernel.T`, whose gradient is made as it is and then transposed.

    Where XLA folds the transposition into the product before it, CPUs have no such product in bf16.
    """
    return kernel.T


transposed.defvjp(lambda kernel: (kernel.T, None), lambda _, dy: (jax.lax.optimization_barrier(dy).T,))


class Projection(nnx.Module):
    """`einsum(spec, x, kernel) + bias`, accumulated in f32 and returned in x's dtype."""

    def __init__(self, rngs, config: ModelConfig, spec: str, shape, axes, *, std: float, bias_dims: int = 0):
        self.spec = spec
        self.kernel = param(rngs, shape, axes, std, config)
        self.bias = param(rngs, shape[-bias_dims:], axes[-bias_dims:], 0, config) if bias_dims else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = contract(self.spec, x, self.kernel[...], x.dtype)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(x.dtype)
        return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


class Normalize(nnx.Module):
    """RMS or layer normalisation over the trailing dims of `shape`, computed in f32."""

    def __init__(self, rngs, config: ModelConfig, shape: Sequence[int], axes: tuple[str, ...], *, start: float = 1.0):
        """`start`: of the scales that it multiplies by."""
        self.eps, self.offset = config.norm_eps, config.norm_unit_offset
        self.center = config.norm is Norm.layer
        self.dims = tuple(range(-len(shape), 0))
        self.scale = param(rngs, shape, axes, 0 if self.offset else None, config)
        if start != 1:
            self.scale = nnx.Param(self.scale[...] + (start - 1), axes=axes)
        self.bias = param(rngs, shape, axes, 0, config) if self.center and config.norm_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        # Made anew on the way back, where it would keep f32 copies of x.
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
    """Radians a position for each rotated pair: [rotated / 2] f64.

    `length`: of the rows, or of the cache. Dynamic scaling and LongRoPE go by it, never by what the rows hold: a
    document gets the same numbers whatever stands beside it. transformers goes by the last position of a batch.
    """
    rotated = int(head_dim * config.fraction)
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
    else:  # YaRN, appendix A.1: dims between the two numbers of rotations are blended
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
    """YaRN multiplies both rotated vectors by 0.1 mscale ln(factor) + 1 (section 3.4), of which `score_temperature`
    may take a part; LongRoPE by sqrt(1 + ln(factor) / ln(original length)) (section 3.2).
    """
    if config.scaling is RopeScaling.longrope:
        return math.sqrt(1 + math.log(max(config.factor, 1)) / math.log(config.original_max_seq_len))
    return _temperature(config, config.mscale) / _temperature(config, config.mscale_all_dim)


def score_temperature(config: RopeConfig) -> float:
    """What DeepSeek-V2 multiplies the scores by instead: over all dims of a head, rotated or not."""
    return _temperature(config, config.mscale_all_dim) ** 2


def _temperature(config: RopeConfig, mscale: float) -> float:
    scaled = config.scaling is RopeScaling.yarn and config.factor > 1
    return 0.1 * mscale * math.log(config.factor) + 1 if scaled else 1.0


def rotate(x_BLNH: jax.Array, angles_BLR: jax.Array, temperature, interleaved: bool = False) -> jax.Array:
    """Rotates the first 2R dims of each head by `angles`, halves paired: (i, i + R).

    Where neighbours are paired, (2i, 2i + 1), they are moved apart: queries and keys alike, so that no score changes.
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
    if not rate or rng is None:
        return x
    return jnp.where(jax.random.bernoulli(rng, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def noisy(x_BLD: jax.Array, segments_BL: jax.Array, alpha: float, rng: jax.Array | None) -> jax.Array:
    """Embeddings with uniform noise within plus and minus alpha / sqrt(tokens of the document * D), padding without.

    NEFTune (Jain et al. 2023 [2310.05914], algorithm 1); documents that share a row have each its own length.
    """
    if not alpha or rng is None:
        return x_BLD
    tokens_BL = jnp.sum(segments_BL[:, :, None] == segments_BL[:, None, :], axis=-1)
    scale_BL = jnp.where(segments_BL > 0, alpha * jax.lax.rsqrt((tokens_BL * x_BLD.shape[-1]).astype(jnp.float32)), 0.0)
    noise_BLD = jax.random.uniform(jax.random.fold_in(rng, 1), x_BLD.shape, jnp.float32, -1, 1)
    return x_BLD + (noise_BLD * scale_BL[..., None]).astype(x_BLD.dtype)


def activate(mlp: MLPConfig, gate: jax.Array | None, up: jax.Array) -> jax.Array:
    """What stands between the two products of a feed-forward layer, computed in f32. `gate` None: it has no gate."""
    act, dtype, up = ACTIVATIONS[mlp.activation], up.dtype, up.astype(jnp.float32)
    if gate is None:
        return act(up).astype(dtype)
    gate = gate.astype(jnp.float32)
    if mlp.clamp is not None:
        gate, up = jnp.minimum(gate, mlp.clamp), jnp.clip(up, -mlp.clamp, mlp.clamp)
    return (act(gate) * (up + mlp.up_offset if mlp.up_offset else up)).astype(dtype)


class MLP(nnx.Module):
    """Gated or plain feed-forward layer."""

    def __init__(self, rngs, config: ModelConfig, out_std: float, hidden_dim: int | None = None):
        """`hidden_dim` None: as wide as `config.mlp` says."""
        mlp: MLPConfig = config.mlp
        D, F, std, bias = config.embed_dim, hidden_dim or mlp.hidden_dim, config.init_std, int(mlp.bias)
        self.config = mlp
        widen = lambda: Projection(rngs, config, "BLD,DF->BLF", (D, F), ("embed", "mlp"), std=std, bias_dims=bias)
        self.up = widen()
        self.gate = widen() if mlp.gated else None
        self.down = Projection(rngs, config, "BLF,FD->BLD", (F, D), ("mlp", "embed"), std=out_std, bias_dims=bias)

    def __call__(self, x_BLD: jax.Array, constrain) -> jax.Array:
        gate_BLF = None if self.gate is None else self.gate(x_BLD)
        # Made anew on the way back from what the products gave: a few of them would be kept otherwise.
        hidden_BLF = jax.checkpoint(partial(activate, self.config), prevent_cse=False)(gate_BLF, self.up(x_BLD))
        return self.down(constrain(hidden_BLF, ("batch", "length", "mlp")))
