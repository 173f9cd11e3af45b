// Routing: sigmoid scores, a bias that only selects, the k best; kernels/moe.py states the contract.

#include "math.h"
#include "ops.h"

namespace headrace {

namespace {

constexpr int64_t COST = 16;  // of an expert of a row, in elements that an ordinary row moves

// A list whose best are taken out one by one. Lists are padded to whole vectors with NaN, which is also what stands
// where one was taken: it is no maximum and equals nothing.
struct Choices {
    float* values;
    int64_t count;

    static int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

    // The largest, the lowest index among equals.
    int64_t take() const {
        Float best = splat(-INFINITY);
        for (int64_t i = 0; i < count; i += LANES) best = max(load(values + i), best);
        best = splat(largest(best));
        int64_t i = 0;
        uint32_t equal;
        while (!(equal = bits(load(values + i) == best))) i += LANES;
        i += __builtin_ctz(equal);
        values[i] = NAN;
        return i;
    }
};

// values[0..n): a NaN comes first, like an infinity; the rest of the last vector is no choice.
void complete(float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (values[i] != values[i]) values[i] = INFINITY;
    std::fill(values + count, values + Choices::padded(count), NAN);
}

struct Router {
    const RouteArgs& a;
    float *scores, *choice, *worth;  // a thread's own: [experts], [experts], [groups], in whole vectors

    void keep_best_groups() const {
        const int64_t size = a.experts / a.groups;
        for (int64_t group = 0; group < a.groups; ++group) {
            float first = -INFINITY, second = -INFINITY;
            for (int64_t i = group * size; i < (group + 1) * size; ++i) {
                second = std::max(second, std::min(first, choice[i]));
                first = std::max(first, choice[i]);
            }
            worth[group] = first + second;
        }
        complete(worth, a.groups);
        const Choices groups{worth, a.groups};
        for (int64_t i = 0; i < a.topk_groups; ++i) groups.take();
        for (int64_t group = 0; group < a.groups; ++group)  // those taken are NaN now
            if (worth[group] == worth[group]) std::fill(choice + group * size, choice + (group + 1) * size, -INFINITY);
    }

    void route(int64_t row) const {
        const float* logits = a.logits + row * a.stride;
        for (int64_t i = 0; i < a.experts; i += LANES) {
            const int64_t some = std::min(LANES, a.experts - i);
            const Float score = sigmoid(some < LANES ? load_some(logits + i, some) : load(logits + i));
            store(scores + i, score);
            store(choice + i, score + (some < LANES ? load_some(a.bias + i, some) : load(a.bias + i)));
        }
        complete(choice, a.experts);
        if (a.groups > 1) keep_best_groups();
        const Choices choices{choice, a.experts};
        int64_t* picked = a.picked + row * a.top_k;
        float *weights = a.weights + row * a.top_k, total = 0.0f;
        for (int64_t j = 0; j < a.top_k; ++j) {
            picked[j] = choices.take();
            weights[j] = scores[picked[j]];
            total += weights[j];
        }
        for (int64_t j = 0; j < a.top_k; ++j) {
            if (a.normalise) weights[j] = weights[j] / (total + 1e-20f);
            weights[j] = weights[j] * float(a.scale);
        }
    }
};

}  // namespace

void route(Pool& pool, const RouteArgs& a) {
    const int64_t experts = Choices::padded(a.experts), each = 2 * experts + Choices::padded(a.groups);
    auto* memory = reinterpret_cast<float*>(pool.shared(size_t(pool.threads() * each) * sizeof(float)));
    pool.spread(a.rows, a.rows * a.experts * COST, [&](int64_t row, int thread) {
        float* own = memory + thread * each;
        Router{a, own, own + experts, own + 2 * experts}.route(row);
    });
}

}  // namespace headrace
