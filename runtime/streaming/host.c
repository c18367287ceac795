// The hot path of the host: what is done for every chunk of every stream between accepted audio and events.
//
// Each class here holds the fields of a Python class that is derived from it (`compiled.py`), as members of a C struct
// that Python code reads and writes as attributes. Rare operations stay in Python and use the same fields. A method
// here replaces the Python method of the same name, which is also the reference that it is tested against: both leave
// the same state. A case that a method does not cover is passed to Python, with nothing changed.
//
// Like the Python code that it replaces, all of this runs with the GIL held, and what is guarded by the scheduler's lock
// stays guarded by it. Arrays are read through NumPy's structs; their type, layout and size are checked before.

#define Py_LIMITED_API 0x030B0000
#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#include <Python.h>
#include <numpy/arrayobject.h>
#include <stdlib.h>
#include <string.h>
#include <structmember.h>

typedef long long Integer;

// References come first in a struct: `FIELDS` visits and clears them as an array.
typedef struct {
    PyObject_HEAD
    PyObject *audio, *chunks;
} Block;

typedef struct {
    PyObject_HEAD
    Integer begin_sample, end_sample, run_frames, skipped_samples;
    char reset_slot;
} Recording;

typedef struct {
    PyObject_HEAD
    PyObject *audio, *block, *direct, *chunk, *config, *recording, *queue, *prompt, *scale, *spare;
    Integer at, begin, block_end, chunk_end, frame, lead, number, samples, taken;
} Chunker;

typedef struct {
    PyObject_HEAD
    PyObject *error, *chunker, *items, *outputs, *source, *trace, *progress, *quiet_count, *slot, *guard, *endpointer;
    Integer in_flight, quiet_until;
    char ended;
} Stream;

typedef struct {
    PyObject_HEAD
    PyObject *lock, *ready, *rows;
    unsigned long forks;  // when the object was created
    char idle;
} Scheduler;

typedef struct {
    PyObject_HEAD
    PyObject *heads;
    Integer received, max_unchanged;
} Preprocessor;

typedef struct {
    PyObject_HEAD
    Integer zeros, max_zeros;
} Silence;

typedef struct {
    PyObject_HEAD
    PyObject *scheduler, *stream, *preprocessor, *silence, *lanes, *pending_outputs, *event_builder;
    Integer chunk_ms, end_sample, prompt, received, steps;
    char ended, accepts_unchanged;
} Session;

static PyTypeObject *Block_type, *Recording_type, *Chunker_type, *Stream_type, *Scheduler_type;
static PyTypeObject *Preprocessor_type, *Silence_type, *Session_type;
static PyTypeObject *WorkItem, *StepOutput;
static PyObject *int16_scale, *one, *no_ends, *run_kind;
static PyArray_Descr *int16, *float32, *int64;
static unsigned long forks;  // between the import of this module and this process

#define MAX_ITEMS 16  // that are enqueued at once

enum { KIND, CHUNK, END_SAMPLE, ORIGIN_SAMPLE, AUDIO, LENGTH, RESET_SLOT, PROMPT, SCALE, BLOCK, ITEM_FIELDS };

#define NAMES(name)                                                                                                   \
    name(_accept_parts) name(_concatenate) name(_events) name(_feed) name(_land_item) name(_notify_idle) name(_open_block) name(_process_items)                   \
    name(_release_if_finished) name(_reset_before) name(_resize) name(accept) name(acquire) name(append) name(arrivals)           \
    name(check_process) name(enqueue) name(enqueued) name(frames) name(loop_suspected) name(ms) name(notify_all) name(popleft)              \
    name(raise_error) name(release) name(resets_decoder) name(samples) name(take) name(token_count)
