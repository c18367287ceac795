// The hot path of the host: what is done for every chunk of every stream between accepted audio and events.
//
// Each class here holds the fields of a Python class that is derived from it (`compiled.py`), as members of a C struct
// that Python code reads and writes as attributes. Rare operations stay in Python and use the same fields. A method
// here replaces the Python method of the same name, which is also the reference that it is tested against: both leave
// the same state. A case that a method does not cover is passed to Python, with nothing changed.
//
// Like the Python code that it replaces, all of this runs with the GIL held, and what is guarded by the lock of the
// scheduler stays guarded by it. Arrays are read through NumPy's structs; their type, layout and size are checked
// before.

#define Py_LIMITED_API 0x030B0000
#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#include <Python.h>
#include <numpy/arrayobject.h>
#include <stdlib.h>
#include <string.h>
#include <structmember.h>

typedef long long Integer;

// The fields of each class: R is a reference, I an integer, B a flag; T is the type. References come first.
#define Block_FIELDS(T, R, I, B)                                                                                      \
    R(T, "audio", audio) R(T, "chunks", chunks)
#define Recording_FIELDS(T, R, I, B)                                                                                  \
    I(T, "begin_sample", begin_sample) I(T, "end_sample", end_sample) I(T, "run_frames", run_frames)                  \
    I(T, "skipped_samples", skipped_samples) B(T, "reset_slot", reset_slot)
#define Chunker_FIELDS(T, R, I, B)                                                                                    \
    R(T, "_audio", audio) R(T, "_block", block) R(T, "_direct", direct) R(T, "chunk", chunk) R(T, "_config", config)  \
    R(T, "_recording", recording) R(T, "_queue", queue) R(T, "prompt", prompt) R(T, "_scale", scale)                  \
    R(T, "_spare", spare) I(T, "_at", at) I(T, "_begin", begin) I(T, "_block_end", block_end)                         \
    I(T, "_chunk_end", chunk_end) I(T, "_frame", frame) I(T, "_lead", lead) I(T, "_number", number)                   \
    I(T, "samples", samples) I(T, "taken", taken)
#define Hypothesis_FIELDS(T, R, I, B)                                                                                 \
    R(T, "tokens", tokens) R(T, "sample_positions", sample_positions) R(T, "scores", scores)                          \
    R(T, "sum_p_alpha", sum_p_alpha)
#define Endpointer_FIELDS(T, R, I, B)                                                                                 \
    R(T, "_first", first) R(T, "_end_of_utterance", end_of_utterance) R(T, "_backchannel", backchannel)               \
    I(T, "_count", count) I(T, "_last", last) I(T, "_max_length", max_length) I(T, "next_end", next_end)              \
    I(T, "_silence", silence) I(T, "_word", word) B(T, "_at_reset", at_reset)
#define Guard_FIELDS(T, R, I, B)                                                                                      \
    I(T, "_pause", pause) I(T, "_start", start) B(T, "loop_suspected", loop_suspected)
#define Stream_FIELDS(T, R, I, B)                                                                                     \
    R(T, "error", error) R(T, "chunker", chunker) R(T, "items", items) R(T, "outputs", outputs)                       \
    R(T, "source", source) R(T, "trace", trace) R(T, "progress", progress) R(T, "quiet_count", quiet_count)           \
    R(T, "slot", slot) R(T, "guard", guard) R(T, "endpointer", endpointer) R(T, "hypothesis", hypothesis)             \
    I(T, "in_flight", in_flight) I(T, "quiet_until", quiet_until) B(T, "ended", ended)
#define Scheduler_FIELDS(T, R, I, B)                                                                                  \
    R(T, "_lock", lock) R(T, "_ready", ready) R(T, "_rows", rows) B(T, "_idle", idle)
#define Remote_FIELDS(T, R, I, B)                                                                                     \
    R(T, "_lock", lock) R(T, "_chunks", chunks) B(T, "_flushing", flushing)
#define Region_FIELDS(T, R, I, B)                                                                                     \
    R(T, "_audio", audio) I(T, "_begin", begin) I(T, "_end", end) I(T, "_wrapped", wrapped) I(T, "_count", count)
#define Preprocessor_FIELDS(T, R, I, B)                                                                               \
    R(T, "_heads", heads) I(T, "received", received) I(T, "_max_unchanged", max_unchanged)                            \
    I(T, "sample_rate", sample_rate)
#define Silence_FIELDS(T, R, I, B)                                                                                    \
    I(T, "_zeros", zeros) I(T, "_max_zeros", max_zeros)
#define Session_FIELDS(T, R, I, B)                                                                                    \
    R(T, "_scheduler", scheduler) R(T, "_stream", stream) R(T, "preprocessor", preprocessor)                          \
    R(T, "_silence", silence) R(T, "_lanes", lanes) R(T, "_pending_outputs", pending_outputs)                         \
    R(T, "_event_builder", event_builder) R(T, "_tokens", tokens) R(T, "_language_names", language_names)             \
    I(T, "chunk_ms", chunk_ms) I(T, "_end_sample", end_sample) I(T, "_prompt", prompt) I(T, "_received", received)    \
    I(T, "steps", steps) B(T, "_ended", ended) B(T, "_accepts_unchanged", accepts_unchanged)
#define Token_FIELDS(T, R, I, B)                                                                                      \
    R(T, "id", id) R(T, "text", text) R(T, "time", time) R(T, "end", end) R(T, "score", score)                        \
    R(T, "confidence", confidence) R(T, "language", language) R(T, "tag", tag)
#define TokenList_FIELDS(T, R, I, B)                                                                                  \
    R(T, "tokens", tokens) R(T, "languages", languages) R(T, "_texts", texts) R(T, "_tags", tags)                     \
    R(T, "_language_of_tag", language_of_tag) R(T, "_confidence_of", confidence_of) I(T, "_rate", rate)               \
    I(T, "_frame", frame) I(T, "_delay", delay)
#define Transcript_FIELDS(T, R, I, B)                                                                                 \
    R(T, "tokens", tokens) R(T, "parts", parts) R(T, "_cache", cache)
#define Detokenizer_FIELDS(T, R, I, B)                                                                                \
    R(T, "_added_texts", added_texts) R(T, "_last", last) R(T, "_tokenizer", tokenizer) R(T, "_window", window)       \
    R(T, "_incomplete", incomplete) R(T, "_space", space) R(T, "text", text) B(T, "_begun", begun)
#define Utterance_FIELDS(T, R, I, B)                                                                                  \
    R(T, "transcript", transcript) R(T, "grouper", grouper) R(T, "_detokenizer", detokenizer)                         \
    R(T, "_text_end", text_end) R(T, "start", start) R(T, "language", language) R(T, "set_language", set_language)    \
    R(T, "_invisible", invisible) R(T, "_aggregation", aggregation) I(T, "event_length", event_length)                \
    I(T, "event_parts", event_parts) I(T, "event_tokens", event_tokens) I(T, "last_visible", last_visible)            \
    I(T, "length", length) I(T, "stable_length", stable_length)
#define EventBuilder_FIELDS(T, R, I, B)                                                                               \
    R(T, "_current", current) R(T, "_backchannel", backchannel) R(T, "_tokenizer", tokenizer)                         \
    R(T, "_aggregation", aggregation) I(T, "_number", number) I(T, "token_count", token_count)                        \
    I(T, "_first_token", first_token) I(T, "_end_sample", end_sample) I(T, "_rate", rate)                             \
    B(T, "_between_utterances", between_utterances)

#define REFERENCE(T, name, field) PyObject *field;
#define INTEGER(T, name, field) Integer field;
#define FLAG(T, name, field) char field;
#define STRUCT(Type, ...)                                                                                             \
    typedef struct {                                                                                                  \
        PyObject_HEAD                                                                                                 \
        Type##_FIELDS(Type, REFERENCE, INTEGER, FLAG)                                                                 \
        __VA_ARGS__                                                                                                   \
    } Type;

STRUCT(Block)
STRUCT(Recording)
STRUCT(Chunker)
STRUCT(Hypothesis)
STRUCT(Endpointer)
STRUCT(Guard)
STRUCT(Stream)
STRUCT(Scheduler, unsigned long forks;)  // when the object was created
STRUCT(Remote, unsigned long forks;)
STRUCT(Region)
STRUCT(Preprocessor)
STRUCT(Silence)
STRUCT(Session)
STRUCT(Token)
STRUCT(TokenList)
STRUCT(Transcript)
STRUCT(Detokenizer)
STRUCT(Utterance)
STRUCT(EventBuilder)

// A queue of objects: what is used of `collections.deque`. Every stream has several, so one has no memory of its own
// until it is long.
typedef struct {
    PyObject_HEAD
    PyObject **ring;
    size_t size, head, count;  // `size` is a power of two
    Py_ssize_t max_count;      // 0: no limit
    PyObject *few[4];
} Queue;

static PyTypeObject *Queue_type, *Block_type, *Recording_type, *Chunker_type, *Stream_type, *Scheduler_type;
static PyTypeObject *Hypothesis_type, *Endpointer_type, *Guard_type, *Token_type, *TokenList_type;
static PyTypeObject *Preprocessor_type, *Silence_type, *Session_type, *Remote_type, *Region_type;
static PyTypeObject *Transcript_type, *Detokenizer_type, *Utterance_type, *EventBuilder_type;
static PyTypeObject *WorkItem, *StepOutput;
static PyObject *int16_scale, *one, *no_ends, *run_kind;
static PyArray_Descr *int16, *float32, *int64;
static unsigned long forks;  // between the import of this module and this process

#define NEVER ((Integer)1 << 62)  // of `endpointing.py`
#define MAX_ITEMS 16  // that are enqueued at once

enum { KIND, CHUNK, END_SAMPLE, ORIGIN_SAMPLE, AUDIO, LENGTH, RESET_SLOT, PROMPT, SCALE, BLOCK, ITEM_FIELDS };

#define NAMES(name)                                                                                                   \
    name(CYCLE) name(WINDOW) name(_accept_parts) name(_begin_branches) name(_begins) name(_concatenate) name(_events) \
    name(_feed) name(_frames) name(_land_item) name(_notify_idle) name(_open_block) name(_poll) name(_prefix)         \
    name(_process_items) name(_record_output) name(_release_if_finished) name(_reset_before) name(_resize)            \
    name(_schedule_flush) name(_scores) name(_send_others) name(_step) name(_sum_p_alpha) name(_tokens) name(accept)  \
    name(acquire) name(arrivals) name(audio) name(auto) name(check_process) name(chunk_ms) name(counts) name(end)     \
    name(ends) name(enqueue) name(enqueued) name(frames) name(grouper) name(items) name(kind) name(language)          \
    name(link) name(locked) name(loop_suspected) name(ms) name(notify_all) name(opened) name(positions)               \
    name(raise_error) name(ran) name(reason) name(region) name(release) name(resets_decoder) name(sample_positions)   \
    name(samples) name(samples_per_frame) name(scores) name(sent) name(set_language) name(start) name(step)           \
    name(streams) name(sum_p_alpha) name(take) name(text_from) name(tokens) name(tokens_from) name(tolist)            \
    name(utterance) name(utterance_ends)
