"""Mixture of experts: routing, dispatch of tokens to experts, and load balancing.

A router scores all experts for each token, the token is processed by the top k of them, and their outputs are summed,
weighted by the scores. Routing is per token: it does not depend on padding or other documents, except that with
`dispatch=capacity` earlier tokens of a row may have filled an expert.

Load balance is measured per row, so that its terms add up exactly over microbatches, devices and hosts. A mean over the
batch (a product of two means) would not.

Shape letters: B batch, L length, D model, F mlp, E experts, k top-k, C capacity, P (token, expert) pairs, S slots.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import Dispatch, LoadBalancing, MLPConfig, ModelConfig, MoEConfig, RouterScore
from models.grouped_matmul import block_size_for, grouped
from models.layers import MLP, Linear, activate, param
from models.logical_axes import TOKENS, Cut, ShardingConstraint
from models.matmul import einsum_f32
from models.remat import checkpoint_name
from models.weight_views import as_array

# Scale of the gradient of a balancing bias, of which the optimizer reads only the sign
# (trainer/optimizers/param_groups.py). Small, so that it does not affect the global gradient norm.
BIAS_GRADIENT = 2.0**-20


class Auxiliary(NamedTuple):
    """Router terms of the loss and metrics: means over the tokens of each row, [B] f32."""

    loss_B: jax.Array  # added to the loss of each token of the row that contributes to it; includes coefficients
    metrics: dict[str, jax.Array]  # by name, [B] each


class Routing(NamedTuple):
    """Selected experts and scores of all tokens."""

    chosen_BLk: jax.Array  # i32
    weights_BLk: jax.Array  # f32
    shares_BLE: jax.Array  # f32: scores normalized to sum 1, for the auxiliary loss
    logits_BLE: jax.Array  # f32


def route(logits_BLE: jax.Array, bias_E: jax.Array | None, config: MoEConfig) -> Routing:
    """Selects the experts of each token and their weights. `bias_E` affects the selection but not the weights.

    Softmax: Shazeer et al. 2017; sigmoid, bias and groups: DeepSeek-V3, sections 2.1.2 and 2.1.3.
    """
    if config.router_score is RouterScore.softmax:
        scores_BLE = shares_BLE = jax.nn.softmax(logits_BLE, axis=-1)
    else:
        scores_BLE = jax.nn.sigmoid(logits_BLE)
        shares_BLE = scores_BLE / (scores_BLE.sum(-1, keepdims=True) + 1e-20)
    choice_BLE = jax.lax.stop_gradient(scores_BLE)
    if bias_E is not None:
        choice_BLE = choice_BLE + jax.lax.stop_gradient(bias_E.astype(jnp.float32))[None, None]
    if config.num_groups > 1:
        choice_BLE = group_limited_topk(choice_BLE, config)
    _, chosen_BLk = jax.lax.top_k(choice_BLE, config.experts_per_token)
    # Compare and sum, because the gradient of a gather would be a scatter.
    weights_BLk = jnp.sum(jnp.where(_is_chosen(chosen_BLk, config), scores_BLE[:, :, None], 0.0), axis=-1)
    if config.norm_topk_prob:
        weights_BLk = weights_BLk / (weights_BLk.sum(-1, keepdims=True) + 1e-20)
    return Routing(chosen_BLk, weights_BLk * config.routed_scaling_factor, shares_BLE, logits_BLE)


def _is_chosen(chosen_BLk: jax.Array, config: MoEConfig) -> jax.Array:
    """Returns one-hot choices [B, L, k, E] bool, not materialized if reduced immediately."""
    return chosen_BLk[..., None] == jnp.arange(config.num_experts)[None, None, None]


def group_limited_topk(choice_BLE: jax.Array, config: MoEConfig) -> jax.Array:
    """Masks the scores outside of the top groups with -inf."""
    grouped = choice_BLE.reshape(*choice_BLE.shape[:2], config.num_groups, -1)
    worth = jax.lax.top_k(grouped, config.group_score_topk)[0].sum(-1)
    _, best = jax.lax.top_k(worth, config.topk_groups)
    selected = (best[..., None] == jnp.arange(config.num_groups)[None, None, None]).any(axis=2)
    return jnp.where(selected[..., None], grouped, -jnp.inf).reshape(choice_BLE.shape)


def auxiliary(
    routing: Routing, bias_E: jax.Array | None, real_BL: jax.Array, capacity: int | None, config: MoEConfig
) -> Auxiliary:
    """Computes the router terms of one layer. `real_BL`: tokens of documents, false for padding.

    The load-balancing loss is E sum_e f_e P_e, where f_e is the fraction of choices routed to expert e and P_e its mean
    normalized score (Fedus et al. 2021, equations 4 to 6; per sequence: DeepSeek-V3, equations 17 to 20).
    """
    real_BL = real_BL.astype(jnp.float32)
    count_B1 = jnp.maximum(real_BL.sum(1, keepdims=True), 1.0)
    mean = lambda values_BLX: jnp.einsum("BLX,BL->BX", values_BLX, real_BL, precision="highest") / count_B1
    load_BE = (
        config.num_experts
        / config.experts_per_token
        * mean(_is_chosen(routing.chosen_BLk, config).sum(2).astype(jnp.float32))
    )
    balance_B = jnp.sum(load_BE * mean(routing.shares_BLE), axis=-1)
    z_B = mean(jnp.square(jax.nn.logsumexp(routing.logits_BLE, axis=-1, keepdims=True)))[:, 0]
    loss_B = config.router_z_loss_weight * z_B
    if config.load_balancing is LoadBalancing.aux_loss:
        loss_B = loss_B + config.aux_loss_weight * balance_B
    if bias_E is not None:
        # Adds 0 to the loss; its gradient is the load of each expert minus the mean load.
        pull_B = jnp.sum(bias_E.astype(jnp.float32)[None] * (load_BE - 1), axis=-1)
        loss_B = loss_B + BIAS_GRADIENT * (pull_B - jax.lax.stop_gradient(pull_B))
    metrics = {"router/balance_loss": balance_B, "router/z_loss": z_B, "router/max_load": load_BE.max(-1)}
    if capacity is not None:
        taken_BE = load_BE * count_B1 * config.experts_per_token / config.num_experts
        dropped_B = jnp.maximum(taken_BE - capacity, 0).sum(-1) / (count_B1[:, 0] * config.experts_per_token)
        metrics["router/dropped"] = dropped_B
    return Auxiliary(loss_B, metrics)


def capacity_of(config: MoEConfig, length: int) -> int | None:
    """Returns the capacity of an expert for rows of `length` tokens; None: unlimited."""
    if config.dispatch is Dispatch.dropless:
        return None
    even = length * config.experts_per_token / config.num_experts
    return min(length, max(1, math.ceil(even * config.capacity_factor)))


class ExpertProjection(nnx.Module):
    """Kernels and optional biases of one projection of all experts."""

    def __init__(self, rngs, config: ModelConfig, sizes: tuple[int, int], axes: tuple[str, str], std: float):
        E, bias = config.moe.num_experts, config.moe.bias
        self.kernel = param(rngs, (E, *sizes), ("experts", *axes), std, config)
        self.bias = param(rngs, (E, sizes[1]), ("experts", axes[1]), 0, config) if bias else None


class Experts(nnx.Module):
    """MoE layer: routed experts, and optional shared experts for all tokens."""

    def __init__(self, rngs, config: ModelConfig, out_std: float):
        experts, D, std = config.moe, config.embed_dim, config.init_std
        E, F = experts.num_experts, experts.intermediate_dim
        self.config = config
        self.router = Linear(
            rngs, config, "BLD,DE->BLE", (D, E), ("embed", "router"), std=std, bias_dims=int(experts.router_bias)
        )
        self.balance_bias = (
            param(rngs, (E,), ("router",), 0, config) if experts.load_balancing is LoadBalancing.bias else None
        )
        self.up = ExpertProjection(rngs, config, (D, F), ("embed", "mlp"), std)
        self.gate = ExpertProjection(rngs, config, (D, F), ("embed", "mlp"), std) if config.mlp.gated else None
        self.down = ExpertProjection(rngs, config, (F, D), ("mlp", "embed"), out_std)
        shared = experts.shared_intermediate_dim
        self.shared = MLP(rngs, config, out_std, shared) if shared else None

    def __call__(
        self, x_BLD: jax.Array, real_BL: jax.Array, constrain: ShardingConstraint
    ) -> tuple[jax.Array, Auxiliary]:
        """Returns the summed outputs [B, L, D] and the router terms. Padding is not routed."""
        config = self.config.moe
        bias_E = None if self.balance_bias is None else self.balance_bias[...]
        routing = route(self._logits(x_BLD), bias_E, config)
        capacity = capacity_of(config, x_BLD.shape[1])
        terms = auxiliary(routing, bias_E, real_BL, capacity, config)
        chosen_BLk = jnp.where(real_BL[..., None], routing.chosen_BLk, config.num_experts)
        arrays, axes = self._weights()
        # With a capacity, dropping depends on the full row, so the length is not sharded.
        rows = ("batch", "length" if capacity is None else None, None)
        y_BLD = constrain.per_device(
            partial(
                _compute,
                capacity=capacity,
                num_experts=config.num_experts,
                mlp=self.config.mlp,
                parts=constrain.num_shards("experts"),
                platform=constrain.platform,
            ),
            (rows, rows, rows, *axes),
            x_BLD,
            chosen_BLk,
            routing.weights_BLk,
            *arrays,
        )
        y_BLD = constrain(y_BLD, TOKENS)
        return (y_BLD if self.shared is None else y_BLD + self.shared(x_BLD, constrain)), terms

    def _logits(self, x_BLD: jax.Array) -> jax.Array:
        """Returns router logits [B, L, E], in f32 throughout, because routing depends on near ties."""
        kernel_DE = self.router.kernel[...].astype(jnp.float32)
        logits_BLE = jnp.einsum("BLD,DE->BLE", x_BLD.astype(jnp.float32), kernel_DE, precision="highest")
        if self.router.bias is None:
            return logits_BLE
        return logits_BLE + self.router.bias[...].astype(jnp.float32)[None, None]

    def _weights(self) -> tuple[list[Any], list[Any]]:
        """Returns kernels and biases of gate, up and down (None if absent) and their logical axes.

        The `embed` dim is unsharded, since every device needs all of it.
        """
        arrays, axes = [], []
        for module, (rows, cols) in ((self.gate, (None, "mlp")), (self.up, (None, "mlp")), (self.down, ("mlp", None))):
            kernel = None if module is None else as_array(module.kernel[...])
            bias = None if module is None or module.bias is None else module.bias[...]
            arrays += [kernel, bias]
            axes += [("experts", rows, cols), ("experts", cols)]
        return arrays, [names if array is not None else None for array, names in zip(arrays, axes, strict=True)]


def _compute(
    cut: Cut, x_BLD, chosen_BLk, weights_BLk, gate, gate_bias, up, up_bias, down, down_bias, *,
    capacity: int | None, num_experts: int, mlp: MLPConfig, parts: int, platform: str,
) -> jax.Array:  # fmt: skip
    """Computes the routed sum [B, L, D] of local rows with local experts.

    If the mesh axes of the experts also shard the rows, tokens are exchanged. With a capacity, tokens are sent to the
    device of their expert and back (two all-to-alls). Without one, the number of tokens per device is not static: all
    tokens are gathered (all-gather), each device computes the share of its experts, and the shares are summed
    (reduce-scatter). `parts`: number of shards of the experts.
    """
    mine, rows = cut.get("experts", ()), cut.get("batch", ())
    shared = tuple(axis for axis in mine if axis in rows)
    all_to_all = capacity is not None and bool(shared) and shared == mine
    gathered = () if all_to_all else shared
    if gathered:
        x_BLD, chosen_BLk, weights_BLk = (
            jax.lax.all_gather(a, gathered, axis=0, tiled=True) for a in (x_BLD, chosen_BLk, weights_BLk)
        )
    num_local = num_experts if all_to_all else up.shape[0]
    chosen_BLk = chosen_BLk - (jax.lax.axis_index(mine) * num_local if mine and not all_to_all else 0)
    if down_bias is not None and (cutting := cut.get("mlp")):  # otherwise each partial sum would add it
        down_bias = jnp.where(jax.lax.axis_index(cutting) == 0, down_bias, 0)
    weights = (gate, gate_bias, up, up_bias, down, down_bias)
    if capacity is None:
        y_BLD = _dropless(x_BLD, chosen_BLk, weights_BLk, weights, mlp, parts, platform)
    else:
        y_BLD = _with_capacity(
            x_BLD, chosen_BLk, weights_BLk, weights, mlp, capacity, num_local, exchange_axes=mine if all_to_all else ()
        )
    if gathered:
        y_BLD = jax.lax.psum_scatter(y_BLD, gathered, scatter_dimension=0, tiled=True)
    parted = tuple(axis for axis in (*cut.get("mlp", ()), *mine) if axis not in shared)
    return (jax.lax.psum(y_BLD, parted) if parted else y_BLD).astype(x_BLD.dtype)


def _dropless(x_BLD, chosen_BLk, weights_BLk, weights, mlp: MLPConfig, parts: int, platform: str) -> jax.Array:
    """Dropless dispatch, [B, L, D] f32: pairs sorted by expert, grouped matmuls, sorted back (Gale et al. 2022).

    Choices outside [0, number of local experts) belong to another device or to padding.
    """
    gate, gate_bias, up, up_bias, down, down_bias = weights
    B, L, D = x_BLD.shape
    num_local, k = up.shape[0], chosen_BLk.shape[-1]
    chosen_1P = chosen_BLk.reshape(1, B * L * k)
    order_1P, rank_1P, sizes_1E, _ = _sort_pairs(chosen_1P, num_local)
    sizes, num_mine = sizes_1E[0], sizes_1E.sum(1, keepdims=True)
    num_pairs = B * L * k
    slots_1S = jnp.where(jnp.arange(num_pairs)[None] < num_mine, order_1P, num_pairs)
    combine_1P = jnp.where(rank_1P < num_mine, rank_1P, num_pairs)
    x_SD = _take(x_BLD.reshape(1, B * L, D), slots_1S, combine_1P, k)[0]
    block = block_size_for(num_pairs / (num_local * parts), platform)
    expert_S = jnp.minimum(jnp.take(chosen_1P[0], order_1P[0]), num_local - 1)

    def apply(x, kernel, bias):
        y = checkpoint_name("product", grouped(x, kernel, sizes, x.dtype, block))
        return y if bias is None else y + bias[expert_S].astype(y.dtype)

    hidden_SF = activate(mlp, None if gate is None else apply(x_SD, gate, gate_bias), apply(x_SD, up, up_bias))
    y_SD = apply(hidden_SF, down, down_bias)
    y_PD = _take(y_SD[None], combine_1P, slots_1S, 1)[0]
    return jnp.sum(y_PD.reshape(B, L, k, D).astype(jnp.float32) * weights_BLk[..., None], axis=2)


def _with_capacity(
    x_BLD,
    chosen_BLk,
    weights_BLk,
    weights,
    mlp: MLPConfig,
    capacity: int,
    num_local: int,
    exchange_axes: tuple[str, ...],
) -> jax.Array:
    """Capacity dispatch, [B, L, D] f32: an expert keeps its first C tokens per row (Lepikhin et al. 2020).

    Tokens have priority by position, not by score, so that a later token cannot displace an earlier one.
    """
    gate, gate_bias, up, up_bias, down, down_bias = weights
    B, L, D = x_BLD.shape
    k, C = chosen_BLk.shape[-1], capacity
    chosen_BP = chosen_BLk.reshape(B, L * k)
    order_BP, rank_BP, sizes_BE, starts_BE = _sort_pairs(chosen_BP, num_local)
    place_BEC = jnp.arange(C)[None, None] + starts_BE[..., None]
    pair_BS = jnp.take_along_axis(order_BP, place_BEC.reshape(B, num_local * C), axis=1, mode="clip")
    filled_BEC = jnp.arange(C)[None, None] < sizes_BE[..., None]
    slots_BS = jnp.where(filled_BEC.reshape(B, num_local * C), pair_BS, L * k)
    expert_BP = jnp.clip(chosen_BP, 0, num_local - 1)
    place_BP = rank_BP - jnp.take_along_axis(starts_BE, expert_BP, axis=1)
    accepted_BP = (chosen_BP == expert_BP) & (place_BP < C)
    combine_BP = jnp.where(accepted_BP, expert_BP * C + place_BP, num_local * C)
    x_BECD = _take(x_BLD, slots_BS, combine_BP, k).reshape(B, num_local, C, D)
    if exchange_axes:  # from local rows and all experts to all rows and local experts
        x_BECD = jax.lax.all_to_all(x_BECD, exchange_axes, split_axis=1, concat_axis=0, tiled=True)

    def apply(spec, x, kernel, bias):
        y = checkpoint_name("product", einsum_f32(spec, x, kernel, x.dtype))
        return y if bias is None else y + bias[None, :, None].astype(y.dtype)

    widen = partial(apply, "BECD,EDF->BECF", x_BECD)
    hidden_BECF = activate(mlp, None if gate is None else widen(gate, gate_bias), widen(up, up_bias))
    y_BECD = apply("BECF,EFD->BECD", hidden_BECF, down, down_bias)
    if exchange_axes:
        y_BECD = jax.lax.all_to_all(y_BECD, exchange_axes, split_axis=0, concat_axis=1, tiled=True)
    y_BPD = _take(y_BECD.reshape(B, num_local * C, D), combine_BP, slots_BS, 1)
    return jnp.sum(y_BPD.reshape(B, L, k, D).astype(jnp.float32) * weights_BLk[..., None], axis=2)


def _sort_pairs(chosen_BP: jax.Array, num_local: int) -> tuple[jax.Array, ...]:
    """Sorts pairs by expert, stably; pairs without a local expert come last.

    Returns order [B, P] (the pair at each rank), rank [B, P] of each pair, sizes [B, E] and starts [B, E] in ranks.
    """
    key_BP = jnp.where((chosen_BP >= 0) & (chosen_BP < num_local), chosen_BP, num_local)
    order_BP = jnp.argsort(key_BP, axis=1, stable=True)
    rank_BP = jnp.argsort(order_BP, axis=1)
    sizes_BE = (key_BP[..., None] == jnp.arange(num_local)[None, None]).sum(1, dtype=jnp.int32)
    return order_BP, rank_BP, sizes_BE, jnp.cumsum(sizes_BE, axis=1) - sizes_BE


def _take(x_BND: jax.Array, gather_BM: jax.Array, inverse_BN: jax.Array, copies: int) -> jax.Array:
    """Gathers rows of x, each repeated `copies` times, by index: [B, M, D]; zeros for indices past the end.

    `inverse_BN` is the inverse permutation, so that the gradient is a gather as well instead of a scatter.
    """
    return _taken(x_BND, gather_BM, inverse_BN, copies)  # type: ignore[return-value]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _taken(x_BND, gather_BM, inverse_BN, copies):
    return _rows(x_BND, gather_BM // copies)


def _take_backward(copies, indices, dy_BMD):
    _, inverse_BN = indices
    dx_BND = _rows(dy_BMD, inverse_BN)
    if copies > 1:
        B, P, D = dx_BND.shape
        dx_BND = dx_BND.reshape(B, P // copies, copies, D).astype(jnp.float32).sum(2).astype(dy_BMD.dtype)
    return dx_BND, None, None


_taken.defvjp(lambda x, gather, inverse, copies: (_take(x, gather, inverse, copies), (gather, inverse)), _take_backward)


def _rows(x_BND: jax.Array, at_BM: jax.Array) -> jax.Array:
    return jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))(x_BND, at_BM)
