"""The parts of vnet that need no kernel: marks, rules' text, cgroup paths, units, start-up."""

import configparser
import subprocess
import sys
from pathlib import Path

import pytest
from vnet.errors import ConfigError, NodeError
from vnet.paths import Paths

from vnet import (
    cgroups,
    datapath,
    iptables,
    marks,
    module,
    nodeconfig,
    rules,
    state,
    steps,
    sysctls,
)

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("rule", "kind", "bits"),
    [
        ("-j MARK --set-xmark 0x7/0xffff", "packet", 0xFFFF),
        ("-j MARK --set-xmark 0x4000/0x4000", "packet", 0x4000),
        ("-j MARK --set-xmark 0x10000/0x10000", "packet", 0x10000),
        ("-j MARK --set-xmark 0x1/0x0", "packet", 0x1),
        ("-j MARK --set-xmark 0x1", "packet", 0xFFFFFFFF),
        ("-j MARK --copy-xid", "packet", 0),
        ("-j CONNMARK --set-xmark 0x0/0xff00", "connection", 0xFF00),
        (
            "-j CONNMARK --save-mark --nfmask 0xff --ctmask 0xff0000",
            "connection",
            0xFF0000,
        ),
        ("-j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xffffffff", "packet", 0xFF),
        ("-p tcp -j TPROXY --on-port 1 --on-ip 0.0.0.0 --tproxy-mark 0x1/0x1", "packet", 0x1),
        ("-m socket --restore-skmark -j ACCEPT", "packet", 0xFFFFFFFF),
    ],
)
def test_the_bits_an_iptables_rule_writes(rule, kind, bits):
    (write,) = marks.in_save(f"*mangle\n-A PREROUTING {rule}\nCOMMIT\n", frozenset())
    assert (write.kind, write.bits) == (kind, bits)
    assert write.hurts == bool(bits & marks.OURS[kind])


def test_rules_that_only_match_a_mark_or_are_in_our_chains_write_none():
    text = (
        "*mangle\n:A - [0:0]\n-A INPUT -m mark --mark 0x1 -j ACCEPT\n"
        "-A OURS -j MARK --set-xmark 0x1/0xffff\n"
        # How the eBPF data path finds the receiver of a packet.
        "-A INPUT -m socket --nowildcard --restore-skmark -j OURS\n"
    )
    assert list(marks.in_save(text, frozenset({"OURS"}))) == []


META = {"meta": {"key": "mark"}}
CT = {"ct": {"key": "mark"}}


@pytest.mark.parametrize(
    ("key", "value", "bits"),
    [
        (META, 1, 0xFFFFFFFF),
        (META, {"|": [META, 0x10000]}, 0x10000),
        (META, {"|": [{"&": [META, 0xFFFF]}, 0x10000]}, 0xFFFF0000),
        (META, {"^": [{"&": [META, 0xFFFF0000]}, 7]}, 0xFFFF),
        (META, CT, 0xFFFFFFFF),
        (CT, META, 0xFFFFFFFF),
        (CT, {"|": [CT, 1]}, 1),
    ],
)
def test_the_bits_an_nft_statement_writes(key, value, bits):
    rule = {"family": "inet", "table": "t", "chain": "c", "handle": 4}
    rule["expr"] = [{"accept": None}, {"mangle": {"key": key, "value": value}}]
    (write,) = marks.in_nft({"nftables": [{"metainfo": {}}, {"rule": rule}]})
    assert write.bits == bits
    assert write.rule == "nft rule inet t c handle 4"


SAVED = """\
*raw
:OUTPUT ACCEPT [0:0]
COMMIT
*mangle
:INPUT ACCEPT [0:0]
:VNET-INPUT - [0:0]
-A INPUT -p tcp -j ACCEPT
-A INPUT -j VNET-INPUT
-A FORWARD -i eth0 -j VNET-INPUT
-A VNET-INPUT -j MARK --copy-xid
COMMIT
"""
INSTANCE = Path("/sys/fs/bpf/vnet/0123456789ab")
ASKED = rules.asked(datapath.wanted("module", INSTANCE, 4))


def test_ours_and_strangers_are_told_apart_in_a_saved_table():
    found = rules.read(SAVED)["mangle"]
    assert found.chains == {"VNET-INPUT": ["-A VNET-INPUT -j MARK --copy-xid"]}
    assert found.jumps == {"VNET-INPUT": [(2, "")]}
    assert found.strangers == ("-A FORWARD -i eth0 -j VNET-INPUT",)


