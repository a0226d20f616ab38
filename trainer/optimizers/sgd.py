"""SGD with momentum."""

from dataclasses import dataclass

import optax

from trainer.optimizers.mup_rates import Rule, like_sgd
from trainer.optimizers.optimizer import OptimizerConfig, Tree


@dataclass
class SgdConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    kind: str = "sgd"
    learning_rate: float = 0.1  # peak learning rate, scaled by the schedule
    weight_decay: float = 0.0  # decoupled weight decay of matrices, embeddings and the head
    momentum: float = 0.9  # decay of the momentum; 0: no momentum
    nesterov: bool = False  # use Nesterov momentum

    def scale_gradient(self, param_axes: Tree) -> optax.GradientTransformation:
        if self.momentum == 0:
            return optax.identity()
        return optax.trace(decay=self.momentum, nesterov=self.nesterov)

    def mup_rule(self) -> Rule:
        return like_sgd
