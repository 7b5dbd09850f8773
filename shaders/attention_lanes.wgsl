// op:       attention, attention_bwd
// math:     y = softmax(scale q k^T + bias) v over the visible keys; lse = log sum exp of the scores
//           P = exp(scores - lse), delta = rowsum(dy y), dS = scale P (dy v^T - delta); dq = dS k, dv = P^T dy, dk = dS^T q
// grad:     attention_scores of q and k and of dy and v, attention_slopes, attention_values for dq, attention_keys for dk and dv
// shapes:   slots of scores: q4[B,T,H,D], k4[B,S,H,D], scores4[B,H,T,S], context[B], lengths[B]; rows: scores4, lse[B,H,T],
//           bias[H,T,S], context, lengths; values: weights4[B,H,T,S], v4[B,S,H,D], y4[B,T,H,D], context, lengths;
//           slopes: out4[B,T,H,D], dout4[B,T,H,D], lse, context, lengths, weights, slopes4[B,H,T,S];
//           keys: weights4, x4[B,T,H,D], y4[B,S,H,D], context, lengths (4: in fours); what matmul_lanes.wgsl, joined in front, has of
//           its own: a, a4, b, b4, bias, y, sums
// layout:   contiguous; D and S are multiples of four; an absent optional input is any read argument and never read
// launch:   scores, values and keys: groups of one subgroup of eight lanes, 32x32 outputs each, z over batch and heads;
//           rows and slopes: linear over B H T, 8 a group
// cost:     4 B H T S D flops forward, 10 backward, of masked tiles none; the scores, in f32, are written twice and read three
//           times, backward two such matrices
// numerics: f32 sums in key (or query) order, maxima taken off; tiles of keys that no row of a tile sees are never loaded, what else
//           a row does not see weighs 0; a row without keys gives y = 0 and lse = MASKED
// source:   -
// rungs:    two products of matmul_lanes around a softmax in place, five backward, for drivers on which a load costs more than a
//           product

struct AttentionParams {
    batch: u32, queries: u32, keys: u32, heads: u32, dim: u32,
    flags: u32, offset: u32, scale: f32,
}
var<immediate> at: AttentionParams;

@group(0) @binding(0) var<storage, read> at_q4: array<vec4<E>>;
@group(0) @binding(1) var<storage, read> at_k4: array<vec4<E>>;
@group(0) @binding(2) var<storage, read_write> at_scores4: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> at_lse: array<f32>;
@group(0) @binding(0) var<storage, read_write> at_rows4: array<vec4<f32>>;
@group(0) @binding(0) var<storage, read> at_weights4: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> at_v4: array<vec4<E>>;
@group(0) @binding(2) var<storage, read_write> at_y4: array<vec4<E>>;
@group(0) @binding(2) var<storage, read> at_bias: array<E>;
@group(0) @binding(3) var<storage, read> at_context: array<u32>;
@group(0) @binding(4) var<storage, read> at_lengths: array<u32>;

// Every mask leaves a prefix of the keys visible: how many, for query row t. A later row sees no fewer.
fn at_visible(b: u32, t: u32) -> u32 {
    var n = at.keys;
    let mask = at.flags & 3u;
    if mask != 0u {
        var seen = t + at.offset + 1u;
        if mask == 2u { seen = max(seen, at_context[b]); }
        n = min(n, seen);
    }
    if (at.flags & 4u) != 0u { n = min(n, at_lengths[b]); }
    return n;
}

// Keys that some row of the tile of row t sees.
fn at_limit(b: u32, t: u32) -> u32 { return at_visible(b, min((t / 32u) * 32u + 31u, at.queries - 1u)); }

// Start of a head's first row in a [B, N, H, D] tensor.
fn head_start(z: u32, extent: u32) -> u32 {
    let b = z / at.heads;
    return (b * extent * at.heads + (z - b * at.heads)) * at.dim;
}

