// op:       layernorm, rmsnorm, add_layernorm, add_rmsnorm and their backward
// math:     h = x + scale r (or x); y = (h - mean) rstd w + b, rstd = 1 / sqrt(mean((h - mean)^2) + epsilon); rms: mean = 0, b = 0
//           n = (h - mean) rstd, g = dy w: dh' = rstd (g - mean(g) - n mean(g n)) + dh; dx = dh', dr = scale dh',
//           dw = sum_rows dy n, db = sum_rows dy; rms: without mean(g)
// grad:     norm_bwd, add_norm_bwd
// shapes:   layernorm: x[R,D], w[D], b[D], y[R,D] (x4, w4, b4, y4: the same in fours), mean[R], rstd[R]; rmsnorm: x[R,D], w[D], y[R,D], rstd[R]
//           add_layernorm: x[R,D], r[R,D], w[D], b[D], y[R,D], h[R,D], mean[R], rstd[R]
//           add_rmsnorm: x[R,D], r[R,D], w[D], y[R,D], h[R,D], rstd[R]
//           norm_bwd: x[R,D], w[D], mean[R], rstd[R], dy[R,D], dx[R,D], dw[D], db[D], partial[chunks,D]
//           add_norm_bwd: h[R,D], w[D], mean[R], rstd[R], dy[R,D], dh[R,D], dx[R,D], dr[R,D], dw[D], db[D], partial[chunks,D]
// layout:   row-major; partial holds (sum dy n, sum dy) of 64 rows
// launch:   v1: linear over rows, 64 a group (fours: 8); v2: one group of 128 per row; partial: linear over chunks x D; total: linear over D
// cost:     8 R D flops forward, 15 R D backward; every element of x, r, dy, dh, y, h, dx, dr once
// numerics: f32; centred second pass for the variance; y from the unrounded h; NaN rows stay NaN
// source:   Ba, Kiros and Hinton 2016; Zhang and Sennrich 2019
// rungs:    v1 a row per invocation, three passes; v2 a row per workgroup, tree sums in shared memory;
//           fours (layernorm): a row per invocation, sixteen elements at a time, both moments in one pass

struct NormParams { rows: u32, d: u32, epsilon: f32, scale: f32, rms: u32, joined: u32, chunks: u32 }
var<immediate> norm: NormParams;

const GROUP: u32 = 128u;
const CHUNK: u32 = 64u;
const BLOCK: u32 = 32u;

@group(0) @binding(0) var<storage, read> norm_x: array<E>;
@group(0) @binding(1) var<storage, read> norm_w: array<E>;
@group(0) @binding(2) var<storage, read> norm_b: array<E>;
@group(0) @binding(3) var<storage, read_write> layer_y: array<E>;
@group(0) @binding(4) var<storage, read_write> layer_mean: array<f32>;
@group(0) @binding(5) var<storage, read_write> layer_rstd: array<f32>;
@group(0) @binding(2) var<storage, read_write> rms_y: array<E>;
@group(0) @binding(3) var<storage, read_write> rms_rstd: array<f32>;

@group(0) @binding(1) var<storage, read> add_r: array<E>;
@group(0) @binding(2) var<storage, read> add_w: array<E>;
@group(0) @binding(3) var<storage, read> add_b: array<E>;
@group(0) @binding(4) var<storage, read_write> add_layer_y: array<E>;
@group(0) @binding(5) var<storage, read_write> add_layer_h: array<E>;
@group(0) @binding(6) var<storage, read_write> add_layer_mean: array<f32>;
@group(0) @binding(7) var<storage, read_write> add_layer_rstd: array<f32>;
@group(0) @binding(3) var<storage, read_write> add_rms_y: array<E>;
@group(0) @binding(4) var<storage, read_write> add_rms_h: array<E>;
@group(0) @binding(5) var<storage, read_write> add_rms_rstd: array<f32>;

