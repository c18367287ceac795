// Greedy RNNT decoding by label looping (`runtime/decoding/greedy.py` is the same in numpy; the paper is Bataev et al. 2024).
//
//   start, then while any row has frames left: join, decide, lstm of each layer, project; in the end finish.
//
// `join` meets every (row, frame still to come) pair with the row's prediction; `decide` finds each row's first pair
// that is not blank, writes the label down and lists the pairs that are left; `lstm` and `project` make the next
// prediction of the rows that got a label. Of a boosted row `join` also finds the best label but blank with the bias
// added; `decide` takes it where the plain logits do not say blank, and writes the bias of the row's next node. The lists
// are of parity ITERATION % 2: one is read while the next is made. In which order rows enter them may differ from run to
// run; what is computed of a row does not depend on it.

#define VOCAB_TILES ((VOCABULARY + TILE_COLUMNS - 1) / TILE_COLUMNS)

// Whether this is the last block of the grid to come here, which then sees what all others wrote. For thread 0 only.
static __device__ __forceinline__ bool last_block(int* ticket) {
  const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
  __threadfence();
  const bool last = atomicInc(reinterpret_cast<unsigned*>(ticket), blocks - 1) == blocks - 1;
  __threadfence();
  return last;
}

static __device__ __forceinline__ void keep_looping(const Step& s, int pairs) {
#if CONDITIONAL
  if (s.looping) cudaGraphSetConditional(s.condition, pairs > 0);
#endif
}

static __device__ __forceinline__ void list_row(const Step& s, int parity, int row, int at, int end) {
  const int first = atomicAdd(&s.control[PAIRS + parity], end - at), entry = atomicAdd(&s.control[ROWS + parity], 1);
  s.list_rows[parity * s.most_rows + entry] = row;
  s.list_first[parity * s.most_rows + entry] = first;
  for (int frame = at; frame < end; ++frame)
    s.list_pairs[(long long)parity * s.most_pairs + first + frame - at] = row * s.frames + frame;
}

// A row whose frames are not all finite fails here and now. A boosted row's bias is written. Grid (rows), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) start(const Step s) {
  __shared__ int broken;
  __shared__ Chain chain;
  const int row = blockIdx.x, thread = threadIdx.x, boost = s.row_boost[row];
  if (thread == 0) broken = 0;
  __syncthreads();
  const float* encoded = s.encoded + (long long)row * s.frames * JOINT;
  if (s.row_slot[row] >= 0)
    for (int i = thread; i < s.frames * JOINT; i += BLOCK)
      if (!isfinite(encoded[i])) broken = 1;
  if (boost >= 0 && thread < 32)
    write_bias(automaton(s, boost), s.bias + (long long)row * BLANK, s.node[s.row_slot[row]], chain);
  __syncthreads();
  if (thread) return;
  const int end = broken ? 0 : s.row_count[row];
  s.row_failed[row] = broken;
  s.row_at[row] = 0;
  s.row_end[row] = end;
  s.row_last[row] = -1;
  s.row_symbols[row] = 0;
  if (end > 0) list_row(s, 0, row, 0, end);
  if (last_block(&s.control[TICKET])) keep_looping(s, s.control[PAIRS]);
}

static __device__ __forceinline__ float activate(float x) {
#if ACTIVATION == 0
  return x < 0.0f ? 0.0f : x;  // NaN stays NaN
#elif ACTIVATION == 1
  return 1.0f / (1.0f + expf(-x));
#else
  return tanhf(x);
#endif
}

// The largest of a warp's values, and of equal ones the lowest id: in every lane.
static __device__ __forceinline__ void largest(float& best, int& id) {
  for (int mask = 16; mask; mask /= 2) {
    const float other = __shfl_xor_sync(~0u, best, mask);
    const int other_id = __shfl_xor_sync(~0u, id, mask);
    if (other > best || (other == best && other_id < id)) {
      best = other;
      id = other_id;
    }
  }
}

static __device__ __forceinline__ float total(float sum) {
  for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  return sum;
}

