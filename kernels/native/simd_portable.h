// simd.h's operations as plain loops, which a compiler turns into whatever vectors the machine has.
#pragma once

namespace headrace {

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
// 1/256 of e4m3 numbers that are no NaN.
HEADRACE_INLINE Float load_e4m3_256th(const uint8_t* p) {
    HEADRACE_EACH(Float, half_to_float(uint16_t((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7)));
}
// Two e2m1 of each lane, as pack_e2m1 has laid them.
HEADRACE_INLINE void load_e2m1(const uint8_t* p, Float& even, Float& odd) {
    constexpr float values[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
    for (int i = 0; i < LANES; ++i) even.v[i] = values[p[i] & 15], odd.v[i] = values[p[i] >> 4];
}
// From a byte for each lane, the even code in its low half.
HEADRACE_INLINE void pack_e2m1(const uint8_t* from, uint8_t* to) { std::memcpy(to, from, LANES); }
// The other way round.
HEADRACE_INLINE void unpack_e2m1(const uint8_t* from, uint8_t* to) { std::memcpy(to, from, LANES); }
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

}  // namespace headrace
