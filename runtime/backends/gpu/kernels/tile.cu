// Types narrower than fp32, and the tiled matrix product used by decoding.
//
// A block of 256 threads computes a tile of 16 rows by 32 columns of C = A B. Its 8 warps split the inner dimension
// and add their sums through shared memory: decoding's products have few rows, so the weights of a whole product
// should be loaded from the L2 cache at once. A warp stages two rows of A, DEPTH elements at a time, four elements per
// lane and load. B was packed on the host so that every thread reads its elements in one coalesced load (`pack` in
// `__init__.py`).
//
// The order of additions depends on the inner dimension only: the result of a row is the same in any batch.
//
// MATMUL_TYPE: 0 multiplies in fp32, 1 in fp16, 2 in bf16 (tensor cores, sums in fp32).

#define WARPS (BLOCK / 32)
#define DEPTH 512  // elements of the inner dimension staged at once, a multiple of 128
#define STAGED_ROWS 2  // rows that a warp stages
#define TILE_BLOCKS (MATMUL_TYPE ? 4 : 2)  // blocks that fit into a multiprocessor's registers; with more they spill
#define VECTORS (DEPTH / 128)  // of four elements, per lane and staged row

static_assert(TILE_ROWS == STAGED_ROWS * WARPS, "the warps stage all rows of a tile");

// Return the inner dimension of a packed matrix.
static __device__ constexpr int padded(int depth) { return (depth + 15) / 16 * 16; }

// Return elements k to k + 3 of a row of `size` floats, zeros beyond its end. Rows of a multiple of 4 floats are
// aligned to 16 bytes. The row must not be written by the same kernel.
template <int size>
static __device__ __forceinline__ float4 load4(const float* row, long long k) {
  if constexpr (size % 4 == 0) {
    return __ldg(reinterpret_cast<const float4*>(row + k));
  } else {
    const float y = k + 1 < size ? __ldg(row + k + 1) : 0.0f, z = k + 2 < size ? __ldg(row + k + 2) : 0.0f;
    return make_float4(__ldg(row + k), y, z, k + 3 < size ? __ldg(row + k + 3) : 0.0f);
  }
}

#if MATMUL_TYPE
// Round two numbers and return them in one word, `x` in the lower half.
#ifdef CUDA_ON_CPU
static __device__ __forceinline__ unsigned to_operands(float x, float y) {
  if (MATMUL_TYPE == 2) return simt_float_to_bfloat(x) | unsigned(simt_float_to_bfloat(y)) << 16;
  return simt_float_to_half(x) | unsigned(simt_float_to_half(y)) << 16;
}
static __device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  simt_mma_16816<MATMUL_TYPE == 2>(d, a, b);
}
#else
static __device__ __forceinline__ unsigned to_operands(float x, float y) {
  unsigned word;
#if MATMUL_TYPE == 2
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(y), "f"(x));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(y), "f"(x));
#endif
  return word;
}
static __device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if MATMUL_TYPE == 2
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
typedef unsigned short operand_t;
#define STAGED_STRIDE (DEPTH + 8)  // rows are 16 bytes apart modulo 128, so fragments load without bank conflicts
static __device__ __forceinline__ void store4(operand_t* to, float4 x) {
  *reinterpret_cast<uint2*>(to) = make_uint2(to_operands(x.x, x.y), to_operands(x.z, x.w));
}
#else
typedef float operand_t;
#define STAGED_STRIDE (DEPTH + 4)  // keeps rows aligned to 16 bytes
static __device__ __forceinline__ void store4(operand_t* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }
#endif

// Shared memory of a tile: first the staged elements of A, then the sums of each warp.
union alignas(16) Tile {
  operand_t staged[TILE_ROWS][STAGED_STRIDE];
  float sums[WARPS][TILE_ROWS][TILE_COLUMNS + 1];
};