fn at_q_quad(i: vec4<u32>) -> mat4x4<f32> {
    return mat4x4<f32>(matmul_ld4(at_q4[i.x]), matmul_ld4(at_q4[i.y]), matmul_ld4(at_q4[i.z]), matmul_ld4(at_q4[i.w]));
}
fn at_k_quad(i: vec4<u32>) -> mat4x4<f32> {
    return mat4x4<f32>(matmul_ld4(at_k4[i.x]), matmul_ld4(at_k4[i.y]), matmul_ld4(at_k4[i.z]), matmul_ld4(at_k4[i.w]));
}
// What is past the last key that a tile sees counts as 0, whatever it is.
fn at_v_quad(i: vec4<u32>, seen: vec4<bool>) -> mat4x4<f32> {
    let none = vec4<f32>(0.0);
    return mat4x4<f32>(select(none, matmul_ld4(at_v4[i.x]), seen.x), select(none, matmul_ld4(at_v4[i.y]), seen.y),
        select(none, matmul_ld4(at_v4[i.z]), seen.z), select(none, matmul_ld4(at_v4[i.w]), seen.w));
}

fn put_scores(z: u32, row: u32, key: u32, c: mat4x4<f32>) {
    for (var r = 0u; r < 4u; r++) {
        if row + r < at.queries && key < at.keys { at_scores4[((z * at.queries + row + r) * at.keys + key) / 4u] = c[r] * at.scale; }
    }
}

@compute @workgroup_size(8)
fn attention_scores(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let row = group.y * 32u;
    let key = group.x * 32u + lane * 4u;
    if group.x * 32u >= at_limit(group.z / at.heads, row) { return; }
    let stride = at.heads * at.dim;
    let q = matmul_starts(true, row + lane * 4u, at.queries, head_start(group.z, at.queries), stride, 1u);
    let k = matmul_starts(true, key, at.keys, head_start(group.z, at.keys), stride, 1u);
    var t: LaneTile;
    for (var d = 0u; d < at.dim / 4u; d++) { t = lane_tile_add(t, at_q_quad(q + d), transpose(at_k_quad(k + d))); }
    put_scores(group.z, row, key, t.c0);
    put_scores(group.z, row + 4u, key, t.c1);
    put_scores(group.z, row + 8u, key, t.c2);
    put_scores(group.z, row + 12u, key, t.c3);
    put_scores(group.z, row + 16u, key, t.c4);
    put_scores(group.z, row + 20u, key, t.c5);
    put_scores(group.z, row + 24u, key, t.c6);
    put_scores(group.z, row + 28u, key, t.c7);
}

fn at_largest(x: vec4<f32>) -> f32 { return max(max(x.x, x.y), max(x.z, x.w)); }

// A row's scores of four keys, hidden ones far below all others.
fn at_scored(first: u32, s: u32, n: u32, bias: u32) -> vec4<f32> {
    let key = vec4<u32>(4u * s, 4u * s + 1u, 4u * s + 2u, 4u * s + 3u);
    var x = at_rows4[first + s];
    if (at.flags & 8u) != 0u {
        x += vec4<f32>(ld(at_bias[bias + key.x]), ld(at_bias[bias + key.y]), ld(at_bias[bias + key.z]), ld(at_bias[bias + key.w]));
    }
    return select(vec4<f32>(MASKED), x, key < vec4<u32>(n));
}

