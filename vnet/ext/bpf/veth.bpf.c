// SPDX-License-Identifier: GPL-2.0-only
/*
 * Slices with a network namespace of their own (containers)
 *
 * Their sockets cannot be asked: a packet that crosses a veth loses its
 * socket, its mark and its connection (skb_scrub_packet in net/core/skbuff.c).
 * What tells them apart is the interface: the host end of their veth, in a
 * bridge or routed.
 *
 * vnet_from_veth (tc, ingress of the host end) marks what a container sends,
 * before the node's conntrack and rules see it. vnet_to_veth (tc, egress)
 * marks what reaches it and names it in the connection. vnet_contained is a
 * match of iptables (-m bpf): is this mark from there?
 *
 * The witness of that is skb->tc_index, set with the mark to the same xid: only
 * tc programs write it. A mark alone may be another's rule's: MARK --set-mark 1
 * in PREROUTING is common, and is not the slice with xid 1.
 */
#include "kernel.h"
#include "veth.h"
#include "vnet_bpf.h"

#define TC_ACT_UNSPEC	(-1)	/* and the next filter has its turn */
#define ETH_ALEN	6
#define BPF_F_CURRENT_NETNS	(-1)

/* Read as one piece: its layout has been the same since 2.6.20. */
struct nf_conntrack_tuple___whole {
	__u32 saddr[4];
	__be16 sport;
	__u16 l3num;
	__u32 daddr[4];
	__be16 dport;
	__u8 protonum;
	__u8 dir;
};

/* net/netfilter/nf_conntrack_bpf.c; as long as 6.1 has it, which all take */
struct bpf_ct_opts {
	__s32 netns_id;
	__s32 error;
	__u8 l4proto;
	__u8 dir;
	__u8 reserved[2];
};

struct nf_conn *bpf_skb_ct_lookup(struct __sk_buff *ctx,
				  struct bpf_sock_tuple *tuple, __u32 tuple_len,
				  struct bpf_ct_opts *opts,
				  __u32 opts_len) __ksym __weak;
void bpf_ct_release(struct nf_conn *ct) __ksym __weak;

/* ifindex -> whose: filled by containers.py */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, VNET_INTERFACES_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct vnet_interface);
} interfaces SEC(".maps");

static __always_inline struct vnet_interface *interface_of(struct __sk_buff *ctx)
{
	__u32 ifindex = ctx->ifindex;

	return bpf_map_lookup_elem(&interfaces, &ifindex);
}

static __always_inline void set_xid(struct __sk_buff *ctx, __u32 xid)
{
	ctx->mark = (ctx->mark & ~VNET_XID_MASK) | xid;
}

/* Not memcmp(): clang 14 makes a call of it, which BPF does not have. */
static __always_inline bool same_mac(const __u16 *a, const __u16 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2];
}

/* What a container sends. */
SEC("tc")
int vnet_from_veth(struct __sk_buff *ctx)
{
	struct vnet_interface *in = interface_of(ctx);
	__u16 mac[ETH_ALEN / 2];

	if (!in)
		return TC_ACT_UNSPEC;
	set_xid(ctx, in->xid);
	ctx->tc_index = in->xid;
	if (!bpf_skb_load_bytes(ctx, ETH_ALEN, mac, ETH_ALEN) &&
	    !same_mac(mac, in->mac))
		__builtin_memcpy(in->mac, mac, ETH_ALEN);
	return TC_ACT_UNSPEC;
}

/*
 * Is it for this container, and not one that a bridge sends to all its ports
 * because it has forgotten the right one?
 */
static __always_inline bool is_addressee(struct __sk_buff *ctx,
					 const struct vnet_interface *to)
{
	__u16 mac[ETH_ALEN / 2];

	return !bpf_skb_load_bytes(ctx, 0, mac, ETH_ALEN) &&
	       same_mac(mac, to->mac);
}

/*
 * The connection's half of whoever receives this packet, if it is empty.
 * Without an event: the kernel has none for what a program writes; accounting
 * reads the mark at the connection's next event, at the latest its last.
 */
static __always_inline void fill_receiver(struct __sk_buff *ctx, __u32 xid)
{
	struct sk_buff *skb = plain(ctx);
	unsigned long nfct = BPF_CORE_READ(skb, _nfct);
	struct nf_conn *known = (void *)(nfct & ~NFCT_INFOMASK);
	bool reply = (nfct & NFCT_INFOMASK) >= IP_CT_IS_REPLY;
	__u32 shift = reply ? 0 : 16;
	struct bpf_ct_opts opts = { };
	struct nf_conntrack_tuple___whole t = { };
	struct bpf_sock_tuple tuple = { };
	struct nf_conn *ct;
	__u32 mark;

	/*
	 * nf_conntrack may be a module that was not there when this was
	 * loaded: then there is nothing to call, and the verifier leaves the
	 * rest out.
	 */
	if (!bpf_core_type_exists(struct bpf_ct_opts))
		return;
	if (!known || BPF_CORE_READ(known, mark) >> shift & VNET_XID_MASK)
		return;
	if (reply)
		bpf_core_read(&t, sizeof(t), &known->tuplehash[1].tuple);
	else
		bpf_core_read(&t, sizeof(t), &known->tuplehash[0].tuple);
	opts.netns_id = BPF_F_CURRENT_NETNS;
	opts.l4proto = t.protonum;
	if (t.l3num == AF_INET) {
		tuple.ipv4.saddr = t.saddr[0];
		tuple.ipv4.daddr = t.daddr[0];
		tuple.ipv4.sport = t.sport;
		tuple.ipv4.dport = t.dport;
		ct = bpf_skb_ct_lookup(ctx, &tuple, sizeof(tuple.ipv4), &opts,
				       sizeof(opts));
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, t.saddr, 16);
		__builtin_memcpy(tuple.ipv6.daddr, t.daddr, 16);
		tuple.ipv6.sport = t.sport;
		tuple.ipv6.dport = t.dport;
		ct = bpf_skb_ct_lookup(ctx, &tuple, sizeof(tuple.ipv6), &opts,
				       sizeof(opts));
	}
	if (!ct)	/* no TCP or UDP: its answer will tell */
		return;
	mark = ct->mark;
	/* in another zone the same addresses may be another connection's */
	if (ct == known && !(mark >> shift & VNET_XID_MASK))
		__sync_val_compare_and_swap(&ct->mark, mark, mark | xid << shift);
	bpf_ct_release(ct);
}

/* What reaches a container. */
SEC("tc")
int vnet_to_veth(struct __sk_buff *ctx)
{
	struct vnet_interface *to = interface_of(ctx);

	if (!to)
		return TC_ACT_UNSPEC;
	set_xid(ctx, to->xid);
	ctx->tc_index = 0;	/* crossing the veth would not clear it */
	if (is_addressee(ctx, to))
		fill_receiver(ctx, to->xid);
	return TC_ACT_UNSPEC;
}

/*
 * Does this packet come from a container, with its xid? A tunnel's outer
 * packet does not: it was made here, and belongs to all who use the tunnel.
 */
SEC("socket")
int vnet_contained(struct __sk_buff *ctx)
{
	__u32 xid = ctx->mark & VNET_XID_MASK;

	return xid && ctx->tc_index == xid && ctx->ingress_ifindex;
}

char LICENSE[] SEC("license") = "GPL";
