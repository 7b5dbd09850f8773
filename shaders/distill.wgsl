// op:       hidden_mse, cosine, kl and their backward
// math:     hidden_mse: u = s / ms, v = t / mt (or s, t): loss = c sum_i w_i |u_i - v_i|^2, c = 1/2 or 1 / (D sum w);
//           ms = sum_i w_i |s_i| / sum w; ds = 2 c w dloss ((u - v) / ms - s sum_i w_i u_i . (u_i - v_i) / (ms |s_i| sum w))
//           cosine: loss = w (1 - a.b / (|a| |b|)); da = -w dloss (b / (|a| |b|) - cos a / |a|^2)
//           kl: a = zs / T, b = zt / T, q, p their softmax: forward sum p log(p/q), reverse sum q log(q/p),
//           jsd beta KL(p||m) + (1-beta) KL(q||m); loss = w F kl; dz = dloss w F / T slope, slope: q - p;
//           q (log q - log p - kl); q ((1-beta) log(q/m) - (1-beta) KL(q||m))
// grad:     hidden_mse_bwd, cosine_bwd, kl_bwd (student side; cosine both)
// shapes:   student s, teacher t and weight w of all; hidden_mse: s[R,D], t[R,D], w[R], loss[], stats[4], norms[R], sums[R];
//           bwd: s[R,D], t[R,D], w[R], saved stats[4], dloss[], ds[R,D]
//           cosine: a[R,D], b[R,D], w[R], loss[R]; bwd: a[R,D], b[R,D], w[R], dloss[R], da[R,D], db[R,D]
//           kl: zs[R,V], zt[R,V], w[R], loss[R], lse_s[R], lse_t[R], expectation[R]
//           kl_bwd: zs[R,V], zt[R,V], w[R], saved lse_s[R], lse_t[R], expectation[R], dloss[R], dz[R,V]
// layout:   row-major; stats: sum w, ms, mt, sum_i w_i u_i . (u_i - v_i)
// launch:   rows linear, 64 a group; means and totals one group of 128; kl v2: one group of 128 per row; kl_bwd linear, 4 elements each
// cost:     hidden_mse 3 R D flops, cosine 6 R D, kl 12 R V
// numerics: f32; maxima taken off before exp; sums in blocks of 32; all weights 0: loss 0 and gradient 0; rows of zeros have norm gradient 0
// source:   LightChatGLM Eq 10; BMCook (Zhang et al. 2022); Hinton et al. 2015; Agarwal et al. 2024
// rungs:    v1 a row per invocation; v2 (kl) a row per workgroup

struct DistillParams { rows: u32, d: u32, a: u32, b: u32, inverse: f32, factor: f32 }
var<immediate> distill: DistillParams;

const GROUP: u32 = 128u;
const BLOCK: u32 = 32u;

@group(0) @binding(0) var<storage, read> student: array<E>;
@group(0) @binding(1) var<storage, read> teacher: array<E>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;

var<workgroup> distill_tile: array<f32, GROUP>;

fn group_sum(lane: u32, value: f32) -> f32 {
    distill_tile[lane] = value;
    workgroupBarrier();
    for (var width = GROUP / 2u; width > 0u; width >>= 1u) {
        if lane < width { distill_tile[lane] += distill_tile[lane + width]; }
        workgroupBarrier();
    }
    let total = distill_tile[0];
    // The tile is written again by the next reduction.
    workgroupBarrier();
    return total;
}

fn group_max(lane: u32, value: f32) -> f32 {
    distill_tile[lane] = value;
    workgroupBarrier();
    for (var width = GROUP / 2u; width > 0u; width >>= 1u) {
        if lane < width { distill_tile[lane] = max(distill_tile[lane], distill_tile[lane + width]); }
        workgroupBarrier();
    }
    let most = distill_tile[0];
    workgroupBarrier();
    return most;
}

fn inverse_or_zero(x: f32) -> f32 { return select(0.0, 1.0 / max(x, 1e-37), x > 0.0); }

