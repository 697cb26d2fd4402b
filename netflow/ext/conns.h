/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * conns.h - where live connections are kept.
 *
 * A hash of 112-byte entries from a slab, found by original tuple, protocol
 * and zone, told apart by conntrack's id and by start. Entries are named by 32-bit handles
 * (0: none), since they are half a pointer and survive any growth. What only
 * some connections need (a NAT tuple, what is recorded of them already) lives
 * in slabs of its own.
 */
#ifndef NETFLOW_CONNS_H
#define NETFLOW_CONNS_H

#include <stddef.h>
#include <stdint.h>

struct slab {
	char **chunks;
	size_t size;		/* of one element, at least 4 */
	uint32_t nchunks, room;	/* chunks in use; room in the array of them */
	uint32_t top;		/* handles 1..top were given out at some time */
	uint32_t free;		/* the first of a chain of returned ones */
};

struct conn_key {		/* 40 bytes without a hole: hashed as it is */
	uint64_t src_hi, src_lo, dst_hi, dst_lo;
	uint16_t sport, dport, zone;
	uint8_t proto, zero;
};

enum { OPACKETS, OBYTES, RPACKETS, RBYTES, COUNTERS };

struct conn {
	struct conn_key key;
	uint64_t start;			/* the connection's */
	uint64_t seen[COUNTERS];	/* counters as last seen */
	uint32_t next;			/* in the hash chain */
	uint32_t hash;
	uint32_t id;
	uint32_t mark;			/* owners of the share that is open */
	uint32_t coming;		/* owners of the next one, while waiting */
	uint32_t share;			/* struct conn_share, 0: not needed yet */
	uint32_t nat;			/* struct conn_nat, 0: not translated */
	uint8_t shown;			/* dump round an event or dump showed it, 0: free */
	uint8_t dumped;			/* dump round a dump or GET showed it */
	uint8_t state;			/* TCP's or SCTP's, as last seen */
	uint8_t has_start : 1;		/* start is the kernel's, not first sight */
	uint8_t waiting : 1;		/* for counters at its change of owner */
	uint8_t erased : 2;		/* halves an event said nobody owns any more: 1 low, 2 high */
	uint8_t ghost : 1;		/* recorded as lost, kept in case its end still comes */
	uint8_t untold : 1;		/* it changed owner, and no record names the new one yet */
};

#define BRIEF 2u

struct conn_share {		/* what is recorded of a connection */
	uint64_t end;			/* of the last share, 0: none yet */
	uint64_t changed;		/* when its owner did, while waiting */
	uint64_t latest;		/* when it did last */
	uint64_t brief_from[BRIEF];	/* who came and went while waiting, from when */
	uint32_t brief[BRIEF];		/* 0: nobody */
	uint64_t sum[COUNTERS];
};

struct conn_nat {		/* its tuple as the other side sees it */
	uint64_t src_hi, src_lo, dst_hi, dst_lo;
	uint16_t sport, dport;
};

#ifndef DEAD_BUCKETS		/* the fuzzer makes many tables, with few */
#define DEAD_BUCKETS 8192u
#endif
#define DEAD_WAYS 8u

struct conns {
	struct slab conn, share, nat;
	uint32_t **heads;	/* segments of chain heads */
	uint32_t segments;
	uint32_t buckets, low;	/* in use; the power of two at or below */
	uint32_t count;
	uint64_t secret[2];	/* tenants choose tuples: collisions must not be computable */
	uint64_t *dead;		/* who was destroyed lately, newest first in each bucket */
};

int conns_init(struct conns *c);	/* -1: no memory */
void conns_exit(struct conns *c);
size_t conns_memory(const struct conns *c);

uint64_t conns_hash(const struct conns *c, const struct conn_key *key);
/*
 * By name and start (0: unknown), since an id alone may have been handed out
 * again. An entry whose start is not known yet stands for any that it can have
 * begun at; of several that may be meant, the latest. NULL: none. The pointer
 * stays good until the connection is removed.
 */
struct conn *conns_find(const struct conns *c, const struct conn_key *key,
			uint64_t hash, uint32_t id, uint64_t start);
struct conn *conns_insert(struct conns *c, const struct conn_key *key,
			  uint64_t hash, uint32_t id);	/* NULL: no memory */
void conns_remove(struct conns *c, struct conn *conn);
/* Forget all but its name: another connection has taken it. */
void conns_reset(struct conns *c, struct conn *conn);
/* By handle, 1..c->conn.top; NULL where that is free. For walking them all. */
struct conn *conns_at(const struct conns *c, uint32_t handle);

struct conn_share *conns_share(const struct conns *c, const struct conn *conn);
struct conn_share *conns_share_add(struct conns *c, struct conn *conn);
struct conn_nat *conns_nat(const struct conns *c, const struct conn *conn);
struct conn_nat *conns_nat_add(struct conns *c, struct conn *conn);

/*
 * Remember, and ask, whether a connection was destroyed lately. The last
 * 30,000 or so are known; a few are forgotten sooner, none is made up.
 */
void conns_bury(struct conns *c, uint64_t hash, uint32_t id, uint64_t start);
int conns_buried(const struct conns *c, uint64_t hash, uint32_t id,
		 uint64_t start);

#endif /* NETFLOW_CONNS_H */
