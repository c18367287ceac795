// The library of operators that ONNX Runtime loads.

#include "operators.h"

const OrtApi *ort;

OrtStatus *read_inputs(OrtKernelContext *context, Tensor *tensors, size_t count) {
    for (size_t index = 0; index < count; index++) {
        Tensor *tensor = tensors + index;
        const OrtValue *value = NULL;
        OrtTensorTypeAndShapeInfo *info;
        *tensor = (Tensor){0};
        OrtStatus *status = ort->KernelContext_GetInput(context, index, &value);
        if (status) return status;
        if (!value) continue;
        if ((status = ort->GetTensorMutableData((OrtValue *)value, &tensor->data))) return status;
        if ((status = ort->GetTensorTypeAndShape(value, &info))) return status;
        if (!(status = ort->GetDimensionsCount(info, &tensor->rank))) {
            if (tensor->rank > MAX_DIMS)
                status = ort->CreateStatus(ORT_INVALID_ARGUMENT, "an input has too many dimensions");
            else
                status = ort->GetDimensions(info, tensor->dims, tensor->rank);
        }
        ort->ReleaseTensorTypeAndShapeInfo(info);
        if (status) return status;
    }
    return NULL;
}

OrtStatus *create_output(OrtKernelContext *context, size_t index, const int64_t *dims, size_t rank, float **data) {
    OrtValue *value;
    OrtStatus *status = ort->KernelContext_GetOutput(context, index, dims, rank, &value);
    return status ? status : ort->GetTensorMutableData(value, (void **)data);
}

int has_shape(const Tensor *tensor, size_t rank, const int64_t *dims) {
    return !tensor->data || (tensor->rank == rank && !memcmp(tensor->dims, dims, rank * sizeof *dims));
}

int are_slots(const Tensor *slots, int64_t rows, int64_t count) {
    const int64_t *slot = slots->data;
    if (!has_shape(slots, 1, &rows)) return 0;
    for (int64_t row = 0; row < rows; row++)
        if (slot[row] < 0 || slot[row] >= count) return 0;
    return 1;
}

void *scratch(size_t bytes) {
    static _Thread_local void *memory;
    static _Thread_local size_t allocated;
    if (bytes > allocated) {
        free(memory);
        memory = NULL, allocated = 0;
        if (posix_memalign(&memory, 64, bytes)) return memory = NULL;
        allocated = bytes;
        memset(memory, 0, bytes);
    }
    return memory;
}

OrtStatus *create_attributes(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
    (void)op, (void)api;
    Attributes *attributes = *out = calloc(1, sizeof *attributes);
    if (!attributes) return ort->CreateStatus(ORT_FAIL, "out of memory");
    return ort->KernelInfoGetAttribute_float(info, "epsilon", &attributes->epsilon);
}

const char *cpu_provider(const OrtCustomOp *op) { return (void)op, NULL; }
size_t one_output(const OrtCustomOp *op) { return (void)op, 1; }
int always_required(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ORT_REQUIRED; }
int always_float(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ORT_FLOAT; }
int cpu_memory(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, 0; }

EXPORTED OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    const OrtCustomOp *operators[] = {&int8_linear, &relative_attention, &causal_convolution};
    OrtCustomOpDomain *domain;
    OrtStatus *status;
    ort = base->GetApi(ORT_API_VERSION);
    if ((status = ort->CreateCustomOpDomain("nemostream", &domain))) return status;
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++)
        if ((status = ort->CustomOpDomain_Add(domain, operators[i]))) return status;
    return ort->AddCustomOpDomain(options, domain);
}
