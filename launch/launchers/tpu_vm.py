"""Cloud TPU launcher: requests a slice as a queued resource and starts its workers over ssh, with gcloud.

A script on every worker starts and restarts its process, so this machine may be switched off. The script reads secrets
from its standard input. Replacing a preempted spot slice works only while this machine follows the job. Run folders are
on the workers' local disks unless `output_dir=` names shared storage.
"""

import json
import os
import shlex
import time
from collections.abc import Sequence

from configs.launchers import TpuVmConfig
from launch import exit_codes
from launch.launchers.job import (
    PACKED,
    Job,
    Recipe,
    assignments,
    check_output,
    public_name,
    restart_loop,
    run_command,
    secrets,
)
from launch.launchers.launcher import Launcher, left_running, say
from launch.launchers.supervisor import AttemptResult, supervise

SCRIPT = "worker.sh"
HOME = "meshwright"  # working directory of the processes, in the worker's home directory
READY, OVER = "ACTIVE", ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")
WORKER = "WORKER"  # placeholder for the worker index in a recipe
PAUSE = 20.0  # polling interval in seconds


def tpu(job: Job[TpuVmConfig]) -> str:
    """Returns the name of the slice, which all jobs of a run share."""
    return job.launcher.name or public_name(job.run)


def place(job: Job[TpuVmConfig]) -> str:
    return f"jobs/{public_name(job.run, job.number)}"  # relative to HOME


def commands(job: Job[TpuVmConfig]) -> list[list[str]]:
    unpacked = f"tar -xzf {PACKED} -C code && cd code && {job.launcher.setup}"
    return [
        create(job),
        queued(job, "describe", "--format=value(state.state)"),
        ssh(job, "all", f"mkdir -p {HOME}/{place(job)}/code"),
        scp(job),
        ssh(job, "all", f"cd {HOME}/{place(job)} && {unpacked}"),
        ssh(job, WORKER, f"bash {HOME}/{place(job)}/{SCRIPT}"),
    ]


def create(job: Job[TpuVmConfig]) -> list[str]:
    launcher = job.launcher
    kind = [f"--accelerator-type={launcher.accelerator}", f"--runtime-version={launcher.runtime}"]
    capacity = ["--spot"] * launcher.spot + ["--reserved"] * launcher.reserved
    return queued(job, "create", f"--node-id={tpu(job)}", *kind, *capacity)


def queued(job: Job[TpuVmConfig], verb: str, *flags: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, tpu(job), *_where(job), *flags]


def ssh(job: Job[TpuVmConfig], worker: str, command: str) -> list[str]:
    return _vm(job, "ssh", tpu(job), f"--worker={worker}", f"--command={command}")


def scp(job: Job[TpuVmConfig]) -> list[str]:
    files = [str(job.folder / PACKED), str(job.folder / SCRIPT)]
    return _vm(job, "scp", *files, f"{tpu(job)}:{HOME}/{place(job)}/", "--worker=all")