var<workgroup> norm_tile: array<f32, GROUP>;

// Sum over the workgroup by halving: a fixed order.
fn group_sum(lane: u32, value: f32) -> f32 {
    norm_tile[lane] = value;
    workgroupBarrier();
    for (var width = GROUP / 2u; width > 0u; width >>= 1u) {
        if lane < width { norm_tile[lane] += norm_tile[lane + width]; }
        workgroupBarrier();
    }
    let total = norm_tile[0];
    // The tile is written again by the next sum.
    workgroupBarrier();
    return total;
}

// Sums over elements first, first + step, ... of one row; blocks are summed on their own, so that the rounding error
// grows with the block and the number of blocks, not with their product.
fn x_sum(row: u32, first: u32, step: u32) -> f32 {
    let base = row * norm.d;
    var sum = 0.0;
    for (var begin = first; begin < norm.d; begin += BLOCK * step) {
        var part = 0.0;
        for (var i = begin; i < min(begin + BLOCK * step, norm.d); i += step) { part += ld(norm_x[base + i]); }
        sum += part;
    }
    return sum;
}

fn x_squares(row: u32, mean: f32, first: u32, step: u32) -> f32 {
    let base = row * norm.d;
    var sum = 0.0;
    for (var begin = first; begin < norm.d; begin += BLOCK * step) {
        var part = 0.0;
        for (var i = begin; i < min(begin + BLOCK * step, norm.d); i += step) {
            let v = ld(norm_x[base + i]) - mean;
            part += v * v;
        }
        sum += part;
    }
    return sum;
}

fn added(i: u32) -> f32 { return ld(norm_x[i]) + norm.scale * ld(add_r[i]); }

fn h_sum(row: u32, first: u32, step: u32) -> f32 {
    let base = row * norm.d;
    var sum = 0.0;
    for (var begin = first; begin < norm.d; begin += BLOCK * step) {
        var part = 0.0;
        for (var i = begin; i < min(begin + BLOCK * step, norm.d); i += step) { part += added(base + i); }
        sum += part;
    }
    return sum;
}

fn h_squares(row: u32, mean: f32, first: u32, step: u32) -> f32 {
    let base = row * norm.d;
    var sum = 0.0;
    for (var begin = first; begin < norm.d; begin += BLOCK * step) {
        var part = 0.0;
        for (var i = begin; i < min(begin + BLOCK * step, norm.d); i += step) {
            let v = added(base + i) - mean;
            part += v * v;
        }
        sum += part;
    }
    return sum;
}

// rstd from the sum of centred squares.
fn rstd_of(squares: f32) -> f32 { return 1.0 / sqrt(squares / f32(norm.d) + norm.epsilon); }

fn layer_store(row: u32, mean: f32, rstd: f32, first: u32, step: u32) {
    let base = row * norm.d;
    for (var i = first; i < norm.d; i += step) {
        layer_y[base + i] = st((ld(norm_x[base + i]) - mean) * rstd * ld(norm_w[i]) + ld(norm_b[i]));
    }
    if first == 0u { layer_mean[row] = mean; layer_rstd[row] = rstd; }
}

fn rms_store(row: u32, rstd: f32, first: u32, step: u32) {
    let base = row * norm.d;
    for (var i = first; i < norm.d; i += step) { rms_y[base + i] = st(ld(norm_x[base + i]) * rstd * ld(norm_w[i])); }
    if first == 0u { rms_rstd[row] = rstd; }
}

fn add_layer_store(row: u32, mean: f32, rstd: f32, first: u32, step: u32) {
    let base = row * norm.d;
    for (var i = first; i < norm.d; i += step) {
        let h = added(base + i);
        add_layer_h[base + i] = st(h);
        add_layer_y[base + i] = st((h - mean) * rstd * ld(add_w[i]) + ld(add_b[i]));
    }
    if first == 0u { add_layer_mean[row] = mean; add_layer_rstd[row] = rstd; }
}

