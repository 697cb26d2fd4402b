// SPDX-License-Identifier: GPL-2.0-only
/*
 * table.c - the table of live connections: its life, its state after a
 * restart, and what a dump did not show.
 */
#include <stdlib.h>
#include <string.h>

#include "table.h"

struct ct_table *ct_table_new(void)
{
	struct ct_table *t = calloc(1, sizeof(*t));

	if (!t)
		return NULL;
	if (conns_init(&t->conns)) {
		free(t);
		return NULL;
	}
	t->round = 1;
	return t;
}

void ct_table_free(struct ct_table *t)
{
	if (!t)
		return;
	conns_exit(&t->conns);
	free(t);
}

uint32_t ct_table_count(const struct ct_table *t)
{
	return t->conns.count - t->ghosts;
}

uint32_t ct_table_lost(const struct ct_table *t)
{
	return t->ghosts;
}

uint64_t ct_table_never_ended(const struct ct_table *t)
{
	return t->forgotten;
}

size_t ct_table_memory(const struct ct_table *t)
{
	return sizeof(*t) - sizeof(t->conns) + conns_memory(&t->conns);
}

/* -- after a restart ------------------------------------------------------------------ */

static void flow_key(const struct flow_batch *f, uint32_t i, struct conn_key *key)
{
	*key = (struct conn_key){
		.src_hi = f->src_hi[i], .src_lo = f->src_lo[i],
		.dst_hi = f->dst_hi[i], .dst_lo = f->dst_lo[i],
		.sport = f->sport[i], .dport = f->dport[i],
		.zone = f->zone[i], .proto = f->proto[i],
	};
}

void ct_table_old(struct ct_table *t, uint64_t before)
{
	t->before = before;
}

static void recorded(struct ct_table *t, const struct flow_batch *f, uint32_t i)
{
	uint64_t sum[COUNTERS] = {
		f->opackets[i], f->obytes[i], f->rpackets[i], f->rbytes[i],
	};
	struct conn_share *share;
	struct conn_key key;
	struct conn *conn;
	int n;

	flow_key(f, i, &key);
	conn = conns_find(&t->conns, &key, conns_hash(&t->conns, &key),
			  f->flow_id[i], f->flow_start[i]);
	if (!conn)
		return;
	for (n = 0; n < COUNTERS; n++)
		if (sum[n] > conn->seen[n])
			return;		/* another connection after all */
	share = conns_share_add(&t->conns, conn);
	if (!share || share->end)
		return;		/* of what was recorded since, the table knows more */
	memcpy(share->sum, sum, sizeof(sum));
	share->end = f->end[i];
	conn->start = f->flow_start[i];
}

void ct_table_recorded(struct ct_table *t, const struct flow_batch *sums)
{
	uint32_t i;

	for (i = 0; i < sums->count; i++)
		recorded(t, sums, i);
}

/* -- what a dump did not show ----------------------------------------------------------- */

void ct_table_dump_begin(struct ct_table *t)
{
	t->round = t->round == UINT8_MAX ? 1 : t->round + 1;
	t->sweep_at = 0;
}

/*
 * A lost connection is kept for a while: with reliable events the kernel has
 * taken it out of its table and still owes us its DESTROY, which then adds what
 * is missing instead of counting all of it again. The kernel repeats it every
 * few ticks (nf_conntrack_ecache.c, ecache_work), but on a busy machine behind
 * everything else, and sweeps may follow each other closely.
 */
static void lose(struct ct_table *t, struct conn *conn, uint64_t now,
		 struct flow_batch *out)
{
	close_share(t, conn, now, FLOW_LOST, out);
	conn->ghost = 1;
	conn->waiting = 0;
	conn->dumped = t->round;
	t->ghosts++;
}

static int may_still_end(const struct ct_table *t, const struct conn *conn,
			 uint64_t now)
{
	struct conn_share *s = conns_share(&t->conns, conn);

	if (!s)
		return 0;
	if (s->end > now)	/* the clock was set back */
		s->end = now;
	return now - s->end < CT_LOST_FOR;
}

int ct_table_sweep(struct ct_table *t, uint64_t now, struct flow_batch *out)
{
	struct conn *conn;

	for (; t->sweep_at < t->conns.conn.top; t->sweep_at++) {
		conn = conns_at(&t->conns, t->sweep_at + 1);
		if (!conn || conn->shown == t->round)
			continue;
		if (!conn->ghost) {
			if (out->count == out->capacity)
				return 1;
			lose(t, conn, now, out);
		} else if (conn->dumped != t->round &&
			   !may_still_end(t, conn, now)) {
			t->ghosts--;
			t->forgotten++;
			conns_remove(&t->conns, conn);
		}
	}
	t->sweep_at = 0;
	return 0;
}
