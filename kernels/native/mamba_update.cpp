// Mamba-2, token by token: a step of ``rows`` tokens reads and writes each sequence's state once.

#include "mamba.h"

namespace headrace {

namespace {

constexpr int64_t TOGETHER = 4;  // tokens that pass through the state while a part of it is in registers

struct Step {
    const MambaUpdateArgs& u;
    const MambaArgs& a;
    const Pieces pieces;
    const int64_t vectors, head_vectors, tokens;
    float *mixed, *dt, *decay;  // [tokens, pieces.width()], [tokens, heads padded] twice
    float* scratch;  // of every thread: taps and window

    Step(Pool& pool, const MambaUpdateArgs& args)
        : u(args), a(args.mamba), pieces(a), vectors(pieces.width() / LANES), head_vectors(padded(a.heads) / LANES),
          tokens(args.sequences * args.rows) {
        const int64_t results = tokens * (vectors + 2 * head_vectors) * LANES, own = taps_floats(a) + window_floats(a);
        mixed = reinterpret_cast<float*>(pool.shared(size_t(results + own * pool.threads()) * sizeof(float)));
        dt = mixed + tokens * vectors * LANES;
        decay = dt + tokens * head_vectors * LANES;
        scratch = mixed + results;
    }

    float* own(int thread) const { return scratch + thread * (taps_floats(a) + window_floats(a)); }
    int64_t ranges() const { return Range::number(pieces); }

    // A range of channels of every token: the convolution, and its input into the ring.
    template <class Ring>
    void convolve(const Range& range, float* taps) const {
        transpose_taps(a, range, taps);
        float* window = taps + taps_floats(a);
        for (int64_t sequence = 0; sequence < u.sequences; ++sequence) {
            const int64_t row = sequence * u.rows;
            const Run<Ring> run(a, row, u.slots[sequence], u.positions[sequence]);
            run.convolve(range, taps, 0, u.rows, window, [&](int64_t token, int64_t i, Float value) {
                store(mixed + ((row + token) * vectors + range.first + i) * LANES, value);
            });
            for (int64_t token = 0; token < u.rows; ++token)
                for (int64_t i = 0; i < range.count; ++i) run.keep(token, range.vectors[i]);
        }
    }

    // Sixteen heads of every token.
    void times(int64_t item) const {
        const int64_t head = item * LANES, some = std::min(LANES, a.heads - head);
        const Float rate = load_some(a.a + head, some);
        for (int64_t row = 0; row < tokens; ++row) {
            const Float step = time_step(a, pieces, row, head);
            store(dt + row * head_vectors * LANES + head, step);
            store(decay + row * head_vectors * LANES + head, exp(step * rate));
        }
    }

