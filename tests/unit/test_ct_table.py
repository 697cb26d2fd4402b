"""The table of live connections: what is recorded of which story the kernel tells."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from fuzz.ctmsg import ICMP, SCTP, TCP, UDP, Conn, tuple_

from netflow.ct import Batch, FlowBatch, Reason, Table, decode

pytestmark = pytest.mark.unit

WEB = tuple_("192.0.2.7", "198.51.100.9", TCP, 40212, 80)
DNS = tuple_("192.0.2.7", "198.51.100.53", UDP, 5353, 53)
S = 1_000_000_000
A, B, C = 0x0201, 0x0202, 0x0203  # owners


@dataclass
class Story:
    """A table, and the records it has given."""

    table: Table = field(default_factory=Table)
    flows: list[dict[str, int]] = field(default_factory=list)
    asks: list[int] = field(default_factory=list)

    def tell(self, *messages: bytes, now: int = 100 * S, active: bool = False) -> "Story":
        batch, out = Batch(len(messages)), FlowBatch(4 * len(messages))
        data = b"".join(messages)
        assert decode(data, batch).used == len(data)
        row, asks = self.table.apply(batch, now, out, active=active)
        assert row == len(messages)
        self.asks = list(asks)
        self._take(out)
        return self

    def dump(self, *messages: bytes, now: int = 100 * S, active: bool = False) -> "Story":
        self.table.dump_begin()
        if messages:
            self.tell(*messages, now=now, active=active)
        return self.sweep(now)

    def sweep(self, now: int = 100 * S) -> "Story":
        out = FlowBatch(4)
        while not self.table.sweep(now, out):
            self._take(out)
            out.clear()
        self._take(out)
        return self

    def _take(self, out: FlowBatch) -> None:
        columns = out.columns()
        self.flows += [{k: int(v[i]) for k, v in columns.items()} for i in range(len(out))]

    def __getitem__(self, names: str) -> list[Any]:
        """Each record's values of some columns."""
        wanted = names.split()
        rows = [tuple(f[n] for n in wanted) for f in self.flows]
        return rows if len(wanted) > 1 else [r[0] for r in rows]

    @property
    def counts(self) -> list[tuple[int, ...]]:
        return self["opackets obytes rpackets rbytes"]

    @property
    def reasons(self) -> list[Reason]:
        return [Reason(r) for r in self["reason"]]


def counted(n: int) -> tuple[int, int, int, int]:
    """Counters that are told apart from one another."""
    return n, 100 * n, 2 * n, 300 * n


# -- one connection, seen whole -------------------------------------------------------


def test_a_connection_seen_from_new_to_destroy_is_one_record():
    story = Story().tell(Conn(WEB, id=5, mark=A).new(), now=10 * S)
    assert (len(story.table), story.flows) == (1, [])
    end = Conn(WEB, id=5, mark=A, counters=counted(7), start=9 * S, stop=12 * S, state=7)
    story.tell(end.destroy(), now=13 * S)
    assert story.counts == [counted(7)]
    assert story["flow_start start end flow_id"] == [(9 * S, 9 * S, 12 * S, 5)]
    assert story["oxid rxid proto tcp_state sport dport"] == [(A, 0, TCP, 7, 40212, 80)]
    assert story.reasons == [Reason.CLOSED]
    assert len(story.table) == 0


def test_a_destroy_of_an_unknown_connection_is_recorded_whole():
    end = Conn(DNS, mark=B << 16 | A, counters=counted(3), start=1 * S, stop=2 * S)
    story = Story().tell(end.destroy())
    assert story.counts == [counted(3)]
    assert story["start end oxid rxid"] == [(1 * S, 2 * S, A, B)]


def test_a_connection_that_nobody_counted_is_one_record_of_zeros():
    story = Story().tell(Conn(DNS).new(), now=3 * S).tell(Conn(DNS).destroy(), now=4 * S)
    assert story.counts == [(0, 0, 0, 0)]
    assert story["start end"] == [(3 * S, 4 * S)]
    assert story.reasons == [Reason.IDLE]


def test_without_any_time_a_record_is_of_now():
    assert Story().tell(Conn(DNS).destroy(), now=4 * S)["start end"] == [(4 * S, 4 * S)]


def test_a_record_never_ends_before_it_starts():
    end = Conn(DNS, counters=counted(1), start=9 * S, stop=8 * S)
    assert Story().tell(end.destroy())["start end"] == [(9 * S, 9 * S)]


