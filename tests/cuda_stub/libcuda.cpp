// A CUDA driver (`libcuda.so.1`) for tests without a GPU. The real cuda.bindings and cuda.core run on it.
//
// It implements the functions that the GPU backend and cuda.core call. Device memory is host memory, and a module is a
// kernel source compiled for the CPU by `tests/simt`: its image is a text with the library's path (`cuModuleLoadData`).
//
// Work is queued and runs only when the host waits for it, so that a missing wait is noticed. Memory is not zeroed, is
// followed by an inaccessible page, and stays inaccessible after it is freed. No handle is ever used twice.
//
// It is stricter than a driver. Each misuse is recorded as a violation and returns what a driver returns. A use that
// a driver answers with undefined behaviour aborts the process. Legal but unwanted calls are recorded as notes.
//
// Tests control it through the functions `cuda_stub_*` at the end.
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

typedef uint64_t Handle;
typedef uint64_t Address;

enum Result : int {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  DEVICE_UNAVAILABLE = 46,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  ILLEGAL_STATE = 401,
  NOT_FOUND = 500,
  NOT_READY = 600,
  ILLEGAL_ADDRESS = 700,
  MISALIGNED_ADDRESS = 716,
  LAUNCH_FAILED = 719,
  NOT_PERMITTED = 800,
  NOT_SUPPORTED = 801,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
  CAPTURE_MERGE = 902,
  CAPTURE_UNMATCHED = 903,
  CAPTURE_UNJOINED = 904,
  CAPTURE_ISOLATION = 905,
  CAPTURE_IMPLICIT = 906,
  CAPTURED_EVENT = 907,
  CAPTURE_WRONG_THREAD = 908,
};

