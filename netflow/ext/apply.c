// SPDX-License-Identifier: GPL-2.0-only
/*
 * apply.c - from what the kernel said to what is recorded.
 *
 * The kernel's counters only grow, so every share is a difference: what a
 * message says now, less what is recorded already. Nothing is recorded twice
 * and no difference can be negative: counters that fall mean `conntrack -z`,
 * or another connection where no start times tell them apart, and what was
 * seen before is closed as lost first.
 *
 * What a row is about is decided by conns_find(). conntrack's id does not tell
 * a connection from its next incarnation: nf_ct_get_id() hashes the entry's
 * address and tuple, and the slab hands the same address out again. Nor does a
 * second NEW: with reliable events, one that some listener had no room for is
 * sent to all again (nf_ct_deliver_cached_events()). The start does, and both
 * may be in the table at once, for the dump may show the next one before the
 * DESTROY of the last one has been read.
 */
#include <netinet/in.h>
#include <string.h>

#include "owners.h"
#include "table.h"

/*
 * One row closes at most a lost connection and a share of its successor, and
 * tells who had it briefly.
 */
#define ROOM (2u + BRIEF)

struct step {
	struct ct_table *t;
	const struct ct_batch *in;
	uint32_t row;
	uint64_t now;
	struct flow_batch *out;
	struct conn_key key;
	uint64_t hash;
	struct conn *conn;	/* NULL: not in the table */
};

static int row_has(const struct step *s, uint8_t what)
{
	return s->in->has[s->row] & what;
}

/* 0 where the kernel did not say: also what identifies a burial then. */
static uint64_t row_start(const struct step *s)
{
	return row_has(s, CT_HAS_START) ? s->in->start[s->row] : 0;
}

static uint64_t row_end(const struct step *s)
{
	uint64_t stop = row_has(s, CT_HAS_STOP) ? s->in->stop[s->row] : 0;

	return stop ? stop : s->now;
}

static uint32_t row_mark(const struct step *s)
{
	return row_has(s, CT_HAS_MARK) ? s->in->mark[s->row] : 0;
}

static void row_counters(const struct step *s, uint64_t n[COUNTERS])
{
	n[OPACKETS] = s->in->opackets[s->row];
	n[OBYTES] = s->in->obytes[s->row];
	n[RPACKETS] = s->in->rpackets[s->row];
	n[RBYTES] = s->in->rbytes[s->row];
}

static void row_key(const struct ct_batch *in, uint32_t row, struct conn_key *key)
{
	*key = (struct conn_key){
		.src_hi = in->src_hi[row], .src_lo = in->src_lo[row],
		.dst_hi = in->dst_hi[row], .dst_lo = in->dst_lo[row],
		.sport = in->sport[row], .dport = in->dport[row],
		.zone = in->zone[row], .proto = in->proto[row],
	};
}

static int is_icmp(uint8_t proto)
{
	return proto == IPPROTO_ICMP || proto == IPPROTO_ICMPV6;
}

/*
 * The reply tuple turned round is the original one as the other side sees it.
 * ICMP: the id is the same both ways, and the reply's type is another one
 * that says nothing new.
 */
static void row_turned(const struct step *s, struct conn_nat *n)
{
	const struct ct_batch *in = s->in;
	uint32_t i = s->row;
	int icmp = is_icmp(s->key.proto);

	n->src_hi = in->rdst_hi[i];
	n->src_lo = in->rdst_lo[i];
	n->dst_hi = in->rsrc_hi[i];
	n->dst_lo = in->rsrc_lo[i];
	n->sport = icmp ? in->rsport[i] : in->rdport[i];
	n->dport = icmp ? s->key.dport : in->rsport[i];
}

static int same_tuple(const struct conn_key *k, const struct conn_nat *n)
{
	return k->src_hi == n->src_hi && k->src_lo == n->src_lo &&
	       k->dst_hi == n->dst_hi && k->dst_lo == n->dst_lo &&
	       k->sport == n->sport && k->dport == n->dport;
}

