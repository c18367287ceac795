// Reading a step's input from the slots of its streams, and writing the new state back.
//
// Slot arrays are layer first, [L, slots, ...]: adjacent slots form a batch of a layer's cache, which the encoder can
// read directly if row b is slot b (`in_place`). Otherwise `gather` copies the rows into contiguous buffers. Each layer
// is an input of the encoder, so layers are padded to ALIGNMENT bytes. A row whose slot is -1 is idle: the encoder
// computes it, but nothing is written back and no token is emitted.

#define D_K (D_MODEL / HEADS)
#define RING_BYTES (HEADS * CACHE * D_K * CACHE_ITEMSIZE)  // K or V of one layer and slot
#define CONV_BYTES (D_MODEL * CONV_CACHE * CACHE_ITEMSIZE)  // convolution cache of one layer and slot
#define MEL_CACHE ((SUBSAMPLING + 1) * MELS)  // floats of mel history of a slot

static __device__ __forceinline__ long long floor_div(long long x, long long by) {
  return x >= 0 ? x / by : -((-x + by - 1) / by);
}

// Number of encoder frames of an utterance, as `Manifest.encoder_frames` and NeMo's offline forward compute it.
static __device__ __forceinline__ long long encoder_frames(long long samples) {
  long long frames = samples > 0 ? samples / HOP : 0;
  if (frames == 0) return 0;
  for (int factor = SUBSAMPLING; factor > 1; factor /= 2) frames = frames / 2 + 1;
  return frames;
}

// Byte offset of a row of `bytes` bytes in one layer of an array of `rows` rows per layer.
static __device__ __forceinline__ long long offset_of(int layer, int row, int rows, int bytes) {
  const long long layer_bytes = ((long long)rows * bytes + ALIGNMENT - 1) & -(long long)ALIGNMENT;
  return layer * layer_bytes + (long long)row * bytes;
}

// Copy memory that does not overlap, in units of 16 bytes. This thread copies every `stride`th unit from `first` on,
// first < stride; loads of four units are in flight at once.
template <int bytes, int stride>
static __device__ __forceinline__ void copy_bytes(char* __restrict__ to, const char* __restrict__ from, int first) {
  const uint4* __restrict__ source = reinterpret_cast<const uint4*>(from);
  uint4* __restrict__ target = reinterpret_cast<uint4*>(to);
  constexpr int units = bytes / 16, rounds = units / stride;
  constexpr int ahead = 4, whole = rounds / ahead * ahead;
#pragma unroll 1  // otherwise some compilers interleave loads and stores
  for (int round = 0; round < whole; round += ahead) {
    uint4 loaded[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i) loaded[i] = __ldg(source + first + (round + i) * stride);
#pragma unroll
    for (int i = 0; i < ahead; ++i) target[first + (round + i) * stride] = loaded[i];
  }
#pragma unroll
  for (int round = whole; round < rounds; ++round)
    target[first + round * stride] = __ldg(source + first + round * stride);
  if (first + rounds * stride < units) target[first + rounds * stride] = __ldg(source + first + rounds * stride);
}

// Read the step's slots, lengths, prompts and audio from the current host input buffer. Grid (rows, any), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) begin(const Step s) {
  const int row = blockIdx.x, thread = threadIdx.x;
  const char* input = s.host_input + (s.control[BUFFER] ? s.host_input_bytes : 0);
  const int slot = reinterpret_cast<const int*>(input)[row];
  const int length = reinterpret_cast<const int*>(input)[s.max_rows + row];
  if (blockIdx.y == 0 && thread == 0) {
    const long long position = slot < 0 ? 0 : s.position[slot];
    const long long received = position * HOP * SUBSAMPLING - LEAD + length;
    const long long valid = floor_div(received, HOP) - SUBSAMPLING * (position - 2);
    const long long available = encoder_frames(received) - position;
    s.row_slot[row] = slot;
    s.row_length[row] = length;
    s.row_automaton[row] = slot < 0 ? -1 : s.slot_automaton[slot];
    s.row_position[row] = position;
    s.row_prompt[row] = reinterpret_cast<const int*>(input)[2 * s.max_rows + row];  // idle rows have one too
    s.row_valid[row] = slot < 0 ? 0 : min(valid, (long long)(SUBSAMPLING + 1 + SUBSAMPLING * s.frames));
    s.row_count[row] = slot < 0 ? 0 : int(max(0ll, min(available, (long long)s.frames)));
    if (row == 0) {
      s.control[ITERATION] = s.control[TICKET] = s.control[TOKENS] = s.control[EMITTED] = 0;
      s.control[PAIRS] = s.control[PAIRS + 1] = s.control[ROWS] = s.control[ROWS + 1] = 0;
    }
  }
  if (slot < 0) return;
  const float* audio = reinterpret_cast<const float*>(input + 12 * s.max_rows) + (long long)row * s.samples;
  float* waveform = s.waveform + (long long)row * (TAIL + s.samples);
  for (int i = blockIdx.y * BLOCK + thread; i < TAIL + s.samples; i += gridDim.y * BLOCK)
    waveform[i] = i < TAIL ? s.tail[(long long)slot * TAIL + i] : audio[i - TAIL];
}

