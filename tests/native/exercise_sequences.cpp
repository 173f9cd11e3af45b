// Ops over the memory of sequences: Mamba states and rings, pages of keys and values.

#include <algorithm>
#include <cstring>

#include "exercise.h"
#include "ops.h"

namespace exercise {

namespace {

// What no op may let into a result: in every format, and as fp32, a NaN.
constexpr auto GARBAGE = std::byte(0xff);

// A mixer's weights, states and inputs.
struct Mixer {
    int64_t groups, heads, head_dim, state_size, taps, format, slots, channels, tokens, ring;
    int64_t conv_entry, conv_slot, ssm_row, ssm_head, ssm_slot;
    Matrix projected;
    std::vector<std::byte> conv;
    std::vector<float> ssm, conv_weight, conv_bias, a, d, dt_bias, y;
    bool biased;

    // The ring has room for ``rows`` new inputs beside a convolution's past.
    Mixer(Case& c, int64_t slots_, int64_t rows, int64_t tokens_) : slots(slots_), tokens(tokens_) {
        groups = c.size(1, 3), heads = groups * c.size(1, 7), head_dim = c.size(1, 33), state_size = c.size(1, 40);
        taps = c.size(1, 5), format = c.size(FP32, FP16), channels = heads * head_dim + 2 * groups * state_size;
        ring = std::max<int64_t>(taps - 1 + rows, 1) + c.size(0, 4);
        conv_entry = channels + c.between(0, 3), conv_slot = ring * conv_entry + c.between(0, 3);
        ssm_row = state_size + c.between(0, 3), ssm_head = head_dim * ssm_row + c.between(0, 3);
        ssm_slot = heads * ssm_head + c.between(0, 3);
        projected = c.matrix(tokens, heads * head_dim + channels + heads);
        conv = c.elements(format, (slots - 1) * conv_slot + (ring - 1) * conv_entry + channels);
        ssm = c.numbers((slots - 1) * ssm_slot + (heads - 1) * ssm_head + (head_dim - 1) * ssm_row + state_size);
        conv_weight = c.numbers(channels * taps), conv_bias = c.numbers(channels), biased = c.once_in(2);
        for (int64_t i = 0; i < heads; ++i) a.push_back(-3.0f * c.unit());
        a.shrink_to_fit();
        d = c.numbers(heads), dt_bias = c.numbers(heads);
        y.resize(size_t(tokens * heads * head_dim));
    }

    // A slot whose sequence begins: its memory is another's.
    void forget(int64_t slot) {
        const auto from = size_t(slot * conv_slot * bytes_of(format)), to = from + size_t(conv_slot * bytes_of(format));
        std::fill(conv.begin() + int64_t(from), conv.begin() + int64_t(std::min(to, conv.size())), GARBAGE);
        const size_t first = size_t(slot * ssm_slot), last = std::min(first + size_t(ssm_slot), ssm.size());
        std::memset(ssm.data() + first, int(GARBAGE), (last - first) * sizeof(float));
    }

    headrace::MambaArgs args() {
        return {projected.values.data(), projected.stride, conv.data(), format, conv_slot, conv_entry, ring, ssm.data(),
                ssm_slot, ssm_head, ssm_row, conv_weight.data(), taps, biased ? conv_bias.data() : nullptr, a.data(),
                d.data(), dt_bias.data(), heads, head_dim, groups, state_size, y.data()};
    }

    void results(Case& c) const { c.result(y), c.result(format, conv), c.result(ssm); }
};

}  // namespace

void mamba_update(Case& c) {
    const int64_t sequences = c.size(1, 5), slots = sequences + c.between(0, 2), rows = c.size(1, 6);
    Mixer mixer(c, slots, rows, sequences * rows);
    const auto chosen = c.distinct(sequences, slots);
    std::vector<int64_t> positions(static_cast<size_t>(sequences));
    for (size_t i = 0; i < positions.size(); ++i) {
        positions[i] = c.once_in(3) ? 0 : c.between(1, 50);
        if (!positions[i]) mixer.forget(chosen[i]);
    }
    c.run("mamba_update", headrace::MambaUpdateArgs{mixer.args(), chosen.data(), positions.data(), sequences, rows});
    mixer.results(c);
}

void mamba_prefill(Case& c) {
    const int64_t slots = c.size(1, 3), chunk = c.size(1, 70), tokens = c.once_in(4) ? c.size(250, 300) : c.size(1, 80);
    Mixer mixer(c, slots, 0, tokens);
    const int64_t slot = c.between(0, slots - 1), start = c.once_in(2) ? 0 : chunk * c.between(1, 4);
    if (!start) mixer.forget(slot);
    c.run("mamba_prefill", headrace::MambaPrefillArgs{mixer.args(), slot, start, tokens, chunk});
    mixer.results(c);
}

namespace {

// Heads, pages and the tokens in them: those of sequence i stand in slots[i], which has ``past[i]`` and gets ``fresh``.
struct Cache {
    int64_t rows, kv_heads, heads, width, page_size, format, pages, table_stride;
    Matrix q, k, v;
    int64_t strides[3][2];  // of q, k, v: between rows, between heads
    std::vector<std::byte> keys, values;
    std::vector<int32_t> table;
    std::vector<float> out;

