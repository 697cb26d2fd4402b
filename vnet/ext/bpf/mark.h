/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A socket carries its slice's xid from birth to death
 *
 * The low half of sk->sk_mark is the xid of the socket's cgroup, always and
 * for everyone, whatever SO_MARK asks for; the packets of the socket carry it
 * from there. Observing changes nothing about that: it is the data path's
 * truth, and setsockopt() succeeds either way.
 */
#ifndef _VNET_MARK_H
#define _VNET_MARK_H

#include "events.h"

struct sock___kernel {
	unsigned int sk_kern_sock:1;
} CO_RE;

/* Made by the kernel for itself, in whosever name it was running. */
static __always_inline bool is_kernels(struct sock *sk)
{
	struct sock___kernel *k = (void *)sk;

	return BPF_CORE_READ_BITFIELD_PROBED(k, sk_kern_sock);
}

static __always_inline bool is_in_nodes_netns(struct vnet_facts *f,
					      struct sock *sk)
{
	struct sock_common___net *common = (void *)sk;

	return BPF_CORE_READ(common, skc_net.net, net_cookie) ==
	       f->netns_cookie;
}

static __always_inline __u32 with_xid(__u32 mark, __u32 xid)
{
	return (mark & ~VNET_XID_MASK) | (xid & VNET_XID_MASK);
}

/* A refused socket() fails with this error, and not with EPERM (5.18+). */
static __always_inline int fail_with(int error)
{
	bpf_set_retval(-error);
	return 0;
}

SEC("cgroup/sock_create")
int vnet_sock_create(struct bpf_sock *ctx)
{
	struct policy p = in_force();
	__u32 xid = xid_of_sk(p, plain(ctx));
	struct vnet_event event = { .xid = xid };

	if (!xid)
		return 1;
	ctx->mark = with_xid(ctx->mark, xid);
	event.family = ctx->family;
	event.type = ctx->type;
	event.proto = ctx->protocol;
	event.mark = ctx->mark;
	if (ctx->type == SOCK_RAW) {
		if (find_in(grants, p, &xid) != VNET_RAW_DENY)
			return 1;
		event.kind = VNET_KIND_RAW;
		by_process(&event);
		return refuse(p, &event) ? fail_with(EACCES) : 1;
	}
	/*
	 * The kernel makes MPTCP's subflows itself, and SMC's TCP socket,
	 * without this hook: they would carry no mark. Programs take this error
	 * for a kernel without MPTCP or SMC and use TCP.
	 */
	if (ctx->protocol == IPPROTO_MPTCP || ctx->protocol == IPPROTO_SMC) {
		event.kind = VNET_KIND_MPTCP;
		by_process(&event);
		return refuse(p, &event) ? fail_with(EPROTONOSUPPORT) : 1;
	}
	return 1;
}

/*
 * A raw socket's error queue gets the ICMP errors about everybody's packets of
 * its protocol, and no program is asked about those (raw_err()). Where it may
 * not hear everything the option stays off, and programs do without.
 */
static __always_inline bool wants_errors(struct bpf_sockopt *ctx,
					 struct sock *sk)
{
	return ((ctx->level == SOL_IP && ctx->optname == IP_RECVERR) ||
		(ctx->level == SOL_IPV6 && ctx->optname == IPV6_RECVERR)) &&
	       ctx->optlen >= 0 && BPF_CORE_READ(sk, sk_type) == SOCK_RAW;
}

static __noinline int refuse_errors(struct bpf_sockopt *ctx)
{
	struct sock *sk = plain(ctx->sk);
	struct policy p = in_force();
	struct vnet_event event = { .kind = VNET_KIND_SNOOP };
	struct vnet_facts *f = facts_of(p);

	event.xid = xid_of_sk(p, sk);
	if (!event.xid || find_in(grants, p, &event.xid) == VNET_RAW_FULL ||
	    !f || !is_in_nodes_netns(f, sk))
		return 0;
	event.family = BPF_CORE_READ(sk, __sk_common.skc_family);
	event.type = SOCK_RAW;
	event.proto = BPF_CORE_READ(sk, sk_protocol);
	by_process(&event);
	return refuse(p, &event);
}

SEC("cgroup/setsockopt")
int vnet_setsockopt(struct bpf_sockopt *ctx)
{
	__u32 *mark = ctx->optval;
	struct vnet_event event = { };
	struct vnet_facts *f;
	struct policy p;
	struct sock *sk;
	__u32 asked;

	if (wants_errors(ctx, plain(ctx->sk)) &&
	    (void *)(mark + 1) <= ctx->optval_end) {
		/* 0: a program before this one has hidden how long it is */
		asked = !ctx->optlen ? 1 :
			ctx->optlen < (int)sizeof(*mark) ? *(__u8 *)mark : *mark;
		if (asked && refuse_errors(ctx)) {
			*mark = 0;
			ctx->optlen = sizeof(*mark);
			return 1;
		}
	}
	if (ctx->level != SOL_SOCKET || ctx->optname != SO_MARK) {
		/* more than a page is not shown here: 0 lets it pass */
		if (ctx->optlen > 4096)
			ctx->optlen = 0;
		return 1;
	}
	/* too short for the kernel as well; the buffer has room for 16 bytes */
	if (ctx->optlen < (int)sizeof(*mark) ||
	    (void *)(mark + 1) > ctx->optval_end)
		return 1;
	p = in_force();
	sk = plain(ctx->sk);
	event.xid = xid_of_sk(p, sk);
	/* never 0, which would pass the original on, however long it says it is */
	ctx->optlen = sizeof(*mark);
	/*
	 * Of a slice that is no more, until it is adopted; or of one that only
	 * another instance of these programs knows of, which will see to it.
	 */
	if (!event.xid && (BPF_CORE_READ(sk, sk_mark) & VNET_XID_MASK))
		return 1;
	/* or of another node's, in its namespace: marks end where that does */
	f = facts_of(p);
	if (!event.xid && f && !is_in_nodes_netns(f, sk))
		return 1;
	asked = *mark;
	*mark = with_xid(asked, event.xid);
	asked &= VNET_XID_MASK;
	if (!asked || asked == event.xid)
		return 1;
	event.kind = VNET_KIND_MARK;
	event.mark = asked;
	event.owner = asked;
	event.family = BPF_CORE_READ(sk, __sk_common.skc_family);
	event.type = BPF_CORE_READ(sk, sk_type);
	event.proto = BPF_CORE_READ(sk, sk_protocol);
	by_process(&event);
	p.observe = false;	/* it is not let through there either */
	refuse(p, &event);
	return 1;
}

/* The full socket that sends this packet; NULL where there is none. */
static __always_inline struct sock *sender_of(struct sk_buff *skb)
{
	struct sock *sk = BPF_CORE_READ(skb, sk);
	__u8 state;

	if (!sk)
		return NULL;
	state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (state == TCP_TIME_WAIT || state == TCP_NEW_SYN_RECV)
		return NULL;
	return sk;
}

static __always_inline bool is_ordinary(struct sock *sk)
{
	__u16 family = BPF_CORE_READ(sk, __sk_common.skc_family);

	return (family == AF_INET || family == AF_INET6) &&
	       BPF_CORE_READ(sk, sk_type) != SOCK_RAW;
}

#endif /* _VNET_MARK_H */