#define DECLARE(name) static PyObject *s_##name;
#define INTERN(name)                                                                                                  \
    if (!(s_##name = PyUnicode_InternFromString(#name))) return -1;
NAMES(DECLARE)

// -- fields ------------------------------------------------------------------------------------------------------------

#define FIELDS(Type, references)                                                                                      \
    static int Type##_traverse(PyObject *self, visitproc visit, void *arg) {                                          \
        PyObject **field = (PyObject **)(self + 1);                                                                   \
        for (int i = 0; i < (references); i++) Py_VISIT(field[i]);                                                    \
        Py_VISIT(Py_TYPE(self));                                                                                      \
        return 0;                                                                                                     \
    }                                                                                                                 \
    static int Type##_clear(PyObject *self) {                                                                         \
        PyObject **field = (PyObject **)(self + 1);                                                                   \
        for (int i = 0; i < (references); i++) Py_CLEAR(field[i]);                                                    \
        return 0;                                                                                                     \
    }                                                                                                                 \
    static void Type##_dealloc(PyObject *self) {                                                                      \
        PyTypeObject *type = Py_TYPE(self);                                                                           \
        PyObject_GC_UnTrack(self);                                                                                    \
        Type##_clear(self);                                                                                           \
        ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);                                                           \
        Py_DECREF(type);                                                                                              \
    }

#define REFERENCE(Type, name, field) {name, T_OBJECT_EX, offsetof(Type, field), 0, NULL}
#define INTEGER(Type, name, field) {name, T_LONGLONG, offsetof(Type, field), 0, NULL}
#define BOOL(Type, name, field) {name, T_BOOL, offsetof(Type, field), 0, NULL}

FIELDS(Block, 2)
FIELDS(Recording, 0)
FIELDS(Chunker, 10)
FIELDS(Stream, 11)
FIELDS(Scheduler, 3)
FIELDS(Preprocessor, 1)
FIELDS(Silence, 0)
FIELDS(Session, 7)

static PyMemberDef Block_members[] = {REFERENCE(Block, "audio", audio), REFERENCE(Block, "chunks", chunks), {0}};

static PyMemberDef Recording_members[] = {
    INTEGER(Recording, "begin_sample", begin_sample),
    INTEGER(Recording, "end_sample", end_sample),
    INTEGER(Recording, "run_frames", run_frames),
    INTEGER(Recording, "skipped_samples", skipped_samples),
    BOOL(Recording, "reset_slot", reset_slot),
    {0},
};

static PyMemberDef Chunker_members[] = {
    REFERENCE(Chunker, "_audio", audio),
    REFERENCE(Chunker, "_block", block),
    REFERENCE(Chunker, "_direct", direct),
    REFERENCE(Chunker, "chunk", chunk),
    REFERENCE(Chunker, "_config", config),
    REFERENCE(Chunker, "_recording", recording),
    REFERENCE(Chunker, "_queue", queue),
    REFERENCE(Chunker, "prompt", prompt),
    REFERENCE(Chunker, "_scale", scale),
    REFERENCE(Chunker, "_spare", spare),
    INTEGER(Chunker, "_at", at),
    INTEGER(Chunker, "_begin", begin),
    INTEGER(Chunker, "_block_end", block_end),
    INTEGER(Chunker, "_chunk_end", chunk_end),
    INTEGER(Chunker, "_frame", frame),
    INTEGER(Chunker, "_lead", lead),
    INTEGER(Chunker, "_number", number),
    INTEGER(Chunker, "samples", samples),
    INTEGER(Chunker, "taken", taken),
    {0},
};

static PyMemberDef Stream_members[] = {
    REFERENCE(Stream, "error", error),
    REFERENCE(Stream, "chunker", chunker),
    REFERENCE(Stream, "items", items),
    REFERENCE(Stream, "outputs", outputs),
    REFERENCE(Stream, "source", source),
    REFERENCE(Stream, "trace", trace),
    REFERENCE(Stream, "progress", progress),
    REFERENCE(Stream, "quiet_count", quiet_count),
    REFERENCE(Stream, "slot", slot),
    REFERENCE(Stream, "guard", guard),
    REFERENCE(Stream, "endpointer", endpointer),
    INTEGER(Stream, "in_flight", in_flight),
    INTEGER(Stream, "quiet_until", quiet_until),
    BOOL(Stream, "ended", ended),
    {0},
};

