/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * What the eBPF programs and Python agree on: maps, their keys and values,
 * the kinds of refusals, and the events.
 *
 * Python reads every constant and layout out of this file through cffi, as it
 * does for xt_copyxid.h; tests/unit/test_abi.py checks sizes and offsets.
 *
 * A policy (which cgroup is which slice, who holds which port) is one
 * generation. Two generations have room; one is in force. A new policy is
 * written into the other one and put in force by one store into the map
 * `control`, so that no packet ever meets half of each.
 */
#ifndef _VNET_BPF_H
#define _VNET_BPF_H

#include <linux/types.h>

#define VNET_XID_MASK		0x0000ffffu	/* of skb->mark and sk->sk_mark */
#define VNET_XID_MAX		65535u		/* 0 is the node itself */
#define VNET_LEVEL_MAX		63u		/* depth of a slice's cgroup */
#define VNET_GENERATIONS	2

/* map `control` (array, one u64): what is in force */
#define VNET_CONTROL_GENERATION	0x1ull	/* which of the two */
#define VNET_CONTROL_OBSERVE	0x2ull	/* report, refuse nothing */

/* map `facts` (array, VNET_GENERATIONS entries) */
struct vnet_facts {
	__u64 levels;		/* bit n: some slice's cgroup is at depth n */
	__u64 netns_cookie;	/* of the node's network namespace: ports and
				 * addresses are reserved in this one only */
	__u32 ports;		/* entries of the map `ports` */
	__u32 addresses;	/* entries of the map `addresses` */
};

/*
 * Maps of maps (arrays of VNET_GENERATIONS hashes):
 *
 *   slices	u64 cgroup id	-> u32 xid
 *   grants	u32 xid		-> u32 enum vnet_raw; absent is VNET_RAW_DENY
 *   ports	struct vnet_port -> u32 xid
 *   addresses	u8[16] address	-> u32 xid
 *
 * An IPv4 address is its IPv4-mapped IPv6 address everywhere (RFC 4291,
 * 2.5.5.2), so that a v4-mapped socket cannot go round a reservation.
 */
/*
 * map `owners` (array, u64: cgroup id << 16 | xid): entries of `slices` once
 * more, for the program that every packet meets, which has no time for a hash
 * table. Of the VNET_GENERATIONS << VNET_OWNER_BITS places a cgroup id has two:
 * generation << VNET_OWNER_BITS | the upper bits of its product with
 * VNET_OWNER_FACTOR, and that with the lowest bit changed. What is in neither
 * may still be in `slices`.
 *
 * Ids of cgroups made one after the other are as far apart as each has files,
 * which no golden ratio spreads (24 apart, a fifth of 10,000 have no place).
 * This factor was searched for: 10,000 up to 100 apart have one each.
 */
#define VNET_OWNER_BITS		16
#define VNET_OWNER_FACTOR	0xbcfbb050acab1a6bull

enum vnet_raw {
	VNET_RAW_DENY,
	VNET_RAW_OWN,		/* own ports, addresses and flows only */
	VNET_RAW_FULL,
};

enum vnet_port_scope {
	VNET_PORT_ANY,		/* reserved on every address; addr is zero */
	VNET_PORT_ADDR,		/* reserved on addr */
	VNET_PORT_WILD,		/* somebody has it on some address: who may bind
				 * it to all of them (value 0: nobody); addr is
				 * zero */
};

struct vnet_port {
	__u8 proto;		/* IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP */
	__u8 scope;		/* enum vnet_port_scope */
	__u16 port;		/* host order */
	__u8 addr[16];
};

/* Why something was refused. The names are what `vnet events` prints. */
enum vnet_kind {
	VNET_KIND_NONE,
	VNET_KIND_RAW,		/* a raw socket without the grant */
	VNET_KIND_PACKET,	/* a packet or XDP socket without the grant */
	VNET_KIND_BIND,		/* bind to a reserved port */
	VNET_KIND_ADDRESS,	/* use of a reserved address */
	VNET_KIND_PORT,		/* a packet from a reserved port */
	VNET_KIND_FOREIGN,	/* a raw packet from a port that is not its own */
	VNET_KIND_MARK,		/* another xid put on a packet */
	VNET_KIND_SPOOF,	/* a source address that is not this node's */
	VNET_KIND_CONNECTION,	/* a raw packet into another's connection */
	VNET_KIND_SNOOP,	/* another's packet, at a raw socket */
	VNET_KIND_MPTCP,	/* a protocol whose sockets the kernel makes */
	VNET_KIND_MAX,
};

/*
 * map `settled` (per-CPU array, u64): packets of connections that named their
 * slice already, which the rules let pass uncounted
 */
enum vnet_settled {
	VNET_SETTLED_OUT,
	VNET_SETTLED_IN,
	VNET_SETTLED_MAX,
};

/* map `counters` (per-CPU hash) */
struct vnet_counter_key {
	__u32 xid;		/* who was refused */
	__u32 kind;		/* enum vnet_kind */
};

struct vnet_counter {
	__u64 refused;
	__u64 observed;		/* would have been, but for `observe` */
	__u64 suppressed;	/* of both: without an event of their own */
	/* the token bucket that decides about the event; not for userspace */
	__u64 refilled;
	__u64 tokens;
	__u64 untold;		/* suppressed since the last event */
};

#define VNET_EVENT_BURST	10ull	/* for each slice, kind and CPU */
#define VNET_EVENT_PER_SECOND	10ull

#define VNET_COMM		16

/* map `events` (ring buffer) */
struct vnet_event {
	__u64 when;		/* CLOCK_BOOTTIME, ns */
	__u64 suppressed;	/* since the last event of this slice and kind
				 * on this CPU */
	__u32 xid;		/* who was refused */
	__u32 owner;		/* whose it is; 0: nobody's, or not one slice's */
	__u32 pid;		/* 0 where a packet was refused */
	__u32 mark;		/* the mark asked for, else the packet's */
	__u8 kind;		/* enum vnet_kind */
	__u8 observed;		/* 1: it was let through */
	__u8 family;		/* AF_INET or AF_INET6 of the addresses; of the
				 * socket, where one was refused */
	__u8 type;		/* of the socket: SOCK_STREAM ... */
	__u16 proto;		/* IPPROTO_*; 262 is MPTCP */
	__u16 sport;		/* host order; ICMP: type and code */
	__u16 dport;		/* ICMP: id of an echo */
	__u8 saddr[16];
	__u8 daddr[16];
	__u8 pad[6];		/* none at the end: all of it is sent */
	char comm[VNET_COMM];	/* empty where a packet was refused */
};

#endif /* _VNET_BPF_H */
