// Rows on their way into a product: gathered, normed or activated, and laid out for its tiles.
#pragma once

#include "math.h"
#include "tile.h"

namespace headrace {

// Sixteen chains, one per lane, then a tree: an order that follows from the width alone.
inline float sum_of_squares(const float* x, int64_t width) {
    Float acc = splat(0.0f);
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) {
        const Float v = load(x + k);
        acc = fma(v, v, acc);
    }
    if (k < width) {
        const Float v = load_some(x + k, width - k);
        acc = fma(v, v, acc);
    }
    return sum(acc);
}

inline float rms_factor(const float* x, int64_t width, double eps) {
    return 1.0f / std::sqrt(sum_of_squares(x, width) / float(width) + float(eps));
}

// to[column][row] = from[row][column], in blocks of 16 x 16; where ``fill``, zeros up to the next multiple of 16 rows.
template <bool fill>
inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                      int64_t to_stride) {
    for (int64_t row = 0; row < rows; row += LANES) {
        const int64_t high = std::min(LANES, rows - row);
        for (int64_t column = 0; column < columns; column += LANES) {
            const int64_t wide = std::min(LANES, columns - column);
            Float block[LANES];
            for (int64_t i = 0; i < LANES; ++i) {
                const float* at = from + (row + i) * from_stride + column;
                block[i] = i >= high ? splat(0.0f) : wide == LANES ? load(at) : load_some(at, wide);
            }
            transpose(block);
            for (int64_t j = 0; j < wide; ++j) {
                float* at = to + (column + j) * to_stride + row;
                fill || high == LANES ? store(at, block[j]) : store_some(at, block[j], high);
            }
        }
    }
}

// One row into its place among packed rows (tile.h), as the panels' format wants it: columns [begin, end) of value(k).
template <class Value>
HEADRACE_INLINE void pack_columns(Format format, float* packed, int64_t row, int64_t rows, int64_t width, int64_t begin,
                                  int64_t end, Value&& value) {
    const int64_t step = std::min(ROWS, rows - row / ROWS * ROWS);
    float* out = packed + packed_at(row, 0, rows, width);
#if defined(__AVX512BF16__)
    if (format == BF16) {
        // Pairs of bf16 where the floats would be: they take half the room.
        auto* pairs = reinterpret_cast<uint16_t*>(out - row % ROWS) + 2 * (row % ROWS);
        for (int64_t k = begin; k < end; ++k) pairs[k / 2 * 2 * step + k % 2] = round_to_bf16(value(k));
        return;
    }
#endif
    (void)format;
    for (int64_t k = begin; k < end; ++k) out[k * step] = value(k);
}

}  // namespace headrace
