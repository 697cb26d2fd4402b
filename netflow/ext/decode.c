// SPDX-License-Identifier: GPL-2.0-only
/*
 * decode.c - conntrack's netlink messages into columns, and back into a
 * request.
 *
 * The layout is that of ctnetlink_fill_info() and ctnetlink_conntrack_event()
 * in net/netfilter/nf_conntrack_netlink.c, constants from
 * linux/netfilter/nfnetlink_conntrack.h. Everything on the wire is checked
 * against the end of what encloses it before it is read; multi-byte values
 * are copied out, since a 64-bit value is only 4-byte aligned there.
 */
#include <arpa/inet.h>
#include <endian.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_conntrack.h>
#include <linux/netlink.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include "columns.h"
#include "ct.h"

#define CT_COLUMNS(X)							\
	X(msg) X(has) X(family) X(proto) X(tcp_state) X(zone)		\
	X(id) X(mark) X(status)						\
	X(src_hi) X(src_lo) X(dst_hi) X(dst_lo) X(sport) X(dport)	\
	X(rsrc_hi) X(rsrc_lo) X(rdst_hi) X(rdst_lo) X(rsport) X(rdport)	\
	X(opackets) X(obytes) X(rpackets) X(rbytes) X(start) X(stop)

#define V4_PREFIX 0x0000ffff00000000ull	/* ::ffff:0:0, its low half */

struct ct_batch *ct_batch_new(uint32_t capacity)
{
	COLUMNS_NEW(struct ct_batch, CT_COLUMNS);
}

void ct_batch_free(struct ct_batch *b)
{
	free(b);
}

/* -- reading attributes ------------------------------------------------------ */

struct span {
	const uint8_t *at, *end;
};

struct attr {
	unsigned int type;
	struct span data;
};

/* NLA_ALIGN and NLMSG_ALIGN (both to 4) without their signed arithmetic. */
static size_t align4(size_t n)
{
	return (n + 3) & ~(size_t)3;
}

static size_t left(const struct span *s)
{
	return (size_t)(s->end - s->at);
}

/* 1: *a is the next attribute; 0: no more; -1: the lengths do not add up. */
static int next_attr(struct span *s, struct attr *a)
{
	struct nlattr nla;
	size_t step;

	if (s->at == s->end)
		return 0;
	if (left(s) < sizeof(nla))
		return -1;
	memcpy(&nla, s->at, sizeof(nla));
	if (nla.nla_len < sizeof(nla) || nla.nla_len > left(s))
		return -1;
	a->type = nla.nla_type & (unsigned int)NLA_TYPE_MASK;
	a->data.at = s->at + sizeof(nla);
	a->data.end = s->at + nla.nla_len;
	/* the last attribute of a message need not be padded */
	step = align4(nla.nla_len);
	s->at = step < left(s) ? s->at + step : s->end;
	return 1;
}

static int get_u8(const struct span *s, uint8_t *v)
{
	if (left(s) < sizeof(*v))
		return -1;
	*v = *s->at;
	return 0;
}

static int get_be16(const struct span *s, uint16_t *v)
{
	if (left(s) < sizeof(*v))
		return -1;
	memcpy(v, s->at, sizeof(*v));
	*v = be16toh(*v);
	return 0;
}

static int get_be32(const struct span *s, uint32_t *v)
{
	if (left(s) < sizeof(*v))
		return -1;
	memcpy(v, s->at, sizeof(*v));
	*v = be32toh(*v);
	return 0;
}

static int get_be64(const struct span *s, uint64_t *v)
{
	if (left(s) < sizeof(*v))
		return -1;
	memcpy(v, s->at, sizeof(*v));
	*v = be64toh(*v);
	return 0;
}

/* -- one message ------------------------------------------------------------- */

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

static int parse_row(struct span s, struct row *r)
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

static void put_row(struct ct_batch *b, uint8_t msg, const struct row *r)
{
	uint32_t i = b->count++;

	b->msg[i] = msg;
	b->has[i] = r->has;
	b->family[i] = r->orig.seen & SEEN_V4 ? AF_INET : AF_INET6;
	b->proto[i] = r->orig.proto;
	b->tcp_state[i] = r->state;
	b->zone[i] = r->zone;
	b->id[i] = r->id;
	b->mark[i] = r->mark;
	b->status[i] = r->status;
	b->src_hi[i] = r->orig.src.hi;
	b->src_lo[i] = r->orig.src.lo;
	b->dst_hi[i] = r->orig.dst.hi;
	b->dst_lo[i] = r->orig.dst.lo;
	b->sport[i] = r->orig.sport;
	b->dport[i] = r->orig.dport;
	b->rsrc_hi[i] = r->reply.src.hi;
	b->rsrc_lo[i] = r->reply.src.lo;
	b->rdst_hi[i] = r->reply.dst.hi;
	b->rdst_lo[i] = r->reply.dst.lo;
	b->rsport[i] = r->reply.sport;
	b->rdport[i] = r->reply.dport;
	b->opackets[i] = r->opackets;
	b->obytes[i] = r->obytes;
	b->rpackets[i] = r->rpackets;
	b->rbytes[i] = r->rbytes;
	b->start[i] = r->start;
	b->stop[i] = r->stop;
}