    Cache(Case& c, const std::vector<int64_t>& slots, int64_t slot_count, const std::vector<int64_t>& past,
          int64_t fresh)
        : rows(int64_t(slots.size()) * fresh) {
        kv_heads = c.size(1, 3), heads = kv_heads * c.size(1, c.once_in(6) ? 40 : 6), width = c.size(1, 70);
        page_size = c.size(1, 40), format = c.size(FP32, E4M3);
        q = heads_of(c, heads, strides[0]);
        k = heads_of(c, kv_heads, strides[1]), v = heads_of(c, kv_heads, strides[2]);
        out.resize(size_t(rows * heads * width));
        lay_pages(c, slots, slot_count, past, fresh);
    }

    headrace::AttentionArgs args() {
        headrace::AttentionArgs a{};
        a.q = q.values.data(), a.k = k.values.data(), a.v = v.values.data();
        int64_t* const to[] = {a.q_stride, a.k_stride, a.v_stride};
        for (int i = 0; i < 3; ++i) std::copy_n(strides[i], 2, to[i]);
        a.rows = rows, a.heads = heads, a.kv_heads = kv_heads, a.width = width;
        a.keys = keys.data(), a.values = values.data(), a.format = format, a.page_size = page_size;
        a.k_scale = format == E4M3 ? 0.37 : 1.0, a.v_scale = format == E4M3 ? 1.9 : 1.0, a.scale = 0.3;
        a.table = table.data(), a.table_stride = table_stride;
        a.out = out.data();
        return a;
    }

    void results(Case& c) const { c.result(out), c.result(format, keys), c.result(format, values); }

private:
    // [rows, count, width], heads not always side by side.
    Matrix heads_of(Case& c, int64_t count, int64_t (&stride)[2]) {
        stride[1] = width + (c.once_in(2) ? 0 : c.between(1, 5));
        const Matrix x = c.matrix(rows, (count - 1) * stride[1] + width, 2.0f);
        stride[0] = x.stride;
        return x;
    }

    // Pages in a random order; garbage beyond a sequence's entries of the table, and wherever no token stands.
    void lay_pages(Case& c, const std::vector<int64_t>& slots, int64_t slot_count, const std::vector<int64_t>& past,
                   int64_t fresh) {
        const int64_t longest = *std::max_element(past.begin(), past.end()) + fresh;
        const int64_t most = (longest + page_size - 1) / page_size, element = bytes_of(format);
        pages = most * int64_t(slots.size()) + c.between(0, 2), table_stride = most + c.between(0, 3);
        table.assign(size_t((slot_count - 1) * table_stride + most), 0x7fffffff);
        keys.assign(size_t(pages * page_size * kv_heads * width * element), GARBAGE), values = keys;
        const auto order = c.distinct(most * int64_t(slots.size()), pages);
        for (size_t i = 0; i < slots.size(); ++i) {
            for (int64_t page = 0; page * page_size < past[i] + fresh; ++page)
                table[size_t(slots[i] * table_stride + page)] = int32_t(order[i * size_t(most) + size_t(page)]);
            for (int64_t token = 0; token < past[i]; ++token) {
                const int64_t page = table[size_t(slots[i] * table_stride + token / page_size)];
                const int64_t at = (page * page_size + token % page_size) * kv_heads * width * element;
                for (auto* memory : {&keys, &values}) {
                    const auto some = c.elements(format, kv_heads * width);
                    std::copy(some.begin(), some.end(), memory->begin() + at);
                }
            }
        }
    }
};

}  // namespace

void decode_attention(Case& c) {
    const int64_t sequences = c.size(1, 4), slot_count = sequences + c.between(0, 2), each = c.size(1, 4);
    const auto slots = c.distinct(sequences, slot_count);
    std::vector<int64_t> positions(static_cast<size_t>(sequences));
    for (int64_t& position : positions) position = c.size(0, c.once_in(6) ? 600 : 100);
    Cache cache(c, slots, slot_count, positions, each);
    c.run("decode_attention",
          headrace::DecodeAttentionArgs{cache.args(), slots.data(), positions.data(), sequences, each});
    cache.results(c);
}

void prefill_attention(Case& c) {
    const int64_t slot_count = c.size(1, 3), slot = c.between(0, slot_count - 1);
    const int64_t start = c.once_in(2) ? 0 : c.size(0, 140), length = c.size(1, 140);
    Cache cache(c, {slot}, slot_count, {start}, length);
    c.run("prefill_attention", headrace::PrefillAttentionArgs{cache.args(), slot, start});
    cache.results(c);
}

}  // namespace exercise
