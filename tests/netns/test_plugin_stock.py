"""The iptables plugin on a kernel without the module: stock options as stock's, ours refused."""

import re
import shlex

import pytest
from plugin_rules import (
    COPY_XID,
    VARIANTS,
    Line,
    expected_after,
    lines,
    listings,
    ours,
    restore_file,
    saved_rules,
    saved_tables,
    stock,
    undated,
)
from vnet.testing import net

pytestmark = pytest.mark.netns

STOCK_OK = [line for line in lines() if line.ok and line.is_stock]
STOCK_FAIL = [line for line in lines() if not line.ok and line.is_stock]
OURS_OK = [line for line in lines() if line.ok and not line.is_stock]
OURS_FAIL = [line for line in lines() if not line.ok and not line.is_stock]

MISSING = re.compile(
    r"\S+ v\S+ \((legacy|nf_tables)\): MARK: --copy-xid needs the kernel module xt_copyxid, "
    r"which is not loaded: run 'modprobe xt_copyxid' "
    r"\(build and install it first with 'make module' or DKMS\)\n"
)


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def _append(ns: net.Namespace, variant: str, line: Line, env: dict[str, str]):
    return ns.run(
        variant, "-t", line.table, "-A", line.chains[0], *line.words, env=env, check=False
    )


def test_each_stock_rule_is_saved_checked_and_deleted_as_written(ns, variant):
    for line in STOCK_OK:
        at = [variant, "-t", line.table]
        hook = line.chains[0]
        done = _append(ns, variant, line, ours())
        assert (done.returncode, done.stderr) == (0, ""), line.where
        listed = ns.run(*at, "-S", hook, env=ours()).stdout
        assert saved_rules(listed) == [f"-A {hook} {line.saved}"], line.where
        ns.run(*at, "-C", hook, *line.words, env=ours())
        ns.run(*at, "-D", hook, *shlex.split(line.saved), env=ours())
        assert saved_rules(ns.run(*at, "-S", env=ours()).stdout) == [], line.where


def test_each_bad_stock_rule_is_refused_in_the_words_of_stock(ns, variant):
    for line in STOCK_FAIL:
        done = _append(ns, variant, line, ours())
        same = _append(ns, variant, line, stock())
        assert done.returncode == same.returncode == 2, line.where
        if line.rule != "-j MARK":  # where ours names --copy-xid too
            assert done.stderr == same.stderr, line.where
        assert saved_rules(ns.run(variant, "-t", line.table, "-S").stdout) == [], line.where


def test_a_rule_without_an_option_is_told_of_all_of_them(ns, variant):
    done = ns.run(variant, "-A", "OUTPUT", "-j", "MARK", env=ours(), check=False)
    assert done.returncode == 2
    assert "MARK: One of the --set-xmark, --{and,or,xor,set}-mark or --copy-xid" in done.stderr


def test_listings_of_stock_rules_are_those_of_stock_byte_for_byte(variant):
    said = []
    for writer in (ours(), stock()):
        with net.namespace() as ns:
            ns.run(f"{variant}-restore", env=writer, input=restore_file(STOCK_OK))
            for reader in (ours(), stock()):
                said.append(listings(ns, variant, reader))
    assert said[0] == said[1] == said[2] == said[3]
    assert saved_rules(said[0]["-S"]) == expected_after(STOCK_OK)["mangle"]
    assert saved_tables(said[0]["save"]) == expected_after(STOCK_OK)


def test_a_save_restored_is_the_same_save(ns, variant):
    ns.run(f"{variant}-restore", env=ours(), input=restore_file(STOCK_OK))
    before = ns.run(f"{variant}-save", env=ours()).stdout
    ns.run(variant, "-t", "mangle", "-F", env=ours())
    ns.run(f"{variant}-restore", env=ours(), input=before)
    again = ns.run(f"{variant}-save", env=ours()).stdout
    assert saved_tables(again) == saved_tables(before) == expected_after(STOCK_OK)


def test_copy_xid_without_the_module_is_refused_in_one_line_that_names_the_cure(ns, variant):
    for line in OURS_OK:
        done = _append(ns, variant, line, ours())
        assert done.returncode == 1, line.where
        assert MISSING.fullmatch(done.stderr), done.stderr
        assert saved_rules(ns.run(variant, "-t", line.table, "-S").stdout) == []


