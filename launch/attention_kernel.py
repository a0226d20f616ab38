"""Checks the platform's attention kernel against reference attention before training."""

from dataclasses import replace

import jax

from configs.schema import RunConfig
from data.tokenizers.tokenizer import Tokenizer
from launch.build import Core, build_core
from launch.multihost import all_gather_values, log
from models.attention import kernels
from models.config import AttentionImplementation


def build_checked_core(config: RunConfig, tokenizer: Tokenizer | None) -> Core:
    """Builds the core with the XLA attention if the platform's kernel fails. Raises: see `verify_attention_kernel`."""
    core = build_core(config, tokenizer)
    if verify_attention_kernel(config, core) is core.model.attention.implementation:
        return core
    return build_core(replace(config, model=kernels.without_kernel(config.model)), tokenizer)


def verify_attention_kernel(config: RunConfig, core: Core) -> AttentionImplementation:
    """Returns the attention implementation to train with: the configured one, or `xla` if `auto` picks a faulty kernel.

    The kernel must compile for this run's sequence length and match reference attention on packed documents.
    Raises: ValueError if an explicitly configured kernel fails.
    """
    requested, length, constrain = core.model.attention.implementation, config.data.seq_len, core.constrain
    kernel, reason = kernels.decide(core.model, length, constrain.platform, rows_cut=constrain.num_shards("length") > 1)
    if reason is not None:
        log(f"attention: xla; the platform's kernel does not support {reason}")
    if kernel is AttentionImplementation.xla or constrain.platform == "cpu":
        return requested
    fault = _fault(kernel, core, length)
    # All processes must use the same implementation.
    if not any(failed for [failed] in all_gather_values([float(fault is not None)])):
        return requested
    fault = fault or f"{kernel.name} fails on another process"
    device = jax.devices()[0].device_kind
    if requested is not AttentionImplementation.auto:
        raise ValueError(
            f"model.attention.implementation={requested.name}: on {device}, {fault}; "
            "set model.attention.implementation=auto or xla"
        )
    log(f"attention: xla; on {device}, {fault}")
    return AttentionImplementation.xla


def _fault(kernel: AttentionImplementation, core: Core, length: int) -> str | None:
    """Describes why the kernel fails on the devices of this process; None if it works."""
    try:
        kernels.compile_rows(kernel, core.model, length)
        error = kernels.max_error_vs_reference(kernel, core.model)
    except Exception as failure:  # any type: from the kernel, the compiler or the device
        first_line = (str(failure).splitlines() or [""])[0][:200]
        return f"{kernel.name} does not compile: {type(failure).__name__}: {first_line}"
    if not error < kernels.TOLERANCE:
        return f"{kernel.name} differs by {error:.1%} from reference attention on packed documents"
    log(f"attention: {kernel.name}, within {error:.1%} of reference attention on packed documents")
    return None
