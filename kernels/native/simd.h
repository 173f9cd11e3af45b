// Sixteen fp32 lanes, the same on every machine.
//
// Every kernel is written once and compiled for each instruction path, a library of its own: avx512, avx2, portable. All
// give the same bits, because an operation is either correctly rounded or a fixed sequence of such; nothing is
// contracted or reordered by the compiler (-ffp-contract=off), and sums have one order, written down in the kernel.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define HEADRACE_INLINE inline __attribute__((always_inline))

namespace headrace {

constexpr int64_t LANES = 16;

}  // namespace headrace

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace headrace {

#if !defined(__AVX512F__)
HEADRACE_INLINE int64_t compress(float* p, uint32_t chosen, Float x) {
    float lanes[LANES];
    store(lanes, x);
    int64_t count = 0;
    for (int i = 0; i < LANES; ++i) {
        p[count] = lanes[i];
        count += chosen >> i & 1;
    }
    return count;
}
#endif

// The first n < LANES lanes; the rest read as zero and are not written.
HEADRACE_INLINE Float load_some(const float* p, int64_t n) {
    float lanes[LANES] = {};
    std::memcpy(lanes, p, size_t(n) * sizeof(float));
    return load(lanes);
}
HEADRACE_INLINE void store_some(float* p, Float x, int64_t n) {
    float lanes[LANES];
    store(lanes, x);
    std::memcpy(p, lanes, size_t(n) * sizeof(float));
}
HEADRACE_INLINE Float load_bf16(const uint16_t* p) { return as_float(shift_left<16>(load_u16(p))); }
// To the nearest, ties to even; every NaN becomes 0x7fc0, as torch has it.
HEADRACE_INLINE void store_bf16(uint16_t* p, Float x) {
    const Int word = as_int(x), rounded = word + splat(0x7fff) + (shift_right<16>(word) & splat(1));
    store_u16(p, shift_right<16>(as_int(select(x == x, as_float(rounded), as_float(splat(0x7fc00000))))));
}
// To the nearest e4m3, ties to even; saturates at 448, NaN is 0x7f or 0xff.
HEADRACE_INLINE void store_e4m3(uint8_t* p, Float x) {
    const Int word = as_int(x), sign = shift_right<24>(word & splat(int32_t(0x80000000)));
    const Float magnitude = min(splat(448.0f), as_float(word & splat(0x7fffffff)));  // the order keeps a NaN
    const Int at = as_int(magnitude), odd = shift_right<20>(at) & splat(1);
    const Int normal = shift_right<20>(at + splat(0x7ffff - (120 << 23)) + odd);
    // Below 2^-6 a multiple of 2^-9, which is the last place of 2^14.
    const Int small = as_int(magnitude + splat(0x1p14f)) - splat(141 << 23);
    const Float number = select(magnitude < splat(0x1p-6f), as_float(small), as_float(normal));
    int32_t lanes[LANES];
    store(lanes, as_int(select(magnitude == magnitude, number, as_float(splat(0x7f)))) | sign);
    for (int i = 0; i < LANES; ++i) p[i] = uint8_t(lanes[i]);
}

// The lanes' sum as a tree of halves: i + 8, then + 4, + 2, + 1.
HEADRACE_INLINE float sum(Float x) {
    float v[LANES];
    store(v, x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) v[i] += v[i + width];
    return v[0];
}
HEADRACE_INLINE float largest(Float x) {
    float v[LANES];
    store(v, x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) v[i] = v[i] > v[i + width] ? v[i] : v[i + width];
    return v[0];
}

}  // namespace headrace
