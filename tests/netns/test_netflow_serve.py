"""The HTTP interface before a live collector: who gets what, errors, the document."""

import http.client
import json
import os
import re
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from askersbed import ALICE, BOB, GAMES, NOBODY, being, collecting, open_way
from netflowbed import NETFLOW, as_uid
from servebed import free_port, serving
from vnet.testing.net import HERE
from vnet.testing.poll import until

pytestmark = pytest.mark.netns

TOKEN = "t" * 40
PATHS = ("flows", "top", "who?peer=127.0.0.1", "series", "scans", "spoofed", "coverage")


@pytest.fixture(scope="module")
def flows():
    with collecting() as made:
        yield made


@pytest.fixture(scope="module")
def served(flows):
    with serving(flows.base, flows.socket):
        yield flows.base / "http.sock"


class Local(http.client.HTTPConnection):
    """Over a unix socket, as somebody."""

    def __init__(self, path, uid=0, group=None):
        super().__init__("netflow", timeout=60)
        self.where, self.who = str(path), (uid, group)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(60)
        try:
            with being(*self.who):
                self.sock.connect(self.where)
        except OSError:
            self.close()
            raise


def get(link, path, method="GET", **headers):
    link.request(method, path, headers=headers)
    answer = link.getresponse()
    body = answer.read()
    link.close()
    return answer, body


def asked(path, where, uid=0, group=None):
    """The JSON of an answer that must be one."""
    answer, body = get(Local(where, uid, group), path)
    assert answer.status == 200, body
    assert answer.headers.get_content_type() == "application/json"
    return json.loads(body)


def refused(path, where, uid=0, method="GET"):
    """Status and detail of a refusal."""
    answer, body = get(Local(where, uid), path, method)
    assert answer.headers.get_content_type() == "application/problem+json"
    said = json.loads(body)
    assert said["status"] == answer.status
    return answer.status, said["detail"]


def ports(answer):
    return {record["sport"] for record in answer["records"]}


def test_each_peer_is_answered_as_who_the_kernel_says_it_is(served, flows):
    assert ports(asked("/v1/flows", served)) == {4001, 4002, 4003}
    assert ports(asked("/v1/flows", served, ALICE)) == {4001, 4003}
    assert ports(asked("/v1/flows", served, BOB)) == {4002, 4003}
    assert ports(asked("/v1/flows", served, NOBODY, GAMES)) == {4001, 4002, 4003}
    assert refused("/v1/flows", served, NOBODY)[0] == 403
    [row] = [r for r in asked("/v1/flows", served, ALICE)["records"] if r["sport"] == 4003]
    assert (row["responder"]["slice"], row["responder"]["xid"]) == (None, None)


def test_one_connection_stays_its_peers_whatever_it_asks_and_says(served):
    link = Local(served, ALICE)
    for headers in ({}, {"X-Forwarded-For": "root"}, {"Authorization": f"Bearer {TOKEN}"}):
        link.request("GET", "/v1/flows", headers=headers)
        assert ports(json.loads(link.getresponse().read())) == {4001, 4003}
    link.close()


@pytest.mark.parametrize("path", ["/v1/status", "/v1/files", "/metrics"])
def test_a_slices_user_is_told_nothing_of_the_collector(served, path):
    assert get(Local(served), path)[0].status == 200
    status, detail = refused(path, served, ALICE)
    assert status == 403
    assert "about its flows only" in detail


@pytest.mark.parametrize("path", PATHS)
def test_the_answer_is_the_same_as_the_commands(served, flows, path):
    name, _, rest = path.partition("?")
    made = asked(f"/v1/{name}?since=@0&{rest}", served)
    words = ["query" if name == "flows" else name, "--since", "@0", "-o", "json"]
    told = json.loads(flows.cli(*words, *(["--to", "127.0.0.1"] if rest else [])).stdout)
    assert set(made) == set(told)
    [rows] = [key for key in told if isinstance(told[key], list) and key not in ("gaps", "notes")]

    def steady(answer):
        """Without what moves on from one question to the next."""
        return [{k: v for k, v in row.items() if k not in ("start", "end", "seconds", "away")
                 and not isinstance(v, dict)} for row in answer[rows]]  # fmt: skip

    if name not in ("flows", "who"):  # a record more each time: they go on
        assert steady(made) == steady(told)


