/* The experts of a few tokens: out[t] = sum over a of weight[t, a] * (swiglu(x[t] W_gate_up[e] + b) W_down[e] + b), e = id[t, a].

   Pairs of a token and an expert are sorted by expert, so that tokens which share one read its weights together. T tokens,
   A active experts per token, P = T A pairs, D model width, F expert width. */
#include "pieces.h"
#include "products.h"

#include <stdlib.h>

typedef struct {
    const void *x;         /* (T, D), contiguous */
    void *out;             /* (T, D), in x's type */
    const int64_t *ids;    /* (T, A) */
    const float *weights;  /* (T, A) */
    Weight gate_up, down;  /* (E D, 2 F) and (E F, D): those of an expert are neighbours */
    const void *b_gate_up, *b_down; /* (E, 2 F) and (E, D) in x's type, or NULL */
    int64_t kind, tokens, active, D, F, threads;
    Activation activation;
} Experts;

/* Pairs of one expert, up to MOST_ADDED: the place of the first in the order, and how many. */
typedef struct {
    int64_t expert, first, count;
} Group;

typedef struct {
    const Experts *call;
    int64_t *order; /* (P,): pairs, sorted by expert */
    Group *groups;
    int64_t n_groups;
    float *x, *hidden, *act, *out; /* (T, D), (P, 2 F), (P, F), (T, D) */
} Work;

#define COLUMNS_AT_A_TIME 128 /* of float32: eight cache lines of every row of a weight */

static void sort_pairs(Work *work) {
    const Experts *call = work->call;
    const int64_t pairs = call->tokens * call->active;
    for (int64_t pair = 0; pair < pairs; pair++) {
        int64_t place = pair;
        for (; place > 0 && call->ids[work->order[place - 1]] > call->ids[pair]; place--)
            work->order[place] = work->order[place - 1];
        work->order[place] = pair;
    }
    for (int64_t place = 0; place < pairs; place++) {
        const int64_t expert = call->ids[work->order[place]];
        Group *last = work->groups + work->n_groups - 1;
        /* A token that names an expert twice: its two results are added to one row, and not at once. */
        const int another = place && work->order[place - 1] / call->active != work->order[place] / call->active;
        if (another && last->expert == expert && last->count < MOST_ADDED) last->count++;
        else work->groups[work->n_groups++] = (Group){expert, place, 1};
    }
}

static Weight of_expert(Weight w, int64_t row) {
    w.data = (const char *)w.data + row * w.stride * (w.kind == FLOAT32 ? 4 : 2);
    return w;
}

/* hidden[columns] = bias + x W of a group, for the columns first to last of 2 F. */
static void gate_up_columns(const Work *work, const Group *group, int64_t first, int64_t last) {
    const Experts *call = work->call;
    const int64_t F2 = 2 * call->F;
    Rows rows = {.rows = (int)group->count};
    for (int m = 0; m < rows.rows; m++) {
        const int64_t pair = work->order[group->first + m];
        rows.x[m] = work->x + pair / call->active * call->D;
        rows.out[m] = work->hidden + pair * F2;
        for (int64_t i = first; i < last; i++)
            rows.out[m][i] = call->b_gate_up ? value_at(call->b_gate_up, call->kind, group->expert * F2 + i) : 0.0f;
    }
    add_rows(of_expert(call->gate_up, group->expert * call->D), &rows, call->D, first, last);
}

/* The activations first to last of a group, times the pairs' weights: all that the second product needs of the first. */
static void activations(const Work *work, const Group *group, int64_t first, int64_t last) {
    const Experts *call = work->call;
    if (call->activation.interleaved) gate_up_columns(work, group, 2 * first, 2 * last);
    else {
        gate_up_columns(work, group, first, last);
        gate_up_columns(work, group, call->F + first, call->F + last);
    }
    for (int64_t m = 0; m < group->count; m++) {
        const int64_t pair = work->order[group->first + m];
        const float *hidden = work->hidden + pair * 2 * call->F;
        swiglu(&call->activation, hidden, call->F, first, last, call->weights[pair], work->act + pair * call->F);
    }
}

/* out[columns] of all tokens, expert by expert. */
static void down_columns(const Work *work, int64_t first, int64_t last) {
    const Experts *call = work->call;
    for (int64_t t = 0; t < call->tokens; t++) memset(work->out + t * call->D + first, 0, (last - first) * sizeof(float));
    for (int64_t g = 0; g < work->n_groups; g++) {
        const Group *group = work->groups + g;
        Rows rows = {.rows = (int)group->count};
        for (int m = 0; m < rows.rows; m++) {
            const int64_t pair = work->order[group->first + m];
            rows.x[m] = work->act + pair * call->F;
            rows.out[m] = work->out + pair / call->active * call->D;
            for (int64_t i = first; i < last && call->b_down; i++)
                rows.out[m][i] += call->weights[pair] * value_at(call->b_down, call->kind, group->expert * call->D + i);
        }
        add_rows(of_expert(call->down, group->expert * call->F), &rows, call->F, first, last);
    }
}

static void run(const Work *work) {
    const Experts *call = work->call;
    const int64_t half = COLUMNS_AT_A_TIME / 2;
    const int64_t hidden_parts = (call->F + half - 1) / half;
    const int64_t out_parts = (call->D + COLUMNS_AT_A_TIME - 1) / COLUMNS_AT_A_TIME;
#pragma omp parallel num_threads((int)call->threads)
    {
#pragma omp for schedule(static)
        for (int64_t item = 0; item < work->n_groups * hidden_parts; item++) {
            const int64_t first = item % hidden_parts * half, last = first + half;
            activations(work, work->groups + item / hidden_parts, first, last < call->F ? last : call->F);
        }
#pragma omp for schedule(static)
        for (int64_t part = 0; part < out_parts; part++) {
            const int64_t first = part * COLUMNS_AT_A_TIME, last = first + COLUMNS_AT_A_TIME;
            down_columns(work, first, last < call->D ? last : call->D);
        }
    }
}

/* Ids are those of experts. Returns 0, or -1 without memory. */
int64_t grist_moe(const Experts *call) {
    const int64_t pairs = call->tokens * call->active, TD = call->tokens * call->D;
    const size_t floats_bytes = (2 * TD + 3 * pairs * call->F) * sizeof(float);
    void *memory = malloc(pairs * (sizeof(Group) + sizeof(int64_t)) + floats_bytes);
    if (!memory) return -1;
    Work work = {.call = call, .groups = memory};
    work.order = (int64_t *)(work.groups + pairs);
    work.x = (float *)(work.order + pairs);
    work.out = work.x + TD;
    work.hidden = work.out + TD;
    work.act = work.hidden + 2 * pairs * call->F;
    read_floats(work.x, call->x, call->kind, TD);
    sort_pairs(&work);
    run(&work);
    write_floats(call->out, call->kind, work.out, TD);
    free(memory);
    return 0;
}
