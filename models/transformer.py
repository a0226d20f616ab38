"""One transformer for every family: the file to read first.

In reading order: outputs, embedding and head, a block, stacks of blocks, parameters, forward passes. It supports:

- mixers (`models/mixers/`): multi-head, grouped-query and latent attention, full or sliding by layer
- masks: causal, prefix, bidirectional; several documents packed in one row; attention over whole rows, by blocks, over
  a ring of devices (`models/attention/flash.py`) or in kernels of GPUs and TPUs (`models/attention/kernels.py`)
- feed-forward layers, or a mixture of experts after optional dense layers (`models/moe.py`)
- RMS or layer norms before and/or after each sub-layer; rotary, learned or no positions; soft caps, sinks, dropout
- a language-model head, tied or not, or scores of each token; multi-token prediction (`models/mtp.py`)
- remat and host offload (`models/remat.py`), pipeline stages (`models/pipeline_parallel.py`), 8-bit matmuls, weight
  views such as LoRA (`models/weight_views.py`), captured hidden states and attention weights (`models/captures.py`)

Flax NNX modules are used for construction only. At the border everything is a nested dict of arrays: `init_params`
makes it, `param_axes` names its dims, `make_apply` gives a pure function of it. Layers are stacked on a leading
`layers` dim and run by one scan, so compile time does not grow with depth unless `model.scan_unroll` is raised. The
first dense layers of a mixture of experts are a separate stack.

Shape letters: B batch, L length, S key length, D model, N query heads, V vocab.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.captures import Captures, CaptureSpec, init_captures, record
from models.config import ModelConfig, NormPlacement, Position
from models.forward_context import Context, LayerFlags, bidirectional_tokens, layer_flags, make_context
from models.layers import MLP, Linear, Normalization, dropout, neftune_noise, param
from models.logical_axes import RESIDUAL, TOKENS, ShardingConstraint, no_constraint
from models.matmul import einsum_f32
from models.mixers.mixer import Cache
from models.mixers.mixer_registry import mixer_class
from models.moe import Auxiliary, Experts
from models.mtp import MTP, MTPBlock, run_mtp
from models.mup import final_norm_factor
from models.pipeline_parallel import run_layers_in_stages, schedule_of
from models.remat import checkpoint_name, remat
from models.weight_views import WeightView, as_array, as_head, is_view, transposed

Params = Any  # a nested dict of arrays


class ModelOutput(NamedTuple):
    """Result of a forward pass. Logits are `softcap(hidden @ head)`, computed in chunks where they are needed.

    With `num_labels` the head has that many columns: scores instead of logits.
    """

    hidden_BLD: jax.Array
    head_DV: jax.Array | WeightView  # in the dtype of parameters: cast at use, so that gradients accumulate in it
    logit_soft_cap: float | None
    auxiliary: Auxiliary | None = None  # of a mixture of experts
    mtp_KBLD: jax.Array | None = None  # hidden states of the multi-token-prediction modules, on request
    captures: Captures | None = None  # captured activations, on request


class Apply(Protocol):
    """The interface of a model to the training core. `rng` None: no dropout.

    `prefix_BL` bool, for models with `model.attention.mask=prefix`: the tokens of each document's prompt. `mtp`:
    also run the multi-token-prediction modules. `capture`: activations to capture.
    """

    def __call__(
        self,
        params: Params,
        tokens_BL: jax.Array,
        *,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        rng: jax.Array | None = None,
        prefix_BL: jax.Array | None = None,
        mtp: bool = False,
        capture: CaptureSpec | None = None,
    ) -> ModelOutput: ...


class EmbedAndHead(nnx.Module):
    """Embeddings, the final norm and the head."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig):
        D, V, std = config.embed_dim, config.vocab_size, config.init_std
        self.config = config
        self.embedding = param(rngs, (V, D), ("vocab", "embed"), std, config)
        learned = config.position is Position.learned
        table = (config.max_seq_len, D), ("positions", "embed")
        self.position_embedding = param(rngs, *table, std, config) if learned else None
        self.final_norm = Normalization(rngs, config, (D,), ("embed",), start=final_norm_factor(config))
        logits = not (config.tied_embeddings or config.num_labels)
        self.head = param(rngs, (D, V), ("embed", "vocab"), std, config) if logits else None
        # Scores start at 0, regardless of the width.
        scores = (D, config.num_labels), ("embed", "outputs")
        self.score = param(rngs, *scores, 0, config) if config.num_labels else None

    def embed(self, tokens_BL, positions_BL, rng: jax.Array | None, constrain: ShardingConstraint) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype.name)
        # Unsharded embedding dim for the lookup: the partitioner cannot gather from a table sharded along it.
        table_VD = constrain(as_array(self.embedding[...]).astype(dtype), ("vocab", None))
        x_BLD = table_VD[tokens_BL]
        if config.scale_embeddings:
            x_BLD = x_BLD * jnp.asarray(config.embed_dim**0.5, dtype)
        if self.position_embedding is not None:
            x_BLD = x_BLD + self.position_embedding[...][positions_BL].astype(dtype)
        return dropout(x_BLD, config.dropout, rng)

    def output(self, x_BLD: jax.Array, constrain: ShardingConstraint = no_constraint) -> ModelOutput:
        if self.score is not None:
            return ModelOutput(self.final_norm(x_BLD), as_array(self.score[...]), None)
        head_DV = transposed(self.embedding[...]) if self.head is None else self.head[...]
        head_DV = as_head(head_DV)
        if not is_view(head_DV):  # gathered once: the loss reads it for every chunk of a row
            head_DV = constrain(head_DV, ("embed", "vocab"))
        return ModelOutput(self.final_norm(x_BLD), head_DV, self.config.final_logit_softcap)


