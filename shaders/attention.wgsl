// op:       attention, attention_bwd
// math:     y = softmax(scale q k^T + bias) v over the visible keys; lse = log sum exp of the scores
//           P = exp(scores - lse), delta = rowsum(dy y), dS = P (dy v^T - delta)
//           dv = P^T dy, dq = scale dS k, dk = scale dS^T q, dbias = sum over b of dS
// grad:     attention_bwd_rows, then attention_bwd_q, attention_bwd_kv and attention_bwd_bias
// shapes:   slots of fwd: q[B,T,H,D], k[B,S,H,D], v[B,S,H,D], context[B], lengths[B], bias[H,T,S], y[B,T,H,D], lse[B,H,T];
//           part: q, k, v, context, lengths, bias, state[B,H,T,D+2]; finish: state, y, lse
//           bwd_rows: y, dy, lse, context, lengths, stats[B,H,T,3]; bwd_q: q, k, v, bias, dy, stats, dq (bwd_q_part: total[B,T,H,D]);
//           bwd_kv: q, k, v, bias, dy, stats, dk, dv (bwd_kv_part: total[2,B,S,H,D]); bwd_bias: q, k, v, bias, dy, stats, dbias;
//           bwd_store: total, one of dq, dk, dv
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
    first: u32, last: u32, // range of keys, queries or elements of this launch
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
            let origin = (row.h * at.queries + row.n) * at.keys;
            score += vec4<f32>(ld(at_bias[origin + key.x]), ld(at_bias[origin + key.y]), ld(at_bias[origin + key.z]), ld(at_bias[origin + key.w]));
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

@group(0) @binding(0) var<storage, read> at_y_in: array<E>;
@group(0) @binding(1) var<storage, read> at_dy_in: array<E>;
@group(0) @binding(2) var<storage, read> at_lse_in: array<f32>;
@group(0) @binding(5) var<storage, read_write> at_stats_out: array<f32>;

// What the other entries need of a query row: lse, delta, and how many keys it sees (exact: below 2^24).
@compute @workgroup_size(64)
fn attention_bwd_rows(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= at.batch * at.heads * at.queries { return; }
    let row = row_of(item, at.queries);
    var delta = 0.0;
    for (var d = 0u; d < at.dim; d++) { delta += ld(at_y_in[row.start + d]) * ld(at_dy_in[row.start + d]); }
    at_stats_out[item * 3u] = at_lse_in[item];
    at_stats_out[item * 3u + 1u] = delta;
    at_stats_out[item * 3u + 2u] = f32(visible_keys(row.b, row.n));
}

@group(0) @binding(3) var<storage, read> at_bias_bwd: array<E>;
@group(0) @binding(4) var<storage, read> at_dy: array<E>;
@group(0) @binding(5) var<storage, read> at_stats: array<f32>;
@group(0) @binding(6) var<storage, read_write> at_dq: array<E>;
@group(0) @binding(6) var<storage, read_write> at_total: array<f32>;
@group(0) @binding(6) var<storage, read_write> at_dk: array<E>;
@group(0) @binding(7) var<storage, read_write> at_dv: array<E>;
@group(0) @binding(6) var<storage, read_write> at_dbias: array<E>;

// A second row and sum beside at_row and at_sum: dy of a query, or v and dv of a key.
var<private> at_row2: array<f32, DIM>;
var<private> at_sum2: array<f32, DIM>;

fn load4_q(r: vec4<u32>, d: u32) -> vec4<f32> {
    return vec4<f32>(ld(at_q[r.x + d]), ld(at_q[r.y + d]), ld(at_q[r.z + d]), ld(at_q[r.w + d]));
}
fn load4_dy(r: vec4<u32>, d: u32) -> vec4<f32> {
    return vec4<f32>(ld(at_dy[r.x + d]), ld(at_dy[r.y + d]), ld(at_dy[r.z + d]), ld(at_dy[r.w + d]));
}
fn bias4(r: vec4<u32>) -> vec4<f32> {
    if (at.flags & 8u) == 0u { return vec4<f32>(0.0); }
    return vec4<f32>(ld(at_bias_bwd[r.x]), ld(at_bias_bwd[r.y]), ld(at_bias_bwd[r.z]), ld(at_bias_bwd[r.w]));
}

