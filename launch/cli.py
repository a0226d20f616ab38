"""The command line: `meshwright TASK [hydra overrides]`.

The first word is the task; the rest are Hydra overrides. Exit codes: 0 success, 1 failure, 2 invalid
config or input, 75 preempted after saving a checkpoint (requeue), 130 interrupted before anything was saved.
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
# Hydra's own flags, without and with a value.
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
    """Re-executes the program with 2 MB huge pages, which glibc enables only through its environment at start-up.

    Makes CPU training steps up to 25 % faster. Does nothing if GLIBC_TUNABLES is already set.
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
            arguments.append("source=[]")  # planning reads no data
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
        if code not in (0, exit_codes.PREEMPTED):  # a regular exit would wait in JAX for the other processes
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
    """Returns whether the task exists, and prints an error if it does not."""
    from launch.help import TASKS, overview

    if word not in TASKS:
        from launch.config_errors import did_you_mean

        print(f"meshwright: {word!r} is not a task{did_you_mean(word, TASKS)}\n\n{overview()}", file=sys.stderr)
    return word in TASKS


def _complete_after_the_task() -> None:
    # Shells pass the complete line; Hydra's completion supports overrides only, so the task becomes one.
    from configs.reference import tasks

    line = os.environ.get("COMP_LINE", "")
    for task in tasks():
        old, new = f"meshwright {task} ", f"meshwright task={task} "
        if line.startswith(old):
            os.environ["COMP_LINE"] = new + line[len(old) :]
            point = int(os.environ.get("COMP_POINT", len(line)))
            os.environ["COMP_POINT"] = str(point + len(new) - len(old))


def _run_hydra(arguments: list[str]) -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors propagate: they are reported below
    from launch.startup_timing import startup

    with startup.phase("import"):  # config classes are defined next to the code that they configure
        from hydra.core.hydra_config import HydraConfig
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        from configs.schema import RunConfig, register, to_typed
        from data.object_store import ObjectStoreError
        from launch import config_errors, distributed, safe_stdio
        from launch.launchers.launcher_registry import launch, launches
        from launch.overrides import is_override, quoted, routes_of
        from trainer.checkpoint.checkpointer import SaveFailed

    register()
    task_name = config_errors.task_of([a for a in arguments if is_override(a)])
    route = routes_of(task_name).route
    overrides = [quoted(route(a)) for a in arguments if is_override(a)]
    flags = [a for a in arguments if not is_override(a)]
    failed: list[Exception] = []
    codes: list[int] = []
    jobs: list[tuple[RunConfig, list[str]]] = []

    def task(node: "DictConfig") -> None:
        try:  # Hydra would print the complete command line before an error
            # Overrides of this job: in a sweep (-m) each job has its own.
            config, own = to_typed(node), list(HydraConfig.get().overrides.task)
            if launches(config):
                jobs.append((config, own))  # jobs of a multirun are submitted together
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
        sys.argv = [program[0], *overrides, *flags]  # the order that Hydra's parser requires
        _compose(task, overrides, flags)
        if failed:
            raise failed[0]
        if jobs:
            codes.append(launch(jobs))
    except (HydraException, OmegaConfBaseException) as error:
        print(f"meshwright: {config_errors.explain(error, overrides)}", file=sys.stderr)
        return exit_codes.WRONG_INPUT
    except ValueError as error:
        # Invalid input: the message explains it, and a traceback would bury it.
        if os.environ.get("MESHWRIGHT_TRACEBACK"):
            traceback.print_exc()
        message = config_errors.explain(error, overrides) if str(error).startswith(config_errors.GROUP_VALUE) else error
        print(f"meshwright: {message}", file=sys.stderr)
        return exit_codes.WRONG_INPUT
    except KeyboardInterrupt:
        print("meshwright: interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except safe_stdio.OutputClosed:
        return exit_codes.OUTPUT_CLOSED
    except (SaveFailed, ObjectStoreError) as error:
        print(f"meshwright: {error}; run the same command to resume", file=sys.stderr)
        distributed.exit_now(exit_codes.PREEMPTED)  # with several processes, all restart together
        return exit_codes.FAILED
    except Exception as error:
        distributed.exit_if_peer_lost(error)
        if isinstance(error, OSError) and error.errno in safe_stdio.FULL:
            print(f"meshwright: {error}; free disk space and run the same command to resume", file=sys.stderr)
        else:
            traceback.print_exc()
        return exit_codes.FAILED
    finally:
        sys.argv = program
    return max(codes, default=0)


def _compose(task: Callable[["DictConfig"], Any], overrides: list[str], flags: list[str]) -> None:
    """Calls `task` with the composed config.

    `hydra.main` composes the config twice, first to determine its mode. It is used only for Hydra's own flags, shell
    completion and `hydra.KEY=`; a plain command composes once.
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
    """Raises: ValueError for a word that is neither an override nor a Hydra flag, with the correct spelling."""
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
    """Runs the task in this process, after joining the other processes of the job."""
    from importlib import import_module

    from launch import distributed
    from launch.startup_timing import startup

    kind = config.task.kind
    if kind in ("status", "logs", "stop"):  # query a remote job: no devices are needed
        return getattr(import_module("launch.tasks.jobs"), kind)(config, overrides)
    own_devices = kind not in ("sweep", "scaling_ladder")  # these leave the devices to the runs they start
    if own_devices:
        with startup.phase("join"):
            distributed.start(config.fake_devices)
    with startup.phase("import"):  # importing only this task's modules keeps start-up short
        task = import_module(f"launch.tasks.{kind}")
    code = task.run(config, overrides)
    if own_devices:
        distributed.stop()
    return code


def _check_layout() -> None:
    # The package names are common words: another project's `data` or `models` must not shadow ours.
    import importlib.util

    root = Path(__file__).resolve().parent.parent
    for name in ("trainer", "models", "data", "configs", "launch"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if found != root:
            raise ValueError(
                f"the package {name!r} is imported from {found}, not from {root}: another installed project shadows "
                f"it; run `python -m launch.cli` from {root}, or use a separate environment"
            )


if __name__ == "__main__":
    main()
