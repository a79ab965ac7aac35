/* What a layer does for a few new tokens between its norms, in one call: the work is small, and so is the time between calls.

   B batch, T new tokens, R = B T rows, N and K heads, H head width. */
#include "attend.h"
#include "linear.h"
#include "pieces.h"

#include <stdlib.h>

typedef struct {
    const void *x; /* (R, D), contiguous */
    void *out;     /* (R, D), in x's type */
    int64_t kind;
    Linear q, k, v, o;
    Norm q_norm, k_norm;    /* over heads, or over all heads of a token together */
    const float *cos, *sin; /* (T, pairs) or (B, T, pairs), contiguous; or NULL */
    int64_t angle_batch;    /* from one sequence's angles to the next's: 0 if they share them */
    int64_t pairs;
    const int64_t *slots; /* (R,): where new keys and values go; or NULL: from first_slot on in every sequence */
    int64_t first_slot;
    Attend attend; /* all but q and out; its lengths count the new tokens */
} AttentionStep;

static void norm_heads(const Norm *norm, float *rows, int64_t count) {
    for (int64_t i = 0; norm->weight && i < count; i += norm->width) rms_norm(norm, rows + i, rows + i);
}

static void rotate_heads(const AttentionStep *step, float *rows, int64_t heads) {
    const Attend *attend = &step->attend;
    if (!step->cos) return;
    for (int64_t row = 0; row < attend->batch * attend->tokens; row++) {
        const int64_t angle = row / attend->tokens * step->angle_batch + row % attend->tokens * step->pairs;
        for (int64_t head = 0; head < heads; head++)
            rotate(rows + (row * heads + head) * attend->width, step->cos + angle, step->sin + angle, step->pairs);
    }
}

static void write_cache(
    const AttentionStep *step, void *cache, int64_t of_batch, int64_t of_slot, int64_t of_head, const float *rows
) {
    const Attend *attend = &step->attend;
    const int64_t K = attend->key_heads, H = attend->width, bytes = attend->cache_kind == FLOAT32 ? 4 : 2;
    for (int64_t row = 0; row < attend->batch * attend->tokens; row++) {
        const int64_t slot = step->slots ? step->slots[row] : step->first_slot + row % attend->tokens;
        char *place = (char *)cache + (row / attend->tokens * of_batch + slot * of_slot) * bytes;
        for (int64_t head = 0; head < K; head++)
            write_floats(place + head * of_head * bytes, attend->cache_kind, rows + (row * K + head) * H, H);
    }
}

/* Returns 0, or -1 without memory. */
int64_t grist_attention_step(const AttentionStep *step) {
    const Attend *given = &step->attend;
    const int64_t rows = given->batch * given->tokens, N = given->heads, K = given->key_heads, H = given->width;
    const int64_t D = step->q.columns, O = step->o.outputs;
    const int threads = (int)given->threads;
    float *x = malloc(rows * (D + 2 * N * H + 2 * K * H + O) * sizeof(float));
    if (!x) return -1;
    float *q = x + rows * D, *k = q + rows * N * H, *v = k + rows * K * H, *seen = v + rows * K * H, *out = seen + rows * N * H;
    read_floats(x, step->x, step->kind, rows * D);
    linears((const Linear *[]){&step->q, &step->k, &step->v}, 3, x, rows, (float *[]){q, k, v}, threads);
    norm_heads(&step->q_norm, q, rows * N * H);
    norm_heads(&step->k_norm, k, rows * K * H);
    rotate_heads(step, q, N);
    rotate_heads(step, k, K);
    write_cache(step, (void *)given->k, given->k_batch, given->k_slot, given->k_head, k);
    write_cache(step, (void *)given->v, given->v_batch, given->v_slot, given->v_head, v);
    Attend attend = *given;
    attend.q = q;
    attend.out = seen;
    attend.q_kind = FLOAT32;
    attend.q_batch = given->tokens * N * H;
    attend.q_time = N * H;
    attend.q_head = H;
    const int64_t status = grist_decode_attention(&attend);
    linear(&step->o, seen, rows, out, threads);
    write_floats(step->out, step->kind, out, rows * O);
    free(x);
    return status;
}

typedef struct {
    const void *x; /* (R, D), contiguous */
    void *out;     /* (R, D), in x's type */
    int64_t kind, rows, threads;
    Linear gate_up, down;
    Activation activation;
} Mlp;

/* swiglu(x W_gate_up) W_down. Returns 0, or -1 without memory. */
int64_t grist_mlp(const Mlp *mlp) {
    const int64_t rows = mlp->rows, D = mlp->gate_up.columns, F = mlp->down.columns, O = mlp->down.outputs;
    float *x = malloc(rows * (D + 3 * F + O) * sizeof(float));
    if (!x) return -1;
    float *hidden = x + rows * D, *act = hidden + 2 * rows * F, *out = act + rows * F;
    read_floats(x, mlp->x, mlp->kind, rows * D);
    linear(&mlp->gate_up, x, rows, hidden, (int)mlp->threads);
    for (int64_t row = 0; row < rows; row++)
        swiglu(&mlp->activation, hidden + row * 2 * F, F, 0, F, 1.0f, act + row * F);
    linear(&mlp->down, act, rows, out, (int)mlp->threads);
    write_floats(mlp->out, mlp->kind, out, rows * O);
    free(x);
    return 0;
}
