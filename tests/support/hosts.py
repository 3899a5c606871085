"""Two hosts on one machine, each with a network, a hostname, processes and temporary files of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

INTERFACE = "eth0"
TOOLS = ("ip", "unshare", "nsenter", "mount")

# Becomes process 1 of a host. /tmp holds only what the hosts share, and the installation where it is there.
# Children that lose their parents come to process 1, and vanish when they end because it ignores SIGCHLD.
BOOT = r"""
set -e
name=$1 own=$2
shift 2
hostname "$name"
printf '127.0.0.1 localhost\n10.77.0.1 alpha\n10.77.0.2 beta\n' > "$own/hosts"
mount --bind "$own/hosts" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
mkdir "$own/tmp"
for path; do
    case $path in /tmp/*) mkdir -p "$own$path"; mount --bind "$path" "$own$path";; esac
done
mount --rbind "$own/tmp" /tmp
trap '' CHLD
exec sleep infinity
"""


def why_none() -> str:
    """Why there can be no hosts here; empty if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces need root on Linux"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not installed (iproute2, util-linux)"
    probe = ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--mount-proc"]
    done = subprocess.run(
        [*probe, "ip", "link", "add", "test0", "type", "veth"], capture_output=True, text=True
    )
    return f"no namespaces: {done.stderr.strip()}" if done.returncode else ""


class Host:
    """A host that is up.

    Args:
        name: its hostname.
        address: in the network of the two.
        namespace: network namespace, as `ip netns` names it.
        own: folder for what this host alone sees.
        shared: folders that it sees like every other host.
    """

    def __init__(self, name: str, address: str, namespace: str, own: Path, shared: Sequence[Path]) -> None:
        self.name = name
        self.address = address
        self._namespace = namespace
        enter = ["ip", "netns", "exec", namespace]
        boot = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        shell = ["sh", "-c", BOOT, "sh", name, str(own), *map(str, shared)]
        self._init = subprocess.Popen([*enter, *boot, *shell])
        self._children: list[subprocess.Popen[bytes]] = []
        self._enter: list[str] = []

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + 30
        pid = self._init.pid
        while True:
            assert self._init.poll() is None, f"{self.name} does not come up"
            assert time.monotonic() < deadline, f"{self.name} does not come up"
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if children and Path(f"/proc/{children[0]}/comm").read_text().strip() == "sleep":
                break
            time.sleep(0.02)
        self._enter = ["nsenter", "--target", children[0], "--net", "--uts", "--pid", "--mount", "--wd=/tmp"]

    def start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Run a command on this host, its output in `log`."""
        with log.open("wb") as file:
            child = subprocess.Popen(
                [*self._enter, *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HOME": "/tmp", **(environment or {})},
            )
        self._children.append(child)
        return child

    def link(self, state: str) -> None:
        """Plug the cable in ("up") or out ("down")."""
        run("ip", "-n", self._namespace, "link", "set", INTERFACE, state)

    def kill(self) -> None:
        """kill -9 of process 1, and so of all its processes at once."""
        self._init.send_signal(signal.SIGKILL)
        self._init.wait(timeout=30)
        for child in self._children:
            child.wait(timeout=30)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def two_hosts(shared: Sequence[Path]) -> Iterator[tuple[Host, Host]]:
    """alpha and beta, with a cable between them and to nobody else.

    Args:
        shared: folders that both see; of all else below /tmp they see nothing.
    """
    if reason := why_none():
        pytest.skip(reason)
    with ExitStack() as stack:
        namespaces = []
        for name in ("alpha", "beta"):
            namespace = f"esm-packed-{os.getpid()}-{name}"
            run("ip", "netns", "add", namespace)
            stack.callback(run, "ip", "netns", "delete", namespace)
            namespaces.append(namespace)
        first, second = namespaces
        peer = ("peer", "name", INTERFACE, "netns", second)
        run("ip", "link", "add", INTERFACE, "netns", first, "type", "veth", *peer)
        hosts = []
        for number, (name, namespace) in enumerate(zip(("alpha", "beta"), namespaces, strict=True), 1):
            address = f"10.77.0.{number}"
            run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", INTERFACE)
            run("ip", "-n", namespace, "link", "set", "lo", "up")
            run("ip", "-n", namespace, "link", "set", INTERFACE, "up")
            run("ip", "-n", namespace, "route", "add", "default", "via", f"10.77.0.{3 - number}")
            own = Path(tempfile.mkdtemp(prefix=f"{name}-"))
            stack.callback(shutil.rmtree, own, ignore_errors=True)
            host = Host(name, address, namespace, own, shared)
            stack.callback(host.kill)
            hosts.append(host)
        for host in hosts:
            host.wait_until_up()
        yield hosts[0], hosts[1]
