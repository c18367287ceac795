// Attention of new frames to the ring of a layer's earlier frames and to each other, with relative positions
// (Transformer-XL): weights = softmax((q + u) k + (q + v) p over visible frames), y = weights v.
//
// qkv [B, T, 3 D] (queries are scaled), K and V rings of all slots [S, H, C, D / H], positions [C + 2 T - 1, D] of the
// distances C + T - 1 down to 1 - T, u and v [H, D / H], position [B] (frames before this step), the visible frames
// [B, 1] (ring entries of age 1 to `old`, new frames before `new`), and the slot of each row [B], which differ. Output:
// y [B, T, D], 0 if no frame is visible. The new keys and values replace those at (position + t) mod C in the rings.

#include "operators.h"

typedef struct {
    const float *qkv, *positions, *u, *v;
    const int64_t *position, *old, *new, *slots;
    float *k_rings, *v_rings, *y;
    int64_t rows, frames, width, heads, ring;
    int64_t scores_stride;  // the visible frames, at most, in whole LANES
    int failed;
} Call;

typedef struct {
    const float *key, *value;
    const float *position;  // relative to the first new frame; those relative to the next ones are the rows before
} Frame;

// Unlike those of the other operators, these multiplications and additions are fused where the processor can. The
// results of a processor without AVX-512, on which engines do not use the operators, have other last bits.
#pragma GCC optimize("fp-contract=fast")

#define UNROLL _Pragma("GCC unroll 8")

// scores[t][j] = u[t] visible[j].key + v[t] (visible[j].position - t rows) of a block of queries and keys, from query
// `t` and key `j` on. Vectors are read once for the block, whose sums stay in registers. The order of the additions of
// a score does not depend on the block.
INLINE void score_block(
    const Frame *visible, int64_t t, int64_t j, const int queries, const int keys, const float *u, const float *v,
    int64_t width, int64_t size, float *scores, int64_t stride
) {
    Lanes sums[2][4] = {{{0}}};
    float rest[2][4] = {{0}};
    const int64_t whole = size - size % LANES;
    const float *key[4], *place[4];
    u += t * size, v += t * size, scores += t * stride + j;
    UNROLL for (int b = 0; b < keys; b++) key[b] = visible[j + b].key, place[b] = visible[j + b].position - t * width;
    for (int64_t i = 0; i < whole; i += LANES)
        UNROLL for (int a = 0; a < queries; a++) UNROLL for (int b = 0; b < keys; b++) {
            sums[a][b] += *(const Lanes *)(u + a * size + i) * *(const Lanes *)(key[b] + i);
            sums[a][b] += *(const Lanes *)(v + a * size + i) * *(const Lanes *)(place[b] - a * width + i);
        }
    for (int64_t i = whole; i < size; i++)
        UNROLL for (int a = 0; a < queries; a++) UNROLL for (int b = 0; b < keys; b++)
            rest[a][b] += u[a * size + i] * key[b][i] + v[a * size + i] * place[b][i - a * width];
    UNROLL for (int a = 0; a < queries; a++)
        UNROLL for (int b = 0; b < keys; b++) scores[a * stride + b] = sum_lanes(sums[a][b]) + rest[a][b];
}

// The scores of all queries and visible keys. The queries of a key use adjacent positions, which are in a near cache.
INLINE void score_all(
    const Frame *visible, int64_t frames, int64_t count, const float *u, const float *v, int64_t width, int64_t size,
    float *scores, int64_t stride
) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
        int64_t t = 0;
        // The rings of many streams are not in a cache: request values, which are used after the scores, and later
        // keys.
        for (int b = 0; b < 4; b++)
            for (int64_t i = 0; i < size; i += LANES) {
                __builtin_prefetch(visible[j + b].value + i, 0, 2);
                if (j + 12 <= count) __builtin_prefetch(visible[j + b + 8].key + i, 0, 3);
            }
        for (; t + 2 <= frames; t += 2) score_block(visible, t, j, 2, 4, u, v, width, size, scores, stride);
        if (t < frames) score_block(visible, t, j, 1, 4, u, v, width, size, scores, stride);
    }
    for (; j < count; j++)
        for (int64_t t = 0; t < frames; t++) score_block(visible, t, j, 1, 1, u, v, width, size, scores, stride);
}

