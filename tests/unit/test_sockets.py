"""The filter program that asks for cgroups' sockets, run as the kernel runs it."""

import struct

import pytest
from vnet.sockets import any_of

pytestmark = pytest.mark.unit


def accepts(program: bytes, cgroup: int) -> bool:
    """inet_diag_bc_run(), net/ipv4/inet_diag.c, for the two operations there are in ours."""
    at = 0
    while at < len(program):
        code, yes, no = struct.unpack_from("=BBH", program, at)
        holds = code == 13 and struct.unpack_from("=Q", program, at + 4)[0] == cgroup
        at += yes if holds else no
    return at == len(program)


@pytest.mark.parametrize("ids", [[7], [7, 1 << 60], [*range(1000)]])
def test_it_accepts_each_of_the_ids_and_no_other(ids):
    program = any_of(ids)
    for one in ids:
        assert accepts(program, one)
    for other in (1 << 33, 1001, 2**64 - 1):
        assert not accepts(program, other)