@pytest.mark.parametrize(
    ("proto", "state", "reason"),
    [
        (TCP, 3, Reason.IDLE),  # ESTABLISHED
        (TCP, 1, Reason.IDLE),  # SYN_SENT
        (TCP, 4, Reason.IDLE),  # FIN_WAIT: one side never closed
        (TCP, 5, Reason.IDLE),  # CLOSE_WAIT: likewise
        (TCP, 6, Reason.CLOSED),  # LAST_ACK
        (TCP, 7, Reason.CLOSED),  # TIME_WAIT
        (TCP, 8, Reason.CLOSED),  # CLOSE
        (SCTP, 1, Reason.CLOSED),  # CLOSED
        (SCTP, 4, Reason.IDLE),  # ESTABLISHED
        (SCTP, 7, Reason.CLOSED),  # SHUTDOWN_ACK_SENT
        (UDP, None, Reason.IDLE),
        (ICMP, None, Reason.IDLE),
    ],
)
def test_the_last_state_says_whether_it_was_closed(proto, state, reason):
    conn = Conn(tuple_("10.0.0.1", "10.0.0.2", proto, 1, 8 << 8), state=state)
    assert Story().tell(conn.destroy()).reasons == [reason]


def test_a_state_seen_earlier_stands_where_the_destroy_has_none():
    story = Story().tell(Conn(WEB, state=7).update(), Conn(WEB).destroy())
    assert story["tcp_state"] == [7]


# -- NAT ----------------------------------------------------------------------------


def test_without_nat_both_sides_see_the_same():
    story = Story().tell(Conn(WEB).destroy())
    assert story["src_lo dst_lo sport dport"] == story["nsrc_lo ndst_lo nsport ndport"]


def test_nat_is_the_reply_turned_round():
    snat = Conn(WEB, reply=tuple_("10.9.9.9", "203.0.113.1", TCP, 8080, 61000))
    flow = Story().tell(snat.new(), Conn(WEB, reply=snat.reply).destroy()).flows[0]
    assert flow["nsrc_lo"] == 0xFFFF_CB00_7101 and flow["nsport"] == 61000
    assert flow["ndst_lo"] == 0xFFFF_0A09_0909 and flow["ndport"] == 8080
    assert flow["src_lo"] == 0xFFFF_C000_0207 and flow["sport"] == 40212


def test_nat_known_from_an_event_is_told_of_a_lost_connection():
    snat = Conn(WEB, reply=tuple_("198.51.100.9", "203.0.113.1", TCP, 80, 61000))
    story = Story().tell(snat.new()).dump()
    assert story["nsport reason"] == [(61000, Reason.LOST)]


def test_icmp_keeps_its_type_and_its_translated_id():
    ping = tuple_("192.0.2.7", "198.51.100.9", ICMP, 77, 8 << 8)
    plain = Story().tell(Conn(ping).destroy())
    assert plain["nsport ndport"] == [(77, 8 << 8)]
    turned = tuple_("198.51.100.9", "203.0.113.1", ICMP, 1077, 0)
    assert Story().tell(Conn(ping, reply=turned).destroy())["nsport ndport"] == [(1077, 8 << 8)]


# -- active shares --------------------------------------------------------------------


def row(n: int, mark: int | None = A, start: int | None = 1 * S, id: int = 1) -> bytes:
    return Conn(DNS, id=id, mark=mark, counters=counted(n), start=start).row()


def end(n: int, mark: int | None = A, start: int | None = 1 * S, id: int = 1) -> bytes:
    conn = Conn(DNS, id=id, mark=mark, counters=counted(n), start=start, stop=90 * S)
    return conn.destroy()


def test_active_shares_add_up_and_follow_one_another():
    story = Story().dump(row(10), now=60 * S, active=True).dump(row(25), now=70 * S, active=True)
    story.tell(end(26))
    assert story.counts == [counted(10), counted(15), counted(1)]
    assert story["start end"] == [(1 * S, 60 * S), (60 * S, 70 * S), (70 * S, 90 * S)]
    assert story["flow_start"] == [1 * S] * 3
    assert story.reasons == [Reason.ACTIVE, Reason.ACTIVE, Reason.IDLE]


