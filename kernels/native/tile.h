// Products of a weight panel with a block of rows: the one loop under every matrix product of this backend.
//
// Lanes are outputs. A panel holds 32 of them; for each k, in order, its 32 weights meet one value of a row:
// acc[row][output] = fma(weight[k][output], x[row][k], acc[row][output]). So an element is one chain over K, whatever the
// number of rows, threads or the instruction path: GEMV and GEMM give the same bits.
#pragma once

#include <algorithm>

#include "dot_bf16.h"
#include "simd.h"

namespace headrace {

constexpr int64_t PANEL = 32;  // outputs of a panel

#if defined(__AVX512F__)
constexpr int64_t ROWS = 12;  // of a register tile: 24 accumulators and 2 weights of 32 registers
constexpr int64_t VECTORS = 2;
constexpr int64_t DIRECT_WHOLE = 12;  // rows up to which a whole panel's accumulators fit
#elif defined(__AVX2__)
constexpr int64_t ROWS = 6;  // half a panel at a time: 12 accumulators, 2 weights and 1 value of 16 registers
constexpr int64_t VECTORS = 1;
constexpr int64_t DIRECT_WHOLE = 2;
#else
constexpr int64_t ROWS = 4;
constexpr int64_t VECTORS = 1;
constexpr int64_t DIRECT_WHOLE = 2;
#endif

constexpr int64_t DEPTH = 128;       // of K that is unpacked at a time: 16 KiB of fp32, half a first-level cache
constexpr int64_t BAND = 20 * ROWS;  // rows that share an unpacked piece; their accumulators stay in the second level

// How a panel's weights lie in memory; the numbers are the ABI's (library.py).
enum Format : int64_t { FP32 = 0, BF16 = 1, FP16 = 2 };

// A reader of one format: 16 outputs of a panel at two consecutive k, as fp32. ``at`` is the pair's first byte, ``half``
// says which outputs. K is even; packing pads it with zeros.
struct PanelF32 {
    static constexpr int64_t STRIDE = PANEL * 4;  // bytes of one k
    HEADRACE_INLINE static void pair(const std::byte* at, int half, Float& even, Float& odd) {
        const auto* p = reinterpret_cast<const float*>(at) + 16 * half;
        even = load(p), odd = load(p + PANEL);
    }
};

// Two bf16 of consecutive k share a word, the even one below: a shift and a mask make floats of them, no shuffle.
struct PanelBF16 {
    static constexpr int64_t STRIDE = PANEL * 2;
    HEADRACE_INLINE static void pair(const std::byte* at, int half, Float& even, Float& odd) {
        const Int words = load(reinterpret_cast<const int32_t*>(at) + 16 * half);
        even = as_float(shift_left<16>(words));
        odd = as_float(words & splat(int32_t(0xffff0000u)));
    }
};

struct PanelF16 {
    static constexpr int64_t STRIDE = PANEL * 2;
    HEADRACE_INLINE static void pair(const std::byte* at, int half, Float& even, Float& odd) {
        const auto* p = reinterpret_cast<const uint16_t*>(at) + 16 * half;
        even = load_f16(p), odd = load_f16(p + PANEL);
    }
};

HEADRACE_INLINE int64_t panel_bytes(Format format, int64_t depth) { return depth * PANEL * (format == FP32 ? 4 : 2); }

// c[m][0..16 V) += panel[depth][16 V] * x: M rows of V vectors, accumulators in registers.
// panel: stride ``ld`` floats between k. x: element (m, k) at m * row_step + k * k_step. c: stride ``ldc`` between rows.
// ahead: memory to be asked for meanwhile, ``stride`` bytes for each k; anywhere, since asking never faults.
template <int M, int V>
HEADRACE_INLINE void tile(const float* panel, int64_t ld, int64_t depth, const float* x, int64_t k_step,
                          int64_t row_step, float* c, int64_t ldc, const std::byte* ahead, int64_t stride) {
    Float acc[M][V];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[m][v] = load(c + m * ldc + 16 * v);
    for (int64_t k = 0; k < depth; ++k) {
        __builtin_prefetch(ahead + stride * k);
        Float w[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) w[v] = load(panel + k * ld + 16 * v);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const Float value = splat(x[m * row_step + k * k_step]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) acc[m][v] = fma(w[v], value, acc[m][v]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) store(c + m * ldc + 16 * v, acc[m][v]);
}

template <int V>
inline void tile_rows(int64_t rows, const float* panel, int64_t ld, int64_t depth, const float* x, int64_t k_step,
                      int64_t row_step, float* c, int64_t ldc, const std::byte* ahead, int64_t stride) {
    switch (rows) {
#define HEADRACE_ROWS(m) \
    case m: return tile<(m <= ROWS ? m : 1), V>(panel, ld, depth, x, k_step, row_step, c, ldc, ahead, stride);
        HEADRACE_ROWS(1)
        HEADRACE_ROWS(2)
        HEADRACE_ROWS(3)
        HEADRACE_ROWS(4)
        HEADRACE_ROWS(5)
        HEADRACE_ROWS(6)
        HEADRACE_ROWS(7)
        HEADRACE_ROWS(8)
        HEADRACE_ROWS(9)
        HEADRACE_ROWS(10)
        HEADRACE_ROWS(11)
        HEADRACE_ROWS(12)
#undef HEADRACE_ROWS
    }
}

// c[rows][16 * vectors] += panel * x for any number of rows and vectors. ahead: memory to be asked for meanwhile, or null.
inline void multiply(const float* panel, int64_t ld, int64_t vectors, int64_t depth, const float* x, int64_t k_step,
                     int64_t row_step, int64_t rows, float* c, int64_t ldc, const std::byte* ahead = nullptr) {
    const auto* here = reinterpret_cast<const std::byte*>(c);
    for (int64_t row = 0; row < rows; row += ROWS) {
        const int64_t some = std::min(ROWS, rows - row);
        const bool asks = ahead && !row;
        int64_t v = 0;
        for (; v + VECTORS <= vectors; v += VECTORS)
            tile_rows<VECTORS>(some, panel + 16 * v, ld, depth, x + row * row_step, k_step, row_step,
                               c + row * ldc + 16 * v, ldc, asks ? ahead + v * depth * 64 : here, asks ? 64 : 0);
        if (v < vectors)
            tile_rows<1>(some, panel + 16 * v, ld, depth, x + row * row_step, k_step, row_step,
                         c + row * ldc + 16 * v, ldc, here, 0);
    }
}

// Rows as ``multiply_panel`` wants them: blocks of ROWS rows, each [K][rows of the block], so that a tile walks along
// contiguous memory. The same bytes as the rows, in another order; element (row, k) is at:
HEADRACE_INLINE int64_t packed_at(int64_t row, int64_t k, int64_t rows, int64_t width) {
    const int64_t block = row / ROWS, wide = std::min(ROWS, rows - block * ROWS);
    return block * ROWS * width + k * wide + (row - block * ROWS);
}

// Few rows: weights go from memory to registers and are used there. V vectors of the panel, from ``half`` on.
template <class Panel, int M, int V>
HEADRACE_INLINE void direct(const std::byte* panel, int half, int64_t width, const float* x, float* c) {
    constexpr int64_t AHEAD = 4096;  // bytes; the next lines of the stream are on their way while these are used
    Float acc[M][V];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[m][v] = splat(0.0f);
    for (int64_t k = 0; k < width; k += 2) {
        Float even[V], odd[V];
        const std::byte* at = panel + k * Panel::STRIDE;
        for (int64_t line = 0; line < 2 * Panel::STRIDE; line += 64) __builtin_prefetch(at + AHEAD + line);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) Panel::pair(at, half + v, even[v], odd[v]);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const Float value = splat(x[k * M + m]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) acc[m][v] = fma(even[v], value, acc[m][v]);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const Float value = splat(x[(k + 1) * M + m]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) acc[m][v] = fma(odd[v], value, acc[m][v]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) store(c + m * PANEL + 16 * (half + v), acc[m][v]);
}

// A whole panel at once where its accumulators fit the registers, else one half after the other.
template <class Panel, int M>
inline void direct_panel(const std::byte* panel, int64_t width, const float* x, float* c) {
    if constexpr (M <= DIRECT_WHOLE) {
        direct<Panel, M, 2>(panel, 0, width, x, c);
    } else {
        direct<Panel, M, 1>(panel, 0, width, x, c);
        direct<Panel, M, 1>(panel, 1, width, x, c);
    }
}

// More rows: a piece of the panel is unpacked to fp32 once and used for all of them.
template <class Panel>
inline void banded(const std::byte* panel, int64_t width, const float* x, int64_t rows, float* c, float* unpacked) {
    for (int64_t i = 0; i < rows * PANEL; i += 16) store(c + i, splat(0.0f));
    for (int64_t k0 = 0; k0 < width; k0 += DEPTH) {
        const int64_t depth = std::min(DEPTH, width - k0);
        const std::byte* piece = panel + k0 * Panel::STRIDE;
        for (int64_t k = 0; k < depth; k += 2)
            for (int half = 0; half < 2; ++half) {
                Float even, odd;
                Panel::pair(piece + k * Panel::STRIDE, half, even, odd);
                store(unpacked + k * PANEL + 16 * half, even), store(unpacked + (k + 1) * PANEL + 16 * half, odd);
            }
        for (int64_t row = 0; row < rows; row += ROWS) {
            const int64_t some = std::min(ROWS, rows - row);
            // While a piece is used the memory would be idle: the next one is asked for.
            multiply(unpacked, PANEL, 2, depth, x + row * width + k0 * some, some, 1, some, c + row * PANEL, PANEL,
                     row ? nullptr : piece + depth * Panel::STRIDE);
        }
    }
}

// c [rows][32] = panel * x, for rows <= BAND packed as above. own: the thread's memory, DEPTH * PANEL floats of it used.
template <class Panel>
inline void multiply_panel(const std::byte* panel, int64_t width, const float* x, int64_t rows, float* c, float* own) {
    switch (rows) {
#define HEADRACE_DIRECT(m) \
    case m:                \
        if constexpr (m <= ROWS) return direct_panel<Panel, m>(panel, width, x, c);
        HEADRACE_DIRECT(1)
        HEADRACE_DIRECT(2)
        HEADRACE_DIRECT(3)
        HEADRACE_DIRECT(4)
        HEADRACE_DIRECT(5)
        HEADRACE_DIRECT(6)
        HEADRACE_DIRECT(7)
        HEADRACE_DIRECT(8)
        HEADRACE_DIRECT(9)
        HEADRACE_DIRECT(10)
        HEADRACE_DIRECT(11)
        HEADRACE_DIRECT(12)
#undef HEADRACE_DIRECT
        default: return banded<Panel>(panel, width, x, rows, c, own);
    }
}

inline void multiply_panel(Format format, const std::byte* panel, int64_t width, const float* x, int64_t rows, float* c,
                           float* own) {
    switch (format) {
        case FP32: return multiply_panel<PanelF32>(panel, width, x, rows, c, own);
#if defined(__AVX512BF16__)
        case BF16: return dot_panel(panel, width, x, rows, ROWS, c);
#else
        case BF16: return multiply_panel<PanelBF16>(panel, width, x, rows, c, own);
#endif
        case FP16: return multiply_panel<PanelF16>(panel, width, x, rows, c, own);
    }
}

}  // namespace headrace
