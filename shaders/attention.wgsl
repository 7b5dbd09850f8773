// op:       attention, attention_bwd
// math:     y = softmax(scale q k^T + bias) v over the visible keys; lse = log sum exp of the scores
//           P = exp(scores - lse), delta = rowsum(dy y), dS = P (dy v^T - delta)
//           dv = P^T dy, dq = scale dS k, dk = scale dS^T q, dbias = sum over b of dS
// grad:     attention_bwd_rows, then attention_bwd_q, attention_bwd_kv and attention_bwd_bias
// shapes:   slots of fwd: q[B,T,H,D], k[B,S,H,D], v[B,S,H,D], context[B], lengths[B], bias[H,T,S], y[B,T,H,D], lse[B,H,T];
//           part: q, k, v, context, lengths, bias, state[B,H,T,D+2]; finish: state, y, lse
//           bwd_rows: y, dy, lse, context, lengths, stats[B,H,T,3]; bwd_q: q, k, v, bias, dy, stats, dq (bwd_q_part: sum[B,T,H,D]);
//           bwd_kv: q, k, v, bias, dy, stats, dk, dv (bwd_kv_part: sum[2,B,S,H,D]); bwd_bias: q, k, v, bias, dy, stats, dbias;
//           bwd_store: sum, one of dq, dk, dv
// layout:   contiguous; the plan puts arguments into slots, an absent optional input is any read argument and never read
// launch:   linear, 64 invocations a group: one query row (fwd, bwd_q), one key row (bwd_kv) or one pair (bwd_bias) each
// cost:     4 B H T S D flops forward, 10 backward (14 here: bwd_q and bwd_kv both recompute scores)
// numerics: f32 sums in key order, in blocks of 4; masks leave a prefix of the keys visible, hidden keys are never loaded;
//           a row without keys gives y = 0 and lse = MASKED
// source:   online softmax: Milakov and Gimelshein 2018; backward without scores in memory: Dao et al. 2022
// rungs:    v1 one row per invocation, 4 keys at a time; part: the same over a range of keys, state in f32 between launches

struct AttentionParams {
    batch: u32, queries: u32, keys: u32, heads: u32, dim: u32,
    flags: u32, offset: u32, scale: f32,
    first: u32, last: u32, // range of keys (or queries) of this launch
    from: u32,             // bwd_store: first element of the sum to store
}
var<immediate> at: AttentionParams;

@group(0) @binding(0) var<storage, read> at_q: array<E>;
@group(0) @binding(1) var<storage, read> at_k: array<E>;
@group(0) @binding(2) var<storage, read> at_v: array<E>;
@group(0) @binding(3) var<storage, read> at_context: array<u32>;
@group(0) @binding(4) var<storage, read> at_lengths: array<u32>;
@group(0) @binding(5) var<storage, read> at_bias: array<E>;
@group(0) @binding(6) var<storage, read_write> at_y: array<E>;
@group(0) @binding(7) var<storage, read_write> at_lse: array<f32>;
@group(0) @binding(6) var<storage, read_write> at_state: array<f32>;
@group(0) @binding(0) var<storage, read> at_state_in: array<f32>;
@group(0) @binding(1) var<storage, read_write> at_y_out: array<E>;
@group(0) @binding(2) var<storage, read_write> at_lse_out: array<f32>;

// Largest head dimension: rows live in private arrays.
const DIM: u32 = 128u;
var<private> at_row: array<f32, DIM>;
var<private> at_sum: array<f32, DIM>;