fn add_rms_store(row: u32, rstd: f32, first: u32, step: u32) {
    let base = row * norm.d;
    for (var i = first; i < norm.d; i += step) {
        let h = added(base + i);
        add_rms_h[base + i] = st(h);
        add_rms_y[base + i] = st(h * rstd * ld(add_w[i]));
    }
    if first == 0u { add_rms_rstd[row] = rstd; }
}

@compute @workgroup_size(64)
fn layernorm_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= norm.rows { return; }
    let mean = x_sum(row, 0u, 1u) / f32(norm.d);
    layer_store(row, mean, rstd_of(x_squares(row, mean, 0u, 1u)), 0u, 1u);
}

@compute @workgroup_size(128)
fn layernorm_fwd_v2(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = linear_id(group, 1u);
    if row >= norm.rows { return; }
    let mean = group_sum(lane, x_sum(row, lane, GROUP)) / f32(norm.d);
    layer_store(row, mean, rstd_of(group_sum(lane, x_squares(row, mean, lane, GROUP))), lane, GROUP);
}

// Fours: loads and stores of four neighbours, which software drivers check once and not four times.
@group(0) @binding(0) var<storage, read> norm_x4: array<vec4<E>>;
@group(0) @binding(1) var<storage, read> norm_w4: array<vec4<E>>;
@group(0) @binding(2) var<storage, read> norm_b4: array<vec4<E>>;
@group(0) @binding(3) var<storage, read_write> layer_y4: array<vec4<E>>;

fn four(x: vec4<E>) -> vec4<f32> { return vec4<f32>(ld(x.x), ld(x.y), ld(x.z), ld(x.w)); }
fn sum_of_four(x: vec4<f32>) -> f32 { return (x.x + x.y) + (x.z + x.w); }

fn layer_four(base: u32, i: u32, m: Moments, rstd: f32) {
    let y = (four(norm_x4[base + i]) - m.mean) * rstd * four(norm_w4[i]) + four(norm_b4[i]);
    layer_y4[base + i] = vec4<E>(st(y.x), st(y.y), st(y.z), st(y.w));
}

// Mean and centred squares of so many elements.
struct Moments { mean: f32, squares: f32, count: f32 }
fn joined(a: Moments, b: Moments) -> Moments {
    let share = b.count / (a.count + b.count);
    let delta = b.mean - a.mean;
    return Moments(a.mean + delta * share, a.squares + b.squares + delta * delta * a.count * share, a.count + b.count);
}

@compute @workgroup_size(8)
fn layernorm_fwd_fours(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 8u);
    if row >= norm.rows { return; }
    let fours = norm.d / 4u;
    let base = row * fours;
    var m = Moments(0.0, 0.0, 0.0);
    var i = 0u;
    for (; i + 4u <= fours; i += 4u) {
        let a = four(norm_x4[base + i]);
        let b = four(norm_x4[base + i + 1u]);
        let c = four(norm_x4[base + i + 2u]);
        let d = four(norm_x4[base + i + 3u]);
        let mean = sum_of_four((a + b) + (c + d)) / 16.0;
        let squares = (dot(a - mean, a - mean) + dot(b - mean, b - mean)) + (dot(c - mean, c - mean) + dot(d - mean, d - mean));
        m = joined(m, Moments(mean, squares, 16.0));
    }
    for (; i < fours; i++) {
        let a = four(norm_x4[base + i]);
        let mean = sum_of_four(a) / 4.0;
        m = joined(m, Moments(mean, dot(a - mean, a - mean), 4.0));
    }
    let rstd = rstd_of(m.squares);
    i = 0u;
    for (; i + 4u <= fours; i += 4u) {
        layer_four(base, i, m, rstd);
        layer_four(base, i + 1u, m, rstd);
        layer_four(base, i + 2u, m, rstd);
        layer_four(base, i + 3u, m, rstd);
    }
    for (; i < fours; i++) { layer_four(base, i, m, rstd); }
    layer_mean[row] = m.mean;
    layer_rstd[row] = rstd;
}

