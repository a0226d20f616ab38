"""From a `RunConfig` to the parts of a run: the only place that knows all of them.

`build_core` needs no data and no weights, so that a plan or a test can build any run from shapes alone.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from configs.schema import RunConfig, TrainConfig
from data.batch import TokenBatch
from data.pipeline import OfflineSource, heldout_batches, mixture
from data.prepare import Manifest, TokenCorpus, open_prepared, prepare_source
from data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer, save_tokenizer
from launch.run_folder import RunFolder
from models.config import ModelConfig
from models.cost import flops_per_token
from models.transformer import Apply, abstract_params, init_params, make_apply, param_axes
from trainer.evaluate import evaluate_sources
from trainer.mesh import (
    batch_sharding,
    check_batch,
    make_constrain,
    make_mesh,
    param_shardings,
    place_batch,
    process_rows,
)
from trainer.objective import Objective, Params
from trainer.optimizer import eval_params
from trainer.state import TrainState, abstract_state, init_sharded_state
from trainer.step import make_eval_step, make_train_step

Say = Callable[[str], None]
