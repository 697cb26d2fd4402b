// SPDX-License-Identifier: GPL-2.0-only
/*
 * What works on every kernel from 6.1 on: marks of sockets, and the guard
 *
 * Three kinds of programs. Those of cgroup hooks are attached at the root of
 * the cgroup v2 hierarchy, so that nothing on the host goes round them. Those
 * of section "socket" are matches of iptables (-m bpf --object-pinned): they
 * see a packet at the hook of the rule that names them, and answer 1 for
 * "refuse it" or "yes".
 */
#include "policy.h"
#include "events.h"
#include "mark.h"
#include "bind.h"
#include "gate.h"
#include "spoof.h"
#include "join.h"
#include "ingress.h"
#include "path.h"

char LICENSE[] SEC("license") = "GPL";