class BlockOutput(NamedTuple):
    """Activations after a layer, and its other results; None if there are none."""

    x_BLD: jax.Array
    terms: Auxiliary | None  # of a mixture of experts
    weights_BNLS: jax.Array | None  # attention weights, on request
    cache: Any  # of the layer, updated with the new tokens, in decoding


class Block(nnx.Module):
    """One layer: a mixer and an MLP or experts, each with norms and a residual connection."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, stack: "LayerStack"):
        out_std = config.init_std
        if config.init_scaled_residual:
            out_std /= (2 * config.num_layers) ** 0.5
        self.config = config
        self.attention = mixer_class(config, stack.start)(rngs, config, out_std)
        self.mlp = (MLP if stack.dense else Experts)(rngs, config, out_std)
        before = config.norm_placement is not NormPlacement.post
        after = config.norm_placement is not NormPlacement.pre
        norm = lambda use: Normalization(rngs, config, (config.embed_dim,), ("embed",)) if use else None
        self.attention_norm, self.attention_post_norm = norm(before), norm(after)
        self.mlp_norm, self.mlp_post_norm = norm(before), norm(after)

    def __call__(self, x_BLD, context: Context, layer: LayerFlags, rng, cache: Any = None) -> BlockOutput:
        """`cache`: of this layer, in decoding."""
        mixer_rng, *residual_rngs = (None,) * 3 if rng is None else jax.random.split(rng, 3)
        norm = lambda module, x: x if module is None else module(x)
        # Sequence parallelism (Korthikanti et al. 2022 [2205.05198], section 4.2.2): between tensor-parallel matmuls
        # rows are sharded by tokens, so norms and residuals are not replicated and saved activations are sharded.
        read = lambda module, x: context.constrain(norm(module, x), TOKENS)
        write = lambda module, y, rng: dropout(norm(module, context.constrain(y, RESIDUAL)), self.config.dropout, rng)
        h_BLD, terms, weights_BNLS = read(self.attention_norm, x_BLD), None, None
        if cache is None:
            y_BLD, weights_BNLS = self.attention(h_BLD, context, layer, mixer_rng)
        else:
            y_BLD, cache = self.attention.step(h_BLD, cache, context, layer)
        x_BLD = x_BLD + write(self.attention_post_norm, y_BLD, residual_rngs[0])
        h_BLD = read(self.mlp_norm, x_BLD)
        if isinstance(self.mlp, Experts):
            y_BLD, terms = self.mlp(h_BLD, context.segments > 0, context.constrain)
        else:
            y_BLD = self.mlp(h_BLD, context.constrain)
        x_BLD = x_BLD + write(self.mlp_post_norm, y_BLD, residual_rngs[1])
        return BlockOutput(context.constrain(x_BLD, RESIDUAL), terms, weights_BNLS, cache)


class LayerStack(NamedTuple):
    """Consecutive layers of one kind, run by one scan."""

    name: str  # in the parameter tree
    start: int
    stop: int
    dense: bool


def stacks(config: ModelConfig) -> list[LayerStack]:
    """Returns the stacks in the order of the layers; `layers` is always one of them."""
    first = config.layers_before_experts
    rest = LayerStack("layers", first, config.num_layers, not config.moe.num_experts)
    return [LayerStack("dense_layers", 0, first, True), rest] if first else [rest]


def all_stacks(config: ModelConfig) -> list[LayerStack]:
    """Returns all stacks, including the multi-token-prediction modules, which run on request only."""
    own, n = stacks(config), config.num_layers
    return [*own, LayerStack(MTP, n, n + config.mtp_num_layers, own[-1].dense)] if config.mtp_num_layers else own


def _abstract_ends(config: ModelConfig) -> EmbedAndHead:
    return nnx.eval_shape(lambda: EmbedAndHead(nnx.Rngs(0), config))


def _block(rngs: nnx.Rngs, config: ModelConfig, stack: LayerStack) -> nnx.Module:
    block = Block(rngs, config, stack)
    return MTPBlock(rngs, config, block) if stack.name == MTP else block


def _abstract_block(config: ModelConfig, stack: LayerStack) -> nnx.Module:
    return nnx.eval_shape(lambda: _block(nnx.Rngs(0), config, stack))


def projections(config: ModelConfig, stack: LayerStack) -> dict[tuple[str, ...], Linear]:
    """Returns the linear layers of a block by the path of their parameters."""
    modules = nnx.iter_modules(_abstract_block(config, stack))
    return {path: module for path, module in modules if isinstance(module, Linear)}


def _block_graph(config: ModelConfig, stack: LayerStack) -> nnx.GraphDef:
    return nnx.split(_abstract_block(config, stack))[0]


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Initializes parameters as a nested dict; each of `all_stacks` has a leading `layers` dim.

    Normal with `init_std`, output projections scaled by depth, biases 0, norms 1 (GPT-2, section 2.3); with
    `mup_base_width` also by width (models/mup.py).
    """
    ends_key, layers_key = jax.random.split(key)
    ends = nnx.to_pure_dict(nnx.state(EmbedAndHead(nnx.Rngs(ends_key), config), nnx.Param))
    keys = jax.random.split(layers_key, config.num_layers)
    if config.mtp_num_layers:  # a separate key: the other layers are the same without them
        more = jax.random.split(jax.random.fold_in(layers_key, config.num_layers), config.mtp_num_layers)
        keys = jnp.concatenate([keys, more])

    def init_stack(stack: LayerStack) -> Params:
        block = lambda key: nnx.to_pure_dict(nnx.state(_block(nnx.Rngs(key), config, stack), nnx.Param))
        return jax.vmap(block)(keys[stack.start : stack.stop])

    return {**ends, **{stack.name: init_stack(stack) for stack in all_stacks(config)}}


