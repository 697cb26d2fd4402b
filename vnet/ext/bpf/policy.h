/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The policy in force, and whose a socket is
 *
 * Every program reads `control` once and hands the generation on, so that all
 * its look-ups are of one policy.
 */
#ifndef _VNET_POLICY_H
#define _VNET_POLICY_H

#include "kernel.h"
#include "vnet_bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} control SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, VNET_GENERATIONS);
	__type(key, __u32);
	__type(value, struct vnet_facts);
} facts SEC(".maps");

/*
 * Inner maps may have any max_entries; these say only what is in them. Sizes,
 * not types: clang 14 leaves a structure that is named here only undefined.
 */
#define TABLE(name, key_type, value_type)				\
	struct name##_table {						\
		__uint(type, BPF_MAP_TYPE_HASH);			\
		__uint(map_flags, BPF_F_NO_PREALLOC);			\
		__uint(max_entries, 1);					\
		__uint(key_size, sizeof(key_type));			\
		__uint(value_size, sizeof(value_type));			\
	};								\
	struct {							\
		__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);		\
		__uint(max_entries, VNET_GENERATIONS);			\
		__type(key, __u32);					\
		__array(values, struct name##_table);			\
	} name SEC(".maps")

struct vnet_address {
	__u8 bytes[16];
};

TABLE(slices, __u64, __u32);
TABLE(grants, __u32, __u32);
TABLE(ports, struct vnet_port, __u32);
TABLE(addresses, struct vnet_address, __u32);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, VNET_GENERATIONS << VNET_OWNER_BITS);
	__type(key, __u32);
	__type(value, __u64);
} owners SEC(".maps");

struct policy {
	__u32 generation;
	bool observe;
};

static __always_inline struct policy in_force(void)
{
	__u32 zero = 0;
	__u64 *word = bpf_map_lookup_elem(&control, &zero);
	struct policy p = { };

	if (word) {
		p.generation = *word & VNET_CONTROL_GENERATION;
		p.observe = *word & VNET_CONTROL_OBSERVE;
	}
	return p;
}

static __always_inline struct vnet_facts *facts_of(struct policy p)
{
	__u32 key = p.generation;	/* its address is taken, and not p's */

	return bpf_map_lookup_elem(&facts, &key);
}

/* Found or 0: no value of these tables that matters is 0. */
#define find_in(table, p, key)						\
	({								\
		__u32 which = (p).generation;				\
		void *inner = bpf_map_lookup_elem(&(table), &which);	\
		__u32 *found = inner ?					\
			bpf_map_lookup_elem(inner, (key)) : NULL;	\
		found ? *found : 0;					\
	})

static __always_inline __u32 first_place(struct policy p, __u64 id)
{
	return p.generation << VNET_OWNER_BITS |
	       (__u32)(id * VNET_OWNER_FACTOR >> (64 - VNET_OWNER_BITS));
}

/* The xid of the cgroup if it is at this place; 0 says nothing. */
static __always_inline __u32 owner_at(__u32 place, __u64 id)
{
	__u64 *entry = bpf_map_lookup_elem(&owners, &place);
	__u64 word = entry ? *entry : 0;

	return word >> 16 == id ? word & VNET_XID_MAX : 0;
}

/* The xid of a slice's own cgroup, most often; 0 says nothing. */
static __always_inline __u32 owner_of(struct policy p, __u64 id)
{
	__u32 owner = owner_at(first_place(p, id), id);

	return owner ? owner : owner_at(first_place(p, id) ^ 1, id);
}

/* The number of the highest bit that is set; x is not 0. */
static __always_inline __u32 highest_bit(__u64 x)
{
	x |= x >> 1;
	x |= x >> 2;
	x |= x >> 4;
	x |= x >> 8;
	x |= x >> 16;
	x |= x >> 32;
	return (__builtin_popcountll(x) - 1) & VNET_LEVEL_MAX;
}

/*
 * The xid of a cgroup: that of its deepest registered ancestor, itself
 * included. Only the levels at which slices are registered are looked at.
 */
static __always_inline __u32 xid_of_cgroup(struct policy p, struct cgroup *cgrp)
{
	struct vnet_facts *f = facts_of(p);
	void *table = bpf_map_lookup_elem(&slices, &p.generation);
	__u64 levels = f ? f->levels : 0;
	__u32 level;

	if (!table || !cgrp || !levels)
		return 0;
	level = BPF_CORE_READ(cgrp, level);
	if (level < VNET_LEVEL_MAX)	/* deeper ones have all levels above */
		levels &= (2ull << level) - 1;
	for (__u32 n = 0; n < VNET_LEVEL_MAX && levels; n++) {
		struct cgroup *ancestor = NULL;
		__u32 *xid;
		__u64 id;

		level = highest_bit(levels);
		levels &= ~(1ull << level);
		bpf_probe_read_kernel(&ancestor, sizeof(ancestor),
				      (void *)cgrp + level * sizeof(ancestor) +
				      bpf_core_field_offset(cgrp->ancestors));
		id = BPF_CORE_READ(ancestor, kn, id);
		xid = bpf_map_lookup_elem(table, &id);
		if (xid)
			return *xid;
	}
	return 0;
}

/* The xid of a socket: its cgroup is the one it was made in, for good. */
static __always_inline __u32 xid_of_sk(struct policy p, struct sock *sk)
{
	return xid_of_cgroup(p, BPF_CORE_READ(sk, sk_cgrp_data.cgroup));
}

#endif /* _VNET_POLICY_H */
