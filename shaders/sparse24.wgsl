// op:       mask24_1d, mask24_2d, compress24, decompress24, gather24
// math:     1d: keep the two largest |w| of every four along k; 2d: keep the best of the 90 patterns of each 4 x 4 block
// grad:     masks none; compress24, decompress24 and gather24 are each other's
// shapes:   mask: w[N, K], mask[N, K]; compress: w[N, K], mask[N, K], values[N, K/2]; meta: mask[N, K], meta[N, ceil(K/32)];
//           decompress: values[N, K/2], meta, w[N, K]; gather: w[N, K], meta, values[N, K/2]; i8 forms: bytes[N, K/4] or [N, K/8] words; meta is read as places[N, ceil(K/32)]
// layout:   meta: two bits per kept place, ascending, low bits first, eight groups of four to a word
// launch:   linear, 64 invocations a group; one invocation per group of four, 4 x 4 block, or word of bytes or meta
// cost:     3 comparisons an element (1d), 17 additions (2d)
// numerics: exact; ties: lower index (1d), lexicographically first pattern (2d, sums in f32 in a fixed order)
// source:   Mishra et al. 2021 (2:4 storage); Hubara et al. 2021 (transposable masks)
// rungs:    v1 one invocation per group

struct Sparse24Params { n: u32, k: u32 }
var<immediate> sparse24: Sparse24Params;

@group(0) @binding(0) var<storage, read> mask24_w: array<E>;
@group(0) @binding(1) var<storage, read_write> mask24_mask: array<E>;

// |w| as an integer of the same order: NaN is largest, so that it is kept and seen.
fn magnitude(at: u32) -> u32 { return bitcast<u32>(ld(mask24_w[at])) & 0x7fffffffu; }

@compute @workgroup_size(64)
fn mask24_1d_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let group = linear_id(gid, 64u);
    if group >= sparse24.n * sparse24.k / 4u { return; }
    let at = group * 4u;
    let w = vec4<u32>(magnitude(at), magnitude(at + 1u), magnitude(at + 2u), magnitude(at + 3u));
    for (var i = 0u; i < 4u; i++) {
        // How many come before place i: the larger ones, and the equal ones of lower index.
        var rank = 0u;
        for (var j = 0u; j < 4u; j++) {
            if w[j] > w[i] || (w[j] == w[i] && j < i) { rank++; }
        }
        mask24_mask[at + i] = st(select(0.0, 1.0, rank < 2u));
    }
}

// Sums of |w| of a row of four over the pairs (0,1), (0,2), (0,3), (1,2), (1,3), (2,3).
fn pair_sums(at: u32) -> array<f32, 6> {
    let a = abs(ld(mask24_w[at]));
    let b = abs(ld(mask24_w[at + 1u]));
    let c = abs(ld(mask24_w[at + 2u]));
    let d = abs(ld(mask24_w[at + 3u]));
    return array<f32, 6>(a + b, a + c, a + d, b + c, b + d, c + d);
}

// The pairs as one bit per column; pair p and pair 5 - p are complements.
fn pair_bits(pair: u32) -> u32 { return (0xca6953u >> (4u * pair)) & 15u; }

// Which pair has these two bits.
fn pair_of(bits: u32) -> u32 {
    switch bits {
        case 3u: { return 0u; }
        case 5u: { return 1u; }
        case 9u: { return 2u; }
        case 6u: { return 3u; }
        case 10u: { return 4u; }
        default: { return 5u; }
    }
}

@compute @workgroup_size(64)
fn mask24_2d_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let block = linear_id(gid, 64u);
    let columns = sparse24.k / 4u;
    if block >= sparse24.n / 4u * columns { return; }
    let at = (block / columns) * 4u * sparse24.k + (block % columns) * 4u;
    var r0 = pair_sums(at);
    var r1 = pair_sums(at + sparse24.k);
    var r2 = pair_sums(at + 2u * sparse24.k);
    var r3 = pair_sums(at + 3u * sparse24.k);
    var best = -1.0;
    var chosen = vec4<u32>();
    // Three rows determine the fourth: the columns that hold one so far. Order of (p0, p1, p2) is lexicographic.
    for (var code = 0u; code < 216u; code++) {
        let p0 = code / 36u;
        let p1 = code / 6u % 6u;
        let p2 = code % 6u;
        let b0 = pair_bits(p0);
        let b1 = pair_bits(p1);
        let b2 = pair_bits(p2);
        // Columns in all three would hold three, columns in none could hold one at most.
        if (b0 & b1 & b2) == 0u && (b0 | b1 | b2) == 15u {
            let p3 = pair_of(b0 ^ b1 ^ b2);
            let sum = (r0[p0] + r1[p1]) + (r2[p2] + r3[p3]);
            if sum > best {
                best = sum;
                chosen = vec4<u32>(b0, b1, b2, b0 ^ b1 ^ b2);
            }
        }
    }
    for (var i = 0u; i < 16u; i++) {
        let kept = (chosen[i / 4u] >> (i % 4u)) & 1u;
        mask24_mask[at + (i / 4u) * sparse24.k + i % 4u] = st(f32(kept));
    }
}

@group(0) @binding(1) var<storage, read> compress24_mask: array<E>;
@group(0) @binding(2) var<storage, read_write> compress24_values: array<E>;

