"""Low-rank adapters: a few numbers beside each frozen matrix, which are all that trains.

LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024); over a base of few bits it is QLoRA
(Dettmers et al. 2023). The tree of adapters has, in the place of each adapted matrix [lead..., in..., out...], a dict
of `a` [lead..., in..., R], `b` [lead..., R, out...] and, with DoRA, `magnitude` [lead..., out...]; a head of scores is
in it whole. `bind_adapters` puts the two trees together: a tree of the model's own parameters, in which an adapted matrix is
a `LoRAWeight` that layers read as they read any weight. Projections never form the sum W + s A B: they add s (x A) B to x
W, so that neither the sum nor its gradient is ever held. What is no plain product (experts, the embedding, the head)
reads the sum, a layer at a time.

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
from models.weight_views import Kernel, as_array, is_view

Params = Any  # a nested dict of arrays
WHOLE = ("score",)  # beside adapters these train themselves: no base has learnt them
STACKED = ("layers", "experts")  # dims over which a parameter is many matrices
LETTERS = "abcdefgh"


class Method(enum.Enum):
    none = "none"  # all parameters train
    lora = "lora"
    rslora = "rslora"  # scaled by the root of the rank, so that high ranks learn no slower
    dora = "dora"  # length and direction of each column apart


class QuantizeBase(enum.Enum):
    none = "none"  # as model.param_dtype says
    nf4 = "nf4"  # 4 bits, for the matrices of attention and feed-forward layers
    int8 = "int8"


@dataclass
class AdapterConfig:
    """Which parameters train: all, or low-rank additions to those of a frozen base, which `init_from` names."""

    method: Method = Method.none  # Kind of adapter
    rank: int = field(default=16, metadata={"min": 1})  # Rank of the low-rank matrices
    # the addition is scaled by alpha / rank; rslora: alpha / sqrt(rank)
    alpha: float = field(default=32.0, metadata={"above": 0})
    # Parts of a matrix's name, or patterns of it: attention, query, mlp.up, "mlp.*", embedding, head
    target_modules: list[str] = field(default_factory=lambda: ["attention", "mlp"])
    dropout: float = field(default=0.0, metadata={"min": 0, "below": 1})  # of the input of adapters
    quantize_base: QuantizeBase = QuantizeBase.none  # how the frozen weights are kept
    double_quant: bool = False  # the scales of a base of few bits take 8 bits themselves

    @property
    def active(self) -> bool:
        return self.method is not Method.none

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.method is Method.rslora else self.rank)

    def validate(self) -> None:
        """Raises: ValueError naming key, value, reason and fix."""
        if self.double_quant and self.quantize_base is QuantizeBase.none:
            raise ValueError(
                "adapter.double_quant=true: a full base has no scales; add adapter.quantize_base=nf4, or leave it out"
            )
        if not self.target_modules:
            raise ValueError("adapter.target_modules=[]: nothing would train; name some, as [attention,mlp]")
        if not self.active and self.quantize_base is not QuantizeBase.none:
            raise ValueError(
                f"adapter.quantize_base={self.quantize_base.name}: weights of few bits are frozen, so something beside them must train; "
                "add adapter=qlora, or leave it out"
            )


class Split(NamedTuple):
    """How a matrix of any rank is [lead..., in..., out...]."""

    num_lead: int
    num_in: int


def split(axes: Axes) -> Split:
    """A matrix sums over its first dim, and over the head_dim that belongs to it."""
    num_lead = sum(name in STACKED for name in axes)
    return Split(num_lead, 2 if axes[num_lead + 1 : num_lead + 2] == ("head_dim",) else 1)


# Which matrices


def _flat(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    """Leaves by path: layers/attention/query/kernel."""
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
    """layers/attention/query/kernel to attention.query: what `adapter.target_modules` matches."""
    parts = [part for part in path.split("/") if part not in ("layers", "dense_layers", "kernel")]
    return ".".join(parts)


def matrices(axes: Params) -> dict[str, Axes]:
    """What may be adapted, by path: the kernels of layers but the router's, the embedding and the head."""
    kernels = lambda path: path.endswith("/kernel") and "/router/" not in path
    return {path: names for path, names in _flat_axes(axes).items() if kernels(path) or path in ("embedding", "head")}


def find_targets(config: AdapterConfig, axes: Params) -> dict[str, Axes]:
    """The matrices that `adapter.target_modules` chooses, by path.

    Raises: ValueError naming a target that chooses nothing, or that cannot be adapted here.
    """
    there, chosen = matrices(axes), {}
    for target in config.target_modules:
        mine = {path: names for path, names in there.items() if _matches(short_name(path), target)}
        if target in ("head", "embedding") and "head" not in there:
            raise ValueError(
                f"adapter.target_modules: {target}: this model's head is its embedding (model.tied_embeddings=true): an "
                "adapter on one of them would change the other, and could not be merged or exported as one of them; "
                "leave it out"
            )
        if not mine:
            known = ", ".join(sorted({short_name(path) for path in there}))
            raise ValueError(f"adapter.target_modules: {target!r} chooses nothing; there are: {known}")
        chosen |= mine
    if config.method is Method.dora and "embedding" in chosen:
        raise ValueError("adapter.target_modules: embedding: adapter=dora has no meaning for a table; use adapter=lora")
    if "head" not in there and "embedding" in chosen:
        raise ValueError(
            "adapter.target_modules: a pattern chooses the embedding, which is the head too (model.tied_embeddings=true), so "
            "that an adapter on it could not be exported; narrow the pattern"
        )
    return {path: chosen[path] for path in there if path in chosen}  # in the order of the model