// --- hidden_mse: a = mean reduction, b = normalised
@group(0) @binding(3) var<storage, read_write> mse_loss: array<f32>;
@group(0) @binding(4) var<storage, read_write> mse_stats: array<f32>;
@group(0) @binding(5) var<storage, read_write> mse_norms: array<vec2<f32>>;
@group(0) @binding(6) var<storage, read_write> mse_sums: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read> mse_saved: array<f32>;
@group(0) @binding(4) var<storage, read> mse_dloss: array<f32>;
@group(0) @binding(5) var<storage, read_write> mse_ds: array<E>;

fn mse_factor(total: f32) -> f32 {
    if distill.a == 0u { return 0.5; }
    return inverse_or_zero(total) / f32(distill.d);
}

// Squared lengths of a row of student and teacher.
fn row_squares(row: u32) -> vec2<f32> {
    let base = row * distill.d;
    var sum = vec2<f32>(0.0);
    for (var begin = 0u; begin < distill.d; begin += BLOCK) {
        var part = vec2<f32>(0.0);
        for (var i = begin; i < min(begin + BLOCK, distill.d); i++) {
            let v = vec2<f32>(ld(student[base + i]), ld(teacher[base + i]));
            part += v * v;
        }
        sum += part;
    }
    return sum;
}

@compute @workgroup_size(64)
fn hidden_mse_norms(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row < distill.rows { mse_norms[row] = weight[row] * sqrt(row_squares(row)); }
}

@compute @workgroup_size(128)
fn hidden_mse_means(@builtin(local_invocation_index) lane: u32) {
    var total = 0.0;
    var norms = vec2<f32>(0.0);
    for (var row = lane; row < distill.rows; row += GROUP) { total += weight[row]; norms += mse_norms[row]; }
    total = group_sum(lane, total);
    norms = vec2<f32>(group_sum(lane, norms.x), group_sum(lane, norms.y)) * inverse_or_zero(total);
    if lane == 0u { mse_stats[1] = norms.x; mse_stats[2] = norms.y; }
}

// (w |u - v|^2, w u . (u - v)) of one row.
@compute @workgroup_size(64)
fn hidden_mse_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= distill.rows { return; }
    var scale = vec2<f32>(1.0);
    if distill.b != 0u { scale = vec2<f32>(inverse_or_zero(mse_stats[1]), inverse_or_zero(mse_stats[2])); }
    let base = row * distill.d;
    var sum = vec2<f32>(0.0);
    for (var begin = 0u; begin < distill.d; begin += BLOCK) {
        var part = vec2<f32>(0.0);
        for (var i = begin; i < min(begin + BLOCK, distill.d); i++) {
            let u = scale.x * ld(student[base + i]);
            let e = u - scale.y * ld(teacher[base + i]);
            part += vec2<f32>(e, u) * e;
        }
        sum += part;
    }
    mse_sums[row] = weight[row] * sum;
}

@compute @workgroup_size(128)
fn hidden_mse_total(@builtin(local_invocation_index) lane: u32) {
    var total = 0.0;
    var sums = vec2<f32>(0.0);
    for (var row = lane; row < distill.rows; row += GROUP) { total += weight[row]; sums += mse_sums[row]; }
    total = group_sum(lane, total);
    sums = vec2<f32>(group_sum(lane, sums.x), group_sum(lane, sums.y));
    if lane == 0u {
        mse_loss[0] = mse_factor(total) * sums.x;
        mse_stats[0] = total;
        if distill.b == 0u { mse_stats[1] = 1.0; mse_stats[2] = 1.0; }
        mse_stats[3] = sums.y;
    }
}

@compute @workgroup_size(64)
fn hidden_mse_bwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= distill.rows { return; }
    let total = mse_saved[0];
    let scale = vec2<f32>(inverse_or_zero(mse_saved[1]), inverse_or_zero(mse_saved[2]));
    var through = 0.0;
    if distill.b != 0u {
        through = mse_saved[3] * scale.x * inverse_or_zero(sqrt(row_squares(row).x)) * inverse_or_zero(total);
    }
    let factor = 2.0 * mse_factor(total) * mse_dloss[0] * weight[row];
    let base = row * distill.d;
    for (var i = base; i < base + distill.d; i++) {
        let s = ld(student[i]);
        mse_ds[i] = st(factor * ((scale.x * s - scale.y * ld(teacher[i])) * scale.x - through * s));
    }
}

