// SPDX-License-Identifier: GPL-2.0-only
/*
 * fuzz_story.c - a small kernel that lives as the input says, and a collector
 * that must get its sums right.
 *
 * The kernel's side has a few connections that begin, count packets, change
 * owner and end; its events and the rows of its dumps wait in two queues that
 * the collector reads at different speeds, so that each overtakes the other.
 * The collector does what ct.h asks of it, no more. Whatever the order:
 * every packet of every connection is recorded exactly once, with owners the
 * connection had, and each connection ends exactly once.
 *
 * The first byte is the world's manner. Ids are handed out as the kernel does
 * at its worst (the same slot, the same id), or never twice. Ends may be told
 * twice. A lossy world forgets events: then what went unseen may be missing,
 * but nothing is recorded twice. So it is when the collector is killed and
 * another one starts, which knows what was recorded; ends that the kernel still
 * had to tell, it may tell that one. A hasty collector sweeps before it has read
 * the events that wait: then connections get lost that end after all, and the
 * sums must be right all the same.
 */
#include <string.h>

#include "check.h"

enum { SLOTS = 4, QUEUE = 512, LIVES = 512, COUNTS = 4 };
enum { IDS_DIFFER = 1, REPEAT_ENDS = 2, LOSSY = 4, HASTY = 8 };

struct life {			/* one incarnation: what is true of it */
	uint64_t start, stop, end, count[COUNTS], recorded[COUNTS];
	uint32_t id, mark, marks;	/* marks: bit 4 * half + owner, ever */
	uint8_t slot, alive, ends, told;
};

struct queue {
	struct ct_batch *rows;
	uint32_t first;
};

struct world {
	struct life life[LIVES];
	int lives, slot[SLOTS];		/* the life in a slot, -1: none */
	struct queue events, dumped, answers;
	struct ct_table *table;
	struct flow_batch *out;
	uint64_t clock;
	int dumping;			/* the next slot to dump, -1: none */
	int how;
	int killed;
	struct flow_batch *sums;
};

static uint64_t tick(struct world *w)
{
	return w->clock += 1000000000ull;
}

/* -- the kernel ------------------------------------------------------------------ */

static void say(struct queue *q, uint8_t msg, const struct life *l)
{
	struct ct_batch *b = q->rows;
	uint32_t i = b->count;

	CHECK(i < b->capacity);
	b->count++;
	b->msg[i] = msg;
	b->has[i] = l->mark ? CT_HAS_MARK : 0;
	b->family[i] = 2;
	b->proto[i] = l->slot & 1 ? 6 : 17;
	b->tcp_state[i] = 0;
	b->zone[i] = 0;
	b->id[i] = l->id;
	b->mark[i] = l->mark;
	b->status[i] = 0;
	b->src_hi[i] = b->dst_hi[i] = 0;
	b->src_lo[i] = b->dst_lo[i] = l->slot;
	b->sport[i] = b->dport[i] = 7;
	b->start[i] = b->stop[i] = 0;
	b->opackets[i] = b->obytes[i] = b->rpackets[i] = b->rbytes[i] = 0;
	if (msg < CT_DESTROY)
		return;
	b->has[i] |= CT_HAS_COUNTERS | CT_HAS_START;
	b->start[i] = l->start;
	b->opackets[i] = l->count[0];
	b->obytes[i] = l->count[1];
	b->rpackets[i] = l->count[2];
	b->rbytes[i] = l->count[3];
	if (msg == CT_DESTROY) {
		b->has[i] |= CT_HAS_STOP;
		b->stop[i] = l->stop;
	}
}

static int has_room(const struct queue *q)
{
	return q->rows->count + 4 < q->rows->capacity;
}

static void note_owners(struct life *l)
{
	l->marks |= 1u << (l->mark & 3) | 16u << (l->mark >> 16 & 3);
}

