// What opens a step: token ids, positions and the page table; then the rows of the embedding.

#include "ops.h"
#include "tile.h"

namespace headrace {

void step_inputs(Pool&, const StepInputsArgs& a) {
    constexpr int64_t NO_WRITE = -1;
    for (int64_t i = 0; i < a.write_count; ++i) {
        const int64_t* write = a.writes + i * a.write_stride;
        if (write[0] == NO_WRITE) continue;
        a.page_table[write[0] * a.table_stride + write[a.field_step] * a.page_step] = int32_t(write[2 * a.field_step]);
    }
    for (int64_t i = 0; i < a.decodes; ++i) {
        const int64_t slot = a.slots[i * a.slots_step];
        a.token_ids[i] = a.last_token[slot * a.last_token_step];
        a.positions[i] = a.length[slot * a.length_step] - 1;
    }
    for (int64_t i = 0; i < a.prompts; ++i) a.token_ids[a.decodes + i] = a.prompt_ids[i * a.prompt_step];
}

void embed(Pool& pool, const EmbedArgs& a) {
    const int64_t element = a.format == FP32 ? 4 : 2;
    pool.spread(a.rows, a.rows * a.columns, [&](int64_t row, int) {
        const std::byte* from = a.table + a.ids[row * a.ids_step] * a.stride * element;
        float* y = a.y + row * a.columns;
        if (a.format == FP32) {
            std::memcpy(y, from, size_t(a.columns) * sizeof(float));
            return;
        }
        for (int64_t k = 0; k < a.columns; k += LANES) {
            const int64_t some = std::min(LANES, a.columns - k);
            const auto* at = reinterpret_cast<const uint16_t*>(from) + k;
            uint16_t lanes[LANES] = {};
            if (some < LANES) at = static_cast<uint16_t*>(std::memcpy(lanes, at, size_t(some) * sizeof(uint16_t)));
            const Float value = a.format == BF16 ? load_bf16(at) : load_f16(at);
            some < LANES ? store_some(y + k, value, some) : store(y + k, value);
        }
    });
}

}  // namespace headrace