// dq / scale of one query row over keys first..last, added to at_sum.
fn query_gradient(row: Row, item: u32) {
    let stride = at.heads * at.dim;
    let base = row.b * at.keys * stride + row.h * at.dim;
    let origin = (row.h * at.queries + row.n) * at.keys;
    let lse = at_stats[item * 3u];
    let delta = at_stats[item * 3u + 1u];
    let n = u32(at_stats[item * 3u + 2u]);
    for (var s = at.first; s < min(n, at.last); s += 4u) {
        let key = min(vec4<u32>(s, s + 1u, s + 2u, s + 3u), vec4<u32>(n - 1u));
        let live = vec4<u32>(s, s + 1u, s + 2u, s + 3u) < vec4<u32>(n);
        let r = base + key * stride;
        var score = bias4(origin + key);
        var dp = vec4<f32>(-delta);
        var d = 0u;
        for (; d + 2u <= at.dim; d += 2u) {
            score += at_row[d] * load4_k(r, d) + at_row[d + 1u] * load4_k(r, d + 1u);
            dp += at_row2[d] * load4_v(r, d) + at_row2[d + 1u] * load4_v(r, d + 1u);
        }
        if d < at.dim { score += at_row[d] * load4_k(r, d); dp += at_row2[d] * load4_v(r, d); }
        let ds = select(vec4<f32>(0.0), exp(score - lse) * dp, live);
        d = 0u;
        for (; d + 2u <= at.dim; d += 2u) {
            at_sum[d] += dot(ds, load4_k(r, d));
            at_sum[d + 1u] += dot(ds, load4_k(r, d + 1u));
        }
        if d < at.dim { at_sum[d] += dot(ds, load4_k(r, d)); }
    }
}

fn load_query_gradient(start: u32) {
    for (var d = 0u; d < at.dim; d++) {
        at_row[d] = ld(at_q[start + d]) * at.scale;
        at_row2[d] = ld(at_dy[start + d]);
        at_sum[d] = 0.0;
    }
}

@compute @workgroup_size(64)
fn attention_bwd_q(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= at.batch * at.heads * at.queries { return; }
    let row = row_of(item, at.queries);
    load_query_gradient(row.start);
    query_gradient(row, item);
    for (var d = 0u; d < at.dim; d++) { at_dq[row.start + d] = st(at_sum[d] * at.scale); }
}

// One range of keys; the first launch sets the sum.
@compute @workgroup_size(64)
fn attention_bwd_q_part(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= at.batch * at.heads * at.queries { return; }
    let row = row_of(item, at.queries);
    load_query_gradient(row.start);
    query_gradient(row, item);
    for (var d = 0u; d < at.dim; d++) {
        var sum = at_sum[d] * at.scale;
        if at.first > 0u { sum += at_total[row.start + d]; }
        at_total[row.start + d] = sum;
    }
}

