// op:       keep_largest, above
// math:     keep_largest: mask = 1 for the `keep` largest x of each row (|x| where asked), else 0; above: mask = 1 where x > threshold
// grad:     none
// shapes:   ranked, above: x[G, N], mask[G, N]; count: x, counts[G C, 256], state[G, 2]; digit: counts, state; write: x, mask, counts, state
// layout:   x as words; a row is C chunks of 4096; counts of 256 digits per chunk; state: the key's digits so far, how many are still to be kept
// launch:   ranked, above: linear, 64 threads a block, one element each; count, write: a block of 64 per chunk; digit: a block of 256 per row
// cost:     ranked: N comparisons an element; else five readings of x and one writing of the mask
// numerics: exact; lower index wins ties, -0 equals 0, NaN is smaller than everything; whole numbers alone are added, in any order
// source:   radix select: Alabi et al. 2012
// rungs:    v1 ranked (rows of at most 64), radix select with digits of 8 bits

struct SelectParams { u32 rows, n, keep, magnitude, chunks, shift; };
struct AboveParams { u32 count, threshold; };

#define CHUNK 4096u

// A word's place among all f32: larger numbers have larger keys.
__device__ __forceinline__ u32 key_of(u32 word, bool magnitude) {
    u32 size = word & 0x7fffffffu;
    if (size > 0x7f800000u) return 0u;
    if (magnitude) return size + 1u;
    if (size == 0u) return 0x80000000u;
    return word >> 31 ? ~word : word | 0x80000000u;
}

extern "C" __global__ void __launch_bounds__(64) above(const u32* x, float* mask, AboveParams p) {
    u32 i = linear_id();
    if (i >= p.count) return;
    mask[i] = key_of(x[i], false) > key_of(p.threshold, false) ? 1.0f : 0.0f;
}

extern "C" __global__ void __launch_bounds__(64) keep_largest_ranked(const u32* x, float* mask, SelectParams p) {
    u32 i = linear_id();
    if (i >= p.rows * p.n) return;
    u32 start = i - i % p.n, own = key_of(x[i], p.magnitude == 1u);
    // How many come before: the larger ones, and the equal ones of lower index.
    u32 rank = 0u;
    for (u32 j = start; j < start + p.n; j++) {
        u32 other = key_of(x[j], p.magnitude == 1u);
        if (other > own || (other == own && j < i)) rank++;
    }
    mask[i] = rank < p.keep ? 1.0f : 0.0f;
}

// Elements of a chunk whose higher digits are those of the smallest kept key, by their next digit.
extern "C" __global__ void __launch_bounds__(64) keep_largest_count(const u32* x, u32* counts, const u32* state, SelectParams p) {
    __shared__ u32 bins[256];
    u32 block = linear_block(), lane = threadIdx.x;
    if (block >= p.rows * p.chunks) return;
    u32 row = block / p.chunks, first = block % p.chunks * CHUNK;
    for (u32 d = lane; d < 256u; d += 64u) bins[d] = 0u;
    __syncthreads();
    // The first digit has none before it, and a shift by 32 is none.
    u32 prefix = p.shift < 24u ? state[row * 2u] >> (p.shift + 8u) : 0u;
    x += (u64)row * p.n;
    for (u32 i = first + lane; i < min(first + CHUNK, p.n); i += 64u) {
        u32 key = key_of(x[i], p.magnitude == 1u);
        u32 own = p.shift < 24u ? key >> (p.shift + 8u) : 0u;
        if (own == prefix) atomicAdd(&bins[(key >> p.shift) & 255u], 1u);
    }
    __syncthreads();
    for (u32 d = lane; d < 256u; d += 64u) counts[(u64)block * 256u + d] = bins[d];
}

// The next digit of the smallest kept key: the largest one at or above which enough elements lie.
extern "C" __global__ void __launch_bounds__(256) keep_largest_digit(const u32* counts, u32* state, SelectParams p) {
    __shared__ u32 totals[256];
    u32 row = linear_block(), lane = threadIdx.x;
    if (row >= p.rows) return;
    u32 total = 0u;
    for (u32 c = 0u; c < p.chunks; c++) total += counts[((u64)row * p.chunks + c) * 256u + lane];
    totals[lane] = total;
    __syncthreads();
    if (lane == 0u) {
        u32 prefix = p.shift < 24u ? state[row * 2u] : 0u, left = p.shift < 24u ? state[row * 2u + 1u] : p.keep;
        u32 digit = 255u;
        for (; digit > 0u && totals[digit] < left; digit--) left -= totals[digit];
        state[row * 2u] = prefix | (digit << p.shift);
        state[row * 2u + 1u] = left;
    }
}

// The mask: larger keys, and of the equal ones the first. The last counts say how many equal ones earlier chunks have.
extern "C" __global__ void __launch_bounds__(64) keep_largest_write(const u32* x, float* mask, const u32* counts, const u32* state, SelectParams p) {
    __shared__ u32 previous, equals_of[64];
    u32 block = linear_block(), lane = threadIdx.x;
    if (block >= p.rows * p.chunks) return;
    u32 row = block / p.chunks, chunk = block % p.chunks;
    u32 least = state[row * 2u], left = state[row * 2u + 1u];
    if (lane == 0u) previous = 0u;
    __syncthreads();
    u32 earlier = 0u;
    for (u32 c = lane; c < chunk; c += 64u) earlier += counts[((u64)row * p.chunks + c) * 256u + (least & 255u)];
    atomicAdd(&previous, earlier);
    x += (u64)row * p.n;
    mask += (u64)row * p.n;
    // Neighbours belong to one thread, so that equal ones are met in their order.
    u32 first = min(chunk * CHUNK + lane * 64u, p.n), end = min(first + 64u, p.n);
    u32 equals = 0u;
    for (u32 i = first; i < end; i++) equals += key_of(x[i], p.magnitude == 1u) == least ? 1u : 0u;
    equals_of[lane] = equals;
    __syncthreads();
    u32 before = previous;
    for (u32 l = 0u; l < lane; l++) before += equals_of[l];
    for (u32 i = first; i < end; i++) {
        u32 key = key_of(x[i], p.magnitude == 1u);
        mask[i] = key > least || (key == least && before < left) ? 1.0f : 0.0f;
        if (key == least) before++;
    }
}
