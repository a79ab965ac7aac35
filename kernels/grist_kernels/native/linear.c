#include "linear.h"

#include <stdlib.h>

/* Rows of the weight that a thread takes at a time: fewer would be handed out more often than they are worth. */
#define ROWS_AT_A_TIME 64
#define ALONE 32768 /* weights that one thread has read before a second one has woken up */

static void part(const Linear *layer, const float *x, int64_t rows, float *out, int64_t first, int64_t last) {
    for (int64_t done = 0; done < rows; done += MOST_ROWS) {
        Rows some = {.rows = rows - done < MOST_ROWS ? (int)(rows - done) : MOST_ROWS};
        for (int m = 0; m < some.rows; m++) {
            some.x[m] = x + (done + m) * layer->columns;
            some.out[m] = out + (done + m) * layer->outputs;
        }
        dot_rows(layer->weight, &some, layer->columns, first, last);
        if (layer->bias)
            for (int m = 0; m < some.rows; m++)
                for (int64_t o = first; o < last; o++) some.out[m][o] += value_at(layer->bias, layer->bias_kind, o);
    }
}

void linears(const Linear *const *layers, int count, const float *x, int64_t rows, float *const *outs, int threads) {
    int64_t ends[MOST_LAYERS], parts = 0, weights = 0;
    for (int l = 0; l < count; l++) {
        parts += (layers[l]->outputs + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME;
        weights += layers[l]->outputs * layers[l]->columns;
        ends[l] = parts;
    }
#pragma omp parallel for num_threads(threads) schedule(static) if (weights > ALONE)
    for (int64_t p = 0; p < parts; p++) {
        int l = 0;
        while (p >= ends[l]) l++;
        const int64_t first = (l ? p - ends[l - 1] : p) * ROWS_AT_A_TIME, last = first + ROWS_AT_A_TIME;
        part(layers[l], x, rows, outs[l], first, last < layers[l]->outputs ? last : layers[l]->outputs);
    }
}

void linear(const Linear *layer, const float *x, int64_t rows, float *out, int threads) {
    linears(&layer, 1, x, rows, &out, threads);
}

typedef struct {
    Linear layer;
    const void *x; /* (rows, columns), contiguous */
    void *out;     /* (rows, outputs), in x's type */
    int64_t kind, rows, threads;
} LinearCall;

/* Returns 0, or -1 without memory. */
int64_t grist_linear(const LinearCall *call) {
    const Linear *layer = &call->layer;
    if (call->kind == FLOAT32) {
        linear(layer, call->x, call->rows, call->out, (int)call->threads);
        return 0;
    }
    float *x = malloc(call->rows * (layer->columns + layer->outputs) * sizeof(float));
    if (!x) return -1;
    float *out = x + call->rows * layer->columns;
    read_floats(x, call->x, call->kind, call->rows * layer->columns);
    linear(layer, x, call->rows, out, (int)call->threads);
    write_floats(call->out, call->kind, out, call->rows * layer->outputs);
    free(x);
    return 0;
}
