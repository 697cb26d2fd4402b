/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ct.h - from the kernel's conntrack messages to flow records, in columns.
 *
 * Three steps, each a plain function over plain memory, so that each can be
 * fuzzed and tested alone:
 *
 *	ct_decode()	netlink bytes         -> struct ct_batch  (what the kernel said)
 *	ct_table_*()	struct ct_batch rows  -> struct flow_batch (what is recorded)
 *	ct_get_request() one row              -> netlink bytes that ask for it again
 *
 * Columns are separate arrays so that Python can show them to numpy and
 * DuckDB without a copy. Addresses are 128 bits in two host-order halves,
 * IPv4 as ::ffff:a.b.c.d. Ports are host order; for ICMP and ICMPv6 sport is
 * the echo id and dport is type << 8 | code, as RFC 5102's icmpTypeCode.
 * Times are nanoseconds since the epoch (UTC), 0 where unknown.
 */
#ifndef NETFLOW_CT_H
#define NETFLOW_CT_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* -- what the kernel said -------------------------------------------------- */

enum ct_msg {			/* ct_batch.msg */
	CT_NEW = 1,		/* event: a connection was confirmed */
	CT_UPDATE = 2,		/* event: something about it changed */
	CT_DESTROY = 3,		/* event: it is gone; counters are final */
	CT_DUMP = 4,		/* an entry of a dump, or the answer to a GET */
};

enum ct_has {			/* ct_batch.has, one bit each */
	CT_HAS_COUNTERS = 1 << 0,	/* both directions */
	CT_HAS_MARK = 1 << 1,		/* absent means 0 only in a dump or DESTROY */
	CT_HAS_START = 1 << 2,
	CT_HAS_STOP = 1 << 3,
	CT_HAS_REPLY = 1 << 4,		/* the reply tuple */
};

struct ct_batch {
	uint32_t capacity;	/* rows the arrays have room for */
	uint32_t count;		/* rows in use */
	uint8_t *msg, *has, *family, *proto, *tcp_state;
	uint16_t *zone;
	uint32_t *id, *mark, *status;
	uint64_t *src_hi, *src_lo, *dst_hi, *dst_lo;	/* original tuple */
	uint16_t *sport, *dport;
	uint64_t *rsrc_hi, *rsrc_lo, *rdst_hi, *rdst_lo;	/* reply tuple */
	uint16_t *rsport, *rdport;
	uint64_t *opackets, *obytes, *rpackets, *rbytes;
	uint64_t *start, *stop;
};

struct ct_batch *ct_batch_new(uint32_t capacity);	/* NULL: no memory */
void ct_batch_free(struct ct_batch *b);

struct ct_decoded {
	size_t used;		/* bytes consumed, whole messages only */
	uint32_t skipped;	/* well-formed messages that are not conntrack's */
	uint32_t malformed;	/* messages whose attributes do not add up */
	int32_t done;		/* NLMSG_DONE was met: the dump is complete */
	int32_t interrupted;	/* NLM_F_DUMP_INTR was met: the dump has holes */
	int32_t error;		/* errno of an NLMSG_ERROR, 0 for none or an ack */
	uint32_t error_seq;	/* whose */
	int32_t overrun;	/* ct_recv_decode(): ENOBUFS, events are lost */
};

/*
 * Append the messages in buf to the batch. Stops at the first message that no
 * longer fits into the batch: call again with the rest. A truncated or lying
 * length ends the buffer (counted as malformed, used = len); nothing outside
 * buf..buf+len is ever read. Stops after an error, too, so that each of
 * several is told.
 *
 * Requests must carry a sequence number other than 0: it is what tells their
 * answers (CT_DUMP) from events.
 */
struct ct_decoded ct_decode(const void *buf, size_t len, struct ct_batch *out);

/*
 * Write a netlink request (IPCTNL_MSG_CT_GET, by original tuple and zone) for
 * one row. Returns its length, 0 if it does not fit (192 bytes always do).
 * seq must not be 0.
 */