#define DECLARE(name) static PyObject *s_##name;
#define INTERN(name)                                                                                                  \
    if (!(s_##name = PyUnicode_InternFromString(#name))) return -1;
NAMES(DECLARE)

// -- fields -----------------------------------------------------------------------------------------------------------

#define COUNT(T, name, field) +1
#define SKIP(T, name, field)
#define REFERENCES(Type) (0 Type##_FIELDS(Type, COUNT, SKIP, SKIP))
#define REFERENCE_MEMBER(T, name, field) {name, T_OBJECT_EX, offsetof(T, field), 0, NULL},
#define INTEGER_MEMBER(T, name, field) {name, T_LONGLONG, offsetof(T, field), 0, NULL},
#define FLAG_MEMBER(T, name, field) {name, T_BOOL, offsetof(T, field), 0, NULL},
#define FIELDS(Type)                                                                                                  \
    static int Type##_traverse(PyObject *self, visitproc visit, void *arg) {                                          \
        PyObject **field = (PyObject **)(self + 1);                                                                   \
        for (int i = 0; i < REFERENCES(Type); i++) Py_VISIT(field[i]);                                                \
        Py_VISIT(Py_TYPE(self));                                                                                      \
        return 0;                                                                                                     \
    }                                                                                                                 \
    static int Type##_clear(PyObject *self) {                                                                         \
        PyObject **field = (PyObject **)(self + 1);                                                                   \
        for (int i = 0; i < REFERENCES(Type); i++) Py_CLEAR(field[i]);                                                \
        return 0;                                                                                                     \
    }                                                                                                                 \
    static void Type##_dealloc(PyObject *self) {                                                                      \
        PyTypeObject *type = Py_TYPE(self);                                                                           \
        if (PyType_GetFlags(type) & Py_TPFLAGS_HAVE_GC) PyObject_GC_UnTrack(self);                                    \
        Type##_clear(self);                                                                                           \
        ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);                                                           \
        Py_DECREF(type);                                                                                              \
    }                                                                                                                 \
    static PyMemberDef Type##_members[] = {                                                                           \
        Type##_FIELDS(Type, REFERENCE_MEMBER, INTEGER_MEMBER, FLAG_MEMBER){0},                                        \
    };

FIELDS(Block)
FIELDS(Recording)
FIELDS(Chunker)
FIELDS(Hypothesis)
FIELDS(Endpointer)
FIELDS(Guard)
FIELDS(Stream)
FIELDS(Scheduler)
FIELDS(Remote)
FIELDS(Region)
FIELDS(Preprocessor)
FIELDS(Silence)
FIELDS(Session)
FIELDS(Token)
FIELDS(TokenList)
FIELDS(Transcript)
FIELDS(Detokenizer)
FIELDS(Utterance)
FIELDS(EventBuilder)

// -- helpers ----------------------------------------------------------------------------------------------------------

static PyObject *attribute(const char *module, const char *name) {
    PyObject *imported = PyImport_ImportModule(module);
    PyObject *found = imported ? PyObject_GetAttrString(imported, name) : NULL;
    Py_XDECREF(imported);
    return found;
}

static int is(PyObject *object, PyTypeObject *type) { return object && PyObject_TypeCheck(object, type); }

static void set(PyObject **field, PyObject *value) {  // takes the reference
    PyObject *before = *field;
    *field = value;
    Py_XDECREF(before);
}

// Call a method with objects, of which the last may be NULL, and return -1 if it raised.
#define call(self, name, ...) drop_result(PyObject_CallMethodObjArgs(self, name, __VA_ARGS__, NULL))

static int drop_result(PyObject *result) {
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static int integer_of(PyObject *self, PyObject *name, Integer *value) {
    PyObject *found = PyObject_GetAttr(self, name);
    if (!found) return -1;
    *value = PyLong_AsLongLong(found);
    Py_DECREF(found);
    return *value == -1 && PyErr_Occurred() ? -1 : 0;
}

// Whether an attribute of an object that may be None is true. -1: error.
static int flag_of(PyObject *self, PyObject *name) {
    if (!self || self == Py_None) return 0;
    PyObject *found = PyObject_GetAttr(self, name);
    if (!found) return -1;
    int flag = PyObject_IsTrue(found);
    Py_DECREF(found);
    return flag;
}

static PyArrayObject *vector(PyObject *object, PyArray_Descr *type) {  // NULL, without an exception: something else
    PyArrayObject *array = (PyArrayObject *)object;
    int flags = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED;
    if (!object || !PyArray_CheckExact(object) || PyArray_NDIM(array) != 1) return NULL;
    return PyArray_CHKFLAGS(array, flags) && (!type || PyArray_DESCR(array) == type) ? array : NULL;
}

static PyArrayObject *audio_vector(PyObject *object) {
    PyArrayObject *array = vector(object, NULL);
    return array && (PyArray_DESCR(array) == int16 || PyArray_DESCR(array) == float32) ? array : NULL;
}

// A new tuple of a named tuple's type. Takes the references, of which one may be NULL after an error. It is not tracked
// by the garbage collector, which would examine thousands of them again and again: nothing in it refers to streams.
static PyObject *named_tuple(PyTypeObject *type, int count, PyObject **values) {
    PyObject *made = PyType_GenericAlloc(type, count);
    for (int i = 0; i < count; i++) {
        if (!values[i]) {
            if (!PyErr_Occurred()) PyErr_SetString(PyExc_AttributeError, "a field was not set");
            Py_CLEAR(made);
        }
        if (made)
            PyTuple_SetItem(made, i, values[i]);
        else
            Py_XDECREF(values[i]);
    }
    if (made) PyObject_GC_UnTrack(made);
    return made;
}

static int expect(Py_ssize_t count, Py_ssize_t wanted) {
    if (count != wanted) PyErr_Format(PyExc_TypeError, "%zd arguments are required, not %zd", wanted, count);
    return count == wanted;
}

static PyObject *incref(PyObject *object) {
    Py_XINCREF(object);
    return object;
}

// -- queue ------------------------------------------------------------------------------------------------------------

static int is_queue(PyObject *object) { return object && Py_TYPE(object) == Queue_type; }

static PyObject **place(Queue *self, size_t index) { return self->ring + ((self->head + index) & (self->size - 1)); }

// Remove and return the first object, which must exist.
static PyObject *pop(Queue *self) {
    PyObject *first = *place(self, 0);
    self->head++;
    if (!--self->count && self->ring != self->few) {
        PyMem_Free(self->ring);
        self->ring = self->few, self->size = sizeof self->few / sizeof *self->few;
    }
    return first;
}

static int grow(Queue *self) {
    PyObject **ring = PyMem_Malloc(2 * self->size * sizeof *ring);
    if (!ring) return PyErr_NoMemory(), -1;
    for (size_t i = 0; i < self->count; i++) ring[i] = *place(self, i);
    if (self->ring != self->few) PyMem_Free(self->ring);
    self->ring = ring, self->size *= 2, self->head = 0;
    return 0;
}

static int push(Queue *self, PyObject *object) {
    PyObject *dropped = self->max_count && self->count == (size_t)self->max_count ? pop(self) : NULL;
    if (self->count == self->size && grow(self)) return -1;
    Py_INCREF(object);
    *place(self, self->count++) = object;
    Py_XDECREF(dropped);
    return 0;
}

static int push_left(Queue *self, PyObject *object) {
    if (self->count == self->size && grow(self)) return -1;
    Py_INCREF(object);
    self->head--, self->count++;
    *place(self, 0) = object;
    return 0;
}

static int push_all(Queue *self, PyObject *objects, int (*add)(Queue *, PyObject *)) {
    PyObject *list = PySequence_List(objects);  // a copy: the objects may be those of the queue
    int failed = !list;
    for (Py_ssize_t i = 0; !failed && i < PyList_Size(list); i++) failed = add(self, PyList_GetItem(list, i));
    Py_XDECREF(list);
    return failed ? -1 : 0;
}

static PyObject *Queue_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"maxlen", NULL};
    Py_ssize_t max_count = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$n:Queue", names, &max_count)) return NULL;
    Queue *self = (Queue *)PyType_GenericAlloc(type, 0);
    if (!self) return NULL;
    self->ring = self->few, self->size = sizeof self->few / sizeof *self->few, self->max_count = max_count;
    return (PyObject *)self;
}

static int Queue_traverse(PyObject *object, visitproc visit, void *arg) {
    Queue *self = (Queue *)object;
    for (size_t i = 0; i < self->count; i++) Py_VISIT(*place(self, i));
    Py_VISIT(Py_TYPE(object));
    return 0;
}

static int Queue_clear(PyObject *object) {
    while (((Queue *)object)->count) Py_DECREF(pop((Queue *)object));
    return 0;
}

