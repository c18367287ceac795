// Linear layers with 8-bit weights for ONNX Runtime's CPU provider: y = act(norm(x) W + b) + r.
//
// The weights of a column have one scale, the inputs of a row have one: unit = max |x| / 127. Every result therefore
// depends on its own row only. Sums are exact integers, so all instruction sets give the same bits.
//
// Weights are unsigned (w + 128), padded with zeros (128) to multiples of 64 rows and 32 columns, in panels of 32
// columns: [N / 32, K / 64, 2, 16, 16, 4]. The last three are a tile of AMX, 64 rows and 16 columns in the operand
// order of VNNI too, so the weights are used as they are, without a copy. The sum of a row's inputs times 128 is
// subtracted from its sums. The weights of all layers are one array, in which those of a layer begin at `offset`.
//
// The time of few rows is that of reading the weights from memory, which must not wait for the arithmetic: weights are
// read in the order of their addresses, and requested before they are needed, also those of the next panel.

#include "operators.h"

#if X86
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { COLUMNS = 32, BLOCK = 32, TILE = 1024, AHEAD = 8192, GROUP = 4, MIN_AMX_ROWS = 3 };

// sums[r][n] = sum over k of w[k][n] * inputs[r][k] for the weights w of a panel and `rows` <= BLOCK rows. `inputs` has
// a stride of `depth` bytes, a multiple of 64, and memory for 16 rows more. With `request`, the panel is read for the
// first time, and weights `AHEAD` bytes later are requested.
typedef void Multiply(
    const uint8_t *weights, const int8_t *inputs, int rows, int64_t depth, int request, int32_t (*sums)[COLUMNS]
);

// An implementation for an instruction set. `begin`, if there is one, is called for the rows of the largest block, at
// most 32, before a thread multiplies, and `end` afterwards.
typedef struct {
    const char *name;
    void (*begin)(int rows);
    Multiply *multiply;
    void (*end)(void);
} Product;

static void product_portable(
    const uint8_t *weights, const int8_t *inputs, int rows, int64_t depth, int request, int32_t (*sums)[COLUMNS]
) {
    (void)request;
    memset(sums, 0, (size_t)rows * sizeof *sums);
    for (int64_t k = 0; k < depth; k += 4)
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < COLUMNS; n++) {
                const uint8_t *four = weights + k / 64 * 2 * TILE + n / 16 * TILE + k % 64 * 16 + n % 16 * 4;
                for (int j = 0; j < 4; j++) sums[r][n] += four[j] * inputs[r * depth + k + j];
            }
}

#if X86

#define UNROLL _Pragma("GCC unroll 16")
INLINE void request_weights(const uint8_t *at) {
    UNROLL for (int line = 0; line < 2 * TILE / 64; line++)
        _mm_prefetch((const char *)at + AHEAD + 64 * line, _MM_HINT_T1);
}

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

