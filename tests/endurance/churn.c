// SPDX-License-Identifier: GPL-2.0
/*
 * churn - short flows, one after the other, as many as can be.
 *
 *   churn serve ADDRESS...
 *	answer TCP and UDP at ports 17000-17007 of these addresses (17008 is closed)
 *   churn make LOCAL REMOTE FIRST COUNT KINDS
 *	flows from LOCAL, ports FIRST.. (COUNT of them, by turns), to REMOTE.
 *	KINDS, one letter each, are taken by turns:
 *	  c	TCP, the client closes first
 *	  s	TCP, the server closes first
 *	  r	TCP, the client resets
 *	  x	TCP to the closed port: refused
 *	  u	UDP, connected
 *	  v	UDP, not connected
 *	Commands come on standard input, one a line: a number of flows, or "on"
 *	for flows until the next line. Each is answered by one line: how many of
 *	each kind were done, how many packets were sent again for want of an
 *	answer, how many ports were left out because somebody had them, and how
 *	many flows failed, with the errno of the last.
 *
 * Every flow has its own pair of ports, until all COUNT * 8 pairs have been
 * used: so the number of flows is the number of connections that connection
 * tracking sees.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define PORT	17000
#define PORTS	8
#define ANSWER	100		/* bytes */
#define WAIT_MS	20000		/* for one answer, of TCP: in all */
#define AGAIN_MS 2000		/* for UDP: then once more */
#define TRIES	5

#define DIE(what) do { perror(what); exit(1); } while (0)
#define MUST(e) ({ __typeof__(e) r_ = (e); if (r_ < 0) DIE(#e); r_; })

union address {
	struct sockaddr sa;
	struct sockaddr_in in;
	struct sockaddr_in6 in6;
};

static union address parse(const char *text)
{
	union address a = { };

	if (inet_pton(AF_INET, text, &a.in.sin_addr) == 1)
		a.sa.sa_family = AF_INET;
	else if (inet_pton(AF_INET6, text, &a.in6.sin6_addr) == 1)
		a.sa.sa_family = AF_INET6;
	else
		exit(fprintf(stderr, "no address: %s\n", text));
	return a;
}

static socklen_t length(const union address *a)
{
	return a->sa.sa_family == AF_INET ? sizeof(a->in) : sizeof(a->in6);
}

static const struct sockaddr *at(union address *a, unsigned int port)
{
	if (a->sa.sa_family == AF_INET)
		a->in.sin_port = htons(port);
	else
		a->in6.sin6_port = htons(port);
	return &a->sa;
}

static int fresh(const union address *a, int type)
{
	return MUST(socket(a->sa.sa_family, type | SOCK_CLOEXEC, 0));
}

/* -- server ---------------------------------------------------------------- */

enum role { LISTENS = 1, ACCEPTED, DATAGRAM };

static void watch(int epoll, int fd, enum role role)
{
	struct epoll_event event = { .events = EPOLLIN };

	event.data.u64 = (uint64_t)role << 32 | (uint32_t)fd;
	MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
}

/* A client's letter: 's' asks this side to close first. */
static void serve_accepted(int fd)
{
	static const char answer[ANSWER];
	char letter;

	if (recv(fd, &letter, 1, 0) == 1 &&
	    send(fd, answer, ANSWER, MSG_NOSIGNAL) == ANSWER && letter != 's')
		return;		/* the client closes, and this is called again */
	close(fd);
}

static void serve_datagram(int fd)
{
	char answer[ANSWER];
	union address from;
	socklen_t len = sizeof(from);

	if (recvfrom(fd, answer, 1, 0, &from.sa, &len) == 1)
		sendto(fd, answer, ANSWER, 0, &from.sa, len);
}

static void serve(char **addresses)
{
	int epoll = MUST(epoll_create1(0)), yes = 1;
	struct epoll_event events[64];

	for (; *addresses; addresses++) {
		union address a = parse(*addresses);

		for (unsigned int i = 0; i < PORTS; i++) {
			int tcp = fresh(&a, SOCK_STREAM);
			int udp = fresh(&a, SOCK_DGRAM);

			MUST(setsockopt(tcp, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes)));
			MUST(bind(tcp, at(&a, PORT + i), length(&a)));
			MUST(bind(udp, at(&a, PORT + i), length(&a)));
			MUST(listen(tcp, 512));
			watch(epoll, tcp, LISTENS);
			watch(epoll, udp, DATAGRAM);
		}
	}
	puts("ready");
	for (;;) {
		int n = epoll_wait(epoll, events, 64, -1);

		for (int i = 0; i < n; i++) {
			int fd = (uint32_t)events[i].data.u64, one;

			switch (events[i].data.u64 >> 32) {
			case LISTENS:
				one = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
				if (one >= 0)
					watch(epoll, one, ACCEPTED);
				break;
			case ACCEPTED:
				serve_accepted(fd);
				break;
			case DATAGRAM:
				serve_datagram(fd);
				break;
			}
		}
	}
}

