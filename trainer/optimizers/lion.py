"""Lion."""

from dataclasses import dataclass

import optax

from trainer.optimizers.optimizer import OptimizerConfig, Tree


@dataclass
class LionConfig(OptimizerConfig):
    """Lion (Chen et al. 2023). Use a tenth of AdamW's learning rate and ten times its weight decay."""

    kind: str = "lion"
    learning_rate: float = 1e-4  # peak learning rate, scaled by the schedule
    weight_decay: float = 1.0  # decoupled weight decay of matrices, embeddings and the head
    b1: float = 0.9  # weight of the momentum in the update
    b2: float = 0.99  # decay of the momentum

    def scale_gradient(self, param_axes: Tree) -> optax.GradientTransformation:
        return optax.scale_by_lion(b1=self.b1, b2=self.b2)
