"""A network of its own for pretend nodes: a switch in a namespace, a cable to each node and one to this machine.

The switch keeps clear of this machine's firewall, and a node's cable can be pulled. Everything ends with the switch's
process; nothing is left behind, whatever ends the tests.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_HERE = Path("/proc/self/ns/net")


@dataclass
class Network:
    """Addresses PREFIX.1, PREFIX.2, ... for the nodes in the order they are named, PREFIX.254 for this machine."""

    nodes: tuple[str, ...]
    prefix: str = field(init=False)
    _switch: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Plug in the switch and this machine."""
        self._switch = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"], start_new_session=True
        )
        _wait_until(lambda: has_own_network(self._switch.pid), "the switch starts")
        self._in_switch("ip link add br0 type bridge && ip link set br0 up")
        self.prefix = _free_prefix()
        cable = f"slurm{self._switch.pid}"
        _call(f"ip link add {cable} type veth peer name here netns {self._switch.pid}")
        self._in_switch("ip link set here master br0 up")
        _call(f"ip addr add {self.here}/24 dev {cable} && ip link set {cable} up")

    @property
    def here(self) -> str:
        """This machine's address."""
        return f"{self.prefix}.254"

    def address(self, node: str) -> str:
        """A node's address."""
        return f"{self.prefix}.{1 + self.nodes.index(node)}"

    def hosts_file(self, host_name: str) -> str:
        """/etc/hosts of a node; the mapped entries answer reverse look-ups from dual-stack sockets."""
        lines = ["127.0.0.1 localhost", "::1 localhost", f"{self.here} {host_name}"]
        for node in self.nodes:
            lines += [f"{self.address(node)} {node}", f"::ffff:{self.address(node)} {node}.mapped"]
        return "\n".join(lines) + "\n"

    def setup_command(self, node: str) -> str:
        """What a node runs, in a network namespace of its own, until it has its address."""
        return (
            "ip link set lo up; until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done; "
            f"ip addr add {self.address(node)}/24 dev eth0 && ip link set eth0 up"
        )

    def plug_in(self, node: str, pid: int) -> None:
        """Lay the cable to the namespace of process `pid`."""
        _wait_until(lambda: has_own_network(pid), f"{node} starts")
        self._in_switch(f"! ip link show {node} >/dev/null 2>&1 || ip link delete {node}")  # from its life before
        _call(f"ip link add eth0 netns {pid} type veth peer name {node} netns {self._switch.pid}")
        self._in_switch(f"ip link set {node} master br0 up")

    def cut(self, node: str) -> None:
        """Pull a node's cable: what it sends and what is sent to it vanishes."""
        self._in_switch(f"ip link set {node} down")

    def heal(self, node: str) -> None:
        """Plug the cable in again."""
        self._in_switch(f"ip link set {node} up")

    def stop(self) -> None:
        """Remove switch and cables."""
        self._switch.kill()
        self._switch.wait(timeout=30)

    def _in_switch(self, command: str) -> None:
        _call(command, "nsenter", f"--net=/proc/{self._switch.pid}/ns/net")


def has_own_network(pid: int) -> bool:
    """Whether a process is in another network namespace than this one."""
    return Path(f"/proc/{pid}/ns/net").readlink() != _HERE.readlink()


def _call(command: str, *prefix: str) -> None:
    done = subprocess.run([*prefix, "sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def _free_prefix() -> str:
    draw = random.SystemRandom()  # tests seed Python's generator
    used = subprocess.run(["ip", "-4", "route"], capture_output=True, text=True, check=True).stdout
    prefixes = (f"10.{draw.randrange(200, 250)}.{draw.randrange(250)}" for _ in range(100))
    return next(prefix for prefix in prefixes if f"{prefix}." not in used)


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"not within 20 s: {what}"
        time.sleep(0.02)