// `scores` have memory for a multiple of LANES, of which those after `count` become 0.
INLINE void softmax(float *scores, int64_t count) {
    const int64_t padded = (count + LANES - 1) / LANES * LANES;
    Lanes sums = {0};
    float largest = scores[0];
    for (int64_t j = 1; j < count; j++) largest = scores[j] > largest ? scores[j] : largest;
    for (int64_t j = count; j < padded; j++) scores[j] = largest;
    for (int64_t j = 0; j < padded; j++) scores[j] = exponential(scores[j] - largest);
    for (int64_t j = count; j < padded; j++) scores[j] = 0;
    for (int64_t j = 0; j < padded; j += LANES) sums += *(const Lanes *)(scores + j);
    const float factor = 1.0f / sum_lanes(sums);
    for (int64_t j = 0; j < padded; j++) scores[j] *= factor;
}

// y[t] = sum of scores[t][j] * visible[j].value for `queries` <= 2, whose sums stay in registers.
INLINE void add_weighted(
    const float *scores, int64_t stride, const Frame *visible, int64_t count, const int queries, int64_t size,
    int64_t width, float *y
) {
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES) {
        Lanes sums[2][4] = {{{0}}};
        for (int64_t j = 0; j < count; j++)
            UNROLL for (int part = 0; part < 4; part++) {
                const Lanes value = *(const Lanes *)(visible[j].value + i + part * LANES);
                UNROLL for (int a = 0; a < queries; a++) sums[a][part] += scores[a * stride + j] * value;
            }
        UNROLL for (int a = 0; a < queries; a++) memcpy(y + a * width + i, sums[a], sizeof sums[a]);
    }
    for (; i < size; i++)
        UNROLL for (int a = 0; a < queries; a++) {
            float sum = 0;
            for (int64_t j = 0; j < count; j++) sum += scores[a * stride + j] * visible[j].value[i];
            y[a * width + i] = sum;
        }
}

// Attention of one head of one row. `memory` is that of `bytes_of_head`.
INLINE void attend_size(const Call *call, int64_t row, int64_t head, char *memory, const int64_t size) {
    const int64_t frames = call->frames, width = call->width, ring = call->ring, stride = call->scores_stride;
    const int64_t position = call->position[row], old = call->old[row];
    const int64_t new = call->new[row] < frames ? call->new[row] : frames;
    const float *qkv = call->qkv + row * frames * 3 * width + head * size;
    const float *first = call->positions + (ring + frames - 1) * width + head * size;
    float *k_ring = call->k_rings + (call->slots[row] * call->heads + head) * ring * size;
    float *v_ring = call->v_rings + (call->slots[row] * call->heads + head) * ring * size;
    Frame *visible = (Frame *)memory;
    float *scores = (float *)(visible + ring + frames), *query_u = scores + frames * stride;
    float *query_v = query_u + frames * size;

    int64_t count = 0;
    for (int64_t r = 0; r < ring; r++) {
        int64_t age = (position - 1 - r) % ring;
        age += age < 0 ? ring + 1 : 1;
        if (age > old) continue;
        visible[count++] = (Frame){k_ring + r * size, v_ring + r * size, first - age * width};
    }
    for (int64_t j = 0; j < new; j++) {
        const float *key = qkv + (3 * j + 1) * width;
        visible[count++] = (Frame){key, key + width, first + j * width};
    }
    for (int64_t t = 0; t < frames; t++) {
        const float *query = qkv + 3 * t * width, *u = call->u + head * size, *v = call->v + head * size;
        for (int64_t i = 0; i < size; i++) query_u[t * size + i] = query[i] + u[i];
        for (int64_t i = 0; i < size; i++) query_v[t * size + i] = query[i] + v[i];
    }
    score_all(visible, frames, count, query_u, query_v, width, size, scores, stride);
    float *y = call->y + row * frames * width + head * size;
    if (count)
        for (int64_t t = 0; t < frames; t++) softmax(scores + t * stride, count);
    int64_t t = 0;
    for (; t + 2 <= frames; t += 2)
        add_weighted(scores + t * stride, stride, visible, count, 2, size, width, y + t * width);
    if (t < frames) add_weighted(scores + t * stride, stride, visible, count, 1, size, width, y + t * width);
    for (int64_t t = 0; t < frames; t++) {
        const float *key = qkv + (3 * t + 1) * width;
        const int64_t at = (position + t) % ring * size;
        memcpy(k_ring + at, key, size * sizeof *key);
        memcpy(v_ring + at, key + width, size * sizeof *key);
    }
}

