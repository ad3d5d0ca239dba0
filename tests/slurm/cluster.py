"""A real SLURM of several nodes on this machine: its own munged, slurmctld and slurmd daemons.

Each node has its own host name and hosts file (a UTS and a mount namespace), so that the names of
a job's nodes resolve as they do on a cluster. The GPUs are files. Every daemon is a child of the
test's process, in the foreground, and is ended by its id.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "unshare")
POLL_S = 0.2


def why_not() -> str | None:
    """Say why no cluster can be started here; None if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here (Debian: slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "SLURM's daemons and namespaces want root"
    probe = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True)
    return None if probe.returncode == 0 else f"no namespaces: {probe.stderr.decode().strip()}"


class Cluster:
    """Nodes ``node1 ...`` in the partitions ``debug`` and, which preempts it, ``urgent``.

    Args:
        folder: for state, logs and sockets; its path must be short (a socket's may have 107 bytes).
        num_nodes: how many.
        cpus: that each node claims to have.
        gpus: fake ones, of each node.
    """

    def __init__(self, folder: Path, *, num_nodes: int, cpus: int, gpus: int) -> None:
        self.folder, self.num_nodes, self.cpus, self.gpus = folder, num_nodes, cpus, gpus
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        for name in [name for name in self.env if name.startswith(("SLURM_JOB", "SBATCH_"))]:
            del self.env[name]

    @property
    def nodes(self) -> list[str]:
        """Their names."""
        return [f"node{n}" for n in range(1, self.num_nodes + 1)]

    def start(self) -> "Cluster":
        """Start every daemon and wait until all nodes are idle."""
        self.write_configuration()
        munge = self.folder / "munge"
        self.run_daemon(
            "munged",
            ["munged", "--foreground", "--force", f"--key-file={munge / 'key'}",
             f"--socket={munge / 'socket'}", f"--pid-file={munge / 'pid'}",
             f"--log-file={munge / 'log'}", f"--seed-file={munge / 'seed'}"],
        )  # fmt: skip
        wait_for(lambda: (munge / "socket").exists(), 20, "munged's socket")
        self.run_daemon("slurmctld", ["slurmctld", "-D", "-c"])
        for node in self.nodes:
            self.start_node(node)
        wait_for(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), 60, self.describe)
        return self

    def start_node(self, node: str) -> None:
        """Start the daemon of a node, under the node's own host name."""
        hosts = self.folder / "hosts"
        script = f"hostname {node} && mount --bind {hosts} /etc/hosts && exec slurmd -D -N {node}"
        self.run_daemon(node, ["unshare", "--uts", "--mount", "sh", "-c", script])

    def kill_node(self, node: str) -> None:
        """Lose a node: its daemon and everything that it runs die at once."""
        for pid in self.processes_of(node):
            os.kill(pid, signal.SIGKILL)
        self.daemons.pop(node).wait()

    def processes_of(self, node: str) -> list[int]:
        """Return all processes that live under the node's host name, its daemon last."""
        daemon = self.daemons[node].pid
        name = os.readlink(f"/proc/{daemon}/ns/uts")
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if os.readlink(entry / "ns/uts") == name:
                        found.append(int(entry.name))
                except OSError:  # it has ended meanwhile
                    continue
        return sorted(found, key=lambda pid: pid == daemon)

    def stop(self) -> None:
        """End every daemon that this object started, and what the nodes still run."""
        for node in self.nodes:
            if node in self.daemons:
                self.kill_node(node)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()

    def run_daemon(self, name: str, command: Sequence[str]) -> None:
        """Start one daemon; its output goes to ``NAME.out``."""
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=self.env, stdout=out, stderr=subprocess.STDOUT
            )

    def states(self) -> dict[str, str]:
        """Return every node's state."""
        lines = self.run("sinfo", "-h", "-N", "-p", "debug", "-o", "%N %T", check=False)
        return dict(line.split() for line in lines.splitlines() if line)

    def describe(self) -> str:
        """Say how the nodes are and what the controller has said last."""
        log = (self.folder / "slurmctld.out").read_text()[-2000:]
        return f"idle nodes; they are {self.states()}; slurmctld said:\n{log}"

    def run(self, *command: str, check: bool = True) -> str:
        """Run a client of this cluster; return what it printed."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}{done.stdout}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Return what ``scontrol show job`` says, by key."""
        text = self.run("scontrol", "show", "job", "-o", job_id).splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def steps(self, job_id: str) -> list[str]:
        """Return the running steps that ``srun`` has made in a job."""
        lines = self.run("squeue", "-h", "--steps", "-j", job_id, "-o", "%i").split()
        return [step for step in lines if step.rpartition(".")[2].isdigit()]

    def state(self, job_id: str) -> str:
        """Return a job's state, such as ``RUNNING``."""
        return self.job(job_id)["JobState"]

    def await_state(self, job_id: str, *states: str, within_s: float) -> str:
        """Wait until a job is in one of the states; return it."""
        wait_for(
            lambda: self.state(job_id) in states,
            within_s,
            lambda: f"job {job_id} to be {' or '.join(states)}; it is {self.job(job_id)}",
        )
        return self.state(job_id)

    def write_configuration(self) -> None:
        """Write key, hosts and SLURM's own files."""
        for name in ("munge", "state", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(128))
        (self.folder / "hosts").write_text(
            f"127.0.0.1 localhost {socket.gethostname()} {' '.join(self.nodes)}\n"
        )
        gpus = [self.folder / f"gpu{index}" for index in range(self.gpus)]
        for gpu in gpus:
            gpu.symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={gpu}\n" for gpu in gpus))
        (self.folder / "slurm.conf").write_text(self.configuration())

    def configuration(self) -> str:
        """Return the text of ``slurm.conf``."""
        folder, ports = self.folder, free_ports(1 + self.num_nodes)
        nodes = "".join(
            f"NodeName={node} NodeHostname=localhost Port={port} CPUs={self.cpus} "
            f"RealMemory=16000 Gres=gpu:{self.gpus} State=UNKNOWN\n"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        )
        return f"""\
ClusterName=moonlit
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdDebug=debug
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,requeue_setup_env_fail
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
KillWait=60
SlurmdTimeout=12
InactiveLimit=0
MinJobAge=3000
ReturnToService=2
SlurmdParameters=config_overrides
{nodes}PartitionName=debug Nodes=ALL Default=YES PriorityTier=1 GraceTime=40
PartitionName=urgent Nodes=ALL PriorityTier=10
"""


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(condition: Callable[[], bool], within_s: float, what: str | Callable[[], str]) -> None:
    """Wait until the condition holds.

    Raises:
        TimeoutError: saying what was awaited.
    """
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            awaited = what if isinstance(what, str) else what()
            raise TimeoutError(f"waited {within_s} s for {awaited}")
        time.sleep(POLL_S)
