/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What may not leave this host: a match of iptables, 1 is "drop it"
 *
 * vnet_gate is asked in raw OUTPUT, before connection tracking sees the packet,
 * in a chain behind vnet_odd. With it are asked vnet_spoof (spoof.h) and, in
 * mangle POSTROUTING, vnet_join (join.h).
 *
 * Packets without a socket are the kernel's own, and so are those of its raw
 * control sockets (resets, ICMP errors, echo replies), and the outer packets
 * of tunnels: they carry the socket of the packet inside, which has passed
 * here before. An ordinary socket can lie in few ways, all of them checked
 * where they are cheap; a raw one in every way, so its packets are read.
 */
#ifndef _VNET_GATE_H
#define _VNET_GATE_H

#include "echo.h"
#include "mark.h"
#include "skb.h"

/* include/net/tcp_states.h */
#define TCP_SYN_SENT	2

struct sock_common___request {
	struct sock *skc_listener;	/* of TCP_NEW_SYN_RECV */
} CO_RE;

struct sock___held {
	void *sk_socket;
} CO_RE;

struct inet_skb_parm___defrag {
	__u16 frag_max_size;
} CO_RE;

struct inet6_skb_parm___defrag {
	__u16 frag_max_size;
} CO_RE;

struct sk_buff___control {
	char cb[48];
} CO_RE;

/*
 * Whose address the packet comes from, if another's. What is sent to one of
 * this host's own addresses gets that address as its source, unless the
 * sender chose one: that says nothing and goes nowhere.
 */
static __always_inline bool from_address_of_another(struct policy p,
						    struct sk_buff *skb,
						    const struct packet *pkt,
						    __u32 xid, __u32 *owner)
{
	__u64 s[2], d[2];

	if (!address_of_another(p, &pkt->saddr, xid, owner))
		return false;
	__builtin_memcpy(s, &pkt->saddr, sizeof(s));
	__builtin_memcpy(d, &pkt->daddr, sizeof(d));
	return s[0] != d[0] || s[1] != d[1] || !stays_here(skb);
}

static __always_inline bool from_port_of_another(struct policy p,
						 const struct packet *pkt,
						 __u32 xid, __u32 *owner)
{
	return pkt->state == PACKET_READ && has_reservable_ports(pkt->proto) &&
	       port_of_another(p, pkt->proto, pkt->sport, &pkt->saddr, false,
			       xid, owner);
}

/* What a raw socket of a slice with `own` may send. */
static __always_inline bool may_send_own(struct policy p,
					 const struct packet *pkt, __u32 xid)
{
	if (pkt->state != PACKET_READ)
		return false;
	if (has_reservable_ports(pkt->proto))
		return is_own_port(p, pkt->proto, pkt->sport, &pkt->saddr, xid);
	return is_echo_request(pkt);
}

static __noinline int gate_raw(struct __sk_buff *ctx, __u32 xid)
{
	struct sk_buff *skb = plain(ctx);
	struct sock *sk = BPF_CORE_READ(skb, sk);
	struct policy p = in_force();
	__u32 grant = xid ? find_in(grants, p, &xid) : VNET_RAW_FULL;
	__u32 owner = 0;
	struct packet pkt;
	__u8 kind;

	if (is_kernels(sk) || is_outer(skb, true))
		return 0;
	read_packet(ctx, &pkt);
	if (grant == VNET_RAW_DENY)
		kind = VNET_KIND_RAW;	/* older than the grant, or handed on */
	else if ((ctx->mark & VNET_XID_MASK) != xid)
		kind = VNET_KIND_MARK;
	else if (from_address_of_another(p, skb, &pkt, xid, &owner))
		kind = VNET_KIND_ADDRESS;
	else if (from_port_of_another(p, &pkt, xid, &owner))
		kind = VNET_KIND_PORT;
	else if ((grant == VNET_RAW_FULL && pkt.state != PACKET_DEEP) ||
		 (grant == VNET_RAW_OWN && may_send_own(p, &pkt, xid)))
		return is_echo_request(&pkt) ? asks(&pkt, xid) : 0;
	else
		kind = VNET_KIND_FOREIGN;
	return refuse_packet(p, ctx, sk, &pkt, xid, owner, kind);
}

/*
 * A socket without an xid that nobody can give one. Of TCP, one that nobody
 * holds: not accepted yet, or closed already. Older than its slice it cannot be
 * adopted (adopt.py); what it sends acknowledges, or ends what there was. Of
 * SCTP, what accept() gives: the kernel copies the listener (sctp_copy_sock)
 * without its mark, and asks no program.
 */
static __always_inline bool cannot_be_marked(struct sock *sk)
{
	struct sock___held *held = (void *)sk;

	switch (BPF_CORE_READ(sk, sk_protocol)) {
	case IPPROTO_TCP:
		return !BPF_CORE_READ(held, sk_socket);
	case IPPROTO_SCTP:
		return true;
	}
	return false;
}

/*
 * Another mark than its socket owner's. A socket of the node may have any
 * that it had as a whole: when its slice was removed it kept the xid, which
 * is nobody else's for a while.
 */
static __noinline int gate_mark(struct __sk_buff *ctx)
{
	struct sk_buff *skb = plain(ctx);
	struct sock *sk = BPF_CORE_READ(skb, sk);
	struct policy p = in_force();
	__u32 mark = ctx->mark & VNET_XID_MASK;
	__u32 xid = xid_of_sk(p, sk);
	struct packet pkt;

	if (mark == (BPF_CORE_READ(sk, sk_mark) & VNET_XID_MASK) &&
	    (!xid || (!mark && cannot_be_marked(sk))))
		return 0;
	if (is_outer(skb, true))
		return 0;
	read_packet(ctx, &pkt);
	return refuse_packet(p, ctx, sk, &pkt, xid, mark, VNET_KIND_MARK);
}

