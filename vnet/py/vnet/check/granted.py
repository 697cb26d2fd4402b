"""What the guard promises of ports and addresses: attempts to take what was granted to another."""

import struct

from vnet.check.facts import OTHERS, SLICES, WITH_RAW, Property
from vnet.check.trial import Trial
from vnet.testing import steps
from vnet.testing.packets import (
    NAMES,
    SCTP,
    TCP,
    UDP,
    World,
    ip,
    pton,
    sctp,
    tcp,
    udp,
)
from vnet.testing.steps import Maker, Steps


def port_reserved(t: Trial) -> None:
    ports = t.bed.ports
    for kind, name in NAMES.items():
        asked = {
            f"bind {name} port {ports.reserved} of every address": steps.binds(
                kind, ports.reserved
            ),
            f"bind {name} port {ports.reserved} of one address": steps.binds(
                kind, ports.reserved, "here"
            ),
            f"bind {name} port {ports.row[1]}, the last of a range": steps.binds(
                kind, ports.row[1]
            ),
            f"bind {name} port {ports.on_address} of the address that has it reserved": (
                steps.binds(kind, ports.on_address, "here")
            ),
            f"bind {name} port {ports.on_address} of every address": steps.binds(
                kind, ports.on_address
            ),
        }
        if t.family == 6:
            tried = f"bind {name} port {ports.reserved} of a v4-mapped address"
            asked[tried] = lambda w, kind=kind: [  # type: ignore[misc]
                ["socket", "AF_INET6", *steps.KINDS[kind]],
                ["bind", f"::ffff:{t.bed.link.a4}", ports.reserved],
            ]
        for tried, how in asked.items():
            t.refuses(OTHERS, tried, how, "bind", "EACCES")
            t.allows(("holder",), tried, how)
        _beside(t, kind, f"bind a {name} port beside the range")


def _beside(t: Trial, kind: int, tried: str) -> None:
    """One of several: the kernel may just have given one to somebody's connection."""
    ports = t.bed.ports.beside
    for role in (*SLICES, "node"):
        with t.attempt(role, tried):
            said = [t.tries(role, steps.binds(kind, port)(t.world)) for port in ports]
            good = [port for port, one in zip(ports, said, strict=True) if one["ok"]]
            t.note(role, bool(good), tried, f"one of {ports[0]} to {ports[-1]} can be had",
                   f"{good[0]} can" if good else f"none: {said[0]['errno']}")  # fmt: skip


def sctp_port_reserved(t: Trial) -> None:
    ports = t.bed.ports
    for kind, name in ((SCTP, "one-to-one"), (-SCTP, "one-to-many")):
        how = steps.binds(kind, ports.reserved)
        tried = f"bind sctp port {ports.reserved}, {name}"
        t.refuses(OTHERS, tried, how, "bind", "EACCES")
        t.allows(("holder",), tried, how)
    # sctp_bindx(3) is a setsockopt: SCTP_SOCKOPT_BINDX_ADD
    tried = f"sctp_bindx port {ports.reserved}"
    t.refuses(OTHERS, tried, _bindx(ports.reserved), "set", "EACCES")
    t.allows(("holder",), tried, _bindx(ports.reserved))
    t.drops(
        WITH_RAW,
        f"raw sctp packet from port {ports.reserved}",
        steps.raw(lambda w: ip(w, SCTP, sctp(w, ports.reserved))),
    )


def _bindx(port: int) -> Maker:
    def made(w: World) -> Steps:
        if w.family == 4:
            address = struct.pack("=H", 2) + struct.pack(">H", port) + pton(w.here) + bytes(8)
        else:
            address = struct.pack("=H", 10) + struct.pack(">HI", port, 0) + pton(w.here) + bytes(4)
        return [["socket", w.af, "SOCK_STREAM", SCTP], ["set", SCTP, 100, address.hex()]]

    return made


