// op:       linear_cross_entropy, linear_kl, their backward, linear_predict
// math:     z = hidden weightᵀ, one tile of tokens and words at a time; per row a running maximum and sums (softmax.wgsl,
//           distill.wgsl hold the losses' formulas); backward: z again, dz in its place, dhidden += dz weight, dweight += dzᵀ hidden
// grad:     linear_cross_entropy_bwd, linear_kl_bwd
// shapes:   tile_logits: a[R,D] (hidden), b[W,D] (weight), c[C,W] (z); tile_product: dz[C,W], b[..], c[..] (sums); tile_store: sums[..], out[..]
//           entropy_tile: z[C,W], target[R], state[R,8]; entropy_done: state[R,8], target[R], loss[R], lse[R]
//           predict_done: state[R,8], target[R], prediction[R], log_probability[R]
//           entropy_slopes: z[C,W], target[R], lse[R], dloss[R]
//           kl_tile, jsd_tile: zs[C,W], zt[C,W], state[R,8]; kl_done: state[R,8], weight[R], loss[R], lse_s[R], lse_t[R], expectation[R]
//           kl_slopes: zs[C,W], zt[C,W], weight[R], lse_s[R], lse_t[R], expectation[R], row[R] (dloss)
// layout:   bindings are slots (the plan says which argument is where); W words of the head from `word` on, weight and its
//           gradient bound from there; C tokens from `row` on; z row-major f32; state: 8 f32 per row
// launch:   tile_logits, tile_product: 8x8 invocations, 4x4 outputs each; rows linear, 64 a group; store and slopes linear, 4 elements each
// cost:     2 N V D flops per product: 1 forward, 3 backward (teacher: 1 each)
// numerics: f32 sums in the order of the reduction; maxima taken off before exp; target 0xffffffff: loss and gradient 0; target of V or more: NaN
// source:   chunked cross-entropy: Wijmans et al. 2024 (CCE); Hinton et al. 2015
// rungs:    v1 register tiles of 4x4, rows by one invocation

struct LinearParams {
    // tile_*: extents m, n, k and strides; rows: tokens, words of the tile, vocabulary.
    m: u32, n: u32, k: u32,
    a_start: u32, a_row: u32, a_k: u32,
    b_start: u32, b_column: u32, b_k: u32,
    c_start: u32, c_row: u32,
    // tile_product: add to c; rows: first token of the chunk.
    add: u32,
    // rows: first word of the tile, direction, smoothing or beta, 1 / temperature
    word: u32, direction: u32, factor: f32, inverse: f32,
}
var<immediate> linear: LinearParams;

const IGNORE: u32 = 0xffffffffu;
const BLOCK: u32 = 32u;

@group(0) @binding(0) var<storage, read> tile_a: array<E>;
@group(0) @binding(0) var<storage, read> tile_dz: array<f32>;
@group(0) @binding(1) var<storage, read> tile_b: array<E>;
@group(0) @binding(2) var<storage, read_write> tile_c: array<f32>;
@group(0) @binding(1) var<storage, read_write> tile_out: array<E>;

// Four columns of b at reduction index k; columns past the edge repeat the last one and are not stored.
fn b_four(k: u32, j: vec4<u32>) -> vec4<f32> {
    let at = vec4<u32>(linear.b_start + k * linear.b_k) + j * linear.b_column;
    return vec4<f32>(ld(tile_b[at.x]), ld(tile_b[at.y]), ld(tile_b[at.z]), ld(tile_b[at.w]));
}

fn store_row(i: u32, j: vec4<u32>, values: vec4<f32>, first: u32) {
    if i >= linear.m { return; }
    let base = linear.c_start + i * linear.c_row;
    for (var c = 0u; c < 4u; c++) {
        if first + c < linear.n {
            if linear.add != 0u { tile_c[base + j[c]] += values[c]; } else { tile_c[base + j[c]] = values[c]; }
        }
    }
}