static void begin(struct world *w, int slot, uint8_t arg)
{
	struct life *l = &w->life[w->lives];

	if (w->slot[slot] >= 0 || w->lives == LIVES || !has_room(&w->events))
		return;
	memset(l, 0, sizeof(*l));
	l->start = tick(w);
	l->slot = (uint8_t)slot;
	l->id = w->how & IDS_DIFFER ? (uint32_t)w->lives + 1 : (uint32_t)slot;
	l->mark = (arg & 3) | (uint32_t)(arg >> 2 & 3) << 16;
	l->marks = 1 | 16;		/* a half may be told late */
	l->alive = 1;
	note_owners(l);
	w->slot[slot] = w->lives++;
	say(&w->events, CT_NEW, l);
}

static void own(struct world *w, struct life *l, uint8_t arg)
{
	uint32_t owner = 1 + (arg & 1) + (arg >> 1 & 1);

	if (!has_room(&w->events))
		return;
	if (arg & 4)
		l->mark = (l->mark & 0xffff) | owner << 16;
	else
		l->mark = (l->mark & 0xffff0000) | owner;
	note_owners(l);
	say(&w->events, CT_UPDATE, l);
}

static void count(struct life *l, uint8_t arg)
{
	l->count[0] += arg & 3;
	l->count[1] += 100u * (arg & 3);
	l->count[2] += arg >> 2 & 3;
	l->count[3] += 99u * (arg >> 2 & 3);
}

static void finish(struct world *w, struct life *l)
{
	if (!has_room(&w->events))
		return;
	l->stop = tick(w);
	l->alive = 0;
	w->slot[l->slot] = -1;
	say(&w->events, CT_DESTROY, l);
	if (w->how & REPEAT_ENDS)
		say(&w->events, CT_DESTROY, l);
}

/* -- the collector ------------------------------------------------------------------ */

/* A life by its id, where that is its own, or else by its start. */
static struct life *meant(struct world *w, const struct flow_batch *f, uint32_t i)
{
	struct life *l;
	int n;

	for (n = 0; n < w->lives; n++) {
		l = &w->life[n];
		if (l->slot != f->src_lo[i] || l->id != f->flow_id[i])
			continue;
		/* recorded as lost before its start was known: from first sight */
		if (w->how & HASTY)
			CHECK(l->start <= f->flow_start[i]);
		if (w->how & HASTY || l->start == f->flow_start[i])
			return l;
	}
	return NULL;
}

static void take_flow(struct world *w, const struct flow_batch *f, uint32_t i)
{
	struct life *l = meant(w, f, i);
	uint64_t told[COUNTS] = {
		f->opackets[i], f->obytes[i], f->rpackets[i], f->rbytes[i],
	};
	int n;

	CHECK(f->reason[i] != FLOW_LOST || w->how & (LOSSY | HASTY));
	if (!l) {	/* of one that only a NEW was seen of, the start is not known */
		CHECK(f->reason[i] == FLOW_LOST);
		for (n = 0; n < COUNTS; n++)
			CHECK(told[n] == 0);
		return;
	}
	l->told = 1;
	l->end = f->end[i];
	for (n = 0; n < COUNTS; n++) {
		l->recorded[n] += told[n];
		CHECK(l->recorded[n] <= l->count[n]);
	}
	if (f->reason[i] == FLOW_IDLE || f->reason[i] == FLOW_CLOSED) {
		CHECK(!l->alive && l->ends++ == 0);
		for (n = 0; n < COUNTS; n++)
			CHECK(l->recorded[n] == l->count[n]);
		/* later, if an active share was closed when it had ended already */
		CHECK(f->end[i] >= l->stop);
	}
	/* with reused ids, an event without a start can be taken for another's */
	if (w->how & IDS_DIFFER) {
		CHECK(l->marks & 1u << (f->oxid[i] & 3));
		CHECK(l->marks & 16u << (f->rxid[i] & 3));
	}
}

static void flush(struct world *w)
{
	uint32_t i;

	check_flows(w->out);
	for (i = 0; i < w->out->count; i++)
		take_flow(w, w->out, i);
	w->out->count = 0;
}

static void drop_read(struct queue *q)
{
	if (q->first < q->rows->count)
		return;
	q->rows->count = q->first = 0;
}

/* Events that there was no room for. */
static void forget(struct queue *q, uint32_t n)
{
	uint32_t waiting = q->rows->count - q->first;

	q->first += n < waiting ? n : waiting;
	drop_read(q);
}