def port_autobind(t: Trial) -> None:
    ports = t.bed.ports
    # The node's range of ports is not ours to narrow; a socket's own is.
    narrow, wide = (
        ["set", 0, _LOCAL_PORT_RANGE, struct.pack("=HH", ports.reserved, last).hex()]
        for last in (ports.row[1], ports.beside[-1])
    )
    w = t.world
    ways: dict[str, tuple[list[object], Steps]] = {
        "tcp connect": (["socket", w.af, "SOCK_STREAM"], [["connect", w.there, w.sink]]),
        "tcp listen": (["socket", w.af, "SOCK_STREAM"], [["listen"]]),
        "tcp bind to port 0": (["socket", w.af, "SOCK_STREAM"], [["bind", w.wild, 0]]),
        "udp send": (["socket", w.af, "SOCK_DGRAM"], [["send", "78", w.there, w.sink]]),
        "udp connect": (["socket", w.af, "SOCK_DGRAM"], [["connect", w.there, w.sink]]),
    }
    for role in ("deny", "own", "node"):
        for name, (made, then) in ways.items():
            tried = f"{name}, where only reserved ports are left"
            with t.attempt(role, tried):
                said = t.tries(role, [made, narrow, *then, ["name"]])
                if said.get("errno") == "ENOPROTOOPT":
                    _reserved_by_sysctl(t, role)
                    break
                got = said["got"][0][1] if said["got"] else said.get("errno")
                refused = said.get("errno") in ("EADDRINUSE", "EADDRNOTAVAIL", "EAGAIN")
                t.note(role, refused, tried, "no port is found", f"{got}")
            with t.attempt(role, f"{name}, where free ones are left"):
                abort = ["set", "SOL_SOCKET", "SO_LINGER", struct.pack("=ii", 1, 0).hex()]
                said = t.tries(role, [made, wide, abort, *then, ["name"]])
                got = said["got"][0][1] if said["got"] else said.get("errno")
                expected = f"one of {ports.beside[0]} to {ports.beside[-1]}"
                t.note(role, got in ports.beside, f"{name}, where free ones are left", expected,
                       f"{got}")  # fmt: skip
    gone = t.bed.before.reserved
    t.note("node", not gone, "read net.ipv4.ip_local_reserved_ports",
           "all reserved ports of all slices", gone[0] if gone else "all of them")  # fmt: skip


_LOCAL_PORT_RANGE = 51
"""IP_LOCAL_PORT_RANGE, Linux 6.3."""


def _reserved_by_sysctl(t: Trial, role: str) -> None:
    """Before 6.3 a socket has no range of its own: the canaries' ports must be in the sysctl."""
    from vnet import sysctls

    ports = t.bed.ports
    missing = {ports.reserved, *ports.row, ports.on_address, ports.own} - sysctls.reserved_ports()
    t.note(role, not missing, "read net.ipv4.ip_local_reserved_ports (no kernel before 6.3 lets a "
           "socket narrow its range)", "all ports of the canaries",
           f"missing: {sorted(missing)}" if missing else "all of them")  # fmt: skip


def port_raw_source(t: Trial) -> None:
    ports = t.bed.ports
    for proto, make in ((TCP, tcp), (UDP, udp)):
        name = NAMES[proto]
        for port in (ports.reserved, ports.on_address):
            whole = steps.raw(lambda w, p=proto, m=make, n=port: ip(w, p, m(w, n)))  # type: ignore[misc]
            tried = f"raw {name} packet from port {port}"
            t.drops(WITH_RAW, tried, whole)
            t.allows(("holder",), tried, whole, seen=True)
        t.drops(
            WITH_RAW,
            f"raw {name} packet without its IP header from port {ports.reserved}",
            steps.raw(lambda w, m=make: m(w, ports.reserved), proto),  # type: ignore[misc]
        )
    elsewhere = "127.0.0.1" if t.family == 4 else "::1"
    how = steps.sends(
        lambda w: ["bind", elsewhere, ports.on_address], cmsg=lambda w: steps.pktinfo(w, w.here)
    )
    tried = f"datagram from port {ports.on_address} of the address that has it reserved, by PKTINFO"
    t.drops(OTHERS, tried, how)
    t.allows(("holder",), tried, how, seen=True)


def address_reserved(t: Trial) -> None:
    for kind, name in NAMES.items():
        tried, how = f"bind {name} to the address", steps.binds(kind, 0, "mine")
        t.refuses(OTHERS, tried, how, "bind", "EACCES")
        t.allows(("holder",), tried, how)


def address_source(t: Trial) -> None:
    ports = t.bed.ports
    tried, how = "datagram from the address, by PKTINFO", steps.sends(cmsg=steps.pktinfo)
    t.drops(OTHERS, tried, how)
    t.allows(("holder",), tried, how, seen=True)
    raw = steps.raw(lambda w: ip(w, UDP, udp(w, ports.reserved), w.mine))
    t.drops(WITH_RAW, "raw packet from the address", raw)
    t.allows(("holder",), "raw packet from the address", raw, seen=True)


PROPERTIES = (
    Property("port-reserved", "A port that is granted to a slice is nobody else's to bind: or its "
             "users may be answered by somebody else.", port_reserved),
    Property("sctp-port-reserved", "SCTP binds by itself, past the hooks of the other protocols.",
             sctp_port_reserved, needs=("lsm",), where=("sctp",)),
    Property("port-autobind", "The kernel picks ports for whoever does not ask for one, and asks "
             "nobody: it must never pick a reserved one.", port_autobind),
    Property("port-raw-source", "A packet from a slice's port, by a raw socket or a borrowed "
             "address, would speak in its name.", port_raw_source),
    Property("address-reserved", "An address that is granted to a slice is nobody else's to bind.",
             address_reserved),
    Property("address-source", "Nor may anybody else send from it: complaints about an address go "
             "to its holder.", address_source),
)  # fmt: skip
