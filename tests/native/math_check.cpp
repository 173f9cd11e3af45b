// Elementary functions of math.h over fp32's words, a prime number apart: for each the worst error in ulp against
// float64, and a hash of all results. Compiled and read by test_math.py.

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <initializer_list>

#include "math.h"

using namespace headrace;

namespace {

constexpr uint64_t STEP = 1021;

// Infinite where a result that fp32 cannot hold, or none at all, is not given as such.
double error_of(float actual, double exact) {
    const float rounded = float(exact);
    if (rounded != rounded) return actual != actual ? 0.0 : INFINITY;
    if (rounded == 0.0f || std::isinf(rounded)) return actual == rounded ? 0.0 : INFINITY;
    return std::fabs(actual - exact) / std::ldexp(1.0, std::max(std::ilogb(rounded), -126) - 23);
}

template <class Function>
void check(const char* name, Function function, double (*exact)(double)) {
    double worst = 0.0;
    uint64_t hash = 0, word = 0;
    while (word < uint64_t(1) << 32) {
        float x[LANES], y[LANES];
        for (float& value : x) {
            const auto bits = uint32_t(std::min<uint64_t>(word, 0xffffffffu));
            std::memcpy(&value, &bits, 4);
            word += STEP;
        }
        store(y, function(load(x)));
        for (int i = 0; i < LANES; ++i) {
            worst = std::max(worst, error_of(y[i], exact(x[i])));
            uint32_t bits = 0;  // of every NaN
            if (y[i] == y[i]) std::memcpy(&bits, y + i, 4);
            hash = (hash ^ bits) * 0x100000001b3u;
        }
    }
    std::printf("%s %.3f %016" PRIx64 "\n", name, worst, hash);
}

}  // namespace

int main() {
    check("exp", [](Float x) { return exp(x); }, std::exp);
    check("log", [](Float x) { return log(x); }, std::log);
    check("log1p", [](Float x) { return log1p(x); }, std::log1p);
    float x[LANES] = {0.0f, -0.0f, -1.0f, 1.0f, INFINITY, -INFINITY, NAN, 0x1p-149f, 0x1.fffffep127f}, y[LANES];
    for (auto function : {+[](Float v) { return exp(v); }, +[](Float v) { return log(v); }, +[](Float v) { return log1p(v); }}) {
        store(y, function(load(x)));
        for (int i = 0; i < 9; ++i) std::printf("%.9g%s", y[i] == y[i] ? y[i] : NAN, i < 8 ? " " : "\n");
    }
}
