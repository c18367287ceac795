// Greedy RNNT decoding by label looping (Bataev et al. 2024); `runtime/decoding/greedy.py` is the same in numpy.
//
//   start; while any row has frames left: join, decide, lstm of each layer, project; then finish.
//
// `join` computes the joint network for every remaining (row, frame) pair with the row's prediction. `decide` finds
// each row's first pair that is not blank, emits its label, and lists the remaining pairs. `lstm` and `project`
// compute the next prediction of the rows that emitted a label. For a row with phrases, `join` also finds the best
// non-blank label of the biased logits; `decide` emits it where the plain logits are not blank, and writes the bias
// of the row's next node. There are two lists, selected by ITERATION % 2: one is read while the other is written. The
// order of rows in a list may differ between runs; the result of each row does not depend on it.

#define VOCAB_TILES ((VOCABULARY + TILE_COLUMNS - 1) / TILE_COLUMNS)

// Return whether this is the last block of the grid to call it; that block sees the writes of all others. Call from
// thread 0 only.
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

// Append the frames `begin` to `end` of a row to the list of the given parity.
static __device__ __forceinline__ void list_row(const Step& s, int parity, int row, int begin, int end) {
  const int first = atomicAdd(&s.control[PAIRS + parity], end - begin), entry = atomicAdd(&s.control[ROWS + parity], 1);
  s.list_rows[parity * s.max_rows + entry] = row;
  s.list_first[parity * s.max_rows + entry] = first;
  for (int frame = begin; frame < end; ++frame)
    s.list_pairs[(long long)parity * s.max_pairs + first + frame - begin] = row * s.frames + frame;
}

// Initialise decoding. A row with a frame that is not finite fails. Writes the bias of rows with phrases. Grid
// (rows), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) start(const Step s) {
  __shared__ int broken;
  __shared__ Chain chain;
  const int row = blockIdx.x, thread = threadIdx.x, phrases = s.row_automaton[row];
  if (thread == 0) broken = 0;
  __syncthreads();
  if (s.row_slot[row] >= 0) {
    const float* encoded = s.encoded + (long long)row * s.frames * JOINT;
    bool finite = true;
    for (int i = thread; i < s.frames * JOINT; i += BLOCK) finite &= isfinite(__ldg(encoded + i));
    if (!finite) broken = 1;
  }
  if (phrases >= 0 && thread < 32)
    write_bias(automaton(s, phrases), s.bias + (long long)row * BLANK, s.node[s.row_slot[row]], chain);
  __syncthreads();
  if (thread) return;
  const int end = broken ? 0 : s.row_count[row];
  s.row_failed[row] = broken;
  s.row_frame[row] = 0;
  s.row_end[row] = end;
  s.row_label_frame[row] = -1;
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

// Reduce to the largest value of the warp, the lowest id among equal values, in every lane.
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

// For each listed pair and each tile of 32 logits, write the largest logit, its id, the sum of exponentials relative
// to it, and the same sum for ALPHA times the logits. A tile with a NaN writes infinity as its largest. For rows with
// phrases, also write the largest biased logit except blank's, its id, and its plain logit. Grid (any, VOCAB_TILES),
// block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK, TILE_BLOCKS) join(const Step s) {
  __shared__ Tile tile;
  const int parity = s.control[ITERATION] % 2, pairs = s.control[PAIRS + parity], column = blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, id = column * TILE_COLUMNS + lane;
  const int* list = s.list_pairs + (long long)parity * s.max_pairs;
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0)
    s.control[PAIRS + 1 - parity] = s.control[ROWS + 1 - parity] = s.control[EMITTED] = 0;
  for (int first = blockIdx.x * TILE_ROWS; first < pairs; first += gridDim.x * TILE_ROWS) {
    product<JOINT>(tile, s.joint_weight, column, pairs - first, [&](int row) {
      const int pair = list[first + row], slot = s.row_slot[pair / s.frames];
      const float* encoded = s.encoded + (long long)pair * JOINT;
      const float* predicted = s.predicted + (long long)slot * JOINT;
      return [encoded, predicted](long long k) {
        const float4 x = load4<JOINT>(encoded, k), y = load4<JOINT>(predicted, k);
        return make_float4(activate(x.x + y.x), activate(x.y + y.y), activate(x.z + y.z), activate(x.w + y.w));
      };
    });
    for (int row = warp; row < TILE_ROWS; row += WARPS) {
      const float negative = -__uint_as_float(0x7f800000u);
      const float logit = id < VOCABULARY ? tile.sums[0][row][lane] + s.joint_bias[id] : negative;
      const int broken = __any_sync(~0u, isnan(logit));
      float best = isnan(logit) ? negative : logit;
      int best_id = id;
      largest(best, best_id);
      const float sum = total(logit > negative ? expf(logit - best) : 0.0f);
      const float sum_alpha = total(logit > negative ? expf(ALPHA * (logit - best)) : 0.0f);
      if (first + row >= pairs) continue;
      const long long index = (long long)(first + row) * VOCAB_TILES + column;
      if (lane == 0)
        s.partial[index] = make_float4(broken ? -negative : best, __int_as_float(best_id), sum, sum_alpha);
      const int batch_row = list[first + row] / s.frames;
      if (s.row_automaton[batch_row] < 0) continue;
      best = id < BLANK && !isnan(logit) ? logit + s.bias[(long long)batch_row * BLANK + id] : negative;
      best_id = id;
      largest(best, best_id);
      const float plain = __shfl_sync(~0u, logit, best_id % TILE_COLUMNS);
      if (lane == 0) s.boosted[index] = make_float4(best, __int_as_float(best_id), plain, 0.0f);
    }
  }
}

