"""A run as a SLURM batch job; a sweep as one array of them. Run folders lie on a disk that all nodes share.

The script asks to be queued again when its processes leave with 75 or are killed; SLURM itself does so when a node is
lost. Exit code and the wish to stop pass through files beside the script, as SLURM forgets jobs after minutes.
"""

import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from configs.launchers import Runtime, SlurmConfig
from launch import exit_codes
from launch.launchers.following import Tail, show_log
from launch.launchers.job import (
    MARK,
    Job,
    Recipe,
    assignments,
    check_output,
    public_name,
    run_command,
    worth_another_start,
)
from launch.launchers.supervisor import left_running, say

SCRIPT = "job.sbatch"
STOP, EXIT_CODE = "stop", "exit_code"  # files in the job's folder
# Handed on beside what `launcher.env` names: where programs, their caches and the user's files are.
EXPORTED = ("PATH", "LD_LIBRARY_PATH", "HOME", "USER", "LANG", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")
OTHERS_SECONDS = 60  # for the other processes, when one has ended; then they are killed
PAUSE = 2.0  # seconds between looks at the queue
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


def recipe(jobs: Sequence[Job]) -> Recipe:
    names = [entry for entry in jobs[0].launcher.env if "=" not in entry]
    submission = ["sbatch", "--parsable", f"--export={','.join([*EXPORTED, *names])}", str(jobs[0].folder / SCRIPT)]
    return Recipe({SCRIPT: script(jobs)}, [submission])


def of(job: Job) -> SlurmConfig:
    assert isinstance(job.launcher, SlurmConfig)
    return job.launcher


def script(jobs: Sequence[Job]) -> str:
    """What sbatch is given. Of an array, each element finds its own job by its index."""
    launcher, array = of(jobs[0]), len(jobs) > 1
    choice = [_chosen(job) for job in jobs]
    if array:
        choice = ["case $SLURM_ARRAY_TASK_ID in", *(f"{i}) {line} ;;" for i, line in enumerate(choice)), "esac"]
    given = {name: value for name, value in jobs[0].environment().items() if name not in (MARK, "PYTHONPATH")}
    variables = [f'{MARK}="${{job##*/}}"', 'PYTHONPATH="$job/code"', *assignments(given)]
    used_up = f"not restarted: launcher.max_restarts={launcher.max_restarts} is used up"
    process = [launcher.python or ("python3" if launcher.image else jobs[0].python), "-P", "-m", "launch.cli"]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options(jobs)),
        "",
        *choice,
        f"export {' '.join(variables)}",
        "restarts=${SLURM_RESTART_COUNT:-0}",
        f'rm -f "$job/{EXIT_CODE}"  # of an earlier start',
        'end() { echo "$1" > "$job/' + EXIT_CODE + '"; exit "$1"; }',
        # Not so when it was cancelled, or SLURM itself has queued it again.
        'running() { scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q JobState=RUNNING; }',
        f'if [ "$restarts" -gt {launcher.max_restarts} ]; then',
        f'  echo "meshwright: {used_up}"',
        f"  end {exit_codes.FAILED}",
        "fi",
        "trap : TERM  # it is for the processes, which save; this script waits for them",
        "",
        " \\\n  ".join([*_srun(jobs[0]), shlex.join(process) + ' "${arguments[@]}"']),
        "code=$?",
        "",
        f'if [ -e "$job/{STOP}" ]; then end $code; fi',
        f"if {worth_another_start('$code')} && running; then",
        f'  if [ "$restarts" -lt {launcher.max_restarts} ]; then',
        f'    echo "meshwright: ended with $code; restart $((restarts + 1)) of {launcher.max_restarts}"',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "    exit $code",
        "  fi",
        f'  echo "meshwright: ended with $code; {used_up}"',
        "fi",
        "end $code",
    ]
    return "\n".join(lines) + "\n"


def options(jobs: Sequence[Job]) -> list[str]:
    """Of sbatch, for the script's head."""
    job, launcher = jobs[0], of(jobs[0])
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