    void head(int64_t sequence, int64_t head) const;
};

// Tokens [0, R) of one head, R <= TOGETHER.
struct Tokens {
    const float *b[TOGETHER], *c[TOGETHER];  // [state_size] padded with zeros
    float decay[TOGETHER];
    float inputs[TOGETHER][LANES];  // x dt for sixteen rows of the state
};

// I rows of the state, the first of sixteen being number ``from``: h = h decay + x dt B, and the lanes of sums h C.
template <int R, int I>
HEADRACE_INLINE void advance(float* state, int64_t stride, int64_t size, const Tokens& t, int64_t from,
                             Float (&sum)[R][LANES]) {
    Float acc[I][R];
    for (int i = 0; i < I; ++i)
        for (int r = 0; r < R; ++r) acc[i][r] = splat(0.0f);
    Float decay[R], input[I][R];  // in registers: a store into the state might have changed what t holds
    for (int r = 0; r < R; ++r) {
        decay[r] = splat(t.decay[r]);
        for (int i = 0; i < I; ++i) input[i][r] = splat(t.inputs[r][from + i]);
    }
    auto columns = [&](int64_t n, auto&& read, auto&& write) {
        Float h[I];
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i) h[i] = read(state + i * stride + n);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Float b = load(t.b[r] + n), c = load(t.c[r] + n);
#pragma GCC unroll 4
            for (int i = 0; i < I; ++i) {
                h[i] = fma(h[i], decay[r], input[i][r] * b);
                acc[i][r] = fma(h[i], c, acc[i][r]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i) write(state + i * stride + n, h[i]);
    };
    int64_t n = 0;
    for (; n + LANES <= size; n += LANES)
        columns(n, [](const float* p) { return load(p); }, [](float* p, Float x) { store(p, x); });
    if (const int64_t some = size - n)
        columns(n, [&](const float* p) { return load_some(p, some); },
                [&](float* p, Float x) { store_some(p, x, some); });
    for (int i = 0; i < I; ++i)
        for (int r = 0; r < R; ++r) sum[r][from + i] = acc[i][r];
}

// R tokens through sixteen rows of the state, or as many as there are -> y without D x.
template <int R>
void advance_rows(float* state, int64_t stride, int64_t rows, int64_t size, const Tokens& t, Float* y) {
    constexpr int I = 4;  // rows of the state that meet the same B and C in registers
    Float sum[R][LANES];
    int64_t i = 0;
    for (; i + I <= rows; i += I) advance<R, I>(state + i * stride, stride, size, t, i, sum);
    for (; i < rows; ++i) advance<R, 1>(state + i * stride, stride, size, t, i, sum);
    for (; i < LANES; ++i)
        for (int r = 0; r < R; ++r) sum[r][i] = splat(0.0f);
    for (int r = 0; r < R; ++r) y[r] = sums(sum[r]);
}

void Step::head(int64_t sequence, int64_t head) const {
    const int64_t first = sequence * u.rows;
    float* state = a.ssm + u.slots[sequence] * a.ssm_slot + head * a.ssm_head;
    if (u.positions[sequence] == 0)
        for (int64_t p = 0; p < a.head_dim; ++p) std::fill_n(state + p * a.ssm_row, a.state_size, 0.0f);
    const int64_t x_at = pieces.before(head), b_at = pieces.before(pieces.b(head));
    const int64_t c_at = pieces.before(pieces.c(head));
    for (int64_t p = 0; p < a.head_dim; p += LANES) {
        const int64_t rows = std::min(LANES, a.head_dim - p);
        for (int64_t token = 0; token < u.rows; token += TOGETHER) {
            const int64_t some = std::min(TOGETHER, u.rows - token);
            Tokens t;
            Float x[TOGETHER], y[TOGETHER];
            for (int64_t r = 0; r < some; ++r) {
                const int64_t row = first + token + r;
                const float* at = mixed + row * vectors * LANES;
                x[r] = load(at + x_at + p);
                t.b[r] = at + b_at, t.c[r] = at + c_at, t.decay[r] = decay[row * head_vectors * LANES + head];
                store(t.inputs[r], x[r] * splat(dt[row * head_vectors * LANES + head]));
            }
            float* part = state + p * a.ssm_row;
            switch (some) {
                case 1: advance_rows<1>(part, a.ssm_row, rows, a.state_size, t, y); break;
                case 2: advance_rows<2>(part, a.ssm_row, rows, a.state_size, t, y); break;
                case 3: advance_rows<3>(part, a.ssm_row, rows, a.state_size, t, y); break;
                case 4: advance_rows<4>(part, a.ssm_row, rows, a.state_size, t, y); break;
            }
            for (int64_t r = 0; r < some; ++r)
                finish(a, first + token + r, head * a.head_dim + p, rows, fma(x[r], splat(a.d[head]), y[r]));
        }
    }
}

}  // namespace

void mamba_update(Pool& pool, const MambaUpdateArgs& args) {
    const Step step(pool, args);
    pool.items(0, step.ranges() + step.head_vectors);
    pool.items(1, args.sequences * args.mamba.heads);
    pool.run([&](int thread) {
        pool.each(thread, 0, 1, [&](int64_t item, int64_t) {
            if (item >= step.ranges()) return step.times(item - step.ranges());
            const Range range(step.pieces, item);
            with_ring(args.mamba.format, [&](auto ring) { step.convolve<decltype(ring)>(range, step.own(thread)); });
        });
        pool.each(thread, 1, 1, [&](int64_t item, int64_t) {
            step.head(item / args.mamba.heads, item % args.mamba.heads);
        });
    });
}

}  // namespace headrace
