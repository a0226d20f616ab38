"""The parameters to evaluate, sample and export: averaged ones if the optimizer keeps an average."""

import jax

from trainer.host_offload import on_device
from trainer.optimizers.optimizer import AverageState, Params
from trainer.optimizers.schedule_free import ScheduleFreeState
from trainer.state import TrainState


def _average_of(state: ScheduleFreeState, params: Params) -> Params:
    b1 = state.b1
    return jax.tree.map(lambda y, z: ((y - (1 - b1) * z) / b1).astype(y.dtype), params, state.z)


def eval_params(state: TrainState) -> Params:
    """Returns the parameters for evaluation, export and generation: the average, if the optimizer has one."""
    kinds = (AverageState, ScheduleFreeState)
    for found in jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(found, AverageState):
            return jax.tree.map(lambda a, p: a.astype(p.dtype), on_device(found.average), state.params)
        if isinstance(found, ScheduleFreeState):
            return _average_of(on_device(found), state.params)
    return state.params