def _chosen(job: Job) -> str:
    return f"job={shlex.quote(str(job.folder))} arguments=({shlex.join([job.task, *job.arguments])})"


def _srun(job: Job) -> list[str]:
    """Up to the interpreter. The environment is this script's own, in an image too."""
    launcher = of(job)
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


def submit(jobs: Sequence[Job], recipe: Recipe) -> int:
    """Raises: ValueError where sbatch refuses."""
    number = check_output(recipe.commands[0]).split(";")[0]  # NUMBER;CLUSTER
    if len(jobs) > 1:
        jobs = [job.noted(id=f"{number}_{i}", log=f"{jobs[0].log}_{i}") for i, job in enumerate(jobs)]
    else:
        jobs = [jobs[0].noted(id=number, log=str(jobs[0].log))]
    for job in jobs:
        print(
            f"run {job.run!r}: job {job.number} is SLURM job {job.handle['id']}, log: {job.handle['log']}", flush=True
        )
    return _follow(jobs) if jobs[0].launcher.follow else 0


def _follow(jobs: Sequence[Job]) -> int:
    """Tells states, and of one job its log, until all are over. Ctrl-C leaves them running."""
    tail = Tail(jobs[0].log) if len(jobs) == 1 else None
    told: dict[str, str] = {}
    try:
        while True:
            states = {job.handle["id"]: state(job) for job in jobs}
            for name, found in states.items():
                if told.get(name) != found:
                    say(f"SLURM job {name}: {found}")
            told = states
            if tail is not None:
                tail.show()
            if all(found.split()[0] in (*OVER, "GONE") for found in states.values()):
                break
            time.sleep(PAUSE)
    except KeyboardInterrupt:
        return left_running(jobs)
    return max(exit_code(job) for job in jobs)


def state(job: Job) -> str:
    """As SLURM tells it, with nodes or the reason for waiting; GONE where it has forgotten the job."""
    found = run_command(["scontrol", "show", "job", "--oneliner", job.handle["id"]])
    if found.returncode:
        if "Invalid job id" in found.stderr:
            return "GONE"
        return f"unknown: {found.stderr.strip()}"
    return described(found.stdout)


def described(shown: str) -> str:
    """`scontrol show job --oneliner` in a few words."""
    fields = dict(re.findall(r"(\w+)=(\S*)", shown))
    word = fields.get("JobState", "unknown")
    restarts = "" if fields.get("Restarts", "0") == "0" else f", restart {fields['Restarts']}"
    if word == "PENDING":
        return f"PENDING ({fields.get('Reason', '')}){restarts}"
    if word == "RUNNING":
        return f"RUNNING on {fields.get('NodeList', '')}{restarts}"
    return word


def exit_code(job: Job) -> int:
    """What the script noted at its end; without it, from the state."""
    file = job.folder / EXIT_CODE
    if file.exists():
        return int(file.read_text())
    return 0 if state(job).startswith("COMPLETED") else exit_codes.FAILED


def status(job: Job) -> str:
    found = state(job)
    if found.split()[0] in (*OVER, "GONE") and (job.folder / EXIT_CODE).exists():
        return f"SLURM job {job.handle['id']}: ended with {exit_code(job)}"
    return f"SLURM job {job.handle['id']}: {found}"


def logs(job: Job, *, follow: bool) -> int:
    return show_log(Path(job.handle["log"]), follow=follow, ended=lambda: state(job).split()[0] in (*OVER, "GONE"))


def stop(job: Job) -> str:
    """One that waits is cancelled; one that runs saves first, and is not queued again."""
    (job.folder / STOP).touch()
    if state(job).startswith("RUNNING"):
        check_output(["scancel", "--signal=TERM", job.handle["id"]])
        return f"told SLURM job {job.handle['id']} to save and end"
    check_output(["scancel", job.handle["id"]])
    return f"cancelled SLURM job {job.handle['id']}"