// Scores of a row become its weights.
@compute @workgroup_size(8)
fn attention_rows(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 8u);
    if item >= at.batch * at.heads * at.queries { return; }
    let head = item / at.queries;
    let row = item - head * at.queries;
    let b = head / at.heads;
    let bias = ((head - b * at.heads) * at.queries + row) * at.keys;
    let n = at_visible(b, row);
    let fours = (n + 3u) / 4u;
    let first = item * (at.keys / 4u);
    var most = MASKED;
    var sums = vec4<f32>(0.0);
    var s = 0u;
    for (; s + 4u <= fours; s += 4u) {
        let x = at_scored(first, s, n, bias);
        let y = at_scored(first, s + 1u, n, bias);
        let z = at_scored(first, s + 2u, n, bias);
        let w = at_scored(first, s + 3u, n, bias);
        let larger = max(most, at_largest(max(max(x, y), max(z, w))));
        sums = sums * exp(most - larger) + ((exp(x - larger) + exp(y - larger)) + (exp(z - larger) + exp(w - larger)));
        most = larger;
    }
    for (; s < fours; s++) {
        let x = at_scored(first, s, n, bias);
        let larger = max(most, at_largest(x));
        sums = sums * exp(most - larger) + exp(x - larger);
        most = larger;
    }
    let sum = (sums.x + sums.y) + (sums.z + sums.w);
    var inverse = 0.0;
    var lse = MASKED;
    if n > 0u { inverse = 1.0 / sum; lse = most + log(sum); }
    for (s = 0u; s < fours; s++) { at_rows4[first + s] = exp(at_scored(first, s, n, bias) - most) * inverse; }
    // What others of its tile see.
    for (; s < (at_limit(b, row) + 3u) / 4u; s++) { at_rows4[first + s] = vec4<f32>(0.0); }
    at_lse[item] = lse;
}

fn at_weights_quad(i: vec4<u32>) -> mat4x4<f32> {
    return mat4x4<f32>(at_weights4[i.x], at_weights4[i.y], at_weights4[i.z], at_weights4[i.w]);
}

// Four rows of one head of y4, which has `rows` of them.
fn put_values(z: u32, rows: u32, row: u32, column: u32, c: mat4x4<f32>) {
    let start = head_start(z, rows) + column;
    for (var r = 0u; r < 4u; r++) {
        if row + r < rows && column < at.dim {
            let y = c[r];
            at_y4[(start + (row + r) * at.heads * at.dim) / 4u] = vec4<E>(st(y.x), st(y.y), st(y.z), st(y.w));
        }
    }
}

fn put_tile(z: u32, rows: u32, row: u32, column: u32, t: LaneTile) {
    put_values(z, rows, row, column, t.c0);
    put_values(z, rows, row + 4u, column, t.c1);
    put_values(z, rows, row + 8u, column, t.c2);
    put_values(z, rows, row + 12u, column, t.c3);
    put_values(z, rows, row + 16u, column, t.c4);
    put_values(z, rows, row + 20u, column, t.c5);
    put_values(z, rows, row + 24u, column, t.c6);
    put_values(z, rows, row + 28u, column, t.c7);
}

@compute @workgroup_size(8)
fn attention_values(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let row = group.y * 32u;
    let column = group.x * 32u + lane * 4u;
    let stride = at.heads * at.dim;
    let w = matmul_starts(true, row + lane * 4u, at.queries, group.z * at.queries * at.keys, at.keys, 1u);
    let v = matmul_starts(false, column, at.dim, head_start(group.z, at.keys), 1u, stride);
    var t: LaneTile;
    let limit = at_limit(group.z / at.heads, row);
    // Four keys are one load of weights and four of values.
    for (var s = 0u; 4u * s < limit; s++) {
        let seen = vec4<u32>(4u * s, 4u * s + 1u, 4u * s + 2u, 4u * s + 3u) < vec4<u32>(limit);
        t = lane_tile_add(t, at_weights_quad(w + s), at_v_quad(v + s * stride, seen));
    }
    put_tile(group.z, at.queries, row, column, t);
}

@group(0) @binding(0) var<storage, read> at_out4: array<vec4<E>>;
@group(0) @binding(1) var<storage, read> at_dout4: array<vec4<E>>;
@group(0) @binding(2) var<storage, read> at_lse_in: array<f32>;
@group(0) @binding(5) var<storage, read_write> at_weights_out4: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> at_slopes4: array<vec4<f32>>;