def test_an_active_share_without_packets_is_none():
    story = Story().dump(row(10), active=True).dump(row(10), active=True)
    assert story.counts == [counted(10)]


def test_a_dump_that_is_not_active_only_refreshes():
    assert Story().dump(row(10)).dump(row(20)).flows == []


def test_the_last_share_is_recorded_even_without_packets():
    story = Story().dump(row(10), active=True).tell(end(10))
    assert story.counts == [counted(10), (0, 0, 0, 0)]
    assert story.reasons[-1] == Reason.IDLE


# -- owners -----------------------------------------------------------------------------


def test_an_owner_that_is_known_late_gets_the_whole_share():
    story = Story().tell(Conn(DNS).new(), Conn(DNS, mark=A).update())
    story.tell(Conn(DNS, mark=B << 16 | A).update())
    assert story.asks == []
    story.tell(end(9, mark=B << 16 | A))
    assert story["oxid rxid opackets"] == [(A, B, 9)]


def test_an_owner_known_only_at_the_end_gets_the_whole_share():
    story = Story().tell(Conn(DNS).new(), end(9, mark=B << 16))
    assert story["oxid rxid opackets"] == [(0, B, 9)]


def test_a_change_of_owner_asks_and_splits_at_the_answer():
    story = Story().tell(Conn(DNS, mark=A).new(), now=2 * S)
    story.tell(Conn(WEB, mark=A).new(), Conn(DNS, mark=B).update(), now=5 * S)
    assert story.asks == [1]
    story.tell(row(6, mark=B), now=6 * S)
    assert story["oxid opackets reason"] == [(A, 6, Reason.OWNER)]
    assert story["start end"] == [(1 * S, 5 * S)], "the change was when its event came"
    story.tell(end(10, mark=B))
    assert story["oxid"] == [A, B]
    assert story.counts == [counted(6), counted(4)]
    assert story["start end"][1] == (5 * S, 90 * S)


@pytest.mark.parametrize("shift", [0, 16], ids=["originator", "responder"])
def test_either_half_can_change_owner(shift):
    story = Story().tell(Conn(DNS, mark=A << shift).new(), Conn(DNS, mark=B << shift).update())
    story.tell(row(6, mark=B << shift), end(10, mark=B << shift))
    assert story["rxid" if shift else "oxid"] == [A, B]
    assert story["opackets"] == [6, 4]


def test_a_destroy_before_the_answer_splits_at_what_was_last_seen():
    story = Story().dump(row(4), now=50 * S).tell(Conn(DNS, mark=B).update(), now=60 * S)
    story.tell(end(10, mark=B))
    assert story["oxid opackets reason"] == [(A, 4, Reason.OWNER), (B, 6, Reason.IDLE)]
    assert story["start end"] == [(1 * S, 60 * S), (60 * S, 90 * S)]


def test_a_change_seen_only_in_a_dump_splits_there():
    story = Story().dump(row(4)).dump(row(6, mark=B), now=70 * S).tell(end(10, mark=B))
    assert story["oxid opackets end"] == [(A, 6, 70 * S), (B, 4, 90 * S)]


def test_a_change_seen_only_in_the_destroy_splits_at_what_was_last_seen():
    story = Story().dump(row(4)).tell(end(10, mark=B))
    assert story["oxid opackets"] == [(A, 4), (B, 6)]


def test_an_owner_without_packets_is_named_all_the_same():
    story = Story().tell(Conn(DNS, mark=A).new(), Conn(DNS, mark=B).update(), end(10, mark=B))
    assert story["oxid opackets"] == [(A, 0), (B, 10)]


def test_a_new_owner_whose_packets_were_counted_before_is_named_while_it_goes_on():
    story = Story().tell(Conn(DNS, mark=A).new(), Conn(DNS, mark=B).update(), row(10, mark=B))
    story.dump(row(10, mark=B), active=True)
    assert story["oxid opackets reason"] == [(A, 10, Reason.OWNER), (B, 0, Reason.ACTIVE)]
    assert len(story.dump(row(10, mark=B), active=True).flows) == 2, "named once is enough"


def test_an_owner_of_what_nobody_counts_has_a_share():
    story = Story().tell(Conn(DNS, mark=A).new(), Conn(DNS, mark=B).update())
    story.tell(Conn(DNS, mark=B).row(flags=0)).tell(Conn(DNS, mark=B).destroy())
    assert story["oxid reason"] == [(A, Reason.OWNER), (B, Reason.IDLE)]


