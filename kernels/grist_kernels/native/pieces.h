/* The small operations between products, on float32 rows. */
#pragma once

#include "weights.h"

typedef struct {
    const void *weight; /* (width,), or NULL: no norm */
    int64_t kind, width;
    double eps;
} Norm;

typedef struct {
    int64_t has_alpha, has_limit, interleaved;
    double alpha, limit;
} Activation;

/* x (width,) = x / sqrt(mean(x^2) + eps) * weight. */
void rms_norm(const Norm *norm, const float *x, float *out);

/* Turns the pairs (i, i + pairs) of a head by the angles of cos and sin (pairs,). */
void rotate(float *head, const float *cos, const float *sin, int64_t pairs);

/* The columns first to last of swiglu(gate_up) with gate_up (2 F,), times a factor. out is the whole row (F,). */
void swiglu(const Activation *activation, const float *gate_up, int64_t F, int64_t first, int64_t last, float factor, float *out);