static void Queue_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    Queue_clear(object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static Py_ssize_t Queue_length(PyObject *self) { return ((Queue *)self)->count; }

static PyObject *Queue_item(PyObject *object, Py_ssize_t index) {
    Queue *self = (Queue *)object;
    if (index >= 0 && (size_t)index < self->count) return incref(*place(self, index));
    PyErr_SetString(PyExc_IndexError, "queue index out of range");
    return NULL;
}

static PyObject *Queue_extend(PyObject *self, PyObject *objects) {
    return push_all((Queue *)self, objects, push) ? NULL : incref(self);
}

static PyObject *Queue_append(PyObject *self, PyObject *object) {
    return push((Queue *)self, object) ? NULL : incref(Py_None);
}

static PyObject *Queue_extendleft(PyObject *self, PyObject *objects) {
    return push_all((Queue *)self, objects, push_left) ? NULL : incref(Py_None);
}

static PyObject *Queue_popleft(PyObject *self, PyObject *unused) {
    (void)unused;
    if (((Queue *)self)->count) return pop((Queue *)self);
    PyErr_SetString(PyExc_IndexError, "pop from an empty queue");
    return NULL;
}

static PyObject *Queue_remove_all(PyObject *self, PyObject *unused) {
    (void)unused;
    Queue_clear(self);
    Py_RETURN_NONE;
}

static PyMethodDef Queue_methods[] = {
    {"append", Queue_append, METH_O, NULL},
    {"extendleft", Queue_extendleft, METH_O, NULL},
    {"popleft", Queue_popleft, METH_NOARGS, NULL},
    {"clear", Queue_remove_all, METH_NOARGS, NULL},
    {0},
};

static PyType_Slot Queue_slots[] = {
    {Py_tp_new, Queue_new},
    {Py_tp_traverse, Queue_traverse},
    {Py_tp_clear, Queue_clear},
    {Py_tp_dealloc, Queue_dealloc},
    {Py_tp_methods, Queue_methods},
    {Py_sq_length, Queue_length},
    {Py_sq_item, Queue_item},
    {Py_sq_inplace_concat, Queue_extend},
    {0, NULL},
};
static PyType_Spec Queue_spec = {
    "nemostream.runtime.streaming._host.Queue", sizeof(Queue), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, Queue_slots,
};

// -- chunker ----------------------------------------------------------------------------------------------------------

// Fill the next block: a spare one of the same size and type, or what `_open_block` makes.
static int open_block(Chunker *self, PyArrayObject *before) {
    Integer samples;
    if (integer_of(self->chunk, s_samples, &samples)) return -1;
    // Nothing may release the GIL until the block is taken: another thread may add one, which drops the first one.
    Queue *spare = (Queue *)self->spare;
    Block *block = spare->count ? (Block *)*place(spare, 0) : NULL;
    if (is((PyObject *)block, Block_type)) {
        PyArrayObject *audio = vector(block->audio, PyArray_DESCR(before));
        PyObject *first = block->chunks && PyList_Check(block->chunks) ? PyList_GetItem(block->chunks, 0) : NULL;
        PyArrayObject *chunk = vector(first, NULL);
        if (audio && chunk && PyArray_DIM(chunk, 0) == samples) {
            set(&self->block, pop(spare));
            set(&self->audio, incref(block->audio));
            set(&self->config, incref(self->chunk));
            set(&self->scale, incref(PyArray_DESCR(audio) == float32 ? one : int16_scale));
            self->block_end = PyArray_DIM(audio, 0);
            self->begin = self->at = self->number = self->lead = 0;
            self->chunk_end = samples;
            return 0;
        }
    }
    PyErr_Clear();
    return call((PyObject *)self, s__open_block, self->chunk, (PyObject *)PyArray_DESCR(before));
}

// `Chunker._run_full_chunk`; returns the item instead of queueing it.
static PyObject *run_full_chunk(Chunker *self) {
    if (!is(self->recording, Recording_type) || !is(self->block, Block_type)) {
        PyErr_SetString(PyExc_TypeError, "the chunker has no block or recording");
        return NULL;
    }
    Recording *recording = (Recording *)self->recording;
    Block *block = (Block *)self->block;
    PyObject *audio = block->chunks ? PyList_GetItem(block->chunks, self->number) : NULL, *config = self->config;
    Integer frames, samples, end = self->chunk_end;
    if (!audio || integer_of(config, s_frames, &frames) || integer_of(config, s_samples, &samples)) return NULL;
    Integer origin = recording->end_sample - self->frame * recording->run_frames;
    recording->end_sample += self->frame * frames;
    recording->run_frames += frames;
    int last = end == self->block_end;
    PyObject *item = named_tuple(
        WorkItem, ITEM_FIELDS,
        (PyObject *[]){
            incref(run_kind), incref(config), PyLong_FromLongLong(recording->end_sample), PyLong_FromLongLong(origin),
            incref(audio), PyLong_FromLongLong(samples), PyBool_FromLong(recording->reset_slot), incref(self->prompt),
            incref(self->scale), incref(last ? self->block : Py_None),
        }
    );
    recording->reset_slot = 0;
    int failed = 0;
    if (item && last) {
        failed = open_block(self, (PyArrayObject *)self->audio);
    } else if (item) {
        self->number++;
        self->begin = end, self->lead = 0, self->chunk_end = end + samples;
        if (self->chunk != config) failed = call((PyObject *)self, s__resize, NULL);
    }
    if (failed) Py_CLEAR(item);
    return item;
}

// Append samples from `begin` on as far as they only need to be copied, and put up to `MAX_ITEMS` chunks that are full
// into `items`. Return the number of samples that were appended; -1: error. If there are neither samples nor chunks,
// the rest is a case for `_accept_parts`; otherwise it is to be appended next.
static Integer append(Chunker *self, PyArrayObject *from, Integer begin, PyObject **items, int *count) {
    Integer rest = PyArray_DIM(from, 0) - begin;
    PyArrayObject *to = vector(self->audio, PyArray_DESCR(from));
    if (!to || (PyObject *)PyArray_DESCR(from) != self->direct || self->chunk != self->config) return 0;
    if (!self->config || !is_queue(self->spare)) return 0;
    Integer at = self->at, room = (self->block_end < PyArray_DIM(to, 0) ? self->block_end : PyArray_DIM(to, 0)) - at;
    if (at < 0 || room < 0 || !PyArray_ISWRITEABLE(to)) return 0;
    Integer part = self->at >= self->chunk_end ? 0 : rest < room ? rest : room;
    size_t size = PyArray_DESCR(from) == int16 ? sizeof(npy_int16) : sizeof(float);
    memmove((char *)PyArray_DATA(to) + at * size, (char *)PyArray_DATA(from) + begin * size, part * size);
    self->at += part;
    self->samples += part;
    while (self->at >= self->chunk_end && *count < MAX_ITEMS) {
        if (!(items[*count] = run_full_chunk(self))) return -1;
        ++*count;
    }
    return part;
}

static void drop(PyObject **items, int count) {
    for (int i = 0; i < count; i++) Py_DECREF(items[i]);
}

// Pass samples from `begin` on to a method.
static int pass_on(PyObject *self, PyObject *name, PyObject *samples, Integer begin) {
    PyObject *rest = begin ? PySequence_GetSlice(samples, begin, PY_SSIZE_T_MAX) : incref(samples);
    int failed = !rest || call(self, name, rest);
    Py_XDECREF(rest);
    return failed ? -1 : 0;
}

static PyObject *Chunker_accept(PyObject *object, PyObject *samples) {
    Chunker *self = (Chunker *)object;
    PyArrayObject *from = self->queue ? audio_vector(samples) : NULL;
    Integer size = from ? PyArray_DIM(from, 0) : 0, done = 0, part = 0;
    int count;
    do {
        PyObject *items[MAX_ITEMS];
        int failed = 0;
        count = 0;
        part = from ? append(self, from, done, items, &count) : 0;
        for (int i = 0; i < count && !failed; i++) failed = PyList_Append(self->queue, items[i]);
        drop(items, count);
        if (failed || part < 0) return NULL;
        done += part;
    } while ((part && done < size) || count == MAX_ITEMS);
    if (!from && PyObject_Size(samples) < 0) return NULL;
    if ((done < size || !from || !size) && pass_on(object, s__accept_parts, samples, done)) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef Chunker_methods[] = {{"accept", Chunker_accept, METH_O, NULL}, {0}};

// -- scheduler --------------------------------------------------------------------------------------------------------

static PyObject *Scheduler_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)args, (void)kwargs;
    Scheduler *self = (Scheduler *)PyType_GenericAlloc(type, 0);
    if (self) self->forks = forks;
    return (PyObject *)self;
}

static int is_item(PyObject *item) { return Py_TYPE(item) == WorkItem && PyTuple_Size(item) == ITEM_FIELDS; }

static Queue *items_of(Stream *stream) { return (Queue *)stream->items; }

static Stream *stream_of(PyObject *object) {
    Stream *stream = (Stream *)object;
    if (is(object, Stream_type) && stream->error && is_queue(stream->items) && is_queue(stream->outputs)) return stream;
    PyErr_SetString(PyExc_TypeError, "this is not a stream of the scheduler");
    return NULL;
}

// `Scheduler._schedule`
static int schedule(PyObject *scheduler, Stream *stream) {
    Scheduler *self = (Scheduler *)scheduler;
    PyObject *object = (PyObject *)stream;
    int simple = 0;
    int has_items = stream->source == Py_None && stream->chunker != Py_None && items_of(stream)->count;
    if (self->ready && self->rows && has_items) {
        PyObject *head = *place(items_of(stream), 0);
        simple = is_item(head) && PyTuple_GetItem(head, KIND) == run_kind;
        if (simple && stream->in_flight) {  // `StreamState.must_wait`
            int waits = PyObject_IsTrue(PyTuple_GetItem(head, RESET_SLOT));
            if (!waits) waits = flag_of(stream->guard, s_loop_suspected);
            if (!waits) waits = flag_of(stream->endpointer, s_resets_decoder);
            if (waits < 0) return -1;
            simple = !waits;
        }
    }
    if (!simple) return call(scheduler, s__process_items, object);
    if (PyDict_GetItemWithError(self->ready, object)) return 0;
    PyObject *arrivals = PyErr_Occurred() ? NULL : PyObject_GetAttr(self->rows, s_arrivals);
    int failed = !arrivals || PyDict_SetItem(self->ready, object, arrivals);
    Py_XDECREF(arrivals);
    return failed ? -1 : self->idle ? call(scheduler, s__notify_idle, NULL) : 0;
}

static PyObject *Scheduler_schedule(PyObject *self, PyObject *object) {
    Stream *stream = stream_of(object);
    if (!stream || schedule(self, stream)) return NULL;
    Py_RETURN_NONE;
}

typedef int (*Continue)(PyObject *scheduler, Stream *stream);  // what follows when items were appended to a stream

static int enqueue_locked(PyObject *self, Continue next, Stream *stream, PyObject **items, int count) {
    if (stream->error != Py_None) return call((PyObject *)stream, s_raise_error, NULL);
    for (int i = 0; i < count; i++) {
        if (stream->trace && stream->trace != Py_None) {
            PyObject *traced = PyTuple_Pack(1, items[i]);
            int failed = !traced || call(stream->trace, s_enqueued, traced);
            Py_XDECREF(traced);
            if (failed) return -1;
        }
        if (push(items_of(stream), items[i])) return -1;
    }
    return next(self, stream);
}

// `enqueue` of a scheduler
static int enqueue(PyObject *self, PyObject *lock, Continue next, Stream *stream, PyObject **items, int count) {
    PyObject *type, *value, *traceback;
    if (call(lock, s_acquire, NULL)) return -1;
    int failed = enqueue_locked(self, next, stream, items, count);
    PyErr_Fetch(&type, &value, &traceback);
    if (call(lock, s_release, NULL)) failed = -1;
    if (type) PyErr_Restore(type, value, traceback);
    return failed;
}

// `chunker.accept`, `take` and `enqueue`, for audio that is not only copied.
static int accept_other(PyObject *self, PyObject *stream, PyObject *chunker, PyObject *samples, Integer begin) {
    if (pass_on(chunker, s_accept, samples, begin)) return -1;
    PyObject *items = PyObject_CallMethodObjArgs(chunker, s_take, NULL);
    Py_ssize_t count = items ? PyObject_Size(items) : -1;
    int failed = count < 0 || (count && call(self, s_enqueue, stream, items));
    Py_XDECREF(items);
    return failed ? -1 : 0;
}

// `StreamScheduler.accept` and `enqueue`. `is_current`: the scheduler was not made before a fork.
static int accept(
    PyObject *self, int is_current, PyObject *lock, Continue next, PyObject *object, PyObject *samples
) {
    Stream *stream = stream_of(object);
    if (!stream) return -1;
    if (!is_current && call(self, s_check_process, NULL)) return -1;
    if (stream->error != Py_None && call(object, s_raise_error, NULL)) return -1;
    Chunker *chunker = (Chunker *)stream->chunker;
    if (!is(stream->chunker, Chunker_type) || !chunker->queue || !lock) {
        PyErr_SetString(PyExc_AssertionError, "the items of this stream come from `enqueue`");
        return -1;
    }
    PyArrayObject *from = PyObject_Size(chunker->queue) ? NULL : audio_vector(samples);
    Integer size = from ? PyArray_DIM(from, 0) : 0, done = 0, part = 0;
    int count;
    do {
        PyObject *items[MAX_ITEMS];
        int failed = 0;
        count = 0;
        part = from ? append(chunker, from, done, items, &count) : 0;
        chunker->taken += count;
        if (count) failed = enqueue(self, lock, next, stream, items, count);
        drop(items, count);
        if (failed || part < 0) return -1;
        done += part;
    } while ((part && done < size) || count == MAX_ITEMS);
    return done < size || !from || !size ? accept_other(self, object, stream->chunker, samples, done) : 0;
}

static int accept_local(Scheduler *self, PyObject *stream, PyObject *samples) {
    return accept((PyObject *)self, self->forks == forks, self->lock, schedule, stream, samples);
}