size_t ct_get_request(const struct ct_batch *b, uint32_t row, uint32_t seq,
		      void *buf, size_t len);

/*
 * Receive from a netlink socket and decode, until there is nothing more to
 * read now, the dump is done, an error was answered, or the batch might not
 * hold another bufferful. Waits for the first datagram unless fd is
 * non-blocking. buf is for what is received: 32 KB is the most that the
 * kernel gives at once, less is slower. Returns datagrams taken or -errno
 * (-EAGAIN: nothing there, -EINTR: a signal came first); *what sums up what
 * ct_decode() said. Datagrams that the kernel did not send are dropped.
 * Returns 0 at once if the batch cannot hold a bufferful: at least
 * len / 44 + 1 rows must be free.
 */
ssize_t ct_recv_decode(int fd, void *buf, size_t len, struct ct_batch *out,
		       struct ct_decoded *what);

/*
 * The same for events, which are one small message each: many are received by
 * one system call, each into CT_EVENT_MAX bytes of buf. Never waits. A message
 * that is longer counts as malformed. At least len / 44 + 1 rows must be free.
 */
ssize_t ct_recv_events(int fd, void *buf, size_t len, struct ct_batch *out,
		       struct ct_decoded *what);
#define CT_EVENT_MAX 4096

/* -- what is recorded ------------------------------------------------------ */

enum flow_reason {		/* why a record was closed */
	FLOW_IDLE = 1,		/* the connection timed out */
	FLOW_CLOSED = 2,	/* TCP/SCTP closed or reset it */
	FLOW_ACTIVE = 3,	/* it goes on; this is the share up to now */
	FLOW_OWNER = 4,		/* it goes on under another owner */
	FLOW_LOST = 5,		/* its end was not seen; counters as last seen */
	FLOW_CUT = 6,		/* its end was while no collector ran: never made by a table */
};

struct flow_batch {
	uint32_t capacity;
	uint32_t count;
	uint64_t *flow_start;	/* the connection's start: ties its shares together */
	uint64_t *start, *end;	/* of this share */
	uint32_t *flow_id;	/* conntrack's id, stable for the connection's life */
	uint8_t *proto, *reason, *tcp_state;
	uint16_t *zone;
	uint64_t *src_hi, *src_lo, *dst_hi, *dst_lo;	/* as the originator saw it */
	uint16_t *sport, *dport;
	uint64_t *nsrc_hi, *nsrc_lo, *ndst_hi, *ndst_lo;	/* after NAT */
	uint16_t *nsport, *ndport;
	uint64_t *opackets, *obytes, *rpackets, *rbytes;	/* of this share */
	uint16_t *oxid, *rxid;	/* owners: originator, responder */
};

struct flow_batch *flow_batch_new(uint32_t capacity);
void flow_batch_free(struct flow_batch *b);

struct ct_table;		/* live connections and what of them is recorded */

struct ct_table *ct_table_new(void);
void ct_table_free(struct ct_table *t);
uint32_t ct_table_count(const struct ct_table *t);
/* Recorded as lost, and may still end; and how many never did, since the start. */
uint32_t ct_table_lost(const struct ct_table *t);
uint64_t ct_table_never_ended(const struct ct_table *t);
size_t ct_table_memory(const struct ct_table *t);	/* bytes */

