// SPDX-License-Identifier: GPL-2.0-only
/*
 * ingest.c - what bench_ingest.py sends: many connections made of two recorded
 * ones. Built as a shared object and called through ctypes, in a process of
 * its own.
 *
 * Conntrack's recorded messages are copied and changed in place: addresses,
 * ports, id, counters and times, so that every connection is another one. The
 * same connections are written as NetFlow version 9 for nfcapd (RFC 3954).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { SRC, DST, SPORT, DPORT, RSRC, RDST, RSPORT, RDPORT, ID,
       OPACKETS, OBYTES, RPACKETS, RBYTES, START, STOP, FIELDS };

struct template {
	const uint8_t *bytes;
	uint32_t size;
	uint32_t at[FIELDS];	/* 0: not in this message */
};

struct flow {
	uint32_t src, dst, id;
	uint16_t sport, dport;
	uint64_t opackets, obytes, rpackets, rbytes, start, stop;
};

static uint64_t mix(uint64_t x)	/* splitmix64's */
{
	x += 0x9e3779b97f4a7c15ull;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

/* Connection number n: one node's, to 64 Ki peers, a few ports more often. */
static struct flow nth(uint64_t n, uint64_t now)
{
	static const uint16_t ports[] = { 443, 443, 443, 80, 53, 53, 22, 25 };
	uint64_t r = mix(n);
	struct flow f = {
		.src = 0x0a000001u + (uint32_t)(n / 50000 & 0xff),
		.dst = 0xc6120000u | (r & 0xffff),
		.id = (uint32_t)mix(n ^ 0x5555),
		.sport = (uint16_t)(10000 + n % 50000),
		.dport = ports[r >> 16 & 7],
		.opackets = 1 + (r >> 20 & 31), .rpackets = r >> 28 & 31,
		.stop = now,
	};

	f.obytes = f.opackets * (60 + (r >> 36 & 1023));
	f.rbytes = f.rpackets * (60 + (r >> 46 & 1023));
	f.start = now - 1000000 - (r >> 40);
	return f;
}

static uint64_t clock_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

static void put16(uint8_t *m, uint32_t at, uint16_t v)
{
	v = htobe16(v);
	if (at)
		memcpy(m + at, &v, sizeof(v));
}

static void put32(uint8_t *m, uint32_t at, uint32_t v)
{
	v = htobe32(v);
	if (at)
		memcpy(m + at, &v, sizeof(v));
}

static void put64(uint8_t *m, uint32_t at, uint64_t v)
{
	v = htobe64(v);
	if (at)
		memcpy(m + at, &v, sizeof(v));
}

static void put_message(uint8_t *m, const struct template *t, const struct flow *f)
{
	memcpy(m, t->bytes, t->size);
	put32(m, t->at[SRC], f->src);
	put32(m, t->at[RDST], f->src);
	put32(m, t->at[DST], f->dst);
	put32(m, t->at[RSRC], f->dst);
	put16(m, t->at[SPORT], f->sport);
	put16(m, t->at[RDPORT], f->sport);
	put16(m, t->at[DPORT], f->dport);
	put16(m, t->at[RSPORT], f->dport);
	put32(m, t->at[ID], f->id);
	put64(m, t->at[OPACKETS], f->opackets);
	put64(m, t->at[OBYTES], f->obytes);
	put64(m, t->at[RPACKETS], f->rpackets);
	put64(m, t->at[RBYTES], f->rbytes);
	put64(m, t->at[START], f->start);
	put64(m, t->at[STOP], f->stop);
}

#define AT_ONCE 64
#define MESSAGE 512

static int send_all(int fd, struct mmsghdr *out, int count)
{
	int done = 0, sent;

	for (; done < count; done += sent) {
		sent = sendmmsg(fd, out + done, (unsigned int)(count - done), 0);
		if (sent < 0)
			return -1;
	}
	return 0;
}

/*
 * Send connections first..first+count-1, the beginning of each (if begin is
 * given) window connections before its end, one message a datagram as the
 * kernel does. What is begun is also ended. Returns 0 or an errno.
 */
int ingest_send(int fd, uint64_t first, uint64_t count, uint64_t window,
		const struct template *begin, const struct template *end)
{
	static uint8_t bytes[AT_ONCE][MESSAGE];
	static struct iovec iov[AT_ONCE];
	static struct mmsghdr out[AT_ONCE];
	/* the same for both messages of one; only the end is the clock's */
	uint64_t now = clock_ns(), epoch = now & ~0xffffffffull, n, i;
	const struct template *t;
	int used = 0;
	struct flow f;

	for (n = 0; n < 2 * (count + window); n++) {
		i = n / 2 - (n & 1 ? window : 0);
		t = n & 1 ? end : begin;
		if (!t || i >= count)
			continue;
		f = nth(first + i, epoch + i);
		if (n % 1024 == 1)
			now = clock_ns();
		f.stop = now;
		put_message(bytes[used], t, &f);
		iov[used] = (struct iovec){ bytes[used], t->size };
		out[used].msg_hdr = (struct msghdr){ .msg_iov = &iov[used], .msg_iovlen = 1 };
		if (++used < AT_ONCE)
			continue;
		if (send_all(fd, out, used))
			return errno;
		used = 0;
	}
	return send_all(fd, out, used) ? errno : 0;
}

/* -- NetFlow version 9 ----------------------------------------------------------- */

#define PER_PACKET 25

static const uint16_t fields[][2] = {	/* RFC 3954, 8: type and length */
	{ 8, 4 }, { 12, 4 }, { 7, 2 }, { 11, 2 }, { 4, 1 }, { 6, 1 }, { 2, 8 },
	{ 1, 8 }, { 24, 8 }, { 23, 8 }, { 22, 4 }, { 21, 4 },
};
#define NFIELDS (sizeof(fields) / sizeof(*fields))

struct writer {
	uint8_t *at;
};

static void w8(struct writer *w, uint8_t v)
{
	*w->at++ = v;
}

static void w16(struct writer *w, uint16_t v)
{
	v = htobe16(v);
	memcpy(w->at, &v, sizeof(v));
	w->at += sizeof(v);
}

static void w32(struct writer *w, uint32_t v)
{
	v = htobe32(v);
	memcpy(w->at, &v, sizeof(v));
	w->at += sizeof(v);
}

static void w64(struct writer *w, uint64_t v)
{
	v = htobe64(v);
	memcpy(w->at, &v, sizeof(v));
	w->at += sizeof(v);
}

static void w_record(struct writer *w, const struct flow *f, uint32_t uptime)
{
	w32(w, f->src);
	w32(w, f->dst);
	w16(w, f->sport);
	w16(w, f->dport);
	w8(w, 6);
	w8(w, 0x1b);
	w64(w, f->opackets);
	w64(w, f->obytes);
	w64(w, f->rpackets);
	w64(w, f->rbytes);
	w32(w, uptime - 1000);
	w32(w, uptime);
}

/*
 * Send the same connections as NetFlow 9, the template in each packet: at most
 * a few packets, so that the caller can look how full the receiver's buffer is.
 */
int ingest_netflow(int fd, uint64_t first, uint32_t count, uint32_t *seq)
{
	const uint32_t uptime = 3600000;
	uint8_t packet[2048], *length;
	uint64_t now = clock_ns();
	uint32_t n, i, here;
	uint16_t body;

	for (n = 0; n < count; n += here) {
		struct writer w = { packet };

		here = count - n < PER_PACKET ? count - n : PER_PACKET;
		w16(&w, 9);
		w16(&w, (uint16_t)(here + 1));
		w32(&w, uptime);
		w32(&w, (uint32_t)(now / 1000000000));
		w32(&w, (*seq)++);
		w32(&w, 1);
		w16(&w, 0);
		w16(&w, 8 + 4 * NFIELDS);
		w16(&w, 256);
		w16(&w, NFIELDS);
		for (i = 0; i < NFIELDS; i++) {
			w16(&w, fields[i][0]);
			w16(&w, fields[i][1]);
		}
		w16(&w, 256);
		length = w.at;
		w16(&w, 0);
		for (i = 0; i < here; i++) {
			struct flow f = nth(first + n + i, now);

			w_record(&w, &f, uptime);
		}
		while ((w.at - length + 2) % 4)
			w8(&w, 0);
		body = htobe16((uint16_t)(w.at - length + 2));
		memcpy(length, &body, sizeof(body));
		if (send(fd, packet, (size_t)(w.at - packet), 0) < 0)
			return errno;
	}
	return 0;
}
