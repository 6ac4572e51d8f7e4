/* secateur: run a planned sparse network on a CPU. Plain C; no Python, no torch.
 *
 * Every function that can fail returns SEC_OK or an error code and, on failure, writes one line into `error`
 * (`error_size` bytes, always terminated; may be NULL). Nothing here throws, prints or exits.
 */
#ifndef SECATEUR_H
#define SECATEUR_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SEC_ABI_VERSION 1

#if defined(_WIN32)
#define SEC_API __declspec(dllexport)
#else
#define SEC_API __attribute__((visibility("default")))
#endif
#define SEC_MAX_DIMS 8

enum sec_status {
    SEC_OK = 0,
    SEC_ERROR_FILE = 1,        /* cannot be opened, or is not a plan, or is damaged */
    SEC_ERROR_UNSUPPORTED = 2, /* a sound plan that this library cannot run */
    SEC_ERROR_ARGUMENT = 3,    /* the caller's shapes, types, counts or options */
    SEC_ERROR_MEMORY = 4,      /* would need more memory than the limit, or none is left */
    SEC_ERROR_INTERNAL = 5     /* a bug in this library */
};

enum sec_dtype { SEC_F32 = 0, SEC_I64 = 1 };

typedef struct sec_plan sec_plan;       /* an immutable network; may be shared by sessions and threads */
typedef struct sec_session sec_session; /* threads and buffers to run it; calls from several threads take turns */

/* A row-major, contiguous array of the caller's. */
typedef struct sec_tensor {
    void* data;
    int32_t dtype; /* enum sec_dtype */
    int32_t ndim;
    int64_t shape[SEC_MAX_DIMS];
} sec_tensor;

typedef struct sec_options {
    int32_t threads;      /* 0: one for each core that this process may use */
    int32_t reserved;     /* 0 */
    int64_t memory_limit; /* bytes that activations and packed weights may take; 0: 16 GiB */
    const char* isa;      /* NULL or "auto", or one of sec_isas() */
    const char* tuning;   /* NULL, or JSON with choices for named layers (see docs/runtime.md) */
} sec_options;

SEC_API int32_t sec_abi_version(void);
/* Instruction sets of this build that this machine has, best first, separated by spaces. */
SEC_API const char* sec_isas(void);
/* Nanoseconds that a word takes to another thread and back, median of five tries; a few milliseconds. Hundreds where the
 * two processors share no cache: steps that split one example then wait for each other's results. */
SEC_API double sec_round_trip(void);

SEC_API int sec_plan_open(const char* path, sec_plan** plan, char* error, size_t error_size);
/* `bytes` is read while the plan lives and must stay unchanged until sec_plan_free. */
SEC_API int sec_plan_parse(const void* bytes, size_t size, sec_plan** plan, char* error, size_t error_size);
SEC_API void sec_plan_free(sec_plan* plan);
SEC_API int32_t sec_plan_inputs(const sec_plan* plan);
SEC_API int32_t sec_plan_outputs(const sec_plan* plan);
/* Name, type and shape of one input; the batch is written as 0. Pointers live as long as the plan. */
SEC_API int sec_plan_input(const sec_plan* plan, int32_t index, const char** name, sec_tensor* spec);
SEC_API int sec_plan_output(const sec_plan* plan, int32_t index, const char** name);

/* The session keeps its own reference: the plan may be freed first. */
SEC_API int sec_session_create(sec_plan* plan, const sec_options* options, sec_session** session, char* error,
                       size_t error_size);
SEC_API void sec_session_free(sec_session* session);
/* Plans one batch size (layouts, buffers, work lists) and keeps it; run() does it by itself when needed. */
SEC_API int sec_session_prepare(sec_session* session, int64_t batch, char* error, size_t error_size);
/* Shape and type of one output at one batch size. */
SEC_API int sec_session_output(sec_session* session, int64_t batch, int32_t index, sec_tensor* spec, char* error,
                       size_t error_size);
/* Reads `inputs`, writes `outputs` (both in the plan's order, memory of the caller's). */
SEC_API int sec_session_run(sec_session* session, const sec_tensor* inputs, int32_t input_count, const sec_tensor* outputs,
                    int32_t output_count, char* error, size_t error_size);
/* What was chosen and what it cost, as JSON: for each step its node, path, shape, zeros, milliseconds of the last
 * profiled run. Returns the length needed, without the end mark; writes at most `size` bytes. */
SEC_API size_t sec_session_explain(sec_session* session, int64_t batch, char* text, size_t size);
/* 1: the next runs time each step (slower by two clock reads a step). */
SEC_API void sec_session_profile(sec_session* session, int32_t on);

#ifdef __cplusplus
}
#endif
#endif
