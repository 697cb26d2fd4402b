/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What may not leave this host: matches of iptables, 1 is "drop it"
 *
 *   vnet_gate	raw OUTPUT, before connection tracking sees the packet
 *   vnet_spoof	raw OUTPUT, of packets whose source is not an address of this
 *		host (the rule has asked that already)
 *   vnet_join	mangle POSTROUTING: a raw packet in another's connection
 *
 * Packets without a socket are the kernel's own, and so are those of its raw
 * control sockets (resets, ICMP errors, echo replies), and the outer packets
 * of tunnels: they carry the socket of the packet inside, which has passed
 * here before. An ordinary socket can lie in few ways, all of them checked
 * where they are cheap; a raw one in every way, so its packets are read.
 */
#ifndef _VNET_GATE_H
#define _VNET_GATE_H

#include "mark.h"
#include "packet.h"
#include "typed.h"

/* include/net/tcp_states.h */
#define TCP_SYN_SENT	2

struct sock_common___request {
	struct sock *skc_listener;	/* of TCP_NEW_SYN_RECV */
} CO_RE;

struct sock___kernel {
	unsigned int sk_kern_sock:1;
} CO_RE;

struct sock___held {
	void *sk_socket;
} CO_RE;

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

#define SKB_DST_PTRMASK	(~1ul)
#define IFF_LOOPBACK	(1 << 3)

struct inet_skb_parm___defrag {
	__u16 frag_max_size;
} CO_RE;

struct inet6_skb_parm___defrag {
	__u16 frag_max_size;
} CO_RE;

struct sk_buff___control {
	char cb[48];
} CO_RE;

/* Made by the kernel for itself, in whosever name it was running. */
static __always_inline bool is_kernels(struct sock *sk)
{
	struct sock___kernel *k = (void *)sk;

	return BPF_CORE_READ_BITFIELD_PROBED(k, sk_kern_sock);
}

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

/* May be called for a full socket only. */
static __always_inline bool is_raw(struct sock *sk)
{
	return BPF_CORE_READ(sk, sk_type) == SOCK_RAW;
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

/* Routed to this host itself. A header may name any destination. */
static __always_inline bool stays_here(struct sk_buff *skb)
{
	struct sk_buff___route *routed = (void *)skb;
	struct dst_entry___path *dst =
		(void *)(BPF_CORE_READ(routed, _skb_refdst) & SKB_DST_PTRMASK);

	return dst && BPF_CORE_READ(dst, dev, flags) & IFF_LOOPBACK;
}

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
	else if (grant == VNET_RAW_FULL && pkt.state != PACKET_DEEP)
		return 0;
	else if (grant == VNET_RAW_OWN && may_send_own(p, &pkt, xid))
		return 0;
	else
		kind = VNET_KIND_FOREIGN;
	return refuse_packet(p, ctx, sk, &pkt, xid, owner, kind);
}

/*
 * A TCP socket that nobody holds: not accepted yet, or closed already. Older
 * than its slice it has no xid and nobody can give it one (adopt.py); what it
 * sends acknowledges, or ends what there was.
 */
static __always_inline bool is_held_by_nobody(struct sock *sk)
{
	struct sock___held *held = (void *)sk;

	return !BPF_CORE_READ(held, sk_socket) &&
	       BPF_CORE_READ(sk, sk_protocol) == IPPROTO_TCP;
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
	    (!xid || (!mark && is_held_by_nobody(sk))))
		return 0;
	if (is_outer(skb, true))
		return 0;
	read_packet(ctx, &pkt);
	return refuse_packet(p, ctx, sk, &pkt, xid, mark, VNET_KIND_MARK);
}

/* An ordinary socket: does the packet come from what is reserved to another? */
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
	else
		return 0;
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
		return bound[0] && !bpf_skb_load_bytes(ctx, 12, from, 4) &&
		       from[0] != bound[0];
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

static __always_inline bool source_in_doubt(struct __sk_buff *ctx,
					    struct bpf_sock *common,
					    __u16 protocol,
					    struct vnet_facts *f)
{
	if (f->addresses)
		return true;
	if (!f->ports)
		return false;
	switch (protocol) {
	case IPPROTO_UDP:
		return sends_from_elsewhere(ctx, common);
	case IPPROTO_TCP:
		/* bound to a group, it gets its address only now */
		return common->state == TCP_SYN_SENT;
	case IPPROTO_SCTP:	/* its bind() asks nobody */
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
	if (from.type == SOCK_RAW)
		return gate_raw(ctx, from.xid);
	if ((ctx->mark & VNET_XID_MASK) != from.xid && gate_mark(ctx))
		return 1;
	return source_in_doubt(ctx, common, from.protocol, f) &&
	       gate_source(ctx, from.xid);
}

SEC("socket")
int vnet_spoof(struct __sk_buff *ctx)
{
	struct sk_buff *skb = plain(ctx);
	struct sock *sk = sender_of(skb);
	__u32 xid = ctx->mark & VNET_XID_MASK;
	struct policy p = in_force();
	struct packet pkt;

	/* a REJECT in the name of the host beyond, or a tunnel's packet */
	if (!BPF_CORE_READ(skb, sk) || is_outer(skb, true))
		return 0;
	read_packet(ctx, &pkt);
	return refuse_packet(p, ctx, sk, &pkt, xid, 0, VNET_KIND_SPOOF);
}

/* The half of the connection's mark that names the sender of this packet. */
static __always_inline __u32 half_out(struct sk_buff *skb)
{
	unsigned long nfct = BPF_CORE_READ(skb, _nfct);
	struct nf_conn *ct = (void *)(nfct & ~NFCT_INFOMASK);
	__u32 mark = ct ? BPF_CORE_READ(ct, mark) : 0;

	return (nfct & NFCT_INFOMASK) >= IP_CT_IS_REPLY ? mark >> 16 :
							  mark & VNET_XID_MASK;
}

/*
 * A slice's raw packet in a connection that is another slice's on this side.
 * Echo requests are not drawn into this: slices that ping one host may well
 * share an id, and with it a connection.
 */
SEC("socket")
int vnet_join(struct __sk_buff *ctx)
{
	struct sk_buff *skb = plain(ctx);
	struct sock *sk = sender_of(skb);
	struct policy p;
	struct packet pkt;
	__u32 half, xid;

	if (!sk || !is_raw(sk) || is_kernels(sk) || is_outer(skb, false))
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

#endif /* _VNET_GATE_H */
