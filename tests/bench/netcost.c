// SPDX-License-Identifier: GPL-2.0
/*
 * netcost - nanoseconds per packet in several network namespaces by turns.
 *
 * Each namespace has its own rules, and sockets that are made once. A round
 * measures each of them for a fraction of a millisecond, one after the other,
 * so that whatever else the machine does falls on all of them alike; the least
 * of many rounds is what a packet costs when nothing else does.
 *
 * Commands come on standard input, one a line; each is answered by one line:
 *
 *   open NAME udp|tcp NETNS ADDRESS CGROUP NETNS ADDRESS CGROUP
 *	a connected pair: where the sender is, where the receiver. A NETNS is
 *	in /run/netns, a CGROUP is a directory. Answer: "ok"
 *   round BATCHES NAME ...
 *	the least batch of each, in ns per packet (TCP: per request and
 *	response). Answer: the numbers
 *   flood MILLISECONDS NAME ...
 *	as much as goes through the pairs of each name (several may have one):
 *	UDP packets a second of the sender's processor time, TCP bytes a
 *	second of both ends'. Answer: the numbers
 *
 * On loopback and through a veth pair a packet is received inside the sender's
 * call, so its whole way is within the time that is taken.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define PAYLOAD	64
#define BATCH	64	/* packets between two looks at the clock */
#define PAIRS	256

struct end {
	char netns[64], address[16], cgroup[256];
};

struct pair {
	char name[64];
	int tx, rx, turns;	/* turns: rx answers, too */
};

static struct pair pairs[PAIRS];
static int count;
static char payload[PAYLOAD];

#define DIE(what) do { perror(what); exit(1); } while (0)
#define MUST(e) ({ __typeof__(e) r_ = (e); if (r_ < 0) DIE(#e); r_; })

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void enter_netns(const char *name)
{
	char path[256];
	int fd;

	snprintf(path, sizeof(path), "/run/netns/%s", name);
	fd = MUST(open(path, O_RDONLY | O_CLOEXEC));
	MUST(setns(fd, CLONE_NEWNET));
	close(fd);
}

/* A socket belongs to the cgroup its maker is in when it makes it. */
static void enter_cgroup(const char *directory)
{
	char path[512];
	int fd;

	snprintf(path, sizeof(path), "%s/cgroup.procs", directory);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, "0", 1) != 1)
		DIE(path);
	close(fd);
}

static struct sockaddr_in name_of(int fd)
{
	struct sockaddr_in a;
	socklen_t len = sizeof(a);

	MUST(getsockname(fd, (void *)&a, &len));
	return a;
}

static int bound(int type, const struct end *at)
{
	struct sockaddr_in a = { .sin_family = AF_INET };
	int fd;

	enter_netns(at->netns);
	enter_cgroup(at->cgroup);
	fd = MUST(socket(AF_INET, type | SOCK_CLOEXEC, 0));
	inet_pton(AF_INET, at->address, &a.sin_addr);
	MUST(bind(fd, (void *)&a, sizeof(a)));
	return fd;
}

static void join(int fd, int other)
{
	struct sockaddr_in to = name_of(other);

	MUST(connect(fd, (void *)&to, sizeof(to)));
}

/* Small messages are sent at once, and nobody waits for ever. */
static void settle(int fd, int turns)
{
	struct timeval second = { .tv_sec = 1 };
	int one = 1;

	MUST(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &second, sizeof(second)));
	if (turns)
		MUST(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)));
}

static int open_pair(const char *line)
{
	struct pair *p = &pairs[count];
	struct end from, to;
	char kind[8];
	int listener;

	if (count == PAIRS ||
	    sscanf(line, "open %63s %7s %63s %15s %255s %63s %15s %255s", p->name,
		   kind, from.netns, from.address, from.cgroup, to.netns,
		   to.address, to.cgroup) != 8)
		return -1;
	p->turns = !strcmp(kind, "tcp");
	if (p->turns) {
		listener = bound(SOCK_STREAM, &to);
		MUST(listen(listener, 1));
		p->tx = bound(SOCK_STREAM, &from);
		join(p->tx, listener);
		p->rx = MUST(accept4(listener, NULL, NULL, SOCK_CLOEXEC));
		close(listener);
	} else {
		p->rx = bound(SOCK_DGRAM, &to);
		p->tx = bound(SOCK_DGRAM, &from);
		join(p->tx, p->rx);
		join(p->rx, p->tx);
	}
	settle(p->tx, p->turns);
	settle(p->rx, p->turns);
	count++;
	return 0;
}