// Copy the rows' caches into contiguous buffers; only the mel cache if `in_place`. Grid (rows, L, GATHER_BLOCKS),
// block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) gather(const Step s) {
  const int row = blockIdx.x, layer = blockIdx.y, slot = s.row_slot[row];
  if (slot < 0) return;
  constexpr int stride = GATHER_BLOCKS * BLOCK;
  const int first = blockIdx.z * BLOCK + threadIdx.x;
  if (layer == 0)
    for (int i = first; i < MEL_CACHE; i += stride)
      s.row_mel_cache[(long long)row * MEL_CACHE + i] = __ldg(s.mel_cache + (long long)slot * MEL_CACHE + i);
  if (s.in_place) return;
  const long long ring_from = offset_of(layer, slot, s.slots, RING_BYTES);
  const long long ring_to = offset_of(layer, row, s.rows, RING_BYTES);
  copy_bytes<RING_BYTES, stride>(s.row_k + ring_to, s.k + ring_from, first);
  copy_bytes<RING_BYTES, stride>(s.row_v + ring_to, s.v + ring_from, first);
  const long long conv_from = offset_of(layer, slot, s.slots, CONV_BYTES);
  const long long conv_to = offset_of(layer, row, s.rows, CONV_BYTES);
  copy_bytes<CONV_BYTES, stride>(s.row_conv + conv_to, s.conv + conv_from, first);
}

// Write the new state to the slots: T rows of K and V into the rings, convolution and mel caches, audio tail,
// position. Grid (rows, L), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) scatter(const Step s) {
  const int row = blockIdx.x, layer = blockIdx.y, thread = threadIdx.x, slot = s.row_slot[row];
  if (slot < 0) return;
  const long long position = s.row_position[row], ring = offset_of(layer, slot, s.slots, RING_BYTES);
  const long long from = (long long)layer * s.rows + row;
  const int line = D_K * CACHE_ITEMSIZE, frames = s.frames;  // bytes of one frame of one head
  for (int i = thread; i < HEADS * frames * line / 16; i += BLOCK) {
    const int byte = i * 16, head = byte / (frames * line), frame = byte / line % frames, rest = byte % line;
    const long long to = ring + ((long long)head * CACHE + (position + frame) % CACHE) * line + rest;
    const long long source = from * HEADS * frames * line + byte;
    const uint4 k = __ldg(reinterpret_cast<const uint4*>(s.k_new + source));
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(s.v_new + source));
    *reinterpret_cast<uint4*>(s.k + to) = k;
    *reinterpret_cast<uint4*>(s.v + to) = v;
  }
  copy_bytes<CONV_BYTES, BLOCK>(
      s.conv + offset_of(layer, slot, s.slots, CONV_BYTES), s.conv_next + from * CONV_BYTES, thread);
  if (layer) return;
  for (int i = thread; i < MEL_CACHE; i += BLOCK)
    s.mel_cache[(long long)slot * MEL_CACHE + i] = __ldg(s.mel_cache_next + (long long)row * MEL_CACHE + i);
  for (int i = thread; i < TAIL; i += BLOCK)
    s.tail[(long long)slot * TAIL + i] = s.waveform[(long long)row * (TAIL + s.samples) + s.samples + i];
  if (thread == 0) s.position[slot] = position + frames;
}

