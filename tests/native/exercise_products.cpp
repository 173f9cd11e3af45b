// Ops of one row at a time: projections, experts, routing, norms, and what opens a step.

#include "exercise.h"
#include "ops.h"

namespace exercise {

namespace {

constexpr int64_t NO_COLUMN = int64_t(1) << 40;

// What stands before a projection.
struct Prologue {
    int64_t columns[2], norm_groups = 1;
    bool norm = false, relu2 = false;

    explicit Prologue(Case& c) {
        const int64_t kind = c.between(0, 3), widest = c.once_in(8) ? 1100 : 70;
        relu2 = kind == 1, norm = kind > 1;
        if (kind == 3) {  // no group lies in both inputs
            norm_groups = c.size(2, 5);
            const int64_t width = c.size(1, 40);
            columns[0] = width * c.between(1, norm_groups);
            columns[1] = width * norm_groups - columns[0];
        } else {
            columns[0] = c.size(1, widest);
            columns[1] = c.once_in(2) ? 0 : c.size(1, widest);
        }
    }
    int64_t width() const { return columns[0] + columns[1]; }
};

}  // namespace

void linear(Case& c) {
    const Prologue prologue(c);
    const int64_t width = prologue.width(), format = c.size(FP32, NVFP4), outputs = c.size(1, width > 200 ? 40 : 100);
    const int64_t rows = width > 200 ? c.size(1, 5) : c.once_in(6) && width < 40 ? c.size(60, 260) : c.size(1, 40);
    const auto panels = c.panels(format, outputs, width);
    const Matrix first = c.matrix(rows, prologue.columns[0]);
    const Matrix second = c.matrix(prologue.columns[1] ? rows : 0, prologue.columns[1]);
    const Matrix residual = c.matrix(rows, outputs);
    const auto bias = c.numbers(outputs), norm_weight = c.numbers(width), scale = c.numbers(outputs);
    const bool biased = c.once_in(2), added = c.once_in(2), scaled = format >= E4M3 || c.once_in(4);
    std::vector<float> y(size_t(rows * outputs));
    headrace::LinearArgs args{};
    args.x[0] = first.values.data(), args.stride[0] = first.stride, args.columns[0] = prologue.columns[0];
    if (prologue.columns[1])
        args.x[1] = second.values.data(), args.stride[1] = second.stride, args.columns[1] = prologue.columns[1];
    args.rows = rows;
    args.panels = panels.data(), args.format = format, args.width = Case::padded(format, width), args.outputs = outputs;
    if (scaled) args.scale = scale.data();
    if (biased) args.bias = bias.data();
    if (prologue.norm) args.norm_weight = norm_weight.data(), args.norm_eps = 1e-5;
    args.norm_groups = prologue.norm_groups;
    args.relu2_from = !prologue.relu2 ? width : prologue.columns[1] ? prologue.columns[0] : 0;
    if (added) args.residual = residual.values.data(), args.residual_stride = residual.stride;
    args.y = y.data();
    c.run("linear", args);
    c.result(y);
}

void experts(Case& c) {
    const int64_t format = c.size(FP32, NVFP4), count = c.size(1, 9), top_k = c.size(1, count);
    const bool many = c.once_in(8);  // more rows than one pass takes
    const int64_t rows = many ? c.size(500, 530) : c.size(1, 40), widest = many ? 9 : 50;
    const int64_t columns = c.size(1, widest), inner = c.size(1, widest);
    std::vector<std::byte> up, down;
    for (int64_t expert = 0; expert < count; ++expert) {
        const auto to = c.panels(format, inner, columns);
        up.insert(up.end(), to.begin(), to.end());
        const auto back = c.panels(format, columns, inner);
        down.insert(down.end(), back.begin(), back.end());
    }
    up.shrink_to_fit(), down.shrink_to_fit();
    std::vector<int64_t> picked;
    for (int64_t row = 0; row < rows; ++row) {
        const auto some = c.distinct(top_k, count);
        picked.insert(picked.end(), some.begin(), some.end());
    }
    picked.shrink_to_fit();
    const Matrix x = c.matrix(rows, columns), residual = c.matrix(rows, columns);
    const auto weights = c.numbers(rows * top_k), up_scale = c.numbers(count), down_scale = c.numbers(count);
    const bool added = c.once_in(2), scaled = format >= E4M3 || c.once_in(4);
    std::vector<float> y(size_t(rows * columns));
    c.run("experts", headrace::ExpertsArgs{x.values.data(), x.stride, rows, top_k, picked.data(), weights.data(),
                                           up.data(), down.data(), format, count, columns, Case::padded(format, columns),
                                           inner, Case::padded(format, inner), scaled ? up_scale.data() : nullptr,
                                           scaled ? down_scale.data() : nullptr, added ? residual.values.data() : nullptr,
                                           added ? residual.stride : 0, y.data()});
    c.result(y);
}

void route(Case& c) {
    const int64_t rows = c.size(0, 40), groups = c.once_in(2) ? 1 : c.size(1, 9);
    const int64_t experts = groups * c.size(1, groups > 1 ? 30 : 260), top_k = c.size(1, experts < 22 ? experts : 22);
    const int64_t topk_groups = c.size(1, groups), normalise = c.size(0, 1);
    const bool equal = c.once_in(4);  // ties everywhere
    const Matrix logits = c.matrix(rows, experts, equal ? 0.0f : 3.0f);
    const auto bias = c.numbers(experts, equal ? 0.0f : 0.1f);
    std::vector<int64_t> picked(size_t(rows * top_k));
    std::vector<float> weights(size_t(rows * top_k));
    c.run("route", headrace::RouteArgs{logits.values.data(), logits.stride, rows, experts, bias.data(), top_k, groups,
                                       topk_groups, normalise, 2.5, picked.data(), weights.data()});
    c.result(picked), c.result(weights);
}

void rms_norm(Case& c) {
    const int64_t rows = c.size(0, 40), groups = c.size(1, 8), columns = groups * c.size(1, c.once_in(4) ? 1100 : 70);
    const Matrix x = c.matrix(rows, columns);
    const auto weight = c.numbers(columns);
    std::vector<float> y(size_t(rows * columns));
    c.run("rms_norm", headrace::NormArgs{x.values.data(), x.stride, rows, columns, groups, weight.data(), 1e-5,
                                         y.data()});
    c.result(y);
}

namespace {

// Integers below a bound, ``step`` apart.
struct Column {
    int64_t step;
    std::vector<int64_t> values;

