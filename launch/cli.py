"""The command line: `meshwright TASK [hydra overrides]`.

The first bare word is the task; everything after it is plain Hydra. Exit codes: 0 done, 1 failed, 2 the config or an
input is wrong, 75 preempted with a checkpoint written (requeue me), 130 interrupted before there was anything to save.
"""

import os
import sys
import traceback
from pathlib import Path

from launch import exit_codes

TASKS = {
    "train": "train a model; the same run name again goes on with the run",
    "plan": "memory, speed and cost of a run on devices that need not be there: plan model=llama3_70b target=v5p-512",
    "sweep": "train with other values of some keys: sweep experiment=hello optimizer.learning_rate=log:1e-4..1e-2",
    "coord_check": "whether rates carry over from width to width: how far the first steps move activations",
    "scaling_ladder": "runs of several sizes, the scaling law through them, and the size for a budget: ladder budget=1e18",
    "prepare": "tokenise the sources to shards, so that a long run does not do it twice",
    "evaluate": "loss, perplexity and bits per byte of a run, on its held-out text or on other sources",
    "generate": "write text with a run: generate run=NAME prompt='...', or chat='...'",
    "serve": "answer over HTTP as OpenAI's API does, with a chat page: serve run=NAME",
    "predict": "rewards, classes or vectors of texts: predict run=NAME task.texts=['...']",
    "inspect": "what a checkpoint holds: step, sizes, mesh, hashes, data position",
    "convert": "a published checkpoint to a run, or back: convert from=hf:FOLDER to=RUN, from=RUN to=gguf:FILE",
    "runs": "a table of the runs in a folder",
    "replay": "the updates before a rollback once more, and which rows were to blame: replay run=NAME",
    "status": "how the newest job of a run does: status run=NAME",
    "logs": "what it printed: logs run=NAME, and follow=true to stay",
    "stop": "ends it, with a checkpoint: stop run=NAME",
}

SHORT = {
    "from": "task.input", "to": "task.target",
    "target": "task.target", "compile": "task.compile", "search": "task.search", "tokens": "task.num_tokens",
    "plan.search": "task.search", "plan.compile": "task.compile", "follow": "task.follow", "budget": "task.compute_budget",
}  # fmt: skip

TUNABLES = "GLIBC_TUNABLES"

OVERVIEW = """meshwright TASK [key=value ...]

{tasks}

Three commands to begin with:
  meshwright train experiment=hello                             # a small model of Python source, in two minutes
  meshwright generate run=hello prompt='def '                   # write with it
  meshwright train source=[text] data.sources.text.paths=[DIR]  # learn from your own folder

meshwright TASK --help lists every key and group; --cfg job prints the composed config; -m runs several values.
"""


def main() -> None:
    use_huge_pages()
    sys.exit(run(sys.argv[1:]))


