// Weights as the products read them: panels of 32 outputs, k after k, in the format of the checkpoint.
#pragma once

#include "simd.h"

namespace headrace {

constexpr int64_t PANEL = 32;  // outputs of a panel

// The numbers are the ABI's (linear.py).
enum Format : int64_t { FP32 = 0, BF16 = 1, FP16 = 2, FP8 = 3, NVFP4 = 4 };

// A reader of one format: 16 outputs of a panel (``half`` says which), a block of consecutive k at a time and of that two
// k at a time, as fp32. K is a multiple of BLOCK; packing pads it with zeros. BYTES: of a block of all 32 outputs.
struct PanelF32 {
    static constexpr int64_t BLOCK = 2, BYTES = BLOCK * PANEL * 4;
    const float* at;
    HEADRACE_INLINE void open(const std::byte* block, int half) { at = reinterpret_cast<const float*>(block) + 16 * half; }
    HEADRACE_INLINE void pair(int64_t, Float& even, Float& odd) const { even = load(at), odd = load(at + PANEL); }
};

// Two bf16 of consecutive k share a word, the even one below: a shift and a mask make floats of them, no shuffle.
struct PanelBF16 {
    static constexpr int64_t BLOCK = 2, BYTES = BLOCK * PANEL * 2;
    const int32_t* at;
    HEADRACE_INLINE void open(const std::byte* block, int half) { at = reinterpret_cast<const int32_t*>(block) + 16 * half; }
    HEADRACE_INLINE void pair(int64_t, Float& even, Float& odd) const {
        const Int words = load(at);
        even = as_float(shift_left<16>(words));
        odd = as_float(words & splat(int32_t(0xffff0000u)));
    }
};

struct PanelF16 {
    static constexpr int64_t BLOCK = 2, BYTES = BLOCK * PANEL * 2;
    const uint16_t* at;
    HEADRACE_INLINE void open(const std::byte* block, int half) { at = reinterpret_cast<const uint16_t*>(block) + 16 * half; }
    HEADRACE_INLINE void pair(int64_t, Float& even, Float& odd) const { even = load_f16(at), odd = load_f16(at + PANEL); }
};

// e4m3, read as 1/256 of its value: one conversion from half, and the weight's scale makes up for it exactly.
struct PanelFp8 {
    static constexpr int64_t BLOCK = 2, BYTES = BLOCK * PANEL;
    const uint8_t* at;
    HEADRACE_INLINE void open(const std::byte* block, int half) { at = reinterpret_cast<const uint8_t*>(block) + 16 * half; }
    HEADRACE_INLINE void pair(int64_t, Float& even, Float& odd) const {
        even = load_e4m3_256th(at), odd = load_e4m3_256th(at + PANEL);
    }
};

// 16 k of e2m1 codes under one e4m3 scale per output: the scales, then two k after two k. Code times scale is exact: six
// significant bits.
struct PanelNvfp4 {
    static constexpr int64_t BLOCK = 16, BYTES = PANEL + BLOCK * PANEL / 2;
    const uint8_t* at;
    Float scale;
    HEADRACE_INLINE void open(const std::byte* block, int half) {
        at = reinterpret_cast<const uint8_t*>(block) + 16 * half;
        scale = load_e4m3(at);
    }
    HEADRACE_INLINE void pair(int64_t k, Float& even, Float& odd) const {
        load_e2m1(at + PANEL + k / 2 * PANEL, even, odd);
        even = even * scale, odd = odd * scale;
    }
};

// Bytes of ``depth`` k, a multiple of the block.
template <class Panel>
HEADRACE_INLINE constexpr int64_t panel_offset(int64_t depth) { return depth / Panel::BLOCK * Panel::BYTES; }

HEADRACE_INLINE int64_t panel_bytes(Format format, int64_t depth) {
    switch (format) {
        case FP32: return panel_offset<PanelF32>(depth);
        case BF16: return panel_offset<PanelBF16>(depth);
        case FP16: return panel_offset<PanelF16>(depth);
        case FP8: return panel_offset<PanelFp8>(depth);
        case NVFP4: return panel_offset<PanelNvfp4>(depth);
    }
    return 0;
}

}  // namespace headrace
