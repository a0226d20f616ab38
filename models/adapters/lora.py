"""Low-rank adapters: small trainable matrices added to frozen weights.

LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024); with a quantized base, QLoRA (Dettmers et
al. 2023). For each adapted matrix [lead..., in..., out...], the adapter tree has a dict of `a` [lead..., in..., R],
`b` [lead..., R, out...] and, for DoRA, `magnitude` [lead..., out...]; it also contains the full score head, if any.
`bind_adapters` combines both trees into the parameter tree of the model, in which an adapted matrix is a `LoRAWeight`.
Linear layers compute x W + s (x A) B and never materialize W + s A B or its gradient. Experts, the embedding and the
head read the merged weight, one layer at a time.

Shape letters: R rank.
"""

import enum
import math
import zlib
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.logical_axes import Axes
from models.matmul import einsum_f32
from models.quantization.blockwise import Bits, quantize
from models.weight_views import WeightView, as_array, is_view

Params = Any  # a nested dict of arrays
FULLY_TRAINED = ("score",)  # parameters trained in full next to adapters, because no base model has trained them
STACKED = ("layers", "experts")  # stack dims of a parameter
LETTERS = "abcdefgh"


class Method(enum.Enum):
    """Adapter methods."""

    none = "none"  # all parameters train
    lora = "lora"
    rslora = "rslora"  # rank-stabilized: scaled by alpha / sqrt(rank)
    dora = "dora"  # weight-decomposed: separate magnitude and direction of each column


class QuantizeBase(enum.Enum):
    """Quantization of the frozen base."""

    none = "none"  # model.param_dtype
    nf4 = "nf4"  # 4-bit NormalFloat, attention and feed-forward matrices
    int8 = "int8"  # 8-bit absmax, the same matrices


@dataclass
class AdapterConfig:
    """Adapter training: all parameters train, or low-rank adapters of the frozen base in `init_from`."""

    method: Method = Method.none  # Adapter method
    rank: int = field(default=16, metadata={"min": 1})  # Rank of the low-rank matrices
    # Adapter outputs are scaled by alpha / rank; rslora: alpha / sqrt(rank)
    alpha: float = field(default=32.0, metadata={"above": 0})
    # Matrices to adapt, as parts or patterns of names: attention, query, mlp.up, "mlp.*", embedding, head
    target_modules: list[str] = field(default_factory=lambda: ["attention", "mlp"])
    dropout: float = field(default=0.0, metadata={"min": 0, "below": 1})  # Dropout rate of adapter inputs
    quantize_base: QuantizeBase = QuantizeBase.none  # Quantization of the frozen base: QLoRA
    double_quant: bool = False  # Double quantization: store quantization scales in 8 bits

    @property
    def active(self) -> bool:
        return self.method is not Method.none

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.method is Method.rslora else self.rank)

    def validate(self) -> None:
        """Checks the configuration. Raises: ValueError naming key, value, reason and fix."""
        if self.double_quant and self.quantize_base is QuantizeBase.none:
            raise ValueError(
                "adapter.double_quant=true: an unquantized base has no scales; "
                "add adapter.quantize_base=nf4, or remove it"
            )
        if not self.target_modules:
            raise ValueError("adapter.target_modules=[]: no parameter would train; name some, e.g. [attention,mlp]")
        if not self.active and self.quantize_base is not QuantizeBase.none:
            raise ValueError(
                f"adapter.quantize_base={self.quantize_base.name}: quantized weights are frozen, so training needs "
                "adapters; add adapter=qlora, or remove it"
            )


class Split(NamedTuple):
    """Numbers of stack and input dims of a matrix [lead..., in..., out...]."""

    num_lead: int
    num_in: int


def split(axes: Axes) -> Split:
    """Splits dims: input is the first dim after the stack dims, with its head_dim if one follows."""
    num_lead = sum(name in STACKED for name in axes)
    return Split(num_lead, 2 if axes[num_lead + 1 : num_lead + 2] == ("head_dim",) else 1)


# Which matrices


