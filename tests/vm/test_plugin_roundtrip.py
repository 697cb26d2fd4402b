"""The iptables plugin with the real module: what it stores, lists, saves and restores.

The kernels take the four commands by turns, and the tests of one command: what
the plugin writes is the same in both (and what it does without the module is
tried with all four in tests/netns/test_plugin_stock.py).
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import pytest
from plugin_rules import (
    COPY_XID,
    TABLES,
    expected_after,
    lines,
    listings,
    ours,
    restore_file,
    saved_rules,
    saved_tables,
    stock,
)
from testbed import vm
from vnet.testing import net
from vnet.testing.poll import until

pytestmark = pytest.mark.vm

OK = [line for line in lines() if line.ok]
STOCK_OK = [line for line in OK if line.is_stock]
OURS_OK = [line for line in OK if not line.is_stock]
OURS_FAIL = [line for line in lines() if not line.ok and not line.is_stock]

USERS = Path("/sys/module/xt_copyxid/refcnt")


@pytest.fixture(autouse=True)
def loaded() -> None:
    """The module is there; tests of others may hold on to it, so it is not unloaded here."""
    subprocess.run(["modprobe", "-a", "xt_copyxid", "xt_mark"], check=True)


def _rmmod(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["rmmod", name], capture_output=True, text=True)


def _users() -> int:
    return int(USERS.read_text())


#: legacy and nft, by the family's command
BACKENDS = {
    "6.1": {"iptables": "legacy", "ip6tables": "nft"},
    "6.12": {"iptables": "nft", "ip6tables": "legacy"},
}
BACKEND = BACKENDS.get(vm.running_series(), BACKENDS["6.1"])


@pytest.fixture(params=["iptables", "ip6tables"])
def variant(request):
    return f"{request.param}-{BACKEND[request.param]}"


def test_every_rule_is_saved_as_written_and_restored_as_saved(ns, variant):
    ns.run(f"{variant}-restore", env=ours(), input=restore_file(OK))
    done = ns.run(f"{variant}-save", env=ours())
    saved = done.stdout
    assert saved_tables(saved) == expected_after(OK)
    assert done.stderr == ""
    listed = ns.run(variant, "-t", "mangle", "-S", env=ours()).stdout
    assert saved_rules(listed) == expected_after(OK)["mangle"]
    with net.namespace() as other:
        other.run(f"{variant}-restore", env=ours(), input=saved)
        again = other.run(f"{variant}-save", env=ours()).stdout
    assert saved_tables(again) == saved_tables(saved)


def test_every_rule_is_deleted_as_written(ns, variant):
    appended = restore_file(OK)
    deleted = appended.replace("\n-A ", "\n-D ")
    ns.run(f"{variant}-restore", env=ours(), input=appended)
    ns.run(f"{variant}-restore", "--noflush", env=ours(), input=deleted)
    assert saved_rules(ns.run(f"{variant}-save", env=ours()).stdout) == []


@pytest.mark.parametrize("table", TABLES)
def test_copy_xid_is_appended_checked_listed_and_deleted_by_command(ns, variant, table):
    line = next(line for line in OURS_OK if line.table == table and "-p" not in line.words)
    at, rule = [variant, "-t", table], [line.chains[-1], *line.words]
    done = ns.run(*at, "-A", *rule, env=ours())
    assert done.stdout + done.stderr == ""
    ns.run(*at, "-C", *rule, env=ours())
    listed = ns.run(*at, "-L", rule[0], "-n", env=ours()).stdout
    assert re.search(r"^MARK .* MARK copy-xid$", listed, re.MULTILINE), listed
    ns.run(*at, "-D", *rule, env=ours())
    assert ns.run(*at, "-C", *rule, env=ours(), check=False).returncode == 1


def test_the_announced_command_works_as_it_stands(ns):
    words = "iptables -t nat -A POSTROUTING -j MARK --copy-xid"
    ns.run(*words.split(), env=ours())
    listed = ns.run("iptables", "-t", "nat", "-S", "POSTROUTING", env=ours()).stdout
    assert listed == "-P POSTROUTING ACCEPT\n-A POSTROUTING -j MARK --copy-xid\n"


def test_copy_xid_is_told_from_the_other_options(ns, variant):
    at = [variant, "-t", "mangle"]
    ns.run(*at, "-A", "OUTPUT", "-j", "MARK", "--set-mark", "1", env=ours())
    check = [*at, "-C", "OUTPUT", "-j", "MARK", COPY_XID]
    assert ns.run(*check, env=ours(), check=False).returncode == 1
    ns.run(*at, "-A", "OUTPUT", "-j", "MARK", COPY_XID, env=ours())
    ns.run(*at, "-D", "OUTPUT", "-j", "MARK", "--set-mark", "1", env=ours())
    listed = ns.run(*at, "-S", "OUTPUT", env=ours()).stdout
    assert saved_rules(listed) == [f"-A OUTPUT -j MARK {COPY_XID}"]


@pytest.mark.parametrize("command", ["iptables-legacy", "ip6tables-nft"])
def test_copy_xid_with_a_set_option_is_refused_by_name(ns, command):
    for line in OURS_FAIL:
        done = ns.run(command, "-t", "mangle", "-A", "INPUT", *line.words, env=ours(), check=False)
        assert done.returncode == 2, line.where
        other = re.search(r"--(set-x?mark|and-mark|or-mark|xor-mark)", line.rule)
        if other:
            assert f'"{other[0]}" cannot be used together with "{COPY_XID}"' in done.stderr
    assert saved_rules(ns.run(command, "-t", "mangle", "-S").stdout) == []


def test_a_restore_with_a_bad_line_changes_nothing(ns, variant):
    ns.run(variant, "-t", "mangle", "-A", "INPUT", "-j", "MARK", COPY_XID, env=ours())
    before = ns.run(variant, "-t", "mangle", "-S", env=ours()).stdout
    text = (
        f"*mangle\n-A OUTPUT -j MARK {COPY_XID}\n-A INPUT -j MARK {COPY_XID} --or-mark 1\nCOMMIT\n"
    )
    done = ns.run(f"{variant}-restore", env=ours(), input=text, check=False)
    assert done.returncode == 2
    assert "line: 3" in done.stderr
    assert ns.run(variant, "-t", "mangle", "-S", env=ours()).stdout == before


def test_listings_of_stock_rules_are_those_of_stock_whoever_wrote_them(variant):
    said = []
    for writer in (ours(), stock()):
        with net.namespace() as ns:
            ns.run(f"{variant}-restore", env=writer, input=restore_file(STOCK_OK))
            for reader in (ours(), stock()):
                said.append(listings(ns, variant, reader))
    assert said[0] == said[1] == said[2] == said[3]


def test_rules_with_stock_options_do_not_hold_the_module(ns, variant):
    until(lambda: _users() == 0, what="no rule of another test")
    ns.run(f"{variant}-restore", env=ours(), input=restore_file(STOCK_OK))
    assert _users() == 0


def test_rules_written_by_stock_can_be_deleted_with_ours(ns, variant):
    for line in STOCK_OK[:3]:
        at = [variant, "-t", line.table]
        ns.run(*at, "-A", line.chains[0], *line.words, env=stock())
        ns.run(*at, "-D", line.chains[0], *line.words, env=ours())
        assert saved_rules(ns.run(*at, "-S", env=ours()).stdout) == [], line.where


def test_the_stock_plugin_shows_a_copy_xid_rule_as_the_manual_says(ns, variant):
    ns.run(variant, "-t", "mangle", "-A", "INPUT", "-j", "MARK", COPY_XID, env=ours())
    shown = saved_rules(ns.run(variant, "-t", "mangle", "-S", env=stock()).stdout)
    legacy = "-A INPUT -j MARK [unsupported revision]"
    assert shown == [legacy if "legacy" in variant else "-A INPUT -j MARK --set-xmark 0x0/0x0"]


def test_the_module_cannot_be_unloaded_while_a_rule_uses_it(ns, variant):
    until(lambda: _users() == 0, what="no rule of another test")
    ns.run(variant, "-t", "mangle", "-A", "INPUT", "-j", "MARK", COPY_XID, env=ours())
    refused = _rmmod("xt_copyxid")
    assert refused.returncode != 0 and "in use" in refused.stderr
    ns.run(variant, "-t", "mangle", "-D", "INPUT", "-j", "MARK", COPY_XID, env=ours())
    # nf_tables destroys a deleted rule after a grace period, not at once
    until(lambda: _users() == 0, what="nothing uses xt_copyxid any more")


def test_help_is_printed_once(ns, variant):
    said = ns.run(variant, "-j", "MARK", "--help", env=ours()).stdout
    assert said.count("MARK target options:") == 1
    assert said.count(COPY_XID) == 1


@pytest.mark.kernels("6.1")
@pytest.mark.parametrize("command", ["iptables-nft", "iptables-legacy"])
def test_a_process_without_privilege_gets_the_help_and_no_more_noise_than_with_stock(ns, command):
    words = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", command]
    said = [ns.run(*words, "-j", "MARK", "--help", env=env) for env in (stock(), ours())]
    assert said[1].stdout.startswith(said[0].stdout)
    assert said[1].stderr.count("\n") == said[0].stderr.count("\n")
    tried = ns.run(*words, "-A", "INPUT", "-j", "MARK", COPY_XID, env=ours(), check=False)
    assert tried.returncode != 0
    assert "xt_copyxid" not in tried.stderr  # it is permission that is missing


@pytest.mark.kernels("6.1")
@pytest.mark.parametrize("translate", ["iptables-translate", "ip6tables-translate"])
def test_translation_knows_stock_rules_and_shows_copy_xid_as_a_comment(ns, translate):
    for line in STOCK_OK[:2]:
        words = [translate, "-t", line.table, "-A", line.chains[0], *line.words]
        assert ns.run(*words, env=ours()).stdout == ns.run(*words, env=stock()).stdout
    words = ["-t", "nat", "-A", "POSTROUTING", "-j", "MARK", COPY_XID]
    said = ns.run(translate, *words, env=ours()).stdout
    assert said == f"nft # {' '.join(words)} \n"


# The import looks for its own library with gcc and ld, eight times over, where it finds them.
PYTHON = dedent("""
    import json, os
    os.environ["PATH"] = "/"
    import iptc
    said = {}
    for table, rule, name in (
        (iptc.Table, iptc.Rule, "iptables-legacy"), (iptc.Table6, iptc.Rule6, "ip6tables-legacy")
    ):
        listed = iptc.Chain(table(table.MANGLE), "OUTPUT")
        written = rule()
        written.create_target("MARK").set_xmark = "0x1/0xff"
        listed.append_rule(written)
        said[name] = [
            [each.target.get_all_parameters(), each.target.target.u.user.revision]
            for each in listed.rules
        ]
    print(json.dumps(said))