// --- cosine
@group(0) @binding(3) var<storage, read_write> cosine_loss: array<f32>;
@group(0) @binding(3) var<storage, read> cosine_dloss: array<f32>;
@group(0) @binding(4) var<storage, read_write> cosine_da: array<E>;
@group(0) @binding(5) var<storage, read_write> cosine_db: array<E>;

// a.a, b.b, a.b of one row.
fn row_products(row: u32) -> vec3<f32> {
    let base = row * distill.d;
    var sum = vec3<f32>(0.0);
    for (var begin = 0u; begin < distill.d; begin += BLOCK) {
        var part = vec3<f32>(0.0);
        for (var i = begin; i < min(begin + BLOCK, distill.d); i++) {
            let a = ld(student[base + i]);
            let b = ld(teacher[base + i]);
            part += vec3<f32>(a * a, b * b, a * b);
        }
        sum += part;
    }
    return sum;
}

@compute @workgroup_size(64)
fn cosine_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= distill.rows { return; }
    let p = row_products(row);
    cosine_loss[row] = weight[row] * (1.0 - p.z * inverse_or_zero(sqrt(p.x) * sqrt(p.y)));
}

@compute @workgroup_size(64)
fn cosine_bwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= distill.rows { return; }
    let p = row_products(row);
    let lengths = inverse_or_zero(sqrt(p.x) * sqrt(p.y));
    let along = p.z * lengths * vec2<f32>(inverse_or_zero(p.x), inverse_or_zero(p.y));
    let factor = -weight[row] * cosine_dloss[row];
    let base = row * distill.d;
    for (var i = base; i < base + distill.d; i++) {
        let a = ld(student[i]);
        let b = ld(teacher[i]);
        cosine_da[i] = st(factor * (b * lengths - along.x * a));
        cosine_db[i] = st(factor * (a * lengths - along.y * b));
    }
}

// --- kl: a = direction, b = beta's bits
@group(0) @binding(3) var<storage, read_write> kl_loss: array<f32>;
@group(0) @binding(4) var<storage, read_write> kl_lse_s: array<f32>;
@group(0) @binding(5) var<storage, read_write> kl_lse_t: array<f32>;
@group(0) @binding(6) var<storage, read_write> kl_expectation: array<f32>;
@group(0) @binding(3) var<storage, read> kl_saved_s: array<f32>;
@group(0) @binding(4) var<storage, read> kl_saved_t: array<f32>;
@group(0) @binding(5) var<storage, read> kl_saved_e: array<f32>;
@group(0) @binding(6) var<storage, read> kl_dloss: array<f32>;
@group(0) @binding(7) var<storage, read_write> kl_dz: array<E>;

// log(beta p + (1 - beta) q) from logarithms.
fn log_mixture(log_p: f32, log_q: f32) -> f32 {
    let beta = bitcast<f32>(distill.b);
    let p = log_p + log(beta);
    let q = log_q + log(1.0 - beta);
    return max(p, q) + log(1.0 + exp(-abs(p - q)));
}

fn kl_pair(i: u32) -> vec2<f32> { return vec2<f32>(ld(student[i]), ld(teacher[i])) * distill.inverse; }

fn kl_max(row: u32, first: u32, step: u32) -> vec2<f32> {
    let base = row * distill.d;
    var most = vec2<f32>(-3.4e38);
    for (var i = first; i < distill.d; i += step) { most = max(most, kl_pair(base + i)); }
    return most;
}

// Sums of exp(a - max), exp(b - max) and of the difference of logits under the distribution that the divergence averages over.
fn kl_sums(row: u32, most: vec2<f32>, first: u32, step: u32) -> vec3<f32> {
    let base = row * distill.d;
    var sum = vec3<f32>(0.0);
    for (var begin = first; begin < distill.d; begin += BLOCK * step) {
        var part = vec3<f32>(0.0);
        for (var i = begin; i < min(begin + BLOCK * step, distill.d); i += step) {
            let z = kl_pair(base + i);
            let e = exp(z - most);
            part += vec3<f32>(e, select(e.y * (z.y - z.x), e.x * (z.x - z.y), distill.a == 1u));
        }
        sum += part;
    }
    return sum;
}

