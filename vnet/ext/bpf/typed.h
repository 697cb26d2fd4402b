/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The same reads without a call each, where the kernel can (6.2+)
 *
 * bpf_probe_read_kernel is a call for every pointer on the way from a socket
 * to its cgroup's id: in the gate, which every packet passes, most of the
 * cost. bpf_rdonly_cast (a35b9af4ec2c) gives an address its type back, and
 * then plain loads will do. On 6.1 the branch with it is dead, and never
 * looked at by the verifier.
 */
#ifndef _VNET_TYPED_H
#define _VNET_TYPED_H

#include "policy.h"

extern void *bpf_rdonly_cast(const void *address, __u32 type) __ksym __weak;

/* What came with it, in the same 6.2: a kfunc's being there cannot be asked. */
enum bpf_func_id___typed {
	BPF_FUNC_cgrp_storage_get___typed = 210,	/* c4bcfb38a95e */
};

#define CAN_CAST							\
	bpf_core_enum_value_exists(enum bpf_func_id___typed,		\
				   BPF_FUNC_cgrp_storage_get___typed)

#define typed(type, address)						\
	((type *)bpf_rdonly_cast(address, bpf_core_type_id_kernel(type)))

/* What the gate asks of every sender. */
struct sender {
	__u32 xid;
	__u16 type;
	__u16 protocol;
};

static __always_inline __u32 xid_of_typed(struct policy p, struct sock *sk)
{
	struct cgroup *cgrp = sk->sk_cgrp_data.cgroup;
	struct vnet_facts *f = facts_of(p);
	void *table = bpf_map_lookup_elem(&slices, &p.generation);
	__u64 id, levels = f ? f->levels : 0;
	__u32 level, *xid;

	if (!table || !cgrp || !levels)
		return 0;
	level = cgrp->level;
	if (level < VNET_LEVEL_MAX) {
		/* most often the slice's own: that is quickly read and final */
		if (levels & (1ull << level)) {
			id = cgrp->kn->id;
			xid = bpf_map_lookup_elem(table, &id);
			if (xid)
				return *xid;
		}
		levels &= (1ull << level) - 1;
	}
	for (__u32 n = 0; n < VNET_LEVEL_MAX && levels; n++) {
		struct cgroup *ancestor = NULL;

		level = highest_bit(levels);
		levels &= ~(1ull << level);
		bpf_probe_read_kernel(&ancestor, sizeof(ancestor),
				      (void *)cgrp + level * sizeof(ancestor) +
				      bpf_core_field_offset(cgrp->ancestors));
		id = typed(struct cgroup, ancestor)->kn->id;
		xid = bpf_map_lookup_elem(table, &id);
		if (xid)
			return *xid;
	}
	return 0;
}

static __always_inline struct sender sender_typed(struct policy p,
						  struct bpf_sock *common)
{
	struct sock *sk = typed(struct sock, common);
	struct sender s = {
		.xid = xid_of_typed(p, sk),
		.type = sk->sk_type,
		.protocol = sk->sk_protocol,
	};

	return s;
}

static __always_inline struct sender sender_probed(struct policy p,
						   struct bpf_sock *common)
{
	struct sock *sk = plain(common);
	struct sender s = {
		.xid = xid_of_sk(p, sk),
		.type = BPF_CORE_READ(sk, sk_type),
		.protocol = BPF_CORE_READ(sk, sk_protocol),
	};

	return s;
}

/* Of a full socket. */
static __always_inline struct sender sender(struct policy p,
					    struct bpf_sock *common)
{
	if (CAN_CAST)
		return sender_typed(p, common);
	return sender_probed(p, common);
}

#endif /* _VNET_TYPED_H */