    Column(Case& c, int64_t count, int64_t below)
        : step(c.between(1, 3)), values(size_t(count ? (count - 1) * step + 1 : 0)) {
        for (int64_t& value : values) value = c.between(0, below - 1);
    }
};

}  // namespace

void step_inputs(Case& c) {
    const int64_t slots = c.size(1, 20), decodes = c.size(0, 40), prompts = c.size(0, 40), pages = c.size(1, 20);
    const int64_t writes = c.size(0, 30), field = c.between(1, 2), write_stride = 2 * field + c.between(1, 3);
    const int64_t page_step = c.between(1, 2), table_stride = page_step * pages + c.between(0, 3);
    const Column last(c, slots, 100000), length(c, slots, 1000), chosen(c, decodes, slots), prompt(c, prompts, 100000);
    std::vector<int32_t> table(size_t((slots - 1) * table_stride + (pages - 1) * page_step + 1));
    for (int32_t& entry : table) entry = int32_t(c.word());
    std::vector<int64_t> write(size_t(writes ? (writes - 1) * write_stride + 2 * field + 1 : 0));
    for (int64_t i = 0; i < writes; ++i) {
        int64_t* at = write.data() + i * write_stride;
        at[0] = c.between(-1, slots - 1), at[field] = c.between(0, pages - 1), at[2 * field] = c.between(0, 1 << 30);
        if (at[0] < 0) at[field] = NO_COLUMN;  // means nothing
    }
    std::vector<int64_t> ids(size_t(decodes + prompts)), positions(static_cast<size_t>(decodes));
    c.run("step_inputs", headrace::StepInputsArgs{
        last.values.data(), length.values.data(), chosen.values.data(), decodes, prompt.values.data(), prompts,
        table.data(), table_stride, write.data(), writes, last.step, length.step, chosen.step, prompt.step, page_step,
        write_stride, field, ids.data(), positions.data()});
    c.result(ids), c.result(positions), c.result(table);
}

void embed(Case& c) {
    const int64_t format = c.size(FP32, FP16), vocab = c.size(1, 60), columns = c.size(1, 200), rows = c.size(0, 200);
    const Bytes table = c.byte_matrix(format, vocab, columns);
    const Column ids(c, rows, vocab);
    std::vector<float> y(size_t(rows * columns));
    c.run("embed", headrace::EmbedArgs{table.values.data(), format, table.stride, columns, ids.values.data(), ids.step,
                                       rows, y.data()});
    c.result(y);
}

}  // namespace exercise
