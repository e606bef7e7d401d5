"""The interface that leads to a host."""

from llmac.runtime.interfaces import interface_towards


def test_loopback_is_reached_over_lo_by_number_and_by_name():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("localhost") == "lo"


def test_a_host_nobody_knows_is_reached_over_nothing():
    assert interface_towards("no-such-host.invalid") is None
    assert interface_towards("") in ("lo", None)
