// SPDX-License-Identifier: GPL-2.0-only
/*
 * What has no cgroup hook: other families than IPv4 and IPv6, protocols that
 * bind by themselves, and SO_MARK of 32-bit programs
 *
 * Only where the kernel runs BPF LSM programs. The maps are those of
 * base.bpf.o; the loader puts them in place of these.
 */
#include "events.h"
#include "reserved.h"

#define AF_UNIX		1
#define AF_KEY		15
#define AF_NETLINK	16
#define AF_RDS		21
#define AF_TIPC		30
#define AF_RXRPC	33
#define AF_ALG		38
#define AF_VSOCK	40
#define AF_SMC		43
#define EPERM		1
#define EAFNOSUPPORT	97
#define SCTP_BINDX_ADD	100	/* SCTP_SOCKOPT_BINDX_ADD */
#define BINDX_MAX	8	/* addresses looked at: the gate does the rest */

char LICENSE[] SEC("license") = "GPL";

struct css_set {
	struct cgroup *dfl_cgrp;
} CO_RE;

struct task_struct {
	struct css_set *cgroups;
} CO_RE;

struct socket {
	struct sock *sk;
} CO_RE;

struct proto {
	void *bind;
} CO_RE;

struct sock_common___prot {
	struct proto *skc_prot;
} CO_RE;

struct thread_info___x86 {
	__u32 status;
} CO_RE;

struct task_struct___x86 {
	struct thread_info___x86 thread_info;
} CO_RE;

struct thread_info___arm64 {
	unsigned long flags;
} CO_RE;

struct task_struct___arm64 {
	struct thread_info___arm64 thread_info;
} CO_RE;

#define TS_COMPAT	(1 << 1)	/* arch/x86/include/asm/thread_info.h */
#define TIF_32BIT	22		/* arch/arm64/include/asm/thread_info.h */

/*
 * 0 or -error, by a branch: of anything computed from `refused` the verifier
 * of 6.12, which asks, does not see that it is no positive number.
 */
static __always_inline int result(bool refused, int error)
{
	int r = 0;

	if (refused) {
		r = -error;
		asm volatile("" : "+r"(r));
	}
	return r;
}

/* Where the socket would be made: in the v2 cgroup of this thread. */
static __always_inline __u32 xid_of_current(struct policy p)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	return xid_of_cgroup(p, BPF_CORE_READ(task, cgroups, dfl_cgrp));
}

/*
 * What the others send passes no IP hook, and so has no owner: frames of
 * packet sockets ((AF_INET, SOCK_PACKET) comes here as AF_PACKET), of LLC and,
 * without any capability, of PPPoE. SMC, RxRPC, RDS and TIPC, like MPTCP, speak
 * through sockets that the kernel makes for itself.
 */
SEC("lsm/socket_create")
int vnet_lsm_socket_create(unsigned long long *ctx)
{
	int family = ctx[0], type = ctx[1], protocol = ctx[2], kern = ctx[3];
	struct policy p = in_force();
	struct vnet_event event = { };
	int error = EACCES;

	if (kern)
		return 0;
	switch (family) {
	case AF_INET:
	case AF_INET6:
	case AF_UNIX:		/* these leave the host by none of its interfaces */
	case AF_KEY:
	case AF_NETLINK:
	case AF_ALG:
	case AF_VSOCK:
		return 0;
	case AF_RDS:
	case AF_TIPC:
	case AF_RXRPC:
	case AF_SMC:
		event.kind = VNET_KIND_MPTCP;
		error = EAFNOSUPPORT;
		break;
	default:
		event.kind = VNET_KIND_PACKET;
	}
	event.xid = xid_of_current(p);
	if (!event.xid || (event.kind == VNET_KIND_PACKET &&
			   find_in(grants, p, &event.xid) == VNET_RAW_FULL))
		return 0;
	event.family = family;
	event.type = type;
	event.proto = protocol;
	by_process(&event);
	return result(refuse(p, &event), error);
}

/* sockaddr_in, and the start of sockaddr_in6: family, port, address */
struct bind_address {
	__u16 family;
	__be16 port;
	__be32 v4;		/* v6: the flow label */
	struct vnet_address v6;
};

/*
 * One address that a socket binds to, already in kernel memory. raw_bind()
 * does not look at its family, SCTP takes either.
 */