static PyMemberDef Scheduler_members[] = {
    REFERENCE(Scheduler, "_lock", lock),
    REFERENCE(Scheduler, "_ready", ready),
    REFERENCE(Scheduler, "_rows", rows),
    BOOL(Scheduler, "_idle", idle),
    {0},
};

static PyMemberDef Preprocessor_members[] = {
    REFERENCE(Preprocessor, "_heads", heads),
    INTEGER(Preprocessor, "received", received),
    INTEGER(Preprocessor, "_max_unchanged", max_unchanged),
    {0},
};

static PyMemberDef Silence_members[] = {
    INTEGER(Silence, "_zeros", zeros),
    INTEGER(Silence, "_max_zeros", max_zeros),
    {0},
};

static PyMemberDef Session_members[] = {
    REFERENCE(Session, "_scheduler", scheduler),
    REFERENCE(Session, "_stream", stream),
    REFERENCE(Session, "preprocessor", preprocessor),
    REFERENCE(Session, "_silence", silence),
    REFERENCE(Session, "_lanes", lanes),
    REFERENCE(Session, "_pending_outputs", pending_outputs),
    REFERENCE(Session, "_event_builder", event_builder),
    INTEGER(Session, "chunk_ms", chunk_ms),
    INTEGER(Session, "_end_sample", end_sample),
    INTEGER(Session, "_prompt", prompt),
    INTEGER(Session, "_received", received),
    INTEGER(Session, "steps", steps),
    BOOL(Session, "_ended", ended),
    BOOL(Session, "_accepts_unchanged", accepts_unchanged),
    {0},
};

// -- helpers -----------------------------------------------------------------------------------------------------------

static int is(PyObject *object, PyTypeObject *type) { return object && PyObject_TypeCheck(object, type); }

static void set(PyObject **field, PyObject *value) {  // takes the reference
    PyObject *before = *field;
    *field = value;
    Py_XDECREF(before);
}

