// SPDX-License-Identifier: GPL-2.0
/*
 * pktcost - instructions per packet on a given path, for a guest under
 * QEMU's -icount shift=0.
 *
 * There the time stamp counter advances by exactly one per executed
 * instruction, so rdtsc before and after a batch of packets counts
 * instructions: the program's own (the same in every variant), the system
 * calls' and the whole way of the packet through the kernel, because a dummy
 * device, a veth pair and loopback finish a packet inside the sender's call.
 *
 * A timer tick or a kernel thread that falls into a batch makes that batch
 * dearer. Batches are short against the 4 ms tick, so the median of a round's
 * batches has none in it, while everything that a packet really costs has.
 *
 *   pktcost PATH [-r ROUNDS] [-n BATCHES] [-b PACKETS_PER_BATCH]
 *                [-t SENDER_CGROUP_DIR] [-u RECEIVER_CGROUP_DIR]
 *   pktcost mkdirs PARENT COUNT      make COUNT cgroups PARENT/s1..sCOUNT
 *
 * prints one JSON object: the median of every round (the first round, the
 * warm-up, is measured but not printed) per packet.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAYLOAD 64
#define MAX_BATCH 256

static const char *tx_cgroup, *rx_cgroup;
static int per_batch = 16;
static char payload[PAYLOAD];

#define DIE(what) do { perror(what); exit(1); } while (0)
#define MUST(e) ({ __typeof__(e) r_ = (e); if (r_ < 0) DIE(#e); r_; })

static inline uint64_t now(void)
{
	uint32_t lo, hi;

	__asm__ volatile("rdtsc" : "=a"(lo), "=d"(hi) :: "memory");
	return (uint64_t)hi << 32 | lo;
}

/*
 * The far end of the veth pair is in a network namespace without rules, so
 * that only one end's hooks are measured. A socket stays in its namespace.
 */
#define HERE "10.98.0.1"
#define THERE "10.98.0.2"

static void go(const char *netns)
{
	int fd = MUST(open(netns, O_RDONLY));

	MUST(setns(fd, CLONE_NEWNET));
	close(fd);
}

static void go_there(void)
{
	go("/run/netns/bench-peer");
}

static void go_home(void)
{
	go("/proc/1/ns/net");
}

/* A socket belongs to the cgroup its maker is in when it makes it. */
static void enter(const char *cgroup)
{
	char path[512];
	int fd;

	if (!cgroup)
		return;
	snprintf(path, sizeof(path), "%s/cgroup.procs", cgroup);
	fd = MUST(open(path, O_WRONLY));
	if (write(fd, "0", 1) != 1)
		DIE(path);
	close(fd);
}

static struct sockaddr_in addr(const char *ip, uint16_t port)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(port) };

	inet_pton(AF_INET, ip, &a.sin_addr);
	return a;
}

static int bound(int type, const char *ip, uint16_t port)
{
	struct sockaddr_in a = addr(ip, port);
	int one = 1, fd = MUST(socket(AF_INET, type, 0));

	MUST(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)));
	if (bind(fd, (struct sockaddr *)&a, sizeof(a)))
		DIE("bind");
	return fd;
}

static void join(int fd, const char *ip, uint16_t port)
{
	struct sockaddr_in a = addr(ip, port);

	if (connect(fd, (struct sockaddr *)&a, sizeof(a)))
		DIE("connect");
}

static void take(int fd)
{
	char buf[PAYLOAD];

	if (recv(fd, buf, sizeof(buf), MSG_DONTWAIT) != PAYLOAD)
		DIE("a packet did not arrive: recv");
}

static void give(int fd)
{
	if (send(fd, payload, PAYLOAD, 0) != PAYLOAD)
		DIE("send");
}

static void give_to(int fd, const struct sockaddr_in *to)
{
	if (sendto(fd, payload, PAYLOAD, 0, (void *)to, sizeof(*to)) != PAYLOAD)
		DIE("sendto");
}

/* -- the paths: set up once, then one batch at a time --------------------- */

static int tx, rx;
static uint16_t next_port = 1;

/* A connected UDP socket sends into a dummy device: egress alone. */
static void udp_out_open(void)
{
	enter(tx_cgroup);
	tx = bound(SOCK_DGRAM, "10.99.0.1", 40000);
	join(tx, "10.99.0.2", 9);
}

static uint64_t udp_out(void)
{
	uint64_t t = now();

	for (int i = 0; i < per_batch; i++)
		give(tx);
	return now() - t;
}

/* The same, each packet to a port never used before: a new connection each. */
static void udp_out_new_open(void)
{
	enter(tx_cgroup);
	tx = bound(SOCK_DGRAM, "10.99.0.1", 40001);
}

