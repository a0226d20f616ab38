"""Muon for matrices, AdamW for the other parameters."""

from dataclasses import dataclass
from functools import partial

import optax

from trainer.optimizers.adamw import scale_by_adam
from trainer.optimizers.mup_rates import Rule, like_muon
from trainer.optimizers.optimizer import OptimizerConfig, Tree, matrices_by, matrices_only, scale_by_shape
from trainer.optimizers.param_groups import matrix_dims


@dataclass
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024): orthogonalized momentum for matrices of layers; AdamW for all other parameters."""

    kind: str = "muon"
    momentum: float = 0.95  # momentum decay of matrices
    ns_steps: int = 5  # Newton-Schulz iterations
    consistent_rms: float | None = 0.2  # RMS of updates, matching AdamW (Liu et al. 2025); null: as Jordan et al.
    b1: float = 0.9  # first moment decay of AdamW
    b2: float = 0.95  # second moment decay of AdamW
    eps: float = 1e-8  # epsilon of both Muon and AdamW

    def scale_gradient(self, param_axes: Tree) -> optax.GradientTransformation:
        dims = matrices_only(param_axes, _muon_dims)
        muon = optax.chain(
            optax.contrib.scale_by_muon(
                ns_steps=self.ns_steps, beta=self.momentum, eps=self.eps, weight_dimension_numbers=dims
            ),
            scale_by_shape(matrices_only(param_axes, matrix_dims), self.consistent_rms),
        )
        return matrices_by(muon, scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps), param_axes)

    def mup_rule(self) -> Rule:
        return partial(like_muon, consistent=self.consistent_rms is not None)


def _muon_dims(axes: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers:
    dims = matrix_dims(axes)
    return optax.contrib.MuonDimensionNumbers(dims.row_axes(), dims.col_axes(len(axes)))
