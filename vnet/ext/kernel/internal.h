/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the files of xt_copyxid share, and the parts of the
 * packet path that are short and frequent enough to be inlined into it.
 */
#ifndef COPYXID_INTERNAL_H
#define COPYXID_INTERNAL_H

#include <linux/cgroup.h>
#include <linux/hash.h>
#include <linux/netfilter.h>
#include <linux/percpu.h>
#include <linux/rculist.h>
#include <net/netfilter/nf_conntrack.h>
#include <net/netns/generic.h>
#include <net/sock.h>

#include "xt_copyxid.h"

#ifndef CONFIG_NF_CONNTRACK_MARK
#error "xt_copyxid records owners in ct->mark: CONFIG_NF_CONNTRACK_MARK is needed"
#endif
#ifndef CONFIG_SOCK_CGROUP_DATA
#error "xt_copyxid finds a socket's slice by its cgroup: CONFIG_SOCK_CGROUP_DATA is needed"
#endif

/* -- counters.c ------------------------------------------------------------ */

struct copyxid_counters {
	u64 n[COPYXID_CNT_MAX];
};

struct copyxid_net {
	struct list_head list;		/* in copyxid_nets, oldest first */
	u64 seq;			/* never used twice: a dump's cursor */
	unsigned int inum;		/* as /proc/PID/ns/net shows it */
	struct copyxid_counters __percpu *counters;
};

/* The initial namespace's: no look-up for it on the packet path. */
DECLARE_PER_CPU(struct copyxid_counters, copyxid_init_counters);
extern unsigned int copyxid_net_id;
extern struct list_head copyxid_nets;	/* under copyxid_nets_mutex */
extern struct mutex copyxid_nets_mutex;

void copyxid_counters_sum(const struct copyxid_net *cn,
			  struct copyxid_counters *sum);
int copyxid_counters_init(void);
void copyxid_counters_exit(void);

void copyxid_count_elsewhere(const struct net *net,
			     enum copyxid_counter which);

static __always_inline void copyxid_count(const struct net *net,
					  enum copyxid_counter which)
{
	if (likely(net_eq(net, &init_net)))
		this_cpu_inc(copyxid_init_counters.n[which]);
	else
		copyxid_count_elsewhere(net, which);
}

/* -- slices.c -------------------------------------------------------------- */

/*
 * One chain per bucket; 10,000 slices fill less than a third of the buckets,
 * so that nearly every look-up ends at the first entry it meets.
 */
#define COPYXID_HASH_BITS	15

struct copyxid_slice {
	struct hlist_node node;
	u64 id;				/* the cgroup's */
	u32 xid;			/* never 0; changes under readers */
	u32 level;
	struct rcu_head rcu;
};

extern struct hlist_head copyxid_buckets[1 << COPYXID_HASH_BITS];
/* By depth: the deepest level, down to there, at which slices live; 0: none. */
extern u8 copyxid_deepest[COPYXID_LEVEL_MAX + 1];
extern unsigned int copyxid_generation;	/* changes with the table */
extern struct mutex copyxid_slices_mutex;

struct netlink_ext_ack;

int copyxid_slice_set(u64 id, u32 xid, u16 nlmsg_flags,
		      struct netlink_ext_ack *extack);
int copyxid_slice_del(u64 id, struct netlink_ext_ack *extack);
void copyxid_slice_flush(void);

/* The low half of a cgroup id counts up; the high half is its generation. */
static __always_inline struct hlist_head *copyxid_bucket(u64 id)
{
	return &copyxid_buckets[hash_32((u32)id, COPYXID_HASH_BITS)];
}

/* The deepest level at which this cgroup may have an ancestor in the table. */
static __always_inline unsigned long copyxid_first_level(const struct cgroup *c)
{
	unsigned int depth = c->level;

	if (likely(depth < COPYXID_LEVEL_MAX))
		return READ_ONCE(copyxid_deepest[depth]);
	return READ_ONCE(copyxid_deepest[COPYXID_LEVEL_MAX]);
}