static uint64_t udp_out_new(void)
{
	struct sockaddr_in to = addr("10.99.0.2", 0);
	uint64_t t = now();

	for (int i = 0; i < per_batch; i++) {
		to.sin_port = htons(next_port++);
		give_to(tx, &to);
	}
	return now() - t;
}

/* From the veth's far end to a connected UDP socket: early demux finds it. */
static void udp_in_open(void)
{
	enter(rx_cgroup);
	rx = bound(SOCK_DGRAM, HERE, 41000);
	join(rx, THERE, 41001);
	go_there();
	tx = bound(SOCK_DGRAM, THERE, 41001);
	join(tx, HERE, 41000);
}

static uint64_t udp_in(void)
{
	uint64_t t = now();

	for (int i = 0; i < per_batch; i++) {
		give(tx);
		take(rx);
	}
	return now() - t;
}

/* To a socket that only receives: bound, never connected. */
static void udp_in_wild_open(void)
{
	enter(rx_cgroup);
	rx = bound(SOCK_DGRAM, "0.0.0.0", 41002);
	go_there();
	tx = bound(SOCK_DGRAM, THERE, 41003);
	join(tx, HERE, 41002);
}

/* To the receive-only socket from a new source address each: first packets. */
static void udp_in_wild_new_open(void)
{
	enter(rx_cgroup);
	rx = bound(SOCK_DGRAM, "0.0.0.0", 41004);
	go_there();
	tx = bound(SOCK_DGRAM, "0.0.0.0", 41005);
}

static uint64_t udp_in_wild_new(void)
{
	static uint32_t source = 0x0a610001; /* 10.97.0.1 and on */
	struct sockaddr_in to = addr(HERE, 41004);
	struct iovec iov = { payload, PAYLOAD };
	union {
		char room[CMSG_SPACE(sizeof(struct in_pktinfo))];
		struct cmsghdr align;
	} c = { 0 };
	struct msghdr m = {
		.msg_name = &to, .msg_namelen = sizeof(to),
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = &c, .msg_controllen = sizeof(c.room),
	};
	struct cmsghdr *h = CMSG_FIRSTHDR(&m);
	struct in_pktinfo *info = (void *)CMSG_DATA(h);
	uint64_t t;

	h->cmsg_level = IPPROTO_IP;
	h->cmsg_type = IP_PKTINFO;
	h->cmsg_len = CMSG_LEN(sizeof(*info));
	t = now();
	for (int i = 0; i < per_batch; i++) {
		info->ipi_spec_dst.s_addr = htonl(source++);
		if (sendmsg(tx, &m, 0) != PAYLOAD)
			DIE("sendmsg");
		take(rx);
	}
	return now() - t;
}

/* To connected sockets that have heard nothing yet: first packets. */
static int fresh[MAX_BATCH];

static void udp_in_new_open(void)
{
	go_there();
	tx = bound(SOCK_DGRAM, THERE, 500);
	go_home();
	enter(rx_cgroup);
	next_port = 1024;
}

static uint64_t udp_in_new(void)
{
	struct sockaddr_in to = addr(HERE, 0);
	uint16_t first = next_port;
	uint64_t t;

	for (int i = 0; i < per_batch; i++) {
		fresh[i] = bound(SOCK_DGRAM, HERE, next_port++);
		join(fresh[i], THERE, 500);
	}
	t = now();
	for (int i = 0; i < per_batch; i++) {
		to.sin_port = htons(first + i);
		give_to(tx, &to);
		take(fresh[i]);
	}
	t = now() - t;
	for (int i = 0; i < per_batch; i++)
		close(fresh[i]);
	return t;
}

/* One payload there and one back: each acknowledges the one before. */
static uint64_t turns(void)
{
	uint64_t t = now();

	for (int i = 0; i < per_batch; i++) {
		give(tx);
		take(rx);
		give(rx);
		take(tx);
	}
	return now() - t;
}

/* A buffer that grows by itself settles somewhere else in each connection. */
static int fixed_buffer(int fd)
{
	int one = 1, size = 1 << 16;

	MUST(setsockopt(fd, SOL_TCP, TCP_NODELAY, &one, sizeof(one)));
	MUST(setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size)));
	MUST(setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size)));
	return fd;
}

static int tcp_server(const char *ip, uint16_t port)
{
	int l;

	enter(rx_cgroup);
	l = fixed_buffer(bound(SOCK_STREAM, ip, port));
	MUST(listen(l, 8));
	return l;
}

