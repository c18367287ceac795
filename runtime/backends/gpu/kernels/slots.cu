// What a step reads of its streams' slots and leaves in them.
//
// The arena is layer first, then slot: [L, slots, ...], so neighbouring slots are one batch of a layer's cache and the
// encoder can read them where they lie (`in_place`: row b is slot b). Otherwise `gather` copies the rows together.
// A row whose slot is -1 is idle: it is computed with, never written back, and says nothing.

#define D_K (D_MODEL / HEADS)
#define RING_BYTES (HEADS * CACHE * D_K * CELL)       // K or V of one layer and slot
#define CONV_BYTES (D_MODEL * CONV_CACHE * CELL)      // convolution cache of one layer and slot
#define MEL_CACHE ((SUBSAMPLING + 1) * MELS)          // floats of mel history of a slot

static __device__ __forceinline__ long long floor_div(long long x, long long by) {
  return x >= 0 ? x / by : -((-x + by - 1) / by);
}

// `Manifest.encoder_frames`: what NeMo's offline forward makes of so many samples.
static __device__ __forceinline__ long long encoder_frames(long long samples) {
  long long frames = samples > 0 ? samples / HOP : 0;
  if (frames == 0) return 0;
  for (int factor = SUBSAMPLING; factor > 1; factor /= 2) frames = frames / 2 + 1;
  return frames;
}

static __device__ __forceinline__ void copy_bytes(char* to, const char* from, int bytes, int first, int stride) {
  for (int i = first; i < bytes / 16; i += stride)
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
}

// The step's input comes from the host's memory: slots, lengths, audio of its lane. Grid (rows, any), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) begin(const Step s) {
  const int row = blockIdx.x, thread = threadIdx.x;
  const char* lane = s.host_in + (s.control[LANE] ? s.host_in_bytes : 0);
  const int slot = reinterpret_cast<const int*>(lane)[row];
  const int length = reinterpret_cast<const int*>(lane)[s.most_rows + row];
  if (blockIdx.y == 0 && thread == 0) {
    const long long position = slot < 0 ? 0 : s.position[slot];
    const long long heard = position * HOP * SUBSAMPLING - LEAD + length;
    const long long valid = floor_div(heard, HOP) - SUBSAMPLING * (position - 2);
    const long long more = encoder_frames(heard) - position;
    s.row_slot[row] = slot;
    s.row_length[row] = length;
    s.row_boost[row] = slot < 0 ? -1 : s.boost_at[slot];
    s.row_position[row] = position;
    s.row_valid[row] = slot < 0 ? 0 : min(valid, (long long)(SUBSAMPLING + 1 + SUBSAMPLING * s.frames));
    s.row_count[row] = slot < 0 ? 0 : int(max(0ll, min(more, (long long)s.frames)));
    if (row == 0) {
      s.control[ITERATION] = s.control[TICKET] = s.control[RECORDS] = s.control[EMITTED] = 0;
      s.control[PAIRS] = s.control[PAIRS + 1] = s.control[ROWS] = s.control[ROWS + 1] = 0;
    }
  }
  if (slot < 0) return;
  const float* audio = reinterpret_cast<const float*>(lane + 8 * s.most_rows) + (long long)row * s.samples;
  float* wave = s.wave + (long long)row * (TAIL + s.samples);
  for (int i = blockIdx.y * BLOCK + thread; i < TAIL + s.samples; i += gridDim.y * BLOCK)
    wave[i] = i < TAIL ? s.tail[(long long)slot * TAIL + i] : audio[i - TAIL];
}

// Grid (rows, L, PIECES), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) gather(const Step s) {
  const int row = blockIdx.x, layer = blockIdx.y, slot = s.row_slot[row];
  if (slot < 0) return;
  const int first = blockIdx.z * BLOCK + threadIdx.x, stride = PIECES * BLOCK;
  if (layer == 0)
    for (int i = first; i < MEL_CACHE; i += stride)
      s.row_mel_cache[(long long)row * MEL_CACHE + i] = s.mel_cache[(long long)slot * MEL_CACHE + i];
  if (s.in_place) return;
  const long long from = layer * s.slots + slot, to = (long long)layer * s.rows + row;
  copy_bytes(s.row_k + to * RING_BYTES, s.k + from * RING_BYTES, RING_BYTES, first, stride);
  copy_bytes(s.row_v + to * RING_BYTES, s.v + from * RING_BYTES, RING_BYTES, first, stride);
  copy_bytes(s.row_conv + to * CONV_BYTES, s.conv + from * CONV_BYTES, CONV_BYTES, first, stride);
}

