"""The query socket without a collector: who is slow is not waited for."""

import socket
import threading
import time
from contextlib import closing, suppress

import pytest

from netflow import server
from netflow.names import Names

pytestmark = pytest.mark.unit


@pytest.fixture
def serving(tmp_path):
    answers = server.Answers(
        cursor=lambda: None, fresh=lambda until: until, status=None, metrics=None,
        missing=list, names=Names(tmp_path / "registry.db"), take=None,
    )  # fmt: skip
    made = server.start(tmp_path / "query.sock", None, answers)
    yield made
    server.stop(made)


def test_a_request_that_comes_in_drips_is_not_waited_for_longer_than_any_other(
    serving, monkeypatch
):
    monkeypatch.setattr(server, "PATIENCE", 0.5)
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as link:
        link.connect(str(serving.path))
        deadline = time.monotonic() + 30
        with suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() < deadline:
                link.sendall(b" ")
                time.sleep(0.05)
            pytest.fail("it still listens")
    assert serving.clients == {}


def test_where_no_thread_can_be_started_it_says_so_and_answers_the_next(serving, monkeypatch):
    """Somebody's fork bomb."""

    def ask():
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as link:
            link.connect(str(serving.path))
            with suppress(BrokenPipeError, ConnectionResetError):
                link.sendall(b"no question\n")
            return link.makefile().readline()

    def refuses(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuses)
        assert "can start no more threads: ask again" in ask()
    assert serving.clients == {}
    assert '"why":"bad"' in ask()