/* An established TCP connection: a turn is one packet in and one out. */
static void tcp_in_open(void)
{
	int l = tcp_server(HERE, 41006);

	go_there();
	tx = fixed_buffer(bound(SOCK_STREAM, THERE, 41007));
	join(tx, HERE, 41006);
	rx = MUST(accept(l, NULL, NULL));
}

/* A TCP handshake, counted as one: SYN and ACK come in, SYN-ACK goes out. */
static int listener;

static void tcp_in_new_open(void)
{
	listener = tcp_server(HERE, 41008);
	go_there();
	next_port = 1024;
}

static uint64_t tcp_in_new(void)
{
	struct linger reset = { 1, 0 };
	uint64_t t, sum = 0;
	int a, b;

	for (int i = 0; i < per_batch; i++) {
		a = bound(SOCK_STREAM, THERE, next_port++);
		t = now();
		join(a, HERE, 41008);
		b = accept(listener, NULL, NULL);
		sum += now() - t;
		MUST(b);
		MUST(setsockopt(a, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)));
		close(a);
		close(b);
	}
	return sum;
}

/*
 * Between two slices of one host, over loopback. There early demux is not
 * tried: a looped packet keeps the route it was sent with.
 */
static void udp_lo_open(void)
{
	enter(rx_cgroup);
	rx = bound(SOCK_DGRAM, "127.0.0.1", 41000);
	join(rx, "127.0.0.1", 41001);
	enter(tx_cgroup);
	tx = bound(SOCK_DGRAM, "127.0.0.1", 41001);
	join(tx, "127.0.0.1", 41000);
}

static void tcp_lo_open(void)
{
	int l = tcp_server("127.0.0.1", 41006);

	enter(tx_cgroup);
	tx = fixed_buffer(bound(SOCK_STREAM, "127.0.0.1", 41007));
	join(tx, "127.0.0.1", 41006);
	rx = MUST(accept(l, NULL, NULL));
}

static const struct path {
	const char *name;
	void (*open)(void);
	uint64_t (*batch)(void);
} paths[] = {
	{ "udp-out", udp_out_open, udp_out },
	{ "udp-out-new", udp_out_new_open, udp_out_new },
	{ "udp-in", udp_in_open, udp_in },
	{ "udp-in-new", udp_in_new_open, udp_in_new },
	{ "udp-in-wild", udp_in_wild_open, udp_in },
	{ "udp-in-wild-new", udp_in_wild_new_open, udp_in_wild_new },
	{ "tcp-in", tcp_in_open, turns },
	{ "tcp-in-new", tcp_in_new_open, tcp_in_new },
	{ "udp-lo", udp_lo_open, udp_in },
	{ "tcp-lo", tcp_lo_open, turns },
};

static int by_size(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static int make_dirs(const char *parent, int count)
{
	char path[512];

	for (int i = 1; i <= count; i++) {
		snprintf(path, sizeof(path), "%s/s%d", parent, i);
		if (mkdir(path, 0755) && errno != EEXIST)
			DIE(path);
	}
	return 0;
}

int main(int argc, char **argv)
{
	int opt, rounds = 5, batches = 20;
	const struct path *p = NULL;
	uint64_t *sample;

	if (argc == 4 && !strcmp(argv[1], "mkdirs"))
		return make_dirs(argv[2], atoi(argv[3]));
	while ((opt = getopt(argc, argv, "r:n:b:t:u:")) != -1) {
		switch (opt) {
		case 'r': rounds = atoi(optarg); break;
		case 'n': batches = atoi(optarg); break;
		case 'b': per_batch = atoi(optarg); break;
		case 't': tx_cgroup = optarg; break;
		case 'u': rx_cgroup = optarg; break;
		default: return 2;
		}
	}
	for (size_t i = 0; optind < argc && i < sizeof(paths) / sizeof(*paths); i++)
		if (!strcmp(argv[optind], paths[i].name))
			p = &paths[i];
	if (!p || rounds < 1 || batches < 1 || per_batch < 2 || per_batch > MAX_BATCH) {
		fprintf(stderr, "usage: pktcost PATH [-r -n -b -t -u]\n");
		return 2;
	}
	sample = calloc(batches, sizeof(*sample));
	memset(payload, 'x', sizeof(payload));
	p->open();
	printf("{\"path\": \"%s\", \"rounds\": [", p->name);
	for (int r = 0; r <= rounds; r++) {
		for (int i = 0; i < batches; i++)
			sample[i] = p->batch();
		qsort(sample, batches, sizeof(*sample), by_size);
		if (r)
			printf("%s%.3f", r > 1 ? ", " : "",
			       (double)sample[batches / 2] / per_batch);
	}
	printf("], \"least\": %.3f}\n", (double)sample[0] / per_batch);
	return 0;
}
