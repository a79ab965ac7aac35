/* The experts of a few tokens: out[t] = sum over a of weight[t, a] * (swiglu(x[t] W_gate_up[e] + b) W_down[e] + b), e = id[t, a].

   Pairs of a token and an expert are sorted by expert, so that tokens which share one read its weights together. T tokens,
   A active experts per token, P = T A pairs, D model width, F expert width. */
#include "packed.h"
#include "pieces.h"
#include "products.h"

#include <stdlib.h>

typedef struct {
    const void *x;         /* (T, D), contiguous */
    void *out;             /* (T, D), in x's type */
    const int64_t *ids;    /* (T, A) */
    const float *weights;  /* (T, A) */
    Weight gate_up, down;  /* (E D, 2 F) and (E F, D), or packed (E 2 F, D) and (E D, F): those of an expert are neighbours */
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

/* Into how many parts of whole cache lines `width` columns are cut: as few as keep all threads at work, since memory is read
   fastest along whole rows. Sums do not depend on it. */
static int64_t parts_of(int64_t width, int64_t groups, int64_t threads) {
    int64_t parts = 1;
    while (groups * parts % threads && groups * parts < 4 * threads && width / (parts + 1) >= 4 * LANES) parts++;
    return parts;
}

/* Where a part begins. */
static int64_t border(int64_t width, int64_t part, int64_t parts) {
    return part == parts ? width : width * part / parts / LANES * LANES;
}

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

/* out += x W of an expert, for some of its outputs. Weights that lie inputs first, or, packed, outputs first. */
static void add_product(Weight w, int64_t expert, const Rows *rows, int64_t inputs, int64_t outputs, int64_t first, int64_t last) {
    if (w.group) add_outputs(rows_further(w, expert * outputs, inputs), rows, inputs, first, last);
    else add_rows(rows_further(w, expert * inputs, outputs), rows, inputs, first, last);
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
    add_product(call->gate_up, group->expert, &rows, call->D, F2, first, last);
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
        add_product(call->down, group->expert, &rows, call->F, call->D, first, last);
    }
}

static void run(const Work *work) {
    const Experts *call = work->call;
    const int64_t F = call->F, D = call->D;
    const int64_t hidden_parts = parts_of(F, work->n_groups, call->threads), out_parts = parts_of(D, 1, call->threads);
#pragma omp parallel num_threads((int)call->threads)
    {
#pragma omp for schedule(static)
        for (int64_t item = 0; item < work->n_groups * hidden_parts; item++) {
            const Group *group = work->groups + item / hidden_parts;
            const int64_t part = item % hidden_parts;
            activations(work, group, border(F, part, hidden_parts), border(F, part + 1, hidden_parts));
        }
#pragma omp for schedule(static)
        for (int64_t part = 0; part < out_parts; part++)
            down_columns(work, border(D, part, out_parts), border(D, part + 1, out_parts));
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