def test_copy_xid_with_anything_more_is_refused(ns, variant):
    for line in OURS_FAIL:
        done = _append(ns, variant, line, ours())
        assert done.returncode != 0, line.where
        assert "copy-xid" in done.stderr, line.where
        assert saved_rules(ns.run(variant, "-t", line.table, "-S").stdout) == []


def test_a_restore_with_copy_xid_in_it_changes_nothing(ns, variant):
    ns.run(variant, "-t", "mangle", "-A", "INPUT", "-j", "MARK", "--set-mark", "7", env=ours())
    before = ns.run(variant, "-t", "mangle", "-S", env=ours()).stdout
    for flags in ([], ["--noflush"]):
        text = f"*mangle\n-A OUTPUT -j MARK --set-mark 1\n-A INPUT -j MARK {COPY_XID}\nCOMMIT\n"
        done = ns.run(f"{variant}-restore", *flags, env=ours(), input=text, check=False)
        assert done.returncode == 1
        assert done.stderr.count("needs the kernel module xt_copyxid") == 1
        assert ns.run(variant, "-t", "mangle", "-S", env=ours()).stdout == before


def test_many_rules_in_one_process_bring_no_warning(ns, variant):
    rules = [f"-A OUTPUT -j MARK --set-xmark {hex(i)}/0xff\n" for i in range(1, 200)]
    text = f"*mangle\n{''.join(rules)}COMMIT\n"
    done = ns.run(f"{variant}-restore", env=ours(), input=text)
    assert done.stdout + done.stderr == ""
    listed = ns.run(variant, "-t", "mangle", "-S", env=ours())
    assert len(saved_rules(listed.stdout)) == 199
    assert listed.stderr == ""


def test_help_is_that_of_stock_and_one_line_more(ns, variant):
    said = [ns.run(variant, "-j", "MARK", "--help", env=env).stdout for env in (stock(), ours())]
    assert said[1].startswith(said[0])
    assert re.fullmatch(r"  --copy-xid {16}\S.*\n", said[1].removeprefix(said[0]))


@pytest.mark.parametrize("translate", ["iptables-translate", "ip6tables-translate"])
def test_stock_rules_translate_as_stock_does(ns, translate):
    for line in STOCK_OK:
        words = [translate, "-t", line.table, "-A", line.chains[0], *line.words]
        said = [ns.run(*words, env=env).stdout for env in (ours(), stock())]
        assert said[0] == said[1] != "", line.where
        assert "meta mark set" in said[0], line.where


@pytest.mark.parametrize("command", ["iptables-nft", "iptables-legacy"])
def test_a_process_without_privilege_gets_the_help_and_no_crash(ns, command):
    words = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    said = [ns.run(*words, command, "-j", "MARK", "--help", env=env) for env in (stock(), ours())]
    assert said[1].stdout.startswith(said[0].stdout)
    # Not one line more than stock's own about what could not be asked.
    assert said[1].stderr.count("\n") == said[0].stderr.count("\n")


def test_arptables_lists_and_deletes_as_with_stock():
    rules = [
        ["--set-mark", "5"],
        ["--and-mark", "ff00"],
        ["--or-mark", "0x10"],
        ["--set-mark", "0"],
    ]
    said = []
    for env in (ours(), stock()):
        with net.namespace() as ns:
            for rule in rules:
                ns.run("arptables", "-A", "OUTPUT", "-j", "MARK", *rule, env=env)
            bad = ns.run(
                "arptables", "-A", "OUTPUT", "-j", "MARK", "--or-mark", "x", env=env, check=False
            )
            twice = ["--and-mark", "1", "--or-mark", "1"]
            two = ns.run("arptables", "-A", "OUTPUT", "-j", "MARK", *twice, env=env, check=False)
            said.append(
                [
                    undated(ns.run("arptables-save", env=env).stdout),
                    ns.run("arptables", "-L", "-v", "-n", env=env).stdout,
                    ns.run("arptables", "-j", "MARK", "--help", env=env).stdout,
                    (bad.returncode, bad.stderr),
                    (two.returncode, two.stderr),
                ]
            )
            for rule in rules:
                ns.run("arptables", "-D", "OUTPUT", "-j", "MARK", *rule, env=env)
    assert said[0] == said[1]
