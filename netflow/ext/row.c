// SPDX-License-Identifier: GPL-2.0-only
/*
 * row.c - what one conntrack message says.
 *
 * The layout is that of ctnetlink_fill_info() in
 * net/netfilter/nf_conntrack_netlink.c, constants from
 * linux/netfilter/nfnetlink_conntrack.h.
 */
#include <linux/netfilter/nfnetlink_conntrack.h>

#include "ct.h"
#include "row.h"

#define V4_PREFIX 0x0000ffff00000000ull	/* ::ffff:0:0, its low half */

enum { GOT_OPACKETS = 1, GOT_RPACKETS = 2 };	/* CT_HAS_COUNTERS needs both */

static int get_v4(const struct span *s, struct addr *a)
{
	uint32_t v4;

	if (left(s) != sizeof(v4) || get_be32(s, &v4))
		return -1;
	a->hi = 0;
	a->lo = V4_PREFIX | v4;
	return 0;
}

static int get_v6(const struct span *s, struct addr *a)
{
	struct span low = { s->at + 8, s->end };

	if (left(s) != 16)
		return -1;
	return get_be64(s, &a->hi) | get_be64(&low, &a->lo);
}

static int parse_ip(struct span s, struct tuple *t)
{
	struct attr a;
	int more, err = 0;

	while ((more = next_attr(&s, &a)) > 0 && !err) {
		switch (a.type) {
		case CTA_IP_V4_SRC:
			err = get_v4(&a.data, &t->src);
			t->seen |= SEEN_SRC | SEEN_V4;
			break;
		case CTA_IP_V4_DST:
			err = get_v4(&a.data, &t->dst);
			t->seen |= SEEN_DST | SEEN_V4;
			break;
		case CTA_IP_V6_SRC:
			err = get_v6(&a.data, &t->src);
			t->seen |= SEEN_SRC | SEEN_V6;
			break;
		case CTA_IP_V6_DST:
			err = get_v6(&a.data, &t->dst);
			t->seen |= SEEN_DST | SEEN_V6;
			break;
		}
	}
	return more | err;
}

/* ICMP has no ports: the echo id stands for one, type and code for the other. */
static int parse_proto(struct span s, struct tuple *t)
{
	uint8_t type = 0, code = 0;
	int more, err = 0, icmp = 0;
	struct attr a;

	while ((more = next_attr(&s, &a)) > 0 && !err) {
		switch (a.type) {
		case CTA_PROTO_NUM:
			err = get_u8(&a.data, &t->proto);
			break;
		case CTA_PROTO_SRC_PORT:
		case CTA_PROTO_ICMP_ID:
		case CTA_PROTO_ICMPV6_ID:
			err = get_be16(&a.data, &t->sport);
			break;
		case CTA_PROTO_DST_PORT:
			err = get_be16(&a.data, &t->dport);
			break;
		case CTA_PROTO_ICMP_TYPE:
		case CTA_PROTO_ICMPV6_TYPE:
			err = get_u8(&a.data, &type);
			icmp = 1;
			break;
		case CTA_PROTO_ICMP_CODE:
		case CTA_PROTO_ICMPV6_CODE:
			err = get_u8(&a.data, &code);
			icmp = 1;
			break;
		}
	}
	if (icmp)
		t->dport = (uint16_t)(type << 8 | code);
	return more | err;
}

static int parse_tuple(struct span s, struct tuple *t)
{
	int more, err = 0;
	struct attr a;

	memset(t, 0, sizeof(*t));
	while ((more = next_attr(&s, &a)) > 0 && !err) {
		if (a.type == CTA_TUPLE_IP)
			err = parse_ip(a.data, t);
		else if (a.type == CTA_TUPLE_PROTO)
			err = parse_proto(a.data, t);
		else if (a.type == CTA_TUPLE_ZONE)
			err = get_be16(&a.data, &t->zone);
	}
	if (more | err)
		return -1;
	/* both addresses, and both of one family */
	if (t->seen != (SEEN_SRC | SEEN_DST | SEEN_V4) &&
	    t->seen != (SEEN_SRC | SEEN_DST | SEEN_V6))
		return -1;
	return 0;
}

