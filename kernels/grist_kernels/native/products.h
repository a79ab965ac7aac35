/* Products of a few rows of activations and a weight, each weight read once for up to MOST_ROWS of them. All float32. */
#pragma once

#include "weights.h"

#define MOST_ROWS 8
#define MOST_ADDED 4

/* Pointers to the rows of activations and of results. */
typedef struct {
    int rows;
    const float *x[MOST_ROWS];
    float *out[MOST_ROWS];
} Rows;

/* out[m][row] = sum over columns of W[row][column] x[m][column], for the rows from first to last. */
void dot_rows(Weight w, const Rows *rows, int64_t columns, int64_t first, int64_t last);

/* out[m][column] += sum over rows of x[m][row] W[row][column], for the columns from first to last; up to MOST_ADDED rows. */
void add_rows(Weight w, const Rows *rows, int64_t n_rows, int64_t first, int64_t last);