// A row's scores become its weights, and dy v^T the scores' gradient, with the scale that q and k came under.
@compute @workgroup_size(8)
fn attention_slopes(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 8u);
    if item >= at.batch * at.heads * at.queries { return; }
    let head = item / at.queries;
    let row = item - head * at.queries;
    let b = head / at.heads;
    let n = at_visible(b, row);
    let start = (head_start(head, at.queries) + row * at.heads * at.dim) / 4u;
    var products = vec4<f32>(0.0);
    for (var d = 0u; d < at.dim / 4u; d++) { products += matmul_ld4(at_out4[start + d]) * matmul_ld4(at_dout4[start + d]); }
    let delta = (products.x + products.y) + (products.z + products.w);
    let lse = at_lse_in[item];
    let first = item * (at.keys / 4u);
    let none = vec4<f32>(0.0);
    var s = 0u;
    for (; 4u * s < n; s++) {
        let seen = vec4<u32>(4u * s, 4u * s + 1u, 4u * s + 2u, 4u * s + 3u) < vec4<u32>(n);
        let p = select(none, exp(at_weights_out4[first + s] - lse), seen);
        at_slopes4[first + s] = select(none, p * (at_slopes4[first + s] - delta) * at.scale, seen);
        at_weights_out4[first + s] = p;
    }
    // What others of its tile see, to the end of the last tile that was computed.
    let end = min(at.keys / 4u, (at_limit(b, row) + 31u) / 32u * 8u);
    for (; s < end; s++) {
        at_weights_out4[first + s] = none;
        at_slopes4[first + s] = none;
    }
}

@group(0) @binding(1) var<storage, read> at_x4: array<vec4<E>>;

// Past the last query both factors count as 0, whatever they are.
fn at_x_quad(i: vec4<u32>, there: vec4<bool>) -> mat4x4<f32> {
    let none = vec4<f32>(0.0);
    return mat4x4<f32>(select(none, matmul_ld4(at_x4[i.x]), there.x), select(none, matmul_ld4(at_x4[i.y]), there.y),
        select(none, matmul_ld4(at_x4[i.z]), there.z), select(none, matmul_ld4(at_x4[i.w]), there.w));
}
fn at_columns_quad(i: vec4<u32>, there: vec4<bool>) -> mat4x4<f32> {
    let none = vec4<f32>(0.0);
    return transpose(mat4x4<f32>(select(none, at_weights4[i.x], there.x), select(none, at_weights4[i.y], there.y),
        select(none, at_weights4[i.z], there.z), select(none, at_weights4[i.w], there.w)));
}

// Rows of keys: the transposed weights of all queries that see some of them times what those queries have.
@compute @workgroup_size(8)
fn attention_keys(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let row = group.y * 32u;
    let column = group.x * 32u + lane * 4u;
    let stride = at.heads * at.dim;
    let w = matmul_starts(false, row + lane * 4u, at.keys, group.z * at.queries * at.keys, 1u, at.keys);
    let x = matmul_starts(false, column, at.dim, head_start(group.z, at.queries), 1u, stride);
    // Tiles of queries above see none of these keys, and have no weights for them.
    var first = 0u;
    while first < at.queries && at_limit(group.z / at.heads, first) <= row { first += 32u; }
    var t: LaneTile;
    for (var s = first; s < at.queries; s += 4u) {
        let query = vec4<u32>(s, s + 1u, s + 2u, s + 3u);
        // Past the last query its own row is loaded, and counts as 0. A launch has more than four queries.
        let steps = min(query, vec4<u32>(at.queries - 1u)) - vec4<u32>(0u, 1u, 2u, 3u);
        let there = query < vec4<u32>(at.queries);
        t = lane_tile_add(t, at_columns_quad(w + steps * (at.keys / 4u), there), at_x_quad(x + steps * (stride / 4u), there));
    }
    put_tile(group.z, at.keys, row, column, t);
}
