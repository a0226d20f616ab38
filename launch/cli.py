"""The command line: `meshwright TASK [hydra overrides]`.

The first bare word is the task; everything after it is plain Hydra. Exit codes: 0 done, 1 failed, 2 the config or an
input is wrong, 75 preempted with a checkpoint written (requeue me), 130 interrupted before there was anything to save.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import exit_codes

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = ("-h", "--help", "help")
# Hydra's own flags. Those with a value are followed by it.
FLAGS = ("--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m", "--shell-completion", "-sc")
FLAGS_WITH_VALUE = (
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
    "--experimental-rerun", "--info", "-i",
)  # fmt: skip
TUNABLES = "GLIBC_TUNABLES"


def main() -> None:
    use_huge_pages()
    from launch.safe_stdio import guarded

    sys.exit(guarded(lambda: run(sys.argv[1:])))


def use_huge_pages() -> None:
    """Begins this program again with memory in pages of 2 MB, which glibc asks for only when it is told at the start.

    Steps on CPUs are up to a quarter faster. One's own GLIBC_TUNABLES stay as they are.
    """
    quick = {*HELP, "--version"} & set(sys.argv[1:]) or len(sys.argv) == 1
    if sys.platform != "linux" or TUNABLES in os.environ or quick:
        return
    os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code."""
    if not arguments or arguments[0] in HELP:
        return _help(arguments[1:2], arguments[2:])
    if arguments == ["--version"]:
        from importlib.metadata import version

        print(f"meshwright {version('meshwright')}")
        return 0
    from launch.help import asks_for_help, topics_of

    completing = any(a.startswith("query=") for a in arguments)
    word, rest = arguments[0], arguments[1:]
    if asks_for_help(rest):
        return _help([word], topics_of(rest))
    if not word.startswith("-") and "=" not in word:
        if not _is_task(word):
            return exit_codes.WRONG_INPUT
        arguments = [f"task={word}", *rest]
        if word == "plan" and not any(a.startswith("source=") for a in rest):
            arguments.append("source=[]")  # it reads no text
    elif not completing and not word.startswith("-"):
        from launch.help import overview

        print(f"meshwright: the first word must be a task, not {word!r}\n\n{overview()}", file=sys.stderr)
        return exit_codes.WRONG_INPUT
    if completing:
        _complete_after_the_task()
    from launch import distributed

    code = exit_codes.FAILED
    try:
        code = _run_hydra(arguments)
    finally:
        if code not in (0, exit_codes.PREEMPTED):  # by whichever way: on leaving, JAX would wait for the others
            distributed.exit_now(code)
    return code


def _help(task: Sequence[str], topics: Sequence[str]) -> int:
    from launch.help import help_on, overview

    if not task:
        print(overview())
    elif not _is_task(task[0]):
        return exit_codes.WRONG_INPUT
    else:
        try:
            print(help_on(task[0], topics))
        except ValueError as error:
            print(f"meshwright: {error}", file=sys.stderr)
            return exit_codes.WRONG_INPUT
    return 0


def _is_task(word: str) -> bool:
    """Whether there is such a task; says so where there is none."""
    from launch.help import TASKS, overview

    if word not in TASKS:
        from launch.config_errors import did_you_mean

        print(f"meshwright: {word!r} is not a task{did_you_mean(word, TASKS)}\n\n{overview()}", file=sys.stderr)
    return word in TASKS


def _complete_after_the_task() -> None:
    # Shells hand over the whole line; Hydra's completion knows overrides only, so the task becomes one.
    from configs.reference import tasks

    line = os.environ.get("COMP_LINE", "")
    for task in tasks():
        old, new = f"meshwright {task} ", f"meshwright task={task} "
        if line.startswith(old):
            os.environ["COMP_LINE"] = new + line[len(old) :]
            point = int(os.environ.get("COMP_POINT", len(line)))
            os.environ["COMP_POINT"] = str(point + len(new) - len(old))