@compute @workgroup_size(8, 8)
fn tile_logits(@builtin(global_invocation_id) gid: vec3<u32>) {
    if gid.x * 4u >= linear.n || gid.y * 4u >= linear.m { return; }
    let i = min(vec4<u32>(gid.y * 4u) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(linear.m - 1u));
    let j = min(vec4<u32>(gid.x * 4u) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(linear.n - 1u));
    let a = vec4<u32>(linear.a_start) + i * linear.a_row;
    var c0 = vec4<f32>(0.0); var c1 = vec4<f32>(0.0); var c2 = vec4<f32>(0.0); var c3 = vec4<f32>(0.0);
    for (var k = 0u; k < linear.k; k++) {
        let b = b_four(k, j);
        let at = a + vec4<u32>(k * linear.a_k);
        c0 += ld(tile_a[at.x]) * b;
        c1 += ld(tile_a[at.y]) * b;
        c2 += ld(tile_a[at.z]) * b;
        c3 += ld(tile_a[at.w]) * b;
    }
    let first = gid.x * 4u;
    store_row(gid.y * 4u, j, c0, first);
    store_row(gid.y * 4u + 1u, j, c1, first);
    store_row(gid.y * 4u + 2u, j, c2, first);
    store_row(gid.y * 4u + 3u, j, c3, first);
}

// As tile_logits, from the f32 gradient of a tile.
@compute @workgroup_size(8, 8)
fn tile_product(@builtin(global_invocation_id) gid: vec3<u32>) {
    if gid.x * 4u >= linear.n || gid.y * 4u >= linear.m { return; }
    let i = min(vec4<u32>(gid.y * 4u) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(linear.m - 1u));
    let j = min(vec4<u32>(gid.x * 4u) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(linear.n - 1u));
    let a = vec4<u32>(linear.a_start) + i * linear.a_row;
    var c0 = vec4<f32>(0.0); var c1 = vec4<f32>(0.0); var c2 = vec4<f32>(0.0); var c3 = vec4<f32>(0.0);
    for (var k = 0u; k < linear.k; k++) {
        let b = b_four(k, j);
        let at = a + vec4<u32>(k * linear.a_k);
        c0 += tile_dz[at.x] * b;
        c1 += tile_dz[at.y] * b;
        c2 += tile_dz[at.z] * b;
        c3 += tile_dz[at.w] * b;
    }
    let first = gid.x * 4u;
    store_row(gid.y * 4u, j, c0, first);
    store_row(gid.y * 4u + 1u, j, c1, first);
    store_row(gid.y * 4u + 2u, j, c2, first);
    store_row(gid.y * 4u + 3u, j, c3, first);
}

@compute @workgroup_size(64)
fn tile_store(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    for (var i = first; i < min(first + 4u, linear.m); i++) { tile_out[i] = st(tile_dz[i]); }
}

// --- cross-entropy. linear.m tokens from linear.add on, linear.n words from linear.word on, linear.k words in all.
@group(0) @binding(0) var<storage, read> row_z: array<f32>;
@group(0) @binding(1) var<storage, read> row_target: array<u32>;
// Cross-entropy: maximum, sum of exp, sum, target's logit, index of the maximum (exact below 2^24). Divergences: maximum and sum of exp
// of student and of teacher, sum of the difference, sums of p log(p/m) and q log(q/m).
@group(0) @binding(2) var<storage, read_write> row_state: array<f32>;
@group(0) @binding(0) var<storage, read> done_state: array<f32>;
@group(0) @binding(2) var<storage, read_write> done_loss: array<f32>;
@group(0) @binding(2) var<storage, read_write> done_prediction: array<u32>;
@group(0) @binding(3) var<storage, read_write> done_lse: array<f32>;
@group(0) @binding(0) var<storage, read_write> slope_z: array<f32>;
@group(0) @binding(2) var<storage, read> slope_lse: array<f32>;
@group(0) @binding(3) var<storage, read> slope_dloss: array<f32>;

