/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a raw socket may hear, and a ping socket
 *
 * The kernel gives a copy of every packet of its protocol to each raw socket.
 * One of a slice without the grant `full` gets those that are its slice's:
 * INPUT has marked them with their receiver by now. What nobody receives but
 * a raw socket is nobody's there; it is the slice's that reserved the port. The
 * reply to an echo is the slice's that asked (echo.h); the kernel gives it to
 * the ping socket that has its id as well.
 *
 * This runs for every packet that any socket receives, hence the order.
 */
#ifndef _VNET_INGRESS_H
#define _VNET_INGRESS_H

#include "echo.h"
#include "mark.h"
#include "skb.h"

static __always_inline bool to_own_port(struct __sk_buff *ctx, struct policy p,
					const struct packet *pkt, __u32 xid)
{
	return !(ctx->mark & VNET_XID_MASK) && pkt->state == PACKET_READ &&
	       has_reservable_ports(pkt->proto) &&
	       is_own_port(p, pkt->proto, pkt->dport, &pkt->daddr, xid);
}

static __always_inline bool is_icmp(__u32 protocol)
{
	return protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6;
}

static __noinline int raw_may_hear(struct __sk_buff *ctx)
{
	struct sk_buff *skb = plain(ctx);
	struct sock *sk = BPF_CORE_READ(skb, sk);
	struct policy p = in_force();
	struct vnet_facts *f = facts_of(p);
	__u32 xid = xid_of_sk(p, sk);
	__u32 owner = ctx->mark & VNET_XID_MASK;
	struct packet pkt;
	bool may, is_raw;

	if (!xid || (!is_icmp(BPF_CORE_READ(sk, sk_protocol)) && owner == xid) ||
	    find_in(grants, p, &xid) == VNET_RAW_FULL)
		return 1;
	/* in a namespace of its own there are no marks, and no other slices */
	if (!f || !is_in_nodes_netns(f, sk))
		return 1;
	read_packet(ctx, &pkt);
	is_raw = BPF_CORE_READ(sk, sk_type) == SOCK_RAW;
	/* who asked a group, by a ping socket, gets replies without an owner */
	if (is_echo_reply(&pkt))
		may = may_hear_reply(&pkt, xid, is_raw || owner ? owner : xid);
	else	/* nobody else's ping socket has this one's id */
		may = !is_raw || owner == xid ||
		      to_own_port(ctx, p, &pkt, xid);
	if (may)
		return 1;
	return !refuse_packet(p, ctx, sk, &pkt, xid, owner, VNET_KIND_SNOOP);
}

/* A ping socket's port is the id of its echoes. TCP and UDP have none. */
static __always_inline bool cannot_be_ping(struct __sk_buff *ctx)
{
	__u8 *data = (void *)(long)ctx->data;
	__u8 proto;

	if ((void *)(data + sizeof(struct ip4_header)) >
	    (void *)(long)ctx->data_end)
		return false;
	proto = ctx->protocol == bpf_htons(ETH_P_IP) ? data[IP4_PROTOCOL] :
						       data[IP6_NEXT];
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP;
}

SEC("cgroup_skb/ingress")
int vnet_ingress(struct __sk_buff *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk || (cannot_be_raw(sk) && cannot_be_ping(ctx)))
		return 1;
	sk = bpf_sk_fullsock(sk);
	if (!sk || (sk->type != SOCK_RAW && !is_icmp(sk->protocol)))
		return 1;
	return raw_may_hear(ctx);
}

#endif /* _VNET_INGRESS_H */