static PyObject *Scheduler_accept(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (!expect(count, 2) || accept_local((Scheduler *)self, args[0], args[1])) return NULL;
    Py_RETURN_NONE;
}

typedef struct {
    Integer slot;
    PyObject *stream;
} Ready;

static int by_slot(const void *one, const void *other) {
    Integer a = ((const Ready *)one)->slot, b = ((const Ready *)other)->slot;
    return (a > b) - (a < b);
}

// Put up to `count` ready streams whose next item is a chunk of size `chunk` into `found`; return how many.
static Py_ssize_t find_ready(Scheduler *self, PyObject *chunk, Ready *found, Py_ssize_t count) {
    PyObject *object, *value;
    Py_ssize_t position = 0, n = 0;
    while (n < count && PyDict_Next(self->ready, &position, &object, &value)) {
        Stream *stream = stream_of(object);
        if (!stream) return -1;
        PyObject *head = items_of(stream)->count ? *place(items_of(stream), 0) : NULL;
        if (!head || !is_item(head) || PyTuple_GetItem(head, CHUNK) != chunk) continue;
        Integer slot = PyLong_AsLongLong(stream->slot ? stream->slot : Py_None);
        if (slot == -1 && PyErr_Occurred()) return -1;
        found[n++] = (Ready){slot, object};
    }
    qsort(found, n, sizeof *found, by_slot);
    return n;
}

// Take the next item of a ready stream.
static PyObject *take_item(Scheduler *self, PyObject *object) {
    Stream *stream = (Stream *)object;
    stream->in_flight++;
    if (PyDict_DelItem(self->ready, object)) return NULL;
    PyObject *item = Queue_popleft(stream->items, NULL);
    if (!item) return NULL;
    int reset = PyObject_IsTrue(PyTuple_GetItem(item, RESET_SLOT));
    if (reset < 0 || (reset && call((PyObject *)self, s__reset_before, object))) return Py_DECREF(item), NULL;
    if (items_of(stream)->count && schedule((PyObject *)self, stream)) return Py_DECREF(item), NULL;
    return item;
}

static PyObject *Scheduler_take_items(PyObject *object, PyObject *const *args, Py_ssize_t given) {
    Scheduler *self = (Scheduler *)object;
    if (!expect(given, 2)) return NULL;
    Py_ssize_t count = PyLong_AsSsize_t(args[1]), size = self->ready ? PyDict_Size(self->ready) : 0;
    if (count == -1 && PyErr_Occurred()) return NULL;
    if (count > size) count = size;
    if (count < 0) count = 0;
    Ready *found = PyMem_Malloc((count + 1) * sizeof *found);
    if (!found) return PyErr_NoMemory();
    PyObject *streams = NULL, *items = NULL, *result = NULL;
    count = find_ready(self, args[0], found, count);
    if (count < 0 || !(streams = PyList_New(count)) || !(items = PyList_New(count))) goto done;
    for (Py_ssize_t i = 0; i < count; i++) PyList_SetItem(streams, i, incref(found[i].stream));
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = take_item(self, found[i].stream);
        if (!item) goto done;
        PyList_SetItem(items, i, item);
    }
    result = PyTuple_Pack(2, streams, items);
done:
    PyMem_Free(found);
    Py_XDECREF(streams);
    Py_XDECREF(items);
    return result;
}

// Append the output of an item without ends. The stream's `quiet_count` is the number of its tokens.
static int append_output(Stream *stream, PyObject *item) {
    PyObject *values[] = {incref(item), incref(stream->quiet_count), incref(no_ends)};
    PyObject *output = named_tuple(StepOutput, 3, values);
    int failed = !output || push((Queue *)stream->outputs, output);
    Py_XDECREF(output);
    return failed ? -1 : 0;
}

// The tokens of a step (`_Landing`): columns of all rows, in lists, and where each row begins.
enum { TOKENS, FRAMES, SCORES, SUMS, BEGINS, COLUMNS };

typedef struct {
    PyObject *columns[COLUMNS];
    Integer samples_per_frame;
} Emissions;

static int emissions_of(PyObject *landing, Emissions *found) {
    PyObject *names[] = {s__tokens, s__frames, s__scores, s__sum_p_alpha, s__begins};
    for (int i = 0; i < COLUMNS; i++)
        if (!(found->columns[i] = PyObject_GetAttr(landing, names[i]))) return -1;
    return integer_of(landing, s_samples_per_frame, &found->samples_per_frame);
}

static void release(Emissions *emissions) {
    for (int i = 0; i < COLUMNS; i++) Py_XDECREF(emissions->columns[i]);
}

static int same_token(PyObject *token, PyObject *other) {
    return other != Py_None && PyObject_RichCompareBool(token, other, Py_EQ);
}

// `Endpointer._continues`
static int continues(Endpointer *self, PyObject *tokens, PyObject *positions, Integer end_sample) {
    if (!self->first || self->first == Py_None || !self->end_of_utterance || !self->backchannel) return 0;
    Integer next_end = self->next_end, last = self->last, longest = PyLong_AsLongLong(self->first) + self->max_length;
    Py_ssize_t count = PyList_Size(tokens);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *token = PyList_GetItem(tokens, i);
        Integer sample = PyLong_AsLongLong(PyList_GetItem(positions, i));
        if (sample >= next_end || sample >= longest) return 0;
        if (same_token(token, self->end_of_utterance) || same_token(token, self->backchannel)) return 0;
        last = sample;
        Integer by_length = last + self->word > longest ? last + self->word : longest;
        next_end = last + self->silence < by_length ? last + self->silence : by_length;
    }
    if (end_sample >= next_end) return 0;
    self->last = last, self->at_reset = 0, self->next_end = next_end;
    self->count += count;
    return 1;
}

// Whether the last tokens may be a loop (`RepetitionGuard._is_loop` without its last condition). Errors count as that.
static int may_loop(Guard *self, Hypothesis *hypothesis, Integer end_sample) {
    Py_ssize_t count = PyList_Size(hypothesis->tokens);
    Integer window, cycle;
    if (integer_of((PyObject *)self, s_WINDOW, &window) || integer_of((PyObject *)self, s_CYCLE, &cycle)) return 1;
    if (count - self->start < window) return 0;
    Integer position = PyLong_AsLongLong(PyList_GetItem(hypothesis->sample_positions, count - 1));
    if (end_sample - position > self->pause) return 0;
    for (Integer c = 1; c <= cycle; c++) {
        Py_ssize_t i = count - 1;
        while (i >= count - window + c) {
            PyObject *token = PyList_GetItem(hypothesis->tokens, i);
            PyObject *before = PyList_GetItem(hypothesis->tokens, i - c);
            if (!token || !before || PyObject_RichCompareBool(token, before, Py_EQ) != 1) break;
            i--;
        }
        if (i < count - window + c) return 1;
    }
    return 0;
}

// `_record_output` for a chunk with tokens that ends no utterance and is no loop. Return whether it was one; -1: error
static int record_output(Stream *stream, PyObject *item, PyObject *tokens, PyObject *positions) {
    Hypothesis *hypothesis = (Hypothesis *)stream->hypothesis;
    Guard *guard = (Guard *)stream->guard;
    Endpointer *endpointer = (Endpointer *)stream->endpointer;
    Integer end_sample = PyLong_AsLongLong(PyTuple_GetItem(item, END_SAMPLE));
    int guarded = stream->guard != Py_None, ends = stream->endpointer != Py_None;
    if (PyTuple_GetItem(item, KIND) != run_kind || PyTuple_GetItem(item, RESET_SLOT) != Py_False) return 0;
    if ((guarded && !is(stream->guard, Guard_type)) || (ends && !is(stream->endpointer, Endpointer_type))) return 0;
    if (guarded && may_loop(guard, hypothesis, end_sample)) return PyErr_Occurred() ? -1 : 0;
    if (ends && !continues(endpointer, tokens, positions, end_sample)) return PyErr_Occurred() ? -1 : 0;
    if (guarded) guard->loop_suspected = 0;
    stream->quiet_until = ends ? endpointer->next_end : NEVER;
    set(&stream->quiet_count, PyLong_FromSsize_t(PyList_Size(hypothesis->tokens)));
    if (!stream->quiet_count || append_output(stream, item)) return -1;
    return 1;
}

static int is_hypothesis(PyObject *object) {
    Hypothesis *self = (Hypothesis *)object;
    return is(object, Hypothesis_type) && self->tokens && self->sample_positions && self->scores && self->sum_p_alpha;
}

static int extend(PyObject *list, PyObject *more) {
    Py_ssize_t size = PyList_Size(list);
    return size < 0 ? -1 : PyList_SetSlice(list, size, size, more);
}

// Add the tokens of a row to the hypothesis; return their samples.
static PyObject *add_tokens(Hypothesis *hypothesis, Emissions *emissions, PyObject *item, PyObject *slices[4]) {
    Integer origin = PyLong_AsLongLong(PyTuple_GetItem(item, ORIGIN_SAMPLE));
    Py_ssize_t count = PyList_Size(slices[FRAMES]);
    PyObject *positions = PyList_New(count);
    for (Py_ssize_t i = 0; positions && i < count; i++) {
        Integer frame = PyLong_AsLongLong(PyList_GetItem(slices[FRAMES], i));
        PyObject *position = PyLong_FromLongLong(frame * emissions->samples_per_frame + origin);
        if (position)
            PyList_SetItem(positions, i, position);
        else
            Py_CLEAR(positions);
    }
    if (!positions || PyErr_Occurred() || extend(hypothesis->tokens, slices[TOKENS]) ||
        extend(hypothesis->sample_positions, positions) || extend(hypothesis->scores, slices[SCORES]) ||
        extend(hypothesis->sum_p_alpha, slices[SUMS]))
        Py_CLEAR(positions);
    return positions;
}

// `_land` for a row with tokens
static int land_tokens(
    Scheduler *self, Stream *stream, PyObject *item, Emissions *emissions, Integer row, Integer count
) {
    PyObject *slices[4] = {0}, *positions = NULL;
    Integer begin = PyLong_AsLongLong(PyList_GetItem(emissions->columns[BEGINS], row));
    int recorded = -1;
    if (PyErr_Occurred()) return -1;
    for (int i = 0; i < 4; i++)
        if (!(slices[i] = PyList_GetSlice(emissions->columns[i], begin, begin + count))) goto end;
    if (!(positions = add_tokens((Hypothesis *)stream->hypothesis, emissions, item, slices))) goto end;
    recorded = record_output(stream, item, slices[TOKENS], positions);
    if (!recorded)
        recorded = call((PyObject *)self, s__record_output, (PyObject *)stream, item, slices[TOKENS], positions);
end:
    for (int i = 0; i < 4; i++) Py_XDECREF(slices[i]);
    Py_XDECREF(positions);
    return recorded < 0 ? -1 : 0;
}

// What follows from the result of a row.
static int continue_stream(Scheduler *self, Stream *stream) {
    PyObject *object = (PyObject *)stream;
    if (items_of(stream)->count && schedule((PyObject *)self, stream)) return -1;
    if (stream->ended && call((PyObject *)self, s__release_if_finished, object)) return -1;
    return stream->progress && stream->progress != Py_None ? call(stream->progress, s_notify_all, NULL) : 0;
}

