// Phrases a stream is boosted by (`runtime/decoding/boosting.py`): automata in a pool, which streams share.
//
// An automaton is int words: how many nodes, then `first` (one more than nodes), `token`, `score`, `fail`, `penalty`.
// What it adds to a row's logits is written out, [BLANK] floats a row, whenever the row's node changes: `join` then only
// adds. One warp does it.

#define BLANK (VOCABULARY - 1)

struct Automaton {
  const int *first, *token, *fail;
  const float *score, *penalty;
};

// Nodes on the way from one to the root, and what the longer ones have given back. In shared memory, of each warp.
struct Chain {
  int node[DEEPEST];
  float gained[DEEPEST];
};

static __device__ __forceinline__ Automaton automaton(const Step& s, int at) {
  const int *words = s.pool + at, nodes = *words++;
  Automaton a;
  a.first = words;
  a.token = a.first + nodes + 1;
  a.score = reinterpret_cast<const float*>(a.token + nodes);
  a.fail = a.token + 2 * nodes;
  a.penalty = a.score + 2 * nodes;
  return a;
}

// The node after a token.
static __device__ __forceinline__ int after(const Automaton& a, int node, int token) {
  for (;; node = a.fail[node]) {
    for (int i = a.first[node], end = a.first[node + 1]; i < end; i += 32) {
      const int child = i + threadIdx.x % 32;
      const unsigned found = __ballot_sync(~0u, child < end && a.token[child] == token);
      if (found) return i + __ffs(found) - 1;
    }
    if (node == 0) return 0;
  }
}

static __device__ __forceinline__ void children(const Automaton& a, float* bias, int node, float gained) {
  for (int i = a.first[node] + threadIdx.x % 32; i < a.first[node + 1]; i += 32) bias[a.token[i]] = gained + a.score[i];
  __syncwarp();
}

// What is added to the logits of a row at `node`: the longest suffix that has an arc for a token decides.
static __device__ __forceinline__ void write_bias(const Automaton& a, float* bias, int node, Chain& chain) {
  const int lane = threadIdx.x % 32;
  int depth = 0;
  float gained = 0.0f;
  for (; node; node = a.fail[node], ++depth) {
    if (lane == 0) {
      chain.node[depth] = node;
      chain.gained[depth] = gained;
    }
    gained += a.penalty[node];
  }
  for (int id = lane; id < BLANK; id += 32) bias[id] = gained;
  __syncwarp();
  children(a, bias, 0, gained);
  while (depth--) children(a, bias, chain.node[depth], chain.gained[depth]);
}

// Slot `slot` listens for the phrases of the automaton at word `automaton` of the pool (-1: for none). Grid 1, block
// BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) boost(const Step s) {
  if (threadIdx.x) return;
  s.boost_at[s.slot] = s.automaton;
  s.node[s.slot] = 0;
}
