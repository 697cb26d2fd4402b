/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * What the module, the iptables plugin and Python agree on.
 *
 * This is the only definition of the target's wire structure and of the
 * generic netlink family. The module includes it, the plugin includes it, and
 * Python reads every constant out of it through cffi; tests/unit/test_abi.py
 * checks sizes and offsets from the Python side.
 */
#ifndef _XT_COPYXID_H
#define _XT_COPYXID_H

#include <linux/types.h>

/* -- meanings ------------------------------------------------------------ */

/* The xid is the low half of skb->mark; the high half belongs to others. */
#define COPYXID_MARK_MASK	0x0000ffffu
/* ct->mark: originator's owner in the low half, responder's in the high. */
#define COPYXID_ORIG_SHIFT	0
#define COPYXID_REPL_SHIFT	16
#define COPYXID_XID_MAX		65535u	/* 0 is the node itself */
#define COPYXID_SLICES_MAX	65535u	/* entries (cgroup ids) in the table */
/* cgroups are matched by level (the root is 0); one bit per level is kept. */
#define COPYXID_LEVEL_MAX	63u

/* -- xtables target "MARK", our own revision ------------------------------ */

/* Far above what upstream counts to: it has reached 2 in twenty years. */
#define XT_MARK_COPYXID_REVISION	128

enum xt_mark_copyxid_flags {
	XT_MARK_COPYXID = 1 << 0,	/* mark and mask must be 0 */
};

/*
 * Without XT_MARK_COPYXID this does what revision 2 does:
 * skb->mark = (skb->mark & ~mask) ^ mark.
 */
struct xt_mark_copyxid_tginfo {
	__u32 mark;
	__u32 mask;
	__u32 flags;
};

/* -- generic netlink family ----------------------------------------------- */

#define COPYXID_GENL_NAME	"copyxid"
#define COPYXID_GENL_VERSION	1

/*
 * Every command needs CAP_NET_ADMIN in the initial user namespace; the family
 * exists in the initial network namespace only.
 */
enum copyxid_cmd {
	COPYXID_CMD_UNSPEC,
	/*
	 * Add or change one entry: CGROUP_ID, XID. With NLM_F_EXCL an entry
	 * that exists is -EEXIST; with NLM_F_REPLACE and no NLM_F_CREATE one
	 * that does not exist is -ENOENT. The cgroup must exist (-ENOENT) in
	 * the unified hierarchy and not be its root (-EINVAL).
	 */
	COPYXID_CMD_SLICE_SET,
	COPYXID_CMD_SLICE_DEL,		/* CGROUP_ID; -ENOENT if absent */
	COPYXID_CMD_SLICE_FLUSH,	/* no attributes */
	COPYXID_CMD_SLICE_GET,		/* dump: CGROUP_ID, XID, LEVEL */
	COPYXID_CMD_STATS_GET,		/* dump: one NETNS + COUNTERS each */
	__COPYXID_CMD_MAX,
};

#define COPYXID_CMD_MAX (__COPYXID_CMD_MAX - 1)

enum copyxid_attr {
	COPYXID_A_UNSPEC,
	COPYXID_A_PAD,
	COPYXID_A_CGROUP_ID,	/* u64: st_ino of the cgroup's directory */
	COPYXID_A_XID,		/* u32: 1..COPYXID_XID_MAX */
	COPYXID_A_LEVEL,	/* u32: depth below the root, 1.. */
	COPYXID_A_NETNS,	/* u32: inode of /proc/PID/ns/net */
	COPYXID_A_COUNTERS,	/* binary: u64[COPYXID_CNT_MAX], host order */
	__COPYXID_A_MAX,
};

#define COPYXID_A_MAX (__COPYXID_A_MAX - 1)

/*
 * Why a packet got the mark it got: each packet the target sees adds one to
 * exactly one of the first group, and perhaps to some of the second.
 */
enum copyxid_counter {
	/* attributed to a slice */
	COPYXID_CNT_OUT_SOCKET,		/* by the sending socket */
	COPYXID_CNT_OUT_CONN,		/* by the connection's half */
	COPYXID_CNT_IN_SOCKET,		/* by the receiving socket, early demux */
	COPYXID_CNT_IN_LOOKUP,		/* by the receiving socket, looked up */
	COPYXID_CNT_IN_CONN,		/* by the connection's half */
	COPYXID_CNT_THROUGH_INTERFACE,	/* by the interface of its container */
	COPYXID_CNT_THROUGH_CONN,	/* to a container, by the half */
	/* attributed to nobody (xid 0) */
	COPYXID_CNT_NODE_SOCKET,	/* a socket outside every slice */
	COPYXID_CNT_NO_SOCKET,		/* no socket, and the half is empty */
	COPYXID_CNT_NO_CONNTRACK,	/* no socket and no connection either */
	COPYXID_CNT_OTHER_NETNS,	/* the socket is of another namespace */
	COPYXID_CNT_FORWARDED,		/* passes through, no slice at its ends */
	/* what was recorded in ct->mark on the way */
	COPYXID_CNT_FILLED,		/* an empty half was filled */
	COPYXID_CNT_CONFLICT,		/* a filled half changed owner */
	COPYXID_CNT_INTRUSION,		/* a raw sender in somebody's connection */
	COPYXID_CNT_MAX,
};

#endif /* _XT_COPYXID_H */