static int land_other(Scheduler *self, Stream *stream, PyObject *item, PyObject *landing, Py_ssize_t row) {
    PyObject *number = PyLong_FromSsize_t(row);
    int failed = !number || call((PyObject *)self, s__land_item, (PyObject *)stream, item, landing, number);
    Py_XDECREF(number);
    return failed ? -1 : 0;
}

static int land(
    Scheduler *self, Stream *stream, PyObject *item, PyObject *landing, Emissions *emissions, Py_ssize_t row,
    PyObject *count, PyObject *failed
) {
    stream->in_flight--;
    if (failed != Py_False || stream->error != Py_None || !is_item(item))
        return land_other(self, stream, item, landing, row);
    Integer tokens = PyLong_AsLongLong(count), end = PyLong_AsLongLong(PyTuple_GetItem(item, END_SAMPLE));
    if (PyErr_Occurred()) return -1;
    if (tokens)
        return is_hypothesis(stream->hypothesis) ? land_tokens(self, stream, item, emissions, row, tokens)
                                                       : land_other(self, stream, item, landing, row);
    int quiet = end < stream->quiet_until && stream->quiet_count && PyTuple_GetItem(item, RESET_SLOT) == Py_False;
    return quiet ? append_output(stream, item) : land_other(self, stream, item, landing, row);
}

static PyObject *Scheduler_land_all(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    if (!expect(given, 5)) return NULL;
    PyObject *streams = args[0], *items = args[1], *landing = args[2], *counts = args[3], *failed = args[4];
    Emissions emissions = {0};
    int error = emissions_of(landing, &emissions);
    for (Py_ssize_t row = 0, rows = PyList_Size(streams); !error && row < rows; row++) {
        PyObject *object = PyList_GetItem(streams, row), *item = PyList_GetItem(items, row);
        PyObject *count = PyList_GetItem(counts, row), *row_failed = PyList_GetItem(failed, row);
        Stream *stream = object && item && count && row_failed ? stream_of(object) : NULL;
        error = !stream || land((Scheduler *)self, stream, item, landing, &emissions, row, count, row_failed) ||
                continue_stream((Scheduler *)self, stream);
    }
    release(&emissions);
    if (error || PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

// The audio of an item: `samples` samples of int16 or float32, and their scale. NULL: something else
static PyArrayObject *audio_of(PyObject *item, Integer samples, float *scale) {
    PyArrayObject *audio = is_item(item) ? audio_vector(PyTuple_GetItem(item, AUDIO)) : NULL;
    if (!audio || PyArray_DIM(audio, 0) != samples) return NULL;
    double value = PyFloat_AsDouble(PyTuple_GetItem(item, SCALE));
    *scale = (float)value;
    if (value == -1.0 && PyErr_Occurred()) return PyErr_Clear(), NULL;
    return audio;
}

// Also compiled for processors with AVX2, where the C library can choose: it is the largest part of assembling a step.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_PROCESSORS __attribute__((target_clones("avx2", "default")))
#else
#define FOR_PROCESSORS
#endif

FOR_PROCESSORS
static void scale_int16(float *restrict to, const npy_int16 *restrict from, Integer count, float scale) {
    for (Integer i = 0; i < count; i++) to[i] = (float)from[i] * scale;
}

FOR_PROCESSORS
static void scale_float32(float *restrict to, const float *restrict from, Integer count, float scale) {
    for (Integer i = 0; i < count; i++) to[i] = from[i] * scale;
}

// Whether the audio of all items was copied; otherwise only a part of it is.
static int copy_audio(PyObject *items, PyArrayObject *audio) {
    Integer rows = PyArray_DIM(audio, 0), samples = PyArray_DIM(audio, 1);
    for (Integer row = 0; row < rows; row++) {
        float scale, *to = (float *)PyArray_DATA(audio) + row * samples;
        PyArrayObject *from = audio_of(PyList_GetItem(items, row), samples, &scale);
        if (!from) return 0;
        if (PyArray_DESCR(from) == int16)
            scale_int16(to, PyArray_DATA(from), samples, scale);
        else
            scale_float32(to, PyArray_DATA(from), samples, scale);
    }
    return 1;
}

// Use the block of an item again: `Chunker.recycle`
static int recycle(Stream *stream, PyObject *item) {
    PyObject *block = PyTuple_GetItem(item, BLOCK);
    if (block == Py_None || !is(stream->chunker, Chunker_type)) return 0;
    PyObject *spare = ((Chunker *)stream->chunker)->spare;
    return is_queue(spare) ? push((Queue *)spare, block) : 0;
}

static PyObject *Scheduler_gather(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    if (!expect(given, 6)) return NULL;
    PyObject *streams = args[0], *items = args[1];
    PyArrayObject *audio = (PyArrayObject *)args[2], *slots = vector(args[3], int64);
    PyArrayObject *lengths = vector(args[4], int64), *prompts = vector(args[5], int64);
    Py_ssize_t rows = PyList_Size(items);
    if (!PyArray_CheckExact(args[2]) || PyArray_NDIM(audio) != 2 || PyArray_DESCR(audio) != float32 ||
        !PyArray_ISCARRAY(audio) || !slots || !lengths || !prompts || PyArray_DIM(audio, 0) != rows ||
        PyArray_DIM(slots, 0) != rows || PyArray_DIM(lengths, 0) != rows || PyArray_DIM(prompts, 0) != rows ||
        PyList_Size(streams) != rows) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "the arrays of a step do not match its items");
        return NULL;
    }
    if (!copy_audio(items, audio) && call(self, s__concatenate, items, args[2])) return NULL;
    for (Py_ssize_t row = 0; row < rows; row++) {
        PyObject *item = PyList_GetItem(items, row);
        Stream *stream = stream_of(PyList_GetItem(streams, row));
        if (!stream || !is_item(item)) {
            if (stream) PyErr_SetString(PyExc_TypeError, "this is not an item of a stream");
            return NULL;
        }
        ((npy_int64 *)PyArray_DATA(slots))[row] = PyLong_AsLongLong(stream->slot ? stream->slot : Py_None);
        ((npy_int64 *)PyArray_DATA(lengths))[row] = PyLong_AsLongLong(PyTuple_GetItem(item, LENGTH));
        ((npy_int64 *)PyArray_DATA(prompts))[row] = PyLong_AsLongLong(PyTuple_GetItem(item, PROMPT));
        if (PyErr_Occurred() || recycle(stream, item)) return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *Scheduler_collect(PyObject *object, PyObject *stream_object) {
    Scheduler *self = (Scheduler *)object;
    Stream *stream = stream_of(stream_object);
    if (!stream || (self->forks != forks && call(object, s_check_process, NULL))) return NULL;
    Queue *queue = (Queue *)stream->outputs;
    Py_ssize_t count = queue->count;
    PyObject *outputs = PyList_New(count);
    for (Py_ssize_t i = 0; outputs && i < count; i++) PyList_SetItem(outputs, i, pop(queue));
    return outputs;
}

#define FAST(name, function) {name, (PyCFunction)(void (*)(void))(function), METH_FASTCALL, NULL}

static PyMethodDef Scheduler_methods[] = {
    FAST("accept", Scheduler_accept),
    FAST("_take", Scheduler_take_items),
    FAST("_land_all", Scheduler_land_all),
    FAST("_gather", Scheduler_gather),
    {"_schedule", Scheduler_schedule, METH_O, NULL},
    {"collect", Scheduler_collect, METH_O, NULL},
    {0},
};

// -- scheduler of a transport -----------------------------------------------------------------------------------------

// `ITEM` of `serving/processes/link.py`
typedef struct {
    unsigned char kind, reset_slot;
    unsigned short size;
    unsigned int stream;
    int prompt;
    unsigned int offset, length, end_sample[2], origin_sample[2];  // the last two have 64 bits, without alignment
} Record;

#define RUN_INT16 1

static PyObject *Remote_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)args, (void)kwargs;
    Remote *self = (Remote *)PyType_GenericAlloc(type, 0);
    if (self) self->forks = forks;
    return (PyObject *)self;
}

// `Region.write`. -1: there is no space, or the memory is not as expected
static Integer write_words(Region *self, PyArrayObject *from) {
    PyArrayObject *to = vector(self->audio, int16);
    Integer offset = 0, words = PyArray_DIM(from, 0);
    if (!to || !PyArray_ISWRITEABLE(to)) return -1;
    if (!self->count) {
        self->begin = 0;
    } else if (self->wrapped) {
        if (self->end + words > self->begin) return -1;
        offset = self->end;
    } else if (self->end + words <= PyArray_DIM(to, 0)) {
        offset = self->end;
    } else if (words <= self->begin) {
        self->wrapped = self->end;
    } else {
        return -1;
    }
    if (offset < 0 || offset + words > PyArray_DIM(to, 0)) return -1;
    memcpy((npy_int16 *)PyArray_DATA(to) + offset, PyArray_DATA(from), words * sizeof(npy_int16));
    self->end = offset + words;
    self->count++;
    return offset;
}

// `Region.release`
static void release_words(Region *self, Integer words) {
    self->count--;
    self->begin += words;
    if (self->wrapped && self->begin == self->wrapped) self->begin = self->wrapped = 0;
}

static int append_record(PyObject *records, Record *record) {
    Py_ssize_t size = PyByteArray_Check(records) ? PyByteArray_Size(records) : 0;
    if (!PyByteArray_Check(records)) return PyErr_SetString(PyExc_TypeError, "records are not a bytearray"), -1;
    if (PyByteArray_Resize(records, size + sizeof *record)) return -1;
    memcpy(PyByteArray_AsString(records) + size, record, sizeof *record);
    return 0;
}

// Send the next item of a stream if it is a chunk of int16 audio for which there is space. Return whether it was one;
// -1: error
static int send_run(Remote *self, Stream *stream, PyObject *region, PyObject *sent, PyObject *records) {
    PyObject *item = *place(items_of(stream), 0), *ms, *index;
    int run = is_item(item) && PyTuple_GetItem(item, KIND) == run_kind;
    PyArrayObject *from = run ? vector(PyTuple_GetItem(item, AUDIO), int16) : NULL;
    if (!from || !is(region, Region_type) || !is_queue(sent) || !self->chunks) return 0;
    if (!(ms = PyObject_GetAttr(PyTuple_GetItem(item, CHUNK), s_ms))) return -1;
    index = PyObject_GetItem(self->chunks, ms);
    Py_DECREF(ms);
    if (!index) return -1;
    Integer end_sample = PyLong_AsLongLong(PyTuple_GetItem(item, END_SAMPLE));
    Integer origin_sample = PyLong_AsLongLong(PyTuple_GetItem(item, ORIGIN_SAMPLE));
    Record record = {
        .kind = RUN_INT16,
        .reset_slot = PyObject_IsTrue(PyTuple_GetItem(item, RESET_SLOT)),
        .size = PyLong_AsLong(index),
        .stream = PyLong_AsLongLong(stream->slot),
        .prompt = PyLong_AsLong(PyTuple_GetItem(item, PROMPT)),
        .length = PyLong_AsLongLong(PyTuple_GetItem(item, LENGTH)),
    };
    memcpy(record.end_sample, &end_sample, sizeof end_sample);
    memcpy(record.origin_sample, &origin_sample, sizeof origin_sample);
    Py_DECREF(index);
    Integer offset = PyErr_Occurred() ? -1 : write_words((Region *)region, from);
    if (offset < 0) return PyErr_Occurred() ? -1 : 0;
    record.offset = offset;
    pop(items_of(stream));
    int failed = recycle(stream, item) || push((Queue *)sent, item) || append_record(records, &record);
    Py_DECREF(item);
    stream->in_flight++;
    if (!failed && !self->flushing) failed = call((PyObject *)self, s__schedule_flush, NULL);
    return failed ? -1 : 1;
}