/* -- one buffer -------------------------------------------------------------- */

/*
 * Which kind of message; 0 if it is not conntrack's. A dump row, the answer
 * to a GET and an event about a new or changed connection all have the same
 * type. What tells them apart is the sequence number: an answer carries its
 * request's (ctnetlink_fill_info()), an event always 0
 * (ctnetlink_conntrack_event()). The port id does not: an event caused by
 * somebody's `conntrack -U` or `-D` carries that process's port id.
 */
static uint8_t kind(const struct nlmsghdr *nlh)
{
	unsigned int fresh = NLM_F_CREATE | NLM_F_EXCL;

	if (NFNL_SUBSYS_ID(nlh->nlmsg_type) != NFNL_SUBSYS_CTNETLINK)
		return 0;
	switch (NFNL_MSG_TYPE(nlh->nlmsg_type)) {
	case IPCTNL_MSG_CT_DELETE:
		return CT_DESTROY;
	case IPCTNL_MSG_CT_NEW:
		/* the answer's flags are few: NLM_F_MULTI is 2, CREATE 0x400 */
		if (nlh->nlmsg_seq || nlh->nlmsg_flags & NLM_F_MULTI)
			return CT_DUMP;
		return (nlh->nlmsg_flags & fresh) == fresh ? CT_NEW : CT_UPDATE;
	}
	return 0;
}

/* NLMSG_ERROR and NLMSG_DONE both begin with a negative errno or 0. */
static void note_error(const struct nlmsghdr *nlh, const struct span *body,
		       struct ct_decoded *d)
{
	int32_t code;

	if (left(body) < sizeof(code)) {
		d->malformed++;
		return;
	}
	memcpy(&code, body->at, sizeof(code));
	if (code >= 0)
		return;
	d->error = code == INT32_MIN ? INT32_MAX : -code;
	d->error_seq = nlh->nlmsg_seq;
}

static void decode_message(const struct nlmsghdr *nlh, struct span body,
			   struct ct_batch *out, struct ct_decoded *d)
{
	uint8_t msg = kind(nlh);
	struct row r;

	if (nlh->nlmsg_flags & NLM_F_DUMP_INTR)
		d->interrupted = 1;
	if (nlh->nlmsg_type == NLMSG_DONE)
		d->done = 1;
	if (nlh->nlmsg_type == NLMSG_DONE || nlh->nlmsg_type == NLMSG_ERROR) {
		note_error(nlh, &body, d);
		return;
	}
	if (!msg) {
		d->skipped++;
		return;
	}
	if (left(&body) < sizeof(struct nfgenmsg)) {
		d->malformed++;
		return;
	}
	body.at += sizeof(struct nfgenmsg);
	if (parse_row(body, &r))
		d->malformed++;
	else
		put_row(out, msg, &r);
}

struct ct_decoded ct_decode(const void *buf, size_t len, struct ct_batch *out)
{
	struct span rest = { buf, (const uint8_t *)buf + len };
	struct ct_decoded d = { 0 };
	struct nlmsghdr nlh;
	struct span body;
	size_t step;

	while (rest.at < rest.end && !d.error) {
		if (left(&rest) < sizeof(nlh))
			goto truncated;
		memcpy(&nlh, rest.at, sizeof(nlh));
		if (nlh.nlmsg_len < sizeof(nlh) || nlh.nlmsg_len > left(&rest))
			goto truncated;
		if (out->count == out->capacity && kind(&nlh))
			break;
		body.at = rest.at + sizeof(nlh);
		body.end = rest.at + nlh.nlmsg_len;
		decode_message(&nlh, body, out, &d);
		step = align4(nlh.nlmsg_len);
		rest.at = step < left(&rest) ? rest.at + step : rest.end;
	}
	d.used = (size_t)(rest.at - (const uint8_t *)buf);
	return d;

truncated:
	d.malformed++;
	d.used = len;
	return d;
}

/* -- asking again ------------------------------------------------------------ */

