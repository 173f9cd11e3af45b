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

#if defined(__AVX512F__)

struct Float {
    __m512 v;
};
struct Int {
    __m512i v;
};
struct Mask {
    __mmask16 v;
};

HEADRACE_INLINE Float splat(float x) { return {_mm512_set1_ps(x)}; }
HEADRACE_INLINE Float load(const float* p) { return {_mm512_loadu_ps(p)}; }
HEADRACE_INLINE void store(float* p, Float x) { _mm512_storeu_ps(p, x.v); }
HEADRACE_INLINE Float fma(Float a, Float b, Float c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
HEADRACE_INLINE Float operator+(Float a, Float b) { return {_mm512_add_ps(a.v, b.v)}; }
HEADRACE_INLINE Float operator-(Float a, Float b) { return {_mm512_sub_ps(a.v, b.v)}; }
HEADRACE_INLINE Float operator*(Float a, Float b) { return {_mm512_mul_ps(a.v, b.v)}; }
HEADRACE_INLINE Float operator/(Float a, Float b) { return {_mm512_div_ps(a.v, b.v)}; }
// The second operand where either is a NaN, as maxps has it.
HEADRACE_INLINE Float max(Float a, Float b) { return {_mm512_max_ps(a.v, b.v)}; }
HEADRACE_INLINE Float min(Float a, Float b) { return {_mm512_min_ps(a.v, b.v)}; }
HEADRACE_INLINE Float round_even(Float a) { return {_mm512_roundscale_ps(a.v, 0)}; }
HEADRACE_INLINE Float floor(Float a) { return {_mm512_roundscale_ps(a.v, 1)}; }
HEADRACE_INLINE Mask operator<(Float a, Float b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
HEADRACE_INLINE Mask operator==(Float a, Float b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
HEADRACE_INLINE Float select(Mask m, Float yes, Float no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }
HEADRACE_INLINE uint32_t bits(Mask m) { return m.v; }

HEADRACE_INLINE Int splat(int32_t x) { return {_mm512_set1_epi32(x)}; }
HEADRACE_INLINE Int load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
HEADRACE_INLINE void store(int32_t* p, Int x) { _mm512_storeu_si512(p, x.v); }
HEADRACE_INLINE Int operator+(Int a, Int b) { return {_mm512_add_epi32(a.v, b.v)}; }
HEADRACE_INLINE Int operator-(Int a, Int b) { return {_mm512_sub_epi32(a.v, b.v)}; }
HEADRACE_INLINE Int operator&(Int a, Int b) { return {_mm512_and_si512(a.v, b.v)}; }
HEADRACE_INLINE Int operator|(Int a, Int b) { return {_mm512_or_si512(a.v, b.v)}; }
HEADRACE_INLINE Int operator^(Int a, Int b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int n>
HEADRACE_INLINE Int shift_left(Int a) { return {_mm512_slli_epi32(a.v, n)}; }
template <int n>
HEADRACE_INLINE Int shift_right(Int a) { return {_mm512_srli_epi32(a.v, n)}; }
HEADRACE_INLINE Int as_int(Float a) { return {_mm512_castps_si512(a.v)}; }
HEADRACE_INLINE Float as_float(Int a) { return {_mm512_castsi512_ps(a.v)}; }
HEADRACE_INLINE Int to_int(Float a) { return {_mm512_cvtps_epi32(a.v)}; }  // to the nearest, ties to even
HEADRACE_INLINE Float to_float(Int a) { return {_mm512_cvtepi32_ps(a.v)}; }
// High and low words of unsigned products.
HEADRACE_INLINE void multiply_wide(Int a, uint32_t b, Int& high, Int& low) {
    const __m512i factor = _mm512_set1_epi64(b);
    const __m512i even = _mm512_mul_epu32(a.v, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
    high = {_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)};
    low = {_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))};
}
// Four times four lanes turned: lane 4 j + e of vector i changes places with lane 4 j + i of vector e.
HEADRACE_INLINE void turn(Int v[4]) {
    const __m512i a = _mm512_unpacklo_epi32(v[0].v, v[1].v), b = _mm512_unpackhi_epi32(v[0].v, v[1].v);
    const __m512i c = _mm512_unpacklo_epi32(v[2].v, v[3].v), d = _mm512_unpackhi_epi32(v[2].v, v[3].v);
    v[0] = {_mm512_unpacklo_epi64(a, c)}, v[1] = {_mm512_unpackhi_epi64(a, c)};
    v[2] = {_mm512_unpacklo_epi64(b, d)}, v[3] = {_mm512_unpackhi_epi64(b, d)};
}
// The chosen lanes one after the other; all sixteen places at ``p`` are written. Returns how many were chosen.
HEADRACE_INLINE int64_t compress(float* p, uint32_t chosen, Float x) {
    store(p, Float{_mm512_maskz_compress_ps(__mmask16(chosen), x.v)});
    return __builtin_popcount(chosen);
}
HEADRACE_INLINE Int load_u8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
HEADRACE_INLINE Int load_u16(const uint16_t* p) { return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p))}; }
HEADRACE_INLINE Float load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
// An e4m3 with its exponent 8 too small is a half, subnormals too; only its one NaN is a number there.
HEADRACE_INLINE Float load_e4m3(const uint8_t* p) {
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
    const __m256i half = _mm256_and_si256(wide, _mm256_set1_epi16(int16_t(0xbfff)));
    const __m256i magnitude = _mm256_and_si256(half, _mm256_set1_epi16(0x7fff));
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x3f80));
    return {_mm512_mul_ps(_mm512_cvtph_ps(_mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00))), _mm512_set1_ps(256.0f))};
}
HEADRACE_INLINE void store_u16(uint16_t* p, Int x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(x.v)); }
HEADRACE_INLINE void store_f16(uint16_t* p, Float x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, 0)); }
// Lane i of x[j] changes places with lane j of x[i].
HEADRACE_INLINE void transpose(Float (&x)[LANES]) {
    __m512 a[LANES], b[LANES];
    for (int i = 0; i < LANES; i += 4) {  // four rows: their quarters become 4 x 4 transposed
        const __m512 p = _mm512_unpacklo_ps(x[i].v, x[i + 1].v), q = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
        const __m512 r = _mm512_unpacklo_ps(x[i + 2].v, x[i + 3].v), s = _mm512_unpackhi_ps(x[i + 2].v, x[i + 3].v);
        a[i] = _mm512_shuffle_ps(p, r, 0x44), a[i + 1] = _mm512_shuffle_ps(p, r, 0xee);
        a[i + 2] = _mm512_shuffle_ps(q, s, 0x44), a[i + 3] = _mm512_shuffle_ps(q, s, 0xee);
    }
    for (int i = 0; i < 4; ++i)  // then the quarters change places
        for (int half = 0; half < 2; ++half) {
            b[i + 8 * half] = _mm512_shuffle_f32x4(a[i + 8 * half], a[i + 8 * half + 4], 0x88);
            b[i + 8 * half + 4] = _mm512_shuffle_f32x4(a[i + 8 * half], a[i + 8 * half + 4], 0xdd);
        }
    for (int i = 0; i < 4; ++i)
        for (int odd = 0; odd < 2; ++odd) {
            x[i + 4 * odd].v = _mm512_shuffle_f32x4(b[i + 4 * odd], b[i + 4 * odd + 8], 0x88);
            x[i + 4 * odd + 8].v = _mm512_shuffle_f32x4(b[i + 4 * odd], b[i + 4 * odd + 8], 0xdd);
        }
}
// Lane i is sum(x[i]), below, in its order.
HEADRACE_INLINE Float sums(const Float (&x)[LANES]) {
    __m512 pairs[4];
    for (int i = 0; i < 4; ++i) {
        __m512 halves[2];
        for (int j = 0; j < 2; ++j) {
            const __m512 p = x[i + 8 * j].v, q = x[i + 8 * j + 4].v;
            halves[j] = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x44), _mm512_shuffle_f32x4(p, q, 0xee));
        }
        pairs[i] = _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                                 _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
    }
    for (int i = 0; i < 4; i += 2)
        pairs[i] = _mm512_add_ps(_mm512_shuffle_ps(pairs[i], pairs[i + 1], 0x44),
                                 _mm512_shuffle_ps(pairs[i], pairs[i + 1], 0xee));
    return {_mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[2], 0x88), _mm512_shuffle_ps(pairs[0], pairs[2], 0xdd))};
}

