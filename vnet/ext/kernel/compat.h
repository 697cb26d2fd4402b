/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Every difference between kernel versions, and nothing else.
 *
 * Force-included before every source file (see Kbuild); no other file here
 * asks for a kernel version. Built and tested on 6.1 and 6.12.
 */
#ifndef COPYXID_COMPAT_H
#define COPYXID_COMPAT_H

#include <linux/version.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
/*
 * cgroup->ancestors[] (pointers instead of ids) is new in 6.1, as is
 * cgroup_get_from_id() that answers with an ERR_PTR and looks only below the
 * caller's cgroup namespace.
 */
#error "xt_copyxid needs Linux 6.1 or newer"
#endif

/*
 * A namespace may have a UDP hash table of its own since 6.2
 * (net.ipv4.udp_child_hash_entries).
 */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 2, 0)
#define copyxid_udp_table(net)	(&udp_table)
#else
#define copyxid_udp_table(net)	((net)->ipv4.udp_table)
#endif

#endif /* COPYXID_COMPAT_H */