static void learn_nat(struct step *s)
{
	struct conn_nat turned = { 0 }, *nat;

	if (!row_has(s, CT_HAS_REPLY))
		return;
	row_turned(s, &turned);
	if (same_tuple(&s->key, &turned) && !s->conn->nat)
		return;
	nat = conns_nat_add(&s->t->conns, s->conn);
	if (nat)
		*nat = turned;
}

/*
 * An empty half of the open share gets its owner late, and wholly; not from an
 * event that also tells of another owner, for what is new in it is his.
 */
static void fill(struct conn *conn, uint32_t mark, int event)
{
	if (!clash(conn->mark, mark) || !(event || conn->waiting))
		conn->mark = merge(mark, conn->mark);
	conn->coming = merge(mark, conn->coming);
}

/* All but the counters, and changes of owner. */
static void learn(struct step *s)
{
	struct conn *conn = s->conn;
	const struct conn_share *share = conns_share(&s->t->conns, conn);

	conn->shown = s->t->round;
	/* what is recorded under a first-sight start stays under it */
	if (row_start(s) && !conn->has_start && !(share && share->end)) {
		conn->start = row_start(s);
		conn->has_start = 1;
	}
	if (s->in->tcp_state[s->row])
		conn->state = s->in->tcp_state[s->row];
	learn_nat(s);
	fill(conn, row_mark(s), s->in->msg[s->row] < CT_DESTROY);
}

static void learn_counters(struct step *s)
{
	if (row_has(s, CT_HAS_COUNTERS))
		row_counters(s, s->conn->seen);
}

/* A connection not seen before begins here as far as we know. */
static void first_sight(struct step *s)
{
	s->conn->start = s->now;
	s->conn->mark = s->conn->coming = row_mark(s);
}

static int appear(struct step *s)
{
	s->conn = conns_insert(&s->t->conns, &s->key, s->hash, s->in->id[s->row]);
	if (!s->conn)
		return -1;
	first_sight(s);
	return 0;
}

static void raise_ghost(struct step *s)
{
	if (s->conn->ghost)
		s->t->ghosts--;
	s->conn->ghost = 0;
}

/* What was counted before went unseen from some time on: begin anew. */
static void restart(struct step *s)
{
	if (!s->conn->ghost || has_new(s->t, s->conn))
		put_share(s->t, s->conn, s->now, FLOW_LOST, s->out);
	raise_ghost(s);
	conns_reset(&s->t->conns, s->conn);
	first_sight(s);
}

static int fell(const struct step *s)
{
	uint64_t n[COUNTERS];
	int i;

	if (!row_has(s, CT_HAS_COUNTERS))
		return 0;
	row_counters(s, n);
	for (i = 0; i < COUNTERS; i++)
		if (n[i] < s->conn->seen[i])
			return 1;
	return 0;
}

static uint32_t latest(const struct conn *conn)
{
	return conn->waiting ? conn->coming : conn->mark;
}

/*
 * Halves that an event says nobody owns any more. Only an event of the mark
 * tells a 0 at all, or of the other half (ctnetlink_conntrack_event()).
 */
static unsigned int erases(const struct step *s)
{
	return row_has(s, CT_HAS_MARK) ? gone(latest(s->conn), row_mark(s)) : 0;
}

/* An event that says "another owner" but not how much was the old one's. */
static int wants_ask(const struct step *s)
{
	uint32_t mark = row_mark(s);

	if (!s->conn || s->in->msg[s->row] >= CT_DESTROY)
		return 0;
	return (clash(latest(s->conn), mark) && clash(s->conn->mark, mark)) ||
	       erases(s);
}

/*
 * The end of a connection that may be in the store: it is not in the table, or
 * only because an event that tells neither start nor counters named it.
 */
