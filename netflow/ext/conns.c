// SPDX-License-Identifier: GPL-2.0-only
/*
 * conns.c - live connections: slabs, a hash that grows by one bucket at a
 * time, and the memory of the lately dead.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "conns.h"

/* -- slabs: elements by handle, in chunks that never move ---------------------- */

#define CHUNK_BITS 10
#define CHUNK (1u << CHUNK_BITS)

static void *slab_at(const struct slab *s, uint32_t handle)
{
	uint32_t i = handle - 1;

	return s->chunks[i >> CHUNK_BITS] + (i & (CHUNK - 1)) * s->size;
}

static int slab_grow(struct slab *s)
{
	char **chunks;
	uint32_t room;

	if (s->nchunks == UINT32_MAX / CHUNK)
		return -1;
	if (s->nchunks == s->room) {
		room = s->room ? s->room * 2 : 64;
		chunks = realloc(s->chunks, room * sizeof(*chunks));
		if (!chunks)
			return -1;
		s->chunks = chunks;
		s->room = room;
	}
	s->chunks[s->nchunks] = malloc(CHUNK * s->size);
	if (!s->chunks[s->nchunks])
		return -1;
	s->nchunks++;
	return 0;
}

static uint32_t slab_get(struct slab *s)
{
	uint32_t handle = s->free;

	if (handle) {
		memcpy(&s->free, slab_at(s, handle), sizeof(s->free));
	} else {
		if (s->top == s->nchunks * CHUNK && slab_grow(s))
			return 0;
		handle = ++s->top;
	}
	memset(slab_at(s, handle), 0, s->size);
	return handle;
}

static void slab_put(struct slab *s, uint32_t handle)
{
	memcpy(slab_at(s, handle), &s->free, sizeof(s->free));
	s->free = handle;
}

static void slab_exit(struct slab *s)
{
	while (s->nchunks)
		free(s->chunks[--s->nchunks]);
	free(s->chunks);
}

static size_t slab_memory(const struct slab *s)
{
	return s->room * sizeof(*s->chunks) + (size_t)s->nchunks * CHUNK * s->size;
}

/* -- SipHash-1-3 (Aumasson, Bernstein 2012), of whole words -------------------- */

#define ROTL(x, b) ((x) << (b) | (x) >> (64 - (b)))

static void sip_round(uint64_t v[4])
{
	v[0] += v[1];
	v[1] = ROTL(v[1], 13) ^ v[0];
	v[0] = ROTL(v[0], 32);
	v[2] += v[3];
	v[3] = ROTL(v[3], 16) ^ v[2];
	v[0] += v[3];
	v[3] = ROTL(v[3], 21) ^ v[0];
	v[2] += v[1];
	v[1] = ROTL(v[1], 17) ^ v[2];
	v[2] = ROTL(v[2], 32);
}

static uint64_t siphash(const uint64_t secret[2], const uint64_t *words,
			unsigned int n)
{
	uint64_t v[4] = {
		secret[0] ^ 0x736f6d6570736575ull, secret[1] ^ 0x646f72616e646f6dull,
		secret[0] ^ 0x6c7967656e657261ull, secret[1] ^ 0x7465646279746573ull,
	};
	uint64_t tail = (uint64_t)n << 59;	/* the length in bytes, modulo 256 */
	unsigned int i;

	for (i = 0; i <= n; i++) {
		uint64_t m = i < n ? words[i] : tail;

		v[3] ^= m;
		sip_round(v);
		v[0] ^= m;
	}
	v[2] ^= 0xff;
	sip_round(v);
	sip_round(v);
	sip_round(v);
	return v[0] ^ v[1] ^ v[2] ^ v[3];
}

uint64_t conns_hash(const struct conns *c, const struct conn_key *key)
{
	uint64_t words[sizeof(*key) / sizeof(uint64_t)];

	_Static_assert(sizeof(*key) == 40, "a key has no hole");
	memcpy(words, key, sizeof(words));
	return siphash(c->secret, words, sizeof(words) / sizeof(*words));
}

/* -- linear hashing: one bucket is split whenever one entry is added too many -- */

