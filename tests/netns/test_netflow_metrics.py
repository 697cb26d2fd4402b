"""Metrics of a live collector, as Prometheus reads them."""

import json
import re
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import vnetbed
from askersbed import ALICE, collecting
from ipfixbed import leave, receiver
from netflowbed import NETFLOW, as_uid
from prometheus_client.parser import text_string_to_metric_families
from servebed import free_port, serving
from vnet.testing.net import HERE
from vnet.testing.poll import until

from vnet import bpf

pytestmark = pytest.mark.netns


@pytest.fixture(scope="module")
def flows():
    with collecting() as made:
        yield made


def samples(text):
    """{(name, labels' values by their names' order): value}"""
    return {
        (one.name, *(one.labels[key] for key in sorted(one.labels))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def test_each_slice_has_its_traffic_by_direction(flows):
    found = samples(flows.cli("metrics").stdout)
    assert found["netflow_up",] == 1
    assert found["netflow_slice_flows_total", "out", "mine"] == 2
    assert found["netflow_slice_flows_total", "in", "mine"] == 0
    assert found["netflow_slice_flows_total", "in", "yours"] == 1
    assert found["netflow_slice_packets_total", "in", "yours"] == 1
    assert found["netflow_slice_bytes_total", "out", "mine"] == 2 * (10 + 28)
    assert found["netflow_live_connections",] == 3
    assert found["netflow_conntrack_entries",] == 3
    assert found["netflow_gaps_total", "overrun"] == 0
    assert found["netflow_store_records", "hot"] >= 3
    assert found["netflow_start_time_seconds",] < found["netflow_recorded_time_seconds",]


def test_counters_go_up_and_not_back(flows):
    first = samples(flows.cli("metrics").stdout)
    flows.records()
    second = samples(flows.cli("metrics").stdout)
    for key, value in first.items():
        if key[0].endswith("_total"):
            assert second[key] >= value, key


def test_metrics_are_the_desks(flows):
    words = as_uid(ALICE, *NETFLOW, "metrics", "--socket", flows.socket)
    done = HERE.run(*words, env={"PYTHONDONTWRITEBYTECODE": "1"}, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "about its flows only" in done.stderr


def test_a_file_of_metrics_is_replaced_whole(flows, tmp_path):
    file = tmp_path / "netflow.prom"
    flows.cli("metrics", "--write", str(file))
    assert samples(file.read_text())["netflow_up",] == 1
    assert list(tmp_path.iterdir()) == [file]
    done = flows.cli("metrics", "--write", str(tmp_path / "none" / "x"), check=False)
    assert done.returncode == 1
    assert "cannot write" in done.stderr


@pytest.fixture(scope="module")
def exported(flows):
    """Where positions are: of a receiver that got all, and a file that is none."""
    taker, where = receiver(), flows.base / "exports"
    where.mkdir()
    (where / "broken-4739-udp").write_text("{")
    to = ["--to", f"127.0.0.1:{taker.port}", "--transport", "tcp", "--begin", "oldest"]
    flows.cli("export", *to, "--once", "--position", str(where / "desk-4739-tcp"))
    yield where
    leave(taker)


def test_what_was_exported_is_counted_by_receiver(flows, exported):
    progress = json.loads((exported / "desk-4739-tcp").read_text())
    found = samples(flows.cli("metrics", "--export-dir", str(exported)).stdout)
    counts = {name: value for (name, *to), value in found.items() if to == ["desk-4739-tcp"]}
    assert counts == {
        "netflow_export_records_total": progress["records"],
        "netflow_export_messages_total": progress["messages"],
        "netflow_export_sessions_total": 1,
        "netflow_export_again_total": 0,
        "netflow_export_lost_total": 0,
        "netflow_export_refused_total": 0,
        "netflow_export_saved_time_seconds": pytest.approx(progress["saved"] / 1e9),
    }
    assert progress["records"] >= 3
    assert not any("broken" in "".join(labels) for _, *labels in found)
    assert found["netflow_store_full_since_seconds",] == 0


def test_without_a_collector_it_is_said_to_be_down(tmp_path):
    done = HERE.run(*NETFLOW, "metrics", "--socket", str(tmp_path / "none"))
    assert samples(done.stdout)["netflow_up",] == 0


@pytest.mark.skipif(bool(bpf.lacking()), reason="this kernel cannot run the eBPF programs")
def test_what_the_guard_refused_is_counted_by_slice_and_kind(ns, slices, tmp_path):
    with vnetbed.bpf_node(ns, tmp_path) as node:
        (tmp_path / "config" / "slices.toml").write_text(f"""
[[slice]]
name = "a"
cgroups = ["{slices.a.rel}"]
grants = {{ ports = ["tcp/80"] }}
[[slice]]
name = "b"
cgroups = ["{slices.b.rel}"]
""")
        paths = ["--run-dir", str(node.paths.run_dir), "--state-dir", str(node.paths.state_dir)]

        def found():
            words = [*NETFLOW, "metrics", "--socket", str(tmp_path / "none"), *paths]
            return samples(HERE.run(*words).stdout)

        assert not any(name.startswith("vnet_") for name, *_ in found())
        node.vnet("up", "--datapath", "bpf", "--variant", "nft")
        bind = "import socket; socket.socket().bind(('', 80))"
        for _ in range(2):
            ns.run("/usr/bin/python3", "-c", bind, cgroup=slices.b, check=False)
        ns.run("/usr/bin/python3", "-c", bind, cgroup=slices.a)
        counted = {key: value for key, value in found().items() if key[0].startswith("vnet_")}
        assert counted == {
            ("vnet_refusals_total", "bind", "b"): 2,
            ("vnet_observed_total", "bind", "b"): 0,
        }


# -- what others read by these names ---------------------------------------------------

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"\b(?:netflow|vnet)_[a-z_]+\b")


def names(text):
    """The metrics of a live collector, and the guard's, which only a node that is up has."""
    families = text_string_to_metric_families(text)
    given = {one.name for family in families for one in family.samples}
    return given | {"vnet_refusals_total", "vnet_observed_total"}


def test_the_dashboard_shows_metrics_that_there_are_and_all_of_them(flows, exported):
    dashboard = json.loads((ROOT / "docs/grafana/netflow.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    found = set(NAME.findall(" ".join(shown)))
    there = names(flows.cli("metrics", "--export-dir", str(exported)).stdout)
    assert found - there == set()
    assert there - found == {"netflow_node_info"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"


@contextmanager
def prometheus(base, port):
    """A Prometheus server of Debian's that scrapes a port here; its own port."""
    own = free_port()
    (base / "prometheus.yml").write_text(f"""
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - {{job_name: netflow, static_configs: [{{targets: ["127.0.0.1:{port}"]}}]}}
""")
    words = ["prometheus", f"--config.file={base}/prometheus.yml",
             f"--storage.tsdb.path={base}/tsdb",
             f"--web.listen-address=127.0.0.1:{own}"]  # fmt: skip
    with (base / "prometheus.log").open("w") as log:
        process = HERE.popen(*words, stdout=log, stderr=log)
    try:
        yield own
    finally:
        process.terminate()
        process.wait(60)


def evaluate(port, expression, at):
    """What Prometheus makes of an expression at a time: (labels, value) of each series."""
    query = urlencode({"query": expression, "time": at})
    with urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=60) as answer:
        found = json.load(answer)
    assert found["status"] == "success", found
    return [(one["metric"], float(one["value"][1])) for one in found["data"]["result"]]


def test_a_prometheus_server_scrapes_it_and_the_dashboard_has_data(flows, exported, tmp_path):
    listening = free_port()
    options = ["--listen-metrics", f"127.0.0.1:{listening}", "--export-dir", str(exported)]
    dashboard = json.loads((ROOT / "docs/grafana/netflow.json").read_text())
    shown = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    with serving(tmp_path, flows.socket, *options), prometheus(tmp_path, listening) as server:

        def scraped():
            """When the last scrape was that was answered in time, if there were two.

            Its own time: whatever is asked for that, a scrape that goes on now is later.
            """
            with suppress(OSError):
                last = evaluate(server, "timestamp(up == 1)", f"{time.time():.3f}")
                at = f"{last[0][1]:.3f}" if last else None
                return at and evaluate(server, "rate(netflow_cpu_seconds_total[1m])", at) and at
            return None

        at = until(scraped, what="two scrapes")
        found = {
            (labels["slice"], labels["direction"]): value
            for labels, value in evaluate(server, "netflow_slice_flows_total", at)
        }
        assert (found["mine", "out"], found["yours", "in"]) == (2, 1)
        values = {"$instance": ".*", "$slice": ".*", "$__rate_interval": "1m"}
        empty = set()
        for expression in shown:
            for name, value in values.items():
                expression = expression.replace(name, value)
            assert "$" not in expression
            if not evaluate(server, expression, at):
                empty |= set(NAME.findall(expression))
        # This node has no guard, and its disk has room.
        assert empty == {"vnet_refusals_total", "vnet_observed_total",
                         "netflow_store_full", "netflow_store_full_since_seconds"}  # fmt: skip


def test_the_page_lists_all_metrics_and_no_others(flows, exported):
    page = (ROOT / "docs/metrics.md").read_text()
    listed = {cell for line in page.splitlines() if line.startswith("| `")
              for cell in NAME.findall(line.split("|")[1])}  # fmt: skip
    assert listed == names(flows.cli("metrics", "--export-dir", str(exported)).stdout)
