// SPDX-License-Identifier: GPL-2.0
/*
 * The peer "BPF cgroup_skb mark", in its cheapest form: look the socket's own
 * cgroup (no ancestor) up among N, and set the packet's mark.
 *
 * Egress runs after POSTROUTING and ingress after INPUT, so no rule, no
 * connection and no routing decision ever sees these marks.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, __u32);
} slices SEC(".maps");

static __always_inline int mark(struct __sk_buff *skb)
{
	__u64 id = bpf_skb_cgroup_id(skb);
	__u32 *xid = bpf_map_lookup_elem(&slices, &id);

	if (xid)
		skb->mark = *xid;
	return 1;
}

SEC("cgroup_skb/egress")
int mark_egress(struct __sk_buff *skb)
{
	return mark(skb);
}

SEC("cgroup_skb/ingress")
int mark_ingress(struct __sk_buff *skb)
{
	return mark(skb);
}

char _license[] SEC("license") = "GPL";
