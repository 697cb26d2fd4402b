/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The module-free data path: what its rules ask in POSTROUTING and INPUT
 *
 * An xtables match cannot write a mark. So the rules write, with CONNMARK and
 * xt_socket, and these programs tell them what no match of the kernel's knows:
 * whether the connection says already what the packet says, and what kind of
 * sender there is. The questions are the module's (main.c, record.c).
 */
#ifndef _VNET_PATH_H
#define _VNET_PATH_H

#include "gate.h"

#define SOCK_STREAM		1

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
	__be16 inet_sport;
} CO_RE;

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

/* The owner of the end whose own packets travel in this direction. */
static __always_inline __u32 half_of(struct conn c, bool reply)
{
	struct nf_conn *ct = c.ct;	/* BPF_CORE_READ would relocate c.ct, too */
	__u32 mark = BPF_CORE_READ(ct, mark);

	return reply ? mark >> 16 : mark & VNET_XID_MASK;
}

/*
 * POSTROUTING: the packet is a slice's, and its connection says so already.
 * That is so for nearly every packet of a slice's, so this is asked first.
 */
SEC("socket")
int vnet_settled(struct __sk_buff *ctx)
{
	__u32 xid = ctx->mark & VNET_XID_MASK;
	struct conn c;

	if (!xid || ctx->ingress_ifindex)
		return 0;
	c = conn_of(plain(ctx));
	return c.ct && half_of(c, c.reply) == xid;
}

/*
 * INPUT, after the receiving socket's whole mark has been put on a packet that
 * had nothing in the upper half: it has nothing there now either, and the
 * connection names the receiver's slice already.
 */
SEC("socket")
int vnet_received(struct __sk_buff *ctx)
{
	__u32 mark = ctx->mark;
	struct conn c;

	if (!mark || mark > VNET_XID_MASK)
		return 0;
	c = conn_of(plain(ctx));
	return c.ct && half_of(c, !c.reply) == mark;
}

/*
 * POSTROUTING: the mark is not that of a user's socket, so the connection
 * answers. The kernel's own sockets say nothing (but its TCP sockets stand
 * behind a user's), and a TIME_WAIT's last owner may have been followed by
 * another. A packet that was received only passes through. One without a
 * socket that was not received, but has a mark, is the copy of a multicast
 * packet that loops back. A mark that is not its socket's: a tunnel's own
 * (wireguard's fwmark), or forged, where the guard only observes.
 */
SEC("socket")
int vnet_unowned(struct __sk_buff *ctx)
{
	struct sk_buff *skb = plain(ctx);
	struct sock *sk = BPF_CORE_READ(skb, sk);
	__u8 state;

	if (!sk)
		return ctx->ingress_ifindex || !(ctx->mark & VNET_XID_MASK);
	state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (state == TCP_NEW_SYN_RECV)
		return 0;
	if (state == TCP_TIME_WAIT)
		return 1;
	if (is_kernels(sk) &&
	    !(BPF_CORE_READ(sk, sk_type) == SOCK_STREAM &&
	      BPF_CORE_READ(sk, sk_protocol) == IPPROTO_TCP))
		return 1;
	return (BPF_CORE_READ(sk, sk_mark) ^ ctx->mark) & VNET_XID_MASK;
}

/* POSTROUTING: it only passes through, no socket of this host's sends it. */
SEC("socket")
int vnet_passing(struct __sk_buff *ctx)
{
	struct sk_buff *skb = plain(ctx);

	return ctx->ingress_ifindex && !BPF_CORE_READ(skb, sk);
}

/*
 * POSTROUTING: an ordinary socket sends this, and is really at this end of the
 * connection. A tunnel's outer packet still carries the socket of the inner
 * one: that socket pays for this packet, but does not own the tunnel.
 */
SEC("socket")
int vnet_holds(struct __sk_buff *ctx)
{
	struct sk_buff *skb = plain(ctx);
	struct sock *sk = BPF_CORE_READ(skb, sk);
	struct inet_sock___path *inet = (void *)sk;
	struct conn c = conn_of(skb);
	struct nf_conn___path *ct = (void *)c.ct;
	__be16 port;

	if (!sk || !ct)
		return 0;
	if (BPF_CORE_READ(sk, __sk_common.skc_state) == TCP_NEW_SYN_RECV)
		return 1;
	if (!is_ordinary(sk) ||
	    BPF_CORE_READ(sk, sk_protocol) !=
	    BPF_CORE_READ(ct, tuplehash[0].tuple.dst.protonum))
		return 0;
	port = c.reply ? BPF_CORE_READ(ct, tuplehash[1].tuple.src.u.all) :
			 BPF_CORE_READ(ct, tuplehash[0].tuple.src.u.all);
	return BPF_CORE_READ(inet, inet_sport) == port;
}

/*
 * POSTROUTING: whether a raw sender may fill the empty half of its connection:
 * where it has just made the connection, or nobody else can be at this end.
 * The module looks whether somebody is: a socket filter cannot look up
 * sockets, so of TCP and UDP only what is sent from a port that is reserved to
 * the sender's slice counts.
 */
SEC("socket")
int vnet_may_fill(struct __sk_buff *ctx)
{
	struct sk_buff *skb = plain(ctx);
	unsigned long nfct = BPF_CORE_READ(skb, _nfct);
	struct nf_conn *ct = (void *)(nfct & ~NFCT_INFOMASK);
	__u32 ctinfo = nfct & NFCT_INFOMASK;
	struct packet pkt;

	if (!ct)
		return 0;
	if (!(BPF_CORE_READ(ct, status) & IPS_CONFIRMED))
		return 1;
	/* a forged ICMP error says nothing about the connection it quotes */
	if (ctinfo % IP_CT_IS_REPLY == IP_CT_RELATED)
		return 0;
	switch (BPF_CORE_READ(ct, tuplehash[0].tuple.dst.protonum)) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
		return read_packet(ctx, &pkt) == PACKET_READ &&
		       is_own_port(in_force(), pkt.proto, pkt.sport, &pkt.saddr,
				   ctx->mark & VNET_XID_MASK);
	case IPPROTO_ICMP:	/* the kernel answers these itself */
	case IPPROTO_ICMPV6:
	case IPPROTO_SCTP:
	case IPPROTO_DCCP:
		return 0;
	}
	return 1;
}

#endif /* _VNET_PATH_H */
