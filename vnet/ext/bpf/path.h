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

#include "join.h"

#define SOCK_STREAM		1

/* The owner of the end whose own packets travel in this direction. */
static __always_inline __u32 half_of(struct conn c, bool reply)
{
	struct nf_conn *ct = c.ct;	/* BPF_CORE_READ would relocate c.ct, too */
	__u32 mark = BPF_CORE_READ(ct, mark);

	return reply ? mark >> 16 : mark & VNET_XID_MASK;
}

/*
 * Whether the connection names xid as the owner of the end that sends in this
 * packet's direction, or that receives.
 */
static __always_inline bool names(struct __sk_buff *ctx, bool receiver,
				  __u32 xid)
{
	struct conn c;
	__u32 mark;

	if (CAN_CAST) {
		unsigned long nfct = typed(struct sk_buff, ctx)->_nfct;

		if (!(nfct & ~NFCT_INFOMASK))
			return false;
		mark = typed_u32((void *)(nfct & ~NFCT_INFOMASK) +
				 bpf_core_field_offset(struct nf_conn, mark));
		if (((nfct & NFCT_INFOMASK) >= IP_CT_IS_REPLY) != receiver)
			mark >>= 16;
		return (mark & VNET_XID_MASK) == xid;
	}
	c = conn_of(plain(ctx));
	return c.ct && half_of(c, c.reply != receiver) == xid;
}

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, VNET_SETTLED_MAX);
	__type(key, __u32);
	__type(value, __u64);
} settled SEC(".maps");

static __always_inline void count_settled(__u32 which)
{
	__u64 *packets = bpf_map_lookup_elem(&settled, &which);

	if (packets)
		__sync_fetch_and_add(packets, 1);
}

/*
 * POSTROUTING: 0 if the packet is a slice's, and its connection says so
 * already. That is so for nearly every packet of a slice's, so this is asked
 * first, and no rule stands before it.
 */
SEC("socket")
int vnet_unsettled(struct __sk_buff *ctx)
{
	__u32 xid = ctx->mark & VNET_XID_MASK;

	if (!xid || ctx->ingress_ifindex || !names(ctx, false, xid))
		return 1;
	count_settled(VNET_SETTLED_OUT);
	return 0;
}

/*
 * INPUT: not a later fragment of IPv6. Those come here only over loopback, where
 * they have their connection already and nf_defrag_ipv6 leaves them alone;
 * xt_socket takes the flow label for their ports (nf_sk_lookup_slow_v6() goes
 * by ipv6_find_hdr(), which does not say where a later fragment's header is).
 */
SEC("socket")
int vnet_whole(struct __sk_buff *ctx)
{
	struct packet pkt;
	__u8 next = 0;

	if (ctx->protocol != bpf_htons(ETH_P_IPV6))
		return 1;
	bpf_skb_load_bytes(ctx, IP6_NEXT, &next, sizeof(next));
	if (next == IPPROTO_UDP || next == IPPROTO_TCP)
		return 1;
	/* the fragment's header may be behind others */
	return read_packet(ctx, &pkt) == PACKET_READ;
}

/*
 * INPUT, after the receiving socket's whole mark has been put on a packet that
 * had nothing in the upper half. 0 if there is nothing there now either, and
 * the connection names the same receiver: socket or connection, whichever
 * is to be believed, the mark is right.
 */
SEC("socket")
int vnet_incoming(struct __sk_buff *ctx)
{
	__u32 mark = ctx->mark;

	if (!mark || mark > VNET_XID_MASK || !names(ctx, true, mark))
		return 1;
	count_settled(VNET_SETTLED_IN);
	return 0;
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
	__u32 mark;
	__u8 state;

	if (!sk)
		return ctx->ingress_ifindex || !(ctx->mark & VNET_XID_MASK) ||
		       !goes_to_many(ctx);
	state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (state == TCP_NEW_SYN_RECV)
		return 0;
	if (state == TCP_TIME_WAIT)
		return 1;
	if (is_kernels(sk) &&
	    !(BPF_CORE_READ(sk, sk_type) == SOCK_STREAM &&
	      BPF_CORE_READ(sk, sk_protocol) == IPPROTO_TCP))
		return 1;
	mark = BPF_CORE_READ(sk, sk_mark);
	if ((mark ^ ctx->mark) & VNET_XID_MASK)
		return 1;
	/* what SCTP's accept() gives has no mark (gate.h), but a slice */
	return !(mark & VNET_XID_MASK) &&
	       BPF_CORE_READ(sk, sk_protocol) == IPPROTO_SCTP &&
	       xid_of_sk(in_force(), sk);
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
	struct bpf_sock *common = ctx->sk;
	struct sk_buff *skb = plain(ctx);
	struct sock *sk = plain(common);

	if (!common || !conn_of(skb).ct)
		return 0;
	if (common->state == TCP_NEW_SYN_RECV)
		return 1;
	return common->state != TCP_TIME_WAIT && is_ordinary(sk) &&
	       is_at_this_end(skb, sk) && !is_as_raw(ctx, common);
}

/*
 * POSTROUTING: whether a slice's raw or packet socket sends this, or one that
 * is worth no more. The node's do not count, nor do those through which the
 * kernel itself sends resets and ICMP errors, which are raw ones, too: what
 * they send is the connection's.
 */
SEC("socket")
int vnet_raw(struct __sk_buff *ctx)
{
	struct bpf_sock *common = ctx->sk;
	struct sock *sk = plain(common);

	if (!common || !is_full(common) || !(ctx->mark & VNET_XID_MASK))
		return 0;
	return is_ordinary(sk) ? is_as_raw(ctx, common) : !is_kernels(sk);
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
