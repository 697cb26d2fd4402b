/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A packet in a connection that is another's: mangle POSTROUTING, 1 is "drop it"
 *
 * A raw sender writes its packets' headers, and with them chooses whose
 * connection they belong to.
 */
#ifndef _VNET_JOIN_H
#define _VNET_JOIN_H

#include "mark.h"
#include "skb.h"

/* The half of the connection's mark that names the sender of this packet. */
static __always_inline __u32 half_out(struct sk_buff *skb)
{
	unsigned long nfct = BPF_CORE_READ(skb, _nfct);
	struct nf_conn *ct = (void *)(nfct & ~NFCT_INFOMASK);
	__u32 mark = ct ? BPF_CORE_READ(ct, mark) : 0;

	return (nfct & NFCT_INFOMASK) >= IP_CT_IS_REPLY ? mark >> 16 :
							  mark & VNET_XID_MASK;
}

static __noinline int join_raw(struct __sk_buff *ctx)
{
	struct sk_buff *skb = plain(ctx);
	struct sock *sk = BPF_CORE_READ(skb, sk);
	struct policy p;
	struct packet pkt;
	__u32 half, xid;

	if (is_kernels(sk) || is_outer(skb, false))
		return 0;
	half = half_out(skb);
	if (!half)
		return 0;
	p = in_force();
	xid = xid_of_sk(p, sk);
	if (!xid || xid == half)
		return 0;
	read_packet(ctx, &pkt);
	if (is_echo_request(&pkt))
		p.observe = true;
	return refuse_packet(p, ctx, sk, &pkt, xid, half, VNET_KIND_CONNECTION);
}

/*
 * A UDP socket sends from an address where it hears nothing, and another's may:
 * it is worth no more than a raw one then. What goes to a group is no
 * conversation, and its senders may well share a port. Of a full socket.
 */
static __always_inline bool is_as_raw(struct __sk_buff *ctx,
				      struct bpf_sock *common)
{
	struct sock *sk = plain(common);

	if (!sends_from_elsewhere(ctx, common))
		return false;
	return BPF_CORE_READ(sk, sk_protocol) == IPPROTO_UDP &&
	       is_at_this_end(plain(ctx), sk) && !goes_to_many(ctx);
}

/*
 * A slice's raw packet in a connection that is another slice's on this side.
 * Echo requests are not drawn into this: slices that ping one host may well
 * share an id, and with it a connection. With the module this is asked about
 * every packet that leaves, so the answer for nearly all of them takes no call.
 */
SEC("socket")
int vnet_join(struct __sk_buff *ctx)
{
	struct bpf_sock *common = ctx->sk;

	if (!common || !is_full(common) ||
	    (!is_raw(common) && !is_as_raw(ctx, common)))
		return 0;
	return join_raw(ctx);
}

#endif /* _VNET_JOIN_H */
