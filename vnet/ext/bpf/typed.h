/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The same reads without a call each, where the kernel can (6.2+)
 *
 * bpf_probe_read_kernel is a call for every pointer on the way from a socket
 * to its cgroup's id: in what every packet passes, most of the cost.
 * bpf_rdonly_cast (a35b9af4ec2c) gives an address its type back, and then
 * plain loads will do. On 6.1 the branch with it is dead, and never
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

/*
 * One that begins with 32 bits, by which any 32 bits can be read: packets have
 * no type, and nf_conn has two of them in the kernel's BTF.
 */
struct refcount_struct {
	struct {
		int counter;
	} refs;
} CO_RE;

#define typed_u32(address)						\
	((__u32)typed(struct refcount_struct, address)->refs.counter)

/* 32 bits of the IP header. */
static __always_inline __be32 ip_word(struct __sk_buff *ctx, __u32 offset)
{
	__be32 word = 0;

	if (CAN_CAST)
		return typed_u32(typed(struct sk_buff, ctx)->data + offset);
	bpf_skb_load_bytes(ctx, offset, &word, sizeof(word));
	return word;
}

/* Whether all of a socket exists. */
static __always_inline bool is_full(struct bpf_sock *common)
{
	return common->state != TCP_TIME_WAIT &&
	       common->state != TCP_NEW_SYN_RECV;
}

/*
 * What can be seen without a call, on all kernels: a raw socket's port is its
 * protocol for good (inet_create() and inet6_create()), which is below
 * IPPROTO_MAX, 263.
 */
static __always_inline bool cannot_be_raw(struct bpf_sock *common)
{
	return common->src_port > 1023;
}

/* Of a full socket. */
static __always_inline bool is_raw(struct bpf_sock *common)
{
	struct sock *sk;

	if (cannot_be_raw(common))
		return false;
	if (CAN_CAST)
		return typed(struct sock, common)->sk_type == SOCK_RAW;
	sk = plain(common);
	return BPF_CORE_READ(sk, sk_type) == SOCK_RAW;
}

/* What is asked of every sender. */
struct sender {
	__u32 xid;
	__u16 protocol;
	bool raw;
};

/* The xid of a cgroup that is not at its first place among the owners. */
static __always_inline __u32 xid_beyond(struct cgroup *known, __u32 generation)
{
	struct policy p = { .generation = generation };
	struct cgroup *cgrp = typed(struct cgroup, known);
	struct vnet_facts *f = facts_of(p);
	void *table = bpf_map_lookup_elem(&slices, &generation);
	__u64 id = cgrp->kn->id, levels = f ? f->levels : 0;
	__u32 owner, level, *xid;

	if (!table || !levels)
		return 0;
	owner = owner_of(p, id);
	if (owner)
		return owner;
	level = cgrp->level;
	if (level < VNET_LEVEL_MAX)
		levels &= (2ull << level) - 1;
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

static __always_inline __u32 xid_of_typed(struct policy p, struct sock *sk)
{
	struct cgroup *cgrp = sk->sk_cgrp_data.cgroup;
	__u32 owner;
	__u64 id;

	if (!cgrp)
		return 0;
	id = cgrp->kn->id;
	owner = owner_at(first_place(p, id), id);
	if (__builtin_expect(owner != 0, 1))	/* the rest far behind */
		return owner;
	return xid_beyond(cgrp, p.generation);
}

static __always_inline struct sender sender_typed(struct policy p,
						  struct bpf_sock *common)
{
	struct sock *sk = typed(struct sock, common);
	struct sender s = {
		.xid = xid_of_typed(p, sk),
		.protocol = sk->sk_protocol,
		.raw = sk->sk_type == SOCK_RAW,
	};

	return s;
}

static __always_inline struct sender sender_probed(struct policy p,
						   struct bpf_sock *common)
{
	struct sock *sk = plain(common);
	struct cgroup *cgrp = BPF_CORE_READ(sk, sk_cgrp_data.cgroup);
	__u32 owner = owner_of(p, BPF_CORE_READ(cgrp, kn, id));
	struct sender s = {
		.xid = owner ? owner : xid_of_cgroup(p, cgrp),
		.protocol = BPF_CORE_READ(sk, sk_protocol),
		.raw = !cannot_be_raw(common) &&
		       BPF_CORE_READ(sk, sk_type) == SOCK_RAW,
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
