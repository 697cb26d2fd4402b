"""The base programs on this kernel: see bpf_cases and bpf_instances."""

import errno
import itertools
import socket
from collections import Counter
from ipaddress import ip_address
from pathlib import Path
from socket import AF_INET, AF_INET6, SOCK_DGRAM

import bpfbed
import pytest
from adopt_cases import *  # noqa: F403
from bpf_cases import *  # noqa: F403
from bpf_instances import *  # noqa: F403
from bpfbed import A, B, inside
from vnet.policy import Policy, Port
from vnet.testing import apps, nflog
from vnet.testing.cgroup import cgroup
from vnet.testing.poll import until

from vnet import policy

pytestmark = pytest.mark.netns


def test_every_packet_of_a_socket_carries_the_xid(bed, peers):
    def ping(to, family):
        with socket.socket(family, SOCK_DGRAM, socket.getprotobyname(
            "icmp" if family == AF_INET else "ipv6-icmp"
        )) as sock:  # fmt: skip
            sock.settimeout(60)
            sock.sendto(bytes([8 if family == AF_INET else 128]) + bytes(15), (to, 0))
            return len(sock.recv(100))

    peers.node.sysctl(net__ipv4__ping_group_range="0 0")
    for here, there, family in (
        (peers.link.a4, peers.link.b4, AF_INET),
        (peers.link.a6, peers.link.b6, AF_INET6),
    ):
        with (
            nflog.capture(peers.node, hooks=("output", "postrouting")) as log,
            apps.start(peers.peer, "tcp-server", bind=there, reply=3000) as far,
            apps.start(peers.node, "tcp-server", bed.b, bind=here, reply=3000) as near,
            apps.start(peers.peer, "udp-recv", bind=there, reply=1) as echo,
        ):
            how = {"send": 3000, "receive": 3000}
            with apps.start(peers.node, "tcp-client", bed.a, to=there, port=far.port, **how) as c:
                c.result()
            with apps.start(peers.peer, "tcp-client", to=here, port=near.port, **how) as c:
                c.result()
            udp = {"count": 3, "expect": 3, "hold": 0}
            with apps.start(peers.node, "udp-send", bed.a, to=there, port=echo.port, **udp) as c:
                c.result()
            assert inside(bed.a, lambda: ping(there, family), peers.node) > 0  # noqa: B023

            def ends() -> bool:
                fins = [p for p in log.seen() if "F" in p.tcp_flags and p.prefix == "postrouting"]
                return len(fins) >= 2

            until(ends, what="both connections are closed")
            packets = [
                p for p in log.seen() if p.dst == there and not (p.proto == 58 and p.sport == 0)
            ]
            served = [p for p in packets if (p.proto, p.sport) == (6, near.port)]
            others = [p for p in packets if (p.proto, p.sport) != (6, near.port)]
            owners = Counter((p.proto, p.prefix, p.mark) for p in others)
            icmp = socket.IPPROTO_ICMP if family == AF_INET else socket.IPPROTO_ICMPV6
            # not one of another mark: SYN, data, FIN and the last ACK
            assert set(owners) == set(
                itertools.product((6, 17, icmp), ("output", "postrouting"), (A,))
            )
            assert {p.mark for p in served} == {B}
            assert any("S" in p.tcp_flags for p in served)


def test_ten_thousand_slices_ports_and_addresses_are_in_force_and_can_be_changed(tmp_path):
    many = 10_000
    with bpfbed.loaded(tmp_path) as bed, cgroup() as parent:
        paths = [parent.path / str(n) for n in range(many)]
        for path in paths:
            path.mkdir()
        ids = [path.stat().st_ino for path in paths]
        given = Policy(
            slices={number: 1 + n for n, number in enumerate(ids)},
            grants={1 + n: "own" for n in range(many)},
            ports=[(Port(6, 1024 + n), 1 + n) for n in range(many)],
            addresses={ip_address((10 << 24) + n): 1 + n for n in range(many)},
        )
        assert policy.write(bed.instance, given) == []
        assert policy.read(bed.instance).slices == given.slices
        table = policy.Slices(bed.instance)
        assert table.delete_many(ids[1:]) == {}
        assert [entry.xid for entry in table.table().values()] == [1]
        for path in paths:
            path.rmdir()
        assert table.set_many({ids[1]: 1}) == {ids[1]: errno.ENOENT}
    assert not Path(parent.path).exists()
