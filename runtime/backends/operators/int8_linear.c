// Linear layers with 8-bit weights for ONNX Runtime's CPU provider: y = act(norm(x) W + b) + r.
//
// The weights of a column have one scale, the inputs of a row have one: unit = max |x| / 127. Every result therefore
// depends on its own row only. Sums are exact integers, so all instruction sets give the same bits.
//
// Weights are unsigned (w + 128), in panels of 64 columns: [N / 64, K / 4, 64, 4], padded with zeros (128) to multiples
// of 64. This is the operand order of VNNI and AMX, so the file is used as it is, without a copy. The sum of a row's
// inputs times 128 is subtracted from its sums.

#include "operators.h"

#if X86
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { COLUMNS = 64, BLOCK = 16 };

// sums[r][n] = sum over k of weights[k / 4][n][k % 4] * inputs[r][k], for `rows` <= BLOCK rows. `inputs` has a stride of
// `depth` bytes, a multiple of 64, and BLOCK rows of memory.
typedef void Product(const uint8_t *weights, const int8_t *inputs, int rows, int64_t depth, int32_t (*sums)[COLUMNS]);

static void product_portable(
    const uint8_t *weights, const int8_t *inputs, int rows, int64_t depth, int32_t (*sums)[COLUMNS]
) {
    memset(sums, 0, (size_t)rows * sizeof *sums);
    for (int64_t k = 0; k < depth; k += 4)
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < COLUMNS; n++)
                for (int j = 0; j < 4; j++)
                    sums[r][n] += weights[(k * COLUMNS) + (4 * n) + j] * inputs[r * depth + k + j];
}

#if X86

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

// The sums of R rows stay in registers: 4 R of them, 4 for weights and one for an input. Loops are unrolled early, because
// the compiler keeps arrays that are indexed by a variable in memory.
#define UNROLL _Pragma("GCC unroll 8")
#define ROWS_VNNI(R)                                                                                                  \
    VNNI static void rows_vnni_##R(                                                                                   \
        const uint8_t *weights, const int8_t *inputs, int64_t depth, int32_t (*sums)[COLUMNS]                         \
    ) {                                                                                                               \
        __m512i total[R][4], column[4];                                                                               \
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < 4; c++) total[r][c] = _mm512_setzero_si512();   \
        for (int64_t k = 0; k < depth; k += 4) {                                                                      \
            const uint8_t *at = weights + k * COLUMNS;                                                                \
            UNROLL for (int c = 0; c < 4; c++) {                                                                      \
                column[c] = _mm512_loadu_si512(at + 64 * c);                                                          \
                if (R == 1) _mm_prefetch((const char *)at + 64 * c + 2048, _MM_HINT_T0);                              \
            }                                                                                                         \
            UNROLL for (int r = 0; r < R; r++) {                                                                      \
                int32_t four;                                                                                         \
                memcpy(&four, inputs + r * depth + k, 4);                                                             \
                __m512i input = _mm512_set1_epi32(four);                                                              \
                UNROLL for (int c = 0; c < 4; c++) total[r][c] = _mm512_dpbusd_epi32(total[r][c], column[c], input);  \
            }                                                                                                         \
        }                                                                                                             \
        UNROLL for (int r = 0; r < R; r++)                                                                            \
            UNROLL for (int c = 0; c < 4; c++) _mm512_storeu_si512(&sums[r][16 * c], total[r][c]);                    \
    }

ROWS_VNNI(1)
ROWS_VNNI(2)
ROWS_VNNI(3)
ROWS_VNNI(4)
ROWS_VNNI(5)
ROWS_VNNI(6)

VNNI static void product_vnni(
    const uint8_t *weights, const int8_t *inputs, int rows, int64_t depth, int32_t (*sums)[COLUMNS]
) {
    for (int blocks = (rows + 5) / 6; blocks > 0; blocks--) {
        int block = (rows + blocks - 1) / blocks;  // blocks of about the same size
        switch (block) {
            case 1: rows_vnni_1(weights, inputs, depth, sums); break;
            case 2: rows_vnni_2(weights, inputs, depth, sums); break;
            case 3: rows_vnni_3(weights, inputs, depth, sums); break;
            case 4: rows_vnni_4(weights, inputs, depth, sums); break;
            case 5: rows_vnni_5(weights, inputs, depth, sums); break;
            default: rows_vnni_6(weights, inputs, depth, sums);
        }
        rows -= block, inputs += block * depth, sums += block;
    }
}

#define AMX __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512vnni")))

