/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Who asked for an echo
 *
 * Connection tracking knows pings by host and id alone: those of two slices
 * that take one id for one host share a connection, whose owner is the first.
 * So the mark of a reply does not tell who may hear it. What does is the
 * request: same host, id, number and data.
 */
#ifndef _VNET_ECHO_H
#define _VNET_ECHO_H

#include "packet.h"

#define ICMP_ECHOREPLY		0
#define ICMPV6_ECHO_REPLY	129

struct echo {
	struct vnet_address host;
	__u32 xid;		/* ANYBODY: the value is who asked last */
	__u16 id;
	__u16 number;
	__u16 data;		/* the sum of what is neither type nor code */
	__u16 zero;
};

#define ANYBODY	0xffffffff

/* Requests that wait for their reply: the oldest make room. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct echo);
	__type(value, __u32);
} echoes SEC(".maps");

static __always_inline bool is_echo_reply(const struct packet *pkt)
{
	if (pkt->family == AF_INET)
		return pkt->proto == IPPROTO_ICMP &&
		       pkt->sport >> 8 == ICMP_ECHOREPLY;
	return pkt->proto == IPPROTO_ICMPV6 &&
	       pkt->sport >> 8 == ICMPV6_ECHO_REPLY;
}

/* RFC 1071: the sum that the checksum stands for, without type and code */
static __always_inline __u16 sum_of_data(const struct packet *pkt)
{
	__u32 sum = (__u16)~(pkt->echo >> 16) + (__u16)~pkt->sport;

	sum = (sum & 0xffff) + (sum >> 16);
	return sum == 0xffff ? 0 : sum;
}

static __always_inline struct echo echo_of(const struct packet *pkt,
					   const struct vnet_address *host,
					   __u32 xid)
{
	struct echo e = {
		.host = *host,
		.xid = xid,
		.id = pkt->dport,
		.number = pkt->echo,
		.data = sum_of_data(pkt),
	};

	return e;
}

/* A raw or ping socket of this slice's (0: the node's) sends a request. */
static __noinline int asks(const struct packet *pkt, __u32 xid)
{
	struct echo e;

	if (!pkt)
		return 0;
	e = echo_of(pkt, &pkt->daddr, xid);
	bpf_map_update_elem(&echoes, &e, &xid, BPF_ANY);
	e.xid = ANYBODY;
	bpf_map_update_elem(&echoes, &e, &xid, BPF_ANY);
	return 0;
}

/*
 * May a raw socket of this slice's hear a reply? owner: of its connection. Who
 * asked may; the connection's owner may, unless somebody else asked just this
 * by a raw socket.
 */
static __noinline int may_hear_reply(const struct packet *pkt, __u32 xid,
				     __u32 owner)
{
	struct echo e;
	__u32 *last;

	if (!pkt)
		return 0;
	e = echo_of(pkt, &pkt->saddr, xid);
	if (bpf_map_lookup_elem(&echoes, &e))
		return 1;
	if (owner != xid)
		return 0;
	e.xid = ANYBODY;
	last = bpf_map_lookup_elem(&echoes, &e);
	return !last || *last == xid;
}

#endif /* _VNET_ECHO_H */
