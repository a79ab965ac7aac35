/* Thirty-two codes come into registers at once. Those of four bits lie two to a byte: the low ones are the even columns and the
   high ones the odd, so activations are divided likewise, which is less work than to put codes in order. */
#include "packed.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define STEP 32
#define AHEAD 4096 /* bytes: the hardware looks no further than a page, which int8 is through with a third too early */
#define UNROLL _Pragma("GCC unroll 8")

typedef int8_t bytes __attribute__((vector_size(16)));
typedef int16_t signed_halves __attribute__((vector_size(32)));

#if defined(__clang__) || __GNUC__ >= 12
#define EVENS(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODDS(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#else
#define EVENS(a, b) __builtin_shuffle(a, b, (ints){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30})
#define ODDS(a, b) __builtin_shuffle(a, b, (ints){1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31})
#endif

/* Sixteen signed bytes. GCC 12 makes six instructions of the general form, where the CPU has one. */
ALWAYS_INLINE ints wide(const void *from) {
#ifdef __AVX512F__
    return (ints)_mm512_cvtepi8_epi32(_mm_loadu_si128(from));
#else
    bytes lanes;
    memcpy(&lanes, from, sizeof lanes);
    return __builtin_convertvector(__builtin_convertvector(lanes, signed_halves), ints);
#endif
}

/* One half of the 32 codes from a column on: the first 16 or the second; of four bits the even or the odd ones. */
typedef floats HalfOfCodes(Weight w, int64_t row, int64_t column, const int half);
/* One code: rows of whole bytes may end before a step does. */
typedef float OneCode(Weight w, int64_t row, int64_t column);

ALWAYS_INLINE const uint8_t *bytes_at(Weight w, int64_t row, int64_t column, int codes_a_byte) {
    return (const uint8_t *)w.data + (row * w.stride + column) / codes_a_byte;
}

ALWAYS_INLINE floats codes_INT8(Weight w, int64_t row, int64_t column, const int half) {
    return __builtin_convertvector(wide(bytes_at(w, row, column + half * LANES, 1)), floats);
}

ALWAYS_INLINE float code_INT8(Weight w, int64_t row, int64_t column) { return (int8_t)*bytes_at(w, row, column, 1); }

/* E4M3 (Micikevicius et al., 2022): its bits, put below float32's sign, are the number times 2^-120; all ones are NaN. */
ALWAYS_INLINE floats from_fp8(ints codes) {
    const ints magnitude = codes & 0x7f;
    const floats found = (floats)((codes & (int32_t)0x80000000) | magnitude << 20) * 0x1p120f;
    return chosen(magnitude == 0x7f, all(NAN), found);
}

ALWAYS_INLINE floats codes_FP8(Weight w, int64_t row, int64_t column, const int half) {
    return from_fp8(wide(bytes_at(w, row, column + half * LANES, 1)));
}

ALWAYS_INLINE float code_FP8(Weight w, int64_t row, int64_t column) {
    return from_fp8((ints){0} + (int8_t)*bytes_at(w, row, column, 1))[0];
}

/* Codes from 0 to 15, less 8: with the highest bit turned over they are signed numbers of four bits. */
ALWAYS_INLINE floats codes_INT4(Weight w, int64_t row, int64_t column, const int half) {
    const ints both = wide(bytes_at(w, row, column, 2)) ^ 0x88;
    return __builtin_convertvector(both << (half ? 24 : 28) >> 28, floats);
}

/* E2M1: three bits put where float32 has the lowest two of its exponent and the highest of its mantissa are the number times
   2^-126. */
ALWAYS_INLINE floats codes_MXFP4(Weight w, int64_t row, int64_t column, const int half) {
    const ints both = wide(bytes_at(w, row, column, 2));
    const ints signs = both << (half ? 24 : 28), magnitudes = both << (half ? 18 : 22);
    return (floats)((signs & (int32_t)0x80000000) | (magnitudes & 0x01c00000)) * 0x1p126f;
}

ALWAYS_INLINE float one_of_four_bits(Weight w, int64_t row, int64_t column) {
    (void)w, (void)row, (void)column;
    return 0.0f; /* never asked for: groups are multiples of STEP */
}
#define code_INT4 one_of_four_bits
#define code_MXFP4 one_of_four_bits

ALWAYS_INLINE float scale_of(Weight w, int64_t row, int64_t groups, int64_t group) {
    const int64_t i = row * groups + group;
    if (w.scale_kind == POWER_OF_TWO) {
        const uint32_t s = ((const uint8_t *)w.scales)[i];
        const uint32_t bits = s == 0 ? 1u << 22 : s == 255 ? 0x7fc00000u : s << 23;
        float power;
        memcpy(&power, &bits, sizeof power);
        return power;
    }
    return value_at(w.scales, w.scale_kind, i);
}

/* What is added to every code of a group: 8 - zero. */
ALWAYS_INLINE float shift_of(Weight w, int64_t row, int64_t groups, int64_t group) {
    return 8.0f - ((const uint8_t *)w.zeros)[row * groups + group];
}