def _matches(name: str, target: str) -> bool:
    parts, wanted = name.split("."), target.split(".")
    runs = (parts[i : i + len(wanted)] for i in range(len(parts)))
    return wanted in runs or ("*" in target and fnmatch(name, target))


# The tree of adapters


def adapter_axes(config: AdapterConfig, axes: Params) -> Params:
    """The names of the dims of each adapter: those of the dims that it stands beside; the rank is never cut."""
    flat: dict[str, Any] = {path: axes[path] for path in WHOLE if path in axes}
    for path, names in find_targets(config, axes).items():
        num_lead, num_in = split(names)
        lead, ins, outs = names[:num_lead], names[num_lead : num_lead + num_in], names[num_lead + num_in :]
        flat[path] = {"a": (*lead, *ins, None), "b": (*lead, None, *outs)}
        if config.method is Method.dora:
            flat[path]["magnitude"] = (*lead, *outs)
    return _nested(flat)


def init_adapters(config: AdapterConfig, axes: Params, key: jax.Array, base: Params) -> Params:
    """Adapters that change nothing: `a` uniform within 1 / sqrt(in), `b` zero, as PEFT has them (of an embedding: `a`
    zero, `b` normal). A magnitude is the length of its column of the base.
    """
    weights = _flat(base, is_leaf=is_view)
    flat: dict[str, Any] = {path: weights[path].astype(jnp.float32) for path in WHOLE if path in weights}
    for path, names in find_targets(config, axes).items():
        of_path = jax.random.fold_in(key, zlib.crc32(path.encode()))  # another target changes none of the others
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
    """[lead..., out...] f32: of the columns of matrices [lead..., in..., out...]."""
    last = weight.ndim - num_out
    return jnp.sqrt(jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=tuple(range(last - num_in, last))))


# Together


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRAWeight(Kernel):
    """W + s A B; leading dims may be cut off, as a scan over layers does."""

    base: Any  # an array, or a Quantized
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array | None
    scale: float = field(metadata={"static": True})
    num_in: int = field(metadata={"static": True})
    key: jax.Array | None = None  # [lead...] u32 of dropout, 2 each; None: nothing is dropped
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
        kept = jax.random.bernoulli(jax.random.wrap_key_data(self.key), 1 - self.dropout, x.shape)
        return jnp.where(kept, x / (1 - self.dropout), jnp.zeros((), x.dtype))

    def array(self) -> jax.Array:
        """f32, to be cast once. Nothing is dropped: there is no input."""
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
        """Of the columns as they are: constants to the gradient (Liu et al. 2024, section 4.3)."""
        return jax.lax.stop_gradient(_lengths(jax.lax.stop_gradient(self._sum()), self.num_in, self.num_out))


def bind_adapters(
    config: AdapterConfig, axes: Params, base: Params, adapters: Params, rng: jax.Array | None = None
) -> Params:
    """The model's own tree, to be given to its `apply`. `rng`, a typed key, for dropout; None: without."""
    beside = find_targets(config, axes)
    ours = _flat(adapters)

    def join(path: tuple[Any, ...], weight: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in beside:
            return ours.get(name, weight)
        a, b, magnitude = (ours.get(f"{name}/{part}") for part in ("a", "b", "magnitude"))
        assert a is not None and b is not None
        num_lead, num_in = split(beside[name])
        key = None
        if rng is not None and config.dropout:  # a key of its own for each matrix of the stack
            of_path = jax.random.fold_in(rng, zlib.crc32(name.encode()))
            key = jax.random.key_data(jax.random.split(of_path, a.shape[:num_lead]))
        return LoRAWeight(weight, a, b, magnitude, config.scale, num_in, key, config.dropout)

    return jax.tree_util.tree_map_with_path(join, base, is_leaf=is_view)


def merge(config: AdapterConfig, axes: Params, base: Params, adapters: Params, dtype: jnp.dtype) -> Params:
    """Plain parameters: sums in f32, cast once. The base is not changed, and is what undoes it."""
    whole = bind_adapters(config, axes, base, adapters)
    return jax.tree.map(lambda w: as_array(w).astype(dtype), whole, is_leaf=is_view)


# The base


def quantized_base(config: AdapterConfig, axes: Params, params: Params) -> Params:
    """Frozen weights as `adapter.quantize_base` keeps them; the embedding, the head, norms, biases and routers stay."""
    if config.quantize_base is QuantizeBase.none:
        return params
    small = {path: names for path, names in matrices(axes).items() if path.endswith("/kernel")}

    def store(path: tuple[Any, ...], weight: jax.Array) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        bits, double = Bits[config.quantize_base.name], config.double_quant
        return quantize(weight, *split(small[name]), bits, double) if name in small else weight

    return jax.tree_util.tree_map_with_path(store, params)


def quantized_axes_of(axes: Params, stored: Params) -> Params:
    """The names of the dims of `quantized_base`."""

    def names_of(like: Any, names: Axes) -> Any:
        return like.view_axes(names, split(names).num_lead) if is_view(like) else names

    return jax.tree.map(names_of, stored, axes, is_leaf=is_view)