#define SEGMENT 4096u

static uint32_t *head(const struct conns *c, uint32_t hash)
{
	uint32_t b = hash & (2 * c->low - 1);

	if (b >= c->buckets)
		b = hash & (c->low - 1);
	return &c->heads[b / SEGMENT][b % SEGMENT];
}

/* Room for one more bucket, filled from the one it splits off from. */
static void split(struct conns *c)
{
	uint32_t from = c->buckets - c->low, fresh = c->buckets;
	uint32_t *old, *new, handle, next;
	struct conn *conn;

	if (fresh / SEGMENT == c->segments) {
		uint32_t **heads = realloc(c->heads, (c->segments + 1) * sizeof(*heads));

		if (!heads)
			return;		/* chains get longer, nothing else */
		c->heads = heads;
		heads[c->segments] = calloc(SEGMENT, sizeof(**heads));
		if (!heads[c->segments])
			return;
		c->segments++;
	}
	old = &c->heads[from / SEGMENT][from % SEGMENT];
	new = &c->heads[fresh / SEGMENT][fresh % SEGMENT];
	handle = *old;
	*old = 0;
	for (; handle; handle = next) {
		conn = slab_at(&c->conn, handle);
		next = conn->next;
		if (conn->hash & c->low) {
			conn->next = *new;
			*new = handle;
		} else {
			conn->next = *old;
			*old = handle;
		}
	}
	if (++c->buckets == 2 * c->low)
		c->low *= 2;
}

/*
 * First sight is later than the start, but for the time between a caller's
 * look at the clock and the event: it is given a second.
 */
#define SIGHT_SLACK 1000000000ull

/* May an entry be the connection that began at start? */
static int may_be(const struct conn *conn, uint64_t start)
{
	if (!start)
		return 1;
	if (conn->has_start)
		return conn->start == start;
	return start <= conn->start || start - conn->start < SIGHT_SLACK;
}

static int later_than(const struct conn *a, const struct conn *b)
{
	if (a->ghost != b->ghost)
		return b->ghost;
	return a->start > b->start;
}

struct conn *conns_find(const struct conns *c, const struct conn_key *key,
			uint64_t hash, uint32_t id, uint64_t start)
{
	uint32_t handle = *head(c, (uint32_t)hash);
	struct conn *conn, *best = NULL;

	for (; handle; handle = conn->next) {
		conn = slab_at(&c->conn, handle);
		if (conn->hash != (uint32_t)hash || conn->id != id ||
		    memcmp(&conn->key, key, sizeof(*key)) || !may_be(conn, start))
			continue;
		if (start && conn->has_start)
			return conn;
		if (!best || later_than(conn, best))
			best = conn;
	}
	return best;
}

struct conn *conns_insert(struct conns *c, const struct conn_key *key,
			  uint64_t hash, uint32_t id)
{
	uint32_t handle = slab_get(&c->conn), *first;
	struct conn *conn;

	if (!handle)
		return NULL;
	conn = slab_at(&c->conn, handle);
	conn->key = *key;
	conn->hash = (uint32_t)hash;
	conn->id = id;
	first = head(c, conn->hash);
	conn->next = *first;
	*first = handle;
	if (++c->count > c->buckets && c->buckets < 1u << 31)
		split(c);
	return conn;
}

static void drop_extras(struct conns *c, struct conn *conn)
{
	if (conn->share)
		slab_put(&c->share, conn->share);
	if (conn->nat)
		slab_put(&c->nat, conn->nat);
	conn->share = conn->nat = 0;
}

void conns_remove(struct conns *c, struct conn *conn)
{
	uint32_t *link = head(c, conn->hash), handle;

	while (slab_at(&c->conn, *link) != conn)
		link = &((struct conn *)slab_at(&c->conn, *link))->next;
	handle = *link;
	*link = conn->next;
	drop_extras(c, conn);
	conn->shown = 0;
	slab_put(&c->conn, handle);
	c->count--;
}

void conns_reset(struct conns *c, struct conn *conn)
{
	struct conn fresh = {
		.key = conn->key, .next = conn->next,
		.hash = conn->hash, .id = conn->id,
	};

	drop_extras(c, conn);
	*conn = fresh;
}