// Tiles of 16 rows: 0 to 3 are sums, 4 inputs, 5 and 6 weights. If there are fewer rows, the sums of those that follow in
// memory are computed too, and not used.
AMX static void product_amx(
    const uint8_t *weights, const int8_t *inputs, int rows, int64_t depth, int32_t (*sums)[COLUMNS]
) {
    if (rows < 3) {
        product_vnni(weights, inputs, rows, depth, sums);
        return;
    }
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles __attribute__((aligned(64))) = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) tiles.bytes[tile] = 64, tiles.rows[tile] = 16;
    _tile_loadconfig(&tiles);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += 64) {
        const uint8_t *at = weights + k * COLUMNS;
        _tile_loadd(4, inputs + k, depth);
        _tile_loadd(5, at, 256);
        _tile_dpbsud(0, 4, 5);
        _tile_loadd(6, at + 64, 256);
        _tile_dpbsud(1, 4, 6);
        _tile_loadd(5, at + 128, 256);
        _tile_dpbsud(2, 4, 5);
        _tile_loadd(6, at + 192, 256);
        _tile_dpbsud(3, 4, 6);
    }
    _tile_stored(0, &sums[0][0], 256);
    _tile_stored(1, &sums[0][16], 256);
    _tile_stored(2, &sums[0][32], 256);
    _tile_stored(3, &sums[0][48], 256);
    _tile_release();
}

#endif

static const struct {
    const char *name;
    Product *product;
} PRODUCTS[] = {
#if X86
    {"amx", product_amx},
    {"vnni", product_vnni},
#endif
    {"portable", product_portable},
};

static int supported(const char *name) {
#if X86
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18, AMX_TILE = 1 << 24, AMX_INT8 = 1 << 25 };
    int vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl");
    if (!strcmp(name, "vnni")) return vnni;
    if (!strcmp(name, "amx")) {
        unsigned a = 7, b, c = 0, d;
        __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        // Linux reserves memory for the tiles of a process only if it asks for them.
        return vnni && d & AMX_TILE && d & AMX_INT8 &&
               syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    }
#endif
    return !strcmp(name, "portable");
}

static Product *product = product_portable;

// Use the product of a name, or, without a name, the fastest that is not portable. Return its name, or NULL.
EXPORTED const char *nemostream_int8_select(const char *name) {
    for (size_t i = 0; i < sizeof PRODUCTS / sizeof *PRODUCTS; i++) {
        int wanted = name ? !strcmp(name, PRODUCTS[i].name) : PRODUCTS[i].product != product_portable;
        if (wanted && supported(PRODUCTS[i].name)) {
            product = PRODUCTS[i].product;
            return PRODUCTS[i].name;
        }
    }
    return NULL;
}

// -- one call ---------------------------------------------------------------------------------------------------------

typedef struct {
    Product *product;
    const uint8_t *weights;
    const float *x, *scales, *bias, *residual, *norm_weight, *norm_bias;
    float *y;
    int64_t rows, depth, columns, padded_depth;
    int silu;
    float epsilon;
    float *normalized;  // [rows, depth]
    int8_t *inputs;     // [rows, padded_depth], and BLOCK rows more
    float *units;       // of each row
    int32_t *offsets;   // 128 times the sum of each row's inputs
} Call;

