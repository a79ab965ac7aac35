/* Weights in few bits: codes, and a number that a group of neighbouring codes of a row is multiplied by.

   A sum over a group is multiplied once, so that a code costs its decoding and one multiplication by an activation. */
#pragma once

#include "products.h"

/* dot_rows for codes, of 1, 2, 4 or 8 rows of activations. */
void dot_packed_rows(Weight w, const Rows *rows, int64_t columns, int64_t first, int64_t last);

/* out[m][row] += sum over columns of W[row][column] x[m][column]; up to MOST_ADDED rows of activations. */
void add_outputs(Weight w, const Rows *rows, int64_t columns, int64_t first, int64_t last);

/* The matrix that begins `rows` rows further down, of whatever kind. columns: of a row. */
Weight rows_further(Weight w, int64_t rows, int64_t columns);