static int is_strange(const struct step *s)
{
	const struct conn *conn = s->conn;

	return (!conn || (!conn->has_start && !conn->dumped)) &&
	       s->in->msg[s->row] == CT_DESTROY &&
	       row_start(s) < s->t->before &&
	       !(row_start(s) && conns_buried(&s->t->conns, s->hash,
					      s->in->id[s->row], row_start(s)));
}

/*
 * Somebody owned it only between two events: what passed meanwhile is in the
 * counters of others, but that it was his is not to be forgotten. It is told
 * when the connection's start is known; of very many in so little time, some
 * are not.
 */
static void note_brief(struct conn_share *share, uint32_t owners)
{
	unsigned int i = share->brief[0] ? 1 : 0;

	share->brief[i] = owners;
	share->brief_from[i] = share->latest;
}

static void put_briefs(struct step *s)
{
	struct conn_share *share = conns_share(&s->t->conns, s->conn);
	struct conn brief = *s->conn;
	unsigned int n;
	uint32_t i;

	for (n = 0; share && n < BRIEF && share->brief[n]; n++) {
		brief.mark = share->brief[n];
		memcpy(brief.seen, share->sum, sizeof(brief.seen));
		i = s->out->count;
		put_share(s->t, &brief, share->brief_from[n], FLOW_OWNER, s->out);
		s->out->start[i] = s->out->end[i];
		share->brief[n] = 0;
	}
}

static void change_owner(struct step *s)
{
	struct conn *conn = s->conn;
	uint32_t next = merge(latest(conn), row_mark(s));
	unsigned int erased = erases(s);
	struct conn_share *share = conns_share(&s->t->conns, conn);

	if (clash(latest(conn), next) || (erased && !conn->erased)) {
		share = conns_share_add(&s->t->conns, conn);
		if (share && conn->waiting)
			note_brief(share, conn->coming);
		else if (share && !conn->erased)
			share->changed = s->now;
		if (share)
			share->latest = s->now;
	}
	conn->coming = next;
	conn->waiting = clash(conn->mark, next) ? 1 : 0;
	if (row_has(s, CT_HAS_MARK))
		conn->erased = erased & 3;
}

static void take_event(struct step *s)
{
	if (!s->conn && appear(s))
		return;
	raise_ghost(s);
	learn(s);
	change_owner(s);
}

/*
 * Close the old owner's share if by this row there is a new one, or none any
 * more. Counters are as in conn->seen; the change itself was when its event
 * came, if one did. The share is told even without packets: it was his.
 */
static void settle_owner(struct step *s, uint64_t end)
{
	struct conn *conn = s->conn;
	const struct conn_share *share = conns_share(&s->t->conns, conn);
	uint32_t owners = merge(latest(conn), row_mark(s));
	unsigned int nobody = conn->erased & gone(conn->mark, row_mark(s));

	put_briefs(s);
	if (!clash(conn->mark, owners) && !nobody)
		return;		/* still waiting, if it was: the row is older */
	if ((conn->waiting || nobody) && share && share->changed)
		end = share->changed;
	close_share(s->t, conn, end, FLOW_OWNER, s->out);
	conn->mark = conn->coming = without(owners, nobody);
	conn->waiting = 0;
	conn->erased = 0;
	conn->untold = conn->mark ? 1 : 0;
}

/*
 * Dump and events come by different sockets: a row of the dump may be older
 * than what events or the answer to a GET have told since it was written.
 * True if this one is to be ignored.
 */
static int outdated(struct step *s)
{
	struct conn *conn = s->conn;

	/* destroyed since */
	if ((!conn || (!conn->has_start && row_start(s))) &&
	    conns_buried(&s->t->conns, s->hash, s->in->id[s->row], row_start(s)))
		return 1;
	/* a later one was taken in this very round */
	return conn && fell(s) && conn->dumped == s->t->round;
}