// Call a method and return -1 if it raised.
static int call(PyObject *self, PyObject *name, PyObject *argument) {
    PyObject *result = PyObject_CallMethodObjArgs(self, name, argument, NULL);
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

// A new tuple of a named tuple's type. Takes the references, of which one may be NULL after an error.
static PyObject *named_tuple(PyTypeObject *type, int count, PyObject **values) {
    PyObject *made = PyType_GenericAlloc(type, count);
    for (int i = 0; i < count; i++) {
        if (!values[i]) Py_CLEAR(made);
        if (made)
            PyTuple_SetItem(made, i, values[i]);
        else
            Py_XDECREF(values[i]);
    }
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

// -- chunker -----------------------------------------------------------------------------------------------------------

// Fill the next block: a spare one of the same size and type, or what `_open_block` makes.
static int open_block(Chunker *self, PyArrayObject *before) {
    PyObject *spare = PyObject_Size(self->spare) > 0 ? PySequence_GetItem(self->spare, 0) : NULL;
    Integer samples;
    if (integer_of(self->chunk, s_samples, &samples)) goto error;
    if (spare && is(spare, Block_type)) {
        Block *block = (Block *)spare;
        PyArrayObject *audio = vector(block->audio, PyArray_DESCR(before));
        PyObject *first = block->chunks && PyList_Check(block->chunks) ? PyList_GetItem(block->chunks, 0) : NULL;
        PyArrayObject *chunk = vector(first, NULL);
        if (audio && chunk && PyArray_DIM(chunk, 0) == samples) {
            if (call(self->spare, s_popleft, NULL)) goto error;
            set(&self->audio, incref(block->audio));
            set(&self->config, incref(self->chunk));
            set(&self->scale, incref(PyArray_DESCR(audio) == float32 ? one : int16_scale));
            set(&self->block, spare);
            self->block_end = PyArray_DIM(audio, 0);
            self->begin = self->at = self->number = self->lead = 0;
            self->chunk_end = samples;
            return 0;
        }
    }
    PyErr_Clear();
    Py_XDECREF(spare);
    PyObject *done = PyObject_CallMethodObjArgs((PyObject *)self, s__open_block, self->chunk, PyArray_DESCR(before), NULL);
    Py_XDECREF(done);
    return done ? 0 : -1;
error:
    Py_XDECREF(spare);
    return -1;
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
// into `items`. Return the number of samples that were appended; -1: error. If there are neither samples nor chunks, the
// rest is a case for `_accept_parts`; otherwise it is to be appended next.
static Integer append(Chunker *self, PyArrayObject *from, Integer begin, PyObject **items, int *count) {
    Integer rest = PyArray_DIM(from, 0) - begin;
    PyArrayObject *to = vector(self->audio, PyArray_DESCR(from));
    if (!to || (PyObject *)PyArray_DESCR(from) != self->direct || self->chunk != self->config || !self->spare) return 0;
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

// -- scheduler ---------------------------------------------------------------------------------------------------------

static PyObject *Scheduler_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)args, (void)kwargs;
    Scheduler *self = (Scheduler *)PyType_GenericAlloc(type, 0);
    if (self) self->forks = forks;
    return (PyObject *)self;
}

static int is_item(PyObject *item) { return Py_TYPE(item) == WorkItem && PyTuple_Size(item) == ITEM_FIELDS; }

static Stream *stream_of(PyObject *object) {
    Stream *stream = (Stream *)object;
    if (is(object, Stream_type) && stream->error && stream->items && stream->outputs) return stream;
    PyErr_SetString(PyExc_TypeError, "this is not a stream of the scheduler");
    return NULL;
}

// `Scheduler._schedule`
static int schedule(Scheduler *self, Stream *stream) {
    PyObject *object = (PyObject *)stream;
    int simple = 0;
    if (stream->source == Py_None && stream->chunker != Py_None && PyObject_Size(stream->items) > 0) {
        PyObject *head = PySequence_GetItem(stream->items, 0);
        if (!head) return -1;
        simple = is_item(head) && PyTuple_GetItem(head, KIND) == run_kind;
        if (simple && stream->in_flight) {  // `StreamState.must_wait`
            int waits = PyObject_IsTrue(PyTuple_GetItem(head, RESET_SLOT));
            if (!waits) waits = flag_of(stream->guard, s_loop_suspected);
            if (!waits) waits = flag_of(stream->endpointer, s_resets_decoder);
            if (waits < 0) return Py_DECREF(head), -1;
            simple = !waits;
        }
        Py_DECREF(head);
    }
    if (!simple) return call((PyObject *)self, s__process_items, object);
    if (PyDict_GetItemWithError(self->ready, object)) return 0;
    PyObject *arrivals = PyErr_Occurred() ? NULL : PyObject_GetAttr(self->rows, s_arrivals);
    int failed = !arrivals || PyDict_SetItem(self->ready, object, arrivals);
    Py_XDECREF(arrivals);
    return failed ? -1 : self->idle ? call((PyObject *)self, s__notify_idle, NULL) : 0;
}

static PyObject *Scheduler_schedule(PyObject *self, PyObject *object) {
    Stream *stream = stream_of(object);
    if (!stream || schedule((Scheduler *)self, stream)) return NULL;
    Py_RETURN_NONE;
}

static int enqueue_locked(Scheduler *self, Stream *stream, PyObject **items, int count) {
    if (stream->error != Py_None) return call((PyObject *)stream, s_raise_error, NULL);
    for (int i = 0; i < count; i++) {
        if (stream->trace && stream->trace != Py_None) {
            PyObject *traced = PyTuple_Pack(1, items[i]);
            int failed = !traced || call(stream->trace, s_enqueued, traced);
            Py_XDECREF(traced);
            if (failed) return -1;
        }
        if (call(stream->items, s_append, items[i])) return -1;
    }
    return schedule(self, stream);
}

// `Scheduler.enqueue`
static int enqueue(Scheduler *self, Stream *stream, PyObject **items, int count) {
    PyObject *type, *value, *traceback;
    if (call(self->lock, s_acquire, NULL)) return -1;
    int failed = enqueue_locked(self, stream, items, count);
    PyErr_Fetch(&type, &value, &traceback);
    if (call(self->lock, s_release, NULL)) failed = -1;
    if (type) PyErr_Restore(type, value, traceback);
    return failed;
}

// `chunker.accept`, `take` and `Scheduler.enqueue`, for audio that is not only copied.
static int accept_other(Scheduler *self, PyObject *stream, PyObject *chunker, PyObject *samples, Integer begin) {
    if (pass_on(chunker, s_accept, samples, begin)) return -1;
    PyObject *items = PyObject_CallMethodObjArgs(chunker, s_take, NULL), *done = NULL;
    if (items && PyObject_Size(items) == 0) return Py_DECREF(items), 0;
    if (items) done = PyObject_CallMethodObjArgs((PyObject *)self, s_enqueue, stream, items, NULL);
    Py_XDECREF(items);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

// `StreamScheduler.accept` and `Scheduler.enqueue`
static int accept(Scheduler *self, PyObject *object, PyObject *samples) {
    Stream *stream = stream_of(object);
    if (!stream) return -1;
    if (self->forks != forks && call((PyObject *)self, s_check_process, NULL)) return -1;
    if (stream->error != Py_None && call(object, s_raise_error, NULL)) return -1;
    Chunker *chunker = (Chunker *)stream->chunker;
    if (!is(stream->chunker, Chunker_type) || !chunker->queue || !self->lock || !self->ready || !self->rows) {
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
        if (count) failed = enqueue(self, stream, items, count);
        drop(items, count);
        if (failed || part < 0) return -1;
        done += part;
    } while ((part && done < size) || count == MAX_ITEMS);
    return done < size || !from || !size ? accept_other(self, object, stream->chunker, samples, done) : 0;
}

static PyObject *Scheduler_accept(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (!expect(count, 2) || accept((Scheduler *)self, args[0], args[1])) return NULL;
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
        PyObject *head = stream ? PySequence_GetItem(stream->items, 0) : NULL;
        if (!head) return -1;
        int same = is_item(head) && PyTuple_GetItem(head, CHUNK) == chunk;
        Py_DECREF(head);
        if (!same) continue;
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
    PyObject *item = NULL;
    stream->in_flight++;
    if (PyDict_DelItem(self->ready, object)) return NULL;
    item = PyObject_CallMethodObjArgs(stream->items, s_popleft, NULL);
    if (!item) return NULL;
    int reset = PyObject_IsTrue(PyTuple_GetItem(item, RESET_SLOT));
    if (reset < 0 || (reset && call((PyObject *)self, s__reset_before, object))) return Py_DECREF(item), NULL;
    if (PyObject_Size(stream->items) > 0 && schedule(self, stream)) return Py_DECREF(item), NULL;
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

// Whether a row changes nothing but its stream's outputs. -1: error
static int is_quiet(Stream *stream, PyObject *item, PyObject *count, PyObject *failed) {
    if (failed != Py_False || stream->error != Py_None || !stream->quiet_count || !is_item(item)) return 0;
    Integer tokens = PyLong_AsLongLong(count), end = PyLong_AsLongLong(PyTuple_GetItem(item, END_SAMPLE));
    if (PyErr_Occurred()) return -1;
    return !tokens && end < stream->quiet_until && PyTuple_GetItem(item, RESET_SLOT) == Py_False;
}

static int land(Scheduler *self, Stream *stream, PyObject *item, PyObject *landing, PyObject *row, int quiet) {
    PyObject *object = (PyObject *)stream, *done;
    stream->in_flight--;
    if (quiet) {
        PyObject *values[] = {incref(item), incref(stream->quiet_count), incref(no_ends)};
        PyObject *output = named_tuple(StepOutput, 3, values);
        done = output ? PyObject_CallMethodObjArgs(stream->outputs, s_append, output, NULL) : NULL;
        Py_XDECREF(output);
    } else {
        done = PyObject_CallMethodObjArgs((PyObject *)self, s__land_item, object, item, landing, row, NULL);
    }
    Py_XDECREF(done);
    if (!done || (PyObject_Size(stream->items) > 0 && schedule(self, stream))) return -1;
    if (stream->ended && call((PyObject *)self, s__release_if_finished, object)) return -1;
    return stream->progress && stream->progress != Py_None ? call(stream->progress, s_notify_all, NULL) : 0;
}

static PyObject *Scheduler_land_all(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    if (!expect(given, 5)) return NULL;
    PyObject *streams = args[0], *items = args[1], *landing = args[2], *counts = args[3], *failed = args[4];
    for (Py_ssize_t row = 0, rows = PyList_Size(streams); row < rows; row++) {
        PyObject *object = PyList_GetItem(streams, row), *item = PyList_GetItem(items, row);
        PyObject *count = PyList_GetItem(counts, row), *row_failed = PyList_GetItem(failed, row);
        Stream *stream = object && item && count && row_failed ? stream_of(object) : NULL;
        int quiet = stream ? is_quiet(stream, item, count, row_failed) : -1;
        PyObject *number = quiet < 0 ? NULL : quiet ? incref(Py_None) : PyLong_FromSsize_t(row);
        if (!number) return NULL;
        int error = land((Scheduler *)self, stream, item, landing, number, quiet);
        Py_DECREF(number);
        if (error) return NULL;
    }
    if (PyErr_Occurred()) return NULL;
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

static void scale_int16(float *restrict to, const npy_int16 *restrict from, Integer count, float scale) {
    for (Integer i = 0; i < count; i++) to[i] = (float)from[i] * scale;
}

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
    return spare ? call(spare, s_append, block) : 0;
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
    int copied = copy_audio(items, audio);
    if (!copied) {
        PyObject *done = PyObject_CallMethodObjArgs(self, s__concatenate, items, args[2], NULL);
        Py_XDECREF(done);
        if (!done) return NULL;
    }
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
    Py_ssize_t count = PyObject_Size(stream->outputs);
    PyObject *outputs = count < 0 ? NULL : PyList_New(count);
    for (Py_ssize_t i = 0; outputs && i < count; i++) {
        PyObject *output = PyObject_CallMethodObjArgs(stream->outputs, s_popleft, NULL);
        if (output)
            PyList_SetItem(outputs, i, output);
        else
            Py_CLEAR(outputs);
    }
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

// -- session -----------------------------------------------------------------------------------------------------------

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
    if (!is(self->preprocessor, Preprocessor_type) || !is(self->silence, Silence_type) || !preprocessor->heads) return 0;
    if (PyArray_DIM(pcm, 0) > preprocessor->max_unchanged || preprocessor->received <= 0) return 0;
    if (PyObject_Size(preprocessor->heads) || !keeps((Silence *)self->silence, pcm)) return 0;
    preprocessor->received += PyArray_DIM(pcm, 0);
    return 1;
}

// Whether the scheduler is one in this process; -1: error, also in a forked child.
static int is_local(Session *self) {
    if (is(self->scheduler, Scheduler_type) && ((Scheduler *)self->scheduler)->forks == forks) return 1;
    return self->scheduler && call(self->scheduler, s_check_process, NULL) ? -1 : 0;
}

static PyObject *Session_feed(PyObject *object, PyObject *pcm) {
    Session *self = (Session *)object;
    int local = is_local(self);
    if (local < 0) return NULL;
    if (!accepts_unchanged(self, pcm)) return PyErr_Occurred() ? NULL : PyObject_CallMethodObjArgs(object, s__feed, pcm, NULL);
    if (!local) return PyObject_CallMethodObjArgs(self->scheduler, s_accept, self->stream, pcm, NULL);
    if (accept((Scheduler *)self->scheduler, self->stream, pcm)) return NULL;
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
static int skip_quiet(Session *self, PyObject *outputs) {
    Integer known, count;
    if (integer_of(self->event_builder, s_token_count, &known)) return -1;
    while (PyObject_Size(outputs) > 0) {
        PyObject *output = PySequence_GetItem(outputs, 0);
        if (!output) return -1;
        PyObject *item = Py_TYPE(output) == StepOutput ? PyTuple_GetItem(output, 0) : NULL;
        int quiet = item && is_item(item) && PyTuple_GetItem(item, KIND) == run_kind;
        if (quiet) {
            count = PyLong_AsLongLong(PyTuple_GetItem(output, 1));
            quiet = count == known && PyTuple_GetItem(output, 2) == no_ends;
        }
        int failed = quiet && (call(outputs, s_popleft, NULL) || consume(self, item));
        Py_DECREF(output);
        if (failed || PyErr_Occurred()) return -1;
        if (!quiet) return 1;
    }
    return 0;
}

static PyObject *Session_events(PyObject *object, PyObject *unused) {
    (void)unused;
    Session *self = (Session *)object;
    if (is_local(self) < 0) return NULL;
    if (self->lanes == Py_None && !self->ended && self->event_builder && self->pending_outputs &&
        !PyObject_Size(self->pending_outputs)) {
        Stream *stream = stream_of(self->stream);
        int others = stream ? skip_quiet(self, stream->outputs) : -1;
        if (others <= 0) return others ? NULL : PyList_New(0);
    }
    return PyObject_CallMethodObjArgs(object, s__events, NULL);
}

static PyMethodDef Session_methods[] = {
    {"feed", Session_feed, METH_O, NULL},
    {"events", Session_events, METH_NOARGS, NULL},
    {0},
};

// -- module ------------------------------------------------------------------------------------------------------------

static PyObject *count_fork(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    forks++;
    Py_RETURN_NONE;
}

static PyObject *attribute(const char *module, const char *name) {
    PyObject *imported = PyImport_ImportModule(module);
    PyObject *found = imported ? PyObject_GetAttrString(imported, name) : NULL;
    Py_XDECREF(imported);
    return found;
}

// Add a class of fields. `__slots__` has the names of its members: a dataclass creates slots for its other fields.
static PyTypeObject *add_type(
    PyObject *module, const char *name, int size, newfunc new, void *traverse, void *clear, void *dealloc,
    PyMemberDef *members, PyMethodDef *methods
) {
    static PyMethodDef no_methods[] = {{0}};
    PyType_Slot slots[] = {
        {Py_tp_new, new ? (void *)new : (void *)PyType_GenericNew},
        {Py_tp_traverse, traverse},
        {Py_tp_clear, clear},
        {Py_tp_dealloc, dealloc},
        {Py_tp_members, members},
        {Py_tp_methods, methods ? methods : no_methods},
        {0, NULL},
    };
    PyType_Spec spec = {name, size, 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, slots};
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

#define ADD_TYPE(Type, new, methods)                                                                                  \
    if (!(Type##_type = add_type(                                                                                     \
              module, "nemostream.runtime.streaming._host." #Type "Fields", sizeof(Type), new, Type##_traverse,       \
              Type##_clear, Type##_dealloc, Type##_members, methods                                                   \
          )))                                                                                                         \
    return -1

static int load(PyObject *module) {
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
    ADD_TYPE(Block, NULL, NULL);
    ADD_TYPE(Recording, NULL, NULL);
    ADD_TYPE(Chunker, NULL, Chunker_methods);
    ADD_TYPE(Stream, NULL, NULL);
    ADD_TYPE(Scheduler, Scheduler_new, Scheduler_methods);
    ADD_TYPE(Preprocessor, NULL, NULL);
    ADD_TYPE(Silence, NULL, NULL);
    ADD_TYPE(Session, NULL, Session_methods);
    return 0;
}

static PyMethodDef functions[] = {{"count_fork", count_fork, METH_NOARGS, NULL}, {0}};
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, load}, {0, NULL}};
static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_host", .m_methods = functions, .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__host(void) { return PyModuleDef_Init(&module); }
