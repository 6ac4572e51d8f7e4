// The C ABI: exceptions become codes and messages.
#include <algorithm>
#include <cstring>
#include <new>

#include "round_trip.hpp"
#include "session.hpp"

struct sec_plan {
    std::shared_ptr<const sec::PlanData> data;
};
struct sec_session {
    std::unique_ptr<sec::Session> session;
};

namespace {

int report(char* error, size_t size, int status, const char* what) {
    if (error && size) {
        const size_t n = std::min(std::strlen(what), size - 1);
        std::memcpy(error, what, n);
        error[n] = 0;
    }
    return status;
}

template <class F> int guarded(char* error, size_t size, F f) {
    try {
        f();
        if (error && size) error[0] = 0;
        return SEC_OK;
    } catch (const sec::Error& e) {
        return report(error, size, e.status, e.what());
    } catch (const std::bad_alloc&) {
        return report(error, size, SEC_ERROR_MEMORY, "out of memory");
    } catch (const std::exception& e) {
        return report(error, size, SEC_ERROR_INTERNAL, e.what());
    } catch (...) {
        return report(error, size, SEC_ERROR_INTERNAL, "an unknown exception");
    }
}

void need(bool ok, const char* what) {
    if (!ok) throw sec::Error(SEC_ERROR_ARGUMENT, what);
}

}  // namespace

extern "C" {

int32_t sec_abi_version(void) { return SEC_ABI_VERSION; }

const char* sec_isas(void) {
    static const std::string names = [] {
        std::string s;
        for (const sec::Kernels* k : sec::machine_kernels()) s += (s.empty() ? "" : " ") + std::string(k->name);
        return s;
    }();
    return names.c_str();
}

double sec_round_trip(void) {
    try {
        return sec::round_trip();
    } catch (...) {
        return 0.0;                                  // no second thread
    }
}

int sec_plan_open(const char* path, sec_plan** plan, char* error, size_t size) {
    return guarded(error, size, [&] {
        need(path && plan, "path and plan must not be null");
        auto data = std::make_shared<sec::PlanData>();
        data->file = std::make_unique<sec::Mapping>(path);
        data->graph = sec::parse_plan(data->file->data(), data->file->size());
        *plan = new sec_plan{std::move(data)};
    });
}

int sec_plan_parse(const void* bytes, size_t count, sec_plan** plan, char* error, size_t size) {
    return guarded(error, size, [&] {
        need(bytes && plan, "bytes and plan must not be null");
        auto data = std::make_shared<sec::PlanData>();
        data->graph = sec::parse_plan(static_cast<const uint8_t*>(bytes), count);
        *plan = new sec_plan{std::move(data)};
    });
}

void sec_plan_free(sec_plan* plan) { delete plan; }
int32_t sec_plan_inputs(const sec_plan* plan) { return plan ? static_cast<int32_t>(plan->data->graph.inputs.size()) : 0; }
int32_t sec_plan_outputs(const sec_plan* plan) { return plan ? static_cast<int32_t>(plan->data->graph.outputs.size()) : 0; }

int sec_plan_input(const sec_plan* plan, int32_t index, const char** name, sec_tensor* spec) {
    if (index < 0 || index >= sec_plan_inputs(plan)) return SEC_ERROR_ARGUMENT;
    const sec::Input& in = plan->data->graph.inputs[static_cast<size_t>(index)];
    if (in.shape.size() > SEC_MAX_DIMS) return SEC_ERROR_UNSUPPORTED;
    if (name) *name = in.name.c_str();
    if (spec) {
        spec->data = nullptr;
        spec->dtype = in.dtype == sec::Dtype::f32 ? SEC_F32 : SEC_I64;
        spec->ndim = static_cast<int32_t>(in.shape.size());
        for (size_t i = 0; i < in.shape.size(); ++i) spec->shape[i] = in.shape[i];
    }
    return SEC_OK;
}

int sec_plan_output(const sec_plan* plan, int32_t index, const char** name) {
    if (index < 0 || index >= sec_plan_outputs(plan)) return SEC_ERROR_ARGUMENT;
    const sec::Graph& g = plan->data->graph;
    if (name) *name = g.values[static_cast<size_t>(g.outputs[static_cast<size_t>(index)])].name.c_str();
    return SEC_OK;
}

int sec_session_create(sec_plan* plan, const sec_options* options, sec_session** session, char* error, size_t size) {
    return guarded(error, size, [&] {
        need(plan && session, "plan and session must not be null");
        const sec_options o = options ? *options : sec_options{};
        *session = new sec_session{std::make_unique<sec::Session>(plan->data, o)};
    });
}

void sec_session_free(sec_session* session) { delete session; }

int sec_session_prepare(sec_session* session, int64_t batch, char* error, size_t size) {
    return guarded(error, size, [&] {
        need(session, "session must not be null");
        session->session->prepare_batch(batch);
    });
}

int sec_session_output(sec_session* session, int64_t batch, int32_t index, sec_tensor* spec, char* error, size_t size) {
    return guarded(error, size, [&] {
        need(session && spec, "session and spec must not be null");
        session->session->output(batch, index, *spec);
    });
}

int sec_session_run(sec_session* session, const sec_tensor* inputs, int32_t in_count, const sec_tensor* outputs,
                    int32_t out_count, char* error, size_t size) {
    return guarded(error, size, [&] {
        need(session, "session must not be null");
        session->session->run(inputs, in_count, outputs, out_count);
    });
}

size_t sec_session_explain(sec_session* session, int64_t batch, char* text, size_t size) {
    std::string s;
    if (!session || guarded(nullptr, 0, [&] { s = session->session->explain(batch); }) != SEC_OK) return 0;
    if (text && size) {
        const size_t n = std::min(s.size(), size - 1);
        std::memcpy(text, s.data(), n);
        text[n] = 0;
    }
    return s.size();
}

void sec_session_profile(sec_session* session, int32_t on) {
    if (session) session->session->profile(on != 0);
}

}  // extern "C"