/* -- client ---------------------------------------------------------------- */

static uint64_t done[256], again, busy, failed;
static int last_errno;

static bool answered(int fd, int ms)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };

	return poll(&p, 1, ms) == 1;
}

static int tcp_flow(int fd, union address *remote, unsigned int port, char kind)
{
	const struct timeval wait = { .tv_sec = WAIT_MS / 1000 };
	const struct linger reset = { .l_onoff = 1 };
	char letter = kind, answer[ANSWER];

	MUST(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof(wait)));
	MUST(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait)));
	if (kind == 'x')
		port = PORT + PORTS;
	if (connect(fd, at(remote, port), length(remote)))
		return kind == 'x' && errno == ECONNREFUSED ? 0 : errno;
	if (kind == 'x')
		return EISCONN;
	if (send(fd, &letter, 1, MSG_NOSIGNAL) != 1)
		return errno;
	if (recv(fd, answer, ANSWER, MSG_WAITALL) != ANSWER)
		return errno ? errno : ENODATA;
	if (kind == 's' && recv(fd, answer, 1, 0) != 0)
		return errno ? errno : EMSGSIZE;
	if (kind == 'r')
		MUST(setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)));
	return 0;
}

static int udp_flow(int fd, union address *remote, unsigned int port, char kind)
{
	char letter = kind, answer[ANSWER];
	const struct sockaddr *to = at(remote, port);

	if (kind == 'u' && connect(fd, to, length(remote)))
		return errno;
	for (int try = 0; try < TRIES; try++) {
		again += try > 0;
		if (kind == 'u' ? send(fd, &letter, 1, 0) != 1 :
				  sendto(fd, &letter, 1, 0, to, length(remote)) != 1)
			return errno;
		if (answered(fd, AGAIN_MS))
			return recv(fd, answer, ANSWER, 0) == ANSWER ? 0 : errno;
	}
	return ETIMEDOUT;
}

struct maker {
	union address local, remote;
	unsigned int first, count;
	const char *kinds;
};

static void one_flow(struct maker *m, uint64_t n)
{
	char kind = m->kinds[n % strlen(m->kinds)];
	/* every local port once, then with the next of the server's, and so on */
	unsigned int from = m->first + n % m->count;
	unsigned int to = PORT + n / m->count % PORTS;
	bool udp = kind == 'u' || kind == 'v';
	int fd = fresh(&m->local, udp ? SOCK_DGRAM : SOCK_STREAM), yes = 1, code;

	/* over what is left of an earlier flow with another peer */
	if (!udp)
		MUST(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes)));
	errno = 0;
	code = bind(fd, at(&m->local, from), length(&m->local)) ? errno :
	       udp ? udp_flow(fd, &m->remote, to, kind) :
		     tcp_flow(fd, &m->remote, to, kind);
	close(fd);
	if (!code) {
		done[(unsigned char)kind]++;
	} else if (code == EADDRINUSE || code == EADDRNOTAVAIL) {
		busy++;
	} else {
		failed++;
		last_errno = code;
	}
}

static void make(struct maker *m)
{
	static uint64_t n;
	char line[64];

	setvbuf(stdin, NULL, _IONBF, 0);
	puts("ready");
	while (fgets(line, sizeof(line), stdin)) {
		bool on = line[0] == 'o';
		uint64_t left = on ? 0 : strtoull(line, NULL, 10);

		memset(done, 0, sizeof(done));
		again = busy = failed = last_errno = 0;
		while (on ? !answered(0, 0) : left--)
			one_flow(m, n++);
		for (const char *kind = "csrxuv"; *kind; kind++)
			printf("%lu ", (unsigned long)done[(unsigned char)*kind]);
		printf("%lu %lu %lu %d\n", (unsigned long)again,
		       (unsigned long)busy, (unsigned long)failed, last_errno);
	}
}

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc > 2 && !strcmp(argv[1], "serve")) {
		serve(argv + 2);
	} else if (argc == 7 && !strcmp(argv[1], "make")) {
		struct maker m = {
			.local = parse(argv[2]), .remote = parse(argv[3]),
			.first = atoi(argv[4]), .count = atoi(argv[5]),
			.kinds = argv[6],
		};

		make(&m);
	} else {
		fprintf(stderr, "usage: churn serve ADDRESS... | make LOCAL REMOTE FIRST COUNT KINDS\n");
		return 2;
	}
	return 0;
}
