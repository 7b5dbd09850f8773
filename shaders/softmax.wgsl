// op:       softmax, log_softmax and their backward, cross_entropy, cross_entropy_bwd
// math:     softmax: y = exp(x - lse); log: y = x - lse; lse = max + log(sum exp(x - max))
//           softmax_bwd: dx = y (dy - sum(dy y)); log: dx = dy - exp(y) sum(dy)
//           cross_entropy: loss = lse - (1 - s) z_t - s mean(z); bwd: dz = dloss (exp(z - lse) - (1 - s) onehot - s / V)
// grad:     softmax_bwd, cross_entropy_bwd
// shapes:   softmax: x[R,V], y[R,V] (x4, y4: the same in fours); softmax_bwd: y[R,V], dy[R,V], dx[R,V]
//           cross_entropy: z[R,V], target[R], loss[R], lse[R]; cross_entropy_bwd: z[R,V], target[R], saved[R] (lse), dloss[R], dz[R,V]
// layout:   row-major
// launch:   v1: linear over rows, 64 a group (fours: 8); v2: one group of 128 per row; cross_entropy_bwd: linear over elements, 4 each
// cost:     5 R V flops; every element once
// numerics: f32, maximum taken off first; NaN rows stay NaN; target 0xffffffff: loss, lse and dz are 0; a target of V or more: NaN loss
// source:   label smoothing: Szegedy et al. 2016
// rungs:    v1 a row per invocation, three passes; v2 a row per workgroup, tree reductions in shared memory;
//           fours: a row per invocation, sixteen elements at a time, maximum and sum in one pass

struct SoftmaxParams { rows: u32, v: u32, log: u32, smoothing: f32 }
var<immediate> softmax: SoftmaxParams;

const GROUP: u32 = 128u;
const BLOCK: u32 = 32u;
const IGNORE: u32 = 0xffffffffu;

@group(0) @binding(0) var<storage, read> softmax_x: array<E>;
@group(0) @binding(1) var<storage, read_write> softmax_y: array<E>;
@group(0) @binding(1) var<storage, read> softmax_dy: array<E>;
@group(0) @binding(2) var<storage, read_write> softmax_dx: array<E>;

@group(0) @binding(1) var<storage, read> entropy_target: array<u32>;
@group(0) @binding(2) var<storage, read_write> entropy_loss: array<f32>;
@group(0) @binding(3) var<storage, read_write> entropy_lse: array<f32>;
@group(0) @binding(2) var<storage, read> entropy_saved: array<f32>;
@group(0) @binding(3) var<storage, read> entropy_dloss: array<f32>;
@group(0) @binding(4) var<storage, read_write> entropy_dz: array<E>;

var<workgroup> softmax_tile: array<f32, GROUP>;

fn group_sum(lane: u32, value: f32) -> f32 {
    softmax_tile[lane] = value;
    workgroupBarrier();
    for (var width = GROUP / 2u; width > 0u; width >>= 1u) {
        if lane < width { softmax_tile[lane] += softmax_tile[lane + width]; }
        workgroupBarrier();
    }
    let total = softmax_tile[0];
    // The tile is written again by the next reduction.
    workgroupBarrier();
    return total;
}

fn group_max(lane: u32, value: f32) -> f32 {
    softmax_tile[lane] = value;
    workgroupBarrier();
    for (var width = GROUP / 2u; width > 0u; width >>= 1u) {
        if lane < width { softmax_tile[lane] = max(softmax_tile[lane], softmax_tile[lane + width]); }
        workgroupBarrier();
    }
    let most = softmax_tile[0];
    workgroupBarrier();
    return most;
}

// Reductions over elements first, first + step, ... of one row; sums run in blocks against rounding.
fn x_max(row: u32, first: u32, step: u32) -> f32 {
    let base = row * softmax.v;
    var most = -3.4e38;
    for (var i = first; i < softmax.v; i += step) { most = max(most, ld(softmax_x[base + i])); }
    return most;
}