def test_a_row_from_before_the_change_does_not_settle_it():
    """A dump's row may be older than the event that came before it is read."""
    story = Story().tell(Conn(DNS, mark=A).new(), Conn(DNS, mark=B).update())
    story.tell(row(3, mark=A))
    assert story.flows == []
    story.tell(row(6, mark=B))
    assert story["oxid opackets"] == [(A, 6)]


def test_a_half_that_only_dumps_show_as_nobodys_keeps_its_owner():
    story = Story().dump(row(4)).dump(row(6, mark=0)).tell(Conn(DNS, mark=None).update())
    assert story.asks == []
    assert story.tell(end(10, mark=None))["oxid opackets"] == [(A, 10)]


def test_a_half_that_an_event_and_the_answer_show_as_nobodys_is_nobodys():
    story = Story().dump(row(4)).tell(Conn(DNS, mark=0).update(), now=50 * S)
    assert story.asks == [0]
    story.tell(row(4), row(6, mark=0), end(10, mark=None))
    assert story["oxid opackets"] == [(A, 6), (0, 4)]
    assert story["end"][0] == 50 * S


def test_a_half_that_an_event_shows_as_nobodys_and_the_next_gives_back_keeps_its_owner():
    story = Story().dump(row(4)).tell(Conn(DNS, mark=0).update(), Conn(DNS, mark=A).update())
    assert story.tell(row(6), end(10))["oxid opackets"] == [(A, 10)]


def test_an_owner_that_comes_back_before_the_answer_goes_on_and_the_other_is_named():
    story = Story().tell(Conn(DNS, mark=A).new(), Conn(DNS, mark=B).update())
    story.tell(Conn(DNS, mark=A).update())
    assert story.asks == []
    assert story.tell(row(6), end(10))["oxid opackets"] == [(B, 0), (A, 10)]


def test_a_half_filled_with_a_change_of_the_other_is_the_new_shares():
    story = Story().tell(Conn(DNS, mark=A).new(), Conn(DNS, mark=B).update())
    story.tell(Conn(DNS, mark=C << 16 | B).update())
    story.tell(row(6, mark=C << 16 | B), end(10, mark=C << 16 | B))
    assert story["oxid rxid opackets"] == [(A, 0, 6), (B, C, 4)]


def test_a_third_owner_before_the_answer_asks_again_and_is_the_next():
    story = Story().tell(Conn(DNS, mark=A).new(), Conn(DNS, mark=B).update())
    assert story.tell(Conn(DNS, mark=C).update()).asks == [0]
    story.tell(row(6, mark=C), end(10, mark=C))
    assert story["oxid opackets"] == [(B, 0), (A, 6), (C, 4)]


def test_a_late_half_reaches_the_old_owners_share_too():
    story = Story().dump(row(4, mark=A)).tell(end(10, mark=C << 16 | B))
    assert story["oxid rxid"] == [(A, C), (B, C)]


# -- connections that are mistaken for one another -----------------------------------------


def test_another_start_is_another_connection():
    """conntrack's id is a hash of the entry's address, which the slab hands out again."""
    story = Story().dump(row(10), active=True).dump(row(3, start=50 * S, mark=B))
    assert story["opackets flow_start reason"] == [
        (10, 1 * S, Reason.ACTIVE),
        (0, 1 * S, Reason.LOST),
    ]
    story.tell(end(5, start=50 * S, mark=B))
    assert story["opackets oxid flow_start"][-1] == (5, B, 50 * S)


def test_a_dump_may_show_a_successor_before_the_end_of_its_predecessor_is_read():
    story = Story().dump(row(10)).dump(row(3, start=50 * S, mark=B), now=51 * S)
    story.tell(end(12), Conn(DNS, mark=B).new(), end(5, start=50 * S, mark=B))
    assert story["oxid flow_start"] == [(A, 1 * S), (A, 1 * S), (B, 50 * S)]
    assert story["opackets"] == [10, 2, 5]


def test_a_start_after_first_sight_is_another_connection():
    story = Story().tell(Conn(DNS, mark=A).new(), now=10 * S)
    story.tell(row(3, start=50 * S, mark=B), end(4), end(5, start=50 * S, mark=B))
    assert story["oxid flow_start opackets"] == [(A, 1 * S, 4), (B, 50 * S, 5)]