const std::map<int, const char*> kNames = {
    {0, "CUDA_SUCCESS"},
    {1, "CUDA_ERROR_INVALID_VALUE"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY"},
    {3, "CUDA_ERROR_NOT_INITIALIZED"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE"},
    {100, "CUDA_ERROR_NO_DEVICE"},
    {101, "CUDA_ERROR_INVALID_DEVICE"},
    {200, "CUDA_ERROR_INVALID_IMAGE"},
    {201, "CUDA_ERROR_INVALID_CONTEXT"},
    {218, "CUDA_ERROR_INVALID_PTX"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"},
    {400, "CUDA_ERROR_INVALID_HANDLE"},
    {401, "CUDA_ERROR_ILLEGAL_STATE"},
    {500, "CUDA_ERROR_NOT_FOUND"},
    {600, "CUDA_ERROR_NOT_READY"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS"},
    {719, "CUDA_ERROR_LAUNCH_FAILED"},
    {800, "CUDA_ERROR_NOT_PERMITTED"},
    {801, "CUDA_ERROR_NOT_SUPPORTED"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
    {902, "CUDA_ERROR_STREAM_CAPTURE_MERGE"},
    {903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED"},
    {904, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED"},
    {905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION"},
    {906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"},
    {907, "CUDA_ERROR_CAPTURED_EVENT"},
    {908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"},
};

enum CaptureMode : int { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };
enum NodeType : int { KERNEL = 0, MEMCPY = 1, MEMSET = 2, HOST = 3, GRAPH = 4, EMPTY = 5, CONDITIONAL = 13 };
enum ConditionalType : int { IF = 0, WHILE = 1 };

// Structures of the driver's interface.
struct EdgeData {
  unsigned char from_port, to_port, type, reserved[5];
};
struct ConditionalParams {
  Handle handle;
  int type;
  unsigned size;
  Handle* graphs;
  Handle context;
};
struct NodeParams {
  int type, reserved0[3];
  union {
    long long reserved1[29];
    ConditionalParams conditional;
  };
  long long reserved2;
};
struct InstantiateParams {
  uint64_t flags;
  Handle upload_stream, error_node;
  int result;
};
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  Handle stream;
  void* attributes;
  unsigned attribute_count;
};
typedef void (*HostFunction)(void*);
static_assert(sizeof(NodeParams) == 256 && sizeof(EdgeData) == 8, "as in cuda.h");

typedef std::function<int()> Run;

struct Allocation {
  Address start;
  size_t size;
  bool host, live;
};

struct Module {
  void* library = nullptr;
  size_t argument_size = 0;           // of the struct that every kernel takes
  std::vector<size_t> pointers;  // offsets of its pointers
  bool live = true;
};

struct Function {
  std::shared_ptr<Module> module;
  std::string name;
  void (*launch)(const unsigned*, const unsigned*, void**) = nullptr;
  bool loaded = false;  // onto the device
};

struct Graph;
struct Stream;

struct Condition {
  unsigned value = 0, initial = 0;
  bool assigned = false, used = false;  // whether a launch assigns `initial`; whether a node uses it
};

struct Node {
  Handle handle;
  NodeType type;
  std::string name;
  Run run;
  std::vector<std::shared_ptr<Node>> needs;
  std::vector<std::shared_ptr<Graph>> bodies;  // of a conditional node
  std::vector<Handle> body_handles;
};

// An object of the caller that graphs keep alive. The last release calls `destroy`.
struct UserObject {
  void* pointer;
  void (*destroy)(void*);
  long references;
};

typedef std::map<Handle, long> References;  // to user objects

struct Capture {
  uint64_t id;
  std::shared_ptr<Graph> graph;
  Stream* origin;
  int mode;
  std::thread::id thread;
  bool invalid = false, ended = false;
};

struct Graph {
  Handle handle;
  std::vector<std::shared_ptr<Node>> nodes;
  bool body = false;  // of a conditional node, which owns it
  std::shared_ptr<Capture> capture;
  std::map<Handle, std::shared_ptr<Condition>> conditions;
  References references;
};

struct Exec {
  std::vector<std::shared_ptr<Node>> order;
  std::vector<std::shared_ptr<Condition>> conditions;
  std::vector<std::shared_ptr<Graph>> graphs;  // kept for the conditional bodies
  References references;
};

struct Marker {
  std::shared_ptr<Stream> stream;
  bool done = false;
  std::chrono::steady_clock::time_point time;
};

struct Event {
  unsigned flags;
  std::shared_ptr<Marker> marker;    // of the last record outside a capture
  std::shared_ptr<Capture> capture;  // if the last record was captured
  std::vector<std::shared_ptr<Node>> needs;
};

struct Op {
  std::string name;
  Run run;
};

struct Stream {
  Handle handle;
  unsigned flags;
  int priority;
  std::deque<Op> queue;
  std::shared_ptr<Capture> capture;
  std::vector<std::shared_ptr<Node>> tail;  // nodes that the next captured node depends on
  std::vector<Handle> tail_handles;
  std::vector<EdgeData> tail_edges;
  bool blocking() const { return !(flags & 1); }
};

struct Fault {
  std::string function;
  long countdown;
  int error;
  bool sticky;
};

struct State {
  std::recursive_mutex lock, execution;
  bool initialized = false;
  int device_error = SUCCESS;  // returned by every later call
  size_t memory_used = 0;
  Handle next_handle = 0x1000;
  std::map<Address, Allocation> allocations;
  std::map<Handle, std::shared_ptr<Stream>> streams;
  std::map<Handle, std::shared_ptr<Event>> events;
  std::map<Handle, std::shared_ptr<Module>> modules;
  std::map<Handle, std::shared_ptr<Function>> functions;
  std::map<Handle, std::shared_ptr<Graph>> graphs;
  std::map<Handle, std::shared_ptr<Exec>> execs;
  std::map<Handle, std::shared_ptr<Node>> nodes;
  std::map<Handle, std::shared_ptr<UserObject>> user_objects;
  std::vector<std::shared_ptr<UserObject>> released;  // whose `destroy` is not called yet
  std::map<Handle, std::string> destroyed;  // kind of each handle that was destroyed
  std::vector<std::shared_ptr<Capture>> captures;
  std::shared_ptr<Stream> legacy = std::make_shared<Stream>();
  int retained = 0;
  uint64_t next_capture = 1;
  std::vector<std::string> violations, notes;
  std::vector<Fault> faults;
  std::map<std::string, long> calls;
};

State& state = *new State;  // never destroyed: cuda.core calls during interpreter exit
constexpr Handle kContext = 0x800;
thread_local std::vector<Handle> contexts;  // the last is current
thread_local int thread_mode = GLOBAL;
thread_local bool in_host_function = false;
thread_local const char* running_kernel = nullptr;

typedef std::unique_lock<std::recursive_mutex> Lock;

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* text, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(buffer, sizeof buffer, text, arguments);
  va_end(arguments);
  return buffer;
}

[[noreturn]] void crash(const std::string& message) {
  fprintf(stderr, "cuda_stub: %s: undefined behaviour in a driver\n", message.c_str());
  fflush(stderr);
  abort();
}

int violation(int result, const std::string& message) {
  Lock lock(state.lock);
  state.violations.push_back(message);
  return result;
}

size_t setting(const char* name, size_t otherwise) {
  const char* text = getenv(name);
  return text && *text ? strtoull(text, nullptr, 10) : otherwise;
}
int driver_version() { return (int)setting("CUDA_STUB_DRIVER_VERSION", 13000); }
size_t total_memory() { return setting("CUDA_STUB_MEMORY", size_t(8) << 30); }

// -- faults, contexts and handles ------------------------------------------------------------------------------------

int tick(const std::string& function) {
  Lock lock(state.lock);
  ++state.calls[function];
  if (function.rfind("cu", 0) == 0) ++state.calls["*"];
  int error = SUCCESS;
  for (Fault& fault : state.faults) {
    if (fault.function != function && !(fault.function == "*" && function.rfind("cu", 0) == 0)) continue;
    if (fault.countdown > 0 && --fault.countdown == 0) {
      error = fault.error;
      if (fault.sticky) state.device_error = fault.error;
    }
  }
  return error;
}

int begin(const char* function, bool context) {
  Lock lock(state.lock);
  if (in_host_function) return violation(NOT_PERMITTED, format("%s was called by a host function", function));
  if (int error = tick(function)) return error;
  if (state.device_error) return state.device_error;
  if (!state.initialized) return violation(NOT_INITIALIZED, format("%s was called before cuInit", function));
  if (context && (contexts.empty() || !contexts.back()))
    return violation(INVALID_CONTEXT, format("%s was called in a thread without a current context", function));
  return SUCCESS;
}

#define BEGIN(context)                                         \
  Lock lock(state.lock);                                       \
  if (int result_ = begin(__func__, context)) return result_

#define CHECK(call) \
  if (int result_ = (call)) return result_

template <class T>
Handle insert(std::map<Handle, std::shared_ptr<T>>& table, std::shared_ptr<T> object) {
  Handle handle = state.next_handle += 0x10;
  table[handle] = object;
  return handle;
}

template <class T>
std::shared_ptr<T> find(std::map<Handle, std::shared_ptr<T>>& table, Handle handle, const char* kind) {
  auto found = table.find(handle);
  if (found != table.end()) return found->second;
  if (state.destroyed.count(handle)) crash(format("a destroyed %s was used", kind));
  violation(INVALID_HANDLE, format("%#llx is no %s", (unsigned long long)handle, kind));
  return nullptr;
}

template <class T>
void remove(std::map<Handle, std::shared_ptr<T>>& table, Handle handle, const char* kind) {
  table.erase(handle);
  state.destroyed[handle] = kind;
}

int release_object(Handle handle, long count) {
  auto object = find(state.user_objects, handle, "user object");
  if (!object) return INVALID_HANDLE;
  if (object->references < count) return violation(INVALID_VALUE, "a user object was released too often");
  object->references -= count;
  if (object->references) return SUCCESS;
  state.released.push_back(object);
  remove(state.user_objects, handle, "user object");
  return SUCCESS;
}

void release_objects(References& references) {
  for (auto& [handle, count] : references) release_object(handle, count);
  references.clear();
}

// Call the callers' functions for objects without references. Called without `state.lock`.
void destroy_released() {
  std::vector<std::shared_ptr<UserObject>> released;
  {
    Lock lock(state.lock);
    released.swap(state.released);
  }
  for (auto& object : released) object->destroy(object->pointer);
}

// -- captures --------------------------------------------------------------------------------------------------------

bool active(const std::shared_ptr<Capture>& capture) { return capture && !capture->ended && !capture->invalid; }

// Check a call that the driver calls potentially unsafe, such as an allocation.
int check_unsafe(const char* function) {
  std::thread::id me = std::this_thread::get_id();
  bool prohibited = false, unwanted = false;
  for (auto& capture : state.captures) {
    if (!active(capture)) continue;
    bool own = capture->thread == me;
    unwanted = unwanted || own;
    if (thread_mode == RELAXED || capture->mode == RELAXED) continue;
    if (own || (thread_mode == GLOBAL && capture->mode == GLOBAL)) {
      prohibited = true;
      capture->invalid = true;
    }
  }
  if (prohibited) return violation(CAPTURE_UNSUPPORTED, format("%s was called during a capture", function));
  if (unwanted) state.notes.push_back(format("%s was called during a relaxed capture", function));
  return SUCCESS;
}

// Check a wait for everything in the context.
int check_context_wait(const char* function) {
  bool found = false;
  for (auto& capture : state.captures)
    if (active(capture)) found = capture->invalid = true;
  return found ? violation(CAPTURE_UNSUPPORTED, format("%s waits for a capturing stream", function)) : SUCCESS;
}

int check_wait(const char* function, Stream& stream) {
  if (!stream.capture) return SUCCESS;
  if (stream.capture->invalid) return CAPTURE_INVALIDATED;
  stream.capture->invalid = true;
  return violation(CAPTURE_UNSUPPORTED, format("%s was called for a capturing stream", function));
}

// Find a stream. The legacy stream (0 or 1) must not be used while a blocking stream is captured.
int find_stream(const char* function, Handle handle, std::shared_ptr<Stream>& stream) {
  if (handle > 2) {
    stream = find(state.streams, handle, "stream");
    return stream ? SUCCESS : INVALID_HANDLE;
  }
  stream = state.legacy;
  bool found = false;
  for (auto& [_, other] : state.streams)
    if (other->blocking() && active(other->capture)) found = other->capture->invalid = true;
  return found ? violation(CAPTURE_IMPLICIT, format("%s used the legacy stream during a capture", function)) : SUCCESS;
}

std::shared_ptr<Node> add_node(Graph& graph, NodeType type, const std::string& name, Run run,
                               std::vector<std::shared_ptr<Node>> needs) {
  auto node = std::make_shared<Node>();
  node->type = type, node->name = name, node->run = std::move(run), node->needs = std::move(needs);
  node->handle = insert(state.nodes, node);
  graph.nodes.push_back(node);
  return node;
}

// Queue or capture an operation.
int enqueue(const char* function, Handle handle, NodeType type, const std::string& name, Run run) {
  std::shared_ptr<Stream> stream;
  CHECK(find_stream(function, handle, stream));
  if (stream->capture) {
    if (stream->capture->invalid) return CAPTURE_INVALIDATED;
    if (tick("capture")) {
      stream->capture->invalid = true;
      return CAPTURE_INVALIDATED;
    }
    stream->tail = {add_node(*stream->capture->graph, type, name, std::move(run), stream->tail)};
    return SUCCESS;
  }
  stream->queue.push_back({name, std::move(run)});
  return SUCCESS;
}

// -- execution -------------------------------------------------------------------------------------------------------

// Run what a stream has queued, up to a marker. Called without `state.lock`.
int drain(const std::shared_ptr<Stream>& stream, const Marker* until = nullptr) {
  Lock execution(state.execution);
  for (;;) {
    Op op;
    {
      Lock lock(state.lock);
      if (state.device_error) return state.device_error;
      if (stream->queue.empty() || (until && until->done)) return SUCCESS;
      op = std::move(stream->queue.front());
      stream->queue.pop_front();
    }
    if (int error = op.run()) {
      Lock lock(state.lock);
      state.device_error = error;
      for (auto& [_, other] : state.streams) other->queue.clear();
      return error;
    }
  }
}

int drain_all() {
  std::vector<std::shared_ptr<Stream>> streams;
  {
    Lock lock(state.lock);
    for (auto& [_, stream] : state.streams) streams.push_back(stream);
    streams.push_back(state.legacy);
  }
  for (auto& stream : streams) CHECK(drain(stream));
  return SUCCESS;
}

const Allocation* containing(Address address, size_t size) {
  auto after = state.allocations.upper_bound(address);
  if (after == state.allocations.begin()) return nullptr;
  const Allocation& found = std::prev(after)->second;
  return address + size <= found.start + found.size ? &found : nullptr;
}

// Check that device memory is allocated. `late` if the operation runs now, and not if it is queued.
int check_memory(const std::string& name, Address address, size_t size, bool late) {
  Lock lock(state.lock);
  const Allocation* found = containing(address, size);
  if (found && found->live) return SUCCESS;
  const char* what = found ? "freed memory" : "memory that is not allocated";
  return violation(late ? ILLEGAL_ADDRESS : INVALID_VALUE,
                   format("%s uses %zu bytes at %#llx: %s", name.c_str(), size, (unsigned long long)address, what));
}

bool is_device_memory(const void* pointer) {
  const Allocation* found = containing((Address)pointer, 1);
  return found && !found->host;
}
bool is_pinned(const void* pointer, size_t size) {
  const Allocation* found = containing((Address)pointer, size);
  return found && found->host && found->live;
}

int run_kernel(Function& function, const unsigned* grid, const unsigned* block, std::vector<char>& argument) {
  CHECK(tick("execute"));
  if (!function.module->live) crash("the kernel " + function.name + " ran after its module was unloaded");
  for (size_t offset : function.module->pointers) {
    Address address;
    memcpy(&address, argument.data() + offset, sizeof address);
    if (!address) continue;
    CHECK(check_memory(format("the kernel %s, argument byte %zu,", function.name.c_str(), offset), address, 1, true));
    if (address % 16)
      return violation(MISALIGNED_ADDRESS, format("the kernel %s, argument byte %zu: %#llx is not aligned to 16 bytes",
                                                  function.name.c_str(), offset, (unsigned long long)address));
  }
  void* arguments[] = {argument.data()};
  running_kernel = function.name.c_str();
  function.launch(grid, block, arguments);
  running_kernel = nullptr;
  return SUCCESS;
}

int run_nodes(const std::vector<std::shared_ptr<Node>>& nodes) {
  for (auto& node : nodes) CHECK(node->run());
  return SUCCESS;
}

// Order nodes by their dependencies. Among those that may run, the last added runs first, to reveal missing edges.
std::vector<std::shared_ptr<Node>> ordered(const Graph& graph) {
  std::vector<std::shared_ptr<Node>> order;
  std::set<Node*> done;
  while (order.size() < graph.nodes.size()) {
    size_t before = order.size();
    for (auto node = graph.nodes.rbegin(); node != graph.nodes.rend(); ++node) {
      if (done.count(node->get())) continue;
      if (std::all_of((*node)->needs.begin(), (*node)->needs.end(),
                      [&](auto& need) { return done.count(need.get()); })) {
        order.push_back(*node);
        done.insert(node->get());
        break;
      }
    }
    if (order.size() == before) crash("a graph has a cycle");
  }
  return order;
}

int launch_exec(const std::shared_ptr<Exec>& exec) {
  for (auto& condition : exec->conditions)
    if (condition->assigned) condition->value = condition->initial;
  return run_nodes(exec->order);
}

void on_segmentation_fault(int number, siginfo_t* info, void*) {
  char text[256];
  if (running_kernel) {
    int size = snprintf(text, sizeof text, "cuda_stub: the kernel %s accessed %p, outside all allocations\n",
                        running_kernel, info->si_addr);
    if (write(2, text, size) < 0) _exit(3);
  }
  signal(number, SIG_DFL);  // the access is repeated
}

}  // namespace

// -- driver, devices and contexts ------------------------------------------------------------------------------------

EXPORT int cuInit(unsigned) {
  Lock lock(state.lock);
  if (int error = tick(__func__)) return error;
  if (!state.initialized) {
    struct sigaction action = {};
    action.sa_sigaction = on_segmentation_fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, nullptr);
  }
  state.initialized = true;
  return setting("CUDA_STUB_DEVICES", 1) ? SUCCESS : NO_DEVICE;
}

EXPORT int cuDriverGetVersion(int* version) {
  *version = driver_version();
  return SUCCESS;
}

EXPORT int cuGetErrorName(int error, const char** text) {
  auto found = kNames.find(error);
  *text = found == kNames.end() ? nullptr : found->second;
  return *text ? SUCCESS : INVALID_VALUE;
}

EXPORT int cuGetErrorString(int error, const char** text) { return cuGetErrorName(error, text); }

EXPORT int cuDeviceGetCount(int* count) {
  BEGIN(false);
  *count = (int)setting("CUDA_STUB_DEVICES", 1);
  return SUCCESS;
}

EXPORT int cuDeviceGet(int* device, int ordinal) {
  BEGIN(false);
  if (ordinal < 0 || ordinal >= (int)setting("CUDA_STUB_DEVICES", 1)) return INVALID_DEVICE;
  *device = ordinal;
  return SUCCESS;
}

EXPORT int cuDeviceGetName(char* name, int size, int) {
  BEGIN(false);
  snprintf(name, size, "CUDA stub");
  return SUCCESS;
}

EXPORT int cuDeviceGetUuid(char* uuid, int) {
  BEGIN(false);
  memset(uuid, 7, 16);
  return SUCCESS;
}

EXPORT int cuDeviceTotalMem(size_t* bytes, int) {
  BEGIN(false);
  *bytes = total_memory();
  return SUCCESS;
}

EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
  BEGIN(false);
  size_t capability = setting("CUDA_STUB_CAPABILITY", 90);  // 10 * major + minor
  const std::map<int, int> values = {
      {1, 1024},                    // threads per block
      {2, 1024},  {3, 1024}, {4, 64},        // block dimensions
      {5, 0x7fffffff}, {6, 65535}, {7, 65535},  // grid dimensions
      {8, 48 << 10},                // shared memory per block
      {10, 32},                     // warp size
      {16, 132},                    // multiprocessors
      {19, 1},                      // can map host memory
      {41, 1},                      // unified addressing
      {75, int(capability / 10)},  {76, int(capability % 10)},
  };
  auto found = values.find(attribute);
  *value = found == values.end() ? 0 : found->second;
  return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxRetain(Handle* context, int) {
  BEGIN(false);
  ++state.retained;
  *context = kContext;
  return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxRelease(int) {
  BEGIN(false);
  if (!state.retained) return violation(INVALID_CONTEXT, "the primary context was released too often");
  --state.retained;
  return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  BEGIN(false);
  *flags = 0, *active = state.retained > 0;
  return SUCCESS;
}

EXPORT int cuCtxGetCurrent(Handle* context) {
  *context = contexts.empty() ? 0 : contexts.back();
  return SUCCESS;
}

EXPORT int cuCtxSetCurrent(Handle context) {
  BEGIN(false);
  if (context && context != kContext) return violation(INVALID_CONTEXT, "cuCtxSetCurrent got no context");
  if (contexts.empty()) contexts.push_back(context);
  contexts.back() = context;
  return SUCCESS;
}

EXPORT int cuCtxPushCurrent(Handle context) {
  BEGIN(false);
  if (context != kContext) return violation(INVALID_CONTEXT, "cuCtxPushCurrent got no context");
  contexts.push_back(context);
  return SUCCESS;
}

EXPORT int cuCtxPopCurrent(Handle* context) {
  BEGIN(true);
  if (context) *context = contexts.back();
  contexts.pop_back();
  return SUCCESS;
}

EXPORT int cuCtxGetDevice(int* device) {
  BEGIN(true);
  *device = 0;
  return SUCCESS;
}

EXPORT int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  BEGIN(true);
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return SUCCESS;
}

EXPORT int cuCtxSynchronize() {
  {
    BEGIN(true);
    CHECK(check_context_wait(__func__));
  }
  return drain_all();
}

// -- memory ----------------------------------------------------------------------------------------------------------

namespace {

int allocate(size_t size, bool host, Address* address) {
  if (!size) return INVALID_VALUE;
  if (!host && state.memory_used + size > total_memory()) return OUT_OF_MEMORY;
  // The allocation ends, rounded up to the alignment, at an inaccessible page.
  size_t page = sysconf(_SC_PAGESIZE), alignment = 256;
  size_t padded = (size + alignment - 1) / alignment * alignment, mapped = (padded + page - 1) / page * page;
  char* memory = (char*)mmap(nullptr, mapped + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, mapped, PROT_READ | PROT_WRITE)) return OUT_OF_MEMORY;
  char* start = memory + mapped - padded;
  memset(start, 0xcd, padded);
  state.allocations[(Address)start] = {(Address)start, size, host, true};
  if (!host) state.memory_used += size;
  *address = (Address)start;
  return SUCCESS;
}

int release(const char* function, Address address, bool host) {
  auto found = state.allocations.find(address);
  if (found == state.allocations.end() || !found->second.live || found->second.host != host)
    return violation(INVALID_VALUE, format("%s: %#llx is not allocated", function, (unsigned long long)address));
  Allocation& allocation = found->second;
  allocation.live = false;
  if (!host) state.memory_used -= allocation.size;
  size_t page = sysconf(_SC_PAGESIZE);
  Address first = address / page * page, end = (address + allocation.size + page - 1) / page * page;
  // The addresses stay reserved, so that a later use fails.
  mmap((void*)first, end - first, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return SUCCESS;
}

}  // namespace

EXPORT int cuMemAlloc(Address* address, size_t size) {
  BEGIN(true);
  CHECK(check_unsafe(__func__));
  return allocate(size, false, address);
}

EXPORT int cuMemFree(Address address) {
  {
    BEGIN(true);
    CHECK(check_unsafe(__func__));
  }
  CHECK(drain_all());  // a driver waits for the work too
  Lock lock(state.lock);
  return address ? release(__func__, address, false) : SUCCESS;
}

EXPORT int cuMemHostAlloc(void** pointer, size_t size, unsigned) {
  BEGIN(true);
  CHECK(check_unsafe(__func__));
  return allocate(size, true, (Address*)pointer);
}

EXPORT int cuMemFreeHost(void* pointer) {
  {
    BEGIN(true);
    CHECK(check_unsafe(__func__));
  }
  CHECK(drain_all());
  Lock lock(state.lock);
  return release(__func__, (Address)pointer, true);
}

EXPORT int cuMemHostGetDevicePointer(Address* address, void* pointer, unsigned) {
  BEGIN(true);
  if (!is_pinned(pointer, 1)) return violation(INVALID_VALUE, "cuMemHostGetDevicePointer got other host memory");
  *address = (Address)pointer;
  return SUCCESS;
}

EXPORT int cuMemGetInfo(size_t* free, size_t* total) {
  BEGIN(true);
  *total = total_memory();
  *free = *total - state.memory_used;
  return SUCCESS;
}

EXPORT int cuMemGetAddressRange(Address* start, size_t* size, Address address) {
  BEGIN(true);
  const Allocation* found = containing(address, 1);
  if (!found || !found->live) return NOT_FOUND;
  if (start) *start = found->start;
  if (size) *size = found->size;
  return SUCCESS;
}

namespace {

int queue_copy(const char* function, Address target, Address source, size_t size, Handle stream) {
  std::string name = function;
  return enqueue(function, stream, MEMCPY, name, [=] {
    Lock lock(state.lock);
    for (Address address : {target, source})
      if (containing(address, 1)) CHECK(check_memory(name, address, size, true));
    memmove((void*)target, (void*)source, size);
    return int(SUCCESS);
  });
}

int queue_set(const char* function, Address target, unsigned value, size_t width, size_t count, Handle stream) {
  if (target % width) return violation(INVALID_VALUE, format("%s: the address is not aligned", function));
  CHECK(check_memory(function, target, width * count, false));
  std::string name = function;
  return enqueue(function, stream, MEMSET, name, [=] {
    CHECK(check_memory(name, target, width * count, true));
    if (width == 1) memset((void*)target, int(value), count);
    for (size_t i = 0; width > 1 && i < count; ++i) memcpy((char*)target + i * width, &value, width);
    return int(SUCCESS);
  });
}

// Check a pointer to host memory.
int check_host(const char* function, const void* pointer) {
  if (!is_device_memory(pointer)) return SUCCESS;
  return violation(INVALID_VALUE, format("%s: device memory is used as host memory", function));
}

int is_capturing(Handle stream) {
  auto found = state.streams.find(stream);
  return found != state.streams.end() && found->second->capture;
}

}  // namespace

EXPORT int cuMemcpyHtoDAsync(Address target, const void* source, size_t size, Handle stream) {
  BEGIN(true);
  CHECK(check_memory(__func__, target, size, false));
  CHECK(check_host(__func__, source));
  if (is_pinned(source, size) || is_capturing(stream))
    return queue_copy(__func__, target, (Address)source, size, stream);
  // A driver stages pageable memory before it returns.
  auto staged = std::make_shared<std::vector<char>>((const char*)source, (const char*)source + size);
  return enqueue(__func__, stream, MEMCPY, __func__, [=] {
    CHECK(check_memory("cuMemcpyHtoDAsync", target, size, true));
    memcpy((void*)target, staged->data(), size);
    return int(SUCCESS);
  });
}

EXPORT int cuMemcpyDtoHAsync(void* target, Address source, size_t size, Handle handle) {
  std::shared_ptr<Stream> stream;
  {
    BEGIN(true);
    CHECK(check_memory(__func__, source, size, false));
    CHECK(check_host(__func__, target));
    CHECK(queue_copy(__func__, (Address)target, source, size, handle));
    if (is_pinned(target, size) || is_capturing(handle)) return SUCCESS;
    CHECK(find_stream(__func__, handle, stream));
  }
  return drain(stream);  // a copy to pageable memory returns when it is done
}

EXPORT int cuMemcpyDtoDAsync(Address target, Address source, size_t size, Handle stream) {
  BEGIN(true);
  CHECK(check_memory(__func__, target, size, false));
  CHECK(check_memory(__func__, source, size, false));
  return queue_copy(__func__, target, source, size, stream);
}

EXPORT int cuMemsetD8Async(Address target, unsigned char value, size_t count, Handle stream) {
  BEGIN(true);
  return queue_set(__func__, target, value, 1, count, stream);
}

EXPORT int cuMemsetD32Async(Address target, unsigned value, size_t count, Handle stream) {
  BEGIN(true);
  return queue_set(__func__, target, value, 4, count, stream);
}

EXPORT int cuMemcpyHtoD(Address target, const void* source, size_t size) {
  {
    BEGIN(true);
    CHECK(check_unsafe(__func__));
    CHECK(check_memory(__func__, target, size, false));
    CHECK(check_host(__func__, source));
    CHECK(queue_copy(__func__, target, (Address)source, size, 0));
  }
  return drain_all();
}

EXPORT int cuMemcpyDtoH(void* target, Address source, size_t size) {
  {
    BEGIN(true);
    CHECK(check_unsafe(__func__));
    CHECK(check_memory(__func__, source, size, false));
    CHECK(check_host(__func__, target));
    CHECK(queue_copy(__func__, (Address)target, source, size, 0));
  }
  return drain_all();
}

// -- streams and events ----------------------------------------------------------------------------------------------

EXPORT int cuStreamCreateWithPriority(Handle* handle, unsigned flags, int priority) {
  BEGIN(true);
  auto stream = std::make_shared<Stream>();
  stream->flags = flags, stream->priority = priority;
  *handle = stream->handle = insert(state.streams, stream);
  return SUCCESS;
}

EXPORT int cuStreamCreate(Handle* handle, unsigned flags) { return cuStreamCreateWithPriority(handle, flags, 0); }

EXPORT int cuStreamDestroy(Handle handle) {
  std::shared_ptr<Stream> stream;
  {
    BEGIN(false);
    if (!(stream = find(state.streams, handle, "stream"))) return INVALID_HANDLE;
    if (stream->capture) crash("a capturing stream was destroyed");
  }
  int error = drain(stream);  // its work still runs
  Lock lock(state.lock);
  remove(state.streams, handle, "stream");
  return error;
}

EXPORT int cuStreamSynchronize(Handle handle) {
  std::shared_ptr<Stream> stream;
  {
    BEGIN(true);
    CHECK(find_stream(__func__, handle, stream));
    CHECK(check_wait(__func__, *stream));
  }
  return stream == state.legacy ? drain_all() : drain(stream);
}

EXPORT int cuStreamQuery(Handle handle) {
  std::shared_ptr<Stream> stream;
  {
    BEGIN(true);
    CHECK(find_stream(__func__, handle, stream));
    CHECK(check_wait(__func__, *stream));
    if (stream->queue.empty()) return SUCCESS;
  }
  CHECK(drain(stream));
  return NOT_READY;  // as seen by the first query
}

EXPORT int cuStreamGetCtx(Handle, Handle* context) {
  BEGIN(false);
  *context = kContext;
  return SUCCESS;
}

EXPORT int cuStreamGetCtx_v2(Handle, Handle* context, Handle* green) {
  BEGIN(false);
  *context = kContext, *green = 0;
  return SUCCESS;
}

EXPORT int cuStreamGetFlags(Handle handle, unsigned* flags) {
  BEGIN(false);
  std::shared_ptr<Stream> stream;
  CHECK(find_stream(__func__, handle, stream));
  *flags = stream->flags;
  return SUCCESS;
}

EXPORT int cuStreamGetPriority(Handle handle, int* priority) {
  BEGIN(false);
  std::shared_ptr<Stream> stream;
  CHECK(find_stream(__func__, handle, stream));
  *priority = stream->priority;
  return SUCCESS;
}

EXPORT int cuStreamWaitEvent(Handle handle, Handle event_handle, unsigned) {
  BEGIN(true);
  std::shared_ptr<Stream> stream;
  CHECK(find_stream(__func__, handle, stream));
  auto event = find(state.events, event_handle, "event");
  if (!event) return INVALID_HANDLE;
  if (stream->capture && stream->capture->invalid) return CAPTURE_INVALIDATED;
  if (event->capture) {
    if (event->capture->ended)
      return violation(CAPTURED_EVENT, "cuStreamWaitEvent got an event of a capture that has ended");
    if (stream->capture && stream->capture != event->capture) {
      stream->capture->invalid = event->capture->invalid = true;
      return violation(CAPTURE_MERGE, "cuStreamWaitEvent joins two captures");
    }
    if (event->capture->invalid) return CAPTURE_INVALIDATED;
    stream->capture = event->capture;
    for (auto& node : event->needs)
      if (std::find(stream->tail.begin(), stream->tail.end(), node) == stream->tail.end()) stream->tail.push_back(node);
    return SUCCESS;
  }
  if (!event->marker) return SUCCESS;
  if (stream->capture) {
    stream->capture->invalid = true;
    return violation(CAPTURE_ISOLATION, "a capturing stream waits for work outside the capture");
  }
  auto marker = event->marker;
  Run wait = [=] { return marker->done ? 0 : drain(marker->stream, marker.get()); };
  stream->queue.push_back({__func__, wait});
  return SUCCESS;
}

EXPORT int cuLaunchHostFunc(Handle stream, HostFunction function, void* data) {
  BEGIN(true);
  return enqueue(__func__, stream, HOST, "a host function", [=] {
    in_host_function = true;
    function(data);
    in_host_function = false;
    return int(SUCCESS);
  });
}

EXPORT int cuEventCreate(Handle* handle, unsigned flags) {
  BEGIN(true);
  auto event = std::make_shared<Event>();
  event->flags = flags;
  *handle = insert(state.events, event);
  return SUCCESS;
}

EXPORT int cuEventDestroy(Handle handle) {
  BEGIN(false);
  if (!find(state.events, handle, "event")) return INVALID_HANDLE;
  remove(state.events, handle, "event");
  return SUCCESS;
}

EXPORT int cuEventRecord(Handle handle, Handle stream_handle) {
  BEGIN(true);
  std::shared_ptr<Stream> stream;
  CHECK(find_stream(__func__, stream_handle, stream));
  auto event = find(state.events, handle, "event");
  if (!event) return INVALID_HANDLE;
  if (stream->capture) {
    if (stream->capture->invalid) return CAPTURE_INVALIDATED;
    event->capture = stream->capture, event->needs = stream->tail, event->marker = nullptr;
    return SUCCESS;
  }
  auto marker = std::make_shared<Marker>();
  marker->stream = stream;
  event->marker = marker, event->capture = nullptr;
  stream->queue.push_back({"cuEventRecord", [=] {
                             marker->time = std::chrono::steady_clock::now();
                             marker->done = true;
                             return 0;
                           }});
  return SUCCESS;
}

EXPORT int cuEventRecordWithFlags(Handle handle, Handle stream, unsigned) { return cuEventRecord(handle, stream); }

namespace {

int find_event(const char* function, Handle handle, std::shared_ptr<Event>& event) {
  event = find(state.events, handle, "event");
  if (!event) return INVALID_HANDLE;
  if (!event->capture) return SUCCESS;
  event->capture->invalid = true;
  return violation(CAPTURED_EVENT, format("%s was called for an event that was recorded in a capture", function));
}

}  // namespace

EXPORT int cuEventSynchronize(Handle handle) {
  std::shared_ptr<Event> event;
  {
    BEGIN(true);
    CHECK(find_event(__func__, handle, event));
    if (!event->marker) return SUCCESS;
  }
  return drain(event->marker->stream, event->marker.get());
}

EXPORT int cuEventQuery(Handle handle) {
  std::shared_ptr<Event> event;
  {
    BEGIN(true);
    CHECK(check_unsafe(__func__));
    CHECK(find_event(__func__, handle, event));
    if (!event->marker || event->marker->done) return SUCCESS;
  }
  CHECK(drain(event->marker->stream, event->marker.get()));
  return NOT_READY;
}

EXPORT int cuEventElapsedTime(float* milliseconds, Handle first, Handle second) {
  BEGIN(true);
  std::shared_ptr<Event> events[2];
  CHECK(find_event(__func__, first, events[0]));
  CHECK(find_event(__func__, second, events[1]));
  for (auto& event : events) {
    if (!event->marker || event->flags & 2)
      return violation(INVALID_HANDLE, "cuEventElapsedTime: no time was recorded");
    if (!event->marker->done) return NOT_READY;
  }
  auto elapsed = events[1]->marker->time - events[0]->marker->time;
  *milliseconds = std::chrono::duration<float, std::milli>(elapsed).count();
  return SUCCESS;
}

// -- modules and launches --------------------------------------------------------------------------------------------

// The image is a text of lines: "cuda_stub", "library PATH", "argument BYTES", "pointers OFFSET ...".
EXPORT int cuModuleLoadData(Handle* handle, const void* image) {
  BEGIN(true);
  CHECK(check_unsafe(__func__));
  std::istringstream lines((const char*)image);
  std::string line, word, path;
  auto module = std::make_shared<Module>();
  std::getline(lines, line);
  if (line != "cuda_stub") return INVALID_IMAGE;
  while (std::getline(lines, line)) {
    std::istringstream words(line);
    words >> word;
    if (word == "library") std::getline(words >> std::ws, path);
    if (word == "argument") words >> module->argument_size;
    if (word == "pointers")
      for (size_t offset; words >> offset;) module->pointers.push_back(offset);
  }
  module->library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!module->library) return INVALID_IMAGE;
  if (auto order = (void (*)(unsigned))dlsym(module->library, "simt_order"))
    order((unsigned)setting("CUDA_STUB_ORDER", 0));
  *handle = insert(state.modules, module);
  return SUCCESS;
}

EXPORT int cuModuleUnload(Handle handle) {
  {
    BEGIN(true);
    CHECK(check_unsafe(__func__));
    if (!find(state.modules, handle, "module")) return INVALID_HANDLE;
  }
  CHECK(drain_all());  // a driver waits for the work too
  Lock lock(state.lock);
  state.modules[handle]->live = false;  // its library stays loaded
  remove(state.modules, handle, "module");
  return SUCCESS;
}

EXPORT int cuModuleGetFunction(Handle* handle, Handle module_handle, const char* name) {
  BEGIN(true);
  auto function = std::make_shared<Function>();
  function->module = find(state.modules, module_handle, "module");
  if (!function->module) return INVALID_HANDLE;
  function->name = name;
  std::string symbol = std::string("launch_") + name;
  function->launch = (decltype(function->launch))dlsym(function->module->library, symbol.c_str());
  if (!function->launch) return NOT_FOUND;
  *handle = insert(state.functions, function);
  return SUCCESS;
}

EXPORT int cuFuncLoad(Handle handle) {
  BEGIN(true);
  auto function = find(state.functions, handle, "function");
  if (!function) return INVALID_HANDLE;
  function->loaded = true;
  return SUCCESS;
}

EXPORT int cuFuncIsLoaded(int* loaded, Handle handle) {
  BEGIN(true);
  auto function = find(state.functions, handle, "function");
  if (!function) return INVALID_HANDLE;
  *loaded = function->loaded;
  return SUCCESS;
}

EXPORT int cuFuncGetAttribute(int* value, int attribute, Handle handle) {
  BEGIN(true);
  if (!find(state.functions, handle, "function")) return INVALID_HANDLE;
  *value = attribute == 0 ? 1024 : 0;
  return SUCCESS;
}

EXPORT int cuLaunchKernel(Handle handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned, Handle stream, void** parameters,
                          void** extra) {
  BEGIN(true);
  auto function = find(state.functions, handle, "function");
  if (!function) return INVALID_HANDLE;
  const std::string& name = function->name;
  if (!function->module->live) crash("the kernel " + name + " was launched after its module was unloaded");
  if (extra || !parameters || !parameters[0]) return violation(INVALID_VALUE, "a launch without its argument: " + name);
  if ((Address)parameters % 8 || (Address)parameters[0] % 8)
    return violation(INVALID_VALUE, "a launch with an unaligned argument: " + name);
  size_t threads = size_t(block_x) * block_y * block_z;
  if (!grid_x || !grid_y || !grid_z || grid_y > 65535 || grid_z > 65535 || grid_x > 0x7fffffff || !threads ||
      threads > 1024)
    return violation(INVALID_VALUE, format("a launch of %s with grid (%u, %u, %u) and %zu threads", name.c_str(),
                                           grid_x, grid_y, grid_z, threads));
  if (!function->loaded && is_capturing(stream)) state.notes.push_back(name + " was loaded during a capture");
  function->loaded = true;
  const char* bytes = (const char*)parameters[0];
  std::vector<char> argument(bytes, bytes + function->module->argument_size);
  return enqueue(__func__, stream, KERNEL, name, [=]() mutable {
    unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
    std::vector<char> copy = argument;
    return run_kernel(*function, grid, block, copy);
  });
}

EXPORT int cuLaunchKernelEx(const LaunchConfig* config, Handle function, void** parameters, void** extra) {
  const unsigned *grid = config->grid, *block = config->block;
  return cuLaunchKernel(function, grid[0], grid[1], grid[2], block[0], block[1], block[2], config->shared,
                        config->stream, parameters, extra);
}

// -- captures and graphs ---------------------------------------------------------------------------------------------

EXPORT int cuThreadExchangeStreamCaptureMode(int* mode) {
  BEGIN(false);
  std::swap(*mode, thread_mode);
  return SUCCESS;
}

namespace {

int find_nodes(const Graph& graph, const Handle* handles, size_t count, std::vector<std::shared_ptr<Node>>& nodes) {
  for (size_t i = 0; i < count; ++i) {
    auto node = find(state.nodes, handles[i], "node");
    if (!node || std::find(graph.nodes.begin(), graph.nodes.end(), node) == graph.nodes.end())
      return violation(INVALID_VALUE, "a dependency is a node of another graph");
    nodes.push_back(node);
  }
  return SUCCESS;
}

int begin_capture(const char* function, Handle handle, std::shared_ptr<Graph> graph,
                  std::vector<std::shared_ptr<Node>> needs, int mode) {
  std::shared_ptr<Stream> stream;
  CHECK(find_stream(function, handle, stream));
  if (stream == state.legacy) return violation(CAPTURE_UNSUPPORTED, "the legacy stream cannot be captured");
  if (stream->capture) return violation(ILLEGAL_STATE, format("%s: the stream is capturing already", function));
  auto capture = std::make_shared<Capture>();
  capture->id = state.next_capture++, capture->graph = graph, capture->origin = stream.get(), capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  graph->capture = capture;
  state.captures.push_back(capture);
  stream->capture = capture, stream->tail = std::move(needs);
  return SUCCESS;
}

void destroy_graph(Graph& graph) {
  if (graph.capture) crash("a graph was destroyed while it was captured");
  for (auto& node : graph.nodes) {
    for (auto& body : node->bodies) destroy_graph(*body);
    remove(state.nodes, node->handle, "node");
  }
  release_objects(graph.references);
  remove(state.graphs, graph.handle, "graph");
}

std::shared_ptr<Graph> make_graph() {
  auto graph = std::make_shared<Graph>();
  graph->handle = insert(state.graphs, graph);
  return graph;
}

bool reaches(const std::vector<std::shared_ptr<Node>>& from, const Node* wanted) {
  std::vector<const Node*> open;
  std::set<const Node*> seen;
  for (auto& node : from) open.push_back(node.get());
  while (!open.empty()) {
    const Node* node = open.back();
    open.pop_back();
    if (node == wanted) return true;
    if (!seen.insert(node).second) continue;
    for (auto& need : node->needs) open.push_back(need.get());
  }
  return false;
}

}  // namespace

EXPORT int cuStreamBeginCapture(Handle stream, int mode) {
  BEGIN(true);
  auto graph = make_graph();
  int result = begin_capture(__func__, stream, graph, {}, mode);
  if (result) destroy_graph(*graph);
  return result;
}

EXPORT int cuStreamBeginCaptureToGraph(Handle stream, Handle graph_handle, const Handle* nodes, const EdgeData*,
                                       size_t count, int mode) {
  BEGIN(true);
  auto graph = find(state.graphs, graph_handle, "graph");
  if (!graph) return INVALID_HANDLE;
  if (graph->capture) return violation(ILLEGAL_STATE, "the graph is captured already");
  std::vector<std::shared_ptr<Node>> needs;
  CHECK(find_nodes(*graph, nodes, count, needs));
  return begin_capture(__func__, stream, graph, needs, mode);
}

EXPORT int cuStreamEndCapture(Handle handle, Handle* out) {
  BEGIN(true);
  if (out) *out = 0;
  auto stream = find(state.streams, handle, "stream");
  if (!stream) return INVALID_HANDLE;
  auto capture = stream->capture;
  if (!capture) return violation(ILLEGAL_STATE, "cuStreamEndCapture: the stream is not capturing");
  if (capture->origin != stream.get()) {
    capture->invalid = true;
    return violation(CAPTURE_UNMATCHED, "a capture was ended on another stream than it began");
  }
  if (capture->mode != RELAXED && capture->thread != std::this_thread::get_id()) {
    capture->invalid = true;
    return violation(CAPTURE_WRONG_THREAD, "a capture was ended in another thread than it began");
  }
  if (capture->invalid && capture->graph->body) crash("the invalidated capture of a conditional body was ended");
  bool joined = true;
  for (auto& [_, other] : state.streams) {
    if (other->capture != capture) continue;
    if (other != stream)
      for (auto& node : other->tail) joined = joined && reaches(stream->tail, node.get());
    other->capture = nullptr;
    if (other != stream) other->tail.clear();
  }
  stream->tail.clear();
  capture->ended = true;
  capture->graph->capture = nullptr;
  state.captures.erase(std::find(state.captures.begin(), state.captures.end(), capture));
  if (capture->invalid || !joined) {
    if (!capture->graph->body) destroy_graph(*capture->graph);  // a caller that got its handle must not destroy it
    if (capture->invalid) return CAPTURE_INVALIDATED;
    return violation(CAPTURE_UNJOINED, "a capture was ended before its forked streams were joined");
  }
  if (out) *out = capture->graph->handle;
  return SUCCESS;
}

EXPORT int cuStreamIsCapturing(Handle handle, int* status) {
  BEGIN(true);
  std::shared_ptr<Stream> stream;
  CHECK(find_stream(__func__, handle, stream));
  *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
  return SUCCESS;
}

EXPORT int cuStreamGetCaptureInfo(Handle handle, int* status, uint64_t* id, Handle* graph, const Handle** nodes,
                                  const EdgeData** edges, size_t* count) {
  BEGIN(true);
  std::shared_ptr<Stream> stream;
  CHECK(find_stream(__func__, handle, stream));
  auto capture = stream->capture;
  *status = !capture ? 0 : capture->invalid ? 2 : 1;
  if (*status != 1) return SUCCESS;
  stream->tail_handles.clear();
  for (auto& node : stream->tail) stream->tail_handles.push_back(node->handle);
  stream->tail_edges.assign(stream->tail.size(), EdgeData{});
  if (id) *id = capture->id;
  if (graph) *graph = capture->graph->handle;
  if (nodes) *nodes = stream->tail_handles.data();
  if (edges) *edges = stream->tail_edges.data();
  if (count) *count = stream->tail.size();
  return SUCCESS;
}

EXPORT int cuStreamUpdateCaptureDependencies(Handle handle, const Handle* nodes, const EdgeData*, size_t count,
                                             unsigned flags) {
  BEGIN(true);
  auto stream = find(state.streams, handle, "stream");
  if (!stream) return INVALID_HANDLE;
  if (!stream->capture) return violation(ILLEGAL_STATE, "cuStreamUpdateCaptureDependencies: no capture");
  if (stream->capture->invalid) return CAPTURE_INVALIDATED;
  std::vector<std::shared_ptr<Node>> found;
  CHECK(find_nodes(*stream->capture->graph, nodes, count, found));
  if (flags == 1) stream->tail.clear();
  stream->tail.insert(stream->tail.end(), found.begin(), found.end());
  return SUCCESS;
}

EXPORT int cuGraphCreate(Handle* handle, unsigned) {
  BEGIN(false);
  *handle = make_graph()->handle;
  return SUCCESS;
}

EXPORT int cuGraphDestroy(Handle handle) {
  {
    BEGIN(false);
    auto graph = find(state.graphs, handle, "graph");
    if (!graph) return INVALID_HANDLE;
    if (graph->body) crash("the body of a conditional node was destroyed");
    destroy_graph(*graph);
  }
  destroy_released();
  return SUCCESS;
}

EXPORT int cuUserObjectCreate(Handle* handle, void* pointer, void (*destroy)(void*), unsigned references, unsigned) {
  BEGIN(false);
  *handle = insert(state.user_objects, std::make_shared<UserObject>(UserObject{pointer, destroy, references}));
  return SUCCESS;
}

EXPORT int cuUserObjectRetain(Handle handle, unsigned count) {
  BEGIN(false);
  auto object = find(state.user_objects, handle, "user object");
  if (!object) return INVALID_HANDLE;
  object->references += count;
  return SUCCESS;
}

EXPORT int cuUserObjectRelease(Handle handle, unsigned count) {
  {
    BEGIN(false);
    CHECK(release_object(handle, count));
  }
  destroy_released();
  return SUCCESS;
}

EXPORT int cuGraphRetainUserObject(Handle graph_handle, Handle handle, unsigned count, unsigned flags) {
  BEGIN(false);
  auto graph = find(state.graphs, graph_handle, "graph");
  auto object = find(state.user_objects, handle, "user object");
  if (!graph || !object) return INVALID_HANDLE;
  if (!(flags & 1)) object->references += count;  // otherwise the caller's references move to the graph
  graph->references[handle] += count;
  return SUCCESS;
}

EXPORT int cuGraphReleaseUserObject(Handle graph_handle, Handle handle, unsigned count) {
  {
    BEGIN(false);
    auto graph = find(state.graphs, graph_handle, "graph");
    if (!graph) return INVALID_HANDLE;
    auto found = graph->references.find(handle);
    if (found == graph->references.end() || found->second < count)
      return violation(INVALID_VALUE, "a graph released a user object that it does not retain");
    if (!(found->second -= count)) graph->references.erase(found);
    CHECK(release_object(handle, count));
  }
  destroy_released();
  return SUCCESS;
}

EXPORT int cuGraphConditionalHandleCreate(Handle* handle, Handle graph_handle, Handle context, unsigned initial,
                                          unsigned flags) {
  BEGIN(true);
  auto graph = find(state.graphs, graph_handle, "graph");
  if (!graph) return INVALID_HANDLE;
  if (context && context != kContext) return violation(INVALID_VALUE, "the condition is for an unknown context");
  auto condition = std::make_shared<Condition>();
  condition->initial = initial, condition->assigned = flags & 1;
  *handle = (Handle)&condition->value;  // kernels set it (`cudaGraphSetConditional` in cuda_on_cpu.h)
  graph->conditions[*handle] = condition;
  return SUCCESS;
}

EXPORT int cuGraphAddNode(Handle* handle, Handle graph_handle, const Handle* nodes, const EdgeData*, size_t count,
                          NodeParams* params) {
  BEGIN(true);
  auto graph = find(state.graphs, graph_handle, "graph");
  if (!graph) return INVALID_HANDLE;
  std::vector<std::shared_ptr<Node>> needs;
  CHECK(find_nodes(*graph, nodes, count, needs));
  if (params->type == EMPTY) {
    *handle = add_node(*graph, EMPTY, "an empty node", [] { return 0; }, needs)->handle;
    return SUCCESS;
  }
  if (params->type != CONDITIONAL) return NOT_SUPPORTED;
  ConditionalParams& conditional = params->conditional;
  auto found = graph->conditions.find(conditional.handle);
  if (found == graph->conditions.end() || found->second->used)
    return violation(INVALID_VALUE, "a conditional node needs a condition of its graph that no other node uses");
  if (conditional.size != 1 || conditional.type > WHILE)
    return violation(INVALID_VALUE, "a conditional node of this type");
  if (conditional.context && conditional.context != kContext)
    return violation(INVALID_VALUE, "a conditional node has an unknown context");
  auto condition = found->second;
  condition->used = true;
  auto body = make_graph();
  body->body = true;
  bool loop = conditional.type == WHILE;
  auto node = add_node(*graph, CONDITIONAL, loop ? "a WHILE node" : "an IF node", nullptr, needs);
  node->bodies = {body}, node->body_handles = {body->handle};
  Graph* raw = body.get();  // owned by the node
  node->run = [condition, raw, loop] {
    for (int turn = 0; condition->value; ++turn) {
      if (turn == 100000) return violation(LAUNCH_FAILED, "a WHILE node does not end");
      CHECK(run_nodes(ordered(*raw)));
      if (!loop) break;
    }
    return int(SUCCESS);
  };
  conditional.graphs = node->body_handles.data();
  *handle = node->handle;
  return SUCCESS;
}

EXPORT int cuGraphAddEmptyNode(Handle* handle, Handle graph, const Handle* nodes, size_t count) {
  NodeParams params = {};
  params.type = EMPTY;
  return cuGraphAddNode(handle, graph, nodes, nullptr, count, &params);
}

EXPORT int cuGraphGetNodes(Handle handle, Handle* nodes, size_t* count) {
  BEGIN(false);
  auto graph = find(state.graphs, handle, "graph");
  if (!graph) return INVALID_HANDLE;
  if (nodes)
    for (size_t i = 0; i < std::min(*count, graph->nodes.size()); ++i) nodes[i] = graph->nodes[i]->handle;
  *count = graph->nodes.size();
  return SUCCESS;
}

EXPORT int cuGraphNodeGetType(Handle handle, int* type) {
  BEGIN(false);
  auto node = find(state.nodes, handle, "node");
  if (!node) return INVALID_HANDLE;
  *type = node->type;
  return SUCCESS;
}

namespace {

int collect(const std::shared_ptr<Graph>& graph, bool inside, Exec& exec) {
  if (graph->capture) return violation(INVALID_VALUE, "a graph was instantiated while it was captured");
  exec.graphs.push_back(graph);
  for (auto& [object, count] : graph->references) {
    exec.references[object] += count;
    find(state.user_objects, object, "user object")->references += count;
  }
  for (auto& [_, condition] : graph->conditions) exec.conditions.push_back(condition);
  for (auto& node : graph->nodes) {
    if (inside && node->type == HOST)
      return violation(NOT_SUPPORTED, "the body of a conditional node contains " + node->name);
    for (auto& body : node->bodies) CHECK(collect(body, true, exec));
  }
  return SUCCESS;
}

}  // namespace

EXPORT int cuGraphInstantiateWithParams(Handle* handle, Handle graph_handle, InstantiateParams* params) {
  BEGIN(true);
  CHECK(check_unsafe(__func__));
  params->result = 1;  // an error
  auto graph = find(state.graphs, graph_handle, "graph");
  if (!graph) return INVALID_HANDLE;
  auto exec = std::make_shared<Exec>();
  if (int error = collect(graph, false, *exec)) {
    release_objects(exec->references);
    return error;
  }
  for (auto& condition : exec->conditions) {
    if (!condition->used) {
      params->result = 5;
      release_objects(exec->references);
      return violation(INVALID_VALUE, "a condition is not used by any node");
    }
  }
  exec->order = ordered(*graph);
  *handle = insert(state.execs, exec);
  params->result = 0;
  return SUCCESS;
}

EXPORT int cuGraphInstantiateWithFlags(Handle* handle, Handle graph, uint64_t) {
  InstantiateParams params = {};
  return cuGraphInstantiateWithParams(handle, graph, &params);
}

EXPORT int cuGraphUpload(Handle handle, Handle stream_handle) {
  BEGIN(true);
  std::shared_ptr<Stream> stream;
  CHECK(find_stream(__func__, stream_handle, stream));
  if (!find(state.execs, handle, "executable graph")) return INVALID_HANDLE;
  return check_wait(__func__, *stream);
}

EXPORT int cuGraphLaunch(Handle handle, Handle stream) {
  BEGIN(true);
  auto exec = find(state.execs, handle, "executable graph");
  if (!exec) return INVALID_HANDLE;
  return enqueue(__func__, stream, GRAPH, "a graph", [exec] { return launch_exec(exec); });
}

EXPORT int cuGraphExecDestroy(Handle handle) {  // one that is queued is freed when it has run
  {
    BEGIN(false);
    auto exec = find(state.execs, handle, "executable graph");
    if (!exec) return INVALID_HANDLE;
    release_objects(exec->references);
    remove(state.execs, handle, "executable graph");
  }
  destroy_released();
  return SUCCESS;
}

// -- entry points ----------------------------------------------------------------------------------------------------

namespace {

struct Symbol {
  int since;  // CUDA version of the interface
  void* function;
};

#define PLAIN(name) {#name, {{0, (void*)name}}}
#define SINCE(version, name) {#name, {{version, (void*)name}}}

const std::map<std::string, std::vector<Symbol>> kSymbols = {
    PLAIN(cuInit),
    PLAIN(cuDriverGetVersion),
    PLAIN(cuGetErrorName),
    PLAIN(cuGetErrorString),
    PLAIN(cuDeviceGetCount),
    PLAIN(cuDeviceGet),
    PLAIN(cuDeviceGetName),
    PLAIN(cuDeviceGetUuid),
    PLAIN(cuDeviceTotalMem),
    PLAIN(cuDeviceGetAttribute),
    PLAIN(cuDevicePrimaryCtxRetain),
    PLAIN(cuDevicePrimaryCtxRelease),
    PLAIN(cuDevicePrimaryCtxGetState),
    PLAIN(cuCtxGetCurrent),
    PLAIN(cuCtxSetCurrent),
    PLAIN(cuCtxPushCurrent),
    PLAIN(cuCtxPopCurrent),
    PLAIN(cuCtxGetDevice),
    PLAIN(cuCtxGetStreamPriorityRange),
    PLAIN(cuCtxSynchronize),
    PLAIN(cuMemAlloc),
    PLAIN(cuMemFree),
    PLAIN(cuMemHostAlloc),
    PLAIN(cuMemFreeHost),
    PLAIN(cuMemHostGetDevicePointer),
    PLAIN(cuMemGetInfo),
    PLAIN(cuMemGetAddressRange),
    PLAIN(cuMemcpyHtoDAsync),
    PLAIN(cuMemcpyDtoHAsync),
    PLAIN(cuMemcpyDtoDAsync),
    PLAIN(cuMemcpyHtoD),
    PLAIN(cuMemcpyDtoH),
    PLAIN(cuMemsetD8Async),
    PLAIN(cuMemsetD32Async),
    PLAIN(cuStreamCreate),
    PLAIN(cuStreamCreateWithPriority),
    PLAIN(cuStreamDestroy),
    PLAIN(cuStreamSynchronize),
    PLAIN(cuStreamQuery),
    {"cuStreamGetCtx", {{0, (void*)cuStreamGetCtx}, {12050, (void*)cuStreamGetCtx_v2}}},
    PLAIN(cuStreamGetFlags),
    PLAIN(cuStreamGetPriority),
    PLAIN(cuStreamWaitEvent),
    PLAIN(cuLaunchHostFunc),
    PLAIN(cuEventCreate),
    PLAIN(cuEventDestroy),
    PLAIN(cuEventRecord),
    PLAIN(cuEventRecordWithFlags),
    PLAIN(cuEventSynchronize),
    PLAIN(cuEventQuery),
    PLAIN(cuEventElapsedTime),
    PLAIN(cuModuleLoadData),
    PLAIN(cuModuleUnload),
    PLAIN(cuModuleGetFunction),
    SINCE(12040, cuFuncLoad),
    SINCE(12040, cuFuncIsLoaded),
    PLAIN(cuFuncGetAttribute),
    PLAIN(cuLaunchKernel),
    PLAIN(cuLaunchKernelEx),
    PLAIN(cuThreadExchangeStreamCaptureMode),
    SINCE(10010, cuStreamBeginCapture),
    SINCE(12030, cuStreamBeginCaptureToGraph),
    PLAIN(cuStreamEndCapture),
    PLAIN(cuStreamIsCapturing),
    SINCE(12030, cuStreamGetCaptureInfo),
    SINCE(12030, cuStreamUpdateCaptureDependencies),
    PLAIN(cuGraphCreate),
    PLAIN(cuGraphDestroy),
    PLAIN(cuUserObjectCreate),
    PLAIN(cuUserObjectRetain),
    PLAIN(cuUserObjectRelease),
    PLAIN(cuGraphRetainUserObject),
    PLAIN(cuGraphReleaseUserObject),
    SINCE(12030, cuGraphConditionalHandleCreate),
    SINCE(12030, cuGraphAddNode),
    PLAIN(cuGraphAddEmptyNode),
    PLAIN(cuGraphGetNodes),
    PLAIN(cuGraphNodeGetType),
    PLAIN(cuGraphInstantiateWithParams),
    PLAIN(cuGraphInstantiateWithFlags),
    PLAIN(cuGraphUpload),
    PLAIN(cuGraphLaunch),
    PLAIN(cuGraphExecDestroy),
};

}  // namespace

EXPORT int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t, int* status) {
  *function = nullptr;
  if (!strcmp(name, "cuGetProcAddress")) *function = (void*)cuGetProcAddress_v2;
  auto found = kSymbols.find(name);
  if (found != kSymbols.end())
    for (const Symbol& symbol : found->second)  // the newest that the caller and the driver support
      if (symbol.since <= version && symbol.since <= driver_version()) *function = symbol.function;
  if (status) *status = *function ? 0 : 1;
  return *function ? SUCCESS : NOT_FOUND;
}

EXPORT int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}

// -- control by tests ------------------------------------------------------------------------------------------------

// Return "violations" or "notes", one per line, or "live": the objects that exist.
EXPORT const char* cuda_stub_report(const char* kind) {
  Lock lock(state.lock);
  static std::string text;
  text.clear();
  if (!strcmp(kind, "live")) {
    size_t device = 0, host = 0;
    for (auto& [_, allocation] : state.allocations) (allocation.host ? host : device) += allocation.live;
    text = format("device_memory %zu\nhost_memory %zu\nstreams %zu\nevents %zu\nmodules %zu\ngraphs %zu\nexecs %zu\n"
                  "user_objects %zu",
                  device, host, state.streams.size(), state.events.size(), state.modules.size(), state.graphs.size(),
                  state.execs.size(), state.user_objects.size());
    return text.c_str();
  }
  for (auto& line : strcmp(kind, "notes") ? state.violations : state.notes) text += line + "\n";
  return text.c_str();
}

// Fail the n-th next call of a function, or of any function ("*"), with an error; all later calls if `sticky`.
// The function "execute" is the run of a kernel, and "capture" a captured operation, which invalidates its capture.
EXPORT void cuda_stub_fail(const char* function, long n, int error, int sticky) {
  Lock lock(state.lock);
  state.faults.push_back({function, n, error, sticky != 0});
}

// Return how often a function was called since `cuda_stub_clear`.
EXPORT long cuda_stub_calls(const char* function) {
  Lock lock(state.lock);
  return state.calls[function];
}

// Forget faults, violations, notes, calls, and an error of the device.
EXPORT void cuda_stub_clear() {
  Lock lock(state.lock);
  state.faults.clear();
  state.violations.clear();
  state.notes.clear();
  state.calls.clear();
  state.device_error = SUCCESS;
  for (auto& [_, stream] : state.streams) stream->queue.clear();
}