fn exp_sum(row: u32, most: f32, first: u32, step: u32) -> f32 {
    let base = row * softmax.v;
    var sum = 0.0;
    for (var begin = first; begin < softmax.v; begin += BLOCK * step) {
        var part = 0.0;
        for (var i = begin; i < min(begin + BLOCK * step, softmax.v); i += step) {
            part += exp(ld(softmax_x[base + i]) - most);
        }
        sum += part;
    }
    return sum;
}

fn x_sum(row: u32, first: u32, step: u32) -> f32 {
    let base = row * softmax.v;
    var sum = 0.0;
    for (var begin = first; begin < softmax.v; begin += BLOCK * step) {
        var part = 0.0;
        for (var i = begin; i < min(begin + BLOCK * step, softmax.v); i += step) { part += ld(softmax_x[base + i]); }
        sum += part;
    }
    return sum;
}

fn y_store(row: u32, most: f32, sum: f32, first: u32, step: u32) {
    let base = row * softmax.v;
    for (var i = first; i < softmax.v; i += step) {
        let x = ld(softmax_x[base + i]) - most;
        if softmax.log != 0u { softmax_y[base + i] = st(x - log(sum)); } else { softmax_y[base + i] = st(exp(x) / sum); }
    }
}

@compute @workgroup_size(64)
fn softmax_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= softmax.rows { return; }
    let most = x_max(row, 0u, 1u);
    y_store(row, most, exp_sum(row, most, 0u, 1u), 0u, 1u);
}

@compute @workgroup_size(128)
fn softmax_fwd_v2(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = linear_id(group, 1u);
    if row >= softmax.rows { return; }
    let most = group_max(lane, x_max(row, lane, GROUP));
    y_store(row, most, group_sum(lane, exp_sum(row, most, lane, GROUP)), lane, GROUP);
}

// Fours: loads and stores of four neighbours, which software drivers check once and not four times.
@group(0) @binding(0) var<storage, read> softmax_x4: array<vec4<E>>;
@group(0) @binding(1) var<storage, read_write> softmax_y4: array<vec4<E>>;

fn x_four(i: u32) -> vec4<f32> {
    let x = softmax_x4[i];
    return vec4<f32>(ld(x.x), ld(x.y), ld(x.z), ld(x.w));
}

fn max_of_four(x: vec4<f32>) -> f32 { return max(max(x.x, x.y), max(x.z, x.w)); }

// Offset is the sum's logarithm (log-softmax), factor its reciprocal.
fn y_four(i: u32, most: f32, offset: f32, factor: f32) {
    let x = x_four(i) - most;
    let y = select(exp(x) * factor, x - offset, softmax.log != 0u);
    softmax_y4[i] = vec4<E>(st(y.x), st(y.y), st(y.z), st(y.w));
}

@compute @workgroup_size(8)
fn softmax_fwd_fours(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 8u);
    if row >= softmax.rows { return; }
    let first = row * (softmax.v / 4u);
    let last = first + softmax.v / 4u;
    var most = -3.4e38;
    var sums = vec4<f32>(0.0);
    var i = first;
    for (; i + 4u <= last; i += 4u) {
        let a = x_four(i);
        let b = x_four(i + 1u);
        let c = x_four(i + 2u);
        let d = x_four(i + 3u);
        let larger = max(most, max_of_four(max(max(a, b), max(c, d))));
        sums = sums * exp(most - larger) + ((exp(a - larger) + exp(b - larger)) + (exp(c - larger) + exp(d - larger)));
        most = larger;
    }
    for (; i < last; i++) {
        let a = x_four(i);
        let larger = max(most, max_of_four(a));
        sums = sums * exp(most - larger) + exp(a - larger);
        most = larger;
    }
    let sum = (sums.x + sums.y) + (sums.z + sums.w);
    let offset = log(sum);
    let factor = 1.0 / sum;
    i = first;
    for (; i + 4u <= last; i += 4u) {
        y_four(i, most, offset, factor);
        y_four(i + 1u, most, offset, factor);
        y_four(i + 2u, most, offset, factor);
        y_four(i + 3u, most, offset, factor);
    }
    for (; i < last; i++) { y_four(i, most, offset, factor); }
}

