"""A real Slurm on this machine: munge, slurmctld and a slurmd per node, started for the tests, stopped after.

Where the kernel allows it each node is a network, host-name, mount and process namespace of its own, so that
a node has its own address and can be killed as a power cut would; else several slurmd share the machine on
127.0.1.x.  There are also 64 nodes of 8 GPUs on paper, by which ``sbatch --test-only`` judges large jobs.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "libpmix2", "iproute2")
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "ip")
ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE"}

TINY = (
    "warmstart.steps=5",
    "warmstart.demos=50",
    "eval.questions=4",
    "observe.progress_s=1",
    "checkpoint.every=1",
    "cluster.join_deadline_s=150",
    "slurm.signal_s=60",
    "slurm.cpus_per_node=2",
    # A lost node is noticed sooner than a busy cluster would want.
    "slurm.env={RAY_health_check_period_ms: '1000', RAY_health_check_failure_threshold: '5'}",
)


class Unavailable(RuntimeError):
    """There is no Slurm here, and none can be installed; the message says why."""


def install() -> None:
    """Install Debian's packages if they are missing; raises :class:`Unavailable`.  No daemon is started."""
    if all(shutil.which(name) for name in COMMANDS):
        return
    if os.geteuid() != 0:
        raise Unavailable("Slurm is not installed, and only root can install it")
    if not shutil.which("apt-get"):
        raise Unavailable("Slurm is not installed, and this is no Debian: there is no apt-get")
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(
                ["apt-get", "-qq", *words], capture_output=True, text=True, timeout=300, env=environment
            )
            if done.returncode:
                raise Unavailable(f"apt-get {words[0]} failed: {done.stderr.strip()[-300:]}")
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"apt-get did not end within {error.timeout:.0f} s") from error
    finally:
        if made:
            policy.unlink(missing_ok=True)