@compute @workgroup_size(64)
fn entropy_tile(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= linear.m { return; }
    let row = linear.add + i;
    let s = row * 8u;
    var most = -3.4e38; var exps = 0.0; var total = 0.0; var z_target = 0.0; var best = 0u;
    if linear.word != 0u {
        most = row_state[s]; exps = row_state[s + 1u]; total = row_state[s + 2u]; z_target = row_state[s + 3u];
        best = u32(row_state[s + 4u]);
    }
    let base = i * linear.n;
    let before = most;
    for (var j = 0u; j < linear.n; j++) {
        let z = row_z[base + j];
        // Strictly larger: the lowest index wins ties.
        if z > most { most = z; best = linear.word + j; }
    }
    exps *= exp(before - most);
    for (var begin = 0u; begin < linear.n; begin += BLOCK) {
        var part = 0.0; var sum = 0.0;
        for (var j = begin; j < min(begin + BLOCK, linear.n); j++) {
            let z = row_z[base + j];
            part += exp(z - most);
            sum += z;
        }
        exps += part;
        total += sum;
    }
    let t = row_target[row] - linear.word;
    if row_target[row] >= linear.word && t < linear.n { z_target = row_z[base + t]; }
    row_state[s] = most; row_state[s + 1u] = exps; row_state[s + 2u] = total; row_state[s + 3u] = z_target;
    row_state[s + 4u] = f32(best);
}

@compute @workgroup_size(64)
fn entropy_done(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= linear.m { return; }
    let t = row_target[row];
    if t == IGNORE { done_loss[row] = 0.0; done_lse[row] = 0.0; return; }
    let s = row * 8u;
    let lse = done_state[s] + log(done_state[s + 1u]);
    done_lse[row] = lse;
    if t >= linear.k {
        // Built from bits at run time: compilers may assume that no NaN exists.
        done_loss[row] = bitcast<f32>(0x7fc00000u | (t & 1u));
        return;
    }
    done_loss[row] = lse - (1.0 - linear.factor) * done_state[s + 3u] - linear.factor * (done_state[s + 2u] / f32(linear.k));
}

@compute @workgroup_size(64)
fn predict_done(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= linear.m { return; }
    let s = row * 8u;
    done_prediction[row] = u32(done_state[s + 4u]);
    let t = row_target[row];
    if t == IGNORE { done_lse[row] = 0.0; return; }
    if t >= linear.k { done_lse[row] = bitcast<f32>(0x7fc00000u | (t & 1u)); return; }
    done_lse[row] = done_state[s + 3u] - done_state[s] - log(done_state[s + 1u]);
}

@compute @workgroup_size(64)
fn entropy_slopes(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    let smoothing = linear.factor;
    for (var e = first; e < min(first + 4u, linear.m * linear.n); e++) {
        let i = e / linear.n;
        let row = linear.add + i;
        let t = row_target[row];
        var slope = exp(slope_z[e] - slope_lse[row]) - smoothing / f32(linear.k);
        if t == linear.word + e - i * linear.n { slope -= 1.0 - smoothing; }
        slope_z[e] = select(slope_dloss[row] * slope, 0.0, t == IGNORE);
    }
}

// --- divergences
@group(0) @binding(1) var<storage, read> row_zt: array<f32>;
@group(0) @binding(1) var<storage, read> kl_weight: array<f32>;
@group(0) @binding(4) var<storage, read_write> kl_lse_t: array<f32>;
@group(0) @binding(5) var<storage, read_write> kl_expectation: array<f32>;
@group(0) @binding(2) var<storage, read> slope_weight: array<f32>;
@group(0) @binding(3) var<storage, read> slope_lse_s: array<f32>;
@group(0) @binding(4) var<storage, read> slope_lse_t: array<f32>;
@group(0) @binding(5) var<storage, read> slope_expectation: array<f32>;
@group(0) @binding(6) var<storage, read> slope_row: array<f32>;

// log(beta p + (1 - beta) q) from logarithms.
fn log_mixture(log_p: f32, log_q: f32) -> f32 {
    let p = log_p + log(linear.factor);
    let q = log_q + log(1.0 - linear.factor);
    return max(p, q) + log(1.0 + exp(-abs(p - q)));
}

fn state_pair(s: u32) -> vec2<f32> { return vec2<f32>(row_state[s], row_state[s + 1u]); }

