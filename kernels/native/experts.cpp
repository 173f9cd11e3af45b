// Routed experts: y = residual + sum_j w_j down_j relu(up_j x)^2, over the tokens that share an expert.

#include <vector>

#include "ops.h"
#include "rows.h"

namespace headrace {

namespace {

constexpr int64_t MOST_ROWS = 512;  // per pass: bounds the memory between up and down, and weights are read once for all

// (row, choice) pairs by expert, in the order of rows.
struct Groups {
    std::vector<int64_t> pairs, first;  // pairs of the i-th active expert are pairs[first[i] .. first[i + 1])
    std::vector<int64_t> expert;
    std::vector<int64_t> place;  // where each pair stands

    Groups(const int64_t* picked, int64_t count, int64_t experts) : pairs(size_t(count)), place(size_t(count)) {
        std::vector<int64_t> end(size_t(experts) + 1, 0);
        for (int64_t i = 0; i < count; ++i) ++end[size_t(picked[i]) + 1];
        for (int64_t e = 0; e < experts; ++e) {
            if (end[size_t(e) + 1]) expert.push_back(e), first.push_back(end[size_t(e)]);
            end[size_t(e) + 1] += end[size_t(e)];
        }
        first.push_back(count);
        for (int64_t i = 0; i < count; ++i) {
            int64_t& at = end[size_t(picked[i])];
            place[size_t(i)] = at, pairs[size_t(at++)] = i;
        }
    }
};

// One phase's flat list: (expert, band of its rows, panel), an expert's items side by side so that its weights are
// one stream.
struct Items {
    int64_t panels;
    std::vector<int64_t> first;  // of each active expert

    Items(const Groups& groups, int64_t outputs) : panels((outputs + PANEL - 1) / PANEL), first{0} {
        for (size_t i = 0; i + 1 < groups.first.size(); ++i) {
            const int64_t bands = (groups.first[i + 1] - groups.first[i] + BAND - 1) / BAND;
            first.push_back(first.back() + bands * panels);
        }
    }
    int64_t count() const { return first.back(); }
    size_t expert_of(int64_t item) const {
        return size_t(std::upper_bound(first.begin(), first.end(), item) - first.begin() - 1);
    }
};

struct Pass {
    const ExpertsArgs& a;
    const Groups groups;
    const int64_t rows, pairs;
    const Items up, down;
    float* gathered;  // packed rows of x, expert by expert: [pairs][up_width]
    float* inner;     // packed rows between the matrices: [pairs][down_width]
    float* outer;     // [pairs][columns], by place

    Pass(Pool& pool, const ExpertsArgs& args, int64_t rows_)
        : a(args), groups(args.picked, rows_ * args.top_k, args.experts), rows(rows_), pairs(rows_ * args.top_k),
          up(groups, args.inner), down(groups, args.columns) {
        gathered = reinterpret_cast<float*>(pool.shared(size_t(pairs * (a.up_width + a.down_width + a.columns)) * 4));
        inner = gathered + pairs * a.up_width;
        outer = inner + pairs * a.down_width;
    }

    void gather(int64_t expert) const {
        const int64_t first = groups.first[size_t(expert)], count = groups.first[size_t(expert) + 1] - first;
        for (int64_t i = 0; i < count; ++i) {
            const float* x = a.x + groups.pairs[size_t(first + i)] / a.top_k * a.stride;
            pack_columns(Format(a.format), gathered + first * a.up_width, i, count, a.up_width, 0, a.up_width,
                         [&](int64_t k) { return k < a.columns ? x[k] : 0.0f; });
        }
    }

