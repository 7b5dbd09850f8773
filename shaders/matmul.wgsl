// op:       matmul
// math:     y = f(sum_k a[i, k] b[k, j] + bias[j]) or y += sum_k a[i, k] b[k, j] (+ bias[j]), f: identity, ReLU, GELU (tanh)
// grad:     da = dz bᵀ, db = aᵀ dz by matmul itself; dbias = column sums of dz
// shapes:   fwd: a[B, M, K], b[B, K, N], bias[N], y[B, M, N]; part: a, b, sums[B, M, N]; finish: sums[B, M, N], bias[N], y[B, M, N]
// layout:   a and b by strides (any transpose; a shared matrix has batch stride 0), y contiguous
// launch:   8x8 invocations, one output each; batch in z; blocks of rows, columns and batch above 65,535 groups
// cost:     2 B M N K flop
// numerics: f32 sums in the order of k, cut in launches of k0..k1 where a driver limits loops; NaN passes through
// source:   GELU: Hendrycks and Gimpel 2016
// rungs:    v1 one output per invocation

struct MatmulParams {
    rows: u32, columns: u32,
    // Bits 0-1 activation (0 none, 1 ReLU, 2 GELU), bit 2 bias, bit 3 add to y.
    mode: u32,
    a_batch: u32, a_row: u32, a_column: u32,
    b_batch: u32, b_row: u32, b_column: u32,
    first_row: u32, first_column: u32, first_batch: u32,
    k0: u32, k1: u32,
}
var<immediate> matmul: MatmulParams;

@group(0) @binding(0) var<storage, read> matmul_a: array<E>;
@group(0) @binding(1) var<storage, read> matmul_b: array<E>;
@group(0) @binding(2) var<storage, read> matmul_bias: array<E>;
@group(0) @binding(3) var<storage, read_write> matmul_y: array<E>;
@group(0) @binding(2) var<storage, read_write> matmul_sums: array<f32>;
@group(0) @binding(0) var<storage, read> matmul_summed: array<f32>;

// x / (1 + exp(-2u)) = x (1 + tanh u) / 2; the exponent is bounded so that exp stays finite.
fn matmul_gelu(x: f32) -> f32 {
    let u = 0.7978845608 * (x + 0.044715 * x * x * x);
    return x / (1.0 + exp(min(-2.0 * u, 80.0)));
}

fn matmul_finished(sum: f32, column: u32, at: u32) -> f32 {
    var y = sum;
    if (matmul.mode & 4u) != 0u { y += ld(matmul_bias[column]); }
    if (matmul.mode & 8u) != 0u { y += ld(matmul_y[at]); }
    switch matmul.mode & 3u {
        case 1u: { return select(y, 0.0, y < 0.0); }
        case 2u: { return matmul_gelu(y); }
        default: { return y; }
    }
}

fn matmul_dot(row: u32, column: u32, batch: u32) -> f32 {
    let a0 = batch * matmul.a_batch + row * matmul.a_row;
    let b0 = batch * matmul.b_batch + column * matmul.b_column;
    var sum = 0.0;
    for (var k = matmul.k0; k < matmul.k1; k++) {
        sum += ld(matmul_a[a0 + k * matmul.a_column]) * ld(matmul_b[b0 + k * matmul.b_row]);
    }
    return sum;
}

@compute @workgroup_size(8, 8)
fn matmul_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = matmul.first_row + gid.y;
    let column = matmul.first_column + gid.x;
    let batch = matmul.first_batch + gid.z;
    if row >= matmul.rows || column >= matmul.columns { return; }
    let at = (batch * matmul.rows + row) * matmul.columns + column;
    matmul_y[at] = st(matmul_finished(matmul_dot(row, column, batch), column, at));
}

// One range of k of a product whose k is too long for one invocation; ranges come in order.
@compute @workgroup_size(8, 8)
fn matmul_part(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = matmul.first_row + gid.y;
    let column = matmul.first_column + gid.x;
    let batch = matmul.first_batch + gid.z;
    if row >= matmul.rows || column >= matmul.columns { return; }
    let at = (batch * matmul.rows + row) * matmul.columns + column;
    let sum = matmul_dot(row, column, batch);
    if matmul.k0 == 0u { matmul_sums[at] = sum; } else { matmul_sums[at] += sum; }
}

@compute @workgroup_size(8, 8)
fn matmul_finish(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = matmul.first_row + gid.y;
    let column = matmul.first_column + gid.x;
    let batch = matmul.first_batch + gid.z;
    if row >= matmul.rows || column >= matmul.columns { return; }
    let at = (batch * matmul.rows + row) * matmul.columns + column;
    matmul_y[at] = st(matmul_finished(matmul_summed[at], column, at));
}
