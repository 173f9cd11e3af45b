// Elementary functions on sixteen lanes: fixed sequences of correctly rounded operations, so the same bits everywhere.
#pragma once

#include "simd.h"

namespace headrace {

// exp(x) to about 1 ulp; 0 below -104, infinite above 88.73; NaN stays NaN.
HEADRACE_INLINE Float exp(Float x) {
    // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, so that n times the first is exact.
    const Float n = round_even(max(min(x * splat(1.44269504f), splat(129.0f)), splat(-151.0f)));
    Float r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    Float p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    // 2^n in two factors: n reaches beyond the range of one exponent, both for results that are subnormal and at the top.
    const Int whole = to_int(n), half = shift_right<1>(whole + splat(256)) - splat(128);
    const Int rest = whole - half;
    const Float scale = as_float(shift_left<23>(half + splat(127)));
    Float y = p * scale * as_float(shift_left<23>(rest + splat(127)));
    y = select(x < splat(-104.0f), splat(0.0f), y);
    y = select(splat(88.722839f) < x, splat(INFINITY), y);
    return select(x == x, y, x);
}

// log(m) + k ln 2 for m = 1 + f within a factor of sqrt 2 of 1, to about 1 ulp.
HEADRACE_INLINE Float log_parts(Float f, Float k) {
    const Float square = f * f;
    Float p = splat(7.0376836292e-2f);
    p = fma(p, f, splat(-1.1514610310e-1f));
    p = fma(p, f, splat(1.1676998740e-1f));
    p = fma(p, f, splat(-1.2420140846e-1f));
    p = fma(p, f, splat(1.4249322787e-1f));
    p = fma(p, f, splat(-1.6668057665e-1f));
    p = fma(p, f, splat(2.0000714765e-1f));
    p = fma(p, f, splat(-2.4999993993e-1f));
    p = fma(p, f, splat(3.3333331174e-1f));
    Float low = fma(k, splat(-2.12194440e-4f), f * square * p);
    low = fma(square, splat(-0.5f), low);
    return fma(k, splat(0.693359375f), f + low);  // ln 2 in two parts, as in exp
}

// x = m 2^k with m within a factor of sqrt 2 of 1; x normal and above 0.
HEADRACE_INLINE Float split_exponent(Float x, Float& k) {
    const Int shifted = as_int(x) + splat(0x3f800000 - 0x3f3504f3);  // 1 and the root of 1/2
    const Int whole = shift_right<23>(shifted) - splat(127);
    k = to_float(whole);
    return as_float(as_int(x) - shift_left<23>(whole));
}

// log(x) to about 1 ulp; -infinite at 0, NaN below.
HEADRACE_INLINE Float log(Float x) {
    const Mask subnormal = x < splat(0x1p-126f);
    Float k;
    const Float m = split_exponent(select(subnormal, x * splat(0x1p23f), x), k);
    Float y = log_parts(m - splat(1.0f), select(subnormal, k - splat(23.0f), k));
    y = select(x < splat(INFINITY), y, x);  // infinite, NaN
    y = select(x == splat(0.0f), splat(-INFINITY), y);
    return select(x < splat(0.0f), splat(NAN), y);
}

// log(1 + x) to about 2 ulp; -infinite at -1, NaN below.
HEADRACE_INLINE Float log1p(Float x) {
    const Float u = x + splat(1.0f), rounded = u - splat(1.0f);
    const Float rest = (splat(1.0f) - (u - rounded)) + (x - rounded);  // 1 + x = u + rest exactly
    Float k;
    const Float m = split_exponent(u, k);
    Float y = log_parts(fma(m, rest / u, m - splat(1.0f)), k);
    y = select(x < splat(INFINITY), y, x);
    y = select(x == splat(-1.0f), splat(-INFINITY), y);
    return select(x < splat(-1.0f), splat(NAN), y);
}

// log(1 + exp(x)) without overflow: max(x, 0) + log1p(exp(-|x|)), to about 2 ulp.
HEADRACE_INLINE Float softplus(Float x) {
    const Float size = as_float(as_int(x) & splat(0x7fffffff));
    return max(splat(0.0f), x) + log1p(exp(splat(0.0f) - size));
}
HEADRACE_INLINE Float silu(Float x) { return x / (splat(1.0f) + exp(splat(0.0f) - x)); }
HEADRACE_INLINE Float sigmoid(Float x) { return splat(1.0f) / (splat(1.0f) + exp(splat(0.0f) - x)); }
HEADRACE_INLINE Float relu2(Float x) {
    const Float y = max(splat(0.0f), x);  // the order keeps a NaN
    return y * y;
}

}  // namespace headrace
