/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Is a packet's source an address of this host?
 *
 *   vnet_odd	raw OUTPUT, before connection tracking sees the packet: have
 *		vnet_gate and vnet_spoof anything to ask? Nearly never, and this
 *		is cheap
 *   vnet_local	of packets whose source is an address of this host (the rule
 *		has asked that already): remembers it
 *   vnet_spoof	of those whose source is not
 */
#ifndef _VNET_SPOOF_H
#define _VNET_SPOOF_H

#include "gate.h"

/*
 * Sources that the rule has found to be this host's, and when (the lower half
 * of jiffies): asking the routing table about every packet costs more than all
 * the rest of the guard. Nothing that a sender can ask for (IP_TRANSPARENT,
 * IP_FREEBIND, ip_nonlocal_bind, taken back once it is bound) makes a foreign
 * source known, and an address that leaves the host is one again soon.
 */
#define SOURCE_TICKS	64u	/* 64 ms at 1,000 Hz, 640 ms at 100 Hz */
#define SOURCES4_BITS	8

/* IPv4: one word, since it must be written whole: address << 32 | when */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 << SOURCES4_BITS);
	__type(key, __u32);
	__type(value, __u64);
} sources4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct vnet_address);
	__type(value, __u32);
} sources6 SEC(".maps");

static __always_inline __u64 *source4_entry(__be32 source)
{
	__u32 place = source * 0x9e3779b1u >> (32 - SOURCES4_BITS);

	return bpf_map_lookup_elem(&sources4, &place);
}

static __always_inline bool source_is_known(struct __sk_buff *ctx)
{
	__u32 now = bpf_jiffies64(), *when;
	struct vnet_address source;
	__u64 *entry;
	__be32 word;

	if (ctx->protocol == bpf_htons(ETH_P_IP)) {
		word = ip_word(ctx, IP4_SOURCE);
		entry = source4_entry(word);
		return entry && *entry && *entry >> 32 == word &&
		       now - (__u32)*entry < SOURCE_TICKS;
	}
	if (bpf_skb_load_bytes(ctx, IP6_ADDRESSES, &source, sizeof(source)))
		return false;
	when = bpf_map_lookup_elem(&sources6, &source);
	return when && now - *when < SOURCE_TICKS;
}

SEC("socket")
int vnet_local(struct __sk_buff *ctx)
{
	__u32 now = bpf_jiffies64();
	struct vnet_address source;
	__u64 *entry;
	__be32 word;

	if (ctx->protocol == bpf_htons(ETH_P_IP)) {
		word = ip_word(ctx, IP4_SOURCE);
		entry = source4_entry(word);
		if (entry)
			*(volatile __u64 *)entry = (__u64)word << 32 | now;
	} else if (!bpf_skb_load_bytes(ctx, IP6_ADDRESSES, &source,
				       sizeof(source))) {
		bpf_map_update_elem(&sources6, &source, &now, BPF_ANY);
	}
	return 1;
}

/*
 * Whether vnet_gate or vnet_spoof may have anything against a packet. 0 is
 * certain: an ordinary socket sends it, with its owner's mark, from nowhere
 * that could be another's, and from an address that this host had just now.
 */
SEC("socket")
int vnet_odd(struct __sk_buff *ctx)
{
	struct bpf_sock *common = ctx->sk;
	struct policy p = in_force();
	struct vnet_facts *f = facts_of(p);
	struct sender from;

	if (!common || !f || !is_full(common))
		return 1;
	from = sender(p, common);
	if (from.raw || (ctx->mark & VNET_XID_MASK) != from.xid)
		return 1;
	if (source_in_doubt(ctx, common, from, f))
		return 1;
	return from.xid && !source_is_known(ctx);
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

#endif /* _VNET_SPOOF_H */
