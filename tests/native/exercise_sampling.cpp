// The sampler, and the state of its slots.

#include <algorithm>
#include <limits>

#include "exercise.h"
#include "ops.h"

namespace exercise {

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t OFF = 0, PHASES = 4;

// Logits that are hard on a nucleus: those of tests/kernels/sampling_cases.py.
float logit(Case& c, int64_t kind) {
    const float x = c.number(3.0f);
    switch (kind) {
        case 0: return x * 13.0f;                                     // most masses are 0
        case 1: return float(c.between(-8, 8)) * 0.5f;                // ties everywhere, at the threshold too
        case 2: return -7.0f;                                         // all equal
        case 3: return float(c.between(-500000, 500000)) * 0x1p-32f;  // distinct masses, all in one bucket
        case 4: return c.once_in(200) ? 60.0f : c.unit();             // all but certain
        case 5: return x > 0.9f ? x : -INF;                           // few that are possible
        default: return x;
    }
}

// SamplerState of kernels/sampling.py, and the ids of a model's control.
struct State {
    std::vector<int64_t> last_token, length, tokens_left, phase, remaining, cursor, finish, seed, choice, control;
    std::vector<float> temperature;
    std::vector<double> top_p;
    std::vector<uint8_t> ignore_eos;
    int64_t eos, closing;

    State(Case& c, int64_t slots, int64_t vocab) {
        const bool reasons = !c.once_in(4);  // a model without an end of reasoning has no closing either
        eos = c.size(0, 3), closing = reasons ? c.size(1, 4) : 0;
        for (int64_t i = 0; i < 3 + eos + closing; ++i)
            control.push_back(i < 3 && !reasons ? -1 : c.between(0, vocab - 1));
        control.shrink_to_fit();
        const auto fill = [&](auto& values, auto&& value) {
            values.resize(size_t(slots));
            for (auto& one : values) one = value();
        };
        for (auto* values : {&last_token, &length}) fill(*values, [&] { return c.between(0, 5000); });
        fill(tokens_left, [&] { return c.between(1, 3); });
        fill(phase, [&] { return reasons ? c.between(OFF, PHASES - 1) : OFF; });
        fill(remaining, [&] { return c.between(-1, 3); });
        fill(cursor, [&] { return c.between(0, std::max<int64_t>(closing - 1, 0)); });
        fill(finish, [&] { return c.once_in(8) ? c.between(1, 3) : 0; });
        fill(seed, [&] { return int64_t(c.word()); });
        fill(choice, [&] { return c.between(0, 7); });
        const float temperatures[] = {0.0f, 0.01f, 0.6f, 1.0f, 2.0f, 100.0f};
        fill(temperature, [&] { return temperatures[size_t(c.between(0, 5))]; });
        const double nuclei[] = {0.0, 0.1, 0.5, 0.95, 0.9999999, 1.0};
        fill(top_p, [&] { return nuclei[size_t(c.between(0, 5))]; });
        fill(ignore_eos, [&] { return uint8_t(c.once_in(2)); });
    }

    void results(Case& c) const {
        for (const auto* values : {&last_token, &length, &tokens_left, &phase, &remaining, &cursor, &finish})
            c.result(*values);
    }
};

}  // namespace

void sample(Case& c) {
    // Few rows of many tokens are cut into pieces, one for a thread.
    const int64_t rows = c.size(1, 9), fewer = rows > 3 ? 4 : 1;
    const int64_t vocab = c.once_in(3) ? c.size(9000, 25000) / fewer : c.size(1, 1100);
    const int64_t slots = rows + c.between(0, 3);
    Matrix logits = c.matrix(rows, vocab);
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t kind = c.size(0, 8);
        const auto first = logits.values.begin() + row * logits.stride;
        const auto last = std::min(first + vocab, logits.values.end());
        std::generate(first, last, [&] { return logit(c, kind); });
        if (c.once_in(12)) std::fill(first, last, -INF);
    }
    const bool masked = c.once_in(2), logprobs = c.once_in(2);
    const int64_t mask_stride = vocab + c.between(0, 9), top_k = logprobs ? std::min(c.size(0, 20), vocab) : 0;
    std::vector<uint8_t> mask(size_t((rows - 1) * mask_stride + vocab));
    const int64_t rarity = c.once_in(6) ? 100000 : c.size(1, 40);  // the first forbids nearly everything
    for (auto& allowed : mask) allowed = c.once_in(rarity);
    State state(c, slots, vocab);
    const auto chosen = c.distinct(rows, slots);
    std::vector<int64_t> integers(size_t(3 * rows)), top_ids(size_t(rows * top_k));
    std::vector<float> told(size_t(logprobs ? rows : 0)), top_logprobs(size_t(rows * top_k));
    c.run("sample", headrace::SampleArgs{
        logits.values.data(), logits.stride, rows, vocab, masked ? mask.data() : nullptr, mask_stride, chosen.data(),
        state.last_token.data(), state.length.data(), state.tokens_left.data(), state.phase.data(),
        state.remaining.data(), state.cursor.data(), state.finish.data(), state.temperature.data(), state.top_p.data(),
        state.seed.data(), state.choice.data(), state.ignore_eos.data(), state.control.data(), state.eos, state.closing,
        integers.data(), logprobs ? told.data() : nullptr, top_k, top_ids.data(), top_logprobs.data()});
    c.result(integers), c.result(told), c.result(top_ids), c.result(top_logprobs), state.results(c);
}

}  // namespace exercise
