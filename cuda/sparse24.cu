// op:       mask24_1d, mask24_2d, compress24, decompress24, gather24
// math:     1d: keep the two largest |w| of every four along k; 2d: keep the best of the 90 patterns of each 4 x 4 block
// grad:     masks none; compress24, decompress24 and gather24 are each other's
// shapes:   mask: w[N, K], mask[N, K]; compress: w[N, K], mask[N, K], values[N, K/2]; meta: mask[N, K], meta[N, ceil(K/32)];
//           decompress: values[N, K/2], meta, w[N, K]; gather: w[N, K], meta, values[N, K/2]; i8 forms alike; meta is read as places[N, ceil(K/32)]
// layout:   meta: two bits per kept place, ascending, low bits first, eight groups of four to a word
// launch:   linear, 64 threads a block; one thread per group of four, 4 x 4 block, four kept bytes or word of meta
// cost:     3 comparisons an element (1d), 17 additions (2d)
// numerics: exact; ties: lower index (1d), lexicographically first pattern (2d, sums in f32 in a fixed order)
// source:   Mishra et al. 2021 (2:4 storage); Hubara et al. 2021 (transposable masks)
// rungs:    v1 one thread per group

struct Sparse24Params { u32 n, k; };

// |w| as an integer of the same order: NaN is largest, so that it is kept and seen.
__device__ __forceinline__ u32 magnitude(E w) { return __float_as_uint(ld(w)) & 0x7fffffffu; }

extern "C" __global__ void __launch_bounds__(64) mask24_1d_fwd(const E* w, E* mask, Sparse24Params p) {
    u32 group = linear_id();
    if (group >= p.n * (p.k / 4u)) return;
    w += (u64)group * 4u;
    mask += (u64)group * 4u;
    u32 size[4];
#pragma unroll
    for (u32 i = 0u; i < 4u; i++) size[i] = magnitude(w[i]);
#pragma unroll
    for (u32 i = 0u; i < 4u; i++) {
        // How many come before place i: the larger ones, and the equal ones of lower index.
        u32 rank = 0u;
#pragma unroll
        for (u32 j = 0u; j < 4u; j++) {
            if (size[j] > size[i] || (size[j] == size[i] && j < i)) rank++;
        }
        mask[i] = st(rank < 2u ? 1.0f : 0.0f);
    }
}

// Sums of |w| of a row of four over the pairs (0,1), (0,2), (0,3), (1,2), (1,3), (2,3).
struct PairSums { float of[6]; };

__device__ __forceinline__ PairSums pair_sums(const E* w) {
    float a = fabsf(ld(w[0])), b = fabsf(ld(w[1])), c = fabsf(ld(w[2])), d = fabsf(ld(w[3]));
    return {{a + b, a + c, a + d, b + c, b + d, c + d}};
}

// The pairs as one bit per column; pair p and pair 5 - p are complements.
__device__ __forceinline__ u32 pair_bits(u32 pair) { return (0xca6953u >> (4u * pair)) & 15u; }

// Which pair has these two bits.
__device__ __forceinline__ u32 pair_of(u32 bits) {
    switch (bits) {
        case 3u: return 0u;
        case 5u: return 1u;
        case 9u: return 2u;
        case 6u: return 3u;
        case 10u: return 4u;
        default: return 5u;
    }
}

extern "C" __global__ void __launch_bounds__(64) mask24_2d_fwd(const E* w, E* mask, Sparse24Params p) {
    u32 block = linear_id(), columns = p.k / 4u;
    if (block >= p.n / 4u * columns) return;
    u64 at = (u64)(block / columns) * 4u * p.k + block % columns * 4u;
    w += at;
    mask += at;
    PairSums r0 = pair_sums(w);
    PairSums r1 = pair_sums(w + p.k);
    PairSums r2 = pair_sums(w + 2u * (u64)p.k);
    PairSums r3 = pair_sums(w + 3u * (u64)p.k);
    float best = -1.0f;
    // The bits of the four rows, four each.
    u32 chosen = 0u;
    // Three rows determine the fourth: the columns that hold one so far. Order of (p0, p1, p2) is lexicographic. Unrolled,
    // every index is a constant and the sums stay in registers.
#pragma unroll
    for (u32 p0 = 0u; p0 < 6u; p0++)
#pragma unroll
        for (u32 p1 = 0u; p1 < 6u; p1++)
#pragma unroll
            for (u32 p2 = 0u; p2 < 6u; p2++) {
                u32 b0 = pair_bits(p0), b1 = pair_bits(p1), b2 = pair_bits(p2), b3 = b0 ^ b1 ^ b2;
                // Columns in all three would hold three, columns in none could hold one at most.
                if ((b0 & b1 & b2) != 0u || (b0 | b1 | b2) != 15u) continue;
                float sum = (r0.of[p0] + r1.of[p1]) + (r2.of[p2] + r3.of[pair_of(b3)]);
                if (sum > best) {
                    best = sum;
                    chosen = b0 | b1 << 4 | b2 << 8 | b3 << 12;
                }
            }
    for (u32 i = 0u; i < 16u; i++) mask[(u64)(i / 4u) * p.k + i % 4u] = st((float)((chosen >> i) & 1u));
}