static void take_dump(struct step *s, int active)
{
	if (outdated(s))
		return;
	if (s->conn && fell(s))
		restart(s);
	else if (!s->conn && appear(s))
		return;
	raise_ghost(s);
	learn(s);
	learn_counters(s);
	s->conn->dumped = s->t->round;
	settle_owner(s, s->now);
	/* A new owner is named at once, also where his packets were counted before. */
	if (active && (has_new(s->t, s->conn) || s->conn->untold))
		close_share(s->t, s->conn, s->now, FLOW_ACTIVE, s->out);
}

static void take_destroy(struct step *s)
{
	struct conns *conns = &s->t->conns;

	/*
	 * Reliable delivery repeats a DESTROY to all when one listener had no
	 * room for it (nf_conntrack_ecache.c). Without a start time a repeat
	 * cannot be told from a reincarnation.
	 */
	if (!s->conn && row_start(s) &&
	    conns_buried(conns, s->hash, s->in->id[s->row], row_start(s)))
		return;
	if (s->conn && fell(s))
		restart(s);
	else if (!s->conn && appear(s))
		return;
	if (!row_start(s) && !s->conn->shown)
		s->conn->start = row_end(s);	/* never seen alive */
	learn(s);
	settle_owner(s, row_end(s));
	learn_counters(s);
	if (!s->conn->ghost || has_new(s->t, s->conn))
		put_share(s->t, s->conn, row_end(s), end_reason(s->conn), s->out);
	raise_ghost(s);
	conns_bury(conns, s->hash, s->conn->id, row_start(s));
	conns_remove(conns, s->conn);
}

static void look_up(struct step *s)
{
	row_key(s->in, s->row, &s->key);
	s->hash = conns_hash(&s->t->conns, &s->key);
	s->conn = conns_find(&s->t->conns, &s->key, s->hash, s->in->id[s->row],
			     row_start(s));
}

/* Counters as the store has them, to go on from: so nothing is told twice. */
static void learn_sums(struct step *s, const struct flow_batch *sums)
{
	uint64_t n[COUNTERS], sum[COUNTERS];
	int i;

	if (!sums->count)
		return;
	row_counters(s, n);
	sum[OPACKETS] = sums->opackets[0];
	sum[OBYTES] = sums->obytes[0];
	sum[RPACKETS] = sums->rpackets[0];
	sum[RBYTES] = sums->rbytes[0];
	for (i = 0; i < COUNTERS; i++)
		if (sum[i] > n[i])
			return;		/* another connection after all */
	memcpy(s->conn->seen, sum, sizeof(sum));
	ct_table_recorded(s->t, sums);
}

void ct_table_settle(struct ct_table *t, const struct ct_batch *events,
		     uint32_t row, uint64_t now, const struct flow_batch *sums,
		     struct flow_batch *out)
{
	struct step s = { .t = t, .in = events, .row = row, .now = now, .out = out };

	look_up(&s);
	if (!s.conn && appear(&s))
		return;
	if (row_start(&s)) {
		s.conn->start = row_start(&s);
		s.conn->has_start = 1;
	}
	learn_sums(&s, sums);
	take_destroy(&s);
}

uint32_t ct_table_apply(struct ct_table *t, const struct ct_batch *events,
			uint32_t from, uint64_t now, int active,
			struct flow_batch *out,
			uint32_t *asks, uint32_t max_asks, uint32_t *nasks)
{
	struct step s = { .t = t, .in = events, .now = now, .out = out };
	int ask, strange;

	*nasks = 0;
	for (s.row = from; s.row < events->count; s.row++) {
		if (out->capacity - out->count < ROOM)
			break;
		look_up(&s);
		strange = max_asks && is_strange(&s);
		ask = max_asks && (strange || wants_ask(&s));
		if (ask && *nasks == max_asks)
			break;
		if (ask)
			asks[(*nasks)++] = s.row;
		if (strange)
			return s.row + 1;	/* what follows may be its successor's */
		if (events->msg[s.row] == CT_DUMP)
			take_dump(&s, active);
		else if (events->msg[s.row] == CT_DESTROY)
			take_destroy(&s);
		else
			take_event(&s);
	}
	return s.row;
}