def test_the_script_names_nothing_but_our_chains_and_jumps_and_has_the_guard_first():
    progs = f"-m bpf --object-pinned {INSTANCE}/progs"
    assert rules.script(rules.read(SAVED), ASKED).splitlines() == [
        "*raw",
        ":VNET-OUT - [0:0]",
        f"-A VNET-OUT {progs}/vnet_gate -j DROP",
        "-A VNET-OUT -m mark ! --mark 0x0/0xffff -m addrtype --src-type LOCAL "
        f"{progs}/vnet_local -j RETURN",
        f"-A VNET-OUT -m mark ! --mark 0x0/0xffff {progs}/vnet_spoof -j DROP",
        f"-I OUTPUT 1 {progs}/vnet_odd -j VNET-OUT",
        "COMMIT",
        "*mangle",
        ":VNET-POST - [0:0]",
        f"-A VNET-POST {progs}/vnet_join -j DROP",
        "-A VNET-POST -j MARK --copy-xid",
        "-D INPUT -j VNET-INPUT",
        "-I INPUT 1 -j VNET-INPUT",
        "-I POSTROUTING 1 -j VNET-POST",
        "COMMIT",
    ]
    assert rules.script(ASKED, ASKED) == ""


def test_on_the_way_down_the_guard_goes_last():
    text = rules.script(ASKED, rules.NOTHING)
    assert text.index("*mangle") < text.index("*raw")
    assert "-X VNET-OUT" in text


def test_chains_that_lead_to_each_other_are_all_emptied_before_any_goes():
    def chain(name: str, *lines: str) -> datapath.Chain:
        return datapath.Chain("mangle", "", name, lines)

    one = rules.asked([chain("VNET-POST", "-j VNET-INPUT"), chain("VNET-INPUT", "-j RETURN")])
    lines = rules.script(one, rules.NOTHING).splitlines()
    assert lines[1:3] == ["-F VNET-POST", "-F VNET-INPUT"]
    lines = rules.script(rules.NOTHING, one).splitlines()
    assert lines[1:3] == [":VNET-POST - [0:0]", ":VNET-INPUT - [0:0]"]


def test_what_differs_is_said_in_words():
    assert rules.differences(rules.read(SAVED), ASKED) == [
        "chain VNET-OUT is missing",
        "OUTPUT does not jump to VNET-OUT",
        "INPUT jumps to VNET-INPUT from place 2 instead of 1",
        "chain VNET-POST is missing",
        "POSTROUTING does not jump to VNET-POST",
    ]


def test_every_chain_of_a_data_path_is_known_to_those_who_take_it_out():
    for kind in ("module", "bpf"):
        for family in iptables.FAMILIES:
            chains = datapath.wanted(kind, INSTANCE, family)
            assert {chain.table for chain in chains} <= set(rules.TABLES)
            for chain in chains:
                assert datapath.OURS[chain.table, chain.name] == chain.base
            for chain in chains:
                if chain.base:
                    jump = datapath.is_our_jump(chain.table, chain.base, chain.jump)
                    assert jump == (chain.name, chain.condition)


def test_a_jump_on_another_s_condition_is_a_stranger_s():
    for rule in ("-p tcp -j VNET-POST", "-m mark --mark 0x1 -j VNET-POST", "-g VNET-POST"):
        assert datapath.is_our_jump("mangle", "POSTROUTING", rule) is None
    assert datapath.is_our_jump("mangle", "OUTPUT", "-j VNET-POST") is None
    assert datapath.is_our_jump("mangle", "POSTROUTING", "-j VNET-POST") == ("VNET-POST", "")


def test_a_rule_of_somebody_else_s_that_was_hit_instead_of_ours_is_put_back():
    theirs = ["-A INPUT -p udp -j ACCEPT", "-A INPUT -p tcp -j ACCEPT", "-A INPUT -p tcp -j ACCEPT"]
    ours = f"-A INPUT -m bpf --object-pinned {INSTANCE}/progs/vnet_incoming -j VNET-INPUT"

    def saved(*lines: str) -> str:
        return "\n".join(["*mangle", *lines, "COMMIT", ""])

    assert rules._lost(saved(ours, *theirs), saved(*theirs)) == ""
    assert rules._lost(saved(ours, *theirs), saved(ours, *theirs[1:])) == (
        saved("-I INPUT -p udp -j ACCEPT")
    )
    assert rules._lost(saved(ours, *theirs), saved(ours, *theirs[:2])) == (
        saved("-I INPUT -p tcp -j ACCEPT")
    )


