/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Whose a port or an address is
 */
#ifndef _VNET_RESERVED_H
#define _VNET_RESERVED_H

#include "policy.h"

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

/* Reserved to xid: everywhere, or at this address. */
static __always_inline bool is_own_port(struct policy p, __u8 proto, __u16 port,
					const struct vnet_address *addr,
					__u32 xid)
{
	struct vnet_port key = {
		.proto = proto,
		.scope = VNET_PORT_ANY,
		.port = port,
	};
	__u32 *found = port_entry(p, &key);

	if (found && *found == xid)
		return true;
	key.scope = VNET_PORT_ADDR;
	__builtin_memcpy(key.addr, addr, sizeof(key.addr));
	found = port_entry(p, &key);
	return found && *found == xid;
}

/*
 * Whether another than xid has reserved what a socket of xid binds to: the
 * kind of the refusal, and in *owner who has; else VNET_KIND_NONE.
 */
static __always_inline __u8 reserved_to_another(struct policy p,
						struct vnet_facts *f,
						__u16 proto, __u16 port,
						const struct vnet_address *addr,
						__u32 xid, __u32 *owner)
{
	bool any = is_any(addr);

	if (f->addresses && !any && address_of_another(p, addr, xid, owner))
		return VNET_KIND_ADDRESS;
	/* MPTCP has TCP's ports: its subflows are TCP sockets */
	if (proto == IPPROTO_MPTCP)
		proto = IPPROTO_TCP;
	if (f->ports && port && has_reservable_ports(proto) &&
	    port_of_another(p, proto, port, addr, any, xid, owner))
		return VNET_KIND_BIND;
	return VNET_KIND_NONE;
}

#endif /* _VNET_RESERVED_H */
