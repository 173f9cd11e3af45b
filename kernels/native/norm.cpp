// RMS norm, y = x / sqrt(mean(x^2) + eps) * w: the same bits as ``linear`` gives its rows.

#include "ops.h"
#include "rows.h"

namespace headrace {

void rms_norm(Pool& pool, const NormArgs& a) {
    const int64_t width = a.columns / a.groups;
    pool.spread(a.rows * a.groups, a.rows * a.columns, [&](int64_t item, int) {
        const int64_t row = item / a.groups, first = item % a.groups * width;
        const float *x = a.x + row * a.stride + first, *weight = a.weight + first;
        float* y = a.y + row * a.columns + first;
        const Float factor = splat(rms_factor(x, width, a.eps));
        int64_t k = 0;
        for (; k + LANES <= width; k += LANES) store(y + k, load(x + k) * factor * load(weight + k));
        if (k < width)
            store_some(y + k, load_some(x + k, width - k) * factor * load_some(weight + k, width - k), width - k);
    });
}

}  // namespace headrace
