// op:       ffn_relu, ffn_gelu, ffn_geglu, their backward
// math:     z = x w1ᵀ + b1, h = relu(z), gelu(z) or gelu(z_gate) z_value, y = h w2ᵀ + b2;
//           dh = dy w2, dz = dh act'(z), dx = dz w1, dw1 = dzᵀ x, dw2 = dyᵀ h, db1 = sum dz, db2 = sum dy
// grad:     ffn_bwd
// shapes:   up: a[R, K], b[K, C], bias[C], sums[R, C]; down: a[R, K] (h, dz), b[K, C], bias[C], c[R, C] (y, dx, dw1, dw2); act: sums[R, F'], z[R, F'], h[R, F];
//           slope: z[R, F'], dh[R, F], h[R, F], dz[R, F']; sum: values[R, C] (E or f32), db[C] (db1, db2); F' = F or 2 F
// layout:   products by strides of both sides and of the result; the hidden layer in f32 scratch
// launch:   products 8x8 invocations of 8x8 outputs; act, slope one element, sum one column per invocation
// cost:     forward 2 R D (F' + F) flop, backward twice that
// numerics: f32 sums in the order of k or of rows; hidden values never rounded to 16 bits on the way
// source:   GELU: Hendrycks and Gimpel 2016; GEGLU: Shazeer 2020
// rungs:    v1 8x8 outputs in registers, k in fours, no barriers

struct FfnParams {
    rows: u32, columns: u32, k: u32,
    a_row: u32, a_column: u32, b_row: u32, b_column: u32, c_row: u32, c_column: u32,
    // Products: whether a bias is added. Elementwise: 0 ReLU, 1 GELU, 2 GEGLU.
    mode: u32,
}
var<immediate> ffn: FfnParams;

@group(0) @binding(0) var<storage, read> ffn_a: array<E>;
@group(0) @binding(0) var<storage, read> ffn_a_sums: array<f32>;
@group(0) @binding(1) var<storage, read> ffn_b: array<E>;
@group(0) @binding(2) var<storage, read> ffn_bias: array<E>;
@group(0) @binding(3) var<storage, read_write> ffn_c: array<E>;
@group(0) @binding(3) var<storage, read_write> ffn_c_sums: array<f32>;

// 8x8 outputs of one invocation: low and high rows by left and right columns; column i of a matrix is row i of outputs.
struct FfnTile { ll: mat4x4<f32>, lr: mat4x4<f32>, hl: mat4x4<f32>, hr: mat4x4<f32> }

// c + a b^T, written out: loops over registers are not unrolled by every driver.
fn ffn_outer4(c: mat4x4<f32>, a: vec4<f32>, b: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(fma(a.xxxx, b, c[0]), fma(a.yyyy, b, c[1]), fma(a.zzzz, b, c[2]), fma(a.wwww, b, c[3]));
}

fn ffn_outer(t: FfnTile, low: vec4<f32>, high: vec4<f32>, left: vec4<f32>, right: vec4<f32>) -> FfnTile {
    return FfnTile(ffn_outer4(t.ll, low, left), ffn_outer4(t.lr, low, right), ffn_outer4(t.hl, high, left), ffn_outer4(t.hr, high, right));
}

// Four neighbours from `first`; those past the end repeat the last, whose output is not stored.
fn ffn_four(first: u32, extent: u32) -> vec4<u32> {
    return min(vec4<u32>(first, first + 1u, first + 2u, first + 3u), vec4<u32>(extent - 1u));
}

fn ffn_a_at(at: vec4<u32>, offset: u32) -> vec4<f32> {
    return vec4<f32>(ld(ffn_a[at.x + offset]), ld(ffn_a[at.y + offset]), ld(ffn_a[at.z + offset]), ld(ffn_a[at.w + offset]));
}

fn ffn_a_sums_at(at: vec4<u32>, offset: u32) -> vec4<f32> {
    return vec4<f32>(ffn_a_sums[at.x + offset], ffn_a_sums[at.y + offset], ffn_a_sums[at.z + offset], ffn_a_sums[at.w + offset]);
}

