#include "pieces.h"

#include <stdlib.h>

void rms_norm(const Norm *norm, const float *x, float *out) {
    const int64_t whole = norm->width / LANES * LANES;
    floats squares = {0};
    for (int64_t i = 0; i < whole; i += LANES) squares += load(x + i) * load(x + i);
    if (whole < norm->width) {
        const floats last = load_first(x + whole, norm->width - whole);
        squares += last * last;
    }
    const float scale = 1.0f / sqrtf(sum(squares) / (float)norm->width + (float)norm->eps);
    if (norm->kind == FLOAT32)
        for (int64_t i = 0; i < norm->width; i++) out[i] = x[i] * scale * ((const float *)norm->weight)[i];
    else
        for (int64_t i = 0; i < norm->width; i++) out[i] = x[i] * scale * value_at(norm->weight, norm->kind, i);
}

void rotate(float *head, const float *cos, const float *sin, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i++) {
        const float a = head[i], b = head[i + pairs];
        head[i] = a * cos[i] - b * sin[i];
        head[i + pairs] = b * cos[i] + a * sin[i];
    }
}

/* gate * sigmoid(alpha * gate) * (up + 1) with an alpha (GPT-OSS), else silu(gate) * up; a limit clamps first. */
ALWAYS_INLINE floats activated(const Activation *activation, floats gate, floats up) {
    if (activation->has_limit) {
        const floats limit = all((float)activation->limit);
        gate = smaller_or_nan(gate, limit);
        up = larger_or_nan(smaller_or_nan(up, limit), -limit);
    }
    if (!activation->has_alpha) return gate / (1.0f + exponential(-gate)) * up;
    return gate / (1.0f + exponential(-(float)activation->alpha * gate)) * (up + 1.0f);
}

void swiglu(const Activation *activation, const float *gate_up, int64_t F, int64_t first, int64_t last, float factor, float *out) {
    for (int64_t i = first; i < last; i += LANES) {
        const int64_t count = last - i < LANES ? last - i : LANES;
        floats gate, up;
        if (activation->interleaved) {
            for (int64_t j = 0; j < LANES; j++) {
                gate[j] = j < count ? gate_up[2 * (i + j)] : 0.0f;
                up[j] = j < count ? gate_up[2 * (i + j) + 1] : 0.0f;
            }
        } else {
            gate = count == LANES ? load(gate_up + i) : load_first(gate_up + i, count);
            up = count == LANES ? load(gate_up + F + i) : load_first(gate_up + F + i, count);
        }
        const floats result = activated(activation, gate, up) * factor;
        if (count == LANES) store(out + i, result);
        else
            for (int64_t j = 0; j < count; j++) out[i + j] = result[j];
    }
}

typedef struct {
    Norm norm;
    const void *x, *residual; /* (rows, width), contiguous; residual may be NULL */
    void *out, *sum;          /* the norm of x (+ residual), and x + residual */
    int64_t kind, rows;
} NormCall;

/* Returns 0, or -1 without memory. */
int64_t grist_rms_norm(const NormCall *call) {
    const int64_t D = call->norm.width, bytes = call->kind == FLOAT32 ? 4 : 2;
    float *x = malloc(2 * D * sizeof(float)), *y = x + D;
    if (!x) return -1;
    for (int64_t row = 0; row < call->rows; row++) {
        const int64_t start = row * D * bytes;
        read_floats(x, (const char *)call->x + start, call->kind, D);
        if (call->residual) {
            read_floats(y, (const char *)call->residual + start, call->kind, D);
            for (int64_t i = 0; i < D; i++) x[i] += y[i];
            write_floats((char *)call->sum + start, call->kind, x, D);
        }
        rms_norm(&call->norm, x, y);
        write_floats((char *)call->out + start, call->kind, y, D);
    }
    free(x);
    return 0;
}
