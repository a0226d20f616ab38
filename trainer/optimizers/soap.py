"""SOAP: Adam in the eigenbasis of Shampoo's preconditioners (Vyas et al. 2024, arXiv 2409.11321, algorithm 3).

Each matrix of a stack has its own bases; related dims (heads, head_dim) are merged into one side. State has the dims of
the parameter, with the other side reduced to size 1, so sharding carries over.

Shape letters: N stack, R rows, C columns.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainer.optimizers.adamw import scale_by_adam
from trainer.optimizers.mup_rates import Rule
from trainer.optimizers.optimizer import OptimizerConfig, Tree, matrices_by, matrices_only
from trainer.optimizers.param_groups import MatrixDims, matrix_dims

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


class SoapState(NamedTuple):
    """Trees over the matrices, with `optax.MaskedNode()` for a side longer than `max_dim`."""

    count: jax.Array  # [] i32
    mu: Any  # first moment, in the original basis
    nu: Any  # second moment, in the eigenbasis
    row_gram: Any  # [batch..., rows..., 1..., R]: mean of G G^T
    col_gram: Any  # [batch..., 1..., cols..., C]: mean of G^T G
    row_basis: Any  # like row_gram: its eigenvectors, as columns
    col_basis: Any  # like col_gram


class _Matrix(NamedTuple):
    """State of one parameter, as stacks of matrices."""

    mu: jax.Array  # [N, R, C]
    nu: jax.Array  # [N, R, C]
    row_gram: jax.Array | None  # [N, R, R]
    col_gram: jax.Array | None  # [N, C, C]
    row_basis: jax.Array | None
    col_basis: jax.Array | None


def _into_basis(x: jax.Array, state: _Matrix) -> jax.Array:
    if state.row_basis is not None:
        x = _einsum("nra,nrc->nac", state.row_basis, x)
    return x if state.col_basis is None else _einsum("nrc,nca->nra", x, state.col_basis)


def _out_of_basis(x: jax.Array, state: _Matrix) -> jax.Array:
    if state.row_basis is not None:
        x = _einsum("nra,nac->nrc", state.row_basis, x)
    return x if state.col_basis is None else _einsum("nra,nca->nrc", x, state.col_basis)


def _eigenbasis(gram: jax.Array | None) -> jax.Array | None:
    # Descending eigenvalues, as in later refreshes.
    return None if gram is None else jnp.linalg.eigh(gram)[1][..., ::-1]


def _refresh(gram: jax.Array | None, basis: jax.Array | None, nu: jax.Array, axis: int) -> Any:
    """Runs one power iteration and QR; permutes `nu` along with reordered eigenvectors."""
    if gram is None or basis is None:
        return basis, nu
    product = _einsum("nab,nbc->nac", gram, basis)
    order = jnp.argsort(-jnp.sum(basis * product, axis=1), axis=-1)
    product = jnp.take_along_axis(product, order[:, None, :], axis=2)
    nu = jnp.take_along_axis(nu, jnp.expand_dims(order, 3 - axis), axis=axis)
    return jnp.linalg.qr(product)[0], nu


def _refreshed(state: _Matrix) -> _Matrix:
    row_basis, nu = _refresh(state.row_gram, state.row_basis, state.nu, axis=1)
    col_basis, nu = _refresh(state.col_gram, state.col_basis, nu, axis=2)
    return state._replace(row_basis=row_basis, col_basis=col_basis, nu=nu)


def _first(state: _Matrix) -> _Matrix:
    return state._replace(row_basis=_eigenbasis(state.row_gram), col_basis=_eigenbasis(state.col_gram))


def _update_matrix(
    grad: jax.Array, state: _Matrix, count: jax.Array, *, b1: float, b2: float, eps: float, frequency: int
) -> tuple[jax.Array, _Matrix]:
    """Returns the direction [N, R, C] of update number `count` (starting at 0) and the new state.

    The first update only initializes the bases: in the eigenbasis of its own gradient, everything off the diagonal is
    rounding noise, which Adam would amplify to full-size steps.
    """
    started = count > 0
    projected = _into_basis(grad, state)
    mu = jnp.where(started, b1 * state.mu + (1 - b1) * grad, state.mu)
    nu = jnp.where(started, b2 * state.nu + (1 - b2) * jnp.square(projected), state.nu)
    t = jnp.maximum(count, 1).astype(jnp.float32)
    scaled = (_into_basis(mu, state) / (1 - b1**t)) / (jnp.sqrt(nu / (1 - b2**t)) + eps)
    direction = jnp.where(started, _out_of_basis(scaled, state), 0.0)

    def ema(gram: jax.Array | None, outer: str) -> jax.Array | None:
        return None if gram is None else b2 * gram + (1 - b2) * _einsum(outer, grad, grad)

    row_gram, col_gram = ema(state.row_gram, "nrc,nsc->nrs"), ema(state.col_gram, "nrc,nrd->ncd")
    state = state._replace(mu=mu, nu=nu, row_gram=row_gram, col_gram=col_gram)
    # 0: initialize the bases, 1: refresh them, 2: leave them unchanged.
    choice = jnp.where(count == 0, 0, jnp.where(count % frequency == 0, 1, 2))
    return direction, jax.lax.switch(choice, [_first, _refreshed, lambda s: s], state)


def _side_shapes(shape: tuple[int, ...], dims: MatrixDims, max_dim: int) -> tuple[Any, Any]:
    """Returns the stored shapes of the row and column preconditioners; None for a side without one."""
    _, rows, cols = dims.matrix_shape(shape)
    row = (*dims.row_shape(shape), rows) if rows <= max_dim else None
    col = (*dims.col_shape(shape), cols) if cols <= max_dim else None
    return row, col


def scale_by_soap(
    matrix_dims: Any, *, b1: float, b2: float, eps: float, frequency: int, max_dim: int
) -> optax.GradientTransformation:
    """Returns the SOAP direction. `matrix_dims`: a `MatrixDims` per matrix, `optax.MaskedNode()` elsewhere."""

    def side_zeros(params: Any, side: int) -> Any:
        def zeros(p: jax.Array, dims: MatrixDims) -> Any:
            shape = _side_shapes(p.shape, dims, max_dim)[side]
            return optax.MaskedNode() if shape is None else jnp.zeros(shape, jnp.float32)

        return jax.tree.map(zeros, params, matrix_dims)

    def init(params: Any) -> SoapState:
        def zeros() -> Any:
            return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)

        # Four separate trees: the state is donated, so no two leaves may share a buffer.
        sides = [side_zeros(params, side) for side in (0, 1, 0, 1)]
        return SoapState(jnp.zeros((), jnp.int32), zeros(), zeros(), *sides)

    def update(updates: Any, state: SoapState, params: Any = None) -> tuple[Any, SoapState]:
        def one(grad: jax.Array, dims: MatrixDims, *stored: Any) -> Any:
            n, r, c = dims.matrix_shape(grad.shape)
            shapes = _Matrix((n, r, c), (n, r, c), (n, r, r), (n, c, c), (n, r, r), (n, c, c))
            absent = [isinstance(x, optax.MaskedNode) for x in stored]
            pairs = zip(stored, shapes, absent, strict=True)
            matrix = _Matrix(*(None if gone else x.reshape(shape) for x, shape, gone in pairs))
            grad_NRC = grad.astype(jnp.float32).reshape(n, r, c)
            direction, new = _update_matrix(grad_NRC, matrix, state.count, b1=b1, b2=b2, eps=eps, frequency=frequency)
            updated = [x if x_new is None else x_new.reshape(x.shape) for x, x_new in zip(stored, new, strict=True)]
            return direction.reshape(grad.shape), *updated

        results = jax.tree.map(one, updates, matrix_dims, *state[1:])

        def column(i: int) -> Any:
            return jax.tree.map(lambda _, result: result[i], updates, results)

        return column(0), SoapState(state.count + 1, *(column(i) for i in range(1, len(SoapState._fields))))

    return optax.GradientTransformation(init, update)


@dataclass
class SoapConfig(OptimizerConfig):
    """SOAP (Vyas et al. 2024): Adam in Shampoo's eigenbasis for matrices of layers; AdamW for all other parameters."""

    kind: str = "soap"
    learning_rate: float = 3e-3  # peak learning rate, scaled by the schedule
    weight_decay: float = 0.01  # decoupled weight decay of matrices, embeddings and the head
    b1: float = 0.95  # decay of the first moment
    b2: float = 0.95  # decay of the second moment and the preconditioners
    eps: float = 1e-8  # added to the root of the second moment
    precondition_frequency: int = field(default=10, metadata={"min": 1})  # updates between eigenbasis refreshes
    max_precond_dim: int = field(default=10_000, metadata={"min": 1})  # longer sides are not preconditioned

    def scale_gradient(self, param_axes: Tree) -> optax.GradientTransformation:
        soap = scale_by_soap(
            matrices_only(param_axes, matrix_dims),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            frequency=self.precondition_frequency,
            max_dim=self.max_precond_dim,
        )
        return matrices_by(soap, scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps), param_axes)

    def mup_rule(self) -> Rule:
        raise ValueError(
            "model.mup_base_width: no muP rule is implemented for optimizer=soap, whose updates are neither Adam's nor "
            "orthogonal; use optimizer=adamw or muon, or model.mup_base_width=null"
        )