// Sums of p log(p/m) and q log(q/m).
fn jsd_sums(row: u32, lse: vec2<f32>, first: u32, step: u32) -> vec2<f32> {
    let base = row * distill.d;
    var sum = vec2<f32>(0.0);
    for (var begin = first; begin < distill.d; begin += BLOCK * step) {
        var part = vec2<f32>(0.0);
        for (var i = begin; i < min(begin + BLOCK * step, distill.d); i += step) {
            let z = kl_pair(base + i) - lse;
            let m = log_mixture(z.y, z.x);
            part += vec2<f32>(exp(z.y) * (z.y - m), exp(z.x) * (z.x - m));
        }
        sum += part;
    }
    return sum;
}

// From the sums of a row; jsd is only read for that direction. The logarithm of the sums' quotient, not of each sum: a
// small divergence is a difference of large terms.
fn kl_store(row: u32, most: vec2<f32>, sums: vec3<f32>, jsd: vec2<f32>) {
    let lse = most + log(sums.xy);
    let apart = (most.x - most.y) + log(sums.x / sums.y);
    let beta = bitcast<f32>(distill.b);
    var value = 0.0;
    var expectation = 0.0;
    if distill.a == 0u { value = sums.z / sums.y + apart; }
    if distill.a == 1u { value = sums.z / sums.x - apart; expectation = value; }
    if distill.a == 2u { expectation = (1.0 - beta) * jsd.y; value = beta * jsd.x + expectation; }
    kl_loss[row] = weight[row] * distill.factor * value;
    kl_lse_s[row] = lse.x;
    kl_lse_t[row] = lse.y;
    kl_expectation[row] = expectation;
}

@compute @workgroup_size(64)
fn kl_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= distill.rows { return; }
    let most = kl_max(row, 0u, 1u);
    let sums = kl_sums(row, most, 0u, 1u);
    let lse = most + log(sums.xy);
    var jsd = vec2<f32>(0.0);
    if distill.a == 2u { jsd = jsd_sums(row, lse, 0u, 1u); }
    kl_store(row, most, sums, jsd);
}

@compute @workgroup_size(128)
fn kl_fwd_v2(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = linear_id(group, 1u);
    if row >= distill.rows { return; }
    let part_max = kl_max(row, lane, GROUP);
    let most = vec2<f32>(group_max(lane, part_max.x), group_max(lane, part_max.y));
    let part = kl_sums(row, most, lane, GROUP);
    let sums = vec3<f32>(group_sum(lane, part.x), group_sum(lane, part.y), group_sum(lane, part.z));
    let lse = most + log(sums.xy);
    var jsd = vec2<f32>(0.0);
    if distill.a == 2u {
        let part_jsd = jsd_sums(row, lse, lane, GROUP);
        jsd = vec2<f32>(group_sum(lane, part_jsd.x), group_sum(lane, part_jsd.y));
    }
    if lane == 0u { kl_store(row, most, sums, jsd); }
}

@compute @workgroup_size(64)
fn kl_bwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    let beta = bitcast<f32>(distill.b);
    for (var i = first; i < min(first + 4u, distill.rows * distill.d); i++) {
        let row = i / distill.d;
        let z = kl_pair(i) - vec2<f32>(kl_saved_s[row], kl_saved_t[row]);
        var slope = exp(z.x);
        if distill.a == 0u { slope -= exp(z.y); }
        if distill.a == 1u { slope *= z.x - z.y - kl_saved_e[row]; }
        if distill.a == 2u { slope *= (1.0 - beta) * (z.x - log_mixture(z.y, z.x)) - kl_saved_e[row]; }
        kl_dz[i] = st(kl_dloss[row] * weight[row] * distill.factor * distill.inverse * slope);
    }
}
