// SPDX-License-Identifier: GPL-2.0-only
/*
 * request.c - ask the kernel again for one connection of a batch.
 *
 * The original tuple goes back as it came (row.c), in the layout that
 * ctnetlink_get_conntrack() of net/netfilter/nf_conntrack_netlink.c reads.
 */
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_conntrack.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include "attr.h"
#include "ct.h"

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