// Grid (rows, L), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) scatter(const Step s) {
  const int row = blockIdx.x, layer = blockIdx.y, thread = threadIdx.x, slot = s.row_slot[row];
  if (slot < 0) return;
  const long long position = s.row_position[row], at = layer * s.slots + slot, from = (long long)layer * s.rows + row;
  const int line = D_K * CELL, frames = s.frames;  // bytes of one frame of one head
  for (int i = thread; i < HEADS * frames * line / 16; i += BLOCK) {
    const int byte = i * 16, head = byte / (frames * line), frame = byte / line % frames, rest = byte % line;
    const long long to = at * RING_BYTES + ((long long)head * CACHE + (position + frame) % CACHE) * line + rest;
    const long long source = from * HEADS * frames * line + byte;
    *reinterpret_cast<uint4*>(s.k + to) = *reinterpret_cast<const uint4*>(s.k_new + source);
    *reinterpret_cast<uint4*>(s.v + to) = *reinterpret_cast<const uint4*>(s.v_new + source);
  }
  copy_bytes(s.conv + at * CONV_BYTES, s.conv_next + from * CONV_BYTES, CONV_BYTES, thread, BLOCK);
  if (layer) return;
  for (int i = thread; i < MEL_CACHE; i += BLOCK)
    s.mel_cache[(long long)slot * MEL_CACHE + i] = s.mel_cache_next[(long long)row * MEL_CACHE + i];
  for (int i = thread; i < TAIL; i += BLOCK)
    s.tail[(long long)slot * TAIL + i] = s.wave[(long long)row * (TAIL + s.samples) + s.samples + i];
  if (thread == 0) s.position[slot] = position + frames;
}

// The decoder of a slot begins anew.
static __device__ __forceinline__ void forget_slot(const Step& s, int slot) {
  const int thread = threadIdx.x;
  for (int i = thread; i < JOINT; i += BLOCK) s.predicted[(long long)slot * JOINT + i] = s.start_predicted[i];
  for (int i = thread; i < NET_LAYERS * HIDDEN; i += BLOCK) {
    s.h[(long long)slot * NET_LAYERS * HIDDEN + i] = s.start_h[i];
    s.c[(long long)slot * NET_LAYERS * HIDDEN + i] = s.start_c[i];
  }
  if (thread == 0) s.node[slot] = 0;
}

// Slot `slot` has heard what it has heard, and said nothing. Grid 1, block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) forget(const Step s) { forget_slot(s, s.slot); }

// Slots `reset_slots` become those of streams that have heard nothing. Grid (slots to reset, L), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) reset(const Step s) {
  const int slot = s.reset_slots[blockIdx.x], layer = blockIdx.y, thread = threadIdx.x;
  const long long at = layer * s.slots + slot;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  // K and V are masked until written, but a masked NaN would still spread.
  for (int i = thread; i < RING_BYTES / 16; i += BLOCK) {
    reinterpret_cast<uint4*>(s.k + at * RING_BYTES)[i] = zero;
    reinterpret_cast<uint4*>(s.v + at * RING_BYTES)[i] = zero;
  }
  for (int i = thread; i < CONV_BYTES / 16; i += BLOCK) reinterpret_cast<uint4*>(s.conv + at * CONV_BYTES)[i] = zero;
  if (layer) return;
  for (int i = thread; i < MEL_CACHE; i += BLOCK) s.mel_cache[(long long)slot * MEL_CACHE + i] = 0.0f;
  for (int i = thread; i < TAIL; i += BLOCK) s.tail[(long long)slot * TAIL + i] = 0.0f;
  forget_slot(s, slot);
  if (thread == 0) {
    s.boost_at[slot] = -1;
    s.position[slot] = 0;
  }
}