fn one_bit(x: E) -> u32 { return select(0u, 1u, (bitcast<u32>(ld(x)) & 0x7fffffffu) != 0u); }

// Places of the kept pair for each of the 16 masks of a group, as first | second << 2: ones first, filled up with the
// lowest zeros.
fn nibble_of(mask: u32) -> u32 {
    let table = select(0x498e4dccu, 0x49884444u, mask < 8u);
    return (table >> (4u * (mask & 7u))) & 15u;
}

fn group_mask(at: u32) -> u32 {
    return one_bit(compress24_mask[at]) | (one_bit(compress24_mask[at + 1u]) << 1u) | (one_bit(compress24_mask[at + 2u]) << 2u)
        | (one_bit(compress24_mask[at + 3u]) << 3u);
}

@compute @workgroup_size(64)
fn compress24_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let group = linear_id(gid, 64u);
    if group >= sparse24.n * sparse24.k / 4u { return; }
    let mask = group_mask(group * 4u);
    let nibble = nibble_of(mask);
    for (var slot = 0u; slot < 2u; slot++) {
        let place = (nibble >> (2u * slot)) & 3u;
        var value = st(0.0);
        if ((mask >> place) & 1u) == 1u { value = mask24_w[group * 4u + place]; }
        compress24_values[group * 2u + slot] = value;
    }
}

@group(0) @binding(0) var<storage, read> compress24_bytes: array<u32>;
@group(0) @binding(2) var<storage, read_write> compress24_words: array<u32>;

// One word of four kept bytes: two groups.
@compute @workgroup_size(64)
fn compress24_i8_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let word = linear_id(gid, 64u);
    let groups = sparse24.n * sparse24.k / 4u;
    if 2u * word >= groups { return; }
    var packed = 0u;
    for (var half = 0u; half < 2u && 2u * word + half < groups; half++) {
        let group = 2u * word + half;
        let mask = group_mask(group * 4u);
        let nibble = nibble_of(mask);
        for (var slot = 0u; slot < 2u; slot++) {
            let place = (nibble >> (2u * slot)) & 3u;
            let byte = (compress24_bytes[group] >> (8u * place)) & 0xffu;
            if ((mask >> place) & 1u) == 1u { packed |= byte << (16u * half + 8u * slot); }
        }
    }
    compress24_words[word] = packed;
}

@group(0) @binding(0) var<storage, read> meta24_mask: array<E>;
@group(0) @binding(1) var<storage, read_write> meta24: array<u32>;

@compute @workgroup_size(64)
fn compress24_meta(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let words = (sparse24.k + 31u) / 32u;
    if id >= sparse24.n * words { return; }
    let row = id / words;
    var packed = 0u;
    for (var g = 0u; g < 8u; g++) {
        let column = (id % words) * 32u + g * 4u;
        if column < sparse24.k {
            let at = row * sparse24.k + column;
            let mask = one_bit(meta24_mask[at]) | (one_bit(meta24_mask[at + 1u]) << 1u) | (one_bit(meta24_mask[at + 2u]) << 2u)
                | (one_bit(meta24_mask[at + 3u]) << 3u);
            packed |= nibble_of(mask) << (4u * g);
        }
    }
    meta24[id] = packed;
}

@group(0) @binding(0) var<storage, read> decompress24_values: array<E>;
@group(0) @binding(0) var<storage, read> decompress24_bytes: array<u32>;
@group(0) @binding(1) var<storage, read> places24: array<u32>;
@group(0) @binding(2) var<storage, read_write> decompress24_w: array<E>;
@group(0) @binding(2) var<storage, read_write> decompress24_words: array<u32>;

// The four meta bits of group `group` of the whole matrix.
fn nibble_at(group: u32) -> u32 {
    let groups = sparse24.k / 4u;
    let g = group % groups;
    return (places24[(group / groups) * ((sparse24.k + 31u) / 32u) + g / 8u] >> (4u * (g % 8u))) & 15u;
}

@compute @workgroup_size(64)
fn decompress24_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let group = linear_id(gid, 64u);
    if group >= sparse24.n * sparse24.k / 4u { return; }
    let nibble = nibble_at(group);
    for (var place = 0u; place < 4u; place++) {
        var value = st(0.0);
        if place == (nibble & 3u) { value = decompress24_values[2u * group]; }
        if place == (nibble >> 2u) { value = decompress24_values[2u * group + 1u]; }
        decompress24_w[4u * group + place] = value;
    }
}

@compute @workgroup_size(64)
fn decompress24_i8_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let group = linear_id(gid, 64u);
    if group >= sparse24.n * sparse24.k / 4u { return; }
    let nibble = nibble_at(group);
    let pair = decompress24_bytes[group / 2u] >> (16u * (group & 1u));
    decompress24_words[group] = ((pair & 0xffu) << (8u * (nibble & 3u))) | (((pair >> 8u) & 0xffu) << (8u * (nibble >> 2u)));
}

@compute @workgroup_size(64)
fn gather24_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let group = linear_id(gid, 64u);
    if group >= sparse24.n * sparse24.k / 4u { return; }
    let nibble = nibble_at(group);
    decompress24_w[2u * group] = decompress24_values[4u * group + (nibble & 3u)];
    decompress24_w[2u * group + 1u] = decompress24_values[4u * group + (nibble >> 2u)];
}