def test_the_same_tuple_with_another_id_is_another_connection():
    story = Story().dump(row(10)).tell(Conn(DNS, id=2, mark=B).new())
    assert len(story.table) == 2
    story.tell(end(4, id=2, mark=B), end(12))
    assert story["flow_id oxid opackets"] == [(2, B, 4), (1, A, 12)]


def test_counters_that_fall_are_another_connection_and_never_an_underflow():
    story = Story().dump(row(10, start=None)).dump(row(3, start=None)).tell(end(4, start=None))
    assert story.counts == [counted(10), counted(4)]
    assert story.reasons == [Reason.LOST, Reason.IDLE]


def test_counters_that_somebody_zeroed_are_not_an_underflow():
    """`conntrack -z -L` gives the same connection smaller counters."""
    story = Story().dump(row(10), active=True).dump(row(2), active=True).tell(end(3))
    assert story.counts == [counted(10), (0, 0, 0, 0), counted(2), counted(1)]


def test_a_second_new_is_not_another_connection():
    """With reliable events, what one listener had no room for is sent to all again."""
    story = Story().dump(row(10), active=True).tell(Conn(DNS, mark=A).new(), end(12))
    assert story.counts == [counted(10), counted(2)]


# -- dump and events overtake each other -----------------------------------------------------


def test_a_row_older_than_the_destroy_raises_nobody():
    story = Story()
    story.table.dump_begin()
    story.tell(end(5)).tell(row(4)).sweep()
    story.dump()
    assert story.counts == [counted(5)]
    assert len(story.table) == 0


def test_a_row_older_than_an_answer_is_ignored():
    story = Story().dump(row(2))
    story.table.dump_begin()
    story.tell(Conn(DNS, mark=B).update()).tell(row(8, mark=B)).tell(row(5, mark=A)).sweep()
    story.tell(end(9, mark=B))
    assert story["oxid opackets"] == [(A, 8), (B, 1)]


def test_a_repeated_destroy_is_recorded_once():
    assert Story().tell(end(5), end(5)).counts == [counted(5)]


def test_a_new_event_that_the_dump_overtook_changes_nothing():
    story = Story().dump(row(4, mark=B)).tell(Conn(DNS).new(), end(5, mark=B))
    assert story["oxid opackets"] == [(B, 5)]


# -- what went unseen ----------------------------------------------------------------------


def test_a_connection_that_a_dump_does_not_show_is_lost():
    story = Story().dump(row(10)).dump(now=80 * S)
    assert story["reason end"] == [(Reason.LOST, 80 * S)]
    assert story.counts == [counted(10)]
    assert len(story.table) == 0


def test_a_lost_connection_that_ends_after_all_adds_only_the_rest():
    story = Story().dump(row(10)).dump().tell(end(12))
    assert story.counts == [counted(10), counted(2)]
    assert story.reasons == [Reason.LOST, Reason.IDLE]
    assert story.dump().dump().counts == [counted(10), counted(2)]


def test_a_lost_connection_that_ends_without_more_adds_nothing():
    assert Story().dump(row(10)).dump().tell(end(10)).counts == [counted(10)]


def test_a_lost_connection_that_shows_again_goes_on():
    story = Story().dump(row(10)).dump().dump(row(11))
    assert len(story.table) == 1
    assert story.tell(end(12)).counts == [counted(10), counted(2)]


def test_a_lost_connection_may_end_for_half_a_minute_however_many_sweeps_there_are():
    story = Story().dump(row(10)).dump().dump().dump(now=129 * S)
    assert (story.table.lost, story.table.never_ended) == (1, 0)
    assert story.tell(end(12), now=129 * S).counts == [counted(10), counted(2)]
    assert (story.table.lost, story.table.never_ended) == (0, 0)


def test_a_lost_connection_is_forgotten_by_the_first_sweep_after_that():
    story = Story().dump(row(10)).dump().dump(now=130 * S)
    assert (story.table.lost, story.table.never_ended) == (0, 1)
    assert story.tell(end(12)).counts == [counted(10), counted(12)]


def test_a_clock_that_was_set_back_does_not_keep_a_lost_connection_for_ever():
    story = Story().dump(row(10)).dump(now=100 * S).dump(now=10 * S).dump(now=40 * S)
    assert (story.table.lost, story.table.never_ended) == (0, 1)