struct writer {
	uint8_t *base;
	size_t at, len;
	int full;
};

static void *reserve(struct writer *w, size_t n)
{
	void *place;

	if (w->full || w->len - w->at < align4(n)) {
		w->full = 1;
		return NULL;
	}
	place = w->base + w->at;
	memset(place, 0, align4(n));
	w->at += align4(n);
	return place;
}

static void put_attr(struct writer *w, unsigned int type, const void *data,
		     size_t n)
{
	struct nlattr nla = { (uint16_t)(sizeof(nla) + n), (uint16_t)type };
	uint8_t *place = reserve(w, sizeof(nla) + n);

	if (!place)
		return;
	memcpy(place, &nla, sizeof(nla));
	if (n)
		memcpy(place + sizeof(nla), data, n);
}

static size_t nest(struct writer *w, unsigned int type)
{
	size_t at = w->at;

	put_attr(w, type | NLA_F_NESTED, NULL, 0);
	return at;
}

static void unnest(struct writer *w, size_t at)
{
	uint16_t n = (uint16_t)(w->at - at);

	if (!w->full)
		memcpy(w->base + at, &n, sizeof(n));
}

static void put_addr(struct writer *w, unsigned int v4, unsigned int v6,
		     int family, uint64_t hi, uint64_t lo)
{
	uint64_t wide[2] = { htobe64(hi), htobe64(lo) };
	uint32_t narrow = htobe32((uint32_t)lo);

	if (family == AF_INET)
		put_attr(w, v4, &narrow, sizeof(narrow));
	else
		put_attr(w, v6, wide, sizeof(wide));
}

static void put_proto(struct writer *w, const struct ct_batch *b, uint32_t row)
{
	uint16_t sport = htobe16(b->sport[row]), dport = htobe16(b->dport[row]);
	uint8_t proto = b->proto[row];
	uint8_t type = (uint8_t)(b->dport[row] >> 8);
	uint8_t code = (uint8_t)b->dport[row];

	put_attr(w, CTA_PROTO_NUM, &proto, 1);
	if (proto == IPPROTO_ICMP) {
		put_attr(w, CTA_PROTO_ICMP_ID, &sport, 2);
		put_attr(w, CTA_PROTO_ICMP_TYPE, &type, 1);
		put_attr(w, CTA_PROTO_ICMP_CODE, &code, 1);
	} else if (proto == IPPROTO_ICMPV6) {
		put_attr(w, CTA_PROTO_ICMPV6_ID, &sport, 2);
		put_attr(w, CTA_PROTO_ICMPV6_TYPE, &type, 1);
		put_attr(w, CTA_PROTO_ICMPV6_CODE, &code, 1);
	} else {
		put_attr(w, CTA_PROTO_SRC_PORT, &sport, 2);
		put_attr(w, CTA_PROTO_DST_PORT, &dport, 2);
	}
}

static void put_tuple(struct writer *w, const struct ct_batch *b, uint32_t row)
{
	size_t tuple = nest(w, CTA_TUPLE_ORIG);
	size_t inner = nest(w, CTA_TUPLE_IP);

	put_addr(w, CTA_IP_V4_SRC, CTA_IP_V6_SRC, b->family[row],
		 b->src_hi[row], b->src_lo[row]);
	put_addr(w, CTA_IP_V4_DST, CTA_IP_V6_DST, b->family[row],
		 b->dst_hi[row], b->dst_lo[row]);
	unnest(w, inner);
	inner = nest(w, CTA_TUPLE_PROTO);
	put_proto(w, b, row);
	unnest(w, inner);
	unnest(w, tuple);
}

size_t ct_get_request(const struct ct_batch *b, uint32_t row, uint32_t seq,
		      void *buf, size_t len)
{
	struct writer w = { buf, 0, len, 0 };
	uint16_t zone = htobe16(b->zone[row]);
	struct nfgenmsg gen = { b->family[row], NFNETLINK_V0, 0 };
	struct nlmsghdr nlh = {
		.nlmsg_type = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET,
		.nlmsg_flags = NLM_F_REQUEST,
		.nlmsg_seq = seq,
	};

	reserve(&w, sizeof(nlh) + sizeof(gen));
	put_tuple(&w, b, row);
	if (zone)
		put_attr(&w, CTA_ZONE, &zone, sizeof(zone));
	if (w.full)
		return 0;
	nlh.nlmsg_len = (uint32_t)w.at;
	memcpy(w.base, &nlh, sizeof(nlh));
	memcpy(w.base + sizeof(nlh), &gen, sizeof(gen));
	return w.at;
}