def use_huge_pages() -> None:
    """Begins this program again with memory in pages of 2 MB, which glibc asks for only when it is told at the start.

    Steps on CPUs are up to a quarter faster. One's own GLIBC_TUNABLES stay as they are.
    """
    if sys.platform != "linux" or TUNABLES in os.environ or set(sys.argv[1:2]) <= {"-h", "--help", "help", "--version"}:
        return
    os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code."""
    completing = any(a.startswith("query=") for a in arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments == ["--version"]:
        from importlib.metadata import version

        print(f"meshwright {version('meshwright')}")
        return 0
    word, rest = arguments[0], arguments[1:]
    if not word.startswith("-") and "=" not in word:
        if word not in TASKS:
            from launch.config_errors import did_you_mean

            print(
                f"meshwright: {word!r} is not a task{did_you_mean(word, TASKS)}\n\n{overview()}",
                file=sys.stderr,
            )
            return exit_codes.WRONG_INPUT
        arguments = [f"task={word}", *rest]
        if word == "plan" and not any(a.startswith("source=") for a in rest):
            arguments.append("source=[]")  # it reads no text
        if word == "sweep":
            from launch.sweeps.space import split_varying_keys

            try:
                arguments = split_varying_keys([_renamed(a) for a in arguments])
            except ValueError as error:
                print(f"meshwright: {error}", file=sys.stderr)
                return exit_codes.WRONG_INPUT
    elif not completing and not word.startswith("-"):
        print(f"meshwright: the first word must be a task, not {word!r}\n\n{overview()}", file=sys.stderr)
        return exit_codes.WRONG_INPUT
    if completing:
        _complete_after_the_task()
    from launch import distributed
    from launch.safe_stdio import SafeStream

    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(SafeStream, before)
    code = exit_codes.FAILED
    try:
        code = _run_hydra(arguments)
    finally:
        if code not in (0, exit_codes.PREEMPTED):  # by whichever way: on leaving, JAX would wait for the others
            distributed.exit_now(code)
        sys.stdout, sys.stderr = before
    return code


def overview() -> str:
    width = max(map(len, TASKS))
    return OVERVIEW.format(tasks="\n".join(f"  {name:<{width}}  {text}" for name, text in TASKS.items()))


def _complete_after_the_task() -> None:
    # Shells hand over the whole line; Hydra's completion knows overrides only, so the task becomes one.
    line = os.environ.get("COMP_LINE", "")
    for task in TASKS:
        old, new = f"meshwright {task} ", f"meshwright task={task} "
        if line.startswith(old):
            os.environ["COMP_LINE"] = new + line[len(old) :]
            point = int(os.environ.get("COMP_POINT", len(line)))
            os.environ["COMP_POINT"] = str(point + len(new) - len(old))


def _run_hydra(arguments: list[str]) -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise to us, we say it better
    from launch.startup_timing import startup

    with startup.phase("import"):  # the classes of configs stand beside the code that they configure
        import hydra
        from hydra.core.hydra_config import HydraConfig
        from hydra.errors import HydraException
        from omegaconf import DictConfig
        from omegaconf.errors import OmegaConfBaseException

        from configs.schema import RunConfig, register, to_typed
        from data.object_store import ObjectStoreError
        from launch import config_errors as messages
        from launch import distributed
        from launch import safe_stdio as output
        from launch.launchers.registry import launch, launches
        from trainer.checkpoint.checkpointer import SaveFailed

    register()
    is_override = lambda a: ("=" in a and not a.startswith("-")) or a.startswith("~")
    overrides = [quoted(_renamed(a)) for a in arguments if is_override(a)]
    flags = [a for a in arguments if not is_override(a)]
    failed: list[Exception] = []
    codes: list[int] = []
    jobs: list[tuple[RunConfig, list[str]]] = []

    def task(node: DictConfig) -> None:
        try:  # Hydra would print the whole command line before an error
            # Overrides of this job: in a sweep (-m) each job has its own.
            config, own = to_typed(node), list(HydraConfig.get().overrides.task)
            if launches(config):
                jobs.append((config, own))  # those of a sweep go out together
            else:
                codes.append(dispatch(config, own))
        except Exception as error:
            failed.append(error)

    wrapped = hydra.main(version_base="1.3", config_path="pkg://configs", config_name="root")(task)
    program = sys.argv
    sys.argv = [program[0], *overrides, *flags]  # Hydra's parser wants it in this order
    try:
        _check_layout()
        wrapped()
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


def _renamed(override: str) -> str:
    """Short names: `from=` is a word that no Python field can have, and a plan's are those that are typed most."""
    key, equals, value = override.partition("=")
    if key.startswith("sweep."):
        return f"task.{override}"
    return SHORT.get(key, key) + equals + value


def quoted(override: str) -> str:
    """A prompt or what is said in a chat as it is: Hydra's grammar would strip its spaces and read its brackets.

    And [NAME=VALUE] of environment variables, which that grammar takes in quotes alone.
    """
    key, _, value = override.partition("=")
    if key == "launcher.env" and value[:1] == "[" and value[-1:] == "]" and not set(value) & set("'\""):
        entries = (entry.strip().replace("${", "\\${") for entry in value[1:-1].split(","))
        return f"{key}=[" + ",".join(f'"{entry}"' for entry in entries if entry) + "]"
    free_text = key in ("prompt", "chat", "task.system")
    if not free_text or value == "null" or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        return override
    value = value.replace("${", "\\${")
    return f"{key}='{value}'" if "'" not in value else f'{key}="' + value.replace('"', '\\"') + '"'


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
