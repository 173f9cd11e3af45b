// The ops and their ABI: one struct of arguments each.
//
// Every field is eight bytes, so that library.py builds a struct with one call of struct.pack. Sizes are elements and
// strides are elements between rows, unless bytes are said. Addresses of absent tensors are null.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pool.h"

namespace headrace {

struct PackArgs {
    const std::byte* source;  // [rows, columns] in the panel's format; NVFP4: two columns a byte, the even one below
    int64_t format, rows, columns, stride;  // stride in elements, NVFP4: bytes
    const std::byte* block_scales;          // NVFP4: [rows, columns / 16], contiguous
    std::byte* panels;         // [outputs / 32 rounded up], of ``width`` k; zeros where no source stands; panels.h
    int64_t width;             // K of the panels, a multiple of the format's block
    int64_t first_row, first_column;  // where the source stands among outputs and K
    int64_t* nans;                    // set to 1 for NaN in an FP8 weight, which PanelFp8 could not read, or in block scales
};

// Ops that were taken down to be run one after the other: function, bytes of the arguments, arguments, and so on.
struct RunAllArgs {
    const std::byte* list;
    int64_t bytes;
    int64_t* failed;  // which one did, if the status says so
};

struct LinearArgs {
    const float* x[2];  // [rows, columns[i]]
    int64_t stride[2], columns[2];
    int64_t rows;
    const std::byte* panels;
    int64_t format, width, outputs;
    const float* scale;        // [outputs] or null: the factor of the products
    const float* bias;         // [outputs] or null
    const float* norm_weight;  // [columns 0 + 1] or null
    double norm_eps;
    int64_t norm_groups, relu2_from;  // relu2 from this column on
    const float* residual;
    int64_t residual_stride;
    float* y;  // [rows, outputs]
};

struct ExpertsArgs {
    const float* x;  // [rows, width]
    int64_t stride, rows, top_k;
    const int64_t* picked;   // [rows, top_k]
    const float* weights;    // [rows, top_k]
    const std::byte* up;     // per expert, panels of ``inner`` outputs over ``up_width``
    const std::byte* down;   // per expert, panels of ``outputs`` outputs over ``down_width``
    int64_t format, experts, columns, up_width, inner, down_width;
    const float* up_scale;    // [experts] or null: the factor of the products
    const float* down_scale;
    const float* residual;  // [rows, columns] or null
    int64_t residual_stride;
    float* y;  // [rows, columns]
};

struct MambaArgs {
    const float* projected;  // [tokens, inner + channels + heads]: gate, input of the convolution, raw dt
    int64_t stride;
    std::byte* conv;  // [slots, ring, channels]
    int64_t format, conv_slot, conv_entry, ring;
    float* ssm;  // [slots, heads, head_dim, state_size]
    int64_t ssm_slot, ssm_head, ssm_row;
    const float* conv_weight;  // [channels, taps]
    int64_t taps;
    const float* conv_bias;  // [channels] or null
    const float *a, *d, *dt_bias;  // [heads]
    int64_t heads, head_dim, groups, state_size;
    float* y;  // [tokens, inner]
};

struct MambaUpdateArgs {
    MambaArgs mamba;
    const int64_t *slots, *positions;  // [sequences]
    int64_t sequences, rows;
};

struct MambaPrefillArgs {
    MambaArgs mamba;
    int64_t slot, start, tokens, chunk;
};

struct NormArgs {
    const float* x;  // [rows, columns]
    int64_t stride, rows, columns, groups;
    const float* weight;  // [columns]
    double eps;
    float* y;  // [rows, columns]
};

struct StepInputsArgs {
    const int64_t *last_token, *length;  // [num_slots]
    const int64_t* slots;                // [decodes]
    int64_t decodes;
    const int64_t* prompt_ids;  // [prompts]
    int64_t prompts;
    int32_t* page_table;  // [num_slots, pages]
    int64_t table_stride;
    const int64_t* writes;  // [write_count, 3]: slot, index, page
    int64_t write_count;
    int64_t last_token_step, length_step, slots_step, prompt_step, page_step, write_stride, field_step;
    int64_t *token_ids, *positions;  // [decodes + prompts], [decodes]
};

struct EmbedArgs {
    const std::byte* table;  // [vocab, columns]
    int64_t format, stride, columns;
    const int64_t* ids;
    int64_t ids_step, rows;
    float* y;  // [rows, columns]
};

struct RouteArgs {
    const float* logits;  // [rows, experts]
    int64_t stride, rows, experts;
    const float* bias;  // [experts]
    int64_t top_k, groups, topk_groups, normalise;
    double scale;
    int64_t* picked;  // [rows, top_k]
    float* weights;   // [rows, top_k]
};

struct SampleArgs {
    const float* logits;  // [rows, vocab]
    int64_t stride, rows, vocab;
    const uint8_t* mask;  // [rows, vocab] or null
    int64_t mask_stride;
    const int64_t* slots;                                                               // [rows]
    int64_t *last_token, *length, *tokens_left, *phase, *remaining, *cursor, *finish;  // SamplerState, [num_slots]
    const float* temperature;
    const double* top_p;
    const int64_t *seed, *choice;
    const uint8_t* ignore_eos;
    const int64_t* control;  // think, end_think, tool_call, the end-of-sequence ids, the closing
    int64_t eos_count, closing_count;
    int64_t* integers;  // [3, rows]: tokens, phases, finish
    float* logprobs;    // [rows] or null
    int64_t top_k;      // 0 without logprobs
    int64_t* top_ids;   // [rows, top_k]
    float* top_logprobs;
};

// What both kinds of attention are given.
struct AttentionArgs {
    const float *q, *k, *v;                             // [rows, heads or kv_heads, width]
    int64_t q_stride[2], k_stride[2], v_stride[2];      // between rows, between heads
    int64_t rows, heads, kv_heads, width;
    std::byte *keys, *values;                           // [pages, page_size, kv_heads, width]
    int64_t format, page_size;                          // attention.h has the formats
    double k_scale, v_scale, scale;
    const int32_t* table;  // [slots, pages of a sequence]
    int64_t table_stride;
    float* out;  // [rows, heads, width]
};

struct DecodeAttentionArgs {
    AttentionArgs attention;
    const int64_t *slots, *positions;  // [sequences]
    int64_t sequences, each;           // each: new tokens of a sequence
};

struct PrefillAttentionArgs {
    AttentionArgs attention;
    int64_t slot, start;
};

void pack(Pool&, const PackArgs&);
void linear(Pool&, const LinearArgs&);
void experts(Pool&, const ExpertsArgs&);
void rms_norm(Pool&, const NormArgs&);
void step_inputs(Pool&, const StepInputsArgs&);
void embed(Pool&, const EmbedArgs&);
void route(Pool&, const RouteArgs&);
void sample(Pool&, const SampleArgs&);
void mamba_update(Pool&, const MambaUpdateArgs&);
void mamba_prefill(Pool&, const MambaPrefillArgs&);
void decode_attention(Pool&, const DecodeAttentionArgs&);
void prefill_attention(Pool&, const PrefillAttentionArgs&);

}  // namespace headrace
