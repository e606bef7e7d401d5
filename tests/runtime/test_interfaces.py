"""The interface that leads to a host."""

import psutil

from llmac.runtime.interfaces import interface_towards


def test_the_loopback_leads_to_no_other_machine():
    """A host's own name often leads to 127.0.1.1, and gloo told to use it would be reached by nobody."""
    for host in ("127.0.0.1", "127.0.1.1", "localhost"):
        assert interface_towards(host) is None


def test_an_address_of_this_machine_or_beyond_it_has_an_interface():
    own = {
        a.address.split("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for a in addresses
        if a.family.name == "AF_INET" and not a.address.startswith("127.")
    }
    # Documentation addresses (RFC 5737): nobody answers, and nothing is sent.
    assert interface_towards("192.0.2.1") in {None, *own.values()}
    assert interface_towards("192.0.2.1") != "lo"


def test_a_host_nobody_knows_is_reached_over_nothing():
    assert interface_towards("no-such-host.invalid") is None