def test_lines_have_a_head_a_line_for_each_row_and_an_end(served):
    answer, body = get(Local(served), "/v1/flows?format=ndjson&q=slice%20yours")
    assert answer.headers.get_content_type() == "application/x-ndjson"
    head, *rows, end = map(json.loads, body.splitlines())
    assert set(head) == {"since", "until", "as_of", "gaps"}
    assert {row["sport"] for row in rows} == {4002, 4003}
    assert (end["end"], end["rows"], end["more"]) == (True, len(rows), False)


def test_a_filter_that_means_nothing_points_at_the_word(served):
    status, detail = refused("/v1/flows?q=src%20ipp%201", served)
    assert status == 400
    assert "^~~" in detail


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/v1/flows?last=2", 400, "not a length of time"),
        ("/v1/flows?since=yesterday", 400, "not a time"),
        ("/v1/flows?last=1h&at=2h", 400, "give one of them"),
        ("/v1/flows?skew=1h", 400, "skew belongs to at"),
        ("/v1/flows?since=@2&until=@1", 400, "ends before it begins"),
        ("/v1/flows?limit=-1", 400, "limit"),
        ("/v1/flows?lmit=1", 400, "lmit"),
        ("/v1/who", 400, "who sent to whom"),
        ("/v1/who?peer=1.2.3.400", 400, "not an address"),
        ("/v1/top?only=inside", 400, "needs inside"),
        ("/v1/flows?q=" + "x" * 16385, 413, "16384"),
        ("/v1/nothing", 404, ""),
        ("/docs", 404, ""),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_meant_is_refused_with_a_reason(served, path, status, words):
    found, detail = refused(path, served)
    assert found == status
    assert words in detail


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(served, method):
    for path in ("/v1/flows", "/v1/status", "/metrics"):
        assert refused(path, served, method=method)[0] == 405


def test_without_a_collector_it_says_so_and_metrics_say_it_is_down(tmp_path):
    with serving(tmp_path, tmp_path / "none"):
        status, detail = refused("/v1/flows", tmp_path / "http.sock")
        assert status == 503
        assert "no collector answers" in detail
        answer, body = get(Local(tmp_path / "http.sock"), "/metrics")
        assert answer.status == 200
        assert b"netflow_up 0.0" in body


def test_who_has_too_many_questions_open_is_told_to_come_again(served, flows):
    idle = []
    for _ in range(2):
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with being(ALICE):
            link.connect(str(flows.socket))
        idle.append(link)
    answer, body = get(Local(served, ALICE), "/v1/flows")
    assert (answer.status, answer.getheader("Retry-After")) == (503, "1")
    assert b"ask again" in body
    for link in idle:
        link.close()
    until(lambda: get(Local(served, ALICE), "/v1/flows")[0].status == 200)


def test_a_user_cannot_have_all_connections(served):
    links = [Local(served, ALICE) for _ in range(17)]
    for link in links:
        link.connect()
    with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
        links[-1].request("GET", "/v1/flows")
        links[-1].getresponse()
    assert asked("/v1/flows", served, BOB)["records"]
    for link in links:
        link.close()


def test_over_tcp_it_is_only_for_who_has_the_token(flows, tmp_path):
    token, port = tmp_path / "token", free_port()
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    options = ("--listen", f"127.0.0.1:{port}", "--token-file", str(token))
    with serving(tmp_path, flows.socket, *options):

        def status(**headers):
            link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            return get(link, "/v1/flows", **headers)[0]

        assert status().status == 401
        assert status().getheader("WWW-Authenticate") == "Bearer"
        for wrong in (
            "Bearer",
            "Bearer x",
            f"Basic {TOKEN}",
            f"Bearer {TOKEN}t",
            f"Bearer {TOKEN[1:]}",
        ):
            assert status(Authorization=wrong).status == 401, wrong
        assert status(Authorization=f"Bearer {TOKEN}").status == 200


