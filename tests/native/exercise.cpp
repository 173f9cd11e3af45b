// Runs every op of a compiled library on fuzzed shapes and hostile values, each tensor in memory of exactly its size,
// and prints a hash of all results per case: the same lines for any number of threads and any instruction path.
//
//     exercise LIBRARY THREADS SEED CASES [overrun|race]

#include "exercise.h"

#include <dlfcn.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>

#include "ops.h"

namespace exercise {

namespace {

[[noreturn]] void fail(const std::string& message) {
    std::fprintf(stderr, "exercise: %s\n", message.c_str());
    std::exit(2);
}

constexpr float INF = std::numeric_limits<float>::infinity(), LARGEST = std::numeric_limits<float>::max();
// Zeros, subnormals, ends of the ranges of fp32, fp16 and e4m3, and ties between two bf16 and two fp16.
constexpr float EXTREMES[] = {0.0f,     -0.0f,    0x1p-149f, -0x1p-149f, 0x1.fffffcp-127f, 0x1p-126f, 1e-30f,
                              -1e30f,   LARGEST,  -LARGEST,   65504.0f,   65520.0f,         -65519.0f, 448.0f,
                              -464.0f,  0x1p-10f, 0x1p-25f,  1.00390625f, 2049.0f,         88.8f,     -104.5f};
constexpr float BROKEN[] = {INF, -INF, std::numeric_limits<float>::quiet_NaN()};

}  // namespace

Library::Library(const char* path) : handle(dlopen(path, RTLD_NOW)) {
    if (!handle) fail(dlerror());
}

void* Library::symbol(const std::string& name) const {
    void* found = dlsym(handle, ("headrace_" + name).c_str());
    return found ? found : (fail("the library has no " + name), nullptr);
}

void* Library::open(int threads) const {
    void* pool = reinterpret_cast<void* (*)(int)>(symbol("open"))(threads);
    return pool ? pool : (fail("no threads"), nullptr);
}

void Library::close(void* pool) const { reinterpret_cast<void (*)(void*)>(symbol("close"))(pool); }

void Library::call(const std::string& op, void* pool, const void* args, size_t bytes) const {
    if (size_t(reinterpret_cast<int (*)()>(symbol(op + "_fields"))()) * 8 != bytes)
        fail("the library is of another version: " + op);
    if (reinterpret_cast<int (*)(void*, const void*)>(symbol(op))(pool, args)) fail("no memory for " + op);
}

namespace {
int threads = 1;  // of every pool
}

// A pool of its own has scratch of exactly the size that its ops ask for; one that lasts has what others left in it.
Case::Case(const Library& library_, void* pool_, Fault fault_, uint64_t seed)
    : library(library_), pool(pool_), own_pool(mix(seed) % 2), fault(fault_), counter(seed),
      wildness(int(mix(~seed) % 3)) {
    if (own_pool) pool = library.open(threads);
}

Case::~Case() {
    if (own_pool) library.close(pool);
}

int64_t Case::size(int64_t least, int64_t most) {
    static constexpr int64_t EDGES[] = {1, 2, 15, 16, 17, 31, 32, 33, 64, 127, 128, 129, 256, 512};
    int64_t chosen = between(least, most);
    if (once_in(2)) {
        const int64_t edge = EDGES[size_t(between(0, int64_t(std::size(EDGES)) - 1))];
        if (least <= edge && edge <= most) chosen = edge;
    }
    sizes += ' ', sizes += std::to_string(chosen);
    return chosen;
}

std::vector<int64_t> Case::distinct(int64_t count, int64_t below) {
    std::vector<int64_t> all(static_cast<size_t>(below));
    for (int64_t i = 0; i < below; ++i) all[size_t(i)] = i;
    for (int64_t i = 0; i < count; ++i) std::swap(all[size_t(i)], all[size_t(between(i, below - 1))]);
    return {all.begin(), all.begin() + count};
}

float Case::number(float scale) {
    if (wildness > 0 && once_in(60)) return EXTREMES[size_t(between(0, int64_t(std::size(EXTREMES)) - 1))];
    if (wildness > 1 && once_in(1000)) return BROKEN[size_t(between(0, int64_t(std::size(BROKEN)) - 1))];
    float sum = unit();
    for (int i = 0; i < 3; ++i) sum += unit();
    return (sum - 2.0f) * scale;
}

std::vector<float> Case::numbers(int64_t count, float scale) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = number(scale);
    return values;
}

std::vector<std::byte> Case::elements(int64_t format, int64_t count, float scale) {
    const int64_t bytes = bytes_of(format);
    std::vector<std::byte> values(size_t(count * bytes));
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        const float value = number(scale);
        std::memcpy(&bits, &value, 4);
        // The element of the same sign and first bits, however far its exponent reaches; a NaN only from a NaN.
        const uint32_t sign = bits >> 31, exponent = bits >> 23 & 0xff, nan = value != value;
        if (format == BF16) bits = bits >> 16 | nan << 6;
        if (format == FP16)
            bits = sign << 15 | (exponent == 0xff ? 31u : exponent & 15) << 10 | (bits >> 13 & 0x3ff) | nan << 9;
        if (format == E4M3) {
            bits = sign << 7 | (exponent & 15) << 3 | (bits >> 20 & 7);
            bits = nan ? bits | 0x7f : (bits & 0x7f) == 0x7f ? bits - 1 : bits;
        }
        std::memcpy(values.data() + i * bytes, &bits, size_t(bytes));
    }
    return values;
}