static void pass(const struct pair *p, int from, int to)
{
	char buf[PAYLOAD];

	/* refused by a rule, or a second has gone by: settle() */
	if (send(from, payload, PAYLOAD, 0) != PAYLOAD ||
	    recv(to, buf, PAYLOAD, 0) != PAYLOAD)
		DIE(p->name);
}

static uint64_t batch(const struct pair *p)
{
	uint64_t start = now();

	for (int i = 0; i < BATCH; i++) {
		pass(p, p->tx, p->rx);
		if (p->turns)
			pass(p, p->rx, p->tx);
	}
	return now() - start;
}

static double least(const struct pair *p, int batches)
{
	uint64_t best = UINT64_MAX, took;

	batch(p);		/* caches and branches have forgotten this one */
	for (int i = 0; i < batches; i++) {
		took = batch(p);
		if (took < best)
			best = took;
	}
	return (double)best / BATCH;
}

static int do_round(char *line)
{
	char *name, *rest = line + strlen("round ");
	int batches = atoi(strsep(&rest, " "));

	while ((name = strsep(&rest, " "))) {
		const struct pair *p = NULL;

		for (int i = 0; i < count; i++)
			if (!strcmp(pairs[i].name, name))
				p = &pairs[i];
		if (!p)
			return -1;
		printf("%.2f ", least(p, batches));
	}
	printf("\n");
	return 0;
}

/* The processor's time: what else runs on this machine does not count. */
static uint64_t used(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Only the sending is timed: a receiver has a processor of its own. */
static uint64_t flood_udp(const struct pair *p, double *sent)
{
	static struct iovec iov = { payload, PAYLOAD };
	static struct mmsghdr m[BATCH];
	char buf[PAYLOAD];
	uint64_t start, took;
	int n;

	for (int i = 0; i < BATCH; i++)
		m[i].msg_hdr = (struct msghdr){ .msg_iov = &iov, .msg_iovlen = 1 };
	start = used();
	n = sendmmsg(p->tx, m, BATCH, 0);
	took = used() - start;
	for (int i = 0; i < BATCH; i++)
		if (n != BATCH || recv(p->rx, buf, PAYLOAD, 0) != PAYLOAD)
			DIE(p->name);
	*sent += n;
	return took;
}

/* Fill the connection, then empty it. */
static uint64_t flood_tcp(const struct pair *p, double *received)
{
	static char chunk[1 << 16];
	uint64_t start = used();
	ssize_t n;

	while (send(p->tx, chunk, sizeof(chunk), MSG_DONTWAIT) > 0)
		;
	while ((n = recv(p->rx, chunk, sizeof(chunk), MSG_DONTWAIT)) > 0)
		*received += n;
	return used() - start;
}

static int do_flood(char *line)
{
	char *name, *rest = line + strlen("flood ");
	uint64_t enough = strtoul(strsep(&rest, " "), NULL, 10) * 1000000u;

	while ((name = strsep(&rest, " "))) {
		uint64_t took = 0;
		double sum = 0;

		while (took < enough) {
			uint64_t before = took;

			for (int i = 0; i < count; i++)
				if (!strcmp(pairs[i].name, name))
					took += pairs[i].turns ? flood_tcp(&pairs[i], &sum)
							       : flood_udp(&pairs[i], &sum);
			if (took == before)
				return -1;
		}
		if (!sum)
			DIE(name);
		printf("%.0f ", sum * 1e9 / took);
	}
	printf("\n");
	return 0;
}

int main(void)
{
	char *line = NULL;
	size_t room = 0;
	ssize_t len;

	memset(payload, 'x', PAYLOAD);
	while ((len = getline(&line, &room, stdin)) > 0) {
		line[strcspn(line, "\n")] = '\0';
		if (!strncmp(line, "open ", 5)) {
			if (open_pair(line))
				return 2;
			printf("ok\n");
		} else if (!strncmp(line, "flood ", 6) ? do_flood(line)
			   : strncmp(line, "round ", 6) || do_round(line)) {
			fprintf(stderr, "netcost: %s?\n", line);
			return 2;
		}
		fflush(stdout);
	}
	return 0;
}
