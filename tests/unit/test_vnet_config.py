"""Slice files: what is accepted, and that every error names file, line and key."""

import ipaddress
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vnet.errors import ConfigError

from vnet import config

pytestmark = pytest.mark.unit

GOOD = """\
# two slices
[[slice]]
name = "princeton_codeen"
cgroups = ["/vnet.slice/princeton_codeen/", "/x/y"]
xid = 512
grants = { raw = "own", ports = ["tcp/80", "udp/5000-5010", "tcp/[2001:db8::1]:25"] }

[[slice]]
name = "b"
cgroups = [
  "/b",
]
interfaces = ["veth-a", "vethB7"]
users = ["alice", 1005]
[slice.grants]
raw = "deny"
addresses = ["192.0.2.7", "2001:db8::7"]
"""


def test_a_good_file_is_read_as_it_says(tmp_path):
    one, two = config.parse(tmp_path / "a.toml", GOOD)
    assert (one.name, one.xid) == ("princeton_codeen", 512)
    assert one.cgroups == ("/vnet.slice/princeton_codeen", "/x/y")
    assert one.grants.raw == "own"
    assert [str(port) for port in one.grants.ports] == [
        "tcp/80",
        "udp/5000-5010",
        "tcp/[2001:db8::1]:25",
    ]
    assert (one.interfaces, one.grants.addresses, one.users) == ((), (), ())
    assert two.users == ("alice", "1005")
    assert (two.name, two.xid, two.grants.any) == ("b", None, True)
    assert two.interfaces == ("veth-a", "vethB7")
    assert [str(address) for address in two.grants.addresses] == ["192.0.2.7", "2001:db8::7"]
    assert (one.line, two.line) == (2, 8)


@pytest.mark.parametrize(
    ("old", "new", "line", "key"),
    [
        ("xid = 512", "xid = 0", 5, "slice[0].xid"),
        ("xid = 512", 'xid = "512"', 5, "slice[0].xid"),
        ("xid = 512", "xid = 65536", 5, "slice[0].xid"),
        ("xid = 512", "xdi = 512", 5, "slice[0].xdi"),
        ('name = "b"', 'name = "B"', 9, "slice[1].name"),
        ('name = "b"', "", 8, "slice[1].name"),
        ('  "/b",', "  7,", 10, "slice[1].cgroups[0]"),
        ('  "/b",', '  "b",', 10, "slice[1].cgroups"),
        ('  "/b",', '  "/b/../c",', 10, "slice[1].cgroups"),
        ('  "/b",', "", 10, "slice[1].cgroups"),
        ('raw = "deny"', 'raw = "no"', 16, "slice[1].grants.raw"),
        ('raw = "deny"', 'raw = "deny"\nrwa = 1', 17, "slice[1].grants.rwa"),
        ('raw = "own"', 'raw = "no"', 6, "slice[0].grants.raw"),
        ('"tcp/80"', '"tcp/0"', 6, "slice[0].grants.ports"),
        ('"tcp/80"', '"icmp/1"', 6, "slice[0].grants.ports"),
        ('"tcp/80"', '"tcp/[::g]:1"', 6, "slice[0].grants.ports"),
        ('"tcp/80"', '"udp/300.2.0.1:53"', 6, "slice[0].grants.ports"),
        ('"tcp/80"', '"tcp/90-80"', 6, "slice[0].grants.ports"),
        ('"tcp/80"', '"tcp/0.0.0.0:80"', 6, "slice[0].grants.ports"),
        ('"tcp/80"', '"tcp/[::]:80"', 6, "slice[0].grants.ports"),
        ('"tcp/80"', '"tcp/[192.0.2.1]:80"', 6, "slice[0].grants.ports"),
        ('"tcp/80"', '"tcp/[fe80::1%lo]:80"', 6, "slice[0].grants.ports"),
        ('"192.0.2.7"', "7", 17, "slice[1].grants.addresses[0]"),
        ('"192.0.2.7"', '"192.0.2.0/24"', 17, "slice[1].grants.addresses"),
        ('"192.0.2.7"', '"192.0.2.256"', 17, "slice[1].grants.addresses"),
        ('"192.0.2.7"', '"0.0.0.0"', 17, "slice[1].grants.addresses"),
        ('"192.0.2.7"', '"::"', 17, "slice[1].grants.addresses"),
        ('"192.0.2.7"', '"::ffff:0.0.0.0"', 17, "slice[1].grants.addresses"),
        ('"192.0.2.7"', '"224.0.0.1"', 17, "slice[1].grants.addresses"),
        ('"192.0.2.7"', '"ff02::1"', 17, "slice[1].grants.addresses"),
        ('"192.0.2.7"', '"255.255.255.255"', 17, "slice[1].grants.addresses"),
        ('"192.0.2.7"', '"127.0.0.1"', 17, "slice[1].grants.addresses"),
        ('"192.0.2.7"', '"::1"', 17, "slice[1].grants.addresses"),
        ('"192.0.2.7"', '"fe80::1%eth0"', 17, "slice[1].grants.addresses"),
        ('"192.0.2.7"', '"host.example"', 17, "slice[1].grants.addresses"),
        ('"veth-a"', '""', 13, "slice[1].interfaces"),
        ('"veth-a"', '"a234567890123456"', 13, "slice[1].interfaces"),
        ('"veth-a"', '"ééééé012345x"', 13, "slice[1].interfaces"),
        ('"veth-a"', '"a/b"', 13, "slice[1].interfaces"),
        ('"veth-a"', '"a b"', 13, "slice[1].interfaces"),
        ('"veth-a"', '"a\\u000bb"', 13, "slice[1].interfaces"),
        ('"veth-a"', '"a:b"', 13, "slice[1].interfaces"),
        ('"veth-a"', '".."', 13, "slice[1].interfaces"),
        ('"veth-a"', '"lo"', 13, "slice[1].interfaces"),
        ('"veth-a"', "1", 13, "slice[1].interfaces[0]"),
        ("# two slices", "slices = 1", 1, "slices"),
        ('"alice"', '""', 14, "slice[1].users"),
        ('"alice"', '"a b"', 14, "slice[1].users"),
        ('"alice"', '"-a"', 14, "slice[1].users"),
        ('"alice"', '"1004"', 14, "slice[1].users"),
        ("1005", "-1", 14, "slice[1].users"),
        ("1005", "4294967295", 14, "slice[1].users"),
        ("1005", "1.5", 14, "slice[1].users[1]"),
        ("1005", "true", 14, "slice[1].users[1]"),
    ],
)
def test_a_bad_value_is_refused_with_its_place(tmp_path, old, new, line, key):
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        config.parse(tmp_path / "a.toml", GOOD.replace(old, new))
    assert caught.value.message.startswith(f"{tmp_path}/a.toml:{line}: {key}: ")
    assert caught.value.exit_code == 2