// dk and dv of one key row over queries first..last, added to at_sum and at_sum2.
fn key_gradient(row: Row) {
    let stride = at.heads * at.dim;
    let base = row.b * at.queries * stride + row.h * at.dim;
    let stats = (row.b * at.heads + row.h) * at.queries;
    for (var t = at.first; t < at.last; t += 4u) {
        let query = min(vec4<u32>(t, t + 1u, t + 2u, t + 3u), vec4<u32>(at.queries - 1u));
        let i = (stats + query) * 3u;
        // Rows past the end repeat the last query and must not count; the others count where they see this key.
        let seen = vec4<f32>(at_stats[i.x + 2u], at_stats[i.y + 2u], at_stats[i.z + 2u], at_stats[i.w + 2u]);
        let live = (vec4<f32>(f32(row.n)) < seen) & (vec4<u32>(t, t + 1u, t + 2u, t + 3u) < vec4<u32>(at.last));
        if !any(live) { continue; }
        let r = base + query * stride;
        var score = bias4((row.h * at.queries + query) * at.keys + row.n);
        score -= vec4<f32>(at_stats[i.x], at_stats[i.y], at_stats[i.z], at_stats[i.w]);
        var dp = -vec4<f32>(at_stats[i.x + 1u], at_stats[i.y + 1u], at_stats[i.z + 1u], at_stats[i.w + 1u]);
        var d = 0u;
        for (; d + 2u <= at.dim; d += 2u) {
            score += at_row[d] * load4_q(r, d) + at_row[d + 1u] * load4_q(r, d + 1u);
            dp += at_row2[d] * load4_dy(r, d) + at_row2[d + 1u] * load4_dy(r, d + 1u);
        }
        if d < at.dim { score += at_row[d] * load4_q(r, d); dp += at_row2[d] * load4_dy(r, d); }
        let p = select(vec4<f32>(0.0), exp(score), live);
        let ds = select(vec4<f32>(0.0), p * dp, live);
        d = 0u;
        for (; d + 2u <= at.dim; d += 2u) {
            at_sum[d] += dot(ds, load4_q(r, d));
            at_sum[d + 1u] += dot(ds, load4_q(r, d + 1u));
            at_sum2[d] += dot(p, load4_dy(r, d));
            at_sum2[d + 1u] += dot(p, load4_dy(r, d + 1u));
        }
        if d < at.dim { at_sum[d] += dot(ds, load4_q(r, d)); at_sum2[d] += dot(p, load4_dy(r, d)); }
    }
}

fn load_key_gradient(start: u32) {
    for (var d = 0u; d < at.dim; d++) {
        at_row[d] = ld(at_k[start + d]) * at.scale;
        at_row2[d] = ld(at_v[start + d]);
        at_sum[d] = 0.0;
        at_sum2[d] = 0.0;
    }
}

@compute @workgroup_size(64)
fn attention_bwd_kv(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= at.batch * at.heads * at.keys { return; }
    let row = row_of(item, at.keys);
    load_key_gradient(row.start);
    key_gradient(row);
    for (var d = 0u; d < at.dim; d++) {
        at_dk[row.start + d] = st(at_sum[d] * at.scale);
        at_dv[row.start + d] = st(at_sum2[d]);
    }
}

// One range of queries; the first launch sets the sums, dk before dv.
@compute @workgroup_size(64)
fn attention_bwd_kv_part(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= at.batch * at.heads * at.keys { return; }
    let row = row_of(item, at.keys);
    let half = at.batch * at.keys * at.heads * at.dim;
    load_key_gradient(row.start);
    key_gradient(row);
    for (var d = 0u; d < at.dim; d++) {
        var sum = at_sum[d] * at.scale;
        var sum2 = at_sum2[d];
        if at.first > 0u { sum += at_total[row.start + d]; sum2 += at_total[half + row.start + d]; }
        at_total[row.start + d] = sum;
        at_total[half + row.start + d] = sum2;
    }
}

@group(0) @binding(0) var<storage, read> at_total_in: array<f32>;
@group(0) @binding(1) var<storage, read_write> at_stored: array<E>;

// Elements first..last of the sums into storage.
@compute @workgroup_size(64)
fn attention_bwd_store(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= at.last - at.first { return; }
    at_stored[item] = st(at_total_in[at.first + item]);
}

@compute @workgroup_size(64)
fn attention_bwd_bias(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= at.heads * at.queries * at.keys { return; }
    let s = item % at.keys;
    let head = item / at.keys;
    let t = head % at.queries;
    let h = head / at.queries;
    var sum = 0.0;
    for (var b = 0u; b < at.batch; b++) {
        let i = ((b * at.heads + h) * at.queries + t) * 3u;
        if f32(s) >= at_stats[i + 2u] { continue; }
        let q = ((b * at.queries + t) * at.heads + h) * at.dim;
        let k = ((b * at.keys + s) * at.heads + h) * at.dim;
        var score = 0.0;
        var dp = 0.0;
        for (var d = 0u; d < at.dim; d++) {
            score += ld(at_q[q + d]) * ld(at_k[k + d]);
            dp += ld(at_dy[q + d]) * ld(at_v[k + d]);
        }
        let p = exp(score * at.scale + ld(at_bias_bwd[item]) - at_stats[i]);
        sum += p * (dp - at_stats[i + 1u]);
    }
    at_dbias[item] = st(sum);
}
