"""Two hosts on one machine, each with a network, process ids, shared memory and a name of its own.

A host is the Linux namespaces around one `sleep`. They have no name outside of it: when the sleep ends, be it that
pytest was killed, the kernel kills every process inside and takes the namespaces and the cable between them away.
The files are the machine's, as on a cluster with a shared filesystem.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
LOOPBACK = "127.0.1.1"
INTERFACE = "eth0"
"""The name of both ends of the cable, each inside its host; the machine's own interfaces are not visible there."""

_TOOLS = ("ip", "nsenter", "setpriv", "unshare")
_SECONDS_TO_START = 10


@dataclass(frozen=True, slots=True)
class Host:
    """One of the two, until its `sleep` ends."""

    name: str
    address: str
    outside: int
    """Process id of what holds the namespaces, as the machine sees it."""

    def command(self, arguments: Sequence[str], *, folder: Path) -> list[str]:
        """A command line that, started on the machine, runs `arguments` on this host."""
        return ["nsenter", f"--target={self.outside}", "--all", f"--wdns={folder}", *arguments]

    def start(
        self, arguments: Sequence[str], *, folder: Path, environment: Mapping[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """Start a command on this host; it leads a process group, and what it prints goes to `log`."""
        with log.open("w") as output:
            return subprocess.Popen(
                self.command(arguments, folder=folder),
                env=dict(environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def bytes_received(self) -> int:
        """By its end of the cable, so far."""
        for line in Path(f"/proc/{self.outside}/net/dev").read_text().splitlines():
            name, _, counts = line.strip().partition(":")
            if name == INTERFACE:
                return int(counts.split()[0])
        raise LookupError(f"{self.name} has no {INTERFACE}")

    def unplug(self) -> None:
        """Pull the cable: nothing arrives any more, and nobody is told."""
        _ip(self, "link", "set", INTERFACE, "down")

    def power_off(self) -> None:
        """Every process of the host dies at once, by kill -9."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.outside, signal.SIGKILL)


@contextlib.contextmanager
def two_hosts(folder: Path, *, by_name: bool = True) -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them; gone when the block ends.

    Args:
        folder: for the file of host names.
        by_name: whether the hosts' names lead to their addresses. Without, each host takes its own name for its
            loopback, which many installations of Linux write into `/etc/hosts`.

    Raises:
        RuntimeError: this machine or this user cannot make namespaces; the message says why.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(
            f"there is no {', '.join(missing)}; install iproute2 and util-linux to make hosts"
        )
    names = folder / "hosts"
    lines = [f"{address if by_name else LOOPBACK} {name}" for name, address in ADDRESSES.items()]
    names.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    with contextlib.ExitStack() as stack:
        hosts = []
        for name, address in ADDRESSES.items():
            hosts.append(Host(name, address, _start(name, names, stack)))
            stack.callback(hosts[-1].power_off)
        _connect(*hosts)
        yield hosts[0], hosts[1]


def _start(name: str, names: Path, stack: contextlib.ExitStack) -> int:
    """Start what holds the namespaces of a host; returns its process id."""
    settle = (
        "mount --bind $1 /etc/hosts && mount -t tmpfs tmpfs /dev/shm && hostname $0 && "
        "ip link set lo up && exec sleep infinity"
    )
    ends_with_pytest = ["setpriv", "--pdeathsig=KILL"]
    apart = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--mount-proc"]
    apart += ["--fork", "--kill-child"]
    holder = subprocess.Popen(
        [*ends_with_pytest, *apart, "sh", "-c", settle, name, str(names)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    stack.callback(_end, holder)
    deadline = time.monotonic() + _SECONDS_TO_START
    while holder.poll() is None and time.monotonic() < deadline:
        for child in psutil.Process(holder.pid).children():
            with contextlib.suppress(psutil.Error):
                if child.name() == "sleep":
                    return child.pid
        time.sleep(0.01)
    raise RuntimeError(f"a host cannot be made here: {_end(holder).strip() or 'it never settled'}")


def _end(holder: subprocess.Popen[str]) -> str:
    """End it; returns what it had to say. The second time does nothing."""
    if holder.stdout is None or holder.stdout.closed:
        return ""
    holder.kill()
    return holder.communicate()[0]


def _connect(a: Host, b: Host) -> None:
    """A cable whose ends are made inside the hosts, and an address for each end."""

    cable = ["link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE]
    try:
        _ip(a, *cable, "netns", str(b.outside))
        for host in (a, b):
            _ip(host, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _ip(host, "link", "set", INTERFACE, "up")
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"two hosts cannot be connected here: {error.stderr.decode().strip()}"
        ) from error


def _ip(host: Host, *arguments: str) -> None:
    subprocess.run(
        ["nsenter", f"--target={host.outside}", "--net", "ip", *arguments],
        check=True,
        capture_output=True,
    )