def test_what_is_not_toml_is_refused_with_its_line(tmp_path):
    with pytest.raises(ConfigError, match=r"a\.toml:5: not TOML"):
        config.parse(tmp_path / "a.toml", GOOD.replace("xid = 512", "xid = "))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ('name = "b"\ncgroups = ["/z"]', r"z\.toml:1 \(slice b\): name: also used at .*a\.toml:8"),
        (
            'name = "z"\ncgroups = ["/z"]\nxid = 512',
            r"z\.toml:4: slice z: xid: 512 is also asked for by .*princeton_codeen",
        ),
        (
            'name = "z"\ncgroups = ["/x/y/"]',
            r'z\.toml:3: slice z: cgroups: "/x/y" also belongs to .*princeton_codeen',
        ),
        (
            'name = "z"\ncgroups = ["/z"]\ngrants.ports = ["udp/192.0.2.1:5005"]',
            r"grants\.ports: udp/192\.0\.2\.1:5005 overlaps udp/5000-5010 of .*princeton_codeen",
        ),
        (
            'name = "z"\ncgroups = ["/z"]\ngrants.addresses = ["::ffff:192.0.2.7"]',
            r"z\.toml:4: slice z: grants\.addresses: 192\.0\.2\.7 is also reserved by "
            r".*a\.toml:8 \(slice b\)",
        ),
        (
            'name = "z"\ncgroups = ["/z"]\ngrants.ports = ["tcp/[2001:db8:0::7]:25"]',
            r"z\.toml:4: slice z: grants\.ports: tcp/\[2001:db8::7\]:25 is on an address that is "
            r"reserved by .*a\.toml:8 \(slice b\)",
        ),
        (
            'name = "z"\ncgroups = ["/z"]\ninterfaces = ["v0", "veth-a"]',
            r'z\.toml:4: slice z: interfaces: "veth-a" also belongs to .*a\.toml:8 \(slice b\)',
        ),
    ],
)
def test_two_files_cannot_claim_the_same(tmp_path, other, words):
    (tmp_path / "a.toml").write_text(GOOD)
    (tmp_path / "z.toml").write_text(f"[[slice]]\n{other}\n")
    with pytest.raises(ConfigError, match=words):
        config.load(tmp_path)


def test_one_port_on_two_addresses_is_no_conflict(tmp_path):
    for name, address in (("a", "192.0.2.1"), ("b", "192.0.2.2")):
        (tmp_path / f"{name}.toml").write_text(
            f'[[slice]]\nname = "{name}"\ncgroups = ["/{name}"]\n'
            f'grants.ports = ["tcp/{address}:80"]\n'
        )
    assert [item.name for item in config.load(tmp_path)] == ["a", "b"]


def test_one_port_written_as_ipv4_and_as_mapped_ipv6_is_a_conflict(tmp_path):
    for name, address in (("a", "192.0.2.1"), ("b", "[::ffff:192.0.2.1]")):
        (tmp_path / f"{name}.toml").write_text(
            f'[[slice]]\nname = "{name}"\ncgroups = ["/{name}"]\n'
            f'grants.ports = ["tcp/{address}:80"]\n'
        )
    with pytest.raises(ConfigError, match=r"overlaps tcp/192\.0\.2\.1:80 of"):
        config.load(tmp_path)


