// The convolution module of a Conformer layer between its pointwise layers:
// y = silu(norm(depthwise(concat(cache, x[:C] * sigmoid(x[C:]) * valid)))). The last K - 1 frames of the input of the
// depthwise convolution replace the cache.
//
// x [B, T, 2 C], valid [B, 1, T], caches of all slots [S, C, K - 1], weights [K, C], the slot of each row [B], which
// differ, bias [C], norm weight and bias [C]. Bias and norm are optional (a batch norm is part of the weights).
// Output: y [B, T, C].

#include "operators.h"

typedef struct {
    const float *x, *valid, *weights, *bias, *norm_weight, *norm_bias;
    const int64_t *slots;
    float *caches, *y;
    int64_t rows, frames, channels, taps;
    float epsilon;
    int failed;
} Call;

VECTORIZED static void convolve(const Call *call, int64_t row, float *frames) {
    const int64_t size = call->channels, past = call->taps - 1;
    float *cache = call->caches + call->slots[row] * size * past;
    for (int64_t k = 0; k < past; k++)
        for (int64_t c = 0; c < size; c++) frames[k * size + c] = cache[c * past + k];
    for (int64_t t = 0; t < call->frames; t++) {
        const float *x = call->x + (row * call->frames + t) * 2 * size, valid = call->valid[row * call->frames + t];
        float *out = frames + (past + t) * size;
        for (int64_t c = 0; c < size; c++) out[c] = x[c] * sigmoid(x[size + c]) * valid;
    }
    for (int64_t t = 0; t < call->frames; t++) {
        float *y = call->y + (row * call->frames + t) * size;
        if (call->bias)
            memcpy(y, call->bias, size * sizeof *y);
        else
            memset(y, 0, size * sizeof *y);
        for (int64_t k = 0; k < call->taps; k++) {
            const float *weights = call->weights + k * size, *in = frames + (t + k) * size;
            for (int64_t c = 0; c < size; c++) y[c] += weights[c] * in[c];
        }
        if (call->norm_weight) normalize(y, call->norm_weight, call->norm_bias, call->epsilon, size, y);
        for (int64_t c = 0; c < size; c++) y[c] *= sigmoid(y[c]);
    }
    for (int64_t c = 0; c < size; c++)
        for (int64_t k = 0; k < past; k++) cache[c * past + k] = frames[(call->frames + k) * size + c];
}

static void convolve_row(void *data, size_t row) {
    Call *call = data;
    float *frames = scratch((call->taps - 1 + call->frames) * call->channels * sizeof *frames);
    if (frames)
        convolve(call, (int64_t)row, frames);
    else
        call->failed = 1;
}

static OrtStatus *run(void *attributes, OrtKernelContext *context) {
    Tensor in[8], *x = in, *valid = in + 1, *caches = in + 2, *weights = in + 3, *slots = in + 4, *bias = in + 5;
    Tensor *norm = in + 6;
    OrtStatus *status = read_inputs(context, in, 8);
    if (status) return status;
    if (x->rank != 3 || weights->rank != 2 || caches->rank != 3)
        return ort->CreateStatus(ORT_INVALID_ARGUMENT, "CausalConvolution: an input has an unsupported shape");
    Call call = {
        .x = x->data,
        .valid = valid->data,
        .caches = caches->data,
        .weights = weights->data,
        .slots = slots->data,
        .bias = bias->data,
        .norm_weight = norm[0].data,
        .norm_bias = norm[1].data,
        .rows = x->dims[0],
        .frames = x->dims[1],
        .channels = weights->dims[1],
        .taps = weights->dims[0],
        .epsilon = ((const Attributes *)attributes)->epsilon,
    };
    const int64_t rows = call.rows, channels = call.channels, mask[] = {rows, 1, call.frames};
    const int64_t past[] = {caches->dims[0], channels, call.taps - 1}, shape[] = {rows, call.frames, channels};
    if (x->dims[2] != 2 * channels || !has_shape(valid, 3, mask) || !has_shape(caches, 3, past) ||
        !has_shape(bias, 1, &channels) || !has_shape(norm, 1, &channels) || !has_shape(norm + 1, 1, &channels) ||
        !norm[0].data != !norm[1].data)
        return ort->CreateStatus(ORT_INVALID_ARGUMENT, "CausalConvolution: the shapes of the inputs differ");
    if (!are_slots(slots, rows, caches->dims[0]))
        return ort->CreateStatus(ORT_INVALID_ARGUMENT, "CausalConvolution: a row has no slot in the caches");
    if ((status = create_output(context, 0, shape, 3, &call.y))) return status;
    if (rows == 1)
        convolve_row(&call, 0);
    else if (rows && (status = ort->KernelContext_ParallelFor(context, convolve_row, rows, 0, &call)))
        return status;
    return call.failed ? ort->CreateStatus(ORT_FAIL, "CausalConvolution: out of memory") : NULL;
}

static const char *op_name(const OrtCustomOp *op) { return (void)op, "CausalConvolution"; }
static size_t op_inputs(const OrtCustomOp *op) { return (void)op, 8; }
static int op_input_type(const OrtCustomOp *op, size_t index) { return (void)op, index == 4 ? ORT_INT64 : ORT_FLOAT; }
static int op_input(const OrtCustomOp *op, size_t index) { return (void)op, index < 5 ? ORT_REQUIRED : ORT_OPTIONAL; }

const OrtCustomOp causal_convolution = {
    OPERATOR_FIELDS,
    .GetName = op_name,
    .GetInputType = op_input_type,
    .GetInputTypeCount = op_inputs,
    .GetInputCharacteristic = op_input,
    .CreateKernelV2 = create_attributes,
    .KernelComputeV2 = run,
};