struct conn *conns_at(const struct conns *c, uint32_t handle)
{
	struct conn *conn = slab_at(&c->conn, handle);

	return conn->shown ? conn : NULL;
}

/* -- what only some connections have --------------------------------------------- */

struct conn_share *conns_share(const struct conns *c, const struct conn *conn)
{
	return conn->share ? slab_at(&c->share, conn->share) : NULL;
}

struct conn_share *conns_share_add(struct conns *c, struct conn *conn)
{
	if (!conn->share)
		conn->share = slab_get(&c->share);
	return conns_share(c, conn);
}

struct conn_nat *conns_nat(const struct conns *c, const struct conn *conn)
{
	return conn->nat ? slab_at(&c->nat, conn->nat) : NULL;
}

struct conn_nat *conns_nat_add(struct conns *c, struct conn *conn)
{
	if (!conn->nat)
		conn->nat = slab_get(&c->nat);
	return conns_nat(c, conn);
}

/* -- the lately dead --------------------------------------------------------------- */

static uint64_t epitaph(const struct conns *c, uint64_t hash, uint32_t id,
			uint64_t start)
{
	uint64_t words[3] = { hash, id, start }, fp = siphash(c->secret, words, 3);

	return fp ? fp : 1;
}

static uint64_t *grave(const struct conns *c, uint64_t fp)
{
	return c->dead + (fp >> 32) % DEAD_BUCKETS * DEAD_WAYS;
}

int conns_buried(const struct conns *c, uint64_t hash, uint32_t id,
		 uint64_t start)
{
	uint64_t fp = epitaph(c, hash, id, start);
	const uint64_t *g = grave(c, fp);
	unsigned int i;

	for (i = 0; i < DEAD_WAYS; i++)
		if (g[i] == fp)
			return 1;
	return 0;
}

void conns_bury(struct conns *c, uint64_t hash, uint32_t id, uint64_t start)
{
	uint64_t fp = epitaph(c, hash, id, start);
	uint64_t *g = grave(c, fp);

	memmove(g + 1, g, (DEAD_WAYS - 1) * sizeof(*g));
	g[0] = fp;
}

/* -- birth and death of the whole --------------------------------------------------- */

/* Early boot may have no entropy yet and a collector must not wait for it. */
static void draw_secret(uint64_t secret[2])
{
	struct timespec ts;

	if (getrandom(secret, 16, GRND_NONBLOCK) == 16)
		return;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	secret[0] = (uint64_t)ts.tv_nsec << 32 ^ (uintptr_t)secret;
	secret[1] = (uint64_t)ts.tv_sec ^ (uintptr_t)&draw_secret << 16;
}

int conns_init(struct conns *c)
{
	memset(c, 0, sizeof(*c));
	c->conn.size = sizeof(struct conn);
	c->share.size = sizeof(struct conn_share);
	c->nat.size = sizeof(struct conn_nat);
	c->buckets = c->low = SEGMENT;
	draw_secret(c->secret);
	c->dead = calloc(DEAD_BUCKETS * DEAD_WAYS, sizeof(*c->dead));
	c->heads = malloc(sizeof(*c->heads));
	if (c->heads)
		c->heads[0] = calloc(SEGMENT, sizeof(**c->heads));
	c->segments = c->heads && c->heads[0];
	if (!c->segments || !c->dead) {
		conns_exit(c);
		return -1;
	}
	return 0;
}

void conns_exit(struct conns *c)
{
	while (c->segments)
		free(c->heads[--c->segments]);
	free(c->heads);
	free(c->dead);
	slab_exit(&c->conn);
	slab_exit(&c->share);
	slab_exit(&c->nat);
}

size_t conns_memory(const struct conns *c)
{
	return sizeof(*c) + c->segments * (SEGMENT * sizeof(**c->heads) + sizeof(*c->heads)) +
	       DEAD_BUCKETS * DEAD_WAYS * sizeof(*c->dead) +
	       slab_memory(&c->conn) + slab_memory(&c->share) + slab_memory(&c->nat);
}
