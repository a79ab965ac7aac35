/* Slots are divided into splits, whatever the number of threads; each split of each key head finds its own softmax and sum of
   values, and what they found is merged (flash-decoding: Dao et al., 2023). T new tokens, G query heads of a key head. */
#include "attend.h"

#include <omp.h>
#include <stdlib.h>

#define SPLIT 128 /* slots: keys and values of a head of 64, in float32, fill a first-level cache twice */

/* What a split found for one query: the largest logit, the sum of e^(logit - largest), and the weighted sum of values. */
typedef struct {
    float largest, total;
} Found;

typedef struct {
    const Attend *call;
    int64_t splits; /* of the longest sequence */
    float *q;       /* (B, T, N, H), times the scale */
    Found *found;   /* (B, T, N, splits) */
    float *sums;    /* (B, T, N, splits, H) */
    float *logits;  /* (threads, G T, SPLIT) */
} Work;

ALWAYS_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
ALWAYS_INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

/* The slots that a new token sees, and those that any of a sequence sees: from first to before last. */
ALWAYS_INLINE int64_t first_seen(const Attend *call, int64_t b, int64_t t) {
    return at_least(0, call->lengths[b] - call->tokens + t - call->window + 1);
}
ALWAYS_INLINE int64_t last_seen(const Attend *call, int64_t b, int64_t t) {
    return at_least(0, call->lengths[b] - call->tokens + t + 1);
}

ALWAYS_INLINE floats cached(const void *row, int64_t kind, int64_t i) {
    return kind == FLOAT32 ? load((const float *)row + i) : load_bfloat16((const uint16_t *)row + i);
}

ALWAYS_INLINE const void *cache_row(const void *cache, int64_t kind, int64_t element) {
    return (const char *)cache + element * (kind == FLOAT32 ? 4 : 2);
}

/* logits (G T, SPLIT) of the slots first to last. */
ALWAYS_INLINE void key_logits(
    const Work *work, const int64_t kind, const int64_t H, int64_t b, int64_t key_head, int64_t first, int64_t last, float *logits
) {
    const Attend *call = work->call;
    const int64_t G = call->heads / call->key_heads, whole = H / LANES * LANES;
    for (int64_t slot = first; slot < last; slot++) {
        const void *k = cache_row(call->k, kind, b * call->k_batch + slot * call->k_slot + key_head * call->k_head);
        for (int64_t r = 0; r < G * call->tokens; r++) {
            const float *q = work->q + ((b * call->tokens + r / G) * call->heads + key_head * G + r % G) * H;
            floats dot = {0};
            for (int64_t i = 0; i < whole; i += LANES) dot += load(q + i) * cached(k, kind, i);
            float logit = sum(dot);
            for (int64_t i = whole; i < H; i++) logit += q[i] * value_at(k, kind, i);
            logits[r * SPLIT + slot - first] = logit;
        }
    }
}

/* logits become e^(logit - largest). */
static Found softmax(float *logits, int64_t count) {
    Found found = {-INFINITY, 0.0f};
    floats most = all(-INFINITY), total = {0};
    const int64_t padded = (count + LANES - 1) / LANES * LANES;
    for (int64_t i = count; i < padded; i++) logits[i] = -INFINITY;
    for (int64_t i = 0; i < padded; i += LANES) most = larger(load(logits + i), most);
    for (int i = 0; i < LANES; i++) found.largest = fmaxf(found.largest, most[i]);
    for (int64_t i = 0; i < padded; i += LANES) {
        const floats weights = exponential(load(logits + i) - found.largest);
        store(logits + i, weights);
        total += weights;
    }
    found.total = sum(total);
    return found;
}

/* sums (H,) = sum over slots from first to last of weights[slot - first] v[slot]. */
ALWAYS_INLINE void value_sums(
    const Attend *call, const int64_t kind, const int64_t H, int64_t b, int64_t key_head, int64_t first, int64_t last,
    const float *weights, float *sums
) {
    const int64_t start = b * call->v_batch + key_head * call->v_head, whole = H / LANES * LANES;
    enum { COLUMNS = 64 };
    int64_t i = 0;
    for (; i + COLUMNS <= H; i += COLUMNS) {
        floats total[COLUMNS / LANES] = {{0}};
        for (int64_t slot = first; slot < last; slot++) {
            const void *v = cache_row(call->v, kind, start + slot * call->v_slot + i);
            for (int c = 0; c < COLUMNS / LANES; c++) total[c] += weights[slot - first] * cached(v, kind, c * LANES);
        }
        for (int c = 0; c < COLUMNS / LANES; c++) store(sums + i + c * LANES, total[c]);
    }
    for (; i < whole; i += LANES) {
        floats total = {0};
        for (int64_t slot = first; slot < last; slot++)
            total += weights[slot - first] * cached(cache_row(call->v, kind, start + slot * call->v_slot + i), kind, 0);
        store(sums + i, total);
    }
    for (; i < H; i++) {
        float total = 0.0f;
        for (int64_t slot = first; slot < last; slot++)
            total += weights[slot - first] * value_at(call->v, kind, start + slot * call->v_slot + i);
        sums[i] = total;
    }
}

