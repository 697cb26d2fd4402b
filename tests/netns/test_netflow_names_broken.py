"""vnet's registry gone bad: records go on without names, and names come back with it."""

import re

import pytest
from netflowbed import accounting, collector, connmark
from vnet.testing.apps import start

from vnet import registry

pytestmark = pytest.mark.netns

A = 256


@pytest.fixture
def node(ns):
    accounting(ns, lasting=600)
    connmark(ns, A)
    with start(ns, "udp-recv", bind="127.0.0.1", port=9):
        yield ns


def datagram(ns, port):
    options = {"to": "127.0.0.1", "port": 9, "from_port": port}
    with start(ns, "udp-send", count=1, size=100, **options) as sender:
        sender.result()


def enroll(path):
    registry.assign(path, [registry.Request("princeton_codeen", A)], 0)


def names(flows):
    return {row["sport"]: row["originator"]["slice"] for row in flows.records()}


def scribble(path, where):
    """Other bytes in the middle of a file, as a bad disk would leave them."""
    data = bytearray(path.read_bytes())
    at = {"header": 0, "pages": len(data) // 2}[where]
    data[at : at + 2048] = b"\xa5" * 2048
    path.write_bytes(data)


def warnings(base):
    return re.findall(r"cannot read names from .*", (base / "collector.log").read_text())


@pytest.mark.parametrize("where", ["header", "pages"])
def test_a_registry_that_is_scribbled_over_costs_names_and_no_record(node, tmp_path, where):
    path = tmp_path / "registry.db"
    enroll(path)
    whole = path.read_bytes()
    with collector(node, tmp_path) as flows:
        datagram(node, 4000)
        assert names(flows) == {4000: "princeton_codeen"}
        scribble(path, where)
        datagram(node, 4001)
        told = names(flows)
        assert set(told) == {4000, 4001}
        assert set(told.values()) <= {None, "princeton_codeen"}
        if where == "header":
            assert set(told.values()) == {None}
            assert warnings(tmp_path)
        assert flows.status()["pid"]

        path.unlink()
        path.write_bytes(whole)
        datagram(node, 4002)
        assert names(flows) == dict.fromkeys((4000, 4001, 4002), "princeton_codeen")
        assert flows.stop() == 0
    assert "Traceback" not in (tmp_path / "collector.log").read_text()


def test_a_collector_starts_with_a_registry_that_cannot_be_read_and_says_so(node, tmp_path):
    path = tmp_path / "registry.db"
    path.write_bytes(b"this is no registry" * 500)
    with collector(node, tmp_path) as flows:
        datagram(node, 4000)
        assert names(flows) == {4000: None}
        assert flows.records()[0]["originator"]["xid"] == A
        assert "file is not a database" in warnings(tmp_path)[0]
        path.unlink()
        assert names(flows) == {4000: None}
        enroll(path)
        assert names(flows) == {4000: "princeton_codeen"}