fn ffn_b_at(at: vec4<u32>, offset: u32) -> vec4<f32> {
    return vec4<f32>(ld(ffn_b[at.x + offset]), ld(ffn_b[at.y + offset]), ld(ffn_b[at.z + offset]), ld(ffn_b[at.w + offset]));
}

fn ffn_biased(sum: f32, column: u32) -> f32 {
    if ffn.mode == 1u { return sum + ld(ffn_bias[column]); }
    return sum;
}

fn ffn_put(row: u32, column: u32, sum: f32) {
    if row < ffn.rows && column < ffn.columns { ffn_c[row * ffn.c_row + column * ffn.c_column] = st(ffn_biased(sum, column)); }
}

fn ffn_put_sum(row: u32, column: u32, sum: f32) {
    if row < ffn.rows && column < ffn.columns { ffn_c_sums[row * ffn.c_row + column * ffn.c_column] = ffn_biased(sum, column); }
}

fn ffn_put4(row: u32, column: u32, y: vec4<f32>) {
    ffn_put(row, column, y.x);
    ffn_put(row, column + 1u, y.y);
    ffn_put(row, column + 2u, y.z);
    ffn_put(row, column + 3u, y.w);
}

fn ffn_put_sum4(row: u32, column: u32, y: vec4<f32>) {
    ffn_put_sum(row, column, y.x);
    ffn_put_sum(row, column + 1u, y.y);
    ffn_put_sum(row, column + 2u, y.z);
    ffn_put_sum(row, column + 3u, y.w);
}

fn ffn_put_block(row: u32, column: u32, m: mat4x4<f32>) {
    ffn_put4(row, column, m[0]);
    ffn_put4(row + 1u, column, m[1]);
    ffn_put4(row + 2u, column, m[2]);
    ffn_put4(row + 3u, column, m[3]);
}

fn ffn_put_sum_block(row: u32, column: u32, m: mat4x4<f32>) {
    ffn_put_sum4(row, column, m[0]);
    ffn_put_sum4(row + 1u, column, m[1]);
    ffn_put_sum4(row + 2u, column, m[2]);
    ffn_put_sum4(row + 3u, column, m[3]);
}

// Stored a, f32 result: z before it is rounded, dh.
@compute @workgroup_size(8, 8)
fn ffn_up(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = gid.y * 8u;
    let column = gid.x * 8u;
    if row >= ffn.rows || column >= ffn.columns { return; }
    let low = ffn_four(row, ffn.rows) * ffn.a_row;
    let high = ffn_four(row + 4u, ffn.rows) * ffn.a_row;
    let left = ffn_four(column, ffn.columns) * ffn.b_column;
    let right = ffn_four(column + 4u, ffn.columns) * ffn.b_column;
    var t: FfnTile;
    for (var k = 0u; k < ffn.k; k++) {
        let a = k * ffn.a_column;
        let b = k * ffn.b_row;
        t = ffn_outer(t, ffn_a_at(low, a), ffn_a_at(high, a), ffn_b_at(left, b), ffn_b_at(right, b));
    }
    ffn_put_sum_block(row, column, t.ll);
    ffn_put_sum_block(row, column + 4u, t.lr);
    ffn_put_sum_block(row + 4u, column, t.hl);
    ffn_put_sum_block(row + 4u, column + 4u, t.hr);
}

// f32 a, stored result: y, dx, dw1, and dw2 by the strides of its transpose.
@compute @workgroup_size(8, 8)
fn ffn_down(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = gid.y * 8u;
    let column = gid.x * 8u;
    if row >= ffn.rows || column >= ffn.columns { return; }
    let low = ffn_four(row, ffn.rows) * ffn.a_row;
    let high = ffn_four(row + 4u, ffn.rows) * ffn.a_row;
    let left = ffn_four(column, ffn.columns) * ffn.b_column;
    let right = ffn_four(column + 4u, ffn.columns) * ffn.b_column;
    var t: FfnTile;
    for (var k = 0u; k < ffn.k; k++) {
        let a = k * ffn.a_column;
        let b = k * ffn.b_row;
        t = ffn_outer(t, ffn_a_sums_at(low, a), ffn_a_sums_at(high, a), ffn_b_at(left, b), ffn_b_at(right, b));
    }
    ffn_put_block(row, column, t.ll);
    ffn_put_block(row, column + 4u, t.lr);
    ffn_put_block(row + 4u, column, t.hl);
    ffn_put_block(row + 4u, column + 4u, t.hr);
}

