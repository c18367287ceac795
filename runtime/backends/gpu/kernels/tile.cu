// Types narrower than fp32, and the tiled matrix product used by decoding.
//
// A block of 256 threads computes a tile of 16 rows by 32 columns of C = A B. Its 8 warps split the inner dimension
// and add their sums through shared memory: decoding's products have few rows, so the weights of a whole product
// should be loaded from the L2 cache at once. The caller gathers the rows of A, DEPTH elements at a time. B was
// packed on the host so that every thread reads its elements in one coalesced load (`pack` in `__init__.py`).
//
// MATMUL_TYPE: 0 multiplies in fp32, 1 in fp16, 2 in bf16 (tensor cores, sums in fp32).

#define WARPS (BLOCK / 32)
#define DEPTH 512  // elements of the inner dimension staged at once

typedef unsigned short bits16_t;

#if MATMUL_TYPE
#ifdef CUDA_ON_CPU
static __device__ __forceinline__ bits16_t to_operand(float x) {
  return MATMUL_TYPE == 2 ? simt_float_to_bfloat(x) : simt_float_to_half(x);
}
static __device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  simt_mma_16816<MATMUL_TYPE == 2>(d, a, b);
}
#else
static __device__ __forceinline__ bits16_t to_operand(float x) {
  bits16_t bits;
#if MATMUL_TYPE == 2
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#endif
  return bits;
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
typedef bits16_t operand_t;
#define STAGED_STRIDE (DEPTH + 8)  // rows are 16 bytes apart modulo 128, so fragments load without bank conflicts
#else
typedef float operand_t;
static __device__ __forceinline__ float to_operand(float x) { return x; }
#define STAGED_STRIDE (DEPTH + 1)
#endif

// Shared memory of a tile: first the staged elements of A, then the sums of each warp.
union Tile {
  operand_t staged[TILE_ROWS][STAGED_STRIDE];
  float sums[WARPS][TILE_ROWS][TILE_COLUMNS + 1];
};

// Compute column tile `column` of A B into `tile.sums[0]`. `element(row, k)` returns A's elements for k < depth; B is
// packed with its depth rounded up to 16. Must be called by every thread of the block.
template <class Element>
static __device__ __forceinline__ void product(
    Tile& tile, const unsigned* __restrict__ packed, int column, int depth, Element element) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int padded = (depth + 15) / 16 * 16;
#if MATMUL_TYPE
  float sum[4][4] = {};
  const uint2* fragments = reinterpret_cast<const uint2*>(packed) + (long long)column * (padded / 16) * 4 * 32;
  const int group = lane / 4, member = lane % 4;
#else
  float sum[TILE_ROWS] = {};
  const float* columns = reinterpret_cast<const float*>(packed) + (long long)column * padded * TILE_COLUMNS;
#endif
  for (int start = 0; start < padded; start += DEPTH) {
    const int length = min(DEPTH, padded - start);
    __syncthreads();  // the previous contents of the tile have been read
    for (int i = thread; i < TILE_ROWS * length; i += BLOCK) {
      const int row = i / length, k = i % length;
      tile.staged[row][k] = to_operand(start + k < depth ? element(row, start + k) : 0.0f);
    }
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
  for (int i = thread; i < TILE_ROWS * TILE_COLUMNS; i += BLOCK) {
    const int row = i / TILE_COLUMNS, col = i % TILE_COLUMNS;
    float total = 0.0f;
#pragma unroll
    for (int part = 0; part < WARPS; ++part) total += tile.sums[part][row][col];
    tile.sums[0][row][col] = total;  // no other thread reads this element before the barrier
  }
  __syncthreads();
}