// Of each listed pair and each tile of 32 logits: the largest, its id, the sum of exponentials about it, and the same of
// ALPHA times the logits. A tile with a NaN reports infinity, which no finite row has. Of a boosted row's also the largest
// but blank's with the bias added, its id, and its plain logit. Grid (any, VOCAB_TILES), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) join(const Step s) {
  __shared__ Tile tile;
  const int parity = s.control[ITERATION] % 2, pairs = s.control[PAIRS + parity], column = blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, id = column * TILE_COLUMNS + lane;
  const int* list = s.list_pairs + (long long)parity * s.most_pairs;
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0)
    s.control[PAIRS + 1 - parity] = s.control[ROWS + 1 - parity] = s.control[EMITTED] = 0;
  for (int first = blockIdx.x * TILE_ROWS; first < pairs; first += gridDim.x * TILE_ROWS) {
    product(tile, s.joint_weight, column, JOINT, [&](int row, int k) {
      if (first + row >= pairs) return 0.0f;
      const int pair = list[first + row], slot = s.row_slot[pair / s.frames];
      return activate(s.encoded[(long long)pair * JOINT + k] + s.predicted[(long long)slot * JOINT + k]);
    });
    for (int row = warp; row < TILE_ROWS; row += WARPS) {
      const float negative = -__uint_as_float(0x7f800000u);
      const float logit = id < VOCABULARY ? tile.sums[0][row][lane] + s.joint_bias[id] : negative;
      const int broken = __any_sync(~0u, isnan(logit));
      float best = isnan(logit) ? negative : logit;
      int best_id = id;
      largest(best, best_id);
      const float sum = total(logit > negative ? expf(logit - best) : 0.0f);
      const float power = total(logit > negative ? expf(ALPHA * (logit - best)) : 0.0f);
      if (first + row >= pairs) continue;
      const long long at = (long long)(first + row) * VOCAB_TILES + column;
      if (lane == 0)
        s.partial[at] = make_float4(broken ? -negative : best, __int_as_float(best_id), sum, power);
      const int of = list[first + row] / s.frames;
      if (s.row_boost[of] < 0) continue;
      best = id < BLANK && !isnan(logit) ? logit + s.bias[(long long)of * BLANK + id] : negative;
      best_id = id;
      largest(best, best_id);
      const float plain = __shfl_sync(~0u, logit, best_id % TILE_COLUMNS);
      if (lane == 0) s.boosted[at] = make_float4(best, __int_as_float(best_id), plain, 0.0f);
    }
  }
}

// The largest of a pair's tiles and its id, in every lane.
static __device__ __forceinline__ void largest_tile(const float4* tiles, float& best, int& id) {
  best = -__uint_as_float(0x7f800000u);
  id = VOCABULARY;
  for (int i = threadIdx.x % 32; i < VOCAB_TILES; i += 32)
    if (tiles[i].x > best || id == VOCABULARY) {
      best = tiles[i].x;
      id = __float_as_int(tiles[i].y);
    }
  largest(best, id);
}

// One warp a row. Grid (any), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) decide(const Step s) {
  __shared__ Chain chains[WARPS];
  const int parity = s.control[ITERATION] % 2, rows = s.control[ROWS + parity];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int entry = blockIdx.x * WARPS + warp; entry < rows; entry += gridDim.x * WARPS) {
    const int row = s.list_rows[parity * s.most_rows + entry], first = s.list_first[parity * s.most_rows + entry];
    const int end = s.row_end[row], at = s.row_at[row], boost = s.row_boost[row];
    int frame = at, id = BLANK, node = 0;
    float best = 0.0f, sum = 0.0f, power = 0.0f, below = 0.0f;
    for (; frame < end; ++frame) {
      largest_tile(s.partial + (long long)(first + frame - at) * VOCAB_TILES, best, id);
      if (!isfinite(best) || id != BLANK) break;
    }
    if (frame < end && isfinite(best)) {
      const float4* partial = s.partial + (long long)(first + frame - at) * VOCAB_TILES;
      for (int i = lane; i < VOCAB_TILES; i += 32) {
        sum += partial[i].z * expf(partial[i].x - best);
        power += partial[i].w * expf(ALPHA * (partial[i].x - best));
      }
      sum = total(sum);
      power = total(power);
      if (boost >= 0) {
        const float4* boosted = s.boosted + (long long)(first + frame - at) * VOCAB_TILES;
        float raised;
        largest_tile(boosted, raised, id);
        below = boosted[id / TILE_COLUMNS].z - best;
        const Automaton a = automaton(s, boost);
        node = after(a, s.node[s.row_slot[row]], id);
        write_bias(a, s.bias + (long long)row * BLANK, node, chains[warp]);
      }
    }
    if (lane) continue;
    if (frame == end) {
      s.row_at[row] = end;
    } else if (!isfinite(best)) {
      s.row_failed[row] = 1;
      s.row_at[row] = s.row_end[row] = 0;
    } else {
      const int symbols = s.row_last[row] == frame ? s.row_symbols[row] + 1 : 1;
      const int next = symbols >= MAX_SYMBOLS ? frame + 1 : frame;
      const float score = -logf(sum);
      Record& record = s.records[atomicAdd(&s.control[RECORDS], 1)];
      record.row = row;
      record.token = id;
      record.frame = int(s.row_position[row]) + frame;
      record.score = below + score;
      record.power = power * expf(ALPHA * score);
      if (boost >= 0) s.node[s.row_slot[row]] = node;
      s.row_last[row] = frame;
      s.row_symbols[row] = symbols;
      s.row_at[row] = next;
      s.row_label[row] = id;
      s.emitted[atomicAdd(&s.control[EMITTED], 1)] = row;
      if (next < end) list_row(s, 1 - parity, row, next, end);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && last_block(&s.control[TICKET])) {
    ++s.control[ITERATION];
    keep_looping(s, s.control[PAIRS + 1 - parity]);
  }
}

