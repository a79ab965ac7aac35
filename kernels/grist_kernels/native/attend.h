/* Attention of a few new tokens to a key/value cache. */
#pragma once

#include "weights.h"

typedef struct {
    const void *q, *k, *v;
    void *out; /* (B, T, N, H), contiguous, in q's type */
    const int64_t *lengths;
    const void *sinks; /* (N,), or NULL */
    int64_t q_kind, cache_kind, sink_kind;
    int64_t batch, tokens, heads, key_heads, width; /* B, T, N, K, H; columns of a head are neighbours */
    int64_t q_batch, q_time, q_head;                /* strides, in elements */
    int64_t k_batch, k_slot, k_head;
    int64_t v_batch, v_slot, v_head;
    int64_t window; /* a token sees itself and window - 1 before it */
    int64_t threads;
    double scale;
} Attend;

/* Returns 0, or -1 without memory. */
int64_t grist_decode_attention(const Attend *call);
