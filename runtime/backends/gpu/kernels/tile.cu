// Numbers narrower than fp32, and the one matrix product that decoding is made of.
//
// A block of 256 threads makes a tile of 16 rows by 32 columns, C = A B: its 8 warps split the inner dimension among
// them and add up through shared memory, because decoding's products have few rows and the weights of a whole product
// should be on their way from the L2 cache at once. A's rows are gathered by the caller, chunk by chunk; B's columns
// were packed on the host so that every thread reads what it needs in one coalesced load (`Weights` in `weights.py`).
//
// NARROW: 0 multiplies in fp32, 1 in fp16, 2 in bf16 (tensor cores, sums in fp32).

#define WARPS (BLOCK / 32)
#define DEPTH 512  // inner elements of A staged at once

typedef unsigned short narrow_t;

#if NARROW
#ifdef CUDA_ON_CPU
static __device__ __forceinline__ narrow_t narrow(float x) {
  return NARROW == 2 ? simt_float_to_bfloat(x) : simt_float_to_half(x);
}
static __device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  simt_mma_16816<NARROW == 2>(d, a, b);
}
#else
static __device__ __forceinline__ narrow_t narrow(float x) {
  narrow_t bits;
#if NARROW == 2
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#endif
  return bits;
}
static __device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if NARROW == 2
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
typedef narrow_t staged_t;
#define STAGED_STRIDE (DEPTH + 8)  // rows 16 bytes apart modulo 128: fragments load without bank conflicts
#else
typedef float staged_t;
static __device__ __forceinline__ float narrow(float x) { return x; }
#define STAGED_STRIDE (DEPTH + 1)
#endif

// Shared memory of a tile: A while it is multiplied, the warps' sums afterwards.
union Tile {
  staged_t staged[TILE_ROWS][STAGED_STRIDE];
  float sums[WARPS][TILE_ROWS][TILE_COLUMNS + 1];
};

// Column tile `column` of A B, for A's element (row, k) = `element(row, k)`, k < depth, and B packed with its depth
// rounded up to 16. Afterwards `tile.sums[0]` holds the product. Every thread of the block must call it.
template <class Element>
static __device__ __forceinline__ void product(
    Tile& tile, const unsigned* __restrict__ packed, int column, int depth, Element element) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int padded = (depth + 15) / 16 * 16;
#if NARROW
  float sum[4][4] = {};
  const uint2* fragments = reinterpret_cast<const uint2*>(packed) + (long long)column * (padded / 16) * 4 * 32;
  const int group = lane / 4, member = lane % 4;
#else
  float sum[TILE_ROWS] = {};
  const float* columns = reinterpret_cast<const float*>(packed) + (long long)column * padded * TILE_COLUMNS;
#endif
  for (int start = 0; start < padded; start += DEPTH) {
    const int length = min(DEPTH, padded - start);
    __syncthreads();  // whoever read the tile before is done
    for (int i = thread; i < TILE_ROWS * length; i += BLOCK) {
      const int row = i / length, k = i % length;
      tile.staged[row][k] = narrow(start + k < depth ? element(row, start + k) : 0.0f);
    }
    __syncthreads();
#if NARROW
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
#if NARROW
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
    const int row = i / TILE_COLUMNS, at = i % TILE_COLUMNS;
    float total = 0.0f;
#pragma unroll
    for (int part = 0; part < WARPS; ++part) total += tile.sums[part][row][at];
    tile.sums[0][row][at] = total;  // read by this thread alone until the barrier
  }
  __syncthreads();
}