static __always_inline bool may_bind(struct sock *sk, const void *from,
				     __u32 *length)
{
	__u16 family = BPF_CORE_READ(sk, __sk_common.skc_family);
	__u16 protocol = BPF_CORE_READ(sk, sk_protocol);
	struct sock_common___net *common = (void *)sk;
	struct policy p = in_force();
	struct vnet_facts *f = facts_of(p);
	struct bind_address address = { };
	struct vnet_event event = { };
	struct vnet_address addr;

	*length = 16;
	if (bpf_probe_read_kernel(&address, 8, from))
		return true;
	if (protocol == IPPROTO_SCTP)
		family = address.family;
	if (family == AF_INET6) {
		*length = 28;
		bpf_probe_read_kernel(&address.v6, sizeof(address.v6),
				      from + 8);
		addr = address.v6;
	} else {
		addr = mapped(address.v4);
	}
	if (!f || BPF_CORE_READ(common, skc_net.net, net_cookie) !=
		  f->netns_cookie)
		return true;
	event.xid = xid_of_sk(p, sk);
	/* else a ping socket's id, or nothing */
	if (protocol == IPPROTO_SCTP)
		event.sport = bpf_ntohs(address.port);
	event.kind = reserved_to_another(p, f, protocol, event.sport, &addr,
					 event.xid, &event.owner);
	if (event.kind == VNET_KIND_NONE)
		return true;
	event.family = family;
	event.type = BPF_CORE_READ(sk, sk_type);
	event.proto = protocol;
	__builtin_memcpy(event.saddr, &addr, sizeof(event.saddr));
	by_process(&event);
	return !refuse(p, &event);
}

/*
 * SCTP, raw, ping and L2TP sockets: inet_bind() leaves it to them before it
 * asks a cgroup program.
 */
static __always_inline bool binds_by_itself(struct sock *sk)
{
	struct sock_common___prot *common = (void *)sk;
	__u16 family = BPF_CORE_READ(sk, __sk_common.skc_family);

	return (family == AF_INET || family == AF_INET6) &&
	       BPF_CORE_READ(common, skc_prot, bind);
}

SEC("lsm/socket_bind")
int vnet_lsm_socket_bind(unsigned long long *ctx)
{
	struct socket *socket = plain((void *)ctx[0]);
	struct sock *sk = BPF_CORE_READ(socket, sk);
	__u32 length;

	if (!sk || !binds_by_itself(sk))
		return 0;
	return result(!may_bind(sk, plain((void *)ctx[1]), &length),
		      EACCES);
}

/* sctp_bindx(3) is a setsockopt, with addresses one behind the other. */
SEC("lsm/sctp_bind_connect")
int vnet_lsm_sctp_bindx(unsigned long long *ctx)
{
	struct sock *sk = plain((void *)ctx[0]);
	int optname = ctx[1], left = ctx[3];
	void *from = plain((void *)ctx[2]);

	if (optname != SCTP_BINDX_ADD)
		return 0;
	for (int n = 0; n < BINDX_MAX && left >= 16; n++) {
		__u32 length;

		if (!may_bind(sk, from, &length))
			return -EACCES;
		from += length;
		left -= length;
	}
	return 0;
}

/* in_compat_syscall(), as far as an architecture without `status` is arm64 */
static __always_inline bool in_32bit_call(void)
{
	void *task = (void *)bpf_get_current_task();
	struct task_struct___arm64 *arm64 = task;
	struct task_struct___x86 *x86 = task;

	if (bpf_core_field_exists(x86->thread_info.status))
		return BPF_CORE_READ(x86, thread_info.status) & TS_COMPAT;
	if (bpf_core_field_exists(arm64->thread_info.flags))
		return BPF_CORE_READ(arm64, thread_info.flags) &
		       (1ul << TIF_32BIT);
	return false;
}

/*
 * The kernel does not show 32-bit programs' options to cgroup programs. The
 * gate would stop what is sent under the mark; but what comes in is attributed
 * by its receiver's mark where no module loads.
 */
SEC("lsm/socket_setsockopt")
int vnet_lsm_socket_setsockopt(unsigned long long *ctx)
{
	int level = ctx[1], optname = ctx[2];
	struct vnet_event event = { .kind = VNET_KIND_MARK };
	struct socket *socket;
	struct policy p;
	int error = -EPERM;
	struct sock *sk;

	if (level != SOL_SOCKET || optname != SO_MARK || !in_32bit_call())
		return 0;
	p = in_force();
	socket = plain((void *)ctx[0]);
	sk = BPF_CORE_READ(socket, sk);
	event.xid = xid_of_sk(p, sk);
	if (!event.xid)
		return 0;
	event.family = BPF_CORE_READ(sk, __sk_common.skc_family);
	event.type = BPF_CORE_READ(sk, sk_type);
	event.proto = BPF_CORE_READ(sk, sk_protocol);
	by_process(&event);
	/* or clang negates the answer, and 6.12 then knows no range of it */
	barrier_var(error);
	return refuse(p, &event) ? error : 0;
}