// The sums of R rows stay in registers: 2 R of them, 2 for weights and one for an input. Loops are unrolled early,
// because the compiler keeps arrays that are indexed by a variable in memory.
#define ROWS_VNNI(R)                                                                                                  \
    VNNI static void rows_vnni_##R(                                                                                   \
        const uint8_t *weights, const int8_t *inputs, int64_t depth, int request, int32_t (*sums)[COLUMNS]            \
    ) {                                                                                                               \
        __m512i total[R][2];                                                                                          \
        UNROLL for (int r = 0; r < R; r++) total[r][0] = total[r][1] = _mm512_setzero_si512();                        \
        for (int64_t tile = 0; tile < depth; tile += 64, weights += 2 * TILE) {                                       \
            if (request) request_weights(weights);                                                                    \
            for (int64_t k = 0; k < 64; k += 4) {                                                                     \
                __m512i first = _mm512_loadu_si512(weights + 16 * k);                                                 \
                __m512i second = _mm512_loadu_si512(weights + TILE + 16 * k);                                         \
                UNROLL for (int r = 0; r < R; r++) {                                                                  \
                    int32_t four;                                                                                     \
                    memcpy(&four, inputs + r * depth + tile + k, 4);                                                  \
                    __m512i input = _mm512_set1_epi32(four);                                                          \
                    total[r][0] = _mm512_dpbusd_epi32(total[r][0], first, input);                                     \
                    total[r][1] = _mm512_dpbusd_epi32(total[r][1], second, input);                                    \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
        UNROLL for (int r = 0; r < R; r++)                                                                            \
            UNROLL for (int c = 0; c < 2; c++) _mm512_storeu_si512(&sums[r][16 * c], total[r][c]);                    \
    }

ROWS_VNNI(1)
ROWS_VNNI(2)
ROWS_VNNI(3)
ROWS_VNNI(4)
ROWS_VNNI(6)
ROWS_VNNI(8)
ROWS_VNNI(11)

VNNI static void product_vnni(
    const uint8_t *weights, const int8_t *inputs, int rows, int64_t depth, int request, int32_t (*sums)[COLUMNS]
) {
    static const struct {
        int rows;
        void (*multiply)(const uint8_t *, const int8_t *, int64_t, int, int32_t (*)[COLUMNS]);
    } BLOCKS[] = {
        {11, rows_vnni_11}, {8, rows_vnni_8}, {6, rows_vnni_6}, {4, rows_vnni_4},
        {3, rows_vnni_3},   {2, rows_vnni_2}, {1, rows_vnni_1},
    };
    while (rows) {
        int block = 0;
        while (BLOCKS[block].rows > rows) block++;
        int done = BLOCKS[block].rows;
        BLOCKS[block].multiply(weights, inputs, depth, request, sums);
        rows -= done, inputs += done * depth, sums += done, request = 0;
    }
}

#define AMX __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512vnni")))

// Tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights. The first five have the same number of rows, half of a block
// that has more than 16: a product takes less time with fewer.
static _Thread_local int tile_rows;

AMX static void begin_amx(int rows) {
    tile_rows = rows > 16 ? (rows + 1) / 2 : rows;
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles __attribute__((aligned(64))) = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) tiles.bytes[tile] = 64, tiles.rows[tile] = tile < 6 ? tile_rows : 16;
    __asm__ volatile("ldtilecfg %0" : : "m"(tiles));  // the intrinsic of GCC 12 reads 8 of its 64 bytes
}

AMX static void end_amx(void) { _tile_release(); }

// If a block has fewer rows than the tiles, the sums of those that follow in memory are computed too, and not used.
AMX static void product_amx(
    const uint8_t *weights, const int8_t *inputs, int rows, int64_t depth, int request, int32_t (*sums)[COLUMNS]
) {
    const int half = tile_rows, two = rows > half;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += 64, weights += 2 * TILE) {
        if (request) request_weights(weights);
        _tile_loadd(6, weights, 64);
        _tile_loadd(4, inputs + k, depth);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, weights + TILE, 64);
        _tile_dpbsud(1, 4, 7);
        if (two) {
            _tile_loadd(5, inputs + half * depth + k, depth);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, &sums[0][0], sizeof *sums);
    _tile_stored(1, &sums[0][16], sizeof *sums);
    if (two) {
        _tile_stored(2, &sums[half][0], sizeof *sums);
        _tile_stored(3, &sums[half][16], sizeof *sums);
    }
}

#endif

static const Product PRODUCTS[] = {
#if X86
    {"amx", begin_amx, product_amx, end_amx},
    {"vnni", NULL, product_vnni, NULL},
#endif
    {"portable", NULL, product_portable, NULL},
};
static const Product *const PORTABLE = PRODUCTS + sizeof PRODUCTS / sizeof *PRODUCTS - 1;

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

static const Product *selected;

// Use the product of a name, or, without a name, the fastest that is not portable. Return its name, or NULL.
EXPORTED const char *nemostream_int8_select(const char *name) {
    for (const Product *product = PRODUCTS; product <= PORTABLE; product++) {
        int wanted = name ? !strcmp(name, product->name) : product != PORTABLE;
        if (wanted && supported(product->name)) return selected = product, product->name;
    }
    return NULL;
}

// -- one call ---------------------------------------------------------------------------------------------------------

typedef struct {
    const Product *product;
    const uint8_t *weights;
    const float *x, *scales, *bias, *residual, *norm_weight, *norm_bias;
    float *y;
    int64_t rows, depth, columns, padded_depth, panels;
    int silu, block;  // rows multiplied together
    float epsilon;
    float *normalized;  // [rows, depth]
    int8_t *inputs;     // [rows, padded_depth], and 16 rows more
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
    float largest;
    memcpy(&largest, &largest_bits, 4);
    const float step = largest * (1.0f / 127.0f);
    *unit = step < 1e-9f ? 1e-9f : step;  // silence
    const float factor = 1.0f / *unit;
    const float shift = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    for (int64_t k = 0; k < depth; k++) {
        int32_t value = (int32_t)(x[k] * factor + shift - shift);
        out[k] = (int8_t)value;
        sum += value;
    }
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

// Compute `count` <= COLUMNS results of each of `rows` rows from their sums. Loops over all columns of a panel have a
// constant length, so that the compiler keeps them in registers.
VECTORIZED static void finish_rows(
    const Call *call, int32_t (*sums)[COLUMNS], int64_t row, int rows, int64_t first, int count
) {
    float scales[COLUMNS] = {0}, bias[COLUMNS] = {0}, y[COLUMNS];
    memcpy(scales, call->scales + first, count * sizeof *scales);
    if (call->bias) memcpy(bias, call->bias + first, count * sizeof *bias);
    for (int r = 0; r < rows; r++) {
        const float unit = call->units[row + r];
        const int32_t offset = call->offsets[row + r];
        const int64_t place = (row + r) * call->columns + first;
        for (int n = 0; n < COLUMNS; n++) y[n] = (float)(sums[r][n] - offset) * scales[n] * unit + bias[n];
        if (call->silu)
            for (int n = 0; n < COLUMNS; n++) y[n] *= sigmoid(y[n]);
        if (!call->residual && count == COLUMNS)
            memcpy(call->y + place, y, sizeof y);
        else if (!call->residual)
            memcpy(call->y + place, y, count * sizeof *y);
        else
            for (int n = 0; n < count; n++) call->y[place + n] = y[n] + call->residual[place + n];
    }
}

static void multiply_panels(void *data, size_t group) {
    const Call *call = data;
    const Product *product = call->product;
    const int64_t begin = (int64_t)group * GROUP;
    const int64_t end = begin + GROUP < call->panels ? begin + GROUP : call->panels;
    int32_t sums[BLOCK][COLUMNS] __attribute__((aligned(64)));
    if (product->begin) product->begin(call->block);
    for (int64_t panel = begin; panel < end; panel++) {
        int64_t first = panel * COLUMNS;
        int count = (int)(call->columns - first < COLUMNS ? call->columns - first : COLUMNS);
        const uint8_t *weights = call->weights + first * call->padded_depth;
        for (int64_t row = 0; row < call->rows; row += call->block) {
            int rows = (int)(call->rows - row < call->block ? call->rows - row : call->block);
            const int8_t *inputs = call->inputs + row * call->padded_depth;
            product->multiply(weights, inputs, rows, call->padded_depth, !row, sums);
            finish_rows(call, sums, row, rows, first, count);
        }
    }
    if (product->end) product->end();
}

// -- operator ---------------------------------------------------------------------------------------------------------

static OrtStatus *run(void *kernel, OrtKernelContext *context) {
    const Attributes *attributes = kernel;
    Tensor in[7], *x = in, *weights = in + 1, *scales = in + 2, *bias = in + 3, *residual = in + 4, *norm = in + 5;
    OrtStatus *status = read_inputs(context, in, 7);
    if (status) return status;
    if (x->rank < 1 || weights->rank != 1 || scales->rank != 1)
        return ort->CreateStatus(ORT_INVALID_ARGUMENT, "Int8Linear: an input has the wrong number of dimensions");
    Call call = {
        .product = selected ? selected : PORTABLE,
        .x = x->data,
        .weights = (const uint8_t *)weights->data + attributes->offset,
        .scales = scales->data,
        .bias = bias->data,
        .residual = residual->data,
        .norm_weight = norm[0].data,
        .norm_bias = norm[1].data,
        .rows = 1,
        .depth = x->dims[x->rank - 1],
        .padded_depth = (x->dims[x->rank - 1] + 63) / 64 * 64,
        .columns = scales->dims[0],
        .silu = (int)attributes->silu,
        .epsilon = attributes->epsilon,
    };
    for (size_t i = 0; i + 1 < x->rank; i++) call.rows *= x->dims[i];
    call.panels = (call.columns + COLUMNS - 1) / COLUMNS;
    if (attributes->depth != call.depth || attributes->offset < 0 ||
        attributes->offset > weights->dims[0] - call.panels * COLUMNS * call.padded_depth)
        return ort->CreateStatus(ORT_INVALID_ARGUMENT, "Int8Linear: the shapes of input, weights and scales differ");
    if (!has_shape(norm, 1, &call.depth) || !has_shape(norm + 1, 1, &call.depth) || !norm[0].data != !norm[1].data)
        return ort->CreateStatus(ORT_INVALID_ARGUMENT, "Int8Linear: the norm has another size than the input");
    x->dims[x->rank - 1] = call.columns;
    if (!has_shape(bias, 1, &call.columns) || !has_shape(residual, x->rank, x->dims))
        return ort->CreateStatus(ORT_INVALID_ARGUMENT, "Int8Linear: bias or residual has another size than the output");
    if ((status = create_output(context, 0, x->dims, x->rank, &call.y)) || !call.rows) return status;
    const int64_t blocks = (call.rows + BLOCK - 1) / BLOCK;  // of about the same size
    call.block = (int)((call.rows + blocks - 1) / blocks);
    if (call.block < MIN_AMX_ROWS && call.product->begin) call.product++;  // VNNI is faster

    const size_t padded = call.rows + 16;  // the tiles of AMX may read so many rows
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
    return ort->KernelContext_ParallelFor(context, multiply_panels, (call.panels + GROUP - 1) / GROUP, 0, &call);
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
    OrtStatus *status = create_attributes(op, api, info, out);
    if (status) return status;
    Attributes *attributes = *out;
    if ((status = ort->KernelInfoGetAttribute_int64(info, "silu", &attributes->silu))) return status;
    if ((status = ort->KernelInfoGetAttribute_int64(info, "depth", &attributes->depth))) return status;
    return ort->KernelInfoGetAttribute_int64(info, "offset", &attributes->offset);
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