def _vm(job: Job[TpuVmConfig], verb: str, *words: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", verb, *words, *_where(job)]


def _where(job: Job[TpuVmConfig]) -> list[str]:
    project = job.launcher.project
    return [f"--zone={job.launcher.zone}", *([f"--project={project}"] if project else []), "--quiet"]


def script(job: Job[TpuVmConfig]) -> str:
    """Returns the script that runs on each worker. It reads null-terminated NAME=VALUE secrets from standard input."""
    launcher = job.launcher
    given = {name: value for name, value in job.environment().items() if name != "PYTHONPATH"}
    return "\n".join(
        [
            "#!/bin/bash",
            f'cd ~/{HOME} && job="$PWD/{place(job)}"',
            'rm -f "$job/exit_code" "$job/stop"',
            "while IFS= read -r -d '' secret; do export \"$secret\"; done",
            f'export PYTHONPATH="$job/code" {" ".join(assignments(given))}',
            "work() {",
            *(f"  {line}" for line in restart_loop(shlex.join(job.command(launcher.python)), launcher.max_restarts)),
            '  echo $code > "$job/exit_code"',
            "}",
            "trap '' HUP  # keep running after the ssh connection closes",
            'work > "$job/log" 2>&1 < /dev/null &',
            'echo $! > "$job/supervisor"',
            "",
        ]
    )


def attempt(job: Job[TpuVmConfig]) -> AttemptResult:
    """Starts the workers and follows the log of worker 0 until the job or the slice ends."""
    start(job)
    while True:
        show_log(job, follow=True)
        found = state(job)
        if found != READY:
            return AttemptResult(exit_codes.PREEMPTED, f"TPU {tpu(job)} was preempted: {found or 'not found'}")
        code = check_output(ssh(job, "0", f"cat {HOME}/{place(job)}/exit_code 2> /dev/null || true"))
        if code:  # the worker script has already restarted its process where that could help
            return AttemptResult(int(code), f"worker 0 ended with {code}", asked=True)
        time.sleep(PAUSE)  # the ssh connection was lost


def start(job: Job[TpuVmConfig]) -> None:
    """Requests the slice unless it exists, waits until it is ready, and starts every worker."""
    values = "".join(f"{name}={value}\0" for name, value in secrets(job.launcher, os.environ).items())
    make, _, folder, copy, unpack, work = commands(job)
    found = state(job)
    if found in OVER:
        check_output(queued(job, "delete", "--force"))
        found = ""
    if not found:
        check_output(make)
    wait_for_slice(job)
    for command in (folder, copy, unpack):
        check_output(command)
    for worker in range(num_workers(job)):
        check_output([word.replace(f"--worker={WORKER}", f"--worker={worker}") for word in work], values)


def wait_for_slice(job: Job[TpuVmConfig]) -> None:
    """Raises ValueError if the queued resource fails or is deleted."""
    previous = ""
    while (found := state(job)) != READY:
        if found in OVER:
            raise ValueError(
                f"launcher=tpu_vm: the queued resource {tpu(job)} is {found}; submit again, or choose another "
                "launcher.zone or launcher.accelerator"
            )
        if found != previous:
            say(f"TPU {tpu(job)}: {found}")
            previous = found
        time.sleep(PAUSE)


def state(job: Job[TpuVmConfig]) -> str:
    """Returns the state of the queued resource; empty if there is none."""
    try:
        return check_output(queued(job, "describe", "--format=value(state.state)"))
    except ValueError as error:
        if "NOT_FOUND" in str(error):
            return ""
        raise


def num_workers(job: Job[TpuVmConfig]) -> int:
    return len(json.loads(check_output(_vm(job, "describe", tpu(job), "--format=json")))["networkEndpoints"])


def show_log(job: Job[TpuVmConfig], *, follow: bool) -> int:
    """Prints the log of worker 0."""
    show = "tail -n +1 -F log --pid=$(cat supervisor)" if follow else "cat log"
    return run_command(ssh(job, "0", f"cd {HOME}/{place(job)} && {show}"), shown=True).returncode


def stop_requested(job: Job[TpuVmConfig]) -> str:
    return f"cd {HOME}/{place(job)} && touch stop && kill -TERM $(cat pid)"


class TpuVmLauncher(Launcher[TpuVmConfig]):
    """Runs one job at a time on a slice. A preempted slice is requested again while this process follows the job."""

    shares_disk = False

    def recipe(self, jobs: Sequence[Job[TpuVmConfig]]) -> Recipe:
        """Returns the worker script and the commands in order; the last one is run once per worker."""
        files = {SCRIPT: script(jobs[0])} if len(jobs) == 1 else {}
        return Recipe(files, [command for job in jobs for command in commands(job)])

    def submit(self, jobs: Sequence[Job[TpuVmConfig]], recipe: Recipe) -> int:
        """Raises ValueError for a sweep, or if gcloud fails."""
        if len(jobs) > 1:
            raise ValueError(
                f"launcher=tpu_vm: a slice runs one job at a time, but this sweep has {len(jobs)}; submit them "
                "separately"
            )
        [job] = jobs
        job.pack()
        job = job.update_handle(tpu=tpu(job))
        if not job.launcher.follow:
            start(job)
            print(f"run {job.run!r}: job {job.number} runs on the TPU {tpu(job)}")
            return 0
        try:
            return supervise(
                lambda count: attempt(job),
                count=1,
                max_restarts=job.launcher.max_restarts,
                elastic=False,
                saved_step=lambda: None,
                say=say,
            )
        except KeyboardInterrupt:
            return left_running([job])

    def status(self, job: Job[TpuVmConfig]) -> str:
        found = state(job)
        if found != READY:
            return f"TPU {tpu(job)}: {found or 'not found'}"
        query = f'cd {HOME}/{place(job)}; [ -e exit_code ] && echo "ended with $(cat exit_code)" || echo running'
        return f"TPU {tpu(job)}: {check_output(ssh(job, '0', query))}"

    def logs(self, job: Job[TpuVmConfig], *, follow: bool) -> int:
        return show_log(job, follow=follow)

    def stop(self, job: Job[TpuVmConfig]) -> str:
        """Stops all workers. The slice is kept and billed; the returned message says how to delete it."""
        check_output(ssh(job, "all", stop_requested(job)))
        delete = shlex.join(queued(job, "delete", "--force"))
        return f"asked all workers to save a checkpoint and exit; delete the TPU with: {delete}"
