// Attention of T new frames over the K/V ring and over themselves, which replaces the attention nodes of a layer
// (`engine/attention.py`). A translation unit of its own: it becomes part of a TensorRT engine.
//
// The rings are those of all slots; `row_slot` is the slot of each row, so the rows need not be gathered. Ring row r
// holds the frame of age (position - 1 - r) mod C + 1: 1 for the newest, C for the oldest. The position score of query
// i and a frame of distance d (i + age for ring rows, i - t for new frame t) is that of row C + T - 1 - d of
// `positions`. Products, softmax and sums are fp32 whatever the type of the tensors. A block computes all T queries of
// a row and head, in an order that depends neither on other rows nor on the number of rows.
//
// Macros: FRAMES (T), CACHE (C), HEADS, D_K, TILE (rows staged at once: 32, 64 or 128), BLOCK (threads), CELL_TYPE
// (type of the tensors: 0 fp32, 1 fp16, 2 bf16).

#define D_MODEL (HEADS * D_K)
#define KEYS (CACHE + FRAMES)
#define DISTANCES (CACHE + 2 * FRAMES - 1)
#define MASKED -10000.0f  // as in the ONNX graph: exp(-10000) is 0 in fp32

#if CELL_TYPE == 0
typedef float cell;
#else
typedef unsigned short cell;
#endif

#define VECTOR (16 / (int)sizeof(cell))  // elements of a 16-byte load
#define CHUNKS (D_K / VECTOR)            // loads of a row of one head
#define WARPS (BLOCK / 32)

// Staged rows are an odd number of 16-byte units apart, so that a warp which reads the same chunk of 32 rows has no
// bank conflicts.
typedef uint4 Rows[TILE][CHUNKS | 1];

static __device__ __forceinline__ float to_float(unsigned bits) {  // of a 16-bit cell
#if CELL_TYPE == 2
  return __uint_as_float(bits << 16);
#elif defined(CUDA_ON_CPU)
  return simt_half_to_float((unsigned short)bits);
#else
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((unsigned short)bits));
  return x;
#endif
}

static __device__ __forceinline__ unsigned to_cell(float x) {  // rounds to nearest even
#ifdef CUDA_ON_CPU
  return CELL_TYPE == 2 ? simt_float_to_bfloat(x) : simt_float_to_half(x);
#else
  unsigned short bits;
#if CELL_TYPE == 2
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#endif
  return bits;
#endif
}

static __device__ __forceinline__ void unpack(uint4 word, float (&x)[VECTOR]) {
  const unsigned words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if CELL_TYPE == 0
    x[i] = __uint_as_float(words[i]);
#else
    x[2 * i] = to_float(words[i] & 0xffff);
    x[2 * i + 1] = to_float(words[i] >> 16);
#endif
  }
}

static __device__ __forceinline__ uint4 pack(const float (&x)[VECTOR]) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if CELL_TYPE == 0
    words[i] = __float_as_uint(x[i]);
#else
    words[i] = to_cell(x[2 * i]) | to_cell(x[2 * i + 1]) << 16;
#endif
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

static __device__ __forceinline__ const uint4* chunks(const cell* row) { return reinterpret_cast<const uint4*>(row); }

// Copy `count` rows to shared memory; `row(r)` is the address of row r. Must be called by every thread of the block.
template <class Row>
static __device__ __forceinline__ void stage(Rows& rows, int count, Row row) {
  __syncthreads();  // the previous rows have been read
  for (int i = threadIdx.x; i < count * CHUNKS; i += BLOCK)
    rows[i / CHUNKS][i % CHUNKS] = chunks(row(i / CHUNKS))[i % CHUNKS];
  __syncthreads();
}

