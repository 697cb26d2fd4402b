"""Sockets that are older than their slice. For the host's tests and the guests'."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import AF_INET, AF_INET6, SOCK_DGRAM, SOCK_RAW, SOCK_STREAM, SOL_SOCKET
from typing import Any

import bpfbed
from bpfbed import SO_MARK, A, B, inside, mark
from vnet.adopt import adopt
from vnet.testing.cgroup import Cgroup, cgroup
from vnet.testing.net import HERE, Namespace

from vnet import policy

LATE = 4242
AF_XDP = 44


@contextmanager
def holding(
    group: Cgroup | None,
    make: Callable[[], list[socket.socket]],
    then: Callable[[list[socket.socket]], Any] = lambda socks: [mark(s) for s in socks],
    ns: Namespace = HERE,
) -> Iterator[Callable[[], Any]]:
    """A process that has made sockets, and does ``then`` with them when it is asked."""
    made, made_there = os.pipe()
    go_there, go = os.pipe()

    def work():
        os.close(go)
        socks = make()
        os.write(made_there, b"x")
        os.read(go_there, 1)
        return then(socks)

    with bpfbed.child(group, work, ns) as answer:
        for fd in (made_there, go_there):
            os.close(fd)
        assert os.read(made, 1) == b"x", answer()

        def ask():
            os.write(go, b"x")  # another process of ours may hold this end, too
            return answer()

        try:
            yield ask
        finally:
            os.close(go)
            os.close(made)


def every_kind() -> list[socket.socket]:
    """One of each, IPv4 and IPv6."""
    found = []
    for family, here in ((AF_INET, "127.0.0.1"), (AF_INET6, "::1")):
        listener = socket.create_server((here, 0), family=family)
        client = socket.create_connection(listener.getsockname()[:2])
        accepted, _ = listener.accept()
        udp, connected = socket.socket(family, SOCK_DGRAM), socket.socket(family, SOCK_DGRAM)
        udp.bind((here, 0))
        connected.connect(udp.getsockname()[:2])
        unbound = socket.socket(family, SOCK_STREAM)
        icmp = socket.getprotobyname("icmp" if family == AF_INET else "ipv6-icmp")
        ping, raw = socket.socket(family, SOCK_DGRAM, icmp), socket.socket(family, SOCK_RAW, icmp)
        found += [listener, client, accepted, udp, connected, unbound, ping, raw]
    return found


def test_sockets_of_every_kind_get_the_xid_of_the_slice_they_were_made_in(bed, ns):
    ns.sysctl(net__ipv4__ping_group_range="0 0")

    def marked():
        socks = every_kind()
        for sock in socks:
            sock.setsockopt(SOL_SOCKET, SO_MARK, 0x50000)
        return socks

    def later(socks):
        there = socket.create_connection(socks[0].getsockname()[:2])
        return [hex(mark(s)) for s in [*socks, socks[0].accept()[0], there]]

    with cgroup() as late, holding(late, marked, later, ns) as ask:
        bed.write(slices={late.id: LATE})
        assert adopt().sockets == 16
        assert adopt().sockets == 0
        # the next connection has its mark from the listener, and the next client from birth
        assert ask() == [hex(0x50000 | LATE)] * 17 + [hex(LATE)]


def test_sockets_of_a_process_that_entered_the_slice_later_stay_the_nodes(bed):
    def move(socks):
        (bed.a.path / "cgroup.procs").write_text("0")
        assert adopt().sockets == 0
        return [mark(socks[0]), mark(socket.socket())]

    with holding(None, lambda: [socket.socket()], move) as ask:
        assert ask() == [0, A]


def test_a_socket_that_processes_share_is_adopted_once(bed):
    here, there = socket.socketpair()

    def make():
        one = socket.socket()
        socket.send_fds(there, [b"x"], [one.fileno()])
        return [one, one.dup()]

    def take():
        _, [fd], _, _ = socket.recv_fds(here, 1, 1)
        return [socket.socket(fileno=fd)]

    with here, there, cgroup() as late, holding(late, make) as one, holding(None, take) as other:
        bed.write(slices={late.id: LATE})
        done = adopt()
        assert (done.sockets, done.refused) == (1, {})
        assert one() + other() == [LATE] * 3


def test_a_socket_that_was_handed_to_another_slice_is_its_makers(bed):
    here, there = socket.socketpair()

    def make():
        with socket.socket() as one:
            socket.send_fds(there, [b"x"], [one.fileno()])

    def take():
        _, [fd], _, _ = socket.recv_fds(here, 1, 1)
        return [socket.socket(fileno=fd)]

    with here, there, cgroup() as late:
        inside(late, make)
        with holding(bed.b, take) as ask:
            bed.write(slices={late.id: LATE})
            done = adopt()
            assert done.sockets == 1, done
            assert ask() == [LATE]


def test_a_slice_that_is_no_more_leaves_no_xid_on_its_sockets(bed):
    with holding(bed.a, lambda: [socket.socket(), socket.socket(AF_INET6)]) as ask:
        policy.write(bed.instance, policy.Policy(slices={bed.b.id: B}))
        assert adopt().sockets == 2
        assert ask() == [0, 0]


def test_sockets_that_have_no_name_are_passed_over(bed):
    def make():
        found = [socket.socket(AF_XDP, SOCK_RAW)]
        with suppress(OSError):  # not in every kernel
            found.append(socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET))
        return [*found, socket.socket()]

    with cgroup() as late, holding(late, make) as ask:
        bed.write(slices={late.id: LATE})
        assert adopt().refused == {}
        assert ask()[-1] == LATE


def test_a_file_with_a_name_longer_than_the_kernel_tells_hides_no_socket(bed, tmp_path):
    def make():
        os.chdir(tmp_path)
        for _deeper in range(20):
            Path("d" * 250).mkdir()
            os.chdir("d" * 250)
        os.open(".", os.O_RDONLY)
        return [socket.socket()]

    with cgroup() as late, holding(late, make) as ask:
        bed.write(slices={late.id: LATE})
        adopt()
        assert ask() == [LATE]


def test_a_descriptor_that_is_a_file_since_proc_was_read_is_passed_over(bed, tmp_path):
    """What /proc said a moment ago is still in here."""
    fds = tmp_path / str(os.getpid()) / "fd"
    fds.mkdir(parents=True)
    with Path(os.devnull).open() as file, socket.socket() as one:
        for fd in file.fileno(), one.fileno():
            (fds / str(fd)).symlink_to(f"socket:[{10**9 + fd}]")
        before = sorted(Path("/proc/self/fd").iterdir())
        assert adopt(tmp_path).refused == {}
        assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_a_process_whose_number_is_a_threads_since_proc_was_read_is_passed_over(bed, tmp_path):
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        fds = tmp_path / str(thread.native_id) / "fd"
        fds.mkdir(parents=True)
        (fds / "0").symlink_to("socket:[1000000000]")
        assert adopt(tmp_path).sockets == 0
    finally:
        end.set()
        thread.join()
