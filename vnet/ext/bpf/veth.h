/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * What veth.bpf.c and containers.py agree on
 */
#ifndef _VNET_VETH_H
#define _VNET_VETH_H

#include <linux/types.h>

#define VNET_INTERFACES_MAX	65536

/* map `interfaces` (hash): u32 ifindex of the host end of a veth -> */
struct vnet_interface {
	__u32 xid;
	__u32 made_clsact;	/* 1: its clsact qdisc is ours to take away */
	/* The container's own, as its packets say: written by the program. */
	__u16 mac[3];
	__u8 pad[2];
};

#endif /* _VNET_VETH_H */
