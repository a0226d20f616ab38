"""Compares the platform's attention kernel with plain attention before a run trains with it."""

from dataclasses import replace

import jax

from configs.schema import RunConfig
from data.tokenizers.tokenizer import Tokenizer
from launch.build import Core, all_gather_values, build_core, log
from models.attention import kernels
from models.config import AttentionImplementation


def build_checked_core(config: RunConfig, tokenizer: Tokenizer | None) -> Core:
    """`build_core`, with plain attention where the platform's kernel fails here. Raises: as `verify_attention_kernel`."""
    core = build_core(config, tokenizer)
    if verify_attention_kernel(config, core) is core.model.attention.implementation:
        return core
    return build_core(replace(config, model=kernels.without_kernel(config.model)), tokenizer)


def verify_attention_kernel(config: RunConfig, core: Core) -> AttentionImplementation:
    """The value of `model.attention.implementation` to train with: the config's, or `xla` where `auto` finds a faulty kernel.

    The kernel must compile for rows of this run, and agree with plain attention on packed documents.
    Raises: ValueError where an explicit kernel does not.
    """
    asked, length, constrain = core.model.attention.implementation, config.data.seq_len, core.constrain
    kernel, reason = kernels.decide(core.model, length, constrain.platform, rows_cut=constrain.num_shards("length") > 1)
    if reason is not None:
        log(f"attention: xla; the platform's kernel cannot do {reason}")
    if kernel is AttentionImplementation.xla or constrain.platform == "cpu":
        return asked
    fault = _fault(kernel, core, length)
    if not any(
        failed for [failed] in all_gather_values([float(fault is not None)])
    ):  # all processes must take the same
        return asked
    fault = fault or f"{kernel.name} fails on another process"
    device = jax.devices()[0].device_kind
    if asked is not AttentionImplementation.auto:
        raise ValueError(
            f"model.attention.implementation={asked.name}: on {device}, {fault}; set model.attention.implementation=auto, or xla"
        )
    log(f"attention: xla; on {device}, {fault}")
    return AttentionImplementation.xla


def _fault(kernel: AttentionImplementation, core: Core, length: int) -> str | None:
    """What is wrong with the kernel on the devices of this process; None: nothing."""
    try:
        kernels.compile_rows(kernel, core.model, length)
        off = kernels.max_error_vs_reference(kernel, core.model)
    except Exception as error:  # of any kind: it comes from the kernel, the compiler or the device
        first_line = (str(error).splitlines() or [""])[0][:200]
        return f"{kernel.name} does not compile: {type(error).__name__}: {first_line}"
    if not off < kernels.TOLERANCE:
        return f"{kernel.name} differs by {off:.1%} from plain attention on packed documents"
    log(f"attention: {kernel.name}, within {off:.1%} of plain attention on packed documents")
    return None