static __device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// One LSTM layer for the rows that got a label; a column tile holds the four gates of eight units. `h` is read here and
// in other blocks, so the new one goes to `h_next` until `project`. Grid (any, HIDDEN / 8), block BLOCK.
static __device__ __forceinline__ void lstm(const Step& s, int layer) {
  __shared__ Tile tile;
  const int emitted = s.control[EMITTED], column = blockIdx.y, thread = threadIdx.x;
  const unsigned* weight = s.lstm_weight + layer * s.lstm_words;
  for (int first = blockIdx.x * TILE_ROWS; first < emitted; first += gridDim.x * TILE_ROWS) {
    product(tile, weight, column, 2 * HIDDEN, [&](int entry, int k) {
      if (first + entry >= emitted) return 0.0f;
      const int row = s.emitted[first + entry];
      if (k >= HIDDEN) return s.h[((long long)s.row_slot[row] * NET_LAYERS + layer) * HIDDEN + k - HIDDEN];
      if (layer) return s.h_next[((long long)row * NET_LAYERS + layer - 1) * HIDDEN + k];
      return s.embedding[(long long)s.row_label[row] * HIDDEN + k];
    });
    const int entry = thread / 8, unit = thread % 8, at = column * 8 + unit;
    if (entry < TILE_ROWS && first + entry < emitted) {
      const int row = s.emitted[first + entry];
      float gates[4];
      for (int gate = 0; gate < 4; ++gate)
        gates[gate] = tile.sums[0][entry][8 * gate + unit] + s.lstm_bias[(layer * 4 + gate) * HIDDEN + at];
      float* cell = s.c + ((long long)s.row_slot[row] * NET_LAYERS + layer) * HIDDEN + at;
      const float kept = sigmoid(gates[1]) * *cell + sigmoid(gates[0]) * tanhf(gates[2]);
      *cell = kept;
      s.h_next[((long long)row * NET_LAYERS + layer) * HIDDEN + at] = sigmoid(gates[3]) * tanhf(kept);
    }
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK) lstm_0(const Step s) { lstm(s, 0); }
#if NET_LAYERS > 1
extern "C" __global__ void __launch_bounds__(BLOCK) lstm_1(const Step s) { lstm(s, 1); }
#endif
#if NET_LAYERS > 2
#error "decoding on a GPU knows prediction nets of one or two layers"
#endif

// The prediction as the joint wants it, and `h` at last. Grid (any, tiles of JOINT), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) project(const Step s) {
  __shared__ Tile tile;
  const int emitted = s.control[EMITTED], thread = threadIdx.x, lane = thread % 32;
  for (int first = blockIdx.x * TILE_ROWS; first < emitted; first += gridDim.x * TILE_ROWS) {
    product(tile, s.project_weight, blockIdx.y, HIDDEN, [&](int entry, int k) {
      if (first + entry >= emitted) return 0.0f;
      return s.h_next[((long long)s.emitted[first + entry] * NET_LAYERS + NET_LAYERS - 1) * HIDDEN + k];
    });
    const int column = blockIdx.y * TILE_COLUMNS + lane;
    for (int entry = thread / 32; entry < TILE_ROWS && first + entry < emitted; entry += WARPS) {
      const int row = s.emitted[first + entry], slot = s.row_slot[row];
      if (column < JOINT)
        s.predicted[(long long)slot * JOINT + column] = tile.sums[0][entry][lane] + s.project_bias[column];
      for (int i = column; i < NET_LAYERS * HIDDEN; i += gridDim.y * TILE_COLUMNS)
        s.h[(long long)slot * NET_LAYERS * HIDDEN + i] = s.h_next[(long long)row * NET_LAYERS * HIDDEN + i];
    }
  }
}

// What was said goes to the host's memory: how many records, how many pairs are undecided (none, but where the loop is
// unrolled), which rows failed, the records. A step that is over hands the lane on. Grid (any), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) finish(const Step s) {
  int* out = reinterpret_cast<int*>(s.host_out + (s.control[LANE] ? s.host_out_bytes : 0));
  const int records = s.control[RECORDS], undecided = s.control[PAIRS + s.control[ITERATION] % 2];
  for (int i = blockIdx.x * BLOCK + threadIdx.x; i < s.rows; i += gridDim.x * BLOCK) out[4 + i] = s.row_failed[i];
  int* said = out + 4 + s.most_rows;
  const int *from = reinterpret_cast<const int*>(s.records), words = records * int(sizeof(Record) / sizeof(int));
  for (int i = blockIdx.x * BLOCK + threadIdx.x; i < words; i += gridDim.x * BLOCK) said[i] = from[i];
  __syncthreads();
  if (threadIdx.x == 0 && last_block(&s.control[TICKET])) {
    out[0] = records;
    out[1] = undecided;
    if (!undecided) s.control[LANE] = 1 - s.control[LANE];
  }
}
