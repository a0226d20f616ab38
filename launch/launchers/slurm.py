"""SLURM launcher: a run is a batch job, a sweep a job array. Run folders must be on a shared file system.

The batch script requeues itself when its processes exit with 75 or are killed; SLURM requeues it when a node is lost.
Exit code and stop requests are files next to the script, because SLURM purges job records within minutes.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from configs.launchers import Runtime, SlurmConfig
from launch import exit_codes
from launch.launchers.job import (
    MARK,
    Job,
    Recipe,
    assignments,
    check_output,
    public_name,
    restart_condition,
    run_command,
)
from launch.launchers.launcher import ClusterLauncher, LogTail, show_log

SCRIPT = "job.sbatch"
STOP, EXIT_CODE = "stop", "exit_code"  # files in the job folder
# Exported to the job in addition to `launcher.env`: locations of programs, caches and user files.
EXPORTED = ("PATH", "LD_LIBRARY_PATH", "HOME", "USER", "LANG", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")
OTHERS_SECONDS = 60  # seconds after the first process ends before srun kills the others


def script(jobs: Sequence[Job[SlurmConfig]]) -> str:
    """Returns the batch script. In an array, each element selects its job by the array index."""
    launcher, array = jobs[0].launcher, len(jobs) > 1
    selection = [_job_variables(job) for job in jobs]
    if array:
        selection = ["case $SLURM_ARRAY_TASK_ID in", *(f"{i}) {line} ;;" for i, line in enumerate(selection)), "esac"]
    given = {name: value for name, value in jobs[0].environment().items() if name not in (MARK, "PYTHONPATH")}
    variables = [f'{MARK}="${{job##*/}}"', 'PYTHONPATH="$job/code"', *assignments(given)]
    limit_reached = f"not restarted: launcher.max_restarts={launcher.max_restarts} reached"
    process = [launcher.python or ("python3" if launcher.image else jobs[0].python), "-P", "-m", "launch.cli"]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options(jobs)),
        "",
        *selection,
        f"export {' '.join(variables)}",
        "restarts=${SLURM_RESTART_COUNT:-0}",
        f'rm -f "$job/{EXIT_CODE}"  # from an earlier attempt',
        'end() { echo "$1" > "$job/' + EXIT_CODE + '"; exit "$1"; }',
        # False if the job was cancelled or SLURM has already requeued it.
        'running() { scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q JobState=RUNNING; }',
        f'if [ "$restarts" -gt {launcher.max_restarts} ]; then',
        f'  echo "meshwright: {limit_reached}"',
        f"  end {exit_codes.FAILED}",
        "fi",
        "trap : TERM  # handled by the processes, which save a checkpoint; this script waits for them",
        "",
        " \\\n  ".join([*_srun(jobs[0]), shlex.join(process) + ' "${arguments[@]}"']),
        "code=$?",
        "",
        f'if [ -e "$job/{STOP}" ]; then end $code; fi',
        f"if {restart_condition('$code')} && running; then",
        f'  if [ "$restarts" -lt {launcher.max_restarts} ]; then',
        f'    echo "meshwright: ended with $code; restart $((restarts + 1)) of {launcher.max_restarts}"',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "    exit $code",
        "  fi",
        f'  echo "meshwright: ended with $code; {limit_reached}"',
        "fi",
        "end $code",
    ]
    return "\n".join(lines) + "\n"


def options(jobs: Sequence[Job[SlurmConfig]]) -> list[str]:
    """Returns the #SBATCH options of the script."""
    job, launcher = jobs[0], jobs[0].launcher
    given = {
        "job-name": f"meshwright-{public_name(job.run, job.number)}",
        "nodes": launcher.nodes,
        "ntasks-per-node": launcher.processes_per_node,
        "gpus-per-node": launcher.gpus_per_node or None,
        "cpus-per-task": launcher.cpus_per_process or None,
        "time": launcher.time,
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "signal": f"TERM@{launcher.grace}",
        "open-mode": "append",
        "output": str(job.log),
        "chdir": job.workdir,
    }
    if len(jobs) > 1:
        limit = f"%{launcher.array_limit}" if launcher.array_limit else ""
        given |= {"array": f"0-{len(jobs) - 1}{limit}", "output": f"{job.log}_%a"}
    return [
        "--requeue",
        *(f"--{key}={shlex.quote(str(value))}" for key, value in given.items() if value is not None),
        *launcher.options,
    ]


def _job_variables(job: Job[SlurmConfig]) -> str:
    return f"job={shlex.quote(str(job.folder))} arguments=({shlex.join([job.task, *job.arguments])})"


