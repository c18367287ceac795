// Phrase boosting (`runtime/decoding/boosting.py`): automata in a pool that streams share.
//
// An automaton is stored as int words: the number of nodes, then `first` (nodes + 1), `token`, `score`, `fail` and
// `penalty` (nodes each). One warp writes the bias that a row's logits get, [BLANK] floats, whenever the row's node
// changes; `join` only adds it.

#define BLANK (VOCABULARY - 1)

struct Automaton {
  const int *first, *token, *fail;
  const float *score, *penalty;
};

// Nodes on the failure path from a node to the root, and the penalties up to each. One per warp, in shared memory.
struct Chain {
  int node[MAX_PHRASE_TOKENS];
  float bias[MAX_PHRASE_TOKENS];
};

static __device__ __forceinline__ Automaton automaton(const Step& s, int offset) {
  const int *words = s.phrase_pool + offset, nodes = *words++;
  Automaton a;
  a.first = words;
  a.token = a.first + nodes + 1;
  a.score = reinterpret_cast<const float*>(a.token + nodes);
  a.fail = a.token + 2 * nodes;
  a.penalty = a.score + 2 * nodes;
  return a;
}

// Return the node after a token.
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

static __device__ __forceinline__ void write_children(const Automaton& a, float* bias, int node, float base) {
  for (int i = a.first[node] + threadIdx.x % 32; i < a.first[node + 1]; i += 32) bias[a.token[i]] = base + a.score[i];
  __syncwarp();
}

// Write the bias of each token at `node`. For each token, the longest suffix that has an arc for it applies.
static __device__ __forceinline__ void write_bias(const Automaton& a, float* bias, int node, Chain& chain) {
  const int lane = threadIdx.x % 32;
  int depth = 0;
  float total = 0.0f;
  for (; node; node = a.fail[node], ++depth) {
    if (lane == 0) {
      chain.node[depth] = node;
      chain.bias[depth] = total;
    }
    total += a.penalty[node];
  }
  for (int id = lane; id < BLANK; id += 32) bias[id] = total;
  __syncwarp();
  write_children(a, bias, 0, total);
  while (depth--) write_children(a, bias, chain.node[depth], chain.bias[depth]);
}

// Set the phrases of slot `slot`: the automaton at word `automaton` of the pool, -1 for none. Grid 1, block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) set_phrases(const Step s) {
  if (threadIdx.x) return;
  s.slot_automaton[s.slot] = s.automaton;
  s.node[s.slot] = 0;
}