// Find the largest logit over a pair's tiles and its id, in every lane.
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

// Emit the next label of each listed row, or finish the row. One warp per row. Grid (any), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) decide(const Step s) {
  __shared__ Chain chains[WARPS];
  const int parity = s.control[ITERATION] % 2, rows = s.control[ROWS + parity];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int entry = blockIdx.x * WARPS + warp; entry < rows; entry += gridDim.x * WARPS) {
    const int row = s.list_rows[parity * s.max_rows + entry], first = s.list_first[parity * s.max_rows + entry];
    const int end = s.row_end[row], begin = s.row_frame[row], phrases = s.row_automaton[row];
    int frame = begin, id = BLANK, node = 0;
    float best = 0.0f, sum = 0.0f, sum_alpha = 0.0f, below = 0.0f;
    for (; frame < end; ++frame) {
      largest_tile(s.partial + (long long)(first + frame - begin) * VOCAB_TILES, best, id);
      if (!isfinite(best) || id != BLANK) break;
    }
    if (frame < end && isfinite(best)) {
      const float4* partial = s.partial + (long long)(first + frame - begin) * VOCAB_TILES;
      for (int i = lane; i < VOCAB_TILES; i += 32) {
        sum += partial[i].z * expf(partial[i].x - best);
        sum_alpha += partial[i].w * expf(ALPHA * (partial[i].x - best));
      }
      sum = total(sum);
      sum_alpha = total(sum_alpha);
      if (phrases >= 0) {
        const float4* boosted = s.boosted + (long long)(first + frame - begin) * VOCAB_TILES;
        float biased;
        largest_tile(boosted, biased, id);
        below = boosted[id / TILE_COLUMNS].z - best;
        const Automaton a = automaton(s, phrases);
        node = after(a, s.node[s.row_slot[row]], id);
        write_bias(a, s.bias + (long long)row * BLANK, node, chains[warp]);
      }
    }
    if (lane) continue;
    if (frame == end) {
      s.row_frame[row] = end;
    } else if (!isfinite(best)) {
      s.row_failed[row] = 1;
      s.row_frame[row] = s.row_end[row] = 0;
    } else {
      const int symbols = s.row_label_frame[row] == frame ? s.row_symbols[row] + 1 : 1;
      const int next = symbols >= MAX_SYMBOLS ? frame + 1 : frame;
      const float score = -logf(sum);
      EmittedToken& token = s.tokens[atomicAdd(&s.control[TOKENS], 1)];
      token.row = row;
      token.token = id;
      token.frame = int(s.row_position[row]) + frame;
      token.score = below + score;
      token.sum_p_alpha = sum_alpha * expf(ALPHA * score);
      if (phrases >= 0) s.node[s.row_slot[row]] = node;
      s.row_label_frame[row] = frame;
      s.row_symbols[row] = symbols;
      s.row_frame[row] = next;
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

// One LSTM layer for the rows that emitted a label. A column tile holds the four gates of eight units. Other blocks
// read `h` too, so the new state is written to `h_next`, which `project` copies. In the last iteration of a step there
// are usually no such rows, and every block exits after one load. Grid (any, HIDDEN / 8), block BLOCK.
static __device__ __forceinline__ void lstm(const Step& s, int layer) {
  __shared__ Tile tile;
  const int emitted = s.control[EMITTED], column = blockIdx.y, thread = threadIdx.x;
  const unsigned* weight = s.lstm_weight + layer * s.lstm_words;
  for (int first = blockIdx.x * TILE_ROWS; first < emitted; first += gridDim.x * TILE_ROWS) {
    product<2 * HIDDEN>(tile, weight, column, emitted - first, [&](int entry) {
      const int row = s.emitted[first + entry];
      const float* input = layer ? s.h_next + ((long long)row * NET_LAYERS + layer - 1) * HIDDEN
                                 : s.embedding + (long long)s.row_label[row] * HIDDEN;
      const float* h = s.h + ((long long)s.row_slot[row] * NET_LAYERS + layer) * HIDDEN;
      return [input, h](long long k) { return k < HIDDEN ? load4<HIDDEN>(input, k) : load4<HIDDEN>(h, k - HIDDEN); };
    });
    const int entry = thread / 8, unit = thread % 8, index = column * 8 + unit;
    if (entry < TILE_ROWS && first + entry < emitted) {
      const int row = s.emitted[first + entry];
      float gates[4];
      for (int gate = 0; gate < 4; ++gate)
        gates[gate] = tile.sums[0][entry][8 * gate + unit] + s.lstm_bias[(layer * 4 + gate) * HIDDEN + index];
      float* cell = s.c + ((long long)s.row_slot[row] * NET_LAYERS + layer) * HIDDEN + index;
      const float next = sigmoid(gates[1]) * *cell + sigmoid(gates[0]) * tanhf(gates[2]);
      *cell = next;
      s.h_next[((long long)row * NET_LAYERS + layer) * HIDDEN + index] = sigmoid(gates[3]) * tanhf(next);
    }
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK, TILE_BLOCKS) lstm_0(const Step s) { lstm(s, 0); }
#if NET_LAYERS > 1
extern "C" __global__ void __launch_bounds__(BLOCK, TILE_BLOCKS) lstm_1(const Step s) { lstm(s, 1); }
#endif
#if NET_LAYERS > 2
#error "prediction networks have one or two layers"
#endif

// Project the prediction to the joint size and update `h`, for the rows that emitted a label. Grid (any, tiles of
// JOINT), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK, TILE_BLOCKS) project(const Step s) {
  __shared__ Tile tile;
  const int emitted = s.control[EMITTED], thread = threadIdx.x, lane = thread % 32;
  for (int first = blockIdx.x * TILE_ROWS; first < emitted; first += gridDim.x * TILE_ROWS) {
    product<HIDDEN>(tile, s.project_weight, blockIdx.y, emitted - first, [&](int entry) {
      const int row = s.emitted[first + entry];
      const float* h = s.h_next + ((long long)row * NET_LAYERS + NET_LAYERS - 1) * HIDDEN;
      return [h](long long k) { return load4<HIDDEN>(h, k); };
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

// Write the results to the current host output buffer: the number of tokens, the number of undecided pairs (not 0
// only if the loop is unrolled), which rows failed, and the tokens. If the step is complete, switch to the other
// buffers. Grid (any), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) finish(const Step s) {
  int* out = reinterpret_cast<int*>(s.host_output + (s.control[BUFFER] ? s.host_output_bytes : 0));
  const int count = s.control[TOKENS], undecided = s.control[PAIRS + s.control[ITERATION] % 2];
  for (int i = blockIdx.x * BLOCK + threadIdx.x; i < s.rows; i += gridDim.x * BLOCK) out[4 + i] = s.row_failed[i];
  int* tokens = out + 4 + s.max_rows;
  const int *from = reinterpret_cast<const int*>(s.tokens), words = count * int(sizeof(EmittedToken) / sizeof(int));
  for (int i = blockIdx.x * BLOCK + threadIdx.x; i < words; i += gridDim.x * BLOCK) tokens[i] = from[i];
  __syncthreads();
  if (threadIdx.x == 0 && last_block(&s.control[TICKET])) {
    out[0] = count;
    out[1] = undecided;
    if (!undecided) s.control[BUFFER] = 1 - s.control[BUFFER];
  }
}
