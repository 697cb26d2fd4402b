/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * check.h - what must hold of the table whatever it is told.
 */
#ifndef FUZZ_CHECK_H
#define FUZZ_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "ct.h"

/* Not assert(): it must hold in every build, and say what did not. */
#define CHECK(cond)							\
	do {								\
		if (!(cond)) {						\
			fprintf(stderr, "%s:%d: not so: %s\n",		\
				__FILE__, __LINE__, #cond);		\
			abort();					\
		}							\
	} while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Times in order, a known reason, nothing beyond the columns. */
void check_flows(const struct flow_batch *out);

/*
 * A bound: what is recorded of a connection is never more than its counters
 * have grown. For each tuple, zone and id the growth told by the rows is added
 * up here, always on the generous side, and every record is taken off it.
 */
struct bound;

struct bound *bound_new(void);
void bound_free(struct bound *b);
void bound_row(struct bound *b, const struct ct_batch *in, uint32_t row);
void bound_sweep(struct bound *b);	/* what was lost may be counted anew */
void bound_flows(struct bound *b, const struct flow_batch *out);

#endif /* FUZZ_CHECK_H */