@compute @workgroup_size(64)
fn rmsnorm_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= norm.rows { return; }
    rms_store(row, rstd_of(x_squares(row, 0.0, 0u, 1u)), 0u, 1u);
}

@compute @workgroup_size(128)
fn rmsnorm_fwd_v2(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = linear_id(group, 1u);
    if row >= norm.rows { return; }
    rms_store(row, rstd_of(group_sum(lane, x_squares(row, 0.0, lane, GROUP))), lane, GROUP);
}

@compute @workgroup_size(64)
fn add_layernorm_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= norm.rows { return; }
    let mean = h_sum(row, 0u, 1u) / f32(norm.d);
    add_layer_store(row, mean, rstd_of(h_squares(row, mean, 0u, 1u)), 0u, 1u);
}

@compute @workgroup_size(128)
fn add_layernorm_fwd_v2(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = linear_id(group, 1u);
    if row >= norm.rows { return; }
    let mean = group_sum(lane, h_sum(row, lane, GROUP)) / f32(norm.d);
    add_layer_store(row, mean, rstd_of(group_sum(lane, h_squares(row, mean, lane, GROUP))), lane, GROUP);
}

@compute @workgroup_size(64)
fn add_rmsnorm_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= norm.rows { return; }
    add_rms_store(row, rstd_of(h_squares(row, 0.0, 0u, 1u)), 0u, 1u);
}

@compute @workgroup_size(128)
fn add_rmsnorm_fwd_v2(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = linear_id(group, 1u);
    if row >= norm.rows { return; }
    add_rms_store(row, rstd_of(group_sum(lane, h_squares(row, 0.0, lane, GROUP))), lane, GROUP);
}

// Backward. norm_x is h where a residual was added.
@group(0) @binding(2) var<storage, read> bwd_mean: array<f32>;
@group(0) @binding(3) var<storage, read> bwd_rstd: array<f32>;
@group(0) @binding(4) var<storage, read> bwd_dy: array<E>;
@group(0) @binding(5) var<storage, read_write> norm_dx: array<E>;
@group(0) @binding(6) var<storage, read_write> norm_dw: array<E>;
@group(0) @binding(7) var<storage, read_write> norm_db: array<E>;
@group(0) @binding(8) var<storage, read_write> norm_partial: array<vec2<f32>>;
@group(0) @binding(5) var<storage, read> bwd_dh: array<E>;
@group(0) @binding(6) var<storage, read_write> add_dx: array<E>;
@group(0) @binding(7) var<storage, read_write> add_dr: array<E>;
@group(0) @binding(8) var<storage, read_write> add_dw: array<E>;
@group(0) @binding(9) var<storage, read_write> add_db: array<E>;
@group(0) @binding(10) var<storage, read_write> add_partial: array<vec2<f32>>;

fn row_mean(row: u32) -> f32 {
    if norm.rms != 0u { return 0.0; }
    return bwd_mean[row];
}

fn g_sum(row: u32, first: u32, step: u32) -> f32 {
    let base = row * norm.d;
    var sum = 0.0;
    for (var i = first; i < norm.d; i += step) { sum += ld(bwd_dy[base + i]) * ld(norm_w[i]); }
    return sum;
}

fn gn_sum(row: u32, first: u32, step: u32) -> f32 {
    let base = row * norm.d;
    let mean = row_mean(row);
    let rstd = bwd_rstd[row];
    var sum = 0.0;
    for (var i = first; i < norm.d; i += step) {
        sum += ld(bwd_dy[base + i]) * ld(norm_w[i]) * (ld(norm_x[base + i]) - mean) * rstd;
    }
    return sum;
}