/*
 * The slice of a cgroup: that of its deepest ancestor in the table, itself
 * included; NULL if there is none. One probe per level in use, whatever the
 * number of slices. Caller holds the RCU read lock, as netfilter hooks do.
 */
static __always_inline const struct copyxid_slice *
copyxid_cgroup_slice(const struct cgroup *cgrp)
{
	unsigned long level;

	for (level = copyxid_first_level(cgrp); level;
	     level = READ_ONCE(copyxid_deepest[level - 1])) {
		u64 id = cgroup_id(cgrp->ancestors[level]);
		const struct copyxid_slice *s;

		hlist_for_each_entry_rcu(s, copyxid_bucket(id), node) {
			if (likely(s->id == id))
				return s;
		}
	}
	return NULL;
}

/* -- the halves of ct->mark ------------------------------------------------ */

/*
 * A connection's two ends, named by who is there: the originator's owner is
 * in the low half of ct->mark, the responder's in the high half. The same
 * number is the direction in which that end's own packets travel, and
 * tuplehash[end].tuple is the flow as that end's socket sees it on this host:
 * src is the socket's address, dst its peer's, whatever NAT does elsewhere.
 */
enum copyxid_end {
	COPYXID_ORIGINATOR = IP_CT_DIR_ORIGINAL,
	COPYXID_RESPONDER = IP_CT_DIR_REPLY,
};

/* Whose packet is it: the sender's end of one that leaves this host... */
static __always_inline enum copyxid_end
copyxid_end_out(enum ip_conntrack_info ctinfo)
{
	return CTINFO2DIR(ctinfo) == IP_CT_DIR_ORIGINAL ? COPYXID_ORIGINATOR :
							  COPYXID_RESPONDER;
}

/* ...and the receiver's end of one that arrives. */
static __always_inline enum copyxid_end
copyxid_end_in(enum ip_conntrack_info ctinfo)
{
	return CTINFO2DIR(ctinfo) == IP_CT_DIR_ORIGINAL ? COPYXID_RESPONDER :
							  COPYXID_ORIGINATOR;
}

static __always_inline unsigned int copyxid_shift(enum copyxid_end end)
{
	return end == COPYXID_ORIGINATOR ? COPYXID_ORIG_SHIFT :
					   COPYXID_REPL_SHIFT;
}

/* Loaded as the half that it is: no shift, no mask. */
static __always_inline u32 copyxid_half(const struct nf_conn *ct,
					enum copyxid_end end)
{
	const u16 *halves = (const u16 *)&ct->mark;

	BUILD_BUG_ON(COPYXID_ORIG_SHIFT != 0 || COPYXID_REPL_SHIFT != 16);
	if (IS_ENABLED(CONFIG_CPU_BIG_ENDIAN))
		end = !end;
	/* two loads at fixed places and a branch are shorter than one index */
	return end ? READ_ONCE(halves[1]) : READ_ONCE(halves[0]);
}

/*
 * What nf_conntrack_proto_tcp.c calls TCP_SYN_SET: the last packet of the
 * connection that it took, or let through without believing it, was a SYN.
 */
#define COPYXID_LAST_WAS_SYN	0

/*
 * Is a filled half believed on the way in, without asking for a socket? Not
 * with UDP, whose port can change hands while the connection lasts. An
 * established TCP connection's cannot; but the next one with the same
 * addresses and ports may be in its place, where connection tracking holds it
 * for closed, or has not heard of its end and sees a SYN. Nothing else has a
 * receiving socket that could be looked up.
 */