def _run_hydra(arguments: list[str]) -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise to us, we say it better
    from launch.startup_timing import startup

    with startup.phase("import"):  # the classes of configs stand beside the code that they configure
        from hydra.core.hydra_config import HydraConfig
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        from configs.schema import RunConfig, register, to_typed
        from data.object_store import ObjectStoreError
        from launch import config_errors as messages
        from launch import distributed
        from launch import safe_stdio as output
        from launch.launchers.registry import launch, launches
        from launch.overrides import is_override, quoted, routes_of
        from trainer.checkpoint.checkpointer import SaveFailed

    register()
    task_name = messages.task_of([a for a in arguments if is_override(a)])
    route = routes_of(task_name).route
    overrides = [quoted(route(a)) for a in arguments if is_override(a)]
    flags = [a for a in arguments if not is_override(a)]
    failed: list[Exception] = []
    codes: list[int] = []
    jobs: list[tuple[RunConfig, list[str]]] = []

    def task(node: "DictConfig") -> None:
        try:  # Hydra would print the whole command line before an error
            # Overrides of this job: in a sweep (-m) each job has its own.
            config, own = to_typed(node), list(HydraConfig.get().overrides.task)
            if launches(config):
                jobs.append((config, own))  # those of a sweep go out together
            else:
                codes.append(dispatch(config, own))
        except Exception as error:
            failed.append(error)

    program = sys.argv
    try:
        _check_layout()
        if task_name == "sweep":
            from launch.sweeps.space import split_varying_keys

            overrides = split_varying_keys(overrides)
        _check_flags(flags, task_name)
        sys.argv = [program[0], *overrides, *flags]  # Hydra's parser wants it in this order
        _compose(task, overrides, flags)
        if failed:
            raise failed[0]
        if jobs:
            codes.append(launch(jobs))
    except (HydraException, OmegaConfBaseException) as error:
        print(f"meshwright: {messages.explain(error, overrides)}", file=sys.stderr)
        return exit_codes.WRONG_INPUT
    except ValueError as error:
        # What the user gave is wrong, and the message says how; a trace would bury it.
        if os.environ.get("MESHWRIGHT_TRACEBACK"):
            traceback.print_exc()
        said = messages.explain(error, overrides) if str(error).startswith(messages.GROUP_VALUE) else error
        print(f"meshwright: {said}", file=sys.stderr)
        return exit_codes.WRONG_INPUT
    except KeyboardInterrupt:
        print("meshwright: interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except output.OutputClosed:
        return exit_codes.OUTPUT_CLOSED
    except (SaveFailed, ObjectStoreError) as error:
        print(f"meshwright: {error}; the same command goes on from there", file=sys.stderr)
        distributed.exit_now(exit_codes.PREEMPTED)  # one of several: all begin again together
        return exit_codes.FAILED
    except Exception as error:
        distributed.exit_if_peer_lost(error)
        if isinstance(error, OSError) and error.errno in output.FULL:
            print(f"meshwright: {error}; with room to write the same command goes on", file=sys.stderr)
        else:
            traceback.print_exc()
        return exit_codes.FAILED
    finally:
        sys.argv = program
    return max(codes, default=0)


def _compose(task: Callable[["DictConfig"], Any], overrides: list[str], flags: list[str]) -> None:
    """Calls `task` with the composed config.

    `hydra.main` composes a config twice, the first time to find its mode. So it is for its own flags alone, for
    completion in a shell and for `hydra.KEY=`; a plain command composes once.
    """
    import hydra

    if flags or any(o.lstrip("+~").startswith(("hydra.", "hydra/", "query=")) for o in overrides):
        hydra.main(version_base="1.3", config_path="pkg://configs", config_name="root")(task)()
        return
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import flag_override

    with hydra.initialize_config_module("configs", version_base="1.3"):
        node = hydra.compose("root", overrides=overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(node)
        with flag_override(node, ["readonly", "struct"], False):
            del node["hydra"]
        task(node)


def _check_flags(flags: Sequence[str], task: str) -> None:
    """Raises: ValueError for a word that is neither a setting nor a flag of Hydra's, with what to type instead."""
    from launch.config_errors import explain_flag

    words = iter(enumerate(flags))
    for number, word in words:
        name = word.partition("=")[0]
        if name in FLAGS_WITH_VALUE:
            if "=" not in word:
                next(words, None)
        elif name not in FLAGS:
            raise ValueError(explain_flag(word, flags[number + 1] if number + 1 < len(flags) else None, task))


def dispatch(config, overrides: list[str]) -> int:  # type: ignore[no-untyped-def]  # RunConfig, imported late
    """Does the task in this process, together with the others that there are."""
    from importlib import import_module

    from launch import distributed
    from launch.startup_timing import startup

    kind = config.task.kind
    if kind in ("status", "logs", "stop"):  # of a job elsewhere: no devices here
        return getattr(import_module("launch.tasks.jobs"), kind)(config, overrides)
    own_devices = kind not in ("sweep", "scaling_ladder")  # there they are for its runs
    if own_devices:
        with startup.phase("join"):
            distributed.start(config.devices)
    with startup.phase("import"):  # what other tasks need takes longer than a start should
        task = import_module(f"launch.tasks.{kind}")
    code = task.run(config, overrides)
    if own_devices:
        distributed.stop()
    return code


def _check_layout() -> None:
    # The package names are common words: another project's `data` or `models` must not stand in for ours.
    import importlib.util

    here = Path(__file__).resolve().parent.parent
    for name in ("trainer", "models", "data", "configs", "launch"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if found != here:
            raise ValueError(
                f"the package {name!r} is imported from {found}, not from {here}: another installed project shadows "
                f"it; run `python -m launch.cli` from {here}, or use an environment of its own"
            )


if __name__ == "__main__":
    main()
