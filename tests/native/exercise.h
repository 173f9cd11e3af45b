// Inputs from a seed, the same on every machine; a library's ops by name; a hash of all that they leave behind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace exercise {

// panels.h and attention.h have these numbers.
enum Format : int64_t { FP32 = 0, BF16 = 1, FP16 = 2, E4M3 = 3, NVFP4 = 4 };
// Of an element; NVFP4 has none.
inline int64_t bytes_of(int64_t format) { return format == FP32 ? 4 : format == E4M3 ? 1 : 2; }

// SplitMix64 (Steele, Lea and Flood 2014): a counter, and a bijection of its words.
inline uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

// A compiled library: what library.py does of it.
class Library {
public:
    explicit Library(const char* path);  // ends the program where it is not one
    void* open(int threads) const;
    void close(void* pool) const;
    void call(const std::string& op, void* pool, const void* args, size_t bytes) const;

private:
    void* handle;
    void* symbol(const std::string& name) const;
};

// A mistake that a sanitizer must find.
enum class Fault {
    NONE,
    OVERRUN,  // strided tensors are one element short
    RACE,     // every op runs twice at the same time, on the same memory
};

// [rows, columns] whose rows stand ``stride`` apart; nothing behind the last element.
struct Matrix {
    std::vector<float> values;
    int64_t stride;
};
struct Bytes {
    std::vector<std::byte> values;
    int64_t stride;  // elements
};

// One case: its inputs, and what came of them. Order matters: what is asked for first gets the first random words, so
// calls stand in statements or braces of their own, never side by side as arguments.
class Case {
public:
    Case(const Library& library, void* pool, Fault fault, uint64_t seed);
    ~Case();

    uint64_t word() { return mix(counter += 0x9e3779b97f4a7c15u); }
    int64_t between(int64_t least, int64_t most) { return least + int64_t(word() % uint64_t(most - least + 1)); }
    bool once_in(int64_t n) { return word() % uint64_t(n) == 0; }
    float unit() { return float(word() >> 40) * 0x1p-24f; }  // in [0, 1)
    // A size within bounds, often one beside a vector's, a panel's or a block's; told in the report.
    int64_t size(int64_t least, int64_t most);
    std::vector<int64_t> distinct(int64_t count, int64_t below);  // in a random order

    // Mostly around zero; in one case of three extreme ones among them, in one of three NaN and infinities too.
    float number(float scale = 1.0f);
    std::vector<float> numbers(int64_t count, float scale = 1.0f);
    std::vector<std::byte> elements(int64_t format, int64_t count, float scale = 1.0f);
    Matrix matrix(int64_t rows, int64_t columns, float scale = 1.0f);
    Bytes byte_matrix(int64_t format, int64_t rows, int64_t columns, float scale = 1.0f);
    // Weights [outputs, columns], from several parts side by side, as panels.h wants them.
    std::vector<std::byte> panels(int64_t format, int64_t outputs, int64_t columns);
    static int64_t padded(int64_t format, int64_t columns);  // K of such panels

    template <class Args>
    void run(const char* op, const Args& args) {
        run(op, &args, sizeof args);
    }

    // Takes results down; all NaN are one, since their sign and payload are a machine's own.
    void result(const std::vector<float>& values);
    void result(int64_t format, const std::vector<std::byte>& values);
    template <class Integer>
    void result(const std::vector<Integer>& values) {
        for (const Integer value : values) add(uint64_t(value));
    }

    std::string report() const;  // sizes and hash

private:
    const Library& library;
    void* pool;
    const bool own_pool;
    const Fault fault;
    uint64_t counter, hash = 0;
    int wildness;
    std::string sizes;

    void run(const char* op, const void* args, size_t bytes);
    std::vector<std::byte> nvfp4_panels(int64_t outputs, int64_t width);
    void add(uint64_t value) { hash = mix(hash ^ value); }
    int64_t stride_of(int64_t columns) { return once_in(2) ? columns : columns + between(1, 9); }
    int64_t length_of(int64_t rows, int64_t columns, int64_t stride) const;
};

// The ops, by the name that their lines of the report begin with.
struct Exercise {
    const char* name;
    void (*run)(Case&);
};
void linear(Case&);
void experts(Case&);
void route(Case&);
void rms_norm(Case&);
void step_inputs(Case&);
void embed(Case&);
void mamba_update(Case&);
void mamba_prefill(Case&);
void decode_attention(Case&);
void prefill_attention(Case&);
void sample(Case&);

}  // namespace exercise