static __always_inline bool copyxid_half_answers(const struct nf_conn *ct)
{
	switch (nf_ct_protonum(ct)) {
	case IPPROTO_UDP:
		return false;
	case IPPROTO_TCP:
		return likely(READ_ONCE(ct->proto.tcp.state) ==
			      TCP_CONNTRACK_ESTABLISHED &&
			      READ_ONCE(ct->proto.tcp.last_index) !=
			      COPYXID_LAST_WAS_SYN);
	}
	return true;
}

/* -- containers ------------------------------------------------------------ */

/*
 * A slice with a network namespace of its own is known by the host end of its
 * veth: a tc program there (vnet/ext/bpf/veth.bpf.c) sets the mark of what it
 * sends, and tc_index, which nothing else writes, as the witness that the mark
 * is not another rule's. Returns its xid, or 0.
 */
static __always_inline u16 copyxid_container(const struct sk_buff *skb)
{
#ifdef CONFIG_NET_SCHED
	if (unlikely(skb->tc_index) && (u16)skb->mark == skb->tc_index)
		return skb->tc_index;
#endif
	return 0;
}

/* -- owner.c --------------------------------------------------------------- */

/* What a socket says about its owner, where that is not an xid. */
#define COPYXID_NOT_A_SOCKET	(-1)	/* TIME_WAIT, or the kernel's own */
#define COPYXID_OTHER_NETNS	(-2)

/* Is this a socket in the full sense, somebody's, and of this namespace? */
static __always_inline bool copyxid_sk_speaks(const struct sock *sk,
					      const struct net *net)
{
	/*
	 * The kernel's own sockets say nothing: those that answer for ICMP
	 * and for TCP without a connection carry the cgroup of whoever was
	 * current when the namespace was made. Kernel TCP sockets are another
	 * matter: they stand behind a user's socket (MPTCP subflows, which
	 * get its cgroup; SMC; TCP accepted from an MPTCP listener).
	 */
	return sk_fullsock(sk) && net_eq(sock_net(sk), net) &&
	       (likely(!sk->sk_kern_sock) || sk_is_tcp(sk));
}

static __always_inline const struct copyxid_slice *
copyxid_sk_slice(const struct sock *sk)
{
	/* sock_cgroup_ptr() would take the const away */
	return copyxid_cgroup_slice(sk->sk_cgrp_data.cgroup);
}

int copyxid_sk_owner(const struct sock *sk, const struct net *net);

/*
 * The socket at one end of a connection, or nobody's. put says whether it
 * has a reference to be dropped with sock_gen_put().
 */
struct copyxid_found {
	struct sock *sk;
	bool put;
};

struct copyxid_found copyxid_find(struct net *net, const struct nf_conn *ct,
				  enum copyxid_end end, int dif, int sdif);
struct copyxid_found copyxid_find_receiver(struct sk_buff *skb,
					   const struct nf_hook_state *state,
					   const struct nf_conn *ct,
					   enum ip_conntrack_info ctinfo,
					   bool opens);
bool copyxid_opens(const struct sk_buff *skb,
		   const struct nf_hook_state *state, const struct nf_conn *ct,
		   enum ip_conntrack_info ctinfo);

static inline void copyxid_found_put(struct copyxid_found found)
{
	if (found.put)
		sock_gen_put(found.sk);
}

/* -- record.c -------------------------------------------------------------- */

void copyxid_record_sender(const struct nf_hook_state *state,
			   struct nf_conn *ct, enum ip_conntrack_info ctinfo,
			   const struct sock *sk, u32 xid);
void copyxid_record_receiver(const struct net *net, struct nf_conn *ct,
			     enum copyxid_end end, u32 xid);
void copyxid_record_container(const struct net *net, struct nf_conn *ct,
			      enum ip_conntrack_info ctinfo, u32 xid);
void copyxid_disown(const struct net *net, struct nf_conn *ct,
		    enum copyxid_end end);

/* -- genl.c ---------------------------------------------------------------- */

int copyxid_genl_init(void);
void copyxid_genl_exit(void);

#endif /* COPYXID_INTERNAL_H */