VECTORIZED static void quantize_row(const float *x, int64_t depth, int8_t *out, float *unit, int32_t *offset) {
    // The bits of positive floats have the order of their values; those of NaN are the largest.
    int32_t bits, largest_bits = 0, sum = 0;
    for (int64_t k = 0; k < depth; k++) {
        memcpy(&bits, x + k, 4);
        bits &= 0x7fffffff;
        largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    float largest, divisor;
    memcpy(&largest, &largest_bits, 4);
    divisor = largest * (1.0f / 127.0f);
    divisor = divisor < 1e-9f ? 1e-9f : divisor;  // silence
    const float shift = 12582912.0f;               // adding 1.5 * 2^23 rounds to an integer
    for (int64_t k = 0; k < depth; k++) {
        int32_t value = (int32_t)(x[k] / divisor + shift - shift);
        out[k] = (int8_t)value;
        sum += value;
    }
    *unit = divisor;
    *offset = 128 * sum;
}

VECTORIZED static void normalize_row(
    const float *x, const float *weight, const float *bias, float epsilon, int64_t size, float *y
) {
    normalize(x, weight, bias, epsilon, size, y);
}

static void quantize_rows(void *data, size_t row) {
    Call *call = data;
    int8_t *out = call->inputs + row * call->padded_depth;
    const float *x = call->x + row * call->depth;
    if (call->norm_weight) {
        float *y = call->normalized + row * call->depth;
        normalize_row(x, call->norm_weight, call->norm_bias, call->epsilon, call->depth, y);
        x = y;
    }
    quantize_row(x, call->depth, out, call->units + row, call->offsets + row);
    memset(out + call->depth, 0, call->padded_depth - call->depth);
}

VECTORIZED static void finish_row(const Call *call, const int32_t *sums, int64_t row, int64_t first, int count) {
    const float unit = call->units[row], *scales = call->scales + first;
    float *y = call->y + row * call->columns + first;
    int32_t offset = call->offsets[row];
    for (int n = 0; n < count; n++) y[n] = (float)(sums[n] - offset) * scales[n] * unit;
    if (call->bias) {
        const float *bias = call->bias + first;
        for (int n = 0; n < count; n++) y[n] += bias[n];
    }
    if (call->silu)
        for (int n = 0; n < count; n++) y[n] *= sigmoid(y[n]);
    if (call->residual) {
        const float *residual = call->residual + row * call->columns + first;
        for (int n = 0; n < count; n++) y[n] += residual[n];
    }
}

static void multiply_panel(void *data, size_t panel) {
    const Call *call = data;
    int64_t first = (int64_t)panel * COLUMNS;
    int count = (int)(call->columns - first < COLUMNS ? call->columns - first : COLUMNS);
    int32_t sums[BLOCK][COLUMNS] __attribute__((aligned(64)));
    for (int64_t row = 0; row < call->rows; row += BLOCK) {
        int rows = (int)(call->rows - row < BLOCK ? call->rows - row : BLOCK);
        const int8_t *inputs = call->inputs + row * call->padded_depth;
        call->product(call->weights + first * call->padded_depth, inputs, rows, call->padded_depth, sums);
        for (int r = 0; r < rows; r++) finish_row(call, sums[r], row + r, first, count);
    }
}

// -- operator ---------------------------------------------------------------------------------------------------------

static OrtStatus *run(void *kernel, OrtKernelContext *context) {
    const Attributes *attributes = kernel;
    Tensor in[7], *x = in, *weights = in + 1, *scales = in + 2, *bias = in + 3, *residual = in + 4, *norm = in + 5;
    OrtStatus *status = read_inputs(context, in, 7);
    if (status) return status;
    if (x->rank < 1 || weights->rank != 4 || scales->rank != 1)
        return ort->CreateStatus(ORT_INVALID_ARGUMENT, "Int8Linear: an input has the wrong number of dimensions");
    Call call = {
        .product = product,
        .x = x->data,
        .weights = weights->data,
        .scales = scales->data,
        .bias = bias->data,
        .residual = residual->data,
        .norm_weight = norm[0].data,
        .norm_bias = norm[1].data,
        .rows = 1,
        .depth = x->dims[x->rank - 1],
        .padded_depth = 4 * weights->dims[1],
        .columns = scales->dims[0],
        .silu = (int)attributes->silu,
        .epsilon = attributes->epsilon,
    };
    for (size_t i = 0; i + 1 < x->rank; i++) call.rows *= x->dims[i];
    if (call.depth > call.padded_depth || call.padded_depth % 64 || weights->dims[2] != COLUMNS ||
        weights->dims[3] != 4 || weights->dims[0] != (call.columns + COLUMNS - 1) / COLUMNS)
        return ort->CreateStatus(ORT_INVALID_ARGUMENT, "Int8Linear: the shapes of input, weights and scales differ");
    if (!has_shape(norm, 1, &call.depth) || !has_shape(norm + 1, 1, &call.depth) || !norm[0].data != !norm[1].data)
        return ort->CreateStatus(ORT_INVALID_ARGUMENT, "Int8Linear: the norm has another size than the input");
    x->dims[x->rank - 1] = call.columns;
    if (!has_shape(bias, 1, &call.columns) || !has_shape(residual, x->rank, x->dims))
        return ort->CreateStatus(ORT_INVALID_ARGUMENT, "Int8Linear: bias or residual has another size than the output");
    if ((status = create_output(context, 0, x->dims, x->rank, &call.y)) || !call.rows) return status;

    const size_t padded = call.rows + BLOCK;  // the tiles of AMX may read so many rows
    const size_t normalized = call.norm_weight ? call.rows * call.depth : 0;
    char *memory = scratch(padded * call.padded_depth + (normalized + 2 * call.rows) * sizeof(float));
    if (!memory) return ort->CreateStatus(ORT_FAIL, "Int8Linear: out of memory");
    call.inputs = (int8_t *)memory;
    call.normalized = (float *)(memory + padded * call.padded_depth);
    call.units = call.normalized + normalized;
    call.offsets = (int32_t *)(call.units + call.rows);
    if (call.rows * call.depth < 16384)
        for (int64_t row = 0; row < call.rows; row++) quantize_rows(&call, row);
    else if ((status = ort->KernelContext_ParallelFor(context, quantize_rows, call.rows, 0, &call)))
        return status;
    return ort->KernelContext_ParallelFor(context, multiply_panel, weights->dims[0], 0, &call);
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
    OrtStatus *status = create_attributes(op, api, info, out);
    return status ? status : ort->KernelInfoGetAttribute_int64(info, "silu", &((Attributes *)*out)->silu);
}

static const char *op_name(const OrtCustomOp *op) { return (void)op, "Int8Linear"; }
static size_t op_inputs(const OrtCustomOp *op) { return (void)op, 7; }
static int op_input_type(const OrtCustomOp *op, size_t index) { return (void)op, index == 1 ? ORT_UINT8 : ORT_FLOAT; }
static int op_input(const OrtCustomOp *op, size_t index) { return (void)op, index < 3 ? ORT_REQUIRED : ORT_OPTIONAL; }

const OrtCustomOp int8_linear = {
    OPERATOR_FIELDS,
    .GetName = op_name,
    .GetInputType = op_input_type,
    .GetInputTypeCount = op_inputs,
    .GetInputCharacteristic = op_input,
    .CreateKernelV2 = create,
    .KernelComputeV2 = run,
};
