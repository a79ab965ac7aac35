/* Which experts a few tokens go to, and how much each counts. T tokens, D model width, E experts, A active experts per token. */
#include "linear.h"
#include "pieces.h"

#include <stdlib.h>

typedef struct {
    const void *x; /* (T, D), contiguous */
    int64_t kind, tokens, active, threads;
    Linear scores;          /* (E, D) */
    const float *selection; /* (E,), added for the choice alone; or NULL */
    int64_t over_all;       /* whether weights are parts of the softmax over all experts, or sum to one */
    int64_t *ids;           /* (T, A), the best first */
    float *weights;         /* (T, A) */
} Router;

/* NaN is the largest number, as in torch.topk. */
static int is_better(float a, float b) { return a > b || (a != a && b == b); }

/* The A experts with the largest keys; of equal ones the first. Keys of chosen experts are not looked at again: taken (E,). */
static void choose(const float *keys, int64_t experts, int64_t active, char *taken, int64_t *ids) {
    memset(taken, 0, experts);
    for (int64_t a = 0; a < active; a++) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; e++)
            if (!taken[e] && (best < 0 || is_better(keys[e], keys[best]))) best = e;
        taken[best] = 1;
        ids[a] = best;
    }
}

static float largest_of(const float *logits, int64_t count) {
    float largest = logits[0];
    for (int64_t i = 1; i < count; i++)
        if (is_better(logits[i], largest)) largest = logits[i];
    return largest;
}

static void weigh(const Router *router, const float *logits, const int64_t *ids, float *weights) {
    const int64_t E = router->scores.outputs, A = router->active;
    for (int64_t a = 0; a < A; a++) weights[a] = logits[ids[a]];
    const float largest = router->over_all ? largest_of(logits, E) : largest_of(weights, A);
    float total = 0.0f;
    for (int64_t i = 0; i < (router->over_all ? E : A); i++) total += expf((router->over_all ? logits : weights)[i] - largest);
    for (int64_t a = 0; a < A; a++) weights[a] = expf(weights[a] - largest) / total;
}

/* Returns 0, or -1 without memory. */
int64_t grist_router(const Router *router) {
    const int64_t T = router->tokens, D = router->scores.columns, E = router->scores.outputs, A = router->active;
    float *x = malloc((T * (D + E) + E) * sizeof(float) + E);
    if (!x) return -1;
    float *logits = x + T * D, *keys = logits + T * E;
    read_floats(x, router->x, router->kind, T * D);
    linear(&router->scores, x, T, logits, (int)router->threads);
    for (int64_t t = 0; t < T; t++) {
        const float *of_token = logits + t * E;
        for (int64_t e = 0; e < E; e++) keys[e] = of_token[e] + (router->selection ? router->selection[e] : 0.0f);
        choose(keys, E, A, (char *)(keys + E), router->ids + t * A);
        weigh(router, of_token, router->ids + t * A, router->weights + t * A);
    }
    free(x);
    return 0;
}