// Stage elements `start` to `start + DEPTH` of the first `count` rows of a warp. No load depends on another, so that
// many are in flight at once.
template <int count, int depth, class Row>
static __device__ __forceinline__ void stage(Tile& tile, const Row (&rows)[STAGED_ROWS], int start) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float4 values[count][VECTORS];
#pragma unroll
  for (int i = 0; i < count; ++i)
#pragma unroll
    for (int vector = 0; vector < VECTORS; ++vector) {
      const long long k = 4 * lane + (start + 128ll * vector);
      values[i][vector] = k < depth ? rows[i](k) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
#pragma unroll
  for (int i = 0; i < count; ++i)
#pragma unroll
    for (int vector = 0; vector < VECTORS; ++vector) {
      const int k = 128 * vector + 4 * lane;
      if (start + k < padded(depth)) store4(&tile.staged[warp + WARPS * i][k], values[i][vector]);
    }
}

// Compute column tile `column` of A B into `tile.sums[0]`. A has `depth` columns and `count` rows, of which the first
// TILE_ROWS are used; the sums of rows beyond A are undefined. `rows(row)` returns a function of k, a multiple of 4,
// that returns elements k to k + 3 of a row; elements beyond `depth` may be any finite number. B is packed with its
// depth rounded up to 16. Must be called by every thread of the block.
template <int depth, class Rows>
static __device__ __forceinline__ void product(
    Tile& tile, const unsigned* __restrict__ packed, int column, int count, Rows rows) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#if MATMUL_TYPE
  float sum[4][4] = {};
  const uint2* fragments = reinterpret_cast<const uint2*>(packed) + (long long)column * (padded(depth) / 16) * 4 * 32;
  const int group = lane / 4, member = lane % 4;
#else
  float sum[TILE_ROWS] = {};
  const float* columns = reinterpret_cast<const float*>(packed) + (long long)column * padded(depth) * TILE_COLUMNS;
#endif
  // Addresses are computed once per row. Rows beyond A are not read.
  const decltype(rows(0)) staged[STAGED_ROWS] = {rows(min(warp, count - 1)), rows(min(warp + WARPS, count - 1))};
#pragma unroll
  for (int start = 0; start < padded(depth); start += DEPTH) {
    const int length = min(DEPTH, padded(depth) - start);
    __syncthreads();  // the previous contents of the tile have been read
    if (warp + WARPS < count)
      stage<2, depth>(tile, staged, start);
    else if (warp < count)
      stage<1, depth>(tile, staged, start);
    __syncthreads();
#if MATMUL_TYPE
    for (int k = warp * 16; k < length; k += WARPS * 16) {
      unsigned a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = *reinterpret_cast<const unsigned*>(&tile.staged[group + 8 * (i % 2)][k + 2 * member + 8 * (i / 2)]);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint2 word = __ldg(&fragments[((start + k) / 16 * 4 + n) * 32 + lane]);
        const unsigned b[2] = {word.x, word.y};
        multiply(sum[n], a, b);
      }
    }
#else
    for (int k = warp; k < length; k += WARPS) {
      const float weight = __ldg(&columns[(start + k) * TILE_COLUMNS + lane]);
#pragma unroll
      for (int row = 0; row < TILE_ROWS; ++row) sum[row] += tile.staged[row][k] * weight;
    }
#endif
  }
  __syncthreads();
#if MATMUL_TYPE
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) tile.sums[warp][group + 8 * (i / 2)][8 * n + 2 * member + i % 2] = sum[n][i];
#else
#pragma unroll
  for (int row = 0; row < TILE_ROWS; ++row) tile.sums[warp][row][lane] = sum[row];
#endif
  __syncthreads();
#pragma unroll
  for (int row = warp; row < TILE_ROWS; row += WARPS) {
    float total = 0.0f;
#pragma unroll
    for (int part = 0; part < WARPS; ++part) total += tile.sums[part][row][lane];
    tile.sums[0][row][lane] = total;  // no other thread reads this element before the barrier
  }
  __syncthreads();
}
