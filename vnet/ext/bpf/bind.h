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

static __always_inline struct vnet_address mapped(__be32 v4)
{
	struct vnet_address a = { .bytes[10] = 0xff, .bytes[11] = 0xff };

	__builtin_memcpy(&a.bytes[12], &v4, sizeof(v4));
	return a;
}

/* ::, 0.0.0.0 and ::ffff:0.0.0.0, which is how a v6 socket says the latter */
static __always_inline bool is_any(const struct vnet_address *a)
{
	__u32 word[4];

	__builtin_memcpy(word, a, sizeof(word));
	return !word[0] && !word[1] && !word[3] &&
	       (!word[2] || word[2] == bpf_htonl(0xffff));
}

/* MPTCP has TCP's ports: its subflows are TCP sockets. */
static __always_inline __u8 port_space(__u16 proto)
{
	return proto == IPPROTO_MPTCP ? IPPROTO_TCP : proto;
}

static __always_inline bool has_reservable_ports(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP ||
	       proto == IPPROTO_SCTP;
}

/* The value of a key of `ports`; NULL where there is none. 0 is a value. */
static __always_inline __u32 *port_entry(struct policy p,
					 const struct vnet_port *key)
{
	void *inner = bpf_map_lookup_elem(&ports, &p.generation);

	return inner ? bpf_map_lookup_elem(inner, key) : NULL;
}

/*
 * Whether proto's port at addr (at all addresses, if `any`) is reserved to
 * somebody else than xid; *owner is then who that is, 0 if several.
 */
static __always_inline bool port_of_another(struct policy p, __u8 proto,
					    __u16 port,
					    const struct vnet_address *addr,
					    bool any, __u32 xid, __u32 *owner)
{
	struct vnet_port key = {
		.proto = proto,
		.scope = VNET_PORT_ANY,
		.port = port,
	};
	__u32 *found = port_entry(p, &key);

	if (!found || *found == xid) {
		key.scope = any ? VNET_PORT_WILD : VNET_PORT_ADDR;
		if (!any)
			__builtin_memcpy(key.addr, addr, sizeof(key.addr));
		found = port_entry(p, &key);
		/* a value of 0 is nobody, and not the node */
		if (!found || (*found && *found == xid))
			return false;
	}
	*owner = *found;
	return true;
}

static __always_inline bool address_of_another(struct policy p,
					       const struct vnet_address *addr,
					       __u32 xid, __u32 *owner)
{
	__u32 found = find_in(addresses, p, addr);

	if (!found || found == xid)
		return false;
	*owner = found;
	return true;
}

static __always_inline int on_bind(struct bpf_sock_addr *ctx,
				   struct vnet_address addr)
{
	struct policy p = in_force();
	struct vnet_facts *f = facts_of(p);
	struct vnet_event event = { };
	__u8 proto = port_space(ctx->protocol);
	__u16 port = bpf_ntohs(ctx->user_port);
	bool any = is_any(&addr);
	__u32 xid;

	if (!f || !(f->ports | f->addresses) ||
	    bpf_get_netns_cookie(ctx) != f->netns_cookie)
		return 1;
	xid = xid_of_sk(p, plain(ctx->sk));
	if (f->addresses && !any &&
	    address_of_another(p, &addr, xid, &event.owner))
		event.kind = VNET_KIND_ADDRESS;
	else if (f->ports && port && has_reservable_ports(proto) &&
		 port_of_another(p, proto, port, &addr, any, xid, &event.owner))
		event.kind = VNET_KIND_BIND;
	else
		return 1;

	event.xid = xid;
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
