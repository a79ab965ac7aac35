/* Arrays have sizes that C calls constant, and the loops over them are unrolled: that is what keeps them in registers. */
#include "products.h"

#include "packed.h"

#define AHEAD 8192 /* bytes: the hardware looks no further than a page */
#define UNROLL _Pragma("GCC unroll 8")

/* A row of the weight: PARTS sums of every PARTS-th step, so that an addition need not wait for the one before. */
ALWAYS_INLINE void dots(
    Load *load_weights, LoadFirst *load_last, const int M, const int PARTS, Weight w, const Rows *rows, int64_t columns, int64_t row
) {
    const int64_t whole = columns / LANES * LANES, bytes = w.kind == FLOAT32 ? sizeof(float) : sizeof(uint16_t);
    const char *const ahead = (const char *)w.data + row * w.stride * bytes + AHEAD;
    floats total[4][MOST_ROWS];
    UNROLL for (int p = 0; p < PARTS; p++)
        UNROLL for (int m = 0; m < M; m++) total[p][m] = (floats){0};
    int64_t i = 0;
    for (; i + PARTS * LANES <= whole; i += PARTS * LANES)
        UNROLL for (int p = 0; p < PARTS; p++) {
            __builtin_prefetch(ahead + (i + p * LANES) * bytes);
            const floats weights = load_weights(w, row, i + p * LANES);
            UNROLL for (int m = 0; m < M; m++) total[p][m] += weights * load(rows->x[m] + i + p * LANES);
        }
    for (; i < whole; i += LANES) {
        const floats weights = load_weights(w, row, i);
        UNROLL for (int m = 0; m < M; m++) total[0][m] += weights * load(rows->x[m] + i);
    }
    if (whole < columns) {
        const floats weights = load_last(w, row, whole, columns - whole);
        UNROLL for (int m = 0; m < M; m++) total[0][m] += weights * load_first(rows->x[m] + whole, columns - whole);
    }
    UNROLL for (int p = 1; p < PARTS; p++)
        UNROLL for (int m = 0; m < M; m++) total[0][m] += total[p][m];
    UNROLL for (int m = 0; m < M; m++) rows->out[m][row] = sum(total[0][m]);
}

ALWAYS_INLINE void dots_between(
    Load *load_weights, LoadFirst *load_last, const int M, Weight w, const Rows *rows, int64_t columns, int64_t first, int64_t last
) {
    const int PARTS = M <= 2 ? 4 : M <= 4 ? 2 : 1;
    for (int64_t row = first; row < last; row++) dots(load_weights, load_last, M, PARTS, w, rows, columns, row);
}

/* 3 rows are 2 and 1: the weights come from the cache the second time, and the compiler has half as much to do. */
#define DOT_ROWS(KIND)                                                                                                     \
    static void dot_rows_##KIND(Weight w, const Rows *rows, int64_t columns, int64_t first, int64_t last) {                \
        switch (rows->rows) {                                                                                              \
            case 1: dots_between(load_##KIND, load_first_##KIND, 1, w, rows, columns, first, last); break;                 \
            case 2: dots_between(load_##KIND, load_first_##KIND, 2, w, rows, columns, first, last); break;                 \
            case 4: dots_between(load_##KIND, load_first_##KIND, 4, w, rows, columns, first, last); break;                 \
            case 8: dots_between(load_##KIND, load_first_##KIND, 8, w, rows, columns, first, last); break;                 \
        }                                                                                                                  \
    }
WEIGHT_KINDS(DOT_ROWS)

void dot_rows(Weight w, const Rows *rows, int64_t columns, int64_t first, int64_t last) {
    for (int done = 0; done < rows->rows;) {
        const int left = rows->rows - done;
        Rows some = {.rows = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1};
        for (int m = 0; m < some.rows; m++) {
            some.x[m] = rows->x[done + m];
            some.out[m] = rows->out[done + m];
        }
#define CASE(KIND) case KIND: dot_rows_##KIND(w, &some, columns, first, last); break;
        switch (w.kind) {
            WEIGHT_KINDS(CASE)
            default: dot_packed_rows(w, &some, columns, first, last);
        }
#undef CASE
        done += some.rows;
    }
}

/* R rows of the weight at once: each load and store of a sum serves R multiplications. */
ALWAYS_INLINE void additions(
    Load *load_weights, LoadFirst *load_last, const int M, const int R, Weight w, const Rows *rows, int64_t row, int64_t first,
    int64_t last
) {
    const int64_t whole = first + (last - first) / LANES * LANES;
    for (int64_t i = first; i < whole; i += LANES) {
        floats total[MOST_ADDED];
        UNROLL for (int m = 0; m < M; m++) total[m] = load(rows->out[m] + i);
        UNROLL for (int r = 0; r < R; r++) {
            const floats weights = load_weights(w, row + r, i);
            UNROLL for (int m = 0; m < M; m++) total[m] += weights * rows->x[m][row + r];
        }
        UNROLL for (int m = 0; m < M; m++) store(rows->out[m] + i, total[m]);
    }
    for (int r = 0; r < R && whole < last; r++) {
        const floats weights = load_last(w, row + r, whole, last - whole);
        for (int m = 0; m < M; m++)
            for (int64_t i = whole; i < last; i++) rows->out[m][i] += weights[i - whole] * rows->x[m][row + r];
    }
}

ALWAYS_INLINE void additions_of(
    Load *load_weights, LoadFirst *load_last, const int M, Weight w, const Rows *rows, int64_t n_rows, int64_t first, int64_t last
) {
    int64_t row = 0;
    for (; row + 8 <= n_rows; row += 8) additions(load_weights, load_last, M, 8, w, rows, row, first, last);
    for (; row < n_rows; row++) additions(load_weights, load_last, M, 1, w, rows, row, first, last);
}

#define ADD_ROWS(KIND)                                                                                                     \
    static void add_rows_##KIND(Weight w, const Rows *rows, int64_t n_rows, int64_t first, int64_t last) {                 \
        switch (rows->rows) {                                                                                              \
            case 1: additions_of(load_##KIND, load_first_##KIND, 1, w, rows, n_rows, first, last); break;                  \
            case 2: additions_of(load_##KIND, load_first_##KIND, 2, w, rows, n_rows, first, last); break;                  \
            case 3: additions_of(load_##KIND, load_first_##KIND, 3, w, rows, n_rows, first, last); break;                  \
            case 4: additions_of(load_##KIND, load_first_##KIND, 4, w, rows, n_rows, first, last); break;                  \
        }                                                                                                                  \
    }
WEIGHT_KINDS(ADD_ROWS)

void add_rows(Weight w, const Rows *rows, int64_t n_rows, int64_t first, int64_t last) {
#define CASE(KIND) case KIND: add_rows_##KIND(w, rows, n_rows, first, last); break;
    switch (w.kind) { WEIGHT_KINDS(CASE) }
#undef CASE
}