// Gradient through the normalisation at element i of a row, from the row's two sums.
fn dx_at(row: u32, i: u32, g: f32, gn: f32) -> f32 {
    let rstd = bwd_rstd[row];
    let n = (ld(norm_x[row * norm.d + i]) - row_mean(row)) * rstd;
    let mean_g = select(g / f32(norm.d), 0.0, norm.rms != 0u);
    return rstd * (ld(bwd_dy[row * norm.d + i]) * ld(norm_w[i]) - mean_g - n * (gn / f32(norm.d)));
}

fn dx_store(row: u32, g: f32, gn: f32, first: u32, step: u32) {
    for (var i = first; i < norm.d; i += step) { norm_dx[row * norm.d + i] = st(dx_at(row, i, g, gn)); }
}

fn add_dx_store(row: u32, g: f32, gn: f32, first: u32, step: u32) {
    let base = row * norm.d;
    for (var i = first; i < norm.d; i += step) {
        var dx = dx_at(row, i, g, gn);
        if norm.joined != 0u { dx += ld(bwd_dh[base + i]); }
        add_dx[base + i] = st(dx);
        add_dr[base + i] = st(norm.scale * dx);
    }
}

@compute @workgroup_size(64)
fn norm_bwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= norm.rows { return; }
    dx_store(row, g_sum(row, 0u, 1u), gn_sum(row, 0u, 1u), 0u, 1u);
}

@compute @workgroup_size(128)
fn norm_bwd_v2(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = linear_id(group, 1u);
    if row >= norm.rows { return; }
    let g = group_sum(lane, g_sum(row, lane, GROUP));
    dx_store(row, g, group_sum(lane, gn_sum(row, lane, GROUP)), lane, GROUP);
}

@compute @workgroup_size(64)
fn add_norm_bwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= norm.rows { return; }
    add_dx_store(row, g_sum(row, 0u, 1u), gn_sum(row, 0u, 1u), 0u, 1u);
}

@compute @workgroup_size(128)
fn add_norm_bwd_v2(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = linear_id(group, 1u);
    if row >= norm.rows { return; }
    let g = group_sum(lane, g_sum(row, lane, GROUP));
    add_dx_store(row, g, group_sum(lane, gn_sum(row, lane, GROUP)), lane, GROUP);
}

// (sum dy n, sum dy) of one column over one chunk of rows; neighbours read neighbouring columns.
fn column_sums(item: u32) -> vec2<f32> {
    let chunk = item / norm.d;
    let i = item - chunk * norm.d;
    var sums = vec2<f32>(0.0);
    for (var row = chunk * CHUNK; row < min((chunk + 1u) * CHUNK, norm.rows); row++) {
        let dy = ld(bwd_dy[row * norm.d + i]);
        sums += vec2<f32>(dy * (ld(norm_x[row * norm.d + i]) - row_mean(row)) * bwd_rstd[row], dy);
    }
    return sums;
}

@compute @workgroup_size(64)
fn norm_bwd_partial(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item < norm.chunks * norm.d { norm_partial[item] = column_sums(item); }
}

@compute @workgroup_size(64)
fn add_norm_bwd_partial(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item < norm.chunks * norm.d { add_partial[item] = column_sums(item); }
}

@compute @workgroup_size(64)
fn norm_bwd_total(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= norm.d { return; }
    var sums = vec2<f32>(0.0);
    for (var chunk = 0u; chunk < norm.chunks; chunk++) { sums += norm_partial[chunk * norm.d + i]; }
    norm_dw[i] = st(sums.x);
    norm_db[i] = st(sums.y);
}

@compute @workgroup_size(64)
fn add_norm_bwd_total(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= norm.d { return; }
    var sums = vec2<f32>(0.0);
    for (var chunk = 0u; chunk < norm.chunks; chunk++) { sums += add_partial[chunk * norm.d + i]; }
    add_dw[i] = st(sums.x);
    add_db[i] = st(sums.y);
}
