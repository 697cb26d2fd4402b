"""Who may ask the collector what: real users, by their credentials at its socket."""

import json
import os
import pwd
import socket
from contextlib import closing, suppress
from pathlib import Path

import pytest
from askersbed import ALICE, BOB, GAMES, NOBODY, assign, being, collecting
from netflowbed import NETFLOW, as_uid
from vnet.testing.net import HERE
from vnet.testing.poll import until

from netflow import wire

pytestmark = pytest.mark.netns


@pytest.fixture(scope="module")
def flows():
    with collecting() as made:
        yield made


def connect(flows, uid, group=None):
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.settimeout(60)
    with being(uid, group):
        link.connect(str(flows.socket))
    return link


def ask(flows, uid, request, group=None):
    """What the collector answers somebody, line by line."""
    with closing(connect(flows, uid, group)) as link:
        answer = b""
        # Refused before it was read: what was said comes first, then these.
        with suppress(BrokenPipeError, ConnectionResetError):
            link.sendall(wire.encode(request))
        with suppress(ConnectionResetError):
            while part := link.recv(65536):
                answer += part
        return [json.loads(line) for line in answer.splitlines()]


def ports(answer):
    header, *rows, trailer = answer
    assert trailer["end"] is True
    return {row[header["columns"].index("sport")] for row in rows}


EVERYTHING = wire.Flows(filter=wire.Filter())


def test_each_user_sees_the_flows_of_his_slice_and_a_stranger_nothing(flows):
    assert ports(ask(flows, 0, EVERYTHING)) == {4001, 4002, 4003}
    assert ports(ask(flows, ALICE, EVERYTHING)) == {4001, 4003}
    assert ports(ask(flows, BOB, EVERYTHING)) == {4002, 4003}
    [refusal] = ask(flows, NOBODY, EVERYTHING)
    assert refusal["why"] == "denied"
    assert (
        f"uid {NOBODY} may not ask: root, members of group games and a slice's users may"
        in (refusal["error"])
    )


def test_a_member_of_the_group_sees_all_though_he_is_a_slices_user(flows):
    assert ports(ask(flows, ALICE, EVERYTHING, GAMES)) == {4001, 4002, 4003}


def test_the_command_shows_a_user_his_own_and_nobody_at_the_other_end(flows):
    words = as_uid(ALICE, *NETFLOW, "query", "-o", "json", "--socket", flows.socket)
    done = HERE.run(*words, env={"PYTHONDONTWRITEBYTECODE": "1"})
    records = {r["sport"]: r for r in json.loads(done.stdout)["records"]}
    assert set(records) == {4001, 4003}
    assert records[4003]["originator"]["slice"] == "mine"
    assert records[4003]["responder"]["slice"] is None
    assert records[4003]["responder"]["xid"] is None


@pytest.mark.parametrize(
    "request_",
    [wire.Status(), wire.Files(), wire.Metrics()],
    ids=["status", "files", "metrics"],
)
def test_a_slices_user_is_told_nothing_of_the_collector(flows, request_):
    assert len(ask(flows, 0, request_)) > 0
    [refusal] = ask(flows, ALICE, request_)
    assert refusal["why"] == "denied"
    assert "about its flows only" in refusal["error"]


def test_a_slices_user_adds_nothing_and_asks_for_nobody_else(flows):
    [refusal] = ask(flows, ALICE, wire.Import())
    assert "may not import" in refusal["error"]
    for who, group in ((ALICE, None), (ALICE, GAMES)):
        [refusal] = ask(flows, who, wire.For(uid=0, gid=0, ask=EVERYTHING), group)
        assert refusal["why"] == "denied"
        assert "may not ask for others" in refusal["error"]
    [refusal] = ask(flows, NOBODY, wire.For(uid=0, gid=0, ask=EVERYTHING))
    assert refusal["why"] == "denied"


def test_root_asks_for_others_and_gets_what_they_would_get(flows):

    def asked_for(uid, groups=()):
        return ask(flows, 0, wire.For(uid=uid, gid=uid, groups=[*groups], ask=EVERYTHING))

    assert ports(asked_for(ALICE)) == {4001, 4003}
    assert ports(asked_for(NOBODY, [GAMES])) == {4001, 4002, 4003}
    [refusal] = asked_for(NOBODY)
    assert refusal["why"] == "denied"


def test_who_is_a_slices_user_no_more_may_ask_no_more(flows):
    assign(flows.base, mine=[str(BOB), "nobody"], yours=[])
    try:
        assert ask(flows, ALICE, EVERYTHING)[0]["why"] == "denied"
        assert ports(ask(flows, BOB, EVERYTHING)) == {4001, 4003}
        assert ports(ask(flows, pwd.getpwnam("nobody").pw_uid, EVERYTHING)) == {4001, 4003}
    finally:
        assign(flows.base, mine=[str(ALICE)], yours=[str(BOB)])


def test_slices_users_cannot_take_all_places_from_the_desk(flows):
    """Two each, four together: the third, and the fifth, are told to come again."""
    assign(flows.base, mine=[str(ALICE), str(NOBODY)], yours=[str(BOB)])
    idle = [connect(flows, ALICE), connect(flows, ALICE)]
    try:
        [refusal] = ask(flows, ALICE, EVERYTHING)
        assert refusal["why"] == "busy"
        assert f"2 questions of uid {ALICE}" in refusal["error"]
        [refusal] = ask(flows, 0, wire.For(uid=ALICE, gid=ALICE, ask=EVERYTHING))
        assert refusal["why"] == "busy"
        idle += [connect(flows, BOB), connect(flows, NOBODY)]
        [refusal] = ask(flows, BOB, EVERYTHING)
        assert "4 questions of slices' users" in refusal["error"]
        assert ports(ask(flows, 0, EVERYTHING)) == {4001, 4002, 4003}
    finally:
        for link in idle:
            link.close()
        assign(flows.base, mine=[str(ALICE)], yours=[str(BOB)])
    until(lambda: len(ask(flows, ALICE, EVERYTHING)) > 1)


def test_strangers_take_no_place_from_slices_users(flows):
    idle = [connect(flows, NOBODY + n // 2) for n in range(8)]
    try:
        # Of many who come at once some are told to come again before the others are sent away.
        told = [json.loads(link.recv(4096))["why"] for link in idle]
        assert told[0] == "denied"
        assert set(told) <= {"denied", "busy"}
        until(lambda: len(ask(flows, ALICE, EVERYTHING)) > 1)
        assert ports(ask(flows, ALICE, EVERYTHING)) == {4001, 4003}
    finally:
        for link in idle:
            link.close()


def descriptors(flows):
    return len(list(Path(f"/proc/{flows.process.pid}/fd").iterdir()))


@pytest.mark.parametrize("uid", [ALICE, NOBODY, 0])
def test_descriptors_that_come_with_a_request_do_not_pile_up(flows, uid):
    before = descriptors(flows)
    with closing(connect(flows, uid)) as link, Path(os.devnull).open() as null:
        with suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(1100):
                socket.send_fds(link, [b" "], [null.fileno()])
        assert descriptors(flows) <= before + 10
        assert len(ask(flows, 0, wire.Status())) == 1
    until(lambda: descriptors(flows) <= before)
