/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the kernel knows of a packet: its way, its connection, its sender's end
 *
 * Headers (packet.h) do not tell, since a raw sender writes them.
 */
#ifndef _VNET_SKB_H
#define _VNET_SKB_H

#include "events.h"
#include "packet.h"
#include "typed.h"

struct sk_buff___path {
	void *dev;
	__u16 inner_network_header;
} CO_RE;

struct net_device___path {
	unsigned int flags;
} CO_RE;

struct dst_entry___path {
	struct net_device___path *dev;
} CO_RE;

struct sk_buff___route {
	unsigned long _skb_refdst;
} CO_RE;

union nf_conntrack_man_proto___path {
	__be16 all;
} CO_RE;

struct nf_conntrack_man___path {
	union nf_conntrack_man_proto___path u;
} CO_RE;

struct nf_conntrack_tuple___path {
	struct nf_conntrack_man___path src;
	struct {
		__u8 protonum;
	} dst;
} CO_RE;

struct nf_conntrack_tuple_hash___path {
	struct nf_conntrack_tuple___path tuple;
} CO_RE;

struct nf_conn___path {
	struct nf_conntrack_tuple_hash___path tuplehash[2];
} CO_RE;

struct inet_sock___path {
	__be32 inet_saddr;
	__be16 inet_sport;
} CO_RE;

struct rtable___path {
	unsigned int rt_flags;
} CO_RE;

/* include/uapi/linux/in_route.h */
#define RTCF_BROADCAST	0x10000000
#define RTCF_MULTICAST	0x20000000

#define SKB_DST_PTRMASK	(~1ul)
#define IFF_LOOPBACK	(1 << 3)

/*
 * The outer packet of a tunnel. Headers do not tell, since a raw sender
 * writes them; but nobody outside the kernel sets this. In OUTPUT no packet
 * but one that has been through a device has one.
 */
static __always_inline bool is_outer(struct sk_buff *skb, bool in_output)
{
	struct sk_buff___path *path = (void *)skb;

	return BPF_CORE_READ(path, inner_network_header) ||
	       (in_output && BPF_CORE_READ(path, dev));
}

/* A packet's connection, and the direction it travels in. */
struct conn {
	struct nf_conn *ct;	/* NULL: none */
	bool reply;
};

static __always_inline struct conn conn_of(struct sk_buff *skb)
{
	unsigned long nfct = BPF_CORE_READ(skb, _nfct);
	struct conn c = {
		.ct = (void *)(nfct & ~NFCT_INFOMASK),
		.reply = (nfct & NFCT_INFOMASK) >= IP_CT_IS_REPLY,
	};

	return c;
}

/* Routed to this host itself. A header may name any destination. */
static __always_inline bool stays_here(struct sk_buff *skb)
{
	struct sk_buff___route *routed = (void *)skb;
	struct dst_entry___path *dst =
		(void *)(BPF_CORE_READ(routed, _skb_refdst) & SKB_DST_PTRMASK);

	return dst && BPF_CORE_READ(dst, dev, flags) & IFF_LOOPBACK;
}

/* To a group, or a broadcast: only such a packet has a copy that loops back. */
static __always_inline bool goes_to_many(struct __sk_buff *ctx)
{
	struct sk_buff___route *routed = plain(ctx);
	struct rtable___path *route;
	__u8 first = 0;

	if (ctx->protocol == bpf_htons(ETH_P_IPV6)) {
		bpf_skb_load_bytes(ctx, 24, &first, sizeof(first));
		return first == 0xff;
	}
	route = (void *)(BPF_CORE_READ(routed, _skb_refdst) & SKB_DST_PTRMASK);
	return route && BPF_CORE_READ(route, rt_flags) &
			(RTCF_MULTICAST | RTCF_BROADCAST);
}

/* A tunnel's outer packet still has the socket of the one inside. */
static __always_inline bool is_at_this_end(struct sk_buff *skb, struct sock *sk)
{
	struct inet_sock___path *inet = (void *)sk;
	struct conn c = conn_of(skb);
	struct nf_conn___path *ct = (void *)c.ct;
	__be16 port;

	if (!ct || BPF_CORE_READ(sk, sk_protocol) !=
		   BPF_CORE_READ(ct, tuplehash[0].tuple.dst.protonum))
		return false;
	port = c.reply ? BPF_CORE_READ(ct, tuplehash[1].tuple.src.u.all) :
			 BPF_CORE_READ(ct, tuplehash[0].tuple.src.u.all);
	return BPF_CORE_READ(inet, inet_sport) == port;
}

/*
 * A UDP socket that is bound to an address may send from another one
 * (IP_PKTINFO, IPV6_PKTINFO, or after binding to a group or a broadcast
 * address): bind() has not been asked about that one.
 */
static __always_inline bool sends_from_elsewhere(struct __sk_buff *ctx,
						 struct bpf_sock *sk)
{
	__u32 from[4], bound[4];	/* each member read once: no pointer
					 * to them may be computed */

	if (ctx->protocol == bpf_htons(ETH_P_IP)) {
		bound[0] = sk->src_ip4;
		return bound[0] && ip_word(ctx, IP4_SOURCE) != bound[0];
	}
	bound[0] = sk->src_ip6[0];
	bound[1] = sk->src_ip6[1];
	bound[2] = sk->src_ip6[2];
	bound[3] = sk->src_ip6[3];
	return (bound[0] | bound[1] | bound[2] | bound[3]) &&
	       !bpf_skb_load_bytes(ctx, 8, from, sizeof(from)) &&
	       ((from[0] ^ bound[0]) | (from[1] ^ bound[1]) |
		(from[2] ^ bound[2]) | (from[3] ^ bound[3]));
}

static __always_inline bool refuse_packet(struct policy p,
					  struct __sk_buff *ctx,
					  struct sock *sk,
					  const struct packet *pkt, __u32 xid,
					  __u32 owner, __u8 kind)
{
	struct vnet_event event = {
		.xid = xid,
		.owner = owner,
		.mark = ctx->mark,
		.kind = kind,
		.family = pkt->family,
		.proto = pkt->proto,
		.sport = pkt->sport,
		.dport = pkt->dport,
	};

	if (sk)
		event.type = BPF_CORE_READ(sk, sk_type);
	__builtin_memcpy(event.saddr, &pkt->saddr, sizeof(event.saddr));
	__builtin_memcpy(event.daddr, &pkt->daddr, sizeof(event.daddr));
	return refuse(p, &event);
}

#endif /* _VNET_SKB_H */