/*
 * A UDP socket that sends from elsewhere than from the address it is bound to,
 * and could send from that. Bound to a group or a broadcast address it cannot,
 * and must take another one.
 */
static __always_inline bool claims_address(struct __sk_buff *ctx,
					   const struct packet *pkt)
{
	struct bpf_sock *common = ctx->sk;
	struct inet_sock___path *inet;
	__be32 bound, source;
	__u32 first;

	if (pkt->state != PACKET_READ || pkt->proto != IPPROTO_UDP || !common ||
	    !is_full(common) || common->src_port != pkt->sport ||
	    !sends_from_elsewhere(ctx, common))
		return false;
	if (pkt->family == AF_INET6) {
		first = common->src_ip6[0];
		return (first & bpf_htonl(0xff000000)) != bpf_htonl(0xff000000);
	}
	inet = plain(common);
	bound = BPF_CORE_READ(inet, inet_saddr);
	__builtin_memcpy(&source, &pkt->saddr.bytes[12], sizeof(source));
	return bound && bound != source && !IN_MULTICAST(bpf_ntohl(bound));
}

/*
 * An ordinary socket: does the packet come from what is reserved to another, or
 * from where another socket may be?
 */
static __noinline int gate_source(struct __sk_buff *ctx, __u32 xid)
{
	struct sk_buff *skb = plain(ctx);
	struct sock *sk = BPF_CORE_READ(skb, sk);
	struct policy p = in_force();
	struct packet pkt;
	__u32 owner = 0;
	__u8 kind;

	read_packet(ctx, &pkt);
	if (from_address_of_another(p, skb, &pkt, xid, &owner))
		kind = VNET_KIND_ADDRESS;
	else if (from_port_of_another(p, &pkt, xid, &owner))
		kind = VNET_KIND_PORT;
	else if (xid && claims_address(ctx, &pkt) &&
		 !is_own_port(p, pkt.proto, pkt.sport, &pkt.saddr, xid))
		kind = VNET_KIND_FOREIGN;
	else
		return is_echo_request(&pkt) ? asks(&pkt, xid) : 0;
	if (is_outer(skb, true))
		return 0;
	if (BPF_CORE_READ(sk, __sk_common.skc_state) == TCP_NEW_SYN_RECV)
		sk = NULL;	/* only its sock_common exists */
	return refuse_packet(p, ctx, sk, &pkt, xid, owner, kind);
}

/*
 * Without a socket a packet is the kernel's own; but kernels without
 * 18685451fc4e (6.9) forget the socket where a raw sender's fragments are put
 * together again, which comes before this. The kernel's own were never apart.
 */
static __noinline int gate_orphan(struct __sk_buff *ctx)
{
	struct sk_buff___control *skb = plain(ctx);
	void *cb = __builtin_preserve_access_index(&skb->cb);
	__u32 offset = ctx->protocol == bpf_htons(ETH_P_IP) ?
		bpf_core_field_offset(struct inet_skb_parm___defrag,
				      frag_max_size) :
		bpf_core_field_offset(struct inet6_skb_parm___defrag,
				      frag_max_size);
	struct policy p = in_force();
	struct packet pkt;
	__u16 size = 0;

	bpf_probe_read_kernel(&size, sizeof(size), cb + offset);
	if (!size || is_outer((void *)skb, true))
		return 0;
	read_packet(ctx, &pkt);
	return refuse_packet(p, ctx, NULL, &pkt, ctx->mark & VNET_XID_MASK, 0,
			     VNET_KIND_FOREIGN);
}

static __always_inline bool source_in_doubt(struct __sk_buff *ctx,
					    struct bpf_sock *common,
					    struct sender from,
					    struct vnet_facts *f)
{
	if (f->addresses)
		return true;
	switch (from.protocol) {
	case IPPROTO_UDP:
		return (from.xid || f->ports) &&
		       sends_from_elsewhere(ctx, common);
	case IPPROTO_TCP:
		/* bound to a group, it gets its address only now */
		return f->ports && common->state == TCP_SYN_SENT;
	case IPPROTO_SCTP:	/* its bind() asks nobody */
		return f->ports;
	case IPPROTO_ICMP:	/* what a ping asks for is remembered */
	case IPPROTO_ICMPV6:
		return true;
	}
	return false;
}

SEC("socket")
int vnet_gate(struct __sk_buff *ctx)
{
	struct bpf_sock *common = ctx->sk;
	struct policy p = in_force();
	struct vnet_facts *f = facts_of(p);
	struct sender from;

	if (!common)
		return gate_orphan(ctx);
	if (common->state == TCP_TIME_WAIT || !f)
		return 0;
	if (common->state == TCP_NEW_SYN_RECV) {
		struct sock_common___request *request = plain(common);

		if (!f->addresses)
			return 0;
		return gate_source(ctx, xid_of_sk(p, BPF_CORE_READ(request,
								   skc_listener)));
	}
	from = sender(p, common);
	if (from.raw)
		return gate_raw(ctx, from.xid);
	if ((ctx->mark & VNET_XID_MASK) != from.xid && gate_mark(ctx))
		return 1;
	return source_in_doubt(ctx, common, from, f) &&
	       gate_source(ctx, from.xid);
}

#endif /* _VNET_GATE_H */