// Loops of the usual size are unrolled.
VECTORIZED static void attend(const Call *call, int64_t row, int64_t head, char *memory) {
    const int64_t size = call->width / call->heads;
    if (size == 128)
        attend_size(call, row, head, memory, 128);
    else
        attend_size(call, row, head, memory, size);
}

static size_t bytes_of_head(const Call *call) {
    const int64_t queries = 2 * call->frames * (call->width / call->heads);
    const int64_t floats = call->frames * call->scores_stride + queries;
    return (call->ring + call->frames) * sizeof(Frame) + floats * sizeof(float);
}

static void attend_head(void *data, size_t index) {
    Call *call = data;
    char *memory = scratch(bytes_of_head(call));
    if (memory)
        attend(call, (int64_t)index / call->heads, (int64_t)index % call->heads, memory);
    else
        call->failed = 1;
}

static OrtStatus *run(void *kernel, OrtKernelContext *context) {
    (void)kernel;
    Tensor in[10], *qkv = in, *k = in + 1, *v = in + 2, *positions = in + 3, *bias_u = in + 4, *bias_v = in + 5;
    Tensor *position = in + 6, *old = in + 7, *new = in + 8, *slots = in + 9;
    OrtStatus *status = read_inputs(context, in, 10);
    if (status) return status;
    if (qkv->rank != 3 || k->rank != 4 || k->dims[1] < 1 || k->dims[2] < 1)
        return ort->CreateStatus(ORT_INVALID_ARGUMENT, "RelativeAttention: an input has an unsupported shape");
    Call call = {
        .qkv = qkv->data,
        .k_rings = k->data,
        .v_rings = v->data,
        .positions = positions->data,
        .u = bias_u->data,
        .v = bias_v->data,
        .position = position->data,
        .old = old->data,
        .new = new->data,
        .slots = slots->data,
        .rows = qkv->dims[0],
        .frames = qkv->dims[1],
        .heads = k->dims[1],
        .ring = k->dims[2],
        .width = k->dims[1] * k->dims[3],
    };
    call.scores_stride = (call.ring + call.frames + LANES - 1) / LANES * LANES;
    const int64_t rows = call.rows, frames = call.frames, size = k->dims[3], column[] = {rows, 1};
    const int64_t places[] = {call.ring + 2 * frames - 1, call.width}, biases[] = {call.heads, size};
    const int64_t shape[] = {rows, frames, call.width};
    if (qkv->dims[2] != 3 * call.width || !has_shape(v, 4, k->dims) || !has_shape(positions, 2, places) ||
        !has_shape(bias_u, 2, biases) || !has_shape(bias_v, 2, biases) || !has_shape(position, 1, &rows) ||
        !has_shape(old, 2, column) || !has_shape(new, 2, column))
        return ort->CreateStatus(ORT_INVALID_ARGUMENT, "RelativeAttention: the shapes of the inputs differ");
    if (!are_slots(slots, rows, k->dims[0]))
        return ort->CreateStatus(ORT_INVALID_ARGUMENT, "RelativeAttention: a row has no slot in the rings");
    for (int64_t row = 0; row < rows; row++)
        if (call.position[row] < 0)
            return ort->CreateStatus(ORT_INVALID_ARGUMENT, "RelativeAttention: a position is negative");
    if ((status = create_output(context, 0, shape, 3, &call.y))) return status;
    const int64_t tasks = rows * call.heads;
    if (rows * frames == 1)  // less work than waking up a thread
        for (int64_t index = 0; index < tasks; index++) attend_head(&call, index);
    else if (tasks && (status = ort->KernelContext_ParallelFor(context, attend_head, tasks, 0, &call)))
        return status;
    return call.failed ? ort->CreateStatus(ORT_FAIL, "RelativeAttention: out of memory") : NULL;
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
    (void)op, (void)api, (void)info;
    *out = NULL;  // the operator has no attributes
    return NULL;
}

static const char *op_name(const OrtCustomOp *op) { return (void)op, "RelativeAttention"; }
static size_t op_inputs(const OrtCustomOp *op) { return (void)op, 10; }
static int op_input_type(const OrtCustomOp *op, size_t index) { return (void)op, index < 6 ? ORT_FLOAT : ORT_INT64; }

const OrtCustomOp relative_attention = {
    OPERATOR_FIELDS,
    .GetName = op_name,
    .GetInputType = op_input_type,
    .GetInputTypeCount = op_inputs,
    .GetInputCharacteristic = always_required,
    .CreateKernelV2 = create,
    .KernelComputeV2 = run,
};
