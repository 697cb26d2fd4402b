/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Reserved ports and addresses: who may bind to them
 *
 * Asked of whoever binds, the node's own processes included, and answered by
 * the socket's slice. Ports and addresses are reserved in the node's network
 * namespace only. What binds without bind() (connect, listen, sendto) runs no
 * program: net.ipv4.ip_local_reserved_ports keeps it off the reserved ports.
 */
#ifndef _VNET_BIND_H
#define _VNET_BIND_H

#include "mark.h"
#include "reserved.h"

static __always_inline int on_bind(struct bpf_sock_addr *ctx,
				   struct vnet_address addr)
{
	struct policy p = in_force();
	struct vnet_facts *f = facts_of(p);
	struct vnet_event event = { };
	__u16 port = bpf_ntohs(ctx->user_port);

	if (!f || !(f->ports | f->addresses) ||
	    bpf_get_netns_cookie(ctx) != f->netns_cookie)
		return 1;
	event.xid = xid_of_sk(p, plain(ctx->sk));
	event.kind = reserved_to_another(p, f, ctx->protocol, port, &addr,
					 event.xid, &event.owner);
	if (event.kind == VNET_KIND_NONE)
		return 1;
	event.family = ctx->family;
	event.type = ctx->type;
	event.proto = ctx->protocol;
	event.sport = port;
	__builtin_memcpy(event.saddr, &addr, sizeof(event.saddr));
	by_process(&event);
	return refuse(p, &event) ? fail_with(EACCES) : 1;
}

SEC("cgroup/bind4")
int vnet_bind4(struct bpf_sock_addr *ctx)
{
	return on_bind(ctx, mapped(ctx->user_ip4));
}

/* The address may be v4-mapped; :: is taken to cover IPv4 too. */
SEC("cgroup/bind6")
int vnet_bind6(struct bpf_sock_addr *ctx)
{
	struct vnet_address addr;
	__u32 word[4] = { ctx->user_ip6[0], ctx->user_ip6[1],
			  ctx->user_ip6[2], ctx->user_ip6[3] };

	__builtin_memcpy(&addr, word, sizeof(addr));
	return on_bind(ctx, addr);
}

#endif /* _VNET_BIND_H */