// Pass the product of every query with each of `count` rows to `store(query, row, product)`.
template <class Row, class Store>
static __device__ __forceinline__ void multiply(
    Rows& rows, const float4 (&query)[FRAMES][D_K / 4], int count, Row row, Store store) {
  constexpr int kGroups = BLOCK / TILE, kQueries = (FRAMES + kGroups - 1) / kGroups;  // queries per thread
  const int own = threadIdx.x % TILE, group = threadIdx.x / TILE;
  for (int start = 0; start < count; start += TILE) {
    const int staged = min(TILE, count - start);
    stage(rows, staged, [&](int r) { return row(start + r); });
    if (own >= staged) continue;
    float sum[kQueries] = {};
#pragma unroll 2
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      float x[VECTOR];
      unpack(rows[own][chunk], x);
#pragma unroll
      for (int n = 0; n < kQueries; ++n) {
        const int i = min(group + n * kGroups, FRAMES - 1);  // computed twice rather than in a branch
#pragma unroll
        for (int part = 0; part < VECTOR / 4; ++part) {
          const float4 q = query[i][chunk * (VECTOR / 4) + part];
          sum[n] += q.x * x[4 * part];
          sum[n] += q.y * x[4 * part + 1];
          sum[n] += q.z * x[4 * part + 2];
          sum[n] += q.w * x[4 * part + 3];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kQueries; ++n)
      if (group + n * kGroups < FRAMES) store(group + n * kGroups, start + own, sum[n]);
  }
}

// Three blocks per multiprocessor: for more of them the compiler spills registers on sm_90.
//
// Grid (B, heads), block BLOCK. `qkv` [B, T, 3 D] has the queries, keys and values of the new frames, without position
// biases; the queries are scaled. Every tensor is 16-byte aligned. The output of a row whose slot is not in
// [0, slots) is zero.
extern "C" __global__ void __launch_bounds__(BLOCK, 3) ring_attention(
    const cell* __restrict__ qkv,              // [B, T, 3 D]
    const cell* __restrict__ k_ring,           // [slots, heads, C, d_k]
    const cell* __restrict__ v_ring,           // [slots, heads, C, d_k]
    const cell* __restrict__ positions,        // [C + 2 T - 1, D]
    const cell* __restrict__ bias_u,           // [heads, d_k], added to the queries of content scores
    const cell* __restrict__ bias_v,           // [heads, d_k], added to the queries of position scores
    const int* __restrict__ row_slot,          // [B]
    const long long* __restrict__ position,    // [B], frames of the stream before this step
    const long long* __restrict__ old_frames,  // [B], visible ring rows: those of age 1 to `old_frames`
    const long long* __restrict__ new_frames,  // [B], visible new frames: the first `new_frames`
    int slots,
    cell* __restrict__ out) {                  // [B, T, D]
  __shared__ Rows rows;
  __shared__ float4 query[FRAMES][D_K / 4];
  __shared__ float scores[FRAMES][KEYS];  // columns: ring rows, then new frames

  const int row = blockIdx.x, head = blockIdx.y, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int slot = row_slot[row];
  const cell* own = qkv + (long long)row * FRAMES * 3 * D_MODEL + head * D_K;
  uint4* result = reinterpret_cast<uint4*>(out + (long long)row * FRAMES * D_MODEL + head * D_K);
  const auto target = [&](int i) { return result + i / CHUNKS * (D_MODEL / VECTOR) + i % CHUNKS; };
  if (slot < 0 || slot >= slots) {
    for (int i = thread; i < FRAMES * CHUNKS; i += BLOCK) *target(i) = make_uint4(0, 0, 0, 0);
    return;
  }
  const long long ring = ((long long)slot * HEADS + head) * CACHE * D_K;
  const int newest = int((position[row] + CACHE - 1) % CACHE);  // ring row of age 1
  const int visible_age = int(min(old_frames[row], (long long)CACHE));
  const int visible_new = int(min(max(new_frames[row], 0ll), (long long)FRAMES));
  const auto key = [&](int j) {
    return j < CACHE ? k_ring + ring + j * D_K : own + (j - CACHE) * 3 * D_MODEL + D_MODEL;
  };
  const auto value = [&](int j) {
    return j < CACHE ? v_ring + ring + j * D_K : own + (j - CACHE) * 3 * D_MODEL + 2 * D_MODEL;
  };
  const auto load_queries = [&](const cell* bias) {
    for (int i = thread; i < FRAMES * CHUNKS; i += BLOCK) {
      const int frame = i / CHUNKS, chunk = i % CHUNKS;
      float x[VECTOR], shift[VECTOR];
      unpack(chunks(own + frame * 3 * D_MODEL)[chunk], x);
      unpack(chunks(bias + head * D_K)[chunk], shift);
#pragma unroll
      for (int part = 0; part < VECTOR / 4; ++part)
        query[frame][chunk * (VECTOR / 4) + part] =
            make_float4(x[4 * part] + shift[4 * part], x[4 * part + 1] + shift[4 * part + 1],
                        x[4 * part + 2] + shift[4 * part + 2], x[4 * part + 3] + shift[4 * part + 3]);
    }
  };

  load_queries(bias_u);  // `stage` has the barrier
  multiply(rows, query, KEYS, key, [&](int i, int j, float score) { scores[i][j] = score; });
  __syncthreads();
  load_queries(bias_v);
  multiply(rows, query, DISTANCES, [&](int r) { return positions + r * D_MODEL + head * D_K; },
           [&](int i, int r, float score) {
             const int age = CACHE + FRAMES - 1 - i - r;  // 0 or less: new frame -age
             if (age > CACHE || -age >= FRAMES) return;   // of no key of this query
             const int ring_row = newest - age + 1;
             scores[i][age > 0 ? (ring_row < 0 ? ring_row + CACHE : ring_row) : CACHE - age] += score;
           });
  __syncthreads();

  for (int i = warp; i < FRAMES; i += WARPS) {
    float largest = __uint_as_float(0xff800000u), sum = 0.0f;  // minus infinity
    for (int j = lane; j < KEYS; j += 32) {
      const int age = newest - j + (j > newest ? CACHE : 0) + 1;
      const bool visible = j < CACHE ? age <= visible_age : j - CACHE < visible_new;
      scores[i][j] += visible ? 0.0f : MASKED;
      largest = fmaxf(largest, scores[i][j]);
    }
#pragma unroll
    for (int by = 16; by; by /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, by));
    for (int j = lane; j < KEYS; j += 32) {
      scores[i][j] = expf(scores[i][j] - largest);
      sum += scores[i][j];
    }
#pragma unroll
    for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    const float scale = 1.0f / sum;
    for (int j = lane; j < KEYS; j += 32) scores[i][j] *= scale;
  }

  constexpr int kParts = (FRAMES * CHUNKS + BLOCK - 1) / BLOCK;  // outputs of 16 bytes per thread
  float total[kParts][VECTOR] = {};
  for (int start = 0; start < KEYS; start += TILE) {
    const int staged = min(TILE, KEYS - start);
    stage(rows, staged, [&](int r) { return value(start + r); });
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int i = thread + part * BLOCK;
      if (i >= FRAMES * CHUNKS) continue;
#pragma unroll 4
      for (int r = 0; r < staged; ++r) {
        const float weight = scores[i / CHUNKS][start + r];
        float x[VECTOR];
        unpack(rows[r][i % CHUNKS], x);
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) total[part][e] += weight * x[e];
      }
    }
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part)
    if (thread + part * BLOCK < FRAMES * CHUNKS) *target(thread + part * BLOCK) = pack(total[part]);
}