def test_jumps_that_share_a_base_chain_are_put_there_together_and_in_order():
    wanted = rules.asked(datapath.wanted("bpf", INSTANCE, 4, containers=True))
    lines = [line for line in rules.script({}, wanted).splitlines() if "-I INPUT" in line]
    assert [line.split()[-1] for line in lines] == ["VNET-VETH", "VNET-ABOVE", "VNET-INPUT"]
    wanted["mangle"].lengths["INPUT"] = 4  # one is somebody else's
    other = rules.asked(datapath.wanted("bpf", INSTANCE.with_name("ba9876543210"), 4))
    lines = [line for line in rules.script(wanted, other).splitlines() if " INPUT " in line]
    assert lines[:3] == ["-D INPUT 3", "-D INPUT 2", "-D INPUT 1"]
    assert [line.split()[-1] for line in lines[3:]] == ["VNET-ABOVE", "VNET-INPUT"]
    assert [line.split()[2] for line in lines[3:]] == ["1", "2"]


def test_a_rule_is_taken_apart_as_python_iptables_gives_it():
    found = iptables.parsed(
        "-p tcp -m mark ! --mark 0x0/0xffff -m socket --nowildcard --restore-skmark "
        "-j CONNMARK --restore-mark --nfmask 0xffff"
    )
    assert found.protocol == "tcp"
    assert found.matches == [
        ("mark", {"mark": ["!", "0x0/0xffff"]}),
        ("socket", {"nowildcard": [], "restore-skmark": []}),
    ]
    assert (found.target, found.parameters) == (
        "CONNMARK",
        {"restore-mark": [], "nfmask": ["0xffff"]},
    )


def test_ports_are_written_as_the_kernel_writes_them():
    assert sysctls.parse_ports("80,5000-5002\n") == {80, 5000, 5001, 5002}
    assert sysctls.format_ports({5002, 80, 5001, 5000}) == "80,5000-5002"
    assert sysctls.parse_ports("\n") == set()
    many = set(range(1, 65536, 2))
    pieces = sysctls._pieces(sysctls.format_ports(many))
    assert max(map(len, pieces)) < 4096
    assert set().union(*map(sysctls.parse_ports, pieces)) == many


def test_a_state_of_the_first_version_still_says_what_to_take_away(tmp_path):
    path = tmp_path / "state.json"
    path.write_text(
        '{"since": 1, "variant": "nft", "module_loaded": true, "sysctls": {},'
        ' "made": {"4": {"table": true, "chains": ["INPUT"]}, "6": {"table": false}},'
        ' "version": 1}'
    )
    found = state.load(path)
    assert found is not None
    assert found.datapath == "module"
    assert found.made["4"] == state.Made(["mangle"], ["mangle/INPUT"])
    assert found.made["6"] == state.Made()


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('datapath = "nft"\n', "1: datapath"),
        ('\n[guard]\nmode = "off"\n', "3: guard.mode"),
        ('[guard]\nmode = "observe"\npacket_socket = "guarded"\n', "3: guard.packet_socket"),
        ("[guard\n", "1: not TOML"),
    ],
)
def test_a_bad_vnet_toml_is_refused_with_file_line_and_key(tmp_path, text, where):
    path = tmp_path / "vnet.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        nodeconfig.load(path)
    assert f"{path}:{where}: " in error.value.message


def test_vnet_toml_has_defaults_and_may_be_absent(tmp_path):
    path = tmp_path / "vnet.toml"
    assert nodeconfig.load(path) == nodeconfig.NodeConfig("auto", "enforce", "guarded")
    path.write_text('datapath = "bpf"\n[guard]\nmode = "observe"\n')
    assert nodeconfig.load(path) == nodeconfig.NodeConfig("bpf", "observe", "guarded")


def test_cgroup_v2_is_found_where_it_is_mounted():
    hybrid = (
        "30 25 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n"
        "31 30 0:27 / /sys/fs/cgroup/uni\\040fied rw - cgroup2 cgroup2 rw\n"
    )
    assert cgroups.v2_root(hybrid) == Path("/sys/fs/cgroup/uni fied")
    with pytest.raises(NodeError, match="no cgroup v2"):
        cgroups.v2_root("30 25 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n")


@pytest.mark.parametrize("path", ["", "a", "/", "//", "/a/../b", "/./a", "/a//b", "/a\0", "/a\n/b"])
def test_paths_that_cannot_be_a_slice_are_refused(path):
    assert cgroups.problem(path)


def test_a_path_has_one_way_to_be_written():
    assert not cgroups.problem("/a/b/")
    assert cgroups.normal("/a/b/") == "/a/b"
    assert cgroups.parents("/a/b/c") == ["/", "/a", "/a/b"]