def _flat(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    """Returns leaves by path, e.g. layers/attention/query/kernel."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def _flat_axes(axes: Params) -> dict[str, Axes]:
    return _flat(axes, is_leaf=lambda x: isinstance(x, tuple))


def _nested(flat: dict[str, Any]) -> Params:
    tree: Params = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def short_name(path: str) -> str:
    """Returns the name that `adapter.target_modules` matches: layers/attention/query/kernel to attention.query."""
    parts = [part for part in path.split("/") if part not in ("layers", "dense_layers", "kernel")]
    return ".".join(parts)


def matrices(axes: Params) -> dict[str, Axes]:
    """Returns the adaptable matrices by path: layer kernels except routers, the embedding and the head."""
    kernels = lambda path: path.endswith("/kernel") and "/router/" not in path
    return {path: names for path, names in _flat_axes(axes).items() if kernels(path) or path in ("embedding", "head")}


def find_targets(config: AdapterConfig, axes: Params) -> dict[str, Axes]:
    """Returns the matrices selected by `adapter.target_modules`, by path.

    Raises: ValueError naming a target that matches nothing or cannot be adapted.
    """
    available, chosen = matrices(axes), {}
    for target in config.target_modules:
        matched = {path: names for path, names in available.items() if _matches(short_name(path), target)}
        if target in ("head", "embedding") and "head" not in available:
            raise ValueError(
                f"adapter.target_modules: {target}: the model ties its embeddings (model.tied_embeddings=true), so an "
                "adapter of the head or the embedding would change both and could not be merged or exported; remove it"
            )
        if not matched:
            known = ", ".join(sorted({short_name(path) for path in available}))
            raise ValueError(f"adapter.target_modules: {target!r} matches no matrix; valid: {known}")
        chosen |= matched
    if config.method is Method.dora and "embedding" in chosen:
        raise ValueError(
            "adapter.target_modules: embedding: not supported by adapter=dora; use adapter=lora, or remove it"
        )
    if "head" not in available and "embedding" in chosen:
        raise ValueError(
            "adapter.target_modules: a pattern matches the embedding, which is tied to the head (model.tied_embeddings="
            "true), so an adapter of it could not be exported; narrow the pattern"
        )
    return {path: chosen[path] for path in available if path in chosen}  # in parameter order


def _matches(name: str, target: str) -> bool:
    parts, wanted = name.split("."), target.split(".")
    runs = (parts[i : i + len(wanted)] for i in range(len(parts)))
    return wanted in runs or ("*" in target and fnmatch(name, target))


# The tree of adapters


def adapter_axes(config: AdapterConfig, axes: Params) -> Params:
    """Returns the logical axes of all adapters: those of the adapted matrix; the rank is not sharded."""
    flat: dict[str, Any] = {path: axes[path] for path in FULLY_TRAINED if path in axes}
    for path, names in find_targets(config, axes).items():
        num_lead, num_in = split(names)
        lead, ins, outs = names[:num_lead], names[num_lead : num_lead + num_in], names[num_lead + num_in :]
        flat[path] = {"a": (*lead, *ins, None), "b": (*lead, None, *outs)}
        if config.method is Method.dora:
            flat[path]["magnitude"] = (*lead, *outs)
    return _nested(flat)


def init_adapters(config: AdapterConfig, axes: Params, key: jax.Array, base: Params) -> Params:
    """Initializes adapters as PEFT does, so that they change nothing: `a` uniform within 1 / sqrt(in), `b` zero.

    For an embedding `a` is zero and `b` normal. A DoRA magnitude is the norm of its column of the base.
    """
    weights = _flat(base, is_leaf=is_view)
    flat: dict[str, Any] = {path: weights[path].astype(jnp.float32) for path in FULLY_TRAINED if path in weights}
    for path, names in find_targets(config, axes).items():
        of_path = jax.random.fold_in(key, zlib.crc32(path.encode()))  # independent of the other targets
        weight = as_array(weights[path])
        num_lead, num_in = split(names)
        lead, ins, outs = (
            weight.shape[:num_lead],
            weight.shape[num_lead : num_lead + num_in],
            weight.shape[num_lead + num_in :],
        )
        shape_a, shape_b = (*lead, *ins, config.rank), (*lead, config.rank, *outs)
        if path == "embedding":
            flat[path] = {"a": jnp.zeros(shape_a), "b": jax.random.normal(of_path, shape_b)}
        else:
            bound = math.prod(ins) ** -0.5
            a = jax.random.uniform(of_path, shape_a, minval=-bound, maxval=bound)
            flat[path] = {"a": a, "b": jnp.zeros(shape_b)}
        if config.method is Method.dora:
            flat[path]["magnitude"] = _lengths(weight, num_in, len(outs))
    return _nested(flat)


def _lengths(weight: jax.Array, num_in: int, num_out: int) -> jax.Array:
    """Returns column norms [lead..., out...] f32 of matrices [lead..., in..., out...]."""
    last = weight.ndim - num_out
    return jnp.sqrt(jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=tuple(range(last - num_in, last))))


# Combination of base and adapters


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRAWeight(WeightView):
    """View of W + s A B; leading dims can be indexed away, as by a layer scan."""

    base: Any  # an array, or a Quantized
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array | None
    scale: float = field(metadata={"static": True})
    num_in: int = field(metadata={"static": True})
    key: jax.Array | None = None  # dropout keys, [lead..., 2] u32; None: no dropout
    dropout: float = field(default=0.0, metadata={"static": True})

    @property
    def num_out(self) -> int:
        return self.b.ndim - (self.a.ndim - self.num_in)

    def product(self, spec: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        x_dims, w_dims, y_dims = spec.replace("->", ",").split(",")
        ins = "".join(d for d in w_dims if d in x_dims)
        outs = "".join(d for d in w_dims if d in y_dims)
        low_dims = "".join(d for d in x_dims if d not in ins) + "r"
        low = einsum_f32(f"{x_dims},{ins}r->{low_dims}", self._dropped(x), self.a, x.dtype)
        f32 = jnp.dtype("float32")
        y = einsum_f32(spec, x, self.base, f32) + self.scale * einsum_f32(
            f"{low_dims},r{outs}->{y_dims}", low, self.b, f32
        )
        if self.magnitude is not None:
            stretch = self.magnitude / self._lengths()
            y = y * stretch.reshape((1,) * (y.ndim - stretch.ndim) + stretch.shape)
        return y.astype(dtype)

    def _dropped(self, x: jax.Array) -> jax.Array:
        if self.key is None:
            return x
        mask = jax.random.bernoulli(jax.random.wrap_key_data(self.key), 1 - self.dropout, x.shape)
        return jnp.where(mask, x / (1 - self.dropout), jnp.zeros((), x.dtype))

    def array(self) -> jax.Array:
        """Returns the merged weight in f32, without dropout."""
        if self.magnitude is None:
            return self._sum()
        stretch = jnp.expand_dims(self.magnitude / self._lengths(), self._in_dims())
        return self._sum() * stretch

    def _sum(self) -> jax.Array:
        lead = LETTERS[: self.a.ndim - self.num_in - 1]
        ins = LETTERS[len(lead) : len(lead) + self.num_in]
        outs = LETTERS[len(lead + ins) : len(lead + ins) + self.num_out]
        spec = f"{lead}{ins}r,{lead}r{outs}->{lead}{ins}{outs}"
        added = jnp.einsum(spec, self.a, self.b, precision="highest")
        return as_array(self.base).astype(jnp.float32) + self.scale * added

    def _in_dims(self) -> tuple[int, ...]:
        num_lead = self.a.ndim - self.num_in - 1
        return tuple(range(num_lead, num_lead + self.num_in))

    def _lengths(self) -> jax.Array:
        """Returns column norms, treated as constants by the gradient (Liu et al. 2024, section 4.3)."""
        return jax.lax.stop_gradient(_lengths(jax.lax.stop_gradient(self._sum()), self.num_in, self.num_out))


def bind_adapters(
    config: AdapterConfig, axes: Params, base: Params, adapters: Params, rng: jax.Array | None = None
) -> Params:
    """Combines base and adapters into parameters for `apply`. `rng`: typed key for dropout; None: no dropout."""
    targets = find_targets(config, axes)
    ours = _flat(adapters)

    def join(path: tuple[Any, ...], weight: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in targets:
            return ours.get(name, weight)
        a, b, magnitude = (ours.get(f"{name}/{part}") for part in ("a", "b", "magnitude"))
        assert a is not None and b is not None
        num_lead, num_in = split(targets[name])
        key = None
        if rng is not None and config.dropout:  # a separate key for each matrix of the stack
            of_path = jax.random.fold_in(rng, zlib.crc32(name.encode()))
            key = jax.random.key_data(jax.random.split(of_path, a.shape[:num_lead]))
        return LoRAWeight(weight, a, b, magnitude, config.scale, num_in, key, config.dropout)

    return jax.tree_util.tree_map_with_path(join, base, is_leaf=is_view)


def merge(config: AdapterConfig, axes: Params, base: Params, adapters: Params, dtype: jnp.dtype) -> Params:
    """Merges adapters into full parameters, computed in f32 and cast once to `dtype`. The base is unchanged."""
    bound = bind_adapters(config, axes, base, adapters)
    return jax.tree.map(lambda w: as_array(w).astype(dtype), bound, is_leaf=is_view)


# The base


def quantized_base(config: AdapterConfig, axes: Params, params: Params) -> Params:
    """Quantizes the base as set by `adapter.quantize_base`, except embedding, head, norms, biases and routers."""
    if config.quantize_base is QuantizeBase.none:
        return params
    quantized = {path: names for path, names in matrices(axes).items() if path.endswith("/kernel")}

    def store(path: tuple[Any, ...], weight: jax.Array) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        bits, double = Bits[config.quantize_base.name], config.double_quant
        return quantize(weight, *split(quantized[name]), bits, double) if name in quantized else weight

    return jax.tree_util.tree_map_with_path(store, params)


def quantized_axes_of(axes: Params, stored: Params) -> Params:
    """Returns the logical axes of `quantized_base`."""

    def names_of(like: Any, names: Axes) -> Any:
        return like.view_axes(names, split(names).num_lead) if is_view(like) else names

    return jax.tree.map(names_of, stored, axes, is_leaf=is_view)
