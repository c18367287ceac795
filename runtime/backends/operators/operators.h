// What the operators share: their inputs, memory, and functions of vectors.

#pragma once

#include <stdlib.h>
#include <string.h>

#include "onnxruntime_abi.h"

#if defined(__x86_64__) && defined(__linux__)
#define X86 1
// Loops over floats are compiled for several instruction sets. They have the same results, because multiplications and
// additions are not fused (-ffp-contract=off) and sums have 16 parts on every processor.
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define X86 0
#define VECTORIZED
#endif

#define INLINE static inline __attribute__((always_inline))
#define EXPORTED __attribute__((visibility("default")))

enum { MAX_DIMS = 8, LANES = 16 };

typedef struct {
    void *data;  // NULL if the optional input is absent
    int64_t dims[MAX_DIMS];
    size_t rank;
} Tensor;

extern const OrtApi *ort;
extern const OrtCustomOp int8_linear, relative_attention, causal_convolution;

OrtStatus *read_inputs(OrtKernelContext *context, Tensor *tensors, size_t count);
OrtStatus *create_output(OrtKernelContext *context, size_t index, const int64_t *dims, size_t rank, float **data);
int has_shape(const Tensor *tensor, size_t rank, const int64_t *dims);  // an absent tensor has every shape
int are_slots(const Tensor *slots, int64_t rows, int64_t count);         // whether [rows] are numbers below `count`

// Memory of the calling thread, aligned to a cache line, which grows to the largest request: allocating a megabyte
// takes longer than using it. The next request of the thread invalidates it. NULL without memory.
void *scratch(size_t bytes);

// The attributes of a node; an operator reads those that it has.
typedef struct {
    float epsilon;
    int64_t silu, depth, offset;
} Attributes;

// Create the `Attributes` of a node, and read its `epsilon`.
OrtStatus *create_attributes(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out);

// The fields that all operators share: inputs and outputs in memory of the CPU, and one output, of floats.
const char *cpu_provider(const OrtCustomOp *op);
size_t one_output(const OrtCustomOp *op);
int always_required(const OrtCustomOp *op, size_t index);
int always_float(const OrtCustomOp *op, size_t index);
int cpu_memory(const OrtCustomOp *op, size_t index);
#define OPERATOR_FIELDS                                                                                               \
    .version = ORT_CUSTOM_OP_VERSION, .GetExecutionProviderType = cpu_provider, .GetOutputType = always_float,        \
    .GetOutputTypeCount = one_output, .KernelDestroy = free, .GetOutputCharacteristic = always_required,              \
    .GetInputMemoryType = cpu_memory

// 16 floats, which a processor without AVX-512 has in several registers.
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE float sum_lanes(Lanes lanes) {
    typedef float Half __attribute__((vector_size(32))), Quarter __attribute__((vector_size(16)));
    Half halves[2];
    Quarter quarters[2];
    memcpy(halves, &lanes, sizeof halves);
    halves[0] += halves[1];
    memcpy(quarters, halves, sizeof quarters);
    quarters[0] += quarters[1];
    return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
}

// exp by a polynomial of degree 6 after range reduction (Cephes), so that loops are vectorised and have the same result
// on every processor. Arguments are limited to [-87, 88].
INLINE float exponential(float x) {
    float t = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
    float n = t * 1.44269504088896341f + 12582912.0f - 12582912.0f;  // rounds to an integer
    float r = t - n * 0.693359375f - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Layer normalisation of a row: y = (x - mean) / sqrt(variance + epsilon) * weight + bias. `y` may be `x`.
INLINE void normalize(
    const float *x, const float *weight, const float *bias, float epsilon, int64_t size, float *y
) {
    Lanes sums = {0}, squares = {0};
    int64_t whole = size - size % LANES;
    float mean = 0, variance = 0;
    for (int64_t i = 0; i < whole; i += LANES) sums += *(const Lanes *)(x + i);
    for (int64_t i = whole; i < size; i++) mean += x[i];
    mean = (sum_lanes(sums) + mean) / (float)size;
    for (int64_t i = 0; i < whole; i += LANES) {
        Lanes difference = *(const Lanes *)(x + i) - mean;
        squares += difference * difference;
    }
    for (int64_t i = whole; i < size; i++) variance += (x[i] - mean) * (x[i] - mean);
    variance = (sum_lanes(squares) + variance) / (float)size;
    float factor = 1.0f / __builtin_sqrtf(variance + epsilon);
    for (int64_t i = 0; i < size; i++) y[i] = (x[i] - mean) * factor * weight[i] + bias[i];
}