class SlurmCluster:
    """Start with ``start``; ``close`` ends every process and namespace of it."""

    def __init__(self, nodes: int = 3, cpus: int = 4, separate: bool = True) -> None:
        self.state = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: sockets lie in it
        self.state.chmod(0o755)
        self.names = [f"n{i}" for i in range(1, nodes + 1)]
        self.cpus = cpus
        self.shared = self.state / "shared"  # the file system that all nodes share
        tag = os.getpid() % 10_000
        self.prefix, self.net = f"es{tag}", f"10.213.{tag % 200 + 20}"
        self.namespaces = separate and os.geteuid() == 0 and self._can_separate()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def conf(self) -> Path:
        return self.state / "slurm.conf"

    def environment(self) -> dict[str, str]:
        """For Slurm's commands; puts this tree and this Python's programs into jobs' environment."""
        base = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "RAY_"))}
        return {**base, "SLURM_CONF": str(self.conf), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    # ------------------------------------------------------------------ start and stop

    def start(self) -> None:
        for part in ("munge", "log", "ctl", "shared", *(f"spool-{name}" for name in self.names)):
            (self.state / part).mkdir(mode=0o755)
        (self.state / "munge").chmod(0o711)
        key = self.state / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._configure()
        if self.namespaces:
            self._make_network()
        munge = self.state / "munge"
        self._run(
            "munged", "munged", "--foreground", "--num-threads=2", f"--key-file={key}",
            f"--socket={munge}/sock", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed",
            f"--log-file={self.state}/log/munged.log",
        )  # fmt: skip
        self.wait(lambda: (munge / "sock").is_socket(), 20, "munge's socket")
        self._run_on("ctl", "slurmctld", "-D", "-c")
        self.wait(lambda: "is UP" in self.slurm("scontrol", "ping", check=False), 30, "slurmctld")
        for name in self.names:
            self.start_node(name)
        self.wait(lambda: self.idle_nodes() == set(self.names), 60, "every node to be idle")

    def close(self) -> None:
        if self.conf.exists():
            self.slurm("scancel", "-Q", "--user=root" if os.geteuid() == 0 else "--me", check=False)
        for name in reversed(list(self._daemons)):
            self._end(name, signal.SIGKILL if self.namespaces and name != "munged" else signal.SIGTERM)
        if self.namespaces:
            for name in ("ctl", *self.names):
                subprocess.run(
                    ["ip", "netns", "del", f"{self.prefix}-{name}"], capture_output=True, timeout=20
                )
                subprocess.run(
                    ["ip", "link", "del", f"{self.prefix}-{name}"], capture_output=True, timeout=20
                )
                shutil.rmtree(f"/run/{self.state.name}-{name}", ignore_errors=True)
            subprocess.run(["ip", "link", "del", f"{self.prefix}br"], capture_output=True, timeout=20)
        shutil.rmtree(self.state, ignore_errors=True)

    def start_node(self, name: str) -> None:
        self._run_on(name, "slurmd", "-D", "-N", name)

    @contextmanager
    def power_cut(self, name: str) -> Iterator[None]:
        """Everything on the node is gone at once; afterwards it is there again."""
        assert self.namespaces, "without namespaces only slurmd would die"
        self._end(name, signal.SIGKILL)
        try:
            yield
        finally:
            self.start_node(name)

    def _end(self, name: str, number: signal.Signals) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(number)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait(10)

    def _run_on(self, name: str, *words: str) -> None:
        if not self.namespaces:
            self._run(name, *words)
            return
        keep = [self.state, ROOT, sys.prefix, sys.base_prefix, *os.environ.get("PYTHONPATH", "").split(":")]
        self._run(
            name, "nsenter", f"--net=/run/netns/{self.prefix}-{name}", "unshare", "-u", "-m", "-p", "-f",
            "--kill-child=SIGKILL", "bash", str(HERE / "node_init.sh"), name, str(self.state),
            ":".join(dict.fromkeys(str(path) for path in keep if path)), *words,
        )  # fmt: skip

    def _run(self, name: str, *words: str) -> None:
        # To a file, never to the test runner's pipes, which a daemon would keep open.
        with (self.state / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.environment()
            )

    def _can_separate(self) -> bool:
        trial = f"{self.prefix}t"
        tests = (
            ["unshare", "-n", "-u", "-m", "-p", "-f", "--mount-proc", "true"],
            ["ip", "link", "add", f"{trial}0", "type", "veth", "peer", "name", f"{trial}1"],
            ["ip", "link", "del", f"{trial}0"],
        )
        return all(subprocess.run(words, capture_output=True, timeout=20).returncode == 0 for words in tests)

    def _make_network(self) -> None:
        def ip(*words: str) -> None:
            subprocess.run(["ip", *words], check=True, timeout=20)

        bridge = f"{self.prefix}br"
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"{self.net}.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for number, name in enumerate(("ctl", *self.names)):
            space = f"{self.prefix}-{name}"
            ip("netns", "add", space)
            ip("link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", space, "master", bridge, "up")
            ip("-n", space, "addr", "add", f"{self.net}.{10 + number}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "route", "add", "default", "via", f"{self.net}.1")

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        addresses = {
            name: f"{self.net}.{10 + i}" if self.namespaces else f"127.0.1.{10 + i}"
            for i, name in enumerate(("ctl", *self.names))
        }
        controller = f"ctl({addresses['ctl']})" if self.namespaces else f"{host}(127.0.0.1)"
        version = int(_output("slurmd", "-V").split()[-1].split(".")[0])
        epilog = self.state / "epilog.sh"
        epilog.write_text((HERE / "epilog.sh").read_text().replace("@STATE@", str(self.state)))
        epilog.chmod(0o755)
        hosts = [f"{address} {name}" for name, address in addresses.items()]
        (self.state / "hosts").write_text(
            "\n".join(["127.0.0.1 localhost", f"{self.net}.1 {host}", *hosts, ""])
        )
        (self.state / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        (self.state / "cgroup.conf").write_text(
            "CgroupPlugin=disabled\n" if version >= 23 else "CgroupAutomount=no\n"
        )
        user = _output("id", "-un").strip()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name if self.namespaces else host} NodeAddr={addresses[name]} "
            f"Port={16818 if self.namespaces else 17000 + i} CPUs={self.cpus} RealMemory=8000 State=UNKNOWN"
            for i, name in enumerate(self.names)
        )
        self.conf.write_text(f"""\
ClusterName=test
SlurmctldHost={controller}
SlurmctldPort=16817
FirstJobId={int(time.time()) % 1_000_000 + 1000}
AuthType=auth/munge
AuthInfo=socket={self.state}/munge/sock
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={self.state}/ctl
SlurmdSpoolDir={self.state}/spool-%n
SlurmctldPidFile={self.state}/slurmctld.pid
SlurmdPidFile={self.state}/slurmd-%n.pid
SlurmctldLogFile={self.state}/log/slurmctld.log
SlurmdLogFile={self.state}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
MinJobAge=600
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PropagateResourceLimitsExcept=MEMLOCK
MailProg=/bin/true
Epilog={epilog}
GresTypes=gpu
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=INFINITE
{nodes}
NodeName=paper[1-64] CPUs=192 RealMemory=2000000 Gres=gpu:8 State=CLOUD
PartitionName=batch Nodes={",".join(self.names)} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=paper Nodes=paper[1-64] State=UP
""")

    # ------------------------------------------------------------------ asking it

    def slurm(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=self.environment())
        assert not check or done.returncode == 0, f"{words}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def judge(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A Slurm command that may fail."""
        return subprocess.run(words, capture_output=True, text=True, timeout=60, env=self.environment())

    def idle_nodes(self) -> set[str]:
        return set(
            self.slurm("sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N", check=False).split()
        )

    def node_state(self, name: str) -> str:
        return self.slurm("sinfo", "-h", "-N", "-n", name, "-p", "batch", "-o", "%t").strip()

    def job(self, job: str) -> dict[str, str]:
        """Slurm's record of a job, e.g. ``["JobState"]``."""
        line = self.slurm("scontrol", "show", "job", "-o", job).splitlines()[0]
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def wait_end(self, job: str, seconds: float, evidence: Callable[[], str] = str) -> str:
        self.wait(lambda: self.job(job)["JobState"] in ENDED, seconds, f"the end of job {job}", evidence)
        return self.job(job)["JobState"]

    def restart_now(self, job: str, seconds: float, evidence: Callable[[], str] = str) -> None:
        """Let a requeued job start without the two minutes that Slurm holds it back.

        Not at once either: a node takes a credential of the second in which the last one was revoked for
        revoked, too ("non-startable: Job credential revoked"), and the job would fail.
        """

        def settled() -> bool:
            return self.job(job)["JobState"] == "PENDING" and not self.slurm("squeue", "-h", "-t", "CG")

        self.wait(settled, seconds, f"job {job} to be requeued", evidence)
        self.slurm("scontrol", "update", f"jobid={job}", "StartTime=now+3")

    def left_behind(self) -> list[str]:
        """What jobs left running, as the epilogs found it."""
        return [line for path in self.state.glob("left-*") for line in path.read_text().splitlines()]

    def wait(
        self, condition: Callable[[], Any], seconds: float, what: str, evidence: Callable[[], str] = str
    ) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{evidence()}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-8:])
            for path in sorted((self.state / "log").glob("*"))
        )


def _output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout


def espalier(cluster: SlurmCluster, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command line against ``cluster``."""
    command: Sequence[str] = [sys.executable, "-m", "actors.cli.main", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=cluster.environment(), cwd=cwd
    )