ALWAYS_INLINE void attend_split(
    const Work *work, const int64_t kind, const int64_t H, int64_t b, int64_t key_head, int64_t split, float *logits
) {
    const Attend *call = work->call;
    const int64_t G = call->heads / call->key_heads, T = call->tokens;
    const int64_t first = first_seen(call, b, 0) + split * SPLIT, last = at_most(first + SPLIT, last_seen(call, b, T - 1));
    key_logits(work, kind, H, b, key_head, first, last, logits);
    for (int64_t r = 0; r < G * T; r++) {
        const int64_t t = r / G, query = (b * T + t) * call->heads + key_head * G + r % G;
        const int64_t from = at_least(first, first_seen(call, b, t)), to = at_most(last, last_seen(call, b, t));
        Found *found = work->found + query * work->splits + split;
        *found = (Found){-INFINITY, 0.0f};
        if (from >= to) continue;
        float weights[SPLIT]; /* a copy: softmax pads, and the logits may start at any slot */
        memcpy(weights, logits + r * SPLIT + from - first, (to - from) * sizeof(float));
        *found = softmax(weights, to - from);
        value_sums(call, kind, H, b, key_head, from, to, weights, work->sums + (query * work->splits + split) * H);
    }
}

static void any_split(const Work *work, int64_t b, int64_t key_head, int64_t split, float *logits) {
    const int64_t kind = work->call->cache_kind, H = work->call->width;
    /* With constants the compiler keeps a head in registers. */
    if (kind == FLOAT32 && H == 64) attend_split(work, FLOAT32, 64, b, key_head, split, logits);
    else if (kind == FLOAT32 && H == 128) attend_split(work, FLOAT32, 128, b, key_head, split, logits);
    else if (kind == FLOAT32) attend_split(work, FLOAT32, H, b, key_head, split, logits);
    else if (H == 64) attend_split(work, BFLOAT16, 64, b, key_head, split, logits);
    else if (H == 128) attend_split(work, BFLOAT16, 128, b, key_head, split, logits);
    else attend_split(work, BFLOAT16, H, b, key_head, split, logits);
}

/* From the splits of one query, and its head's sink, to its output. */
static void merge(const Work *work, int64_t query, float *out) {
    const Attend *call = work->call;
    const int64_t H = call->width, n = query % call->heads;
    const Found *found = work->found + query * work->splits;
    const float sink = call->sinks ? value_at(call->sinks, call->sink_kind, n) : -INFINITY;
    float largest = sink;
    for (int64_t s = 0; s < work->splits; s++) largest = fmaxf(largest, found[s].largest);
    float total = call->sinks ? expf(sink - largest) : 0.0f;
    for (int64_t i = 0; i < H; i++) out[i] = 0.0f;
    for (int64_t s = 0; s < work->splits; s++) {
        if (found[s].total == 0.0f) continue; /* nothing seen: its sums were never written */
        const float share = expf(found[s].largest - largest);
        const float *sums = work->sums + (query * work->splits + s) * H;
        total += share * found[s].total;
        for (int64_t i = 0; i < H; i++) out[i] += share * sums[i];
    }
    for (int64_t i = 0; i < H && total != 0.0f; i++) out[i] /= total;
}

static void scale_queries(const Work *work) {
    const Attend *call = work->call;
    const int64_t H = call->width, T = call->tokens, N = call->heads;
    for (int64_t query = 0; query < call->batch * T * N; query++) {
        const int64_t b = query / (T * N), t = query / N % T, n = query % N;
        const int64_t start = b * call->q_batch + t * call->q_time + n * call->q_head;
        for (int64_t i = 0; i < H; i++)
            work->q[query * H + i] = value_at(call->q, call->q_kind, start + i) * (float)call->scale;
    }
}

static void attend(const Work *work, int64_t most_seen) {
    const Attend *call = work->call;
    const int64_t B = call->batch, K = call->key_heads, H = call->width, T = call->tokens, queries = B * T * call->heads;
    const int64_t rows = call->heads / K * T;
    scale_queries(work);
#pragma omp parallel num_threads((int)call->threads) if (B * most_seen * K * H > 16384)
    {
        float *logits = work->logits + omp_get_thread_num() * rows * SPLIT;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < B * work->splits * K; item++)
            any_split(work, item / (work->splits * K), item % K, item / K % work->splits, logits);
#pragma omp for schedule(static)
        for (int64_t query = 0; query < queries; query++) {
            float out[H];
            merge(work, query, out);
            write_floats((char *)call->out + query * H * (call->q_kind == FLOAT32 ? 4 : 2), call->q_kind, out, H);
        }
    }
}

int64_t grist_decode_attention(const Attend *call) {
    const int64_t H = call->width, queries = call->batch * call->tokens * call->heads;
    int64_t most_seen = 1;
    for (int64_t b = 0; b < call->batch; b++)
        most_seen = at_least(most_seen, last_seen(call, b, call->tokens - 1) - first_seen(call, b, 0));
    Work work = {.call = call, .splits = (most_seen + SPLIT - 1) / SPLIT};
    const int64_t logits = call->threads * call->heads / call->key_heads * call->tokens * SPLIT;
    work.q = malloc((queries * (H + work.splits * (H + 2)) + logits) * sizeof(float));
    if (!work.q) return -1;
    work.found = (Found *)(work.q + queries * H);
    work.sums = (float *)(work.found + queries * work.splits);
    work.logits = work.sums + queries * work.splits * H;
    attend(&work, most_seen);
    free(work.q);
    return 0;
}