def test_metrics_have_an_address_of_their_own_and_nothing_else_is_there(flows, tmp_path):
    port = free_port()
    with serving(tmp_path, flows.socket, "--listen-metrics", f"127.0.0.1:{port}"):

        def body(path):
            link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            return get(link, path)[1]

        assert b'netflow_slice_flows_total{direction="out",slice="mine"} 2.0' in body("/metrics")
        assert b"4001" not in body("/v1/flows")


def test_it_needs_no_capability(flows):
    """But to read the guard's counters. Not root's right to pass by modes, for one."""
    with open_way() as base:
        under = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--")
        with serving(base, flows.socket, under=under) as process:
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert re.search(r"^CapEff:\s+0+$", status, re.M)
            assert ports(asked("/v1/flows", base / "http.sock", ALICE)) == {4001, 4003}
            assert ports(asked("/v1/flows", base / "http.sock")) == {4001, 4002, 4003}


def test_who_is_not_root_may_not_pass_questions_on(flows):
    """The interface that somebody starts for himself gives nobody anything."""
    with open_way() as base:
        os.chown(base, ALICE, ALICE)
        with serving(base, flows.socket, under=as_uid(ALICE)) as process:
            assert f"\nUid:\t{ALICE}" in Path(f"/proc/{process.pid}/status").read_text()
            for uid in (0, ALICE, BOB):
                status, detail = refused("/v1/flows", base / "http.sock", uid)
                assert status == 403
                assert "may not ask for others" in detail


def test_it_listens_on_nothing_that_was_not_asked_for(flows, tmp_path):
    with serving(tmp_path, flows.socket) as process:
        assert asked("/v1/flows", tmp_path / "http.sock")["records"]  # all is open that will be
        assert tcp_listeners(process.pid) == set()


def tcp_listeners(pid):
    """Inodes of sockets that the process listens on, of TCP of either family."""
    held = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed by now
            held.add(str(link.readlink()).removeprefix("socket:[").rstrip("]"))
    rows = [line.split() for name in ("tcp", "tcp6")
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]]  # fmt: skip
    return {row[9] for row in rows if row[3] == "0A"} & held


def serve_once(base, *options):
    words = ["serve", "--http-socket", str(base / "http.sock"), "--socket", str(base / "none")]
    return HERE.run(*NETFLOW, *words, *options, check=False, timeout=60)


@pytest.mark.parametrize(
    "options",
    [
        ["--listen", "127.0.0.1:9477"],
        ["--token-file", "/x"],
        ["--listen-metrics", "9477"],
        ["--listen-metrics", "::1:9477"],
        ["--listen-metrics", "127.0.0.1:0"],
        ["--listen-metrics", "localhost:9477"],
    ],
    ids=" ".join,
)
def test_words_that_cannot_be_meant_are_refused(tmp_path, options):
    assert serve_once(tmp_path, *options).returncode == 2


def test_a_second_one_does_not_take_the_socket(served, flows):
    done = serve_once(flows.base)
    assert done.returncode == 1
    assert "somebody listens" in done.stderr
    assert asked("/v1/flows", served)["records"]


def test_a_dead_ones_socket_is_replaced(flows, tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "http.sock"))
    process = HERE.popen(
        *NETFLOW, "serve", "--http-socket", str(tmp_path / "http.sock"),
        "--socket", str(flows.socket), "--run-dir", str(tmp_path),
    )  # fmt: skip

    def answered():
        try:
            return asked("/v1/flows", tmp_path / "http.sock")["records"]
        except ConnectionRefusedError:
            return None

    try:
        until(answered)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_without_the_web_library_it_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from netflow.cli import main; main(['serve', '--http-socket', sys.argv[1]])"
    )
    done = HERE.run(sys.executable, "-c", code, str(tmp_path / "http.sock"), check=False)
    assert done.returncode == 1
    assert "pip install 'vnet[serve]'" in done.stderr


def test_the_collector_has_no_web_server_in_it(flows):
    maps = Path(f"/proc/{flows.process.pid}/maps").read_text()
    assert "pydantic" not in maps