    // c [rows][32] of one item of a phase, scaled; done(expert's first pair, its pairs, first row, rows, first output, c).
    template <class Done>
    void product(const Items& items, const std::byte* weights, const float* scales, const float* x, int64_t width,
                 int64_t item, float* own, Done&& done) const {
        const size_t i = items.expert_of(item);
        const int64_t first = groups.first[i], count = groups.first[i + 1] - first;
        const int64_t panel = (item - items.first[i]) % items.panels, row = (item - items.first[i]) / items.panels * BAND;
        const int64_t some = std::min(BAND, count - row);
        float* c = own + DEPTH * PANEL;
        const std::byte* at = weights + (groups.expert[i] * items.panels + panel) * panel_bytes(Format(a.format), width);
        multiply_panel(Format(a.format), at, width, x + (first + row) * width, some, c, own);
        if (scales) {
            const Float scale = splat(scales[groups.expert[i]]);
            for (int64_t j = 0; j < some * PANEL; j += LANES) store(c + j, load(c + j) * scale);
        }
        done(first, count, row, some, panel * PANEL, c);
    }

    void up_item(int64_t item, float* own) const {
        product(up, a.up, a.up_scale, gathered, a.up_width, item, own,
                [&](int64_t first, int64_t count, int64_t row, int64_t some, int64_t output, float* c) {
                    for (int64_t i = 0; i < some * PANEL; i += LANES) store(c + i, relu2(load(c + i)));
                    const int64_t end = std::min(output + PANEL, a.down_width);
                    for (int64_t i = 0; i < some; ++i)
                        pack_columns(Format(a.format), inner + first * a.down_width, row + i, count, a.down_width, output, end,
                                     [&](int64_t k) { return c[i * PANEL + k - output]; });
                });
    }

    void down_item(int64_t item, float* own) const {
        product(down, a.down, a.down_scale, inner, a.down_width, item, own,
                [&](int64_t first, int64_t, int64_t row, int64_t some, int64_t output, const float* c) {
                    const int64_t wide = std::min(PANEL, a.columns - output);
                    for (int64_t i = 0; i < some; ++i)
                        std::memcpy(outer + (first + row + i) * a.columns + output, c + i * PANEL, size_t(wide) * 4);
                });
    }

    // A row's terms in the order picked.
    void combine(int64_t row) const {
        float* y = a.y + row * a.columns;
        const float* residual = a.residual ? a.residual + row * a.residual_stride : nullptr;
        for (int64_t j = 0; j < a.top_k; ++j) {
            const float weight = a.weights[row * a.top_k + j];
            const float* term = outer + groups.place[size_t(row * a.top_k + j)] * a.columns;
            if (j == 0)
                for (int64_t k = 0; k < a.columns; ++k) y[k] = weight * term[k];
            else
                for (int64_t k = 0; k < a.columns; ++k) y[k] += weight * term[k];
        }
        if (residual)
            for (int64_t k = 0; k < a.columns; ++k) y[k] = residual[k] + y[k];
    }
};

}  // namespace

void experts(Pool& pool, const ExpertsArgs& all) {
    for (int64_t row = 0; row < all.rows; row += MOST_ROWS) {
        ExpertsArgs a = all;
        a.x += row * a.stride;
        a.picked += row * a.top_k;
        a.weights += row * a.top_k;
        a.y += row * a.columns;
        if (a.residual) a.residual += row * a.residual_stride;
        const Pass pass(pool, a, std::min(MOST_ROWS, all.rows - row));
        pool.items(0, int64_t(pass.groups.expert.size()));
        pool.items(1, pass.up.count());
        pool.items(2, pass.down.count());
        pool.items(3, pass.rows);
        pool.run([&](int thread) {
            auto* own = reinterpret_cast<float*>(pool.own(thread));
            pool.each(thread, 0, 1, [&](int64_t expert, int64_t) { pass.gather(expert); });
            pool.each(thread, 1, 1, [&](int64_t item, int64_t) { pass.up_item(item, own); });
            pool.each(thread, 2, 1, [&](int64_t item, int64_t) { pass.down_item(item, own); });
            pool.each(thread, 3, 1, [&](int64_t i, int64_t) { pass.combine(i); });
        });
    }
}

}  // namespace headrace