__device__ __forceinline__ u32 one_bit(E x) { return (__float_as_uint(ld(x)) & 0x7fffffffu) != 0u ? 1u : 0u; }

// Places of the kept pair for each of the 16 masks of a group, as first | second << 2: ones first, filled up with the
// lowest zeros.
__device__ __forceinline__ u32 nibble_of(u32 mask) {
    u32 table = mask < 8u ? 0x49884444u : 0x498e4dccu;
    return (table >> (4u * (mask & 7u))) & 15u;
}

// `mask` at the first of the four.
__device__ __forceinline__ u32 group_mask(const E* mask) {
    return one_bit(mask[0]) | (one_bit(mask[1]) << 1) | (one_bit(mask[2]) << 2) | (one_bit(mask[3]) << 3);
}

extern "C" __global__ void __launch_bounds__(64) compress24_fwd(const E* w, const E* mask, E* values, Sparse24Params p) {
    u32 group = linear_id();
    if (group >= p.n * (p.k / 4u)) return;
    u32 bits = group_mask(mask + (u64)group * 4u), nibble = nibble_of(bits);
    for (u32 slot = 0u; slot < 2u; slot++) {
        u32 place = (nibble >> (2u * slot)) & 3u;
        values[(u64)group * 2u + slot] = (bits >> place) & 1u ? w[(u64)group * 4u + place] : st(0.0f);
    }
}

// Four kept bytes: two groups, where the last may be alone.
extern "C" __global__ void __launch_bounds__(64) compress24_i8_fwd(const i8* w, const E* mask, i8* values, Sparse24Params p) {
    u32 first = linear_id() * 2u;
    for (u32 group = first; group < min(first + 2u, p.n * (p.k / 4u)); group++) {
        u32 bits = group_mask(mask + (u64)group * 4u), nibble = nibble_of(bits);
        for (u32 slot = 0u; slot < 2u; slot++) {
            u32 place = (nibble >> (2u * slot)) & 3u;
            values[(u64)group * 2u + slot] = (bits >> place) & 1u ? w[(u64)group * 4u + place] : (i8)0;
        }
    }
}

extern "C" __global__ void __launch_bounds__(64) compress24_meta(const E* mask, u32* meta, Sparse24Params p) {
    u32 id = linear_id(), words = div_up(p.k, 32u);
    if (id >= p.n * words) return;
    u32 column = id % words * 32u, packed = 0u;
    mask += (u64)(id / words) * p.k + column;
    for (u32 g = 0u; g < 8u && column + 4u * g < p.k; g++) packed |= nibble_of(group_mask(mask + 4u * g)) << (4u * g);
    meta[id] = packed;
}

// The four meta bits of group `group` of the whole matrix.
__device__ __forceinline__ u32 nibble_at(const u32* places, u32 group, u32 k) {
    u32 groups = k / 4u, g = group % groups;
    return (places[(u64)(group / groups) * div_up(k, 32u) + g / 8u] >> (4u * (g % 8u))) & 15u;
}

extern "C" __global__ void __launch_bounds__(64) decompress24_fwd(const E* values, const u32* places, E* w, Sparse24Params p) {
    u32 group = linear_id();
    if (group >= p.n * (p.k / 4u)) return;
    u32 nibble = nibble_at(places, group, p.k);
    E first = values[2u * (u64)group], second = values[2u * (u64)group + 1u];
    for (u32 place = 0u; place < 4u; place++) {
        E value = st(0.0f);
        if (place == (nibble & 3u)) value = first;
        if (place == nibble >> 2) value = second;
        w[4u * (u64)group + place] = value;
    }
}

extern "C" __global__ void __launch_bounds__(64) decompress24_i8_fwd(const u8* values, const u32* places, u32* w, Sparse24Params p) {
    u32 group = linear_id();
    if (group >= p.n * (p.k / 4u)) return;
    u32 nibble = nibble_at(places, group, p.k);
    u32 first = values[2u * (u64)group], second = values[2u * (u64)group + 1u];
    w[group] = (first << (8u * (nibble & 3u))) | (second << (8u * (nibble >> 2)));
}

extern "C" __global__ void __launch_bounds__(64) gather24_fwd(const E* w, const u32* places, E* values, Sparse24Params p) {
    u32 group = linear_id();
    if (group >= p.n * (p.k / 4u)) return;
    u32 nibble = nibble_at(places, group, p.k);
    values[2u * (u64)group] = w[4u * (u64)group + (nibble & 3u)];
    values[2u * (u64)group + 1u] = w[4u * (u64)group + (nibble >> 2)];
}