def test_what_an_event_shows_since_the_dump_began_is_not_lost():
    story = Story().dump(row(10))
    story.table.dump_begin()
    story.tell(Conn(DNS, mark=A).update(), Conn(WEB).new()).sweep()
    assert (story.flows, len(story.table)) == ([], 2)


def test_a_sweep_without_a_dump_loses_nobody():
    assert Story().tell(Conn(WEB).new()).sweep().sweep().flows == []


# -- after a restart ------------------------------------------------------------------------


def sums(n: int, start: int = 1 * S, until: int = 40 * S, id: int = 1) -> FlowBatch:
    made = Story().tell(end(n, start=start, id=id)).flows[0] | {"end": until}
    out = FlowBatch(1)
    out.extend({name: [value] for name, value in made.items()})
    return out


def test_what_the_store_holds_is_not_recorded_again():
    story = Story().dump(row(10))
    story.table.recorded(sums(7))
    story.tell(end(11))
    assert story.counts == [counted(4)]
    assert story["flow_start start"] == [(1 * S, 40 * S)]


@pytest.mark.parametrize(
    "other", [{"start": 2 * S}, {"id": 2}, {"n": 12}], ids=["start", "id", "more"]
)
def test_what_the_store_holds_of_another_connection_is_not_taken_for_it(other):
    story = Story().dump(row(10))
    story.table.recorded(sums(**{"n": 7, **other}))
    assert story.tell(end(11)).counts == [counted(11)]


def test_the_end_of_one_that_the_store_may_hold_is_settled_with_it_before_what_follows():
    story = Story()
    story.table.old(50 * S)
    end = Conn(WEB, id=5, start=7 * S, stop=60 * S, mark=A, counters=counted(9)).destroy()
    young = Conn(DNS, id=6, start=51 * S, stop=60 * S, mark=A, counters=counted(2)).destroy()
    batch, out = Batch(2), FlowBatch(8)
    decode(end + young, batch)
    row, asks = story.table.apply(batch, 100 * S, out)
    assert (row, list(asks), len(out)) == (1, [0], 0)
    held = FlowBatch(1)
    held.extend(
        {name: batch[name][:1] for name in held.names if name in batch.names and name != "end"}
        | {"flow_id": [5], "flow_start": [7 * S], "end": [40 * S]}
        | {"opackets": [4], "obytes": [400], "rpackets": [8], "rbytes": [1200]}
    )  # fmt: skip
    story.table.settle(batch, 0, 100 * S, held, out)
    assert story.table.apply(batch, 100 * S, out, start=row)[0] == 2
    story._take(out)
    assert story.counts == [counted(5), counted(2)]
    assert story["start"] == [40 * S, 51 * S]


def test_what_the_store_holds_of_an_ended_connection_is_ignored():
    story = Story()
    story.table.recorded(sums(7))
    assert len(story.table) == 0


# -- room ------------------------------------------------------------------------------------


def test_a_full_output_stops_and_goes_on_where_it_stopped():
    data = b"".join(Conn(DNS, id=n, counters=counted(n), start=n + 1).destroy() for n in range(100))
    batch, out, table = Batch(100), FlowBatch(7), Table()
    decode(data, batch)
    seen, at = [], 0
    while at < 100:
        before = at
        at, _ = table.apply(batch, S, out, start=at)
        assert at > before
        seen += list(out["flow_id"])
        out.clear()
    assert seen == list(range(100))


def test_full_asks_stop_and_go_on_where_they_stopped():
    story = Story(Table(max_asks=2))
    ids = range(5)
    story.tell(*(Conn(DNS, id=n, mark=A).new() for n in ids))
    batch, out = Batch(5), FlowBatch(4)
    decode(b"".join(Conn(DNS, id=n, mark=B).update() for n in ids), batch)
    row, asks = story.table.apply(batch, S, out)
    assert (row, list(asks)) == (2, [0, 1])
    row, asks = story.table.apply(batch, S, out, start=row)
    assert (row, list(asks)) == (4, [2, 3])
    row, asks = story.table.apply(batch, S, out, start=row)
    assert (row, list(asks)) == (5, [4])


def test_a_sweep_into_a_small_output_goes_on():
    story = Story().tell(*(Conn(DNS, id=n).new() for n in range(50))).dump()
    assert sorted(story["flow_id"]) == list(range(50))