static int parse_counters(struct span s, uint64_t *packets, uint64_t *bytes)
{
	int more, err = 0, got = 0;
	uint32_t small;
	struct attr a;

	while ((more = next_attr(&s, &a)) > 0 && !err) {
		switch (a.type) {
		case CTA_COUNTERS_PACKETS:
			err = get_be64(&a.data, packets);
			got |= 1;
			break;
		case CTA_COUNTERS_BYTES:
			err = get_be64(&a.data, bytes);
			got |= 2;
			break;
		case CTA_COUNTERS32_PACKETS:
			err = get_be32(&a.data, &small);
			*packets = err ? 0 : small;
			got |= 1;
			break;
		case CTA_COUNTERS32_BYTES:
			err = get_be32(&a.data, &small);
			*bytes = err ? 0 : small;
			got |= 2;
			break;
		}
	}
	return (more | err) || got != 3 ? -1 : 0;
}

static int parse_timestamp(struct span s, struct row *r)
{
	int more, err = 0;
	struct attr a;

	while ((more = next_attr(&s, &a)) > 0 && !err) {
		if (a.type == CTA_TIMESTAMP_START) {
			err = get_be64(&a.data, &r->start);
			r->has |= CT_HAS_START;
		} else if (a.type == CTA_TIMESTAMP_STOP) {
			err = get_be64(&a.data, &r->stop);
			r->has |= CT_HAS_STOP;
		}
	}
	return more | err;
}

static int parse_state(struct span s, unsigned int which, uint8_t *state)
{
	int more, err = 0;
	struct attr a;

	while ((more = next_attr(&s, &a)) > 0 && !err)
		if (a.type == which)
			err = get_u8(&a.data, state);
	return more | err;
}

static int parse_protoinfo(struct span s, uint8_t *state)
{
	int more, err = 0;
	struct attr a;

	while ((more = next_attr(&s, &a)) > 0 && !err) {
		if (a.type == CTA_PROTOINFO_TCP)
			err = parse_state(a.data, CTA_PROTOINFO_TCP_STATE, state);
		else if (a.type == CTA_PROTOINFO_SCTP)
			err = parse_state(a.data, CTA_PROTOINFO_SCTP_STATE, state);
	}
	return more | err;
}

static int parse_one(const struct attr *a, struct row *r, int *got)
{
	int err = 0;

	switch (a->type) {
	case CTA_TUPLE_ORIG:
		return parse_tuple(a->data, &r->orig);
	case CTA_TUPLE_REPLY:
		r->has |= CT_HAS_REPLY;
		return parse_tuple(a->data, &r->reply);
	case CTA_STATUS:
		return get_be32(&a->data, &r->status);
	case CTA_MARK:
		r->has |= CT_HAS_MARK;
		return get_be32(&a->data, &r->mark);
	case CTA_ID:
		return get_be32(&a->data, &r->id);
	case CTA_ZONE:
		return get_be16(&a->data, &r->zone);
	case CTA_COUNTERS_ORIG:
		*got |= GOT_OPACKETS;
		return parse_counters(a->data, &r->opackets, &r->obytes);
	case CTA_COUNTERS_REPLY:
		*got |= GOT_RPACKETS;
		return parse_counters(a->data, &r->rpackets, &r->rbytes);
	case CTA_TIMESTAMP:
		return parse_timestamp(a->data, r);
	case CTA_PROTOINFO:
		return parse_protoinfo(a->data, &r->state);
	}
	return err;
}

int parse_row(struct span s, struct row *r)
{
	int more, err = 0, got = 0;
	struct attr a;

	memset(r, 0, sizeof(*r));
	while ((more = next_attr(&s, &a)) > 0 && !err)
		err = parse_one(&a, r, &got);
	if ((more | err) || !r->orig.seen)
		return -1;
	if (got == (GOT_OPACKETS | GOT_RPACKETS))
		r->has |= CT_HAS_COUNTERS;
	/*
	 * A zone that holds for one direction only comes inside that
	 * direction's tuple, one for both at the top: ctnetlink_zone_id().
	 */
	if (!r->zone)
		r->zone = r->orig.zone;
	return 0;
}