// exp's argument is bounded so that it stays finite: s = sigmoid(2 u), gelu = x s.
fn ffn_sigmoid_2u(x: f32) -> f32 {
    return 1.0 / (1.0 + exp(min(-1.5957691216 * (x + 0.044715 * x * x * x), 80.0)));
}

fn ffn_gelu_slope(x: f32) -> f32 {
    let s = ffn_sigmoid_2u(x);
    return s + x * s * (1.0 - s) * 1.5957691216 * (1.0 + 0.134145 * x * x);
}

@group(0) @binding(1) var<storage, read_write> ffn_z_out: array<E>;
@group(0) @binding(2) var<storage, read_write> ffn_h_out: array<f32>;

// One element of h per invocation; z is stored on the way.
@compute @workgroup_size(64)
fn ffn_act(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= ffn.rows * ffn.columns { return; }
    if ffn.mode == 2u {
        let at = i / ffn.columns * ffn.columns * 2u + i % ffn.columns;
        let gate = ffn_a_sums[at];
        let value = ffn_a_sums[at + ffn.columns];
        ffn_z_out[at] = st(gate);
        ffn_z_out[at + ffn.columns] = st(value);
        ffn_h_out[i] = gate * ffn_sigmoid_2u(gate) * value;
        return;
    }
    let z = ffn_a_sums[i];
    ffn_z_out[i] = st(z);
    ffn_h_out[i] = select(z * ffn_sigmoid_2u(z), select(z, 0.0, z < 0.0), ffn.mode == 0u);
}

@group(0) @binding(1) var<storage, read> ffn_dh: array<f32>;
@group(0) @binding(3) var<storage, read_write> ffn_dz: array<f32>;

@compute @workgroup_size(64)
fn ffn_slope(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= ffn.rows * ffn.columns { return; }
    let dh = ffn_dh[i];
    if ffn.mode == 2u {
        let at = i / ffn.columns * ffn.columns * 2u + i % ffn.columns;
        let gate = ld(ffn_a[at]);
        let value = ld(ffn_a[at + ffn.columns]);
        let gelu = gate * ffn_sigmoid_2u(gate);
        ffn_h_out[i] = gelu * value;
        ffn_dz[at] = dh * value * ffn_gelu_slope(gate);
        ffn_dz[at + ffn.columns] = dh * gelu;
        return;
    }
    let z = ld(ffn_a[i]);
    if ffn.mode == 0u {
        ffn_h_out[i] = select(z, 0.0, z < 0.0);
        ffn_dz[i] = select(0.0, dh, z > 0.0);
    } else {
        ffn_h_out[i] = z * ffn_sigmoid_2u(z);
        ffn_dz[i] = dh * ffn_gelu_slope(z);
    }
}

@group(0) @binding(1) var<storage, read_write> ffn_db: array<E>;

// Column sums, rows first to last.
@compute @workgroup_size(64)
fn ffn_sum_f32(@builtin(global_invocation_id) gid: vec3<u32>) {
    let column = linear_id(gid, 64u);
    if column >= ffn.columns { return; }
    var sum = 0.0;
    for (var row = 0u; row < ffn.rows; row++) { sum += ffn_a_sums[row * ffn.columns + column]; }
    ffn_db[column] = st(sum);
}

@compute @workgroup_size(64)
fn ffn_sum(@builtin(global_invocation_id) gid: vec3<u32>) {
    let column = linear_id(gid, 64u);
    if column >= ffn.columns { return; }
    var sum = 0.0;
    for (var row = 0u; row < ffn.rows; row++) { sum += ld(ffn_a[row * ffn.columns + column]); }
    ffn_db[column] = st(sum);
}
