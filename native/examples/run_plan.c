/* Loads a plan, runs it on a counting pattern and prints the first outputs:  run_plan plan.safetensors [batch] */
#include <stdio.h>
#include <stdlib.h>

#include "secateur.h"

static void *zeroed(const sec_tensor *t) {
    size_t n = 1;
    for (int i = 0; i < t->ndim; ++i) n *= (size_t)t->shape[i];
    return calloc(n, t->dtype == SEC_F32 ? 4 : 8);
}

static size_t count(const sec_tensor *t) {
    size_t n = 1;
    for (int i = 0; i < t->ndim; ++i) n *= (size_t)t->shape[i];
    return n;
}

int main(int argc, char **argv) {
    char error[512];
    sec_plan *plan = NULL;
    sec_session *session = NULL;
    sec_tensor in[8], out[8];
    if (argc < 2) return fprintf(stderr, "usage: %s plan.safetensors [batch]\n", argv[0]), 2;
    const int64_t batch = argc > 2 ? atoll(argv[2]) : 1;
    if (sec_plan_open(argv[1], &plan, error, sizeof error)) return fprintf(stderr, "%s\n", error), 2;
    const int n_in = sec_plan_inputs(plan), n_out = sec_plan_outputs(plan);
    if (n_in > 8 || n_out > 8) return fprintf(stderr, "more than 8 inputs or outputs\n"), 2;

    for (int i = 0; i < n_in; ++i) {
        const char *name;
        sec_plan_input(plan, i, &name, &in[i]);
        if (in[i].ndim && in[i].shape[0] == 0) in[i].shape[0] = batch;
        in[i].data = zeroed(&in[i]);
        if (in[i].dtype == SEC_F32)
            for (size_t k = 0; k < count(&in[i]); ++k) ((float *)in[i].data)[k] = (float)(k % 17) / 17.0f - 0.5f;
    }
    sec_options options = {0};
    options.threads = 2;
    if (sec_session_create(plan, &options, &session, error, sizeof error)) return fprintf(stderr, "%s\n", error), 2;
    for (int i = 0; i < n_out; ++i) {
        if (sec_session_output(session, batch, i, &out[i], error, sizeof error)) return fprintf(stderr, "%s\n", error), 2;
        out[i].data = zeroed(&out[i]);
    }
    if (sec_session_run(session, in, n_in, out, n_out, error, sizeof error)) return fprintf(stderr, "%s\n", error), 2;

    for (int i = 0; i < n_out; ++i) {
        printf("output %d:", i);
        for (size_t k = 0; k < count(&out[i]) && k < 8; ++k) printf(" %.9g", ((float *)out[i].data)[k]);
        printf("\n");
        free(out[i].data);
    }
    for (int i = 0; i < n_in; ++i) free(in[i].data);
    sec_session_free(session);
    sec_plan_free(plan);
    return 0;
}
