/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * row.h - one conntrack message, before it goes into the columns of a batch.
 */
#ifndef NETFLOW_ROW_H
#define NETFLOW_ROW_H

#include "attr.h"

struct addr {
	uint64_t hi, lo;
};

enum { SEEN_SRC = 1, SEEN_DST = 2, SEEN_V4 = 4, SEEN_V6 = 8 };

struct tuple {
	struct addr src, dst;
	uint16_t sport, dport, zone;
	uint8_t proto;
	uint8_t seen;		/* SEEN_*: which addresses, of which family */
};

struct row {
	struct tuple orig, reply;
	uint64_t opackets, obytes, rpackets, rbytes, start, stop;
	uint32_t id, mark, status;
	uint16_t zone;
	uint8_t has, state;
};

/* The attributes after struct nfgenmsg. -1: they do not add up. */
int parse_row(struct span s, struct row *r);

#endif /* NETFLOW_ROW_H */
