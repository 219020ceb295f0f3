"""A Slurm cluster of a few nodes on this machine: real daemons in one folder. Needs root and Debian's packages.

Each node is a slurmd in namespaces of its own (host name, processes, mounts, network): it has its own /etc/hosts
and address, that ending its first process ends everything on it, as a power cut does, and that its cable can be pulled.
The nodes share the machine's files, as if over a network of their own.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.slurm.network import Network

GPUS_PER_NODE = 2
CPUS_PER_NODE = 4
SLURMD_PORT = 6818
GRACE_S = 30  # between the signal that a preempted job gets and its end
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged", "unshare", "mount", "ip", "nsenter", "setpriv")
# slurmd loads a cgroup plugin whatever the configuration needs. Naming v1 skips the detection, which fails in
# containers, and touches nothing; from 24.05 on it can be turned off.
FIRST_VERSION_WITHOUT_CGROUP = (24, 5)


def find_missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster of its own needs root"
    missing = [name for name in PROGRAMS if find_program(name) is None]
    if missing:
        packages = "slurmctld slurmd slurm-client munge iproute2"
        return f"a Slurm cluster of its own needs {', '.join(missing)}: apt-get install {packages}"
    needs = "mount -t tmpfs none /mnt && ip link add br0 type bridge && ip link add eth0 type veth peer name eth1"
    trial = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--net", "--fork", "sh", "-c", needs]
    done = subprocess.run(trial, capture_output=True, text=True, check=False)
    problem = f"this machine does not allow the namespaces and networks that the nodes need: {done.stderr.strip()}"
    return None if done.returncode == 0 else problem


def find_program(name: str) -> str | None:
    """Path of a program, also where daemons are not on the PATH."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    """TCP ports that nothing listens on right now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass
class Cluster:
    """The daemons, and what a user does: submit, look, signal, cancel."""

    num_nodes: int = 2
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")))
    network: Network = field(init=False)
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Host names: node1, node2, ..."""
        return tuple(f"node{number}" for number in range(1, self.num_nodes + 1))

    def start(self) -> None:
        """Start the network, munged, slurmctld and the nodes; returns when all nodes are idle."""
        self.network = Network(self.nodes)
        self.network.start()
        for name in ("state", "munge", "log", *self.nodes):
            (self.folder / name).mkdir()
        (self.folder / "munge").chmod(0o755)
        self.folder.chmod(0o755)
        self._configure()
        munge = self.folder / "munge"
        key = munge / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {"key-file": key, "socket": munge / "socket", "pid-file": munge / "pid", "log-file": munge / "log"}
        arguments = [f"--{name}={path}" for name, path in {**files, "seed-file": munge / "seed"}.items()]
        self._run("munged", ["munged", "--foreground", "--force", *arguments])
        self.wait_until(lambda: (munge / "socket").exists(), "munged listens")
        self._run("slurmctld", ["slurmctld", "-D", "-c", "-f", str(self.folder / "slurm.conf")])
        for node in self.nodes:
            self.start_node(node)
        idle = f"idle {self.num_nodes}"
        self.wait_until(lambda: self.command("sinfo", "-h", "-o", "%T %D").strip() == idle, "all nodes are idle")

    def start_node(self, node: str) -> None:
        """Boot a node."""
        boot = (
            f"hostname {node} && mount --bind {self.folder}/hosts /etc/hosts && mount -t tmpfs tmpfs /dev/shm && "
            f"{self.network.setup_command(node)} && "
            f"{find_program('slurmd')} -D -N {node} -f {self.folder}/slurm.conf; exit"  # bash stays and reaps orphans
        )
        spaces = ["--mount", "--uts", "--ipc", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"]
        self._run(node, ["unshare", *spaces, "bash", "-c", boot])
        self.network.plug_in(node, self._daemons[node].pid)

    def cut_power(self, node: str) -> None:
        """Every process of the node dies at once, before it could close a connection."""
        self.network.cut(node)
        self._daemons[node].kill()
        self._daemons[node].wait()

    def stop(self) -> None:
        """Stop everything and remove the folder."""
        for name in reversed(list(self._daemons)):
            self._daemons[name].kill() if name in self.nodes else self._daemons[name].terminate()
        for daemon in self._daemons.values():
            daemon.wait(timeout=30)
        self.network.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        """Standard output of a Slurm command; AssertionError with its errors if it fails."""
        done = subprocess.run(
            arguments, env=self.environment(environment), capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """This process's environment, with this cluster in it."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "ITT_"))}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf"), **(more or {})}

    def submit(self, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        """Call sbatch; returns the job's id."""
        return self.command("sbatch", "--parsable", *arguments, environment=environment).strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What scontrol knows of a job."""
        text = self.command("scontrol", "-o", "show", "job", job_id)
        return dict(pair.partition("=")[::2] for pair in text.split() if "=" in pair)

    def has_ended(self, job_id: str) -> bool:
        """Whether a job is over for good."""
        return self.job(job_id)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def wait_for_end(self, job_id: str, *, timeout_s: float = 240) -> str:
        """Wait until a job has ended for good; returns its state."""
        self.wait_until(lambda: self.has_ended(job_id), f"job {job_id} ends", timeout_s=timeout_s)
        return self.job(job_id)["JobState"]

    def wait_until(self, condition: Callable[[], bool], what: str, *, timeout_s: float = 180) -> None:
        """Poll; AssertionError when it takes too long."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except AssertionError:  # slurmctld is still coming up
                pass
            time.sleep(0.2)
        raise AssertionError(f"not within {timeout_s:.0f} s: {what}")

    def _run(self, name: str, command: list[str]) -> None:
        program = find_program(command[0])
        assert program is not None
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", program, *command[1:]],  # daemons end with the tests
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(),
                start_new_session=True,
            )

    def _configure(self) -> None:
        here, host, (port,) = self.folder, socket.gethostname(), free_ports(1)
        version = subprocess.run([str(find_program("slurmd")), "-V"], capture_output=True, text=True, check=True).stdout
        major, minor = (int(part) for part in version.split()[1].split(".")[:2])
        cgroup = "disabled" if (major, minor) >= FIRST_VERSION_WITHOUT_CGROUP else "cgroup/v1"
        (here / "cgroup.conf").write_text(f"CgroupPlugin={cgroup}\n")
        # A GPU counts only if a character device is behind it.
        for index in range(GPUS_PER_NODE):
            (here / f"gpu{index}").symlink_to("/dev/null")
        (here / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={here}/gpu[0-{GPUS_PER_NODE - 1}]\n")
        (here / "hosts").write_text(self.network.hosts_file(host))
        settings = {
            "ClusterName": "tests",
            "SlurmctldHost": f"{host}({self.network.here})",
            "SlurmctldPort": port,
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            # cred_expire is also how long a job that is queued again waits: 120 s by default, 5 s at least.
            "AuthInfo": f"socket={here}/munge/socket,cred_expire=5",
            "StateSaveLocation": here / "state",
            "SlurmdSpoolDir": here / "%n",
            "SlurmctldPidFile": here / "slurmctld.pid",
            "SlurmdPidFile": here / "%n.pid",
            "SlurmctldLogFile": here / "log" / "slurmctld.log",
            "SlurmdLogFile": here / "log" / "%n.log",
            "MailProg": "/bin/true",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SchedulerParameters": "bf_interval=2,sched_interval=2,batch_sched_delay=0",
            "SlurmdParameters": "config_overrides",
            "ReturnToService": 2,
            "JobRequeue": 1,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SlurmctldTimeout": 30,
            "SlurmdTimeout": 20,
            "KillWait": 20,
            "MinJobAge": 3600,
            "GresTypes": "gpu",
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        resources = f"CPUs={CPUS_PER_NODE} Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN"
        for node in self.nodes:
            lines.append(f"NodeName={node} NodeAddr={self.network.address(node)} Port={SLURMD_PORT} {resources}")
        everywhere = f"Nodes=ALL MaxTime=INFINITE State=UP GraceTime={GRACE_S}"
        lines.append(f"PartitionName=all Default=YES PriorityTier=1 {everywhere}")
        lines.append(f"PartitionName=urgent PriorityTier=2 {everywhere}")  # its jobs preempt those of `all`
        (here / "slurm.conf").write_text("\n".join(lines) + "\n")