""")


@pytest.mark.kernels("6.1")
def test_python_iptables_reads_both_revisions_and_writes_stock_rules(ns):
    for command in ("iptables-legacy", "ip6tables-legacy"):
        ns.run(command, "-t", "mangle", "-A", "OUTPUT", "-j", "MARK", COPY_XID, env=ours())
        ns.run(command, "-t", "mangle", "-A", "OUTPUT", "-j", "MARK", "--or-mark", "2", env=ours())
    done = ns.run(sys.executable, "-c", PYTHON, env=ours(), timeout=200)
    expected = [
        [{"copy-xid": []}, 128],
        [{"set-xmark": ["0x2/0x2"]}, 2],
        [{"set-xmark": ["0x1/0xff"]}, 2],
    ]
    said = json.loads(done.stdout)
    assert said == {"iptables-legacy": expected, "ip6tables-legacy": expected}
    for command in said:
        listed = ns.run(command, "-t", "mangle", "-S", "OUTPUT", env=stock()).stdout
        assert saved_rules(listed)[-1] == "-A OUTPUT -j MARK --set-xmark 0x1/0xff"


@contextmanager
def _without_xt_mark() -> Iterator[None]:
    deny = Path("/run/modprobe.d/no-xt-mark.conf")
    deny.parent.mkdir(exist_ok=True)
    deny.write_text("install xt_mark /bin/false\n")
    try:
        until(lambda: not Path("/sys/module/xt_mark").exists() or _rmmod("xt_mark").returncode == 0)
        yield
    finally:
        deny.unlink()
        subprocess.run(["modprobe", "xt_mark"], check=True)


def test_where_the_kernel_lacks_the_stock_target_ours_does_its_work(variant):
    with _without_xt_mark(), net.namespace() as ns:
        ns.run(f"{variant}-restore", env=ours(), input=restore_file(OK))
        saved = ns.run(f"{variant}-save", env=ours()).stdout
        assert saved_tables(saved) == expected_after(OK)
        at = [variant, "-t", "raw"]
        ns.run(*at, "-D", "OUTPUT", "-j", "MARK", "--set-mark", "1", env=ours())
        listed = ns.run(*at, "-S", "OUTPUT", env=ours()).stdout
        assert saved_rules(listed) == [f"-A OUTPUT -j MARK {COPY_XID}"]