// `RemoteScheduler._send_items`. `changed` may be NULL.
static int send_changed(PyObject *self, Stream *stream, PyObject *changed) {
    PyObject *object = (PyObject *)stream, *region = NULL, *sent = NULL, *link = NULL, *records = NULL, *none = NULL;
    int opened = stream->slot && stream->slot != Py_None ? flag_of(object, s_opened) : 0, done = opened;
    if (opened <= 0) return opened;
    if (items_of(stream)->count) {
        if ((region = PyObject_GetAttr(object, s_region)) && (sent = PyObject_GetAttr(object, s_sent)) &&
            (link = PyObject_GetAttr(object, s_link)) && (records = PyObject_GetAttr(link, s_items)))
            while (items_of(stream)->count && (done = send_run((Remote *)self, stream, region, sent, records)) > 0);
        else
            done = -1;
        Py_XDECREF(region);
        Py_XDECREF(sent);
        Py_XDECREF(link);
        Py_XDECREF(records);
    }
    if (done > 0 && !stream->ended) return 0;
    if (done < 0 || (!changed && !(changed = none = PyDict_New()))) return -1;
    int failed = call(self, s__send_others, object, changed);
    Py_XDECREF(none);
    return failed;
}

static int send_items(PyObject *self, Stream *stream) { return send_changed(self, stream, NULL); }

static PyObject *Remote_send_items(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Stream *stream = expect(given, 2) ? stream_of(args[0]) : NULL;
    if (!stream || send_changed(self, stream, args[1])) return NULL;
    Py_RETURN_NONE;
}

static int accept_remote(Remote *self, PyObject *stream, PyObject *samples) {
    return accept((PyObject *)self, self->forks == forks, self->lock, send_items, stream, samples);
}

static PyObject *Remote_accept(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    if (!expect(given, 2) || accept_remote((Remote *)self, args[0], args[1])) return NULL;
    Py_RETURN_NONE;
}

// The columns of a step's results (`Results`), as lists
enum { NUMBERS, COUNTS, ENDS, ROW_COLUMNS, TOKEN_COLUMNS = 4 };

typedef struct {
    PyObject *results, *rows[ROW_COLUMNS], *tokens[TOKEN_COLUMNS], *step;
    Py_ssize_t token, end;  // of the next row
} Columns;

static int columns_of(PyObject *results, Columns *columns) {
    PyObject *names[] = {s_streams, s_counts, s_ends, s_tokens, s_positions, s_scores, s_sum_p_alpha};
    for (int i = 0; i < ROW_COLUMNS + TOKEN_COLUMNS; i++) {
        PyObject *array = PyObject_GetAttr(results, names[i]);
        PyObject *list = array ? PyObject_CallMethodObjArgs(array, s_tolist, NULL) : NULL;
        Py_XDECREF(array);
        if (!list) return -1;
        *(i < ROW_COLUMNS ? &columns->rows[i] : &columns->tokens[i - ROW_COLUMNS]) = list;
    }
    columns->results = results;
    return (columns->step = PyObject_GetAttr(results, s_step)) ? 0 : -1;
}

static void release_columns(Columns *columns) {
    for (int i = 0; i < ROW_COLUMNS; i++) Py_XDECREF(columns->rows[i]);
    for (int i = 0; i < TOKEN_COLUMNS; i++) Py_XDECREF(columns->tokens[i]);
    Py_XDECREF(columns->step);
}

static int is_kind(PyObject *item, const char *kind) {
    PyObject *found = is_item(item) ? PyTuple_GetItem(item, KIND) : NULL;
    return found && PyUnicode_Check(found) && !PyUnicode_CompareWithASCIIString(found, kind);
}

// The next item of which a stream has a result, without the branches before it
static PyObject *next_sent(Queue *sent) {
    for (PyObject *item; (item = Queue_popleft((PyObject *)sent, NULL)); Py_DECREF(item)) {
        if (!is_kind(item, "branch")) return item;
    }
    return NULL;
}

// A chunk was run: its audio is not needed any more.
static int end_run(Stream *stream, PyObject *item, PyObject *region, PyObject *step) {
    PyArrayObject *audio = is(region, Region_type) ? audio_vector(PyTuple_GetItem(item, AUDIO)) : NULL;
    if (!audio) return PyErr_SetString(PyExc_TypeError, "this is not a chunk of a stream"), -1;
    release_words((Region *)region, PyArray_DIM(audio, 0) * (PyArray_DESCR(audio) == float32 ? 2 : 1));
    return stream->trace == Py_None ? 0 : call(stream->trace, s_ran, item, step);
}

// Add the tokens of a row to its stream's hypothesis.
static int add_row_tokens(PyObject *object, Columns *columns, Py_ssize_t count) {
    Hypothesis *hypothesis = (Hypothesis *)object;
    PyObject *lists[] = {
        hypothesis->tokens, hypothesis->sample_positions, hypothesis->scores, hypothesis->sum_p_alpha,
    };
    for (int i = 0; i < TOKEN_COLUMNS; i++) {
        PyObject *slice = PyList_GetSlice(columns->tokens[i], columns->token, columns->token + count);
        int failed = !slice || extend(lists[i], slice);
        Py_XDECREF(slice);
        if (failed) return -1;
    }
    return 0;
}

static int append_row_output(Stream *stream, PyObject *item, Columns *columns, Py_ssize_t count, Py_ssize_t ends) {
    Hypothesis *hypothesis = (Hypothesis *)stream->hypothesis;
    if (!is_hypothesis(stream->hypothesis)) return PyErr_SetString(PyExc_TypeError, "there is no hypothesis"), -1;
    if (count && add_row_tokens(stream->hypothesis, columns, count)) return -1;
    PyObject *found = incref(no_ends);
    if (ends) {
        PyObject *begin = PyLong_FromSsize_t(columns->end), *number = PyLong_FromSsize_t(ends);
        Py_DECREF(found);
        found = begin && number
                    ? PyObject_CallMethodObjArgs(columns->results, s_utterance_ends, begin, number, NULL)
                    : NULL;
        Py_XDECREF(begin);
        Py_XDECREF(number);
    }
    PyObject *values[] = {incref(item), PyLong_FromSsize_t(PyList_Size(hypothesis->tokens)), found};
    PyObject *output = named_tuple(StepOutput, 3, values);
    int failed = !output || push((Queue *)stream->outputs, output);
    Py_XDECREF(output);
    return failed ? -1 : 0;
}

// What follows in a transport from the result of a row.
static int continue_remote(PyObject *self, Stream *stream, Queue *sent, PyObject *changed) {
    PyObject *object = (PyObject *)stream;
    if (sent->count && call(self, s__begin_branches, object, changed)) return -1;
    if ((items_of(stream)->count || stream->ended) && send_changed(self, stream, changed)) return -1;
    return PyDict_SetItem(changed, object, Py_None);
}

static int pass_row(PyObject *self, PyObject *streams, Columns *columns, Py_ssize_t row, PyObject *changed) {
    PyObject *object = PyObject_GetItem(streams, PyList_GetItem(columns->rows[NUMBERS], row));
    PyObject *sent = object ? PyObject_GetAttr(object, s_sent) : NULL, *item = NULL, *region = NULL;
    Py_ssize_t count = PyLong_AsSsize_t(PyList_GetItem(columns->rows[COUNTS], row));
    Py_ssize_t ends = PyLong_AsSsize_t(PyList_GetItem(columns->rows[ENDS], row));
    Stream *stream = object && sent ? stream_of(object) : NULL;
    int failed = -1;
    if (!stream || !is_queue(sent) || PyErr_Occurred() || !(item = next_sent((Queue *)sent))) goto done;
    stream->in_flight--;
    if (is_kind(item, "run"))
        if (!(region = PyObject_GetAttr(object, s_region)) || end_run(stream, item, region, columns->step)) goto done;
    failed = stream->error == Py_None && (append_row_output(stream, item, columns, count, ends) ||
                                          continue_remote(self, stream, (Queue *)sent, changed));
    columns->token += count;
    columns->end += ends;
done:
    if (failed && !PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "this is not a stream of a transport");
    Py_XDECREF(object);
    Py_XDECREF(sent);
    Py_XDECREF(item);
    Py_XDECREF(region);
    return failed;
}

