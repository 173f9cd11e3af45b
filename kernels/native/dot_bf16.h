// bf16 weights times bf16 activations, two k in one instruction: twice the flops of fp32, for activations rounded to
// bf16. A path of its own (avx512_bf16), since its bits are not those of the others.
#pragma once

#include "simd.h"

namespace headrace {

// Nearest, ties to even; a NaN stays one.
HEADRACE_INLINE uint16_t round_to_bf16(float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    if ((word & 0x7fffffffu) > 0x7f800000u) return uint16_t(word >> 16 | 0x40);
    return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

#if defined(__AVX512BF16__)

// c [M][32] += panel [pairs][32] * x [pairs][M]; a pair is two bf16 of consecutive k in a word, the even one below.
template <int M>
inline void dot_rows(const std::byte* panel, int64_t pairs, const uint32_t* x, float* c, bool fresh,
                     const std::byte* ahead) {
    __m512 acc[M][2];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < 2; ++v) acc[m][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(c + m * 32 + 16 * v);
    for (int64_t i = 0; i < pairs; ++i) {
        const std::byte* at = panel + i * 128;
        __builtin_prefetch(ahead + i * 128), __builtin_prefetch(ahead + i * 128 + 64);
        const auto low = (__m512bh)_mm512_loadu_si512(at), high = (__m512bh)_mm512_loadu_si512(at + 64);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const auto value = (__m512bh)_mm512_set1_epi32(int32_t(x[i * M + m]));
            acc[m][0] = _mm512_dpbf16_ps(acc[m][0], low, value);
            acc[m][1] = _mm512_dpbf16_ps(acc[m][1], high, value);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < 2; ++v) _mm512_storeu_ps(c + m * 32 + 16 * v, acc[m][v]);
}

inline void dot_block(int64_t rows, const std::byte* panel, int64_t pairs, const uint32_t* x, float* c, bool fresh,
                      const std::byte* ahead) {
    switch (rows) {
#define HEADRACE_DOT(m) \
    case m: return dot_rows<m>(panel, pairs, x, c, fresh, ahead);
        HEADRACE_DOT(1)
        HEADRACE_DOT(2)
        HEADRACE_DOT(3)
        HEADRACE_DOT(4)
        HEADRACE_DOT(5)
        HEADRACE_DOT(6)
        HEADRACE_DOT(7)
        HEADRACE_DOT(8)
        HEADRACE_DOT(9)
        HEADRACE_DOT(10)
        HEADRACE_DOT(11)
        HEADRACE_DOT(12)
#undef HEADRACE_DOT
    }
}

// c [rows][32] = panel * x, in pieces of K that stay in the first-level cache while all rows use them.
inline void dot_panel(const std::byte* panel, int64_t width, const float* x, int64_t rows, int64_t block, float* c) {
    constexpr int64_t AHEAD = 4096, PIECE = 128;  // bytes; pairs
    const int64_t piece = rows <= block ? width / 2 : PIECE;
    for (int64_t k0 = 0; k0 < width / 2; k0 += piece) {
        const int64_t pairs = std::min(piece, width / 2 - k0);
        for (int64_t row = 0; row < rows; row += block) {
            const int64_t some = std::min(block, rows - row);
            const std::byte* at = panel + k0 * 128;
            const std::byte* ahead = rows <= block ? at + AHEAD : row ? at : at + pairs * 128;
            dot_block(some, at, pairs, reinterpret_cast<const uint32_t*>(x + row * width) + k0 * some, c + row * 32, !k0,
                      ahead);
        }
    }
}

#endif

}  // namespace headrace
