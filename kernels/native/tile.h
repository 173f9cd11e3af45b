// Products of a weight panel with a block of rows: the one loop under every matrix product of this backend.
//
// Lanes are outputs. A panel holds 32 of them; for each k, in order, its 32 weights meet one value of a row:
// acc[row][output] = fma(weight[k][output], x[row][k], acc[row][output]). So an element is one chain over K, whatever the
// number of rows, threads or the instruction path: GEMV and GEMM give the same bits.
#pragma once

#include <algorithm>

#include "dot_bf16.h"
#include "panels.h"

namespace headrace {

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

// c[rows][16 * vectors] += panel * x for any number of rows and vectors. ahead: memory to be asked for meanwhile, or null;
// ``stride`` bytes of it for each k and VECTORS of the vectors.
inline void multiply(const float* panel, int64_t ld, int64_t vectors, int64_t depth, const float* x, int64_t k_step,
                     int64_t row_step, int64_t rows, float* c, int64_t ldc, const std::byte* ahead = nullptr,
                     int64_t stride = 0) {
    const auto* here = reinterpret_cast<const std::byte*>(c);
    for (int64_t row = 0; row < rows; row += ROWS) {
        const int64_t some = std::min(ROWS, rows - row);
        const bool asks = ahead && !row;
        int64_t v = 0;
        for (; v + VECTORS <= vectors; v += VECTORS)
            tile_rows<VECTORS>(some, panel + 16 * v, ld, depth, x + row * row_step, k_step, row_step,
                               c + row * ldc + 16 * v, ldc, asks ? ahead + v / VECTORS * depth * stride : here, asks ? stride : 0);
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
    for (int64_t k0 = 0; k0 < width; k0 += Panel::BLOCK) {
        const std::byte* at = panel + panel_offset<Panel>(k0);
        for (int64_t line = 0; line < panel_offset<Panel>(Panel::BLOCK); line += 64) __builtin_prefetch(at + AHEAD + line);
        Panel blocks[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) blocks[v].open(at, half + v);
        for (int64_t k = k0; k < k0 + Panel::BLOCK; k += 2) {
            Float even[V], odd[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) blocks[v].pair(k - k0, even[v], odd[v]);
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
    constexpr int64_t AHEAD = std::min(int64_t(64), Panel::BYTES / Panel::BLOCK * VECTORS / 2);
    for (int64_t i = 0; i < rows * PANEL; i += 16) store(c + i, splat(0.0f));
    for (int64_t k0 = 0; k0 < width; k0 += DEPTH) {
        const int64_t depth = std::min(DEPTH, width - k0);
        const std::byte* piece = panel + panel_offset<Panel>(k0);
        for (int64_t block = 0; block < depth; block += Panel::BLOCK)
            for (int half = 0; half < 2; ++half) {
                Panel opened;
                opened.open(piece + panel_offset<Panel>(block), half);
                for (int64_t k = 0; k < Panel::BLOCK; k += 2) {
                    Float even, odd;
                    opened.pair(k, even, odd);
                    float* out = unpacked + (block + k) * PANEL + 16 * half;
                    store(out, even), store(out + PANEL, odd);
                }
            }
        for (int64_t row = 0; row < rows; row += ROWS) {
            const int64_t some = std::min(ROWS, rows - row);
            // While a piece is used the memory would be idle: the next one is asked for.
            multiply(unpacked, PANEL, 2, depth, x + row * width + k0 * some, some, 1, some, c + row * PANEL, PANEL,
                     row ? nullptr : piece + panel_offset<Panel>(depth), AHEAD);
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
        case FP8: return multiply_panel<PanelFp8>(panel, width, x, rows, c, own);
        case NVFP4: return multiply_panel<PanelNvfp4>(panel, width, x, rows, c, own);
    }
}

}  // namespace headrace
