"""A real SLURM on this machine: a controller and several nodes over loopback, without systemd, with its own key."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tests.launch.processes import descendants, holding

PATH = os.environ["PATH"] + ":/usr/sbin"  # where daemons are
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "runuser")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
SlurmdParameters=config_overrides
SlurmdTimeout=10
InactiveLimit=0
BatchStartTimeout=10
KillWait=5
"""


def why_not() -> str:
    """What is missing for a SLURM of our own; empty where nothing is."""
    missing = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if missing:
        return f"needs SLURM: {', '.join(missing)} not found (slurmctld slurmd slurm-client munge of Debian)"
    return "" if os.geteuid() == 0 else "needs root, to start SLURM's daemons"


class Cluster:
    """`nodes` names, each with two CPUs. A context manager; `environment` is what SLURM's commands need."""

    def __init__(self, nodes: list[str]):
        self.nodes, self.first_port = nodes, free_ports(1 + len(nodes))
        # Not a folder of pytest's: names of sockets are short, and munge's own user must pass through.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        (self.folder / "spool").mkdir()
        self._start_munge()
        host = os.uname().nodename.split(".")[0]
        config = CONFIG.format(host=host, folder=self.folder, port=self.first_port)
        for index, node in enumerate(self.nodes, 1):
            config += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.first_port + index} CPUs=2\n"
        config += "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
        (self.folder / "slurm.conf").write_text(config)
        try:
            self._run("slurmctld", "-c")
            for node in self.nodes:
                self.start_node(node)
            self.wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        (munge / "key").write_bytes(os.urandom(64))
        (munge / "key").chmod(0o600)
        shutil.chown(munge, "munge", "munge")
        shutil.chown(munge / "key", "munge", "munge")
        files = [f"--{name}={munge / file}" for name, file in MUNGE_FILES.items()]
        self._run("runuser", "-u", "munge", "--", "munged", "--force", *files)

    def _run(self, *command: str) -> str:
        return subprocess.run(
            command, env=os.environ | self.environment | {"PATH": PATH}, check=True, capture_output=True, text=True
        ).stdout

    def start_node(self, node: str) -> None:
        self._run("slurmd", "-N", node)

    def wait_for_nodes(self, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while self._run("sinfo", "-h", "-N", "-o", "%T").split() != ["idle"] * len(self.nodes):
            assert time.monotonic() < until, self._run("sinfo", "-N")
            time.sleep(0.2)

    def lose(self, node: str) -> None:
        """Kills the node's daemon and all that it runs, as a machine that goes dark."""
        daemons = holding(self.folder / f"slurmd.{node}.log")  # that of the node, and one of each job's step
        for pid in [*daemons, *(below for daemon in daemons for below in descendants(daemon))]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def __exit__(self, *error: object) -> None:
        try:
            for job in self._run("squeue", "-h", "-o", "%A").split():
                self._run("scancel", job)
        except subprocess.CalledProcessError:
            pass  # the controller did not come up, or is gone: there are no jobs
        time.sleep(1)
        for name in [*(f"slurmd.{node}.pid" for node in self.nodes), "slurmctld.pid", "munge/pid"]:
            file = self.folder / name
            if file.exists():
                end(int(file.read_text()))
        shutil.rmtree(self.folder, ignore_errors=True)


def free_ports(number: int) -> int:
    """The first of so many in a row that nobody has, below those that a system gives to connections as it likes.

    Clusters of tests side by side look in different places.
    """
    for first in range(20000 + os.getpid() % 1000 * 10, 32000, 10):
        try:
            for port in range(first, first + number):
                with socket.socket() as found:
                    found.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise OSError("no free ports between 20000 and 32000")


def end(pid: int) -> None:
    """Tells a process to end and waits for it."""
    until = time.monotonic() + 10
    try:
        os.kill(pid, signal.SIGTERM)
        while time.monotonic() < until and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.05)
            os.kill(pid, 0)
    except OSError:
        return


MUNGE_FILES = {"socket": "sock", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
