"""python-iptables with the plugin, on a kernel without the module: it reads, and survives."""

import json
import sys
from textwrap import dedent

import pytest
from plugin_rules import ours

pytestmark = pytest.mark.netns

READ = dedent("""
    import iptc, json
    said = {}
    for table, name in ((iptc.Table, "v4"), (iptc.Table6, "v6"), (iptc.Table, "v4 again")):
        mangle = table(table.MANGLE)
        mangle.refresh()
        said[name] = [
            [rule.target.name, rule.target.get_all_parameters()]
            for rule in iptc.Chain(mangle, "OUTPUT").rules
        ]
    print(json.dumps(said))
""")

REFUSE = dedent("""
    import iptc
    rule = iptc.Rule()
    target = rule.create_target("MARK")
    try:
        target.copy_xid = ""
    except iptc.XTablesError as error:
        print("refused:", error)
    target = iptc.Rule().create_target("MARK")
    target.set_xmark = "0x1/0xff"
    print(target.get_all_parameters())
""")


def test_python_iptables_reads_the_rules_of_both_families(ns):
    for command in ("iptables-legacy", "ip6tables-legacy"):
        for option in ("--set-mark 1", "--or-mark 0x10", "--set-xmark 0xfe/0xff"):
            words = f"{command} -t mangle -A OUTPUT -j MARK {option}"
            ns.run(*words.split(), env=ours())
    done = ns.run(sys.executable, "-c", READ, env=ours())
    rules = [
        ["MARK", {"set-xmark": ["0x1/0xffffffff"]}],
        ["MARK", {"set-xmark": ["0x10/0x10"]}],
        ["MARK", {"set-xmark": ["0xfe/0xff"]}],
    ]
    assert json.loads(done.stdout) == {"v4": rules, "v6": rules, "v4 again": rules}
    assert done.stderr == ""


def test_a_refused_option_is_an_exception_and_the_process_goes_on(ns):
    done = ns.run(sys.executable, "-c", REFUSE, env=ours())
    assert done.stdout.startswith("refused:")
    assert done.stdout.endswith("{'set-xmark': ['0x1/0xff']}\n")
