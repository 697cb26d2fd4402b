// SPDX-License-Identifier: GPL-2.0-only
/*
 * fuzz_decode.c - any bytes as netlink messages, and what comes of them
 * through the table.
 *
 * The first byte chooses how small the batches are and when dumps begin and
 * end; the rest is the buffer, in memory that ends where it ends.
 */
#include <string.h>

#include "check.h"

#define ROWS_MAX 256	/* the model knows no more than twice as many */

static void check_request(const struct ct_batch *b, uint32_t row)
{
	struct ct_batch *back = ct_batch_new(1);
	struct ct_decoded d;
	uint8_t request[192];
	uint32_t seq = 1;
	size_t n, len = row % (sizeof(request) + 1);

	CHECK(back);
	CHECK(ct_get_request(b, row, seq, request, len) <= len);
	n = ct_get_request(b, row, seq, request, sizeof(request));
	CHECK(n > 0 && n <= sizeof(request));
	request[4] = 0;		/* IPCTNL_MSG_CT_GET becomes ..._NEW: an answer */
	d = ct_decode(request, n, back);
	CHECK(d.used == n && back->count == 1 && !d.malformed);
	CHECK(back->msg[0] == CT_DUMP && back->family[0] == b->family[row]);
	CHECK(back->src_hi[0] == b->src_hi[row] && back->src_lo[0] == b->src_lo[row]);
	CHECK(back->dst_hi[0] == b->dst_hi[row] && back->dst_lo[0] == b->dst_lo[row]);
	CHECK(back->sport[0] == b->sport[row] && back->dport[0] == b->dport[row]);
	CHECK(back->proto[0] == b->proto[row] && back->zone[0] == b->zone[row]);
	ct_batch_free(back);
}

struct run {
	struct ct_table *table;
	struct bound *bound;
	struct flow_batch *out;
	uint64_t now;
};

static void flush(struct run *r)
{
	check_flows(r->out);
	bound_flows(r->bound, r->out);
	ct_table_recorded(r->table, r->out);
	r->out->count = 0;
}

static void apply(struct run *r, const struct ct_batch *b, int active)
{
	uint32_t asks[3], nasks, row = 0, next, i;

	for (i = 0; i < b->count; i++)
		bound_row(r->bound, b, i);
	while (row < b->count) {
		next = ct_table_apply(r->table, b, row, r->now, active, r->out,
				      asks, 3, &nasks);
		CHECK(next >= row && next <= b->count);
		CHECK(next > row || r->out->count || nasks);
		for (i = 0; i < nasks; i++)
			CHECK(asks[i] >= row && asks[i] < next);
		flush(r);
		if (nasks && b->msg[asks[nasks - 1]] == CT_DESTROY) {
			CHECK(asks[nasks - 1] == next - 1);
			ct_table_settle(r->table, b, next - 1, r->now, r->out, r->out);
			flush(r);
		}
		row = next;
	}
	for (i = 0; i < b->count; i++)
		check_request(b, i);
	r->now += 1000;
}

static void sweep(struct run *r)
{
	while (ct_table_sweep(r->table, r->now, r->out))
		flush(r);
	flush(r);
	bound_sweep(r->bound);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct run r = { ct_table_new(), bound_new(), NULL, 1000 };
	struct ct_decoded d;
	struct ct_batch *b;
	uint8_t how = size ? data[0] : 0;
	size_t at = size ? 1 : 0;
	uint32_t rows = 0;

	b = ct_batch_new(1 + (how & 7));
	r.out = flow_batch_new(4 + (how >> 3 & 3));
	CHECK(r.table && r.bound && r.out && b);
	if (how & 1)
		ct_table_old(r.table, 1ull << 62);
	while (at < size && rows < ROWS_MAX) {
		b->count = 0;
		if (how & 32)
			ct_table_dump_begin(r.table);
		d = ct_decode(data + at, size - at, b);
		CHECK(d.used > 0 && d.used <= size - at);
		CHECK(b->count <= b->capacity);
		CHECK(b->count == b->capacity || d.error || d.used == size - at);
		apply(&r, b, how & 64);
		if (how & 128)
			sweep(&r);
		rows += b->count;
		at += d.used;
	}
	CHECK(ct_table_count(r.table) <= rows);
	CHECK(ct_table_memory(r.table) > 0);
	ct_batch_free(b);
	flow_batch_free(r.out);
	ct_table_free(r.table);
	bound_free(r.bound);
	return 0;
}
