"""Which of this machine's network interfaces leads to the others."""

import ipaddress
import socket

import psutil


def interface_towards(host: str) -> str | None:
    """Name of the interface whose address packets to `host` leave from; None if it cannot be told. Sends nothing.

    A machine whose own name leads to 127.0.1.1, as Debian sets it up, or nowhere, would otherwise tell the others an
    address at which they cannot reach it, and they would wait for it. The loopback leads to no other machine: None.

    >>> interface_towards("127.0.0.1") is None
    True
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            own = probe.getsockname()[0].split("%")[0]
    except OSError:
        return None
    if ipaddress.ip_address(own).is_loopback:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.split("%")[0] == own for address in addresses):
            return name
    return None
