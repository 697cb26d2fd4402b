"""Slice files: what is accepted, and that every error names file, line and key."""

import pytest
from hypothesis import given
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
[slice.grants]
raw = "deny"
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
    assert (two.name, two.xid, two.grants.any) == ("b", None, False)
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
        ('raw = "deny"', 'raw = "no"', 14, "slice[1].grants.raw"),
        ('raw = "deny"', 'raw = "deny"\nrwa = 1', 15, "slice[1].grants.rwa"),
        ('raw = "own"', 'raw = "no"', 6, "slice[0].grants.raw"),
        ('"tcp/80"', '"tcp/0"', 6, "slice[0].grants.ports"),
        ('"tcp/80"', '"icmp/1"', 6, "slice[0].grants.ports"),
        ('"tcp/80"', '"tcp/[::g]:1"', 6, "slice[0].grants.ports"),
        ('"tcp/80"', '"udp/300.2.0.1:53"', 6, "slice[0].grants.ports"),
        ('"tcp/80"', '"tcp/90-80"', 6, "slice[0].grants.ports"),
        ("# two slices", "slices = 1", 1, "slices"),
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


_name = st.from_regex(config.NAME, fullmatch=True)
_part = st.text(
    st.characters(blacklist_characters="/\0\n", blacklist_categories=("Cs", "Cc")),
    min_size=1,
    max_size=20,
).filter(lambda part: part not in (".", ".."))
_path = st.lists(_part, min_size=1, max_size=5).map(lambda parts: "/" + "/".join(parts))


@given(
    name=_name,
    paths=st.lists(_path, min_size=1, max_size=3, unique=True),
    xid=st.none() | st.integers(1, 65535),
    raw=st.sampled_from(["deny", "own", "full"]),
    ports=st.lists(st.sampled_from(["tcp/80", "udp/1-65535", "sctp/[::1]:9", "tcp/10.0.0.1:5"])),
)
def test_what_is_written_reads_back_the_same(tmp_path_factory, name, paths, xid, raw, ports):
    file = tmp_path_factory.getbasetemp() / "x.toml"
    granted = config.Grants(raw, tuple(config.port(text) for text in ports))
    item = config.Slice(name, tuple(paths), xid, granted, file, 1)
    assert config.parse(file, config.write(item)) == [item]


@given(st.text(max_size=300))
def test_no_text_is_more_than_a_config_error(text):
    from pathlib import Path

    try:
        config.parse(Path("x.toml"), text)
    except ConfigError as error:
        assert error.message.startswith("x.toml:")