// Every mask leaves a prefix of the keys visible: how many, for query row t.
fn visible_keys(b: u32, t: u32) -> u32 {
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

// Item (b, h, n) with n fastest, of `extent` rows; the start of that row in a [B, N, H, D] tensor.
struct Row { b: u32, h: u32, n: u32, start: u32 }
fn row_of(item: u32, extent: u32) -> Row {
    let n = item % extent;
    let head = item / extent;
    let h = head % at.heads;
    let b = head / at.heads;
    return Row(b, h, n, ((b * extent + n) * at.heads + h) * at.dim);
}

fn load4_k(r: vec4<u32>, d: u32) -> vec4<f32> {
    return vec4<f32>(ld(at_k[r.x + d]), ld(at_k[r.y + d]), ld(at_k[r.z + d]), ld(at_k[r.w + d]));
}
fn load4_v(r: vec4<u32>, d: u32) -> vec4<f32> {
    return vec4<f32>(ld(at_v[r.x + d]), ld(at_v[r.y + d]), ld(at_v[r.z + d]), ld(at_v[r.w + d]));
}

// Scores of four key rows against the query in at_row, four elements a step.
fn dot4_k(r: vec4<u32>) -> vec4<f32> {
    var score = vec4<f32>(0.0);
    var d = 0u;
    for (; d + 4u <= at.dim; d += 4u) {
        score += at_row[d] * load4_k(r, d) + at_row[d + 1u] * load4_k(r, d + 1u);
        score += at_row[d + 2u] * load4_k(r, d + 2u) + at_row[d + 3u] * load4_k(r, d + 3u);
    }
    for (; d < at.dim; d++) { score += at_row[d] * load4_k(r, d); }
    return score;
}

// Sums, largest score and total of one query row over keys first..last of its n visible ones.
struct Online { largest: f32, total: f32 }
fn attend(row: Row, n: u32, before: Online) -> Online {
    var state = before;
    let stride = at.heads * at.dim;
    let base = row.b * at.keys * stride + row.h * at.dim;
    for (var s = at.first; s < min(n, at.last); s += 4u) {
        // Rows past the end repeat the last visible key and weigh nothing.
        let key = min(vec4<u32>(s, s + 1u, s + 2u, s + 3u), vec4<u32>(n - 1u));
        let live = vec4<u32>(s, s + 1u, s + 2u, s + 3u) < vec4<u32>(n);
        let r = base + key * stride;
        var score = dot4_k(r);
        if (at.flags & 8u) != 0u {
            let from = (row.h * at.queries + row.n) * at.keys;
            score += vec4<f32>(ld(at_bias[from + key.x]), ld(at_bias[from + key.y]), ld(at_bias[from + key.z]), ld(at_bias[from + key.w]));
        }
        score = select(vec4<f32>(MASKED), score, live);
        let largest = max(state.largest, max(max(score.x, score.y), max(score.z, score.w)));
        let correction = exp(state.largest - largest);
        let p = select(vec4<f32>(0.0), exp(score - largest), live);
        state = Online(largest, state.total * correction + p.x + p.y + p.z + p.w);
        var d = 0u;
        for (; d + 4u <= at.dim; d += 4u) {
            at_sum[d] = at_sum[d] * correction + dot(p, load4_v(r, d));
            at_sum[d + 1u] = at_sum[d + 1u] * correction + dot(p, load4_v(r, d + 1u));
            at_sum[d + 2u] = at_sum[d + 2u] * correction + dot(p, load4_v(r, d + 2u));
            at_sum[d + 3u] = at_sum[d + 3u] * correction + dot(p, load4_v(r, d + 3u));
        }
        for (; d < at.dim; d++) { at_sum[d] = at_sum[d] * correction + dot(p, load4_v(r, d)); }
    }
    return state;
}

fn load_query(start: u32) {
    for (var d = 0u; d < at.dim; d++) {
        at_row[d] = ld(at_q[start + d]) * at.scale;
        at_sum[d] = 0.0;
    }
}

@compute @workgroup_size(64)
fn attention_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= at.batch * at.heads * at.queries { return; }
    let row = row_of(item, at.queries);
    let n = visible_keys(row.b, row.n);
    load_query(row.start);
    let state = attend(row, n, Online(MASKED, 0.0));
    var inverse = 0.0;
    var lse = MASKED;
    if n > 0u { inverse = 1.0 / state.total; lse = state.largest + log(state.total); }
    for (var d = 0u; d < at.dim; d++) { at_y[row.start + d] = st(at_sum[d] * inverse); }
    at_lse[item] = lse;
}

// One range of keys: state of an item is D sums, the largest score and the total.
@compute @workgroup_size(64)
fn attention_fwd_part(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= at.batch * at.heads * at.queries { return; }
    let row = row_of(item, at.queries);
    let n = visible_keys(row.b, row.n);
    let kept = item * (at.dim + 2u);
    load_query(row.start);
    var state = Online(MASKED, 0.0);
    if at.first > 0u {
        for (var d = 0u; d < at.dim; d++) { at_sum[d] = at_state[kept + d]; }
        state = Online(at_state[kept + at.dim], at_state[kept + at.dim + 1u]);
    }
    state = attend(row, n, state);
    for (var d = 0u; d < at.dim; d++) { at_state[kept + d] = at_sum[d]; }
    at_state[kept + at.dim] = state.largest;
    at_state[kept + at.dim + 1u] = state.total;
}

@compute @workgroup_size(64)
fn attention_fwd_finish(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= at.batch * at.heads * at.queries { return; }
    let row = row_of(item, at.queries);
    let kept = item * (at.dim + 2u);
    let total = at_state_in[kept + at.dim + 1u];
    var inverse = 0.0;
    var lse = MASKED;
    // The largest score of a row with keys weighs 1, so its total is at least 1; a NaN total must get through.
    if total != 0.0 { inverse = 1.0 / total; lse = at_state_in[kept + at.dim] + log(total); }
    for (var d = 0u; d < at.dim; d++) { at_y_out[row.start + d] = st(at_state_in[kept + d] * inverse); }
    at_lse_out[item] = lse;
}