def test_a_port_on_ones_own_reserved_address_is_no_conflict(tmp_path):
    (tmp_path / "a.toml").write_text(
        '[[slice]]\nname = "a"\ncgroups = ["/a"]\n'
        'grants = { addresses = ["192.0.2.1", "::ffff:192.0.2.1"], ports = ["tcp/192.0.2.1:80"] }\n'
    )
    (item,) = config.load(tmp_path)
    assert [str(found) for found in item.grants.addresses] == ["192.0.2.1", "192.0.2.1"]


def test_the_problems_of_all_files_are_told_at_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text("[[slice]]\n")
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path)
    assert [line.split(":")[0][-6:] for line in caught.value.message.splitlines()] == [
        "a.toml",
        "b.toml",
    ]


def test_no_directory_is_no_slices(tmp_path):
    assert config.load(tmp_path / "none") == []


def _readable(text):
    """Addresses that can be reserved."""
    try:
        return st.just(config.address(text))
    except ValueError:
        return st.just(ipaddress.ip_address("192.0.2.7"))


def _named(text):
    """Names that an interface can have."""
    try:
        return st.just(config.interface(text))
    except (ValueError, UnicodeEncodeError):
        return st.just("veth-a")


_name = st.from_regex(config.NAME, fullmatch=True)
_part = st.text(
    st.characters(blacklist_characters="/\0\n", blacklist_categories=("Cs", "Cc")),
    min_size=1,
    max_size=20,
).filter(lambda part: part not in (".", ".."))
_path = st.lists(_part, min_size=1, max_size=5).map(lambda parts: "/" + "/".join(parts))


_grant = st.builds(
    lambda proto, ports, address: config.port(
        f"{proto}/" + (address and f"{address}:") + "-".join(str(port) for port in ports)
    ),
    st.sampled_from(["tcp", "udp", "sctp"]),
    st.lists(st.integers(1, 65535), min_size=1, max_size=2).map(sorted),
    st.sampled_from(["", "10.0.0.1", "10.0.0.2", "[::1]", "[::ffff:10.0.0.2]"]),
)
_address = st.ip_addresses().map(str).flatmap(_readable)
_interface = st.text(min_size=1, max_size=15).flatmap(_named)


@settings(deadline=None)
@given(
    name=_name,
    paths=st.lists(_path, min_size=1, max_size=3, unique=True),
    xid=st.none() | st.integers(1, 65535),
    raw=st.sampled_from(["deny", "own", "full"]),
    ports=st.lists(_grant, max_size=4),
    addresses=st.lists(_address, max_size=4),
    interfaces=st.lists(_interface, max_size=4),
    users=st.lists(
        st.sampled_from(["alice", "bob.smith", "1005", "0", "o'neil", 'a"b']), max_size=4
    ),
)
def test_what_is_written_reads_back_the_same(
    tmp_path_factory, name, paths, xid, raw, ports, addresses, interfaces, users
):
    file = tmp_path_factory.getbasetemp() / "x.toml"
    granted = config.Grants(raw, tuple(ports), tuple(addresses))
    item = config.Slice(name, tuple(paths), xid, granted, file, 1, tuple(interfaces), tuple(users))
    assert config.parse(file, config.write(item)) == [item]


def _overlap(one: config.Port, two: config.Port) -> bool:
    """Whether one bind could fall under both."""
    return (
        one.proto == two.proto
        and one.first <= two.last
        and two.first <= one.last
        and (one.address is None or two.address is None or one.address == two.address)
    )


_near = st.builds(
    lambda proto, first, more, address: config.port(f"{proto}/{address}{first}-{first + more}"),
    st.sampled_from(["tcp", "udp"]),
    st.integers(1, 12),
    st.integers(0, 4),
    st.sampled_from(["", "10.0.0.1:", "10.0.0.2:", "[2001:db8::1]:"]),
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), _near), max_size=8))
def test_ports_clash_exactly_where_two_slices_could_bind_the_same(granted):
    slices = [
        config.Slice(name, (f"/{name}",), None,
                     config.Grants("deny", tuple(port for who, port in granted if who == name)),
                     Path("/nowhere"), 1)
        for name in "abc"
    ]  # fmt: skip
    clashing = any(
        who != other and _overlap(port, theirs)
        for who, port in granted
        for other, theirs in granted
    )
    if not clashing:
        config.check(slices)
        return
    with pytest.raises(ConfigError, match="overlaps"):
        config.check(slices)


def test_one_port_on_each_of_10_000_addresses_is_checked_quickly():
    slices = [
        config.Slice(f"s{n}", (f"/s{n}",), None,
                     config.Grants("deny", (config.port(f"tcp/10.0.{n >> 8}.{n & 255}:80"),)),
                     Path("/nowhere"), 1)
        for n in range(10_000)
    ]  # fmt: skip
    before = time.process_time()
    config.check(slices)
    assert time.process_time() - before < 2  # it takes 0.1; by pairs it took 10


@settings(deadline=None)
@given(st.text(max_size=300))
def test_no_text_is_more_than_a_config_error(text):
    try:
        config.parse(Path("x.toml"), text)
    except ConfigError as error:
        assert error.message.startswith("x.toml:")
