/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The kernel's structures, as far as they are read here
 *
 * Only the members that are used: libbpf finds their offsets in the running
 * kernel's own BTF (CO-RE), so neither a vmlinux.h nor kernel headers are
 * needed to build, and one object fits 6.1 as well as 6.18.
 */
#ifndef _VNET_KERNEL_H
#define _VNET_KERNEL_H

#include <linux/bpf.h>
#include <linux/in.h>
#include <stdbool.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define CO_RE __attribute__((preserve_access_index))

#define AF_INET		2
#define AF_INET6	10
#define AF_PACKET	17
#define AF_XDP		44
#define SOL_IP		0
#define SOL_IPV6	41
#define SOL_SOCKET	1
#define IP_RECVERR	11
#define IPV6_RECVERR	25
#define SO_MARK		36
#define SOCK_RAW	3
#define SOCK_PACKET	10
#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP	262
#endif
#ifndef IPPROTO_SMC
#define IPPROTO_SMC	256	/* 6.11: d25a92ccae6b */
#endif
#ifndef IPPROTO_ICMPV6
#define IPPROTO_ICMPV6	58	/* linux/in6.h needs more than it is worth */
#endif
#define EACCES		13
#define EPROTONOSUPPORT	93

/* include/net/tcp_states.h: sockets of which only sock_common exists */
#define TCP_TIME_WAIT		6
#define TCP_NEW_SYN_RECV	12

struct kernfs_node {
	__u64 id;		/* the inode number of the directory */
} CO_RE;

struct cgroup {
	int level;
	struct kernfs_node *kn;
	struct cgroup *ancestors[];	/* 6.1: 7f203bc89eb6 */
} CO_RE;

struct sock_cgroup_data {
	struct cgroup *cgroup;
} CO_RE;

struct sock_common {
	unsigned short skc_family;
	volatile unsigned char skc_state;
} CO_RE;

struct net___cookie {
	__u64 net_cookie;
} CO_RE;

struct sock_common___net {
	struct {
		struct net___cookie *net;
	} skc_net;
} CO_RE;

struct sock {
	struct sock_common __sk_common;
	__u16 sk_type;
	__u16 sk_protocol;
	__u32 sk_mark;
	struct sock_cgroup_data sk_cgrp_data;
} CO_RE;

struct nf_conntrack_tuple {
	struct {
		__u8 protonum;
	} dst;
} CO_RE;

struct nf_conntrack_tuple_hash {
	struct nf_conntrack_tuple tuple;
} CO_RE;

#define IPS_CONFIRMED	(1 << 3)
#define NFCT_INFOMASK	7ul
#define IP_CT_RELATED		1
#define IP_CT_IS_REPLY		3	/* IP_CT_ESTABLISHED_REPLY too */
#define IP_CT_UNTRACKED		7

struct nf_conn {
	struct nf_conntrack_tuple_hash tuplehash[2];
	unsigned long status;
	__u32 mark;
} CO_RE;

struct sk_buff {
	unsigned long _nfct;	/* struct nf_conn *, ctinfo in the low 3 bits */
	struct sock *sk;
	unsigned char *data;	/* the IP header, where iptables' matches run */
} CO_RE;

/*
 * A pointer that the verifier knows (a context, a socket) as a plain number:
 * it forbids arithmetic on those, and bpf_probe_read_kernel takes any address.
 * Reading the spilled pointer back through the helper loses its type.
 */
static __always_inline void *plain(void *pointer)
{
	void *volatile spilled = pointer;
	void *number = 0;

	bpf_probe_read_kernel(&number, sizeof(number), (void *)&spilled);
	return number;
}

#endif /* _VNET_KERNEL_H */