@compute @workgroup_size(64)
fn kl_tile(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= linear.m { return; }
    let s = (linear.add + i) * 8u;
    var most = vec2<f32>(-3.4e38); var exps = vec2<f32>(0.0); var difference = 0.0;
    if linear.word != 0u { most = state_pair(s); exps = state_pair(s + 2u); difference = row_state[s + 4u]; }
    let base = i * linear.n;
    let before = most;
    for (var j = 0u; j < linear.n; j++) { most = max(most, vec2<f32>(row_z[base + j], row_zt[base + j]) * linear.inverse); }
    let shrink = exp(before - most);
    exps *= shrink;
    difference *= select(shrink.y, shrink.x, linear.direction == 1u);
    for (var begin = 0u; begin < linear.n; begin += BLOCK) {
        var part = vec3<f32>(0.0);
        for (var j = begin; j < min(begin + BLOCK, linear.n); j++) {
            let z = vec2<f32>(row_z[base + j], row_zt[base + j]) * linear.inverse;
            let e = exp(z - most);
            part += vec3<f32>(e, select(e.y * (z.y - z.x), e.x * (z.x - z.y), linear.direction == 1u));
        }
        exps += part.xy;
        difference += part.z;
    }
    row_state[s] = most.x; row_state[s + 1u] = most.y; row_state[s + 2u] = exps.x; row_state[s + 3u] = exps.y;
    row_state[s + 4u] = difference;
}

@compute @workgroup_size(64)
fn jsd_tile(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= linear.m { return; }
    let s = (linear.add + i) * 8u;
    let lse = state_pair(s) + log(state_pair(s + 2u));
    var sums = vec2<f32>(0.0);
    if linear.word != 0u { sums = state_pair(s + 5u); }
    let base = i * linear.n;
    for (var begin = 0u; begin < linear.n; begin += BLOCK) {
        var part = vec2<f32>(0.0);
        for (var j = begin; j < min(begin + BLOCK, linear.n); j++) {
            let z = vec2<f32>(row_z[base + j], row_zt[base + j]) * linear.inverse - lse;
            let m = log_mixture(z.y, z.x);
            part += vec2<f32>(exp(z.y) * (z.y - m), exp(z.x) * (z.x - m));
        }
        sums += part;
    }
    row_state[s + 5u] = sums.x; row_state[s + 6u] = sums.y;
}

// linear.a_start holds the bits of the loss's factor (T squared or 1).
@compute @workgroup_size(64)
fn kl_done(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= linear.m { return; }
    let s = row * 8u;
    let most = vec2<f32>(done_state[s], done_state[s + 1u]);
    let exps = vec2<f32>(done_state[s + 2u], done_state[s + 3u]);
    // The logarithm of the sums' quotient: a small divergence is a difference of large terms.
    let apart = (most.x - most.y) + log(exps.x / exps.y);
    var value = 0.0;
    var expectation = 0.0;
    if linear.direction == 0u { value = done_state[s + 4u] / exps.y + apart; }
    if linear.direction == 1u { value = done_state[s + 4u] / exps.x - apart; expectation = value; }
    if linear.direction == 2u {
        expectation = (1.0 - linear.factor) * done_state[s + 6u];
        value = linear.factor * done_state[s + 5u] + expectation;
    }
    let lse = most + log(exps);
    done_loss[row] = kl_weight[row] * bitcast<f32>(linear.a_start) * value;
    done_lse[row] = lse.x;
    kl_lse_t[row] = lse.y;
    kl_expectation[row] = expectation;
}

@compute @workgroup_size(64)
fn kl_slopes(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    let factor = bitcast<f32>(linear.a_start) * linear.inverse;
    for (var e = first; e < min(first + 4u, linear.m * linear.n); e++) {
        let row = linear.add + e / linear.n;
        let z = vec2<f32>(slope_z[e], row_zt[e]) * linear.inverse - vec2<f32>(slope_lse_s[row], slope_lse_t[row]);
        var slope = exp(z.x);
        if linear.direction == 0u { slope -= exp(z.y); }
        if linear.direction == 1u { slope *= z.x - z.y - slope_expectation[row]; }
        if linear.direction == 2u { slope *= (1.0 - linear.factor) * (z.x - log_mixture(z.y, z.x)) - slope_expectation[row]; }
        slope_z[e] = slope_row[row] * slope_weight[row] * factor * slope;
    }
}