// Backward; softmax_x is y.
fn dy_sum(row: u32, first: u32, step: u32) -> f32 {
    let base = row * softmax.v;
    var sum = 0.0;
    for (var begin = first; begin < softmax.v; begin += BLOCK * step) {
        var part = 0.0;
        for (var i = begin; i < min(begin + BLOCK * step, softmax.v); i += step) {
            part += ld(softmax_dy[base + i]) * select(ld(softmax_x[base + i]), 1.0, softmax.log != 0u);
        }
        sum += part;
    }
    return sum;
}

fn dx_store(row: u32, total: f32, first: u32, step: u32) {
    let base = row * softmax.v;
    for (var i = first; i < softmax.v; i += step) {
        let y = ld(softmax_x[base + i]);
        let dy = ld(softmax_dy[base + i]);
        if softmax.log != 0u { softmax_dx[base + i] = st(dy - exp(y) * total); } else { softmax_dx[base + i] = st(y * (dy - total)); }
    }
}

@compute @workgroup_size(64)
fn softmax_bwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= softmax.rows { return; }
    dx_store(row, dy_sum(row, 0u, 1u), 0u, 1u);
}

@compute @workgroup_size(128)
fn softmax_bwd_v2(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = linear_id(group, 1u);
    if row >= softmax.rows { return; }
    dx_store(row, group_sum(lane, dy_sum(row, lane, GROUP)), lane, GROUP);
}

// Loss of one row from its reductions; sum is only read where labels are smoothed.
fn entropy_store(row: u32, most: f32, exps: f32, sum: f32) {
    let t = entropy_target[row];
    if t == IGNORE { entropy_loss[row] = 0.0; entropy_lse[row] = 0.0; return; }
    let lse = most + log(exps);
    entropy_lse[row] = lse;
    if t >= softmax.v {
        // Built from bits at run time: compilers may assume that no NaN exists.
        entropy_loss[row] = bitcast<f32>(0x7fc00000u | (t & 1u));
        return;
    }
    let z = ld(softmax_x[row * softmax.v + t]);
    entropy_loss[row] = lse - (1.0 - softmax.smoothing) * z - softmax.smoothing * (sum / f32(softmax.v));
}

@compute @workgroup_size(64)
fn cross_entropy_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= softmax.rows { return; }
    let most = x_max(row, 0u, 1u);
    var sum = 0.0;
    if softmax.smoothing > 0.0 { sum = x_sum(row, 0u, 1u); }
    entropy_store(row, most, exp_sum(row, most, 0u, 1u), sum);
}

@compute @workgroup_size(128)
fn cross_entropy_fwd_v2(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = linear_id(group, 1u);
    if row >= softmax.rows { return; }
    let most = group_max(lane, x_max(row, lane, GROUP));
    var sum = 0.0;
    if softmax.smoothing > 0.0 { sum = group_sum(lane, x_sum(row, lane, GROUP)); }
    let exps = group_sum(lane, exp_sum(row, most, lane, GROUP));
    if lane == 0u { entropy_store(row, most, exps, sum); }
}

@compute @workgroup_size(64)
fn cross_entropy_bwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    let s = softmax.smoothing;
    for (var i = first; i < min(first + 4u, softmax.rows * softmax.v); i++) {
        let row = i / softmax.v;
        let t = entropy_target[row];
        var slope = exp(ld(softmax_x[i]) - entropy_saved[row]) - s / f32(softmax.v);
        if t == i - row * softmax.v { slope -= 1.0 - s; }
        entropy_dz[i] = st(select(entropy_dloss[row] * slope, 0.0, t == IGNORE));
    }
}