ALWAYS_INLINE void packed_dots(
    HalfOfCodes *codes_of, OneCode *one_code, const int PAIRED, const int ZEROS, const int M, const int R, Weight w, const Rows *rows,
    int64_t columns, int64_t row
) {
    const int64_t groups = columns / w.group;
    floats total[4][MOST_ROWS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int m = 0; m < M; m++) total[r][m] = (floats){0};
    for (int64_t group = 0; group < groups; group++) {
        const int64_t first = group * w.group, whole = first + w.group / STEP * STEP;
        floats of_group[4][MOST_ROWS], shift[4];
        float scale[4];
        UNROLL for (int r = 0; r < R; r++) {
            scale[r] = scale_of(w, row + r, groups, group);
            if (ZEROS) shift[r] = all(shift_of(w, row + r, groups, group));
            UNROLL for (int m = 0; m < M; m++) of_group[r][m] = (floats){0};
        }
        for (int64_t i = first; i < whole; i += STEP) {
            floats x[MOST_ROWS][2];
            UNROLL for (int m = 0; m < M; m++) {
                const floats a = load(rows->x[m] + i), b = load(rows->x[m] + i + LANES);
                x[m][0] = PAIRED ? EVENS(a, b) : a;
                x[m][1] = PAIRED ? ODDS(a, b) : b;
            }
            UNROLL for (int r = 0; r < R; r++) {
                __builtin_prefetch((const char *)w.data + (((row + r) * w.stride + i) >> PAIRED) + AHEAD);
                UNROLL for (int half = 0; half < 2; half++) {
                    floats codes = codes_of(w, row + r, i, half);
                    if (ZEROS) codes += shift[r];
                    UNROLL for (int m = 0; m < M; m++) of_group[r][m] += codes * x[m][half];
                }
            }
        }
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int m = 0; m < M; m++) total[r][m] += of_group[r][m] * scale[r];
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int m = 0; m < M; m++) rows->out[m][row + r] = sum(total[r][m]);
    /* Codes of eight bits have one group a row, and rows of any length. */
    for (int64_t i = columns / STEP * STEP; !PAIRED && i < columns; i++)
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++)
                rows->out[m][row + r] += scale_of(w, row + r, 1, 0) * one_code(w, row + r, i) * rows->x[m][i];
}

ALWAYS_INLINE void packed_dots_between(
    HalfOfCodes *codes_of, OneCode *one_code, const int PAIRED, const int ZEROS, const int M, Weight w, const Rows *rows,
    int64_t columns, int64_t first, int64_t last
) {
    const int R = M <= 2 ? 4 : M <= 4 ? 2 : 1;
    int64_t row = first;
    for (; row + R <= last; row += R) packed_dots(codes_of, one_code, PAIRED, ZEROS, M, R, w, rows, columns, row);
    for (; row < last; row++) packed_dots(codes_of, one_code, PAIRED, ZEROS, M, 1, w, rows, columns, row);
}

#define EACH_M(KIND, PAIRED, ZEROS)                                                                                         \
    switch (rows->rows) {                                                                                                  \
        case 1: packed_dots_between(codes_##KIND, code_##KIND, PAIRED, ZEROS, 1, w, rows, columns, first, last); break;     \
        case 2: packed_dots_between(codes_##KIND, code_##KIND, PAIRED, ZEROS, 2, w, rows, columns, first, last); break;     \
        case 4: packed_dots_between(codes_##KIND, code_##KIND, PAIRED, ZEROS, 4, w, rows, columns, first, last); break;     \
        case 8: packed_dots_between(codes_##KIND, code_##KIND, PAIRED, ZEROS, 8, w, rows, columns, first, last); break;     \
    }

static void dots_INT8(Weight w, const Rows *rows, int64_t columns, int64_t first, int64_t last) { EACH_M(INT8, 0, 0) }
static void dots_FP8(Weight w, const Rows *rows, int64_t columns, int64_t first, int64_t last) { EACH_M(FP8, 0, 0) }
static void dots_INT4(Weight w, const Rows *rows, int64_t columns, int64_t first, int64_t last) { EACH_M(INT4, 1, 0) }
static void dots_INT4_ZEROS(Weight w, const Rows *rows, int64_t columns, int64_t first, int64_t last) { EACH_M(INT4, 1, 1) }
static void dots_MXFP4(Weight w, const Rows *rows, int64_t columns, int64_t first, int64_t last) { EACH_M(MXFP4, 1, 0) }

void dot_packed_rows(Weight w, const Rows *rows, int64_t columns, int64_t first, int64_t last) {
    switch (w.kind) {
        case INT8: dots_INT8(w, rows, columns, first, last); break;
        case FP8: dots_FP8(w, rows, columns, first, last); break;
        case INT4: (w.zeros ? dots_INT4_ZEROS : dots_INT4)(w, rows, columns, first, last); break;
        case MXFP4: dots_MXFP4(w, rows, columns, first, last); break;
    }
}

Weight rows_further(Weight w, int64_t rows, int64_t columns) {
    static const int64_t bits[] = {[FLOAT32] = 32, [BFLOAT16] = 16, [INT8] = 8, [FP8] = 8, [INT4] = 4, [MXFP4] = 4};
    static const int64_t scale_bytes[] = {[FLOAT32] = 4, [BFLOAT16] = 2, [POWER_OF_TWO] = 1};
    w.data = (const char *)w.data + rows * w.stride * bits[w.kind] / 8;
    if (w.group) {
        const int64_t groups = rows * (columns / w.group);
        w.scales = (const char *)w.scales + groups * scale_bytes[w.scale_kind];
        if (w.zeros) w.zeros += groups;
    }
    return w;
}

#define OUTPUTS_AT_A_TIME 64

void add_outputs(Weight w, const Rows *rows, int64_t columns, int64_t first, int64_t last) {
    float sums[MOST_ADDED][OUTPUTS_AT_A_TIME];
    for (int64_t begin = first; begin < last; begin += OUTPUTS_AT_A_TIME) {
        const int64_t count = last - begin < OUTPUTS_AT_A_TIME ? last - begin : OUTPUTS_AT_A_TIME;
        Rows some = *rows;
        for (int m = 0; m < rows->rows; m++) some.out[m] = sums[m];
        dot_rows(rows_further(w, begin, columns), &some, columns, 0, count);
        for (int m = 0; m < rows->rows; m++)
            for (int64_t i = 0; i < count; i++) rows->out[m][begin + i] += sums[m][i];
    }
}
