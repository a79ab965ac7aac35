/* Sixteen float32 lanes, in the vector extensions of GCC and Clang: whatever the CPU has, no intrinsics.

   Sums run over lanes and then across them, so they depend on shapes alone: not on the CPU, nor on the number of threads. */
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define ALWAYS_INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

ALWAYS_INLINE floats load(const float *from) {
    floats lanes;
    memcpy(&lanes, from, sizeof lanes); /* unaligned */
    return lanes;
}

ALWAYS_INLINE void store(float *to, floats lanes) { memcpy(to, &lanes, sizeof lanes); }

/* The first `count` of the lanes, the others zero. */
ALWAYS_INLINE floats load_first(const float *from, int64_t count) {
    floats lanes = {0};
    for (int64_t i = 0; i < count; i++) lanes[i] = from[i];
    return lanes;
}

ALWAYS_INLINE floats load_bfloat16(const uint16_t *from) {
    halves lanes;
    memcpy(&lanes, from, sizeof lanes);
#ifdef __AVX512F__ /* one instruction, of which GCC 12 makes three: products read a quarter more a second */
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)lanes), 16);
#else
    return (floats)(__builtin_convertvector(lanes, words) << 16);
#endif
}

ALWAYS_INLINE float from_bfloat16(uint16_t value) {
    const uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

ALWAYS_INLINE floats load_first_bfloat16(const uint16_t *from, int64_t count) {
    floats lanes = {0};
    for (int64_t i = 0; i < count; i++) lanes[i] = from_bfloat16(from[i]);
    return lanes;
}

/* Rounded to nearest, ties to even; NaN stays NaN. */
ALWAYS_INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

ALWAYS_INLINE floats all(float value) { return (floats){0} + value; }

ALWAYS_INLINE float sum(floats lanes) {
    typedef float eight __attribute__((vector_size(32)));
    typedef float four __attribute__((vector_size(16)));
    eight a[2];
    memcpy(a, &lanes, sizeof a);
    a[0] += a[1];
    four b[2];
    memcpy(b, a, sizeof b);
    b[0] += b[1];
    return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}

ALWAYS_INLINE floats chosen(ints mask, floats yes, floats no) { return (floats)((mask & (ints)yes) | (~mask & (ints)no)); }

ALWAYS_INLINE floats larger(floats a, floats b) { return chosen(a > b, a, b); }
ALWAYS_INLINE floats smaller(floats a, floats b) { return chosen(a < b, a, b); }
ALWAYS_INLINE floats larger_or_nan(floats a, floats b) { return chosen(a < b, b, a); }
ALWAYS_INLINE floats smaller_or_nan(floats a, floats b) { return chosen(a > b, b, a); }

/* e^x to two units in the last place; 0 below -87, and e^88 above 88. NaN stays NaN.
   2^n e^r with |r| <= ln(2) / 2: the reduction and the polynomial are those of Cephes' expf (Moshier, 1989). */
ALWAYS_INLINE floats exponential(floats x) {
    const floats magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    const ints vanishing = x < -87.0f, nan = x != x;
    const floats bounded = chosen(nan, all(0.0f), smaller(larger(x, all(-87.0f)), all(88.0f)));
    const floats n = (bounded * 1.44269504088896341f + magic) - magic;
    const floats r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const floats power = (floats)((__builtin_convertvector(n, ints) + 127) << 23);
    return chosen(nan, x, chosen(vanishing, all(0.0f), p * power));
}