#elif defined(__AVX2__)

struct Float {
    __m256 a, b;
};
struct Int {
    __m256i a, b;
};
struct Mask {
    __m256 a, b;
};

HEADRACE_INLINE Float splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
HEADRACE_INLINE Float load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
HEADRACE_INLINE void store(float* p, Float x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
HEADRACE_INLINE Float fma(Float x, Float y, Float z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
HEADRACE_INLINE Float operator+(Float x, Float y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
HEADRACE_INLINE Float operator-(Float x, Float y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
HEADRACE_INLINE Float operator*(Float x, Float y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
HEADRACE_INLINE Float operator/(Float x, Float y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
HEADRACE_INLINE Float max(Float x, Float y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
HEADRACE_INLINE Float min(Float x, Float y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
HEADRACE_INLINE Float round_even(Float x) { return {_mm256_round_ps(x.a, 0), _mm256_round_ps(x.b, 0)}; }
HEADRACE_INLINE Float floor(Float x) { return {_mm256_floor_ps(x.a), _mm256_floor_ps(x.b)}; }
HEADRACE_INLINE Mask operator<(Float x, Float y) {
    return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)};
}
HEADRACE_INLINE Mask operator==(Float x, Float y) {
    return {_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ)};
}
HEADRACE_INLINE Float select(Mask m, Float yes, Float no) {
    return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}
HEADRACE_INLINE uint32_t bits(Mask m) { return _mm256_movemask_ps(m.a) | uint32_t(_mm256_movemask_ps(m.b)) << 8; }

HEADRACE_INLINE Int splat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
HEADRACE_INLINE Int load(const int32_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
HEADRACE_INLINE void store(int32_t* p, Int x) {
    _mm256_storeu_si256((__m256i*)p, x.a);
    _mm256_storeu_si256((__m256i*)(p + 8), x.b);
}
HEADRACE_INLINE Int operator+(Int x, Int y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
HEADRACE_INLINE Int operator-(Int x, Int y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
HEADRACE_INLINE Int operator&(Int x, Int y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
HEADRACE_INLINE Int operator|(Int x, Int y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
HEADRACE_INLINE Int operator^(Int x, Int y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
template <int n>
HEADRACE_INLINE Int shift_left(Int x) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
template <int n>
HEADRACE_INLINE Int shift_right(Int x) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
HEADRACE_INLINE Int as_int(Float x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
HEADRACE_INLINE Float as_float(Int x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
HEADRACE_INLINE Int to_int(Float x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
HEADRACE_INLINE Float to_float(Int x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
HEADRACE_INLINE void multiply_wide(__m256i x, __m256i y, __m256i& high, __m256i& low) {
    const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
HEADRACE_INLINE void multiply_wide(Int x, uint32_t y, Int& high, Int& low) {
    const __m256i factor = _mm256_set1_epi64x(y);
    multiply_wide(x.a, factor, high.a, low.a);
    multiply_wide(x.b, factor, high.b, low.b);
}
HEADRACE_INLINE void turn(__m256i& v0, __m256i& v1, __m256i& v2, __m256i& v3) {
    const __m256i a = _mm256_unpacklo_epi32(v0, v1), b = _mm256_unpackhi_epi32(v0, v1);
    const __m256i c = _mm256_unpacklo_epi32(v2, v3), d = _mm256_unpackhi_epi32(v2, v3);
    v0 = _mm256_unpacklo_epi64(a, c), v1 = _mm256_unpackhi_epi64(a, c);
    v2 = _mm256_unpacklo_epi64(b, d), v3 = _mm256_unpackhi_epi64(b, d);
}
HEADRACE_INLINE void turn(Int v[4]) {
    turn(v[0].a, v[1].a, v[2].a, v[3].a);
    turn(v[0].b, v[1].b, v[2].b, v[3].b);
}
HEADRACE_INLINE Int load_u8(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
HEADRACE_INLINE Int load_u16(const uint16_t* p) {
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
HEADRACE_INLINE Float load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
HEADRACE_INLINE __m256 e4m3_to_float(__m128i words) {  // sign-extended to 16 bits
    const __m128i half = _mm_and_si128(_mm_slli_epi16(words, 7), _mm_set1_epi16(int16_t(0xbfff)));
    const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(half, _mm_set1_epi16(0x7fff)), _mm_set1_epi16(0x3f80));
    const __m128i marked = _mm_or_si128(half, _mm_and_si128(nan, _mm_set1_epi16(0x4000)));
    return _mm256_mul_ps(_mm256_cvtph_ps(marked), _mm256_set1_ps(256.0f));
}
// An e4m3 with its exponent 8 too small is a half, subnormals too; only its one NaN is a number there.
HEADRACE_INLINE Float load_e4m3(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {e4m3_to_float(_mm_cvtepi8_epi16(bytes)), e4m3_to_float(_mm_cvtepi8_epi16(_mm_srli_si128(bytes, 8)))};
}
HEADRACE_INLINE void store_u16(uint16_t* p, Int x) {
    const __m256i low = splat(0xffff).a;
    const __m256i both = _mm256_packus_epi32(_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(both, 0xd8));
}
HEADRACE_INLINE void store_f16(uint16_t* p, Float x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, 0));
    _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, 0));
}
HEADRACE_INLINE void transpose_8x8(__m256 (&x)[8]) {
    __m256 a[8];
    for (int i = 0; i < 8; i += 4) {  // four rows: their halves become 4 x 4 transposed
        const __m256 p = _mm256_unpacklo_ps(x[i], x[i + 1]), q = _mm256_unpackhi_ps(x[i], x[i + 1]);
        const __m256 r = _mm256_unpacklo_ps(x[i + 2], x[i + 3]), s = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
        a[i] = _mm256_shuffle_ps(p, r, 0x44), a[i + 1] = _mm256_shuffle_ps(p, r, 0xee);
        a[i + 2] = _mm256_shuffle_ps(q, s, 0x44), a[i + 3] = _mm256_shuffle_ps(q, s, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        x[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
    }
}
HEADRACE_INLINE void transpose(Float (&x)[LANES]) {
    for (int rows = 0; rows < 2; ++rows) {
        __m256 left[8], right[8];
        for (int i = 0; i < 8; ++i) left[i] = x[8 * rows + i].a, right[i] = x[8 * rows + i].b;
        transpose_8x8(left), transpose_8x8(right);
        for (int i = 0; i < 8; ++i) x[8 * rows + i] = {left[i], right[i]};
    }
    for (int i = 0; i < 8; ++i) {  // the off-diagonal quarters change places
        const __m256 right = x[i].b;
        x[i].b = x[i + 8].a, x[i + 8].a = right;
    }
}
// Lane i is sum(x[i]), below, in its order.
HEADRACE_INLINE Float sums(const Float (&x)[LANES]) {
    __m256 result[2];
    for (int half = 0; half < 2; ++half) {
        __m256 pairs[4];
        for (int i = 0; i < 4; ++i) {
            const Float p = x[8 * half + i], q = x[8 * half + i + 4];
            const __m256 a = _mm256_add_ps(p.a, p.b), b = _mm256_add_ps(q.a, q.b);
            pairs[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
        }
        for (int i = 0; i < 4; i += 2)
            pairs[i] = _mm256_add_ps(_mm256_shuffle_ps(pairs[i], pairs[i + 1], 0x44),
                                     _mm256_shuffle_ps(pairs[i], pairs[i + 1], 0xee));
        result[half] = _mm256_add_ps(_mm256_shuffle_ps(pairs[0], pairs[2], 0x88),
                                     _mm256_shuffle_ps(pairs[0], pairs[2], 0xdd));
    }
    return {result[0], result[1]};
}

#else  // portable: plain loops, which a compiler turns into whatever vectors the machine has

struct Float {
    float v[LANES];
};
struct Int {
    uint32_t v[LANES];  // unsigned: wraps
};
struct Mask {
    uint32_t v;
};

#define HEADRACE_EACH(type, expression)                  \
    type r;                                              \
    for (int i = 0; i < LANES; ++i) r.v[i] = expression; \
    return r

HEADRACE_INLINE Float splat(float x) { HEADRACE_EACH(Float, x); }
HEADRACE_INLINE Float load(const float* p) { HEADRACE_EACH(Float, p[i]); }
HEADRACE_INLINE void store(float* p, Float x) { std::memcpy(p, x.v, sizeof x.v); }
HEADRACE_INLINE Float fma(Float a, Float b, Float c) { HEADRACE_EACH(Float, __builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
HEADRACE_INLINE Float operator+(Float a, Float b) { HEADRACE_EACH(Float, a.v[i] + b.v[i]); }
HEADRACE_INLINE Float operator-(Float a, Float b) { HEADRACE_EACH(Float, a.v[i] - b.v[i]); }
HEADRACE_INLINE Float operator*(Float a, Float b) { HEADRACE_EACH(Float, a.v[i] * b.v[i]); }
HEADRACE_INLINE Float operator/(Float a, Float b) { HEADRACE_EACH(Float, a.v[i] / b.v[i]); }
HEADRACE_INLINE Float max(Float a, Float b) { HEADRACE_EACH(Float, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
HEADRACE_INLINE Float min(Float a, Float b) { HEADRACE_EACH(Float, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
HEADRACE_INLINE Float round_even(Float a) { HEADRACE_EACH(Float, __builtin_nearbyintf(a.v[i])); }
HEADRACE_INLINE Float floor(Float a) { HEADRACE_EACH(Float, __builtin_floorf(a.v[i])); }
HEADRACE_INLINE Mask operator<(Float a, Float b) {
    Mask r{0};
    for (int i = 0; i < LANES; ++i) r.v |= uint32_t(a.v[i] < b.v[i]) << i;
    return r;
}
HEADRACE_INLINE Mask operator==(Float a, Float b) {
    Mask r{0};
    for (int i = 0; i < LANES; ++i) r.v |= uint32_t(a.v[i] == b.v[i]) << i;
    return r;
}
HEADRACE_INLINE Float select(Mask m, Float yes, Float no) { HEADRACE_EACH(Float, m.v >> i & 1 ? yes.v[i] : no.v[i]); }
HEADRACE_INLINE uint32_t bits(Mask m) { return m.v; }

HEADRACE_INLINE Int splat(int32_t x) { HEADRACE_EACH(Int, uint32_t(x)); }
HEADRACE_INLINE Int load(const int32_t* p) { HEADRACE_EACH(Int, uint32_t(p[i])); }
HEADRACE_INLINE void store(int32_t* p, Int x) { std::memcpy(p, x.v, sizeof x.v); }
HEADRACE_INLINE Int operator+(Int a, Int b) { HEADRACE_EACH(Int, a.v[i] + b.v[i]); }
HEADRACE_INLINE Int operator-(Int a, Int b) { HEADRACE_EACH(Int, a.v[i] - b.v[i]); }
HEADRACE_INLINE Int operator&(Int a, Int b) { HEADRACE_EACH(Int, a.v[i] & b.v[i]); }
HEADRACE_INLINE Int operator|(Int a, Int b) { HEADRACE_EACH(Int, a.v[i] | b.v[i]); }
HEADRACE_INLINE Int operator^(Int a, Int b) { HEADRACE_EACH(Int, a.v[i] ^ b.v[i]); }
template <int n>
HEADRACE_INLINE Int shift_left(Int a) { HEADRACE_EACH(Int, a.v[i] << n); }
template <int n>
HEADRACE_INLINE Int shift_right(Int a) { HEADRACE_EACH(Int, a.v[i] >> n); }
HEADRACE_INLINE Int as_int(Float a) {
    Int r;
    std::memcpy(r.v, a.v, sizeof r.v);
    return r;
}
HEADRACE_INLINE Float as_float(Int a) {
    Float r;
    std::memcpy(r.v, a.v, sizeof r.v);
    return r;
}
HEADRACE_INLINE Int to_int(Float a) { HEADRACE_EACH(Int, uint32_t(int32_t(__builtin_nearbyintf(a.v[i])))); }
HEADRACE_INLINE Float to_float(Int a) { HEADRACE_EACH(Float, float(int32_t(a.v[i]))); }
HEADRACE_INLINE void multiply_wide(Int a, uint32_t b, Int& high, Int& low) {
    for (int i = 0; i < LANES; ++i) {
        const uint64_t product = uint64_t(a.v[i]) * b;
        high.v[i] = uint32_t(product >> 32), low.v[i] = uint32_t(product);
    }
}
HEADRACE_INLINE void turn(Int v[4]) {
    for (int i = 0; i < 4; ++i)
        for (int e = 0; e < i; ++e)
            for (int j = 0; j < LANES; j += 4) {
                const uint32_t word = v[i].v[j + e];
                v[i].v[j + e] = v[e].v[j + i], v[e].v[j + i] = word;
            }
}
HEADRACE_INLINE Int load_u8(const uint8_t* p) { HEADRACE_EACH(Int, p[i]); }
HEADRACE_INLINE Int load_u16(const uint16_t* p) { HEADRACE_EACH(Int, p[i]); }
// IEEE half to float by exponent arithmetic; subnormals by a product that is exact.
HEADRACE_INLINE float half_to_float(uint16_t half) {
    uint32_t magnitude = uint32_t(half & 0x7fff) << 13, sign = uint32_t(half & 0x8000) << 16, word;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    std::memcpy(&word, &value, 4);
    word = (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : word) | sign;
    std::memcpy(&value, &word, 4);
    return value;
}
HEADRACE_INLINE Float load_f16(const uint16_t* p) { HEADRACE_EACH(Float, half_to_float(p[i])); }
// An e4m3 with its exponent 8 too small is a half, subnormals too; only its one NaN is a number there.
HEADRACE_INLINE float e4m3_to_float(uint8_t byte) {
    const uint32_t magnitude = byte & 0x7f, sign = uint32_t(byte & 0x80) << 8;
    return half_to_float(uint16_t(sign | (magnitude == 0x7f ? 0x7e00 : magnitude << 7))) * 256.0f;
}
HEADRACE_INLINE Float load_e4m3(const uint8_t* p) { HEADRACE_EACH(Float, e4m3_to_float(p[i])); }
// To the nearest half, ties to even; beyond 65520 infinite.
HEADRACE_INLINE uint16_t float_to_half(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    const uint32_t sign = word >> 16 & 0x8000, magnitude = word & 0x7fffffff;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);
    if (magnitude < 0x38800000u)  // subnormal: a multiple of 2^-24
        return uint16_t(sign | uint32_t(__builtin_nearbyintf(__builtin_fabsf(value) * 0x1p24f)));
    return uint16_t(sign | (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
HEADRACE_INLINE void store_u16(uint16_t* p, Int x) {
    for (int i = 0; i < LANES; ++i) p[i] = uint16_t(x.v[i]);
}
HEADRACE_INLINE void store_f16(uint16_t* p, Float x) {
    for (int i = 0; i < LANES; ++i) p[i] = float_to_half(x.v[i]);
}
HEADRACE_INLINE void transpose(Float (&x)[LANES]) {
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < i; ++j) std::swap(x[i].v[j], x[j].v[i]);
}
HEADRACE_INLINE float sum(Float x);
HEADRACE_INLINE Float sums(const Float (&x)[LANES]) { HEADRACE_EACH(Float, sum(x[i])); }

#undef HEADRACE_EACH

#endif

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