@pytest.mark.parametrize(
    ("said", "reason", "cure"),
    [
        ("Module xt_copyxid not found in directory /lib/modules/6.1", "not built", "headers"),
        ("could not insert: Key was rejected by service", "Secure Boot", "mokutil"),
        ("could not insert: Exec format error", "another kernel", "again"),
        ("could not insert: Operation not permitted", "no more modules", "modules_disabled"),
        ("something else", "something else", "dmesg"),
    ],
)
def test_why_the_module_cannot_load_is_said_with_a_cure(said, reason, cure):
    error = module._explain(said)
    assert reason in error.message
    assert cure in error.cure


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from vnet.cli import cli\n"
        "heavy = {'pyroute2', 'duckdb', 'numpy', 'rich', 'msgspec', 'sqlite3', 'scapy', 'iptc',"
        " 'cffi', 'vnet._abi', 'vnet._bpf'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def unit(name):
    parser = configparser.RawConfigParser(strict=False, allow_no_value=True)
    parser.optionxform = str
    parser.read_string((ROOT / "systemd" / name).read_text())
    return parser


UNITS = ("vnet.service", "vnet-watch.service", "netflow.service", "netflow-serve.service",
         "netflow-export@.service")  # fmt: skip


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_sandboxed_and_says_what_it_runs(name):
    service = unit(name)["Service"]
    assert service["ProtectSystem"] == "strict"
    assert service["NoNewPrivileges"] == "yes"
    # It may load a module anyhow; the ones that stay running may do less.
    has_it = "CAP_SYS_ADMIN" in service["CapabilityBoundingSet"]
    assert has_it == (name == "vnet.service")
    assert service["ExecStart"].split()[0] in ("vnet", "netflow")


def test_node_init_is_ordered_before_the_network_and_may_load_modules():
    parser = unit("vnet.service")
    assert parser["Unit"]["Before"].split()[0] == "network-pre.target"
    assert "network-pre.target" in parser["Unit"]["Wants"]
    service = parser["Service"]
    assert (service["Type"], service["RemainAfterExit"]) == ("oneshot", "yes")
    assert (service["ExecStart"], service["ExecStop"]) == ("vnet up", "vnet down")
    assert service["ProtectKernelModules"] == "no"
    assert service["ProtectKernelTunables"] == "no"
    assert "CAP_SYS_MODULE" in service["CapabilityBoundingSet"]


@pytest.mark.parametrize("name", UNITS)
def test_systemd_has_nothing_to_say_against_a_unit(name, tmp_path):
    import shutil

    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    # It wants the programs to exist: they do on a node that has vnet installed.
    text = (ROOT / "systemd" / name).read_text()
    for word in ("vnet", "netflow"):
        text = text.replace(f"={word} ", "=/bin/true ")
    (tmp_path / name).write_text(text)
    for other in UNITS:
        if other != name:
            (tmp_path / other).write_text("[Service]\nType=oneshot\nExecStart=/bin/true\n")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / name)],
        capture_output=True,
        text=True,
    )
    said = [line for line in done.stderr.splitlines() if name in line]
    assert said == []


@pytest.mark.parametrize("line", ["rubbish", "\x00" * 40, "[1]", '{"how": 1}', "\udcff"])
def test_a_damaged_journal_is_one_clear_error_and_nothing_is_undone(tmp_path, line):
    paths = Paths(tmp_path / "etc", tmp_path / "lib", tmp_path, tmp_path / "bpf")
    paths.state.write_text("as it is")
    first = '{"step": "state", "before": null}'
    content = "\n".join([first, line, first, ""]).encode(errors="surrogateescape")
    paths.journal.write_bytes(content)
    with pytest.raises(NodeError, match=f"^{paths.journal}:2: no line of a journal") as caught:
        steps.undo(paths)
    assert f"move {paths.journal} away, then `vnet down`" in caught.value.cure
    assert (paths.state.read_text(), paths.journal.read_bytes()) == ("as it is", content)


def test_a_journal_of_another_version_is_undone_as_far_as_it_is_known_and_stays(tmp_path):
    paths = Paths(tmp_path / "etc", tmp_path / "lib", tmp_path, tmp_path / "bpf")
    paths.state.write_text("as it is")
    paths.journal.write_text('{"step": "state", "before": null}\n{"step": "later"}\n')
    with pytest.raises(NodeError, match="later: another version of vnet has begun that"):
        steps.undo(paths)
    assert not paths.state.exists()
    assert paths.journal.exists()
