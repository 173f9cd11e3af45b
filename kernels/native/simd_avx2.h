// simd.h's operations in AVX2, FMA and F16C: two registers of eight lanes.
#pragma once

namespace headrace {

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
HEADRACE_INLINE __m256 e4m3_256th(__m128i words) {
    return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(words, 7), _mm_set1_epi16(int16_t(0xbfff))));
}
// 1/256 of e4m3 numbers that are no NaN.
HEADRACE_INLINE Float load_e4m3_256th(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {e4m3_256th(_mm_cvtepi8_epi16(bytes)), e4m3_256th(_mm_cvtepi8_epi16(_mm_srli_si128(bytes, 8)))};
}
// Two e2m1 of each lane, as pack_e2m1 has laid them: shuffled into bf16, the pair of a lane in one word.
HEADRACE_INLINE void load_e2m1(const uint8_t* p, Float& even, Float& odd) {
    const __m256i high = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, -128, -65, -65, -65, -64, -64, -64, -64));
    const __m256i low = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 0, -128, -64, 0, 0x40, -128, -64, 0, 0, -128, -64, 0, 0x40, -128, -64));
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    const __m256i moved = _mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    const __m256i codes = _mm256_and_si256(moved, _mm256_set1_epi8(15));
    const __m256i lows = _mm256_shuffle_epi8(low, codes), highs = _mm256_shuffle_epi8(high, codes);
    const __m256i a = _mm256_unpacklo_epi8(lows, highs), b = _mm256_unpackhi_epi8(lows, highs);
    const __m256i upper = _mm256_set1_epi32(int32_t(0xffff0000u));
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(a, upper)), _mm256_castsi256_ps(_mm256_and_si256(b, upper))};
}
// From a byte for each lane, the even code in its low half. Lanes 0 to 3 and 8 to 11 become low halves, two bytes each;
// the lane four places on the high ones.
HEADRACE_INLINE void pack_e2m1(const uint8_t* from, uint8_t* to) {
    for (int i = 0; i < 8; ++i) {
        const int lane = i / 4 * 8 + i % 4;
        const int first = from[lane], second = from[lane + 4];
        to[2 * i] = uint8_t((first & 15) | (second & 15) << 4), to[2 * i + 1] = uint8_t(first >> 4 | (second & 240));
    }
}
// The other way round.
HEADRACE_INLINE void unpack_e2m1(const uint8_t* from, uint8_t* to) {
    for (int i = 0; i < 8; ++i) {
        const int lane = i / 4 * 8 + i % 4;
        const int even = from[2 * i], odd = from[2 * i + 1];
        to[lane] = uint8_t((even & 15) | (odd & 15) << 4), to[lane + 4] = uint8_t(even >> 4 | (odd & 240));
    }
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

}  // namespace headrace
