// Seeded Gumbel noise: Philox4x32-10 (Salmon et al. 2011, Random123) and what makes noise of its words.
#pragma once

#include "math.h"

namespace headrace {

constexpr float MOST_NOISE = 22.9f;  // above -log(-log1p(-2^-33)), the noise of the word 0

// The noise of one row's tokens: counter (token >> 2, position, choice, 0), word token & 3, keyed by the seed.
struct Noise {
    int64_t seed, position, choice;

    // The words of 64 tokens from ``first`` on, a multiple of 64.
    HEADRACE_INLINE void words_at(int64_t first, Int words[4]) const {
        // Lane 4 j + i is quad 4 i + j: ``turn`` then brings a quad's words side by side and the quads in order.
        alignas(64) static constexpr int32_t ORDER[LANES] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
        words[0] = load(ORDER) + splat(int32_t(first / 4)), words[1] = splat(int32_t(uint32_t(position)));
        words[2] = splat(int32_t(uint32_t(choice))), words[3] = splat(int32_t(0));
        uint32_t key[2] = {uint32_t(seed), uint32_t(uint64_t(seed) >> 32)};
        for (int round = 0; round < 10; ++round) {
            Int high0, low0, high2, low2;
            multiply_wide(words[0], 0xD2511F53u, high0, low0);
            multiply_wide(words[2], 0xCD9E8D57u, high2, low2);
            words[0] = high2 ^ words[1] ^ splat(int32_t(key[0])), words[1] = low2;
            words[2] = high0 ^ words[3] ^ splat(int32_t(key[1])), words[3] = low0;
            key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
        }
        turn(words);
    }
};

// v = min((word + 1/2) 2^-32, 1 - 2^-24); the bound keeps the largest word below 1.
HEADRACE_INLINE Float uniform(Int words) {
    // The word to the nearest fp32: an fma rounds the sum of its halves once.
    const Float word = fma(to_float(shift_right<16>(words)), splat(65536.0f), to_float(words & splat(0xffff)));
    return min((word + splat(0.5f)) * splat(0x1p-32f), splat(1.0f - 0x1p-24f));
}

HEADRACE_INLINE Float gumbel(Float v) {
    return splat(0.0f) - log(splat(0.0f) - log1p(splat(0.0f) - v));
}

// At least gumbel(v), for a few operations: -log1p(-v) is above v, and log2(v) is above bits(v) 2^-23 - 127.
HEADRACE_INLINE Float above_gumbel(Float v) {
    return fma(to_float(as_int(v)), splat(-0.69314718f * 0x1p-23f), splat(127 * 0.69314718f + 0.001f));
}

}  // namespace headrace
