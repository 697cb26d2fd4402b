// SPDX-License-Identifier: GPL-2.0-only
/*
 * replay.c - run a fuzz target without the fuzzer: every file named, and then
 * mutations of each: replay MUTATIONS FILE...
 *
 * For machines and builds without libFuzzer, and short enough for every test
 * run. The mutations are the same each time.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

#define SIZE_MAX_INPUT 65536

static uint64_t state = 0x9e3779b97f4a7c15ull;

static uint64_t draw(uint64_t below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return below ? state % below : 0;
}

/* In memory that ends where the input ends, so that a byte more is seen. */
static void run(const uint8_t *data, size_t size)
{
	uint8_t *copy = malloc(size ? size : 1);

	CHECK(copy);
	memcpy(copy, data, size);
	LLVMFuzzerTestOneInput(copy, size);
	free(copy);
}

static size_t mutate(uint8_t *data, size_t size)
{
	size_t from, to, n, times = 1 + draw(4);

	while (times--) {
		from = draw(size);
		to = draw(size);
		n = draw(size - (from > to ? from : to));
		switch (draw(5)) {
		case 0:
			data[from] = (uint8_t)draw(256);
			break;
		case 1:
			data[from] ^= (uint8_t)(1u << draw(8));
			break;
		case 2:		/* a piece of it elsewhere */
			memmove(data + to, data + from, n);
			break;
		case 3:
			data[from] = draw(2) ? 0 : 0xff;
			break;
		case 4:		/* often cut in the middle of something */
			size = size > 8 ? size - draw(8) : size;
			break;
		}
	}
	return size;
}

int main(int argc, char **argv)
{
	static uint8_t original[SIZE_MAX_INPUT], changed[SIZE_MAX_INPUT];
	long mutations = argc > 1 ? atol(argv[1]) : 0, m;
	size_t size;
	FILE *f;
	int i;

	run(original, 0);
	for (i = 2; i < argc; i++) {
		f = fopen(argv[i], "rb");
		CHECK(f);
		size = fread(original, 1, sizeof(original), f);
		fclose(f);
		run(original, size);
		for (m = 0; size && m < mutations; m++) {
			memcpy(changed, original, size);
			run(changed, mutate(changed, size));
		}
	}
	printf("%d inputs, %ld mutations each\n", argc - 2, mutations);
	return 0;
}
