// The C interface that library.py calls: pools of threads, and one function per op.

#include <cstring>
#include <exception>
#include <new>

#include "ops.h"

#define HEADRACE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using headrace::Pool;

enum Status { DONE = 0, NO_MEMORY = 1, FAILED = 2 };

template <class Args>
int call(Pool* pool, const void* args, void (*op)(Pool&, const Args&)) {
    try {
        const auto lock = pool->lock();
        const headrace::Rounding rounding;
        op(*pool, *static_cast<const Args*>(args));
        return DONE;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    } catch (...) {  // sizes that no tensor has
        return FAILED;
    }
}

}  // namespace

// Whether this machine has the instructions of a path's library: asked of the portable one, which runs anywhere.
HEADRACE_EXPORT int headrace_has_avx2() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return 0;
#endif
}

HEADRACE_EXPORT int headrace_has_avx512() {
#if defined(__x86_64__)
    return headrace_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return 0;
#endif
}

HEADRACE_EXPORT int headrace_has_avx512_bf16() {
#if defined(__x86_64__)
    return headrace_has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}

// A pool of that many threads, the caller's included; null if they cannot be had.
HEADRACE_EXPORT void* headrace_open(int threads) {
    try {
        return new Pool(threads);
    } catch (const std::exception&) {
        return nullptr;
    }
}

HEADRACE_EXPORT void headrace_close(void* pool) { delete static_cast<Pool*>(pool); }

#define HEADRACE_OP(op, Args)                                                             \
    static_assert(sizeof(headrace::Args) % 8 == 0);                                       \
    HEADRACE_EXPORT int headrace_##op(void* pool, const void* args) {                     \
        return call<headrace::Args>(static_cast<Pool*>(pool), args, headrace::op);        \
    }                                                                                     \
    HEADRACE_EXPORT int headrace_##op##_fields() { return int(sizeof(headrace::Args) / 8); }

HEADRACE_OP(pack, PackArgs)
HEADRACE_OP(linear, LinearArgs)
HEADRACE_OP(experts, ExpertsArgs)
HEADRACE_OP(rms_norm, NormArgs)
HEADRACE_OP(step_inputs, StepInputsArgs)
HEADRACE_OP(embed, EmbedArgs)
HEADRACE_OP(route, RouteArgs)
HEADRACE_OP(sample, SampleArgs)
HEADRACE_OP(mamba_update, MambaUpdateArgs)
HEADRACE_OP(mamba_prefill, MambaPrefillArgs)
HEADRACE_OP(decode_attention, DecodeAttentionArgs)
HEADRACE_OP(prefill_attention, PrefillAttentionArgs)

HEADRACE_EXPORT int headrace_run_all(void* pool, const void* args) {
    const auto& a = *static_cast<const headrace::RunAllArgs*>(args);
    int64_t index = 0;
    for (const std::byte *at = a.list, *end = at + a.bytes; at < end; ++index) {
        int64_t head[2];
        std::memcpy(head, at, sizeof head);
        const auto op = reinterpret_cast<int (*)(void*, const void*)>(head[0]);
        if (const int status = op(pool, at + sizeof head)) {
            *a.failed = index;
            return status;
        }
        at += int64_t(sizeof head) + head[1];
    }
    return DONE;
}
HEADRACE_EXPORT int headrace_run_all_fields() { return int(sizeof(headrace::RunAllArgs) / 8); }