/* What the store holds of a life. */
static void put_sums(struct world *w, const struct life *l)
{
	struct flow_batch *s = w->sums;
	uint32_t i = s->count;

	if (!l->told)
		return;
	CHECK(i < s->capacity);
	s->count++;
	s->src_hi[i] = s->dst_hi[i] = 0;
	s->src_lo[i] = s->dst_lo[i] = l->slot;
	s->sport[i] = s->dport[i] = 7;
	s->zone[i] = 0;
	s->proto[i] = l->slot & 1 ? 6 : 17;
	s->flow_id[i] = l->id;
	s->flow_start[i] = l->start;
	s->end[i] = l->end;
	s->opackets[i] = l->recorded[0];
	s->obytes[i] = l->recorded[1];
	s->rpackets[i] = l->recorded[2];
	s->rbytes[i] = l->recorded[3];
}

/* The end of one that a new collector does not know, but the store may. */
static void settle(struct world *w, const struct ct_batch *b, uint32_t row)
{
	const struct life *l = NULL;
	int n;

	for (n = 0; n < w->lives; n++)
		if (w->life[n].start == b->start[row])
			l = &w->life[n];
	CHECK(l && w->killed);
	if (l->ends)
		return;
	w->sums->count = 0;
	put_sums(w, l);
	ct_table_settle(w->table, b, row, w->clock, w->sums, w->out);
	flush(w);
}

/* Read up to n rows. An ask is answered by the kernel at once, by tuple. */
static void take(struct world *w, struct queue *q, uint32_t n, int active)
{
	uint32_t keep = q->rows->count, asks[2], nasks, i;

	if (n < keep - q->first)
		q->rows->count = q->first + n;
	tick(w);
	while (q->first < q->rows->count) {
		q->first = ct_table_apply(w->table, q->rows, q->first, w->clock,
					  active, w->out, asks, 2, &nasks);
		flush(w);
		for (i = 0; i < nasks; i++) {
			int slot = (int)q->rows->src_lo[asks[i]];

			if (q->rows->msg[asks[i]] == CT_DESTROY)
				settle(w, q->rows, asks[i]);
			else if (w->slot[slot] >= 0 && has_room(&w->answers))
				say(&w->answers, CT_DUMP, &w->life[w->slot[slot]]);
		}
	}
	q->rows->count = keep;
	drop_read(q);
}

static void dump(struct world *w, uint8_t arg)
{
	if (w->dumping < 0) {
		take(w, &w->answers, QUEUE, 0);
		ct_table_dump_begin(w->table);
		w->dumping = 0;
		return;
	}
	if (w->dumping < SLOTS) {
		if (w->slot[w->dumping] >= 0 && has_room(&w->dumped))
			say(&w->dumped, CT_DUMP, &w->life[w->slot[w->dumping]]);
		w->dumping++;
		return;
	}
	/* complete: read it all, then the events that wait, then sweep */
	take(w, &w->dumped, QUEUE, arg & 1);
	if (!(w->how & HASTY))
		take(w, &w->events, QUEUE, 0);
	while (ct_table_sweep(w->table, tick(w), w->out))
		flush(w);
	flush(w);
	take(w, &w->events, QUEUE, 0);	/* at the latest before the next sweep */
	w->dumping = -1;
}

/* Of what was not read, only ends are told again, if at all. */
static void lose_unread(struct queue *q, int all)
{
	struct ct_batch *b = q->rows;
	uint32_t i, kept = 0;

	for (i = q->first; i < b->count && !all; i++) {
		if (b->msg[i] != CT_DESTROY)
			continue;
		b->msg[kept] = b->msg[i];
		b->has[kept] = b->has[i];
		b->proto[kept] = b->proto[i];
		b->id[kept] = b->id[i];
		b->mark[kept] = b->mark[i];
		b->src_lo[kept] = b->dst_lo[kept] = b->src_lo[i];
		b->start[kept] = b->start[i];
		b->stop[kept] = b->stop[i];
		b->opackets[kept] = b->opackets[i];
		b->obytes[kept] = b->obytes[i];
		b->rpackets[kept] = b->rpackets[i];
		b->rbytes[kept++] = b->rbytes[i];
	}
	q->first = 0;
	b->count = kept;
}