def _srun(job: Job[SlurmConfig]) -> list[str]:
    """Returns the srun command up to the interpreter. The environment is that of the script, also in containers."""
    launcher = job.launcher
    words = [f"srun --export=ALL --kill-on-bad-exit=0 --wait={OTHERS_SECONDS} --label"]
    if launcher.image is None:
        return words
    mounts = [f"{folder}:{folder}" for folder in dict.fromkeys([job.workdir, str(job.folder.parents[2])])]
    mounts += launcher.mounts
    if launcher.runtime is Runtime.pyxis:
        names = [*job.environment(), *(entry for entry in launcher.env if "=" not in entry)]
        return [
            *words,
            shlex.join([f"--container-image={launcher.image}", f"--container-mounts={','.join(mounts)}"]),
            shlex.join([f"--container-workdir={job.workdir}", f"--container-env={','.join(names)}"]),
        ]
    gpus = ["--nv"] if launcher.gpus_per_node else []
    binds = ["--bind", ",".join(mounts), "--pwd", job.workdir, launcher.image]
    return [*words, shlex.join(["apptainer", "exec", *gpus, *binds])]


def state_text(output: str) -> str:
    """Returns the job state from the output of `scontrol show job --oneliner` as short text."""
    fields = dict(re.findall(r"(\w+)=(\S*)", output))
    state = fields.get("JobState", "unknown")
    restarts = "" if fields.get("Restarts", "0") == "0" else f", restart {fields['Restarts']}"
    if state == "PENDING":
        return f"PENDING ({fields.get('Reason', '')}){restarts}"
    if state == "RUNNING":
        return f"RUNNING on {fields.get('NodeList', '')}{restarts}"
    return state


class SlurmLauncher(ClusterLauncher[SlurmConfig]):
    """Submits one batch job, or a job array for a sweep."""

    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "GONE")
    pause = 2.0

    def recipe(self, jobs: Sequence[Job[SlurmConfig]]) -> Recipe:
        names = [entry for entry in jobs[0].launcher.env if "=" not in entry]
        exported = f"--export={','.join([*EXPORTED, *names])}"
        return Recipe({SCRIPT: script(jobs)}, [["sbatch", "--parsable", exported, str(jobs[0].folder / SCRIPT)]])

    def start(self, jobs: Sequence[Job[SlurmConfig]], recipe: Recipe) -> Iterator[tuple[Job[SlurmConfig], str]]:
        """Raises ValueError if sbatch fails."""
        number = check_output(recipe.commands[0]).split(";")[0]  # NUMBER;CLUSTER
        suffixes = [f"_{i}" for i in range(len(jobs))] if len(jobs) > 1 else [""]
        submitted = [
            job.update_handle(id=number + suffix, log=f"{jobs[0].log}{suffix}")
            for job, suffix in zip(jobs, suffixes, strict=True)
        ]
        for job in submitted:
            yield job, f"is {self.label(job)}, log: {job.handle['log']}"

    def log_view(self, jobs: Sequence[Job[SlurmConfig]]) -> Callable[[str], None]:
        """Tails the log of a single job; prints nothing for several jobs."""
        tail = LogTail(jobs[0].log) if len(jobs) == 1 else None
        return lambda state: None if tail is None else tail.show()

    def label(self, job: Job[SlurmConfig]) -> str:
        return f"SLURM job {job.handle['id']}"

    def state(self, job: Job[SlurmConfig]) -> str:
        """Returns the state with node list or pending reason; GONE if SLURM no longer knows the job."""
        found = run_command(["scontrol", "show", "job", "--oneliner", job.handle["id"]])
        if found.returncode:
            return "GONE" if "Invalid job id" in found.stderr else f"unknown: {found.stderr.strip()}"
        return state_text(found.stdout)

    def exit_code(self, job: Job[SlurmConfig], state: str) -> int:
        """Returns the exit code written by the batch script, or else the one implied by the state."""
        file = job.folder / EXIT_CODE
        return int(file.read_text()) if file.exists() else super().exit_code(job, state)

    def status(self, job: Job[SlurmConfig]) -> str:
        state = self.state(job)
        if self.is_over(state) and (job.folder / EXIT_CODE).exists():
            return f"{self.label(job)}: ended with {self.exit_code(job, state)}"
        return f"{self.label(job)}: {state}"

    def logs(self, job: Job[SlurmConfig], *, follow: bool) -> int:
        return show_log(Path(job.handle["log"]), follow=follow, ended=lambda: self.is_over(self.state(job)))

    def stop(self, job: Job[SlurmConfig]) -> str:
        """Cancels a pending job; a running one saves a checkpoint first and is not requeued."""
        (job.folder / STOP).touch()
        if self.state(job).startswith("RUNNING"):
            check_output(["scancel", "--signal=TERM", job.handle["id"]])
            return f"asked {self.label(job)} to save a checkpoint and exit"
        check_output(["scancel", job.handle["id"]])
        return f"cancelled {self.label(job)}"