int64_t Case::length_of(int64_t rows, int64_t columns, int64_t stride) const {
    const int64_t length = rows ? (rows - 1) * stride + columns : 0;
    return fault == Fault::OVERRUN && length ? length - 1 : length;
}

Matrix Case::matrix(int64_t rows, int64_t columns, float scale) {
    const int64_t stride = stride_of(columns);
    return {numbers(length_of(rows, columns, stride), scale), stride};
}

Bytes Case::byte_matrix(int64_t format, int64_t rows, int64_t columns, float scale) {
    const int64_t stride = stride_of(columns);
    return {elements(format, length_of(rows, columns, stride), scale), stride};
}

int64_t Case::padded(int64_t format, int64_t columns) {
    const int64_t block = format == NVFP4 ? 16 : 2;
    return (columns + block - 1) / block * block;
}

std::vector<std::byte> Case::panels(int64_t format, int64_t outputs, int64_t columns) {
    const int64_t width = padded(format, columns);
    if (format == NVFP4) return nvfp4_panels(outputs, width);
    std::vector<std::byte> panels(size_t((outputs + 31) / 32 * 32 * width * bytes_of(format)));
    int64_t nans = 0;
    const bool below = once_in(2);  // parts below one another, else side by side
    for (int64_t at = 0, whole = below ? outputs : columns; at < whole;) {
        const int64_t part = once_in(2) ? whole - at : between(1, whole - at);
        const int64_t rows = below ? part : outputs, wide = below ? columns : part;
        const Bytes source = byte_matrix(format, rows, wide, 0.5f);
        const headrace::PackArgs args{source.values.data(), format, rows, wide, source.stride, nullptr, panels.data(),
                                      width, below ? at : 0, below ? 0 : at, &nans};
        run("pack", args);
        at += part;
    }
    result(format, panels);
    add(uint64_t(nans));
    return panels;
}

// Their bytes are a path's own: products tell whether they are right.
std::vector<std::byte> Case::nvfp4_panels(int64_t outputs, int64_t width) {
    std::vector<std::byte> panels(size_t((outputs + 31) / 32 * width / 16 * 288));
    int64_t nans = 0;
    for (int64_t at = 0; at < outputs;) {
        const int64_t part = once_in(2) ? outputs - at : between(1, outputs - at), stride = stride_of(width / 2);
        std::vector<std::byte> codes(size_t(length_of(part, width / 2, stride)));
        for (std::byte& code : codes) code = std::byte(between(0, 255));
        const std::vector<std::byte> scales = elements(E4M3, part * width / 16);
        const headrace::PackArgs args{codes.data(), NVFP4, part, width, stride, scales.data(), panels.data(), width, at, 0,
                                      &nans};
        run("pack", args);
        at += part;
    }
    add(uint64_t(nans));
    return panels;
}

void Case::run(const char* op, const void* args, size_t bytes) {
    if (fault != Fault::RACE) return library.call(op, pool, args, bytes);
    std::thread other([&] {
        void* another = library.open(1);
        library.call(op, another, args, bytes);
        library.close(another);
    });
    library.call(op, pool, args, bytes);
    other.join();
}

void Case::result(const std::vector<float>& values) {
    for (const float value : values) {
        uint32_t bits = 0x7fc00000;
        if (value == value) std::memcpy(&bits, &value, 4);
        add(bits);
    }
}

void Case::result(int64_t format, const std::vector<std::byte>& values) {
    const uint32_t infinite[] = {0x7f800000, 0x7f80, 0x7c00, 0x7e};  // what is above is a NaN
    const size_t bytes = size_t(bytes_of(format));
    for (size_t i = 0; i < values.size(); i += bytes) {
        uint32_t bits = 0;
        std::memcpy(&bits, values.data() + i, bytes);
        const uint32_t magnitude = bits & ((uint32_t(1) << (8 * bytes - 1)) - 1);
        add(magnitude > infinite[format] ? ~uint64_t(0) : bits);
    }
}

std::string Case::report() const {
    char text[20];
    std::snprintf(text, sizeof text, " %016" PRIx64, hash);
    return sizes + text;
}

}  // namespace exercise

int main(int count, char** arguments) {
    using namespace exercise;
    if (count < 5) fail("LIBRARY THREADS SEED CASES [overrun|race]");
    const Library library(arguments[1]);
    threads = std::atoi(arguments[2]);
    const uint64_t seed = std::strtoull(arguments[3], nullptr, 10);
    const std::string fault = count > 5 ? arguments[5] : "";
    const Exercise exercises[] = {
        {"linear", linear},
        {"experts", experts},
        {"route", route},
        {"rms_norm", rms_norm},
        {"step_inputs", step_inputs},
        {"embed", embed},
        {"mamba_update", mamba_update},
        {"mamba_prefill", mamba_prefill},
        {"decode_attention", decode_attention},
        {"prefill_attention", prefill_attention},
        {"sample", sample},
    };
    void* pool = library.open(threads);
    for (int i = 0; i < std::atoi(arguments[4]); ++i) {
        const Exercise& exercise = exercises[size_t(i) % std::size(exercises)];
        Case one(library, pool, fault == "overrun" ? Fault::OVERRUN : fault == "race" ? Fault::RACE : Fault::NONE,
                 mix(seed * 1000003 + uint64_t(i)));
        exercise.run(one);
        std::printf("%d %s%s\n", i, exercise.name, one.report().c_str());
    }
    library.close(pool);
}