/* kill -9, and another collector: its first dump, and what the store holds. */
static void kill_and_resume(struct world *w, uint8_t arg)
{
	int n;

	w->killed = 1;
	ct_table_free(w->table);
	w->table = ct_table_new();
	CHECK(w->table);
	if (!(arg & 2))		/* or the next one listened before this one died */
		lose_unread(&w->events, arg & 1);
	lose_unread(&w->dumped, 1);
	lose_unread(&w->answers, 1);
	w->dumping = -1;
	ct_table_dump_begin(w->table);
	w->sums->count = 0;
	for (n = 0; n < SLOTS; n++) {
		if (w->slot[n] < 0)
			continue;
		say(&w->dumped, CT_DUMP, &w->life[w->slot[n]]);
		put_sums(w, &w->life[w->slot[n]]);
	}
	take(w, &w->dumped, QUEUE, 0);
	ct_table_recorded(w->table, w->sums);
	ct_table_old(w->table, tick(w));
}

static void step(struct world *w, uint8_t op, uint8_t arg)
{
	int slot = op >> 4 & (SLOTS - 1);
	struct life *l = w->slot[slot] >= 0 ? &w->life[w->slot[slot]] : NULL;

	switch (op & 7) {
	case 0:
		begin(w, slot, arg);
		break;
	case 1:
		if (l)
			count(l, arg);
		break;
	case 2:
		if (l)
			own(w, l, arg);
		break;
	case 3:
		if (l)
			finish(w, l);
		break;
	case 4:
		if (w->how & LOSSY && arg & 8)
			forget(&w->events, arg & 7);
		else
			take(w, &w->events, arg & 7, 0);
		break;
	case 5:
		take(w, &w->answers, arg & 7, 0);
		break;
	case 6:
		take(w, &w->dumped, arg & 7, arg & 8);
		break;
	case 7:
		if ((op & 0xf8) == 0xf8)
			kill_and_resume(w, arg);
		else
			dump(w, arg);
		break;
	}
}

static void end_all(struct world *w)
{
	int i, n;

	take(w, &w->events, QUEUE, 0);
	for (i = 0; i < SLOTS; i++)
		if (w->slot[i] >= 0)
			finish(w, &w->life[w->slot[i]]);
	take(w, &w->events, QUEUE, 0);
	take(w, &w->answers, QUEUE, 0);
	take(w, &w->dumped, QUEUE, 1);
	if (w->how & LOSSY || w->killed)
		return;
	CHECK(ct_table_count(w->table) == 0);
	for (i = 0; i < w->lives; i++) {
		CHECK(w->life[i].ends == 1 || w->how & HASTY);
		for (n = 0; n < COUNTS; n++)
			CHECK(w->life[i].recorded[n] == w->life[i].count[n]);
	}
}

static void queue_new(struct queue *q)
{
	q->rows = ct_batch_new(QUEUE);
	q->first = 0;
	CHECK(q->rows);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct world w;
	size_t i;

	memset(&w, 0, sizeof(w));
	memset(w.slot, 0xff, sizeof(w.slot));
	w.how = size ? data[0] : 0;
	if (w.how & HASTY)
		w.how |= IDS_DIFFER;
	w.dumping = -1;
	w.clock = 1000;
	w.table = ct_table_new();
	w.out = flow_batch_new(4 + (w.how >> 4 & 3));
	w.sums = flow_batch_new(LIVES);
	CHECK(w.table && w.out && w.sums);
	queue_new(&w.events);
	queue_new(&w.dumped);
	queue_new(&w.answers);
	for (i = 1; i + 1 < size; i += 2)
		step(&w, data[i], data[i + 1]);
	end_all(&w);
	ct_batch_free(w.events.rows);
	ct_batch_free(w.dumped.rows);
	ct_batch_free(w.answers.rows);
	flow_batch_free(w.sums);
	flow_batch_free(w.out);
	ct_table_free(w.table);
	return 0;
}
