// Dense projections, y = residual + f(norm(x)) W^T + bias, and the packing of weights into panels.

#include <atomic>

#include "ops.h"
#include "rows.h"

namespace headrace {

namespace {

// A panel is its source transposed: rows become lanes. Word is what stays together: an element, or two of 16 bits.
template <class Word>
void transpose(const PackArgs& a, int64_t panel) {
    constexpr int64_t STRIP = 16;  // words: a line of each of 32 rows of the source
    constexpr int64_t AHEAD = 256;  // bytes
    const int64_t step = a.format == BF16 ? 2 : 1, element = a.format == FP32 ? 4 : 2;
    const int64_t words = a.columns / step, stride = a.stride * element, from = std::max(a.first_row, panel * PANEL);
    const int64_t lanes = std::min(a.first_row + a.rows, (panel + 1) * PANEL) - from;
    const std::byte* source = a.source + (from - a.first_row) * stride;
    std::byte* out = a.panels + panel_bytes(Format(a.format), a.width) * panel +
                     (a.first_column / step * PANEL + from % PANEL) * int64_t(sizeof(Word));
    int64_t strip = 0;
    if constexpr (sizeof(Word) == 4)
        if (lanes == PANEL)
            for (; strip + STRIP <= words; strip += STRIP)
                for (int64_t lane = 0; lane < PANEL; lane += LANES) {
                    Float lines[LANES];
                    for (int64_t i = 0; i < LANES; ++i) {
                        const std::byte* at = source + (lane + i) * stride + strip * 4;
                        __builtin_prefetch(at + AHEAD);
                        lines[i] = load(reinterpret_cast<const float*>(at));
                    }
                    transpose(lines);
                    for (int64_t i = 0; i < LANES; ++i)
                        store(reinterpret_cast<float*>(out) + (strip + i) * PANEL + lane, lines[i]);
                }
    for (; strip < words; strip += STRIP) {
        const int64_t end = std::min(strip + STRIP, words);
        for (int64_t lane = 0; lane < lanes; ++lane) {
            Word line[STRIP];
            const size_t some = size_t(end - strip) * sizeof(Word);
            std::memcpy(line, source + lane * stride + strip * int64_t(sizeof(Word)), some);
            for (int64_t k = strip; k < end; ++k)
                std::memcpy(out + (k * PANEL + lane) * int64_t(sizeof(Word)), line + k - strip, sizeof(Word));
        }
    }
}

// Pairs of k that the source's columns do not fill, or do not begin with, one element at a time.
void transpose_odd(const PackArgs& a, int64_t panel) {
    const auto* source = reinterpret_cast<const uint16_t*>(a.source);
    auto* out = reinterpret_cast<uint16_t*>(a.panels) + panel * a.width * PANEL;
    const int64_t from = std::max(a.first_row, panel * PANEL), to = std::min(a.first_row + a.rows, (panel + 1) * PANEL);
    for (int64_t row = from; row < to; ++row)
        for (int64_t column = 0; column < a.columns; ++column) {
            const int64_t k = a.first_column + column;
            out[k / 2 * 2 * PANEL + 2 * (row % PANEL) + k % 2] = source[(row - a.first_row) * a.stride + column];
        }
}

// FP8: bytes in the order of k.
void transpose_fp8(const PackArgs& a, int64_t panel) {
    const auto* source = reinterpret_cast<const uint8_t*>(a.source);
    auto* out = reinterpret_cast<uint8_t*>(a.panels) + panel * panel_bytes(FP8, a.width);
    const int64_t from = std::max(a.first_row, panel * PANEL), to = std::min(a.first_row + a.rows, (panel + 1) * PANEL);
    bool nan = false;
    for (int64_t strip = 0; strip < a.columns; strip += 64)  // a line of each row of the source
        for (int64_t row = from; row < to; ++row)
            for (int64_t column = strip; column < std::min(strip + 64, a.columns); ++column) {
                const uint8_t byte = source[(row - a.first_row) * a.stride + column];
                nan |= (byte & 0x7f) == 0x7f;
                out[(a.first_column + column) * PANEL + row % PANEL] = byte;
            }
    if (nan) std::atomic_ref(*a.nans).store(1, std::memory_order_relaxed);
}

// NVFP4: blocks of 16 k; see PanelNvfp4. Rows that share a panel may come from several sources.
void transpose_nvfp4(const PackArgs& a, int64_t panel) {
    constexpr int64_t BLOCK = PanelNvfp4::BLOCK;
    const int64_t from = std::max(a.first_row, panel * PANEL), to = std::min(a.first_row + a.rows, (panel + 1) * PANEL);
    const auto* codes = reinterpret_cast<const uint8_t*>(a.source);
    const auto* scales = reinterpret_cast<const uint8_t*>(a.block_scales);
    auto* out = reinterpret_cast<uint8_t*>(a.panels) + panel * panel_bytes(NVFP4, a.width);
    bool nan = false;
    for (int64_t block = 0; block < a.columns / BLOCK; ++block, out += PanelNvfp4::BYTES) {
        for (int64_t row = from; row < to; ++row) {
            const uint8_t scale = scales[(row - a.first_row) * (a.columns / BLOCK) + block];
            nan |= (scale & 0x7f) == 0x7f;
            out[row % PANEL] = scale;
        }
        for (int64_t pair = 0; pair < BLOCK / 2; ++pair)
            for (int64_t half = 0; half < PANEL; half += LANES) {
                uint8_t* at = out + PANEL + pair * PANEL + half;
                uint8_t lanes[LANES], laid[LANES];
                unpack_e2m1(at, lanes);  // what another source left there
                for (int64_t lane = 0; lane < LANES; ++lane) {
                    const int64_t row = panel * PANEL + half + lane;
                    if (row >= from && row < to)
                        lanes[lane] = codes[(row - a.first_row) * a.stride + block * (BLOCK / 2) + pair];
                }
                pack_e2m1(lanes, laid);
                std::memcpy(at, laid, LANES);
            }
    }
    if (nan) std::atomic_ref(*a.nans).store(1, std::memory_order_relaxed);
}

}  // namespace

void pack(Pool& pool, const PackArgs& a) {
    const int64_t first = a.first_row / PANEL;
    pool.items(0, (a.first_row + a.rows + PANEL - 1) / PANEL - first);
    pool.run([&](int thread) {
        pool.each(thread, 0, 1, [&](int64_t begin, int64_t) {
            if (a.format == FP8) return transpose_fp8(a, first + begin);
            if (a.format == NVFP4) return transpose_nvfp4(a, first + begin);
            const bool odd = a.format == BF16 && (a.first_column % 2 || a.columns % 2);
            if (odd) return transpose_odd(a, first + begin);
            a.format == FP16 ? transpose<uint16_t>(a, first + begin) : transpose<uint32_t>(a, first + begin);
        });
    });
}

namespace {

constexpr int64_t COLUMNS = 1024;  // of a block of rows that one thread prepares at a time

// Columns [begin, end) of f(norm(x)) for the rows of one block.
void prepare(const LinearArgs& a, float* packed, int64_t first_row, int64_t begin, int64_t end) {
    const int64_t columns = a.columns[0] + a.columns[1];
    float values[COLUMNS];
    for (int64_t row = first_row; row < std::min(first_row + ROWS, a.rows); ++row) {
        auto at = [&](int64_t k) {
            return k < a.columns[0] ? a.x[0] + row * a.stride[0] + k : a.x[1] + row * a.stride[1] + k - a.columns[0];
        };
        for (int64_t k = begin; k < end; ++k) values[k - begin] = k < columns ? *at(k) : 0.0f;
        if (a.norm_weight) {
            const int64_t width = columns / a.norm_groups;
            for (int64_t group = begin / width; group * width < std::min(end, columns); ++group) {
                float factor;
                if (a.norm_groups == 1 && a.columns[1]) {  // one group over both inputs
                    const float squares = sum_of_squares(at(0), a.columns[0]) + sum_of_squares(at(a.columns[0]), a.columns[1]);
                    factor = 1.0f / std::sqrt(squares / float(width) + float(a.norm_eps));
                } else {
                    factor = rms_factor(at(group * width), width, a.norm_eps);
                }
                const int64_t from = std::max(begin, group * width), to = std::min({end, (group + 1) * width, columns});
                for (int64_t k = from; k < to; ++k) values[k - begin] = values[k - begin] * factor * a.norm_weight[k];
            }
        }
        for (int64_t k = std::max(begin, a.relu2_from); k < std::min(end, columns); ++k) {
            const float v = values[k - begin] < 0.0f ? 0.0f : values[k - begin];
            values[k - begin] = v * v;
        }
        pack_columns(Format(a.format), packed, row, a.rows, a.width, begin, end,
                     [&](int64_t k) { return values[k - begin]; });
    }
}

void finish(const LinearArgs& a, const float* c, int64_t first_row, int64_t rows, int64_t panel) {
    const int64_t from = panel * PANEL, count = std::min(PANEL, a.outputs - from);
    for (int64_t i = 0; i < rows; ++i) {
        const float* residual = a.residual ? a.residual + (first_row + i) * a.residual_stride + from : nullptr;
        float* y = a.y + (first_row + i) * a.outputs + from;
        for (int64_t n = 0; n < count; ++n) {
            float v = c[i * PANEL + n];
            if (a.scale) v *= a.scale[from + n];
            if (a.bias) v += a.bias[from + n];
            y[n] = residual ? residual[n] + v : v;
        }
    }
}

}  // namespace

void linear(Pool& pool, const LinearArgs& a) {
    const int64_t blocks = (a.rows + ROWS - 1) / ROWS, pieces = (a.width + COLUMNS - 1) / COLUMNS;
    const int64_t panels = (a.outputs + PANEL - 1) / PANEL, bands = (a.rows + BAND - 1) / BAND;
    auto* packed = reinterpret_cast<float*>(pool.shared(size_t(a.rows * a.width) * sizeof(float)));
    pool.items(0, blocks * pieces);
    pool.items(1, bands * panels);
    pool.run([&](int thread) {
        auto* own = reinterpret_cast<float*>(pool.own(thread));
        pool.each(thread, 0, 1, [&](int64_t item, int64_t) {
            const int64_t begin = item % pieces * COLUMNS;
            prepare(a, packed, item / pieces * ROWS, begin, std::min(begin + COLUMNS, a.width));
        });
        pool.each(thread, 1, 1, [&](int64_t item, int64_t) {
            const int64_t row = item / panels * BAND, rows = std::min(BAND, a.rows - row), panel = item % panels;
            float* c = own + DEPTH * PANEL;
            const std::byte* weights = a.panels + panel * panel_bytes(Format(a.format), a.width);
            multiply_panel(Format(a.format), weights, a.width, packed + row * a.width, rows, c, own);
            finish(a, c, row, rows, panel);
        });
    });
}

}  // namespace headrace