/*
 * Take rows from..events->count of events. now (ns, UTC) stands in where the
 * kernel gave no time. Closed shares are appended to out; rows whose owner
 * changed without counters in the message are listed in asks (row numbers),
 * at most max_asks of them (*nasks says how many): send ct_get_request() for
 * each and apply the answers, before the next dump begins. (A CT_DESTROY in
 * asks is another matter: see ct_table_old().) Returns the row to go on from:
 * less than events->count when out or asks is full (flush, call again). out
 * needs a capacity of at least 4; with max_asks 0 nothing is asked and changes
 * of owner are settled by the next dump.
 *
 * CT_NEW/CT_UPDATE	remember the connection and its mark. A half that goes
 *			from 0 to an owner is a late answer, not a change: the
 *			whole open share gets it. From one owner to another is
 *			a change: ask, and remember the connection as waiting.
 *			Who came and went before the answer gets a share
 *			without packets. A half that an event says is nobody's
 *			any more is a change, too, once a row with counters
 *			says so as well; in such rows alone it keeps its owner.
 * CT_DUMP		refresh; if waiting, close the old owner's share with
 *			these counters (FLOW_OWNER, ending when the change was
 *			told); a changed half in the dump itself is treated
 *			likewise. With active set, close every share with new
 *			packets as FLOW_ACTIVE. A row that is older than what
 *			events have told since (it was waiting in the dump's
 *			socket) is ignored.
 * CT_DESTROY		close the last share, FLOW_CLOSED or FLOW_IDLE, by the
 *			last TCP or SCTP state (see end_reason() in share.c).
 *			If waiting, what was last seen is the old owner's and
 *			the rest the new one's. Of an unknown connection the
 *			whole is recorded; a repeated DESTROY is ignored.
 *
 * A connection is its original tuple, zone, id and start. One that differs in
 * any of them is another one: both are kept, and the old one is left to its
 * DESTROY (which may still be waiting in the events' socket) or to the sweep.
 * Counters that fall (`conntrack -z`, or a reincarnation where there are no
 * start times) close what was seen before as FLOW_LOST. A last share (closed,
 * idle, lost) and an owner's are recorded even without packets, active ones
 * only with some.
 */
uint32_t ct_table_apply(struct ct_table *t, const struct ct_batch *events,
			uint32_t from, uint64_t now, int active,
			struct flow_batch *out,
			uint32_t *asks, uint32_t max_asks, uint32_t *nasks);

/*
 * After a restart: connections that began before a time (ns, UTC; 0: none did)
 * may be in the store although the table does not know them, or knows them by
 * an event only, which tells no start. The CT_DESTROY of
 * such a one is not taken but listed in asks, as the last one, and the row
 * after it is returned (with max_asks 0 it is taken). Before going on there,
 * call ct_table_settle() with what the store holds, as for
 * ct_table_recorded(): one row, or none. It takes the CT_DESTROY: what is not
 * recorded yet goes to out, which must have room for four.
 */
void ct_table_old(struct ct_table *t, uint64_t before);
void ct_table_settle(struct ct_table *t, const struct ct_batch *events,
		     uint32_t row, uint64_t now, const struct flow_batch *sums,
		     struct flow_batch *out);

/*
 * What the store already holds of a live connection (after a restart): counts
 * up to these are recorded, and the next share starts at end. Used of a row:
 * the original tuple, zone, flow_id, flow_start, end and the four counts.
 * Ignored if the connection is not in the table, if the kernel gave it
 * another start, if it counts less, or if the table closed a share of it. Call
 * it after the first dump and before any event is applied.
 */
void ct_table_recorded(struct ct_table *t, const struct flow_batch *sums);

/*
 * A dump tells what has gone unseen. Call begin before sending its request;
 * sweep, after its last row was applied, closes as FLOW_LOST every connection
 * that was known before begin, and that neither the dump nor an event has
 * shown since. Apply the events that are waiting when the dump ends before
 * sweep, and do not sweep after an interrupted dump. Should the DESTROY of a
 * lost connection still come before the first sweep that is CT_LOST_FOR later
 * (the kernel repeats what it could not deliver), only what it adds is
 * recorded. Returns 0 when through, 1 when out is full (flush, call again).
 */
#define CT_LOST_FOR	30000000000	/* ns */
void ct_table_dump_begin(struct ct_table *t);
int ct_table_sweep(struct ct_table *t, uint64_t now, struct flow_batch *out);

#endif /* NETFLOW_CT_H */
