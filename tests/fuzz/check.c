// SPDX-License-Identifier: GPL-2.0-only
/*
 * check.c - the invariants, by a model that is slow and obvious.
 */
#include <string.h>
#include <sys/types.h>

#include "check.h"

/* -Dgetrandom=fixed_random: the same input must do the same every time. */
ssize_t fixed_random(void *buf, size_t len, unsigned int flags)
{
	(void)flags;
	memset(buf, 0x5a, len);
	return (ssize_t)len;
}

void check_flows(const struct flow_batch *out)
{
	uint32_t i;

	CHECK(out->count <= out->capacity);
	for (i = 0; i < out->count; i++) {
		CHECK(out->reason[i] >= FLOW_IDLE && out->reason[i] <= FLOW_LOST);
		CHECK(out->start[i] <= out->end[i]);
		if (out->reason[i] == FLOW_ACTIVE)
			/* without packets it only names a new owner */
			CHECK(out->opackets[i] || out->rpackets[i] ||
			      out->oxid[i] || out->rxid[i]);
	}
}

enum { NAME_WORDS = 6, COUNTS = 4, KNOWN_MAX = 512 };

struct known {
	uint64_t name[NAME_WORDS];
	uint64_t start, last[COUNTS];
	unsigned __int128 grown[COUNTS], recorded[COUNTS];
};

struct bound {
	struct known known[KNOWN_MAX];
	int count;
};

struct bound *bound_new(void)
{
	struct bound *b = malloc(sizeof(*b));

	CHECK(b);
	b->count = 0;
	return b;
}

void bound_free(struct bound *b)
{
	free(b);
}

static struct known *find(struct bound *b, const uint64_t name[NAME_WORDS])
{
	struct known *k;
	int i;

	for (i = 0; i < b->count; i++)
		if (!memcmp(b->known[i].name, name, sizeof(b->known[i].name)))
			return &b->known[i];
	CHECK(b->count < KNOWN_MAX);
	k = &b->known[b->count++];
	memset(k, 0, sizeof(*k));
	memcpy(k->name, name, sizeof(k->name));
	return k;
}

#define NAME(b, ids, i, name)						\
	uint64_t name[NAME_WORDS] = {					\
		(b)->src_hi[i], (b)->src_lo[i], (b)->dst_hi[i], (b)->dst_lo[i], \
		(uint64_t)(b)->sport[i] << 32 | (uint64_t)(b)->dport[i] << 16 | \
			(b)->zone[i],					\
		(uint64_t)(b)->proto[i] << 32 | (ids)[i],		\
	}

void bound_row(struct bound *b, const struct ct_batch *in, uint32_t row)
{
	NAME(in, in->id, row, name);
	struct known *k = find(b, name);
	uint64_t now[COUNTS] = {
		in->opackets[row], in->obytes[row], in->rpackets[row], in->rbytes[row],
	};
	uint64_t start = in->has[row] & CT_HAS_START ? in->start[row] : 0;
	int i, fresh = start != k->start;

	if (!(in->has[row] & CT_HAS_COUNTERS) || in->msg[row] < CT_DESTROY)
		return;
	for (i = 0; i < COUNTS; i++)
		fresh |= now[i] < k->last[i];
	for (i = 0; i < COUNTS; i++) {
		k->grown[i] += fresh ? now[i] : now[i] - k->last[i];
		k->last[i] = now[i];
	}
	k->start = start;
	/* a repeated end without a start time cannot be told from another */
	if (in->msg[row] == CT_DESTROY && !start)
		memset(k->last, 0, sizeof(k->last));
}

void bound_sweep(struct bound *b)
{
	int i;

	for (i = 0; i < b->count; i++)
		memset(b->known[i].last, 0, sizeof(b->known[i].last));
}

void bound_flows(struct bound *b, const struct flow_batch *out)
{
	uint32_t i;
	int n;

	for (i = 0; i < out->count; i++) {
		uint64_t told[COUNTS] = {
			out->opackets[i], out->obytes[i], out->rpackets[i], out->rbytes[i],
		};
		NAME(out, out->flow_id, i, name);
		struct known *k = find(b, name);

		for (n = 0; n < COUNTS; n++) {
			k->recorded[n] += told[n];
			CHECK(k->recorded[n] <= k->grown[n]);
		}
	}
}
