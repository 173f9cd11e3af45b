// simd.h's operations in AVX-512: a register of sixteen lanes.
#pragma once

namespace headrace {

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
// 1/256 of e4m3 numbers that are no NaN.
HEADRACE_INLINE Float load_e4m3_256th(const uint8_t* p) {
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
    return {_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(int16_t(0xbfff))))};
}
// Two e2m1 of each lane, as pack_e2m1 has laid them.
HEADRACE_INLINE void load_e2m1(const uint8_t* p, Float& even, Float& odd) {
    const __m512 values = _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6);
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    even = {_mm512_permutexvar_ps(codes, values)};  // looks at four bits only
    odd = {_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), values)};
}
// From a byte for each lane, the even code in its low half.
HEADRACE_INLINE void pack_e2m1(const uint8_t* from, uint8_t* to) { std::memcpy(to, from, LANES); }
// The other way round.
HEADRACE_INLINE void unpack_e2m1(const uint8_t* from, uint8_t* to) { std::memcpy(to, from, LANES); }
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

}  // namespace headrace