static PyObject *Remote_pass_results(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    if (!expect(given, 3)) return NULL;
    PyObject *streams = args[0], *changed = args[2];
    Columns columns = {0};
    int failed = columns_of(args[1], &columns);
    Py_ssize_t rows = failed ? 0 : PyList_Size(columns.rows[NUMBERS]);
    for (Py_ssize_t row = 0; !failed && row < rows; row++) failed = pass_row(self, streams, &columns, row, changed);
    release_columns(&columns);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

static PyObject *Region_write(PyObject *self, PyObject *words) {
    PyArrayObject *from = vector(words, int16);
    if (!from) return PyErr_SetString(PyExc_TypeError, "words are not a contiguous vector of int16"), NULL;
    Integer offset = write_words((Region *)self, from);
    if (offset < 0) Py_RETURN_NONE;
    return PyLong_FromLongLong(offset);
}

static PyObject *Region_release(PyObject *self, PyObject *words) {
    Integer count = PyLong_AsLongLong(words);
    if (PyErr_Occurred()) return NULL;
    release_words((Region *)self, count);
    Py_RETURN_NONE;
}

static PyMethodDef Remote_methods[] = {
    FAST("accept", Remote_accept),
    FAST("_send_items", Remote_send_items),
    FAST("_pass_results", Remote_pass_results),
    {0},
};

static PyMethodDef Region_methods[] = {
    {"write", Region_write, METH_O, NULL},
    {"release", Region_release, METH_O, NULL},
    {0},
};

// -- tokens -----------------------------------------------------------------------------------------------------------

static PyObject *Token_class(void) {
    static PyObject *found;  // `Token`, whose module imports this one
    if (!found) found = attribute("nemostream.runtime.text.words", "Token");
    return found;
}

// One token of `TokenList.make`
static PyObject *make_token(TokenList *self, PyObject *id, PyObject *position, PyObject *score, PyObject *sum_p_alpha) {
    PyTypeObject *type = (PyTypeObject *)Token_class();
    Integer sample = PyLong_AsLongLong(position);
    if (!type || (sample == -1 && PyErr_Occurred())) return NULL;
    if (self->delay) sample = sample > self->delay ? sample - self->delay : 0;
    PyObject *object = PyType_GenericAlloc(type, 0), *language = NULL;
    Token *token = (Token *)object;
    if (!object) return NULL;
    int tag = PySequence_Contains(self->tags, id);
    language = tag > 0 ? PyObject_CallFunctionObjArgs(self->language_of_tag, id, NULL) : incref(Py_None);
    token->id = incref(id);
    token->text = PyObject_GetItem(self->texts, id);
    token->time = PyFloat_FromDouble((double)sample / (double)self->rate);
    token->end = PyFloat_FromDouble((double)(sample + self->frame) / (double)self->rate);
    token->score = incref(score);
    token->confidence = PyObject_CallFunctionObjArgs(self->confidence_of, score, sum_p_alpha, NULL);
    token->language = language;
    token->tag = PyBool_FromLong(tag);
    if (tag < 0 || !language || !token->text || !token->time || !token->end || !token->confidence) Py_CLEAR(object);
    return object;
}

static PyObject *make_tokens(TokenList *self, PyObject *hypothesis, Py_ssize_t begin, Py_ssize_t end) {
    if (!self->tags || !self->texts || !self->language_of_tag || !self->confidence_of || !self->rate) {
        PyErr_SetString(PyExc_AttributeError, "the list was not initialized");
        return NULL;
    }
    PyObject *names[] = {s_tokens, s_sample_positions, s_scores, s_sum_p_alpha}, *columns[4] = {0}, *made = NULL;
    for (int i = 0; i < 4; i++)
        if (!(columns[i] = PyObject_GetAttr(hypothesis, names[i]))) goto done;
    if (!(made = PyList_New(0))) goto done;
    for (Py_ssize_t index = begin; index < end; index++) {
        PyObject *values[4];
        for (int i = 0; i < 4; i++)
            if (!(values[i] = PyList_GetItem(columns[i], index))) goto failed;
        PyObject *token = make_token(self, values[0], values[1], values[2], values[3]);
        int failed = !token || PyList_Append(made, token);
        Py_XDECREF(token);
        if (failed) goto failed;
    }
done:
    for (int i = 0; i < 4; i++) Py_XDECREF(columns[i]);
    return made;
failed:
    Py_CLEAR(made);
    goto done;
}

static PyObject *TokenList_make(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    if (!expect(given, 3)) return NULL;
    Py_ssize_t begin = PyLong_AsSsize_t(args[1]), end = PyLong_AsSsize_t(args[2]);
    return PyErr_Occurred() ? NULL : make_tokens((TokenList *)self, args[0], begin, end);
}

// `TokenList.extend`, without language tags in the vocabulary
static int extend_tokens(TokenList *self, PyObject *hypothesis, Py_ssize_t end) {
    Py_ssize_t begin = PyList_Size(self->tokens);
    if (begin < 0 || begin >= end) return begin < 0 ? -1 : 0;
    PyObject *made = make_tokens(self, hypothesis, begin, end);
    int failed = !made || extend(self->tokens, made);
    Py_XDECREF(made);
    return failed ? -1 : 0;
}

static PyMethodDef TokenList_methods[] = {FAST("make", TokenList_make), {0}};

// -- events -----------------------------------------------------------------------------------------------------------

#define EVENT(name)                                                                                                   \
    name(utterance) name(start) name(end) name(audio) name(chunk_ms) name(grouper) name(text_from) name(tokens_from)  \
    name(language) name(set_language) name(_prefix)
#define NAME(name) s_##name,
enum { EVENT_FIELDS = 11 };

// What is used of `events.py`, whose module imports this one.
static PyObject *Event_class, *Prefix_class, *grow_short;
static PyObject *partial_fields;  // `__dict__` of a partial event; a copy is made faster than a new one

static int load_events(void) {
    const char *module = "nemostream.runtime.text.events";
    PyObject *names[] = {EVENT(NAME)};
    if (partial_fields) return 0;
    PyObject *fields = Py_BuildValue("{OsOO}", s_kind, "partial", s_reason, Py_None);
    for (int i = 0; fields && i < EVENT_FIELDS; i++)
        if (PyDict_SetItem(fields, names[i], Py_None)) Py_CLEAR(fields);
    if (!fields || !(Event_class = attribute(module, "Event")) || !(Prefix_class = attribute(module, "_Prefix")) ||
        !(grow_short = attribute(module, "_grow_short"))) {
        Py_XDECREF(fields);
        return -1;
    }
    partial_fields = fields;
    return 0;
}

// Whether an object is of a class and has values for all its references.
#define HAS_FIELDS(object, Type) (is(object, Type##_type) && is_complete(object, REFERENCES(Type)))

static int is_complete(PyObject *object, int references) {
    for (int i = 0; i < references; i++)
        if (!((PyObject **)(object + 1))[i]) return 0;
    return 1;
}

// A partial event with these fields. Takes the references, of which one may be NULL after an error.
static PyObject *make_partial(PyObject **values) {
    PyObject *names[] = {EVENT(NAME)}, *fields = PyDict_Copy(partial_fields), *event = NULL;
    for (int i = 0; i < EVENT_FIELDS; i++) {
        if (!values[i] || (fields && PyDict_SetItem(fields, names[i], values[i]))) Py_CLEAR(fields);
        Py_XDECREF(values[i]);
    }
    if (fields) event = PyType_GenericAlloc((PyTypeObject *)Event_class, 0);
    if (event && PyObject_GenericSetDict(event, fields, NULL)) Py_CLEAR(event);
    Py_XDECREF(fields);
    return event;
}

// The text that one more token adds (`Detokenizer.add`). NULL, without an exception: it is decoded with others, or the
// vocabulary has tags. Otherwise all tokens are visible, and none is a backchannel.
static PyObject *added_text(Detokenizer *self, PyObject *id) {
    Py_ssize_t index = self->last == Py_None ? -1 : PyLong_AsSsize_t(id);
    PyObject *text = index < 0 ? NULL : PyTuple_GetItem(self->added_texts, index);
    return text == Py_None ? NULL : text;
}

// The partial event of a step with one more token, with text, of an utterance that has begun (`EventBuilder._step`).
// NULL without an exception: it is another case, and nothing is changed.
static PyObject *next_partial(EventBuilder *self, PyObject *const *args, PyObject *set_language) {
    Py_ssize_t count = PyLong_AsSsize_t(args[1]);
    if (count != self->token_count + 1 || !PyList_Check(args[0]) || PyObject_Size(args[2])) return NULL;
    Utterance *utterance = (Utterance *)self->current;
    if (!HAS_FIELDS(self->current, Utterance) || !PyUnicode_Check(set_language)) return NULL;
    if (!HAS_FIELDS(utterance->transcript, Transcript) || !HAS_FIELDS(utterance->detokenizer, Detokenizer)) return NULL;
    Transcript *transcript = (Transcript *)utterance->transcript;
    Token *token = (Token *)PyList_GetItem(args[0], count - 1);
    if (!HAS_FIELDS((PyObject *)token, Token)) return NULL;
    Py_ssize_t token_count = PyList_Size(transcript->tokens), part_count = PyList_Size(transcript->parts);
    if (token_count < 1 || part_count != utterance->event_parts) return NULL;
    PyObject *text = added_text((Detokenizer *)utterance->detokenizer, token->id);
    if (!text || load_events()) return NULL;
    PyObject *grown = PyObject_CallFunctionObjArgs(grow_short, utterance->text_end, text, NULL);
    PyObject *text_end = grown ? PyTuple_GetItem(grown, 0) : NULL;
    PyObject *stable = grown ? PyTuple_GetItem(grown, 1) : NULL, *event = NULL;
    if (!text_end || !stable) goto done;
    Integer stable_length = utterance->stable_length;
    if (stable != Py_None) stable_length = utterance->length + PyLong_AsLongLong(stable);
    int begins_after = PyFloat_AsDouble(utterance->start) > PyFloat_AsDouble(token->end);
    int detected = PyUnicode_CompareWithASCIIString(set_language, "auto") == 0;
    if (PyErr_Occurred()) goto done;
    PyObject *prefix[] = {
        incref(utterance->transcript), PyLong_FromSsize_t(token_count + 1), PyLong_FromSsize_t(part_count + 1),
        PyLong_FromLongLong(stable_length), incref(text),
    };
    event = make_partial((PyObject *[]){
        PyLong_FromLongLong(self->number), incref(begins_after ? token->end : utterance->start), incref(token->end),
        incref(args[3]), incref(args[4]), incref(utterance->grouper), PyLong_FromLongLong(utterance->event_length),
        PyLong_FromLongLong(utterance->event_tokens), incref(detected ? utterance->language : set_language),
        incref(set_language), named_tuple((PyTypeObject *)Prefix_class, 5, prefix),
    });
    if (!event) goto done;
    if (PyList_Append(transcript->tokens, (PyObject *)token) || PyList_Append(transcript->parts, text)) {
        Py_CLEAR(event);
        goto done;
    }
    set(&((Detokenizer *)utterance->detokenizer)->last, incref(token->id));
    set(&utterance->text_end, incref(text_end));
    set(&utterance->set_language, incref(set_language));
    utterance->stable_length = stable_length;
    utterance->event_length = utterance->length += PyUnicode_GetLength(text);
    utterance->event_parts = part_count + 1;
    utterance->event_tokens = token_count + 1;
    utterance->last_visible = token_count;
    self->token_count = count;
done:
    Py_XDECREF(grown);
    return event;
}

static PyObject *EventBuilder_step(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    if (given != 5 && !expect(given, 6)) return NULL;
    PyObject *language = given > 5 ? args[5] : s_auto, *event = next_partial((EventBuilder *)self, args, language);
    if (event) {
        PyObject *events = PyList_New(1);
        if (!events) return Py_DECREF(event), NULL;
        PyList_SetItem(events, 0, event);
        return events;
    }
    if (PyErr_Occurred()) return NULL;
    return PyObject_CallMethodObjArgs(self, s__step, args[0], args[1], args[2], args[3], args[4], language, NULL);
}

static PyMethodDef EventBuilder_methods[] = {FAST("step", EventBuilder_step), {0}};

// -- session ----------------------------------------------------------------------------------------------------------

// `SilenceSplitter.keeps`, without a change if it returns 0.
static int keeps(Silence *self, PyArrayObject *pcm) {
    Integer size = PyArray_DIM(pcm, 0), last = size - 1;
    const npy_int16 *samples = PyArray_DATA(pcm);
    if (!size || self->zeros + size > self->max_zeros) return 0;
    while (last >= 0 && !samples[last]) last--;
    self->zeros = last >= 0 ? size - 1 - last : self->zeros + size;
    return 1;
}

// Whether audio is only copied: it was checked here, and it is counted.
static int accepts_unchanged(Session *self, PyObject *object) {
    Preprocessor *preprocessor = (Preprocessor *)self->preprocessor;
    PyArrayObject *pcm = vector(object, int16);
    if (!pcm || self->ended || !self->accepts_unchanged || self->lanes != Py_None) return 0;
    if (!is(self->preprocessor, Preprocessor_type) || !is(self->silence, Silence_type)) return 0;
    if (!preprocessor->heads) return 0;
    if (PyArray_DIM(pcm, 0) > preprocessor->max_unchanged || preprocessor->received <= 0) return 0;
    if (PyObject_Size(preprocessor->heads) || !keeps((Silence *)self->silence, pcm)) return 0;
    preprocessor->received += PyArray_DIM(pcm, 0);
    return 1;
}

// Whether the scheduler is one of this module's, in the process that made it; -1: error, also in a forked child.
static int is_known(Session *self) {
    if (is(self->scheduler, Scheduler_type) && ((Scheduler *)self->scheduler)->forks == forks) return 1;
    if (is(self->scheduler, Remote_type) && ((Remote *)self->scheduler)->forks == forks) return 1;
    return self->scheduler && call(self->scheduler, s_check_process, NULL) ? -1 : 0;
}

// The lock of such a scheduler
static PyObject *lock_of(Session *self) {
    return is(self->scheduler, Remote_type) ? ((Remote *)self->scheduler)->lock : ((Scheduler *)self->scheduler)->lock;
}

static PyObject *Session_feed(PyObject *object, PyObject *pcm) {
    Session *self = (Session *)object;
    int known = is_known(self);
    if (known < 0) return NULL;
    if (!accepts_unchanged(self, pcm)) return PyObject_CallMethodObjArgs(object, s__feed, pcm, NULL);
    if (!known) return PyObject_CallMethodObjArgs(self->scheduler, s_accept, self->stream, pcm, NULL);
    int failed = is(self->scheduler, Remote_type) ? accept_remote((Remote *)self->scheduler, self->stream, pcm)
                                                  : accept_local((Scheduler *)self->scheduler, self->stream, pcm);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

// `StreamSession._consume`, for a chunk that was run
static int consume(Session *self, PyObject *item) {
    if (integer_of(PyTuple_GetItem(item, CHUNK), s_ms, &self->chunk_ms)) return -1;
    self->steps++;
    self->end_sample = PyLong_AsLongLong(PyTuple_GetItem(item, END_SAMPLE));
    self->prompt = PyLong_AsLongLong(PyTuple_GetItem(item, PROMPT));
    self->received++;
    return PyErr_Occurred() ? -1 : 0;
}

// Consume outputs that cause no events. Return whether there are others; -1: error
static int skip_quiet(Session *self, Queue *outputs) {
    Integer known = ((EventBuilder *)self->event_builder)->token_count, count;
    while (outputs->count) {
        PyObject *output = *place(outputs, 0);
        PyObject *item = Py_TYPE(output) == StepOutput ? PyTuple_GetItem(output, 0) : NULL;
        int quiet = item && is_item(item) && PyTuple_GetItem(item, KIND) == run_kind;
        if (quiet) {
            count = PyLong_AsLongLong(PyTuple_GetItem(output, 1));
            quiet = count == known && PyTuple_GetItem(output, 2) == no_ends;
        }
        if (!quiet) return PyErr_Occurred() ? -1 : 1;
        if (consume(self, item)) return -1;
        Py_DECREF(pop(outputs));
    }
    return 0;
}

// Consume the only output, with tokens and without ends, and return its events (`StreamSession._events`). NULL without
// an exception: it is another case, and nothing is changed.
static PyObject *events_of(Session *self, Stream *stream, Queue *outputs) {
    PyObject *output = *place(outputs, 0), *item = Py_TYPE(output) == StepOutput ? PyTuple_GetItem(output, 0) : NULL;
    TokenList *tokens = (TokenList *)self->tokens;
    Preprocessor *preprocessor = (Preprocessor *)self->preprocessor;
    if (!item || !is_item(item) || PyTuple_GetItem(item, KIND) != run_kind || outputs->count != 1) return NULL;
    if (PyTuple_GetItem(output, 2) != no_ends || !is(self->tokens, TokenList_type) || !tokens->tokens) return NULL;
    if (!tokens->tags || PyObject_Size(tokens->tags) || !stream->hypothesis || !self->language_names) return NULL;
    if (!is(self->preprocessor, Preprocessor_type) || !preprocessor->sample_rate) return NULL;
    PyObject *count = PyTuple_GetItem(output, 1), *seconds = NULL, *chunk_ms = NULL, *language = NULL, *events = NULL;
    Py_ssize_t end = PyLong_AsSsize_t(count);
    pop(outputs);  // `output` is released at the end
    if (!PyErr_Occurred() && !extend_tokens(tokens, stream->hypothesis, end) && !consume(self, item) &&
        (seconds = PyFloat_FromDouble((double)preprocessor->received / (double)preprocessor->sample_rate)) &&
        (chunk_ms = PyLong_FromLongLong(self->chunk_ms)) &&
        (language = PyObject_GetItem(self->language_names, PyTuple_GetItem(item, PROMPT))))
        events = EventBuilder_step(
            self->event_builder, (PyObject *[]){tokens->tokens, count, no_ends, seconds, chunk_ms, language}, 6
        );
    Py_XDECREF(seconds);
    Py_XDECREF(chunk_ms);
    Py_XDECREF(language);
    Py_DECREF(output);
    return events;
}

static PyObject *Session_events(PyObject *object, PyObject *unused) {
    (void)unused;
    Session *self = (Session *)object;
    if (is_known(self) < 0) return NULL;
    if (self->lanes == Py_None && !self->ended && is(self->event_builder, EventBuilder_type) &&
        self->pending_outputs && !PyObject_Size(self->pending_outputs)) {
        Stream *stream = stream_of(self->stream);
        int others = stream ? skip_quiet(self, (Queue *)stream->outputs) : -1;
        if (others <= 0) return others ? NULL : PyList_New(0);
        PyObject *events = events_of(self, stream, (Queue *)stream->outputs);
        if (events || PyErr_Occurred()) return events;
    }
    return PyObject_CallMethodObjArgs(object, s__events, NULL);
}

static PyObject *Session_poll(PyObject *object, PyObject *unused) {
    Session *self = (Session *)object;
    int known = is_known(self);
    Stream *stream = known > 0 && self->lanes == Py_None ? stream_of(self->stream) : NULL;
    if (known < 0 || PyErr_Occurred()) return NULL;
    PyObject *lock = stream ? lock_of(self) : NULL;
    // While another thread holds the lock, it may have changed a part of what is read here. Nothing below releases the
    // GIL before it is read, so no thread acquires a lock that is free.
    PyObject *locked = lock ? PyObject_CallMethodObjArgs(lock, s_locked, NULL) : NULL;
    Py_XDECREF(locked);
    if (locked != Py_False || stream->error != Py_None)
        return PyErr_Occurred() ? NULL : PyObject_CallMethodObjArgs(object, s__poll, NULL);
    if (stream->source != Py_None || items_of(stream)->count || stream->in_flight) Py_RETURN_NONE;
    return Session_events(object, unused);
}

static PyMethodDef Session_methods[] = {
    {"poll", Session_poll, METH_NOARGS, NULL},
    {"feed", Session_feed, METH_O, NULL},
    {"events", Session_events, METH_NOARGS, NULL},
    {0},
};

// -- module -----------------------------------------------------------------------------------------------------------

static PyObject *count_fork(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    forks++;
    Py_RETURN_NONE;
}

// Add a class of fields. `__slots__` has the names of its members: a dataclass creates slots for its other fields.
// Without `traverse`, its objects are not tracked by the garbage collector: nothing that they refer to refers to them.
static PyTypeObject *add_type(
    PyObject *module, const char *name, int size, newfunc new, void *traverse, void *clear, void *dealloc,
    PyMemberDef *members, PyMethodDef *methods
) {
    static PyMethodDef no_methods[] = {{0}};
    PyType_Slot slots[] = {
        {Py_tp_new, new ? (void *)new : (void *)PyType_GenericNew},
        {Py_tp_dealloc, dealloc},
        {Py_tp_members, members},
        {Py_tp_methods, methods ? methods : no_methods},
        {traverse ? Py_tp_traverse : 0, traverse},
        {Py_tp_clear, clear},
        {0, NULL},
    };
    unsigned int tracked = traverse ? Py_TPFLAGS_HAVE_GC : 0;
    PyType_Spec spec = {name, size, 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | tracked, slots};
    PyObject *type = PyType_FromSpec(&spec), *names = PyList_New(0);
    for (PyMemberDef *member = members; names && member->name; member++) {
        PyObject *member_name = PyUnicode_FromString(member->name);
        if (!member_name || PyList_Append(names, member_name)) Py_CLEAR(names);
        Py_XDECREF(member_name);
    }
    PyObject *tuple = names ? PyList_AsTuple(names) : NULL;
    int failed = !type || !tuple || PyObject_SetAttrString(type, "__slots__", tuple) ||
                 PyModule_AddObjectRef(module, strrchr(name, '.') + 1, type);
    Py_XDECREF(names);
    Py_XDECREF(tuple);
    if (failed) Py_CLEAR(type);
    return (PyTypeObject *)type;
}

#define ADD_TYPE(Type, tracked, new, methods)                                                                         \
    if (!(Type##_type = add_type(                                                                                     \
              module, "nemostream.runtime.streaming._host." #Type "Fields", sizeof(Type), new,                        \
              (tracked) ? (void *)Type##_traverse : NULL, (void *)Type##_clear, (void *)Type##_dealloc,               \
              Type##_members, methods                                                                                 \
          )))                                                                                                         \
    return -1

static int load(PyObject *module) {
    if (Queue_type) {
        PyErr_SetString(PyExc_ImportError, "this module is loaded once per process");
        return -1;
    }
    import_array1(-1);
    NAMES(INTERN)
    int16 = PyArray_DescrFromType(NPY_INT16);
    float32 = PyArray_DescrFromType(NPY_FLOAT32);
    int64 = PyArray_DescrFromType(NPY_INT64);
    const char *items = "nemostream.runtime.streaming.items";
    if (!(WorkItem = (PyTypeObject *)attribute(items, "WorkItem"))) return -1;
    if (!(StepOutput = (PyTypeObject *)attribute(items, "StepOutput"))) return -1;
    if (!(int16_scale = attribute(items, "INT16_SCALE"))) return -1;
    if (!(one = PyFloat_FromDouble(1.0)) || !(no_ends = PyTuple_New(0))) return -1;
    if (!(run_kind = PyUnicode_InternFromString("run"))) return -1;
    if (!(Queue_type = (PyTypeObject *)PyType_FromSpec(&Queue_spec))) return -1;
    if (PyModule_AddObjectRef(module, "Queue", (PyObject *)Queue_type)) return -1;
    ADD_TYPE(Block, 1, NULL, NULL);
    ADD_TYPE(Recording, 0, NULL, NULL);
    ADD_TYPE(Chunker, 1, NULL, Chunker_methods);
    ADD_TYPE(Stream, 1, NULL, NULL);
    ADD_TYPE(Hypothesis, 1, NULL, NULL);
    ADD_TYPE(Endpointer, 1, NULL, NULL);
    ADD_TYPE(Guard, 0, NULL, NULL);
    ADD_TYPE(Scheduler, 1, Scheduler_new, Scheduler_methods);
    ADD_TYPE(Remote, 1, Remote_new, Remote_methods);
    ADD_TYPE(Region, 1, NULL, Region_methods);
    ADD_TYPE(Preprocessor, 1, NULL, NULL);
    ADD_TYPE(Silence, 0, NULL, NULL);
    ADD_TYPE(Session, 1, NULL, Session_methods);
    ADD_TYPE(Token, 0, NULL, NULL);
    ADD_TYPE(TokenList, 1, NULL, TokenList_methods);
    ADD_TYPE(Transcript, 0, NULL, NULL);
    ADD_TYPE(Detokenizer, 0, NULL, NULL);
    ADD_TYPE(Utterance, 0, NULL, NULL);
    ADD_TYPE(EventBuilder, 0, NULL, EventBuilder_methods);
    return 0;
}

static PyMethodDef functions[] = {{"count_fork", count_fork, METH_NOARGS, NULL}, {0}};
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, load}, {0, NULL}};
static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_host", .m_methods = functions, .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__host(void) { return PyModuleDef_Init(&module); }
