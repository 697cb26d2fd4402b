/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * table.h - the table's inside, shared by those that write it.
 *
 *   apply.c	takes what the kernel said, row by row
 *   share.c	closes shares of connections into records
 *   table.c	makes a table, restores it, and sweeps what a dump did not show
 */
#ifndef NETFLOW_TABLE_H
#define NETFLOW_TABLE_H

#include "conns.h"
#include "ct.h"

struct ct_table {
	struct conns conns;
	uint32_t ghosts;	/* of conns.count, those recorded as lost */
	uint64_t forgotten;	/* ghosts whose end never came */
	uint32_t sweep_at;	/* handles up to this one are swept */
	uint8_t round;		/* which dump this is, never 0 */
	uint64_t before;	/* what began earlier may be in the store, 0: nothing */
};

/* More was seen of the connection than is recorded. */
int has_new(const struct ct_table *t, const struct conn *conn);

/*
 * Write the open share down: everything seen and not yet recorded. out must
 * have room for it.
 */
void put_share(const struct ct_table *t, const struct conn *conn,
	       uint64_t end, uint8_t reason, struct flow_batch *out);

/*
 * Close the open share of a connection that goes on. If there is no memory to
 * remember it by, it stays open: late is better than twice.
 */
void close_share(struct ct_table *t, struct conn *conn, uint64_t end,
		 uint8_t reason, struct flow_batch *out);

/* FLOW_CLOSED or FLOW_IDLE. */
uint8_t end_reason(const struct conn *conn);

#endif /* NETFLOW_TABLE_H */