def abstract_params(config: ModelConfig) -> Params:
    """Returns the tree of `init_params` as `jax.ShapeDtypeStruct`s, without allocating memory."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def param_axes(config: ModelConfig) -> Params:
    """Returns the tree of `init_params` with a tuple of logical axis names for each array."""
    named = lambda module, lead: nnx.to_pure_dict(
        jax.tree.map(
            lambda p: p.replace((*lead, *p.get_metadata()["axes"])),
            nnx.state(module, nnx.Param),
            is_leaf=lambda p: isinstance(p, nnx.Variable),
        )
    )
    blocks = {stack.name: named(_abstract_block(config, stack), ("layers",)) for stack in all_stacks(config)}
    return {**named(_abstract_ends(config), ()), **blocks}


def make_apply(
    config: ModelConfig, constrain: ShardingConstraint = no_constraint, *, neftune_alpha: float = 0.0
) -> Apply:
    """Returns the forward pass as a pure function of the parameters; `neftune_alpha`: see `neftune_noise`."""

    def apply(params, tokens_BL, *, positions_BL, segment_ids_BL, **options) -> ModelOutput:
        given = {"config": config, "constrain": constrain, "neftune_alpha": neftune_alpha}
        return forward(params, tokens_BL, positions_BL, segment_ids_BL, **given, **options)

    return apply


def _ends(params: Params, config: ModelConfig) -> EmbedAndHead:
    of_layers = [stack.name for stack in all_stacks(config)]
    weights = nnx.State({name: value for name, value in params.items() if name not in of_layers})
    return nnx.merge(nnx.split(_abstract_ends(config))[0], weights)


class Rows(NamedTuple):
    """Per-row inputs of all layers."""

    positions_BL: jax.Array
    segment_ids_BL: jax.Array
    shown_BL: jax.Array | None


class Stream(NamedTuple):
    """The values carried through a stack of layers."""

    x_BLD: jax.Array
    captures: Captures | None  # buffers of captured activations
    terms: Auxiliary | None = None  # sums of the experts' auxiliary terms over the stack


class Scanned(NamedTuple):
    """Inputs of the scan over a stack: arrays with a leading `layers` dim."""

    weights: Params
    layer: LayerFlags
    index: jax.Array


def _context(config: ModelConfig, rows: Rows, capture: CaptureSpec | None, constrain: ShardingConstraint) -> Context:
    shows_attention = capture is not None and capture.attention
    return make_context(config, *rows, 0, rows.positions_BL.shape[1], constrain, shows_attention=shows_attention)


def _run_layers(graph, capture, config: ModelConfig, constrain, scanned: Scanned, stream: Stream, rows: Rows, rng):
    """Runs consecutive layers of a stack, whose blocks have this graph."""
    context = _context(config, rows, capture, constrain)

    def layer(x_BLD: jax.Array, scanned: Scanned) -> BlockOutput:
        key = None if rng is None else jax.random.fold_in(rng, scanned.index)
        block = nnx.merge(graph, nnx.State(scanned.weights))
        return block(checkpoint_name("layer_input", x_BLD), context, scanned.layer, key)

    layer = remat(layer, config, constrain.platform)

    def body(carried: tuple[jax.Array, Captures | None], scanned: Scanned):
        after = layer(carried[0], scanned)
        # Outside of remat: buffers that are only written need no copy per layer.
        return (after.x_BLD, record(capture, carried[1], scanned.index, after.x_BLD, after.weights_BNLS)), after.terms

    carried, terms = jax.lax.scan(body, (stream.x_BLD, stream.captures), scanned, unroll=config.scan_unroll or True)
    return Stream(*carried, jax.tree.map(lambda leaf: leaf.sum(0), terms))


def _run_stack(
    config, stack: LayerStack, capture, constrain: ShardingConstraint, weights: Params, stream: Stream, rows: Rows, rng
):
    """Runs all layers of a stack, in pipeline stages if the mesh has any."""
    run = partial(_run_layers, _block_graph(config, stack), capture)
    of_stack = lambda leaf: jnp.asarray(leaf[stack.start : stack.stop])
    scanned = Scanned(weights, *jax.tree.map(of_stack, (layer_flags(config), np.arange(config.num_layers))))
    arguments = config, constrain, scanned, stream, rows, rng
    schedule = schedule_of(config.pipeline, constrain, len(stream.x_BLD), stack.stop - stack.start)
    if schedule is None or stack.name != "layers":
        return run(*arguments)
    return run_layers_in_stages(schedule, run, *arguments)


def forward(
    params: Params,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    segment_ids_BL: jax.Array,
    *,
    config: ModelConfig,
    constrain: ShardingConstraint = no_constraint,
    rng: jax.Array | None = None,
    prefix_BL: jax.Array | None = None,
    mtp: bool = False,
    capture: CaptureSpec | None = None,
    neftune_alpha: float = 0.0,
) -> ModelOutput:
    """Runs the model on complete rows, without a cache."""
    ends = _ends(params, config)
    embed_rng, layer_rng = (None, None) if rng is None else jax.random.split(rng)
    x_BLD = neftune_noise(
        ends.embed(tokens_BL, positions_BL, embed_rng, constrain), segment_ids_BL, neftune_alpha, embed_rng
    )
    x_BLD = constrain(x_BLD, RESIDUAL)
    rows = Rows(positions_BL, segment_ids_BL, bidirectional_tokens(config, segment_ids_BL, prefix_BL))
    stream = Stream(x_BLD, init_captures(capture, x_BLD, config.attention.num_heads))
    for stack in stacks(config):
        stream = _run_stack(config, stack, capture, constrain, params[stack.name], stream, rows, layer_rng)
    terms, num_layers = stream.terms, stack.stop - stack.start  # of the last stack, which has the experts
    x_BLD, mtp_KBLD = constrain(stream.x_BLD, TOKENS), None
    if mtp:
        modules, context = all_stacks(config)[-1], _context(config, rows, capture, constrain)
        embed = lambda tokens_BL, positions_BL: ends.embed(tokens_BL, positions_BL, None, constrain)
        weights = _block_graph(config, modules), params[MTP], modules.start
        mtp_KBLD, more = run_mtp(*weights, x_BLD, tokens_BL, embed, context, config, layer_rng)
        terms, num_layers = jax.tree.map(jnp.add, terms, more), num_layers + config.mtp_num_layers
    terms = jax.tree.map(lambda leaf: leaf / num_layers, terms)
    return ends.output(x_BLD, constrain)._replace(auxiliary=terms, mtp_KBLD=mtp_KBLD, captures=stream.captures)


def forward_cached(
    params: Params,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    cache: Cache,
    *,
    config: ModelConfig,
    constrain: ShardingConstraint = no_constraint,
    first_row: jax.Array | int = 0,
    shown: jax.Array | int | None = None,
) -> tuple[ModelOutput, Cache]:
    """Runs the model with the cache of earlier tokens; each row is one document. See `Cache` for the rules.

    Rows of the batch are those of the cache from `first_row` on. The layers of `params` are a tuple, one tree each
    (see `models.decode.engine.decoding_params`): a scan would copy the slices of a stack. `shown`: the length of a
    bidirectional prompt, which is read in one call.
    """
    ends = _ends(params, config)
    x_BLD = constrain(ends.embed(tokens_BL, positions_BL, None, constrain), RESIDUAL)
    segments_BL = (positions_BL < cache.capacity).astype(jnp.int32)
    context = make_context(config, positions_BL, segments_BL, shown, first_row, cache.capacity, constrain)
    of_all, layers = layer_flags(config), list(cache.layers)
    for stack in stacks(config):
        graph = _block_graph(config, stack)
        for i in range(stack.start, stack.stop):
            block = nnx.merge(graph, nnx.State(params["layers"][i]))
            after = block(x_BLD, context, jax.tree.map(lambda x, i=i: x[i], of_all), None, layers[i])
            x_BLD, layers[i] = after.x_BLD, after.cache
    return ends.output(constrain(x_BLD, TOKENS)), Cache(tuple(layers), cache.capacity)


def logits(output: ModelOutput) -> jax.Array:
    """Returns logits [B, L, V] in f32, for decoding and tests; training computes them in chunks."""
    x_BLV = einsum_f32("BLD,DV->BLV", output.hidden_BLD, output.head_DV, jnp.dtype("float32"))
    cap = output.logit_soft_cap
    return x_BLV if cap is None else cap * jnp.tanh(x_BLV / cap)