// Reset the decoder state of a slot.
static __device__ __forceinline__ void reset_decoder_of(const Step& s, int slot) {
  const int thread = threadIdx.x;
  for (int i = thread; i < JOINT; i += BLOCK) s.predicted[(long long)slot * JOINT + i] = s.start_predicted[i];
  for (int i = thread; i < NET_LAYERS * HIDDEN; i += BLOCK) {
    s.h[(long long)slot * NET_LAYERS * HIDDEN + i] = s.start_h[i];
    s.c[(long long)slot * NET_LAYERS * HIDDEN + i] = s.start_c[i];
  }
  if (thread == 0) s.node[slot] = 0;
}

// Reset the decoder state of slot `slot`; encoder caches and position are kept. Grid 1, block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) reset_decoder(const Step s) { reset_decoder_of(s, s.slot); }

// Reset the slots in `reset_slots` to the initial state. Grid (slots to reset, L), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) reset(const Step s) {
  const int slot = s.reset_slots[blockIdx.x], layer = blockIdx.y, thread = threadIdx.x;
  const long long ring = offset_of(layer, slot, s.slots, RING_BYTES);
  const long long conv = offset_of(layer, slot, s.slots, CONV_BYTES);
  const uint4 zero = make_uint4(0, 0, 0, 0);
  // K and V are masked until written, but a masked NaN would still propagate.
  for (int i = thread; i < RING_BYTES / 16; i += BLOCK) {
    reinterpret_cast<uint4*>(s.k + ring)[i] = zero;
    reinterpret_cast<uint4*>(s.v + ring)[i] = zero;
  }
  for (int i = thread; i < CONV_BYTES / 16; i += BLOCK) reinterpret_cast<uint4*>(s.conv + conv)[i] = zero;
  if (layer) return;
  for (int i = thread; i < MEL_CACHE; i += BLOCK) s.mel_cache[(long long)slot * MEL_CACHE + i] = 0.0f;
  for (int i = thread; i < TAIL; i += BLOCK) s.tail[(long long)slot * TAIL + i] = 0.0f;
  reset_decoder_of(s, slot);
  if (thread == 0) {
    s.slot_automaton[slot] = -1;
    s.position[slot] = 0;
  }
}

static __device__ __forceinline__ void copy_row(float* array, int size, int target, int source, int first, int stride) {
  for (int i = first; i < size; i += stride)
    array[(long long)target * size + i] = __ldg(array + (long long)source * size + i);
}

// Copy the state of each slot in `sources`, with its phrases, to the slot in `targets`. No target is a source. Grid
// (slots to copy, L, GATHER_BLOCKS), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) copy(const Step s) {
  const int source = s.sources.slot[blockIdx.x], target = s.targets.slot[blockIdx.x], layer = blockIdx.y;
  constexpr int stride = GATHER_BLOCKS * BLOCK;
  const int first = blockIdx.z * BLOCK + threadIdx.x;
  const long long ring_from = offset_of(layer, source, s.slots, RING_BYTES);
  const long long ring_to = offset_of(layer, target, s.slots, RING_BYTES);
  copy_bytes<RING_BYTES, stride>(s.k + ring_to, s.k + ring_from, first);
  copy_bytes<RING_BYTES, stride>(s.v + ring_to, s.v + ring_from, first);
  const long long conv_from = offset_of(layer, source, s.slots, CONV_BYTES);
  const long long conv_to = offset_of(layer, target, s.slots, CONV_BYTES);
  copy_bytes<CONV_BYTES, stride>(s.conv + conv_to, s.conv + conv_from, first);
  if (layer) return;
  copy_row(s.mel_cache, MEL_CACHE, target, source, first, stride);
  copy_row(s.tail, TAIL, target, source, first, stride);
  copy_row(s.predicted, JOINT, target, source, first, stride);
  copy_row(s.h, NET_LAYERS * HIDDEN, target, source, first, stride);
  copy_row(s.c, NET_LAYERS * HIDDEN, target, source, first, stride);
  if (first == 0) {
    s.node[target] = s.node[source];
    s.slot_automaton[target] = s.slot_automaton[source];
    s.position[target] = s.position[source];
  }
}
