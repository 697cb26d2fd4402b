/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a raw socket may hear
 *
 * The kernel gives a copy of every packet of its protocol to each raw socket.
 * One of a slice without the grant `full` gets those that are its slice's:
 * INPUT has marked them with their receiver by now. What nobody receives but
 * a raw socket is nobody's there; it is the slice's that reserved the port.
 *
 * This runs for every packet that any socket receives, hence the order.
 */
#ifndef _VNET_INGRESS_H
#define _VNET_INGRESS_H

#include "gate.h"

struct net___cookie {
	__u64 net_cookie;
} CO_RE;

struct sock_common___net {
	struct {
		struct net___cookie *net;
	} skc_net;
} CO_RE;

static __always_inline bool to_own_port(struct __sk_buff *ctx, struct policy p,
					const struct packet *pkt, __u32 xid)
{
	return !(ctx->mark & VNET_XID_MASK) && pkt->state == PACKET_READ &&
	       has_reservable_ports(pkt->proto) &&
	       is_own_port(p, pkt->proto, pkt->dport, &pkt->daddr, xid);
}

static __noinline int raw_may_hear(struct __sk_buff *ctx)
{
	struct sk_buff *skb = plain(ctx);
	struct sock *sk = BPF_CORE_READ(skb, sk);
	struct sock_common___net *common = (void *)sk;
	struct policy p = in_force();
	struct vnet_facts *f = facts_of(p);
	__u32 xid = xid_of_sk(p, sk);
	struct packet pkt;

	if (!xid || (ctx->mark & VNET_XID_MASK) == xid ||
	    find_in(grants, p, &xid) == VNET_RAW_FULL)
		return 1;
	/* in a namespace of its own there are no marks, and no other slices */
	if (!f || BPF_CORE_READ(common, skc_net.net, net_cookie) !=
		  f->netns_cookie)
		return 1;
	read_packet(ctx, &pkt);
	if (to_own_port(ctx, p, &pkt, xid))
		return 1;
	return !refuse_packet(p, ctx, sk, &pkt, xid, ctx->mark & VNET_XID_MASK,
			      VNET_KIND_SNOOP);
}

SEC("cgroup_skb/ingress")
int vnet_ingress(struct __sk_buff *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return 1;
	sk = bpf_sk_fullsock(sk);
	if (!sk || sk->type != SOCK_RAW)
		return 1;
	return raw_may_hear(ctx);
}

#endif /* _VNET_INGRESS_H */
