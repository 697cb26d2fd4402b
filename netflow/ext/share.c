// SPDX-License-Identifier: GPL-2.0-only
/*
 * share.c - the share of a connection that is closed becomes a flow record.
 *
 * The kernel's counters only grow, so every share is a difference: what was
 * seen last, less what is recorded already.
 */
#include <netinet/in.h>

#include "columns.h"
#include "owners.h"
#include "table.h"

#define FLOW_COLUMNS(X)							\
	X(flow_start) X(start) X(end) X(flow_id)			\
	X(proto) X(reason) X(tcp_state) X(zone)				\
	X(src_hi) X(src_lo) X(dst_hi) X(dst_lo) X(sport) X(dport)	\
	X(nsrc_hi) X(nsrc_lo) X(ndst_hi) X(ndst_lo) X(nsport) X(ndport)	\
	X(opackets) X(obytes) X(rpackets) X(rbytes) X(oxid) X(rxid)

struct flow_batch *flow_batch_new(uint32_t capacity)
{
	COLUMNS_NEW(struct flow_batch, FLOW_COLUMNS);
}

void flow_batch_free(struct flow_batch *b)
{
	free(b);
}

static uint64_t later(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

static uint64_t share_start(const struct conn *conn, const struct conn_share *s)
{
	return s && s->end ? s->end : conn->start;
}

int has_new(const struct ct_table *t, const struct conn *conn)
{
	const struct conn_share *s = conns_share(&t->conns, conn);

	return s ? conn->seen[OPACKETS] > s->sum[OPACKETS] ||
		   conn->seen[RPACKETS] > s->sum[RPACKETS] :
		   conn->seen[OPACKETS] || conn->seen[RPACKETS];
}

static void put_tuples(const struct conn_key *key, const struct conn_nat *nat,
		       struct flow_batch *out, uint32_t i)
{
	out->proto[i] = key->proto;
	out->zone[i] = key->zone;
	out->src_hi[i] = key->src_hi;
	out->src_lo[i] = key->src_lo;
	out->dst_hi[i] = key->dst_hi;
	out->dst_lo[i] = key->dst_lo;
	out->sport[i] = key->sport;
	out->dport[i] = key->dport;
	out->nsrc_hi[i] = nat ? nat->src_hi : key->src_hi;
	out->nsrc_lo[i] = nat ? nat->src_lo : key->src_lo;
	out->ndst_hi[i] = nat ? nat->dst_hi : key->dst_hi;
	out->ndst_lo[i] = nat ? nat->dst_lo : key->dst_lo;
	out->nsport[i] = nat ? nat->sport : key->sport;
	out->ndport[i] = nat ? nat->dport : key->dport;
}

void put_share(const struct ct_table *t, const struct conn *conn,
	       uint64_t end, uint8_t reason, struct flow_batch *out)
{
	static const uint64_t nothing[COUNTERS];
	const struct conn_share *s = conns_share(&t->conns, conn);
	const uint64_t *sum = s ? s->sum : nothing;
	uint32_t i = out->count++;

	put_tuples(&conn->key, conns_nat(&t->conns, conn), out, i);
	out->flow_start[i] = conn->start;
	out->start[i] = share_start(conn, s);
	/* the clock may have been set back meanwhile */
	out->end[i] = later(end, out->start[i]);
	out->flow_id[i] = conn->id;
	out->reason[i] = reason;
	out->tcp_state[i] = conn->state;
	out->opackets[i] = conn->seen[OPACKETS] - sum[OPACKETS];
	out->obytes[i] = conn->seen[OBYTES] - sum[OBYTES];
	out->rpackets[i] = conn->seen[RPACKETS] - sum[RPACKETS];
	out->rbytes[i] = conn->seen[RBYTES] - sum[RBYTES];
	out->oxid[i] = conn->mark & HALF;
	out->rxid[i] = (uint16_t)(conn->mark >> 16);
}

void close_share(struct ct_table *t, struct conn *conn, uint64_t end,
		 uint8_t reason, struct flow_batch *out)
{
	struct conn_share *s = conns_share_add(&t->conns, conn);

	if (!s)
		return;
	put_share(t, conn, end, reason, out);
	memcpy(s->sum, conn->seen, sizeof(s->sum));
	s->end = out->end[out->count - 1];
	conn->untold = 0;
}

/*
 * FLOW_CLOSED is judged by the last state alone. TCP: both FINs or a RST were
 * seen (LAST_ACK, TIME_WAIT, CLOSE); a half-closed connection that then went
 * silent (FIN_WAIT, CLOSE_WAIT) timed out. SCTP: CLOSED, SHUTDOWN_ACK_SENT.
 * So what `conntrack -D` or a full table removed from an established
 * connection reads as idle: conntrack does not say who removed it. The
 * numbers are enum tcp_conntrack and enum sctp_conntrack of the kernel.
 */
uint8_t end_reason(const struct conn *conn)
{
	uint8_t s = conn->state;

	if (conn->key.proto == IPPROTO_TCP)
		return s == 6 || s == 7 || s == 8 ? FLOW_CLOSED : FLOW_IDLE;
	if (conn->key.proto == IPPROTO_SCTP)
		return s == 1 || s == 7 ? FLOW_CLOSED : FLOW_IDLE;
	return FLOW_IDLE;
}
