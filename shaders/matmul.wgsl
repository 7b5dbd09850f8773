// op:       matmul
// math:     y = f(sum_k a[i, k] b[k, j] + bias[j]) or y += sum_k a[i, k] b[k, j] (+ bias[j]), f: identity, ReLU, GELU (tanh)
// grad:     da = dz bᵀ, db = aᵀ dz by matmul itself; dbias = column sums of dz
// shapes:   fwd: a[B, M, K], b[B, K, N] (a4, b4: the same in fours), bias[N], y[B, M, N]; part: a, b, sums[B, M, N]; finish: sums[B, M, N], bias[N], y[B, M, N]
// layout:   a and b by strides (any transpose; a shared matrix has batch stride 0), y contiguous
// launch:   8x8 invocations (v4: as its constants say), one output (v1), 16x8 (v3) or 8x8 each; batch in z; blocks of rows, columns and batch above 65,535 groups
// cost:     2 B M N K flop
// numerics: f32 sums in the order of k, cut in launches of k0..k1 where a driver limits loops; NaN passes through
// source:   GELU: Hendrycks and Gimpel 2016
// rungs:    v1 one output per invocation; v2 8x8 outputs in registers, k in fours, scalar loads of any stride, no barriers;
//           v3 16x8 outputs, loads of four neighbours; v4 8x8 outputs of each invocation of a workgroup (64x64 of
//           all, 16 of k at a time in workgroup memory; other tiles and depths for `kernels tune`)

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

// 8x8 outputs of one invocation: low and high rows by left and right columns; column i of a matrix is row i of outputs.
struct MatmulTile { ll: mat4x4<f32>, lr: mat4x4<f32>, hl: mat4x4<f32>, hr: mat4x4<f32> }

// c + a b^T, written out: loops over registers are not unrolled by every driver.
fn matmul_outer4(c: mat4x4<f32>, a: vec4<f32>, b: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(fma(a.xxxx, b, c[0]), fma(a.yyyy, b, c[1]), fma(a.zzzz, b, c[2]), fma(a.wwww, b, c[3]));
}

fn matmul_outer(t: MatmulTile, low: vec4<f32>, high: vec4<f32>, left: vec4<f32>, right: vec4<f32>) -> MatmulTile {
    return MatmulTile(matmul_outer4(t.ll, low, left), matmul_outer4(t.lr, low, right),
        matmul_outer4(t.hl, high, left), matmul_outer4(t.hr, high, right));
}

// Four steps of k, in order; column q of each matrix belongs to k + q.
fn matmul_outer_quad(t: MatmulTile, low: mat4x4<f32>, high: mat4x4<f32>, left: mat4x4<f32>, right: mat4x4<f32>) -> MatmulTile {
    let t1 = matmul_outer(t, low[0], high[0], left[0], right[0]);
    let t2 = matmul_outer(t1, low[1], high[1], left[1], right[1]);
    let t3 = matmul_outer(t2, low[2], high[2], left[2], right[2]);
    return matmul_outer(t3, low[3], high[3], left[3], right[3]);
}

fn matmul_put(batch: u32, row: u32, column: u32, sum: f32) {
    if row < matmul.rows && column < matmul.columns {
        let at = (batch * matmul.rows + row) * matmul.columns + column;
        matmul_y[at] = st(matmul_finished(sum, column, at));
    }
}

fn matmul_put_row(batch: u32, row: u32, column: u32, left: vec4<f32>, right: vec4<f32>) {
    matmul_put(batch, row, column, left.x);
    matmul_put(batch, row, column + 1u, left.y);
    matmul_put(batch, row, column + 2u, left.z);
    matmul_put(batch, row, column + 3u, left.w);
    matmul_put(batch, row, column + 4u, right.x);
    matmul_put(batch, row, column + 5u, right.y);
    matmul_put(batch, row, column + 6u, right.z);
    matmul_put(batch, row, column + 7u, right.w);
}

fn matmul_put_tile(batch: u32, row: u32, column: u32, t: MatmulTile) {
    matmul_put_row(batch, row, column, t.ll[0], t.lr[0]);
    matmul_put_row(batch, row + 1u, column, t.ll[1], t.lr[1]);
    matmul_put_row(batch, row + 2u, column, t.ll[2], t.lr[2]);
    matmul_put_row(batch, row + 3u, column, t.ll[3], t.lr[3]);
    matmul_put_row(batch, row + 4u, column, t.hl[0], t.hr[0]);
    matmul_put_row(batch, row + 5u, column, t.hl[1], t.hr[1]);
    matmul_put_row(batch, row + 6u, column, t.hl[2], t.hr[2]);
    matmul_put_row(batch, row + 7u, column, t.hl[3], t.hr[3]);
}

// Four neighbours from `first`; those past the end repeat the last, whose output is not stored.
fn matmul_four(first: u32, extent: u32) -> vec4<u32> {
    return min(vec4<u32>(first, first + 1u, first + 2u, first + 3u), vec4<u32>(extent - 1u));
}

fn matmul_a_at(at: vec4<u32>, offset: u32) -> vec4<f32> {
    return vec4<f32>(ld(matmul_a[at.x + offset]), ld(matmul_a[at.y + offset]), ld(matmul_a[at.z + offset]), ld(matmul_a[at.w + offset]));
}

fn matmul_b_at(at: vec4<u32>, offset: u32) -> vec4<f32> {
    return vec4<f32>(ld(matmul_b[at.x + offset]), ld(matmul_b[at.y + offset]), ld(matmul_b[at.z + offset]), ld(matmul_b[at.w + offset]));
}

@compute @workgroup_size(8, 8)
fn matmul_fwd_v2(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = matmul.first_row + gid.y * 8u;
    let column = matmul.first_column + gid.x * 8u;
    let batch = matmul.first_batch + gid.z;
    if row >= matmul.rows || column >= matmul.columns { return; }
    let low = batch * matmul.a_batch + matmul_four(row, matmul.rows) * matmul.a_row;
    let high = batch * matmul.a_batch + matmul_four(row + 4u, matmul.rows) * matmul.a_row;
    let left = batch * matmul.b_batch + matmul_four(column, matmul.columns) * matmul.b_column;
    let right = batch * matmul.b_batch + matmul_four(column + 4u, matmul.columns) * matmul.b_column;
    let sa = matmul.a_column;
    let sb = matmul.b_row;
    var t: MatmulTile;
    var k = 0u;
    for (; k + 4u <= matmul.k1; k += 4u) {
        let a = k * sa;
        let b = k * sb;
        t = matmul_outer_quad(t,
            mat4x4<f32>(matmul_a_at(low, a), matmul_a_at(low, a + sa), matmul_a_at(low, a + 2u * sa), matmul_a_at(low, a + 3u * sa)),
            mat4x4<f32>(matmul_a_at(high, a), matmul_a_at(high, a + sa), matmul_a_at(high, a + 2u * sa), matmul_a_at(high, a + 3u * sa)),
            mat4x4<f32>(matmul_b_at(left, b), matmul_b_at(left, b + sb), matmul_b_at(left, b + 2u * sb), matmul_b_at(left, b + 3u * sb)),
            mat4x4<f32>(matmul_b_at(right, b), matmul_b_at(right, b + sb), matmul_b_at(right, b + 2u * sb), matmul_b_at(right, b + 3u * sb)));
    }
    for (; k < matmul.k1; k++) {
        t = matmul_outer(t, matmul_a_at(low, k * sa), matmul_a_at(high, k * sa), matmul_b_at(left, k * sb), matmul_b_at(right, k * sb));
    }
    matmul_put_tile(batch, row, column, t);
}

// Whether neighbours in memory are neighbours along k (else along rows of a, columns of b).
override A_ALONG_K: bool = true;
override B_ALONG_K: bool = true;
@group(0) @binding(0) var<storage, read> matmul_a4: array<vec4<E>>;
@group(0) @binding(1) var<storage, read> matmul_b4: array<vec4<E>>;

fn matmul_ld4(x: vec4<E>) -> vec4<f32> { return vec4<f32>(ld(x.x), ld(x.y), ld(x.z), ld(x.w)); }

fn matmul_a_quad(at: vec4<u32>, offset: u32) -> mat4x4<f32> {
    let m = mat4x4<f32>(matmul_ld4(matmul_a4[at.x + offset]), matmul_ld4(matmul_a4[at.y + offset]),
        matmul_ld4(matmul_a4[at.z + offset]), matmul_ld4(matmul_a4[at.w + offset]));
    if A_ALONG_K { return transpose(m); }
    return m;
}

fn matmul_b_quad(at: vec4<u32>, offset: u32) -> mat4x4<f32> {
    let m = mat4x4<f32>(matmul_ld4(matmul_b4[at.x + offset]), matmul_ld4(matmul_b4[at.y + offset]),
        matmul_ld4(matmul_b4[at.z + offset]), matmul_ld4(matmul_b4[at.w + offset]));
    if B_ALONG_K { return transpose(m); }
    return m;
}

// In fours of elements: where the four loads of a block start. Along k they are four rows (columns of b) from `first`,
// else four steps of k; a block past the end repeats the last one, whose outputs are not stored.
fn matmul_starts(along_k: bool, first: u32, extent: u32, base: u32, across: u32, along: u32) -> vec4<u32> {
    if along_k { return (base + matmul_four(first, extent) * across) / 4u; }
    return (base + min(first, extent - 4u) + vec4<u32>(0u, 1u, 2u, 3u) * along) / 4u;
}

@compute @workgroup_size(8, 8)
fn matmul_fwd_v3(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = matmul.first_row + gid.y * 16u;
    let column = matmul.first_column + gid.x * 8u;
    let batch = matmul.first_batch + gid.z;
    if row >= matmul.rows || column >= matmul.columns { return; }
    let base_a = batch * matmul.a_batch;
    let base_b = batch * matmul.b_batch;
    // Sixteen rows, so that what is loaded of b serves two tiles.
    let low = matmul_starts(A_ALONG_K, row, matmul.rows, base_a, matmul.a_row, matmul.a_column);
    let high = matmul_starts(A_ALONG_K, row + 4u, matmul.rows, base_a, matmul.a_row, matmul.a_column);
    let low2 = matmul_starts(A_ALONG_K, row + 8u, matmul.rows, base_a, matmul.a_row, matmul.a_column);
    let high2 = matmul_starts(A_ALONG_K, row + 12u, matmul.rows, base_a, matmul.a_row, matmul.a_column);
    let left = matmul_starts(B_ALONG_K, column, matmul.columns, base_b, matmul.b_column, matmul.b_row);
    let right = matmul_starts(B_ALONG_K, column + 4u, matmul.columns, base_b, matmul.b_column, matmul.b_row);
    // Four of k are one load along k, else four strides of k.
    var step_a = 1u;
    var step_b = 1u;
    if !A_ALONG_K { step_a = matmul.a_column; }
    if !B_ALONG_K { step_b = matmul.b_row; }
    var t: MatmulTile;
    var t2: MatmulTile;
    var a = 0u;
    var b = 0u;
    for (var k = 0u; k < matmul.k1; k += 4u) {
        let l = matmul_b_quad(left, b);
        let r = matmul_b_quad(right, b);
        t = matmul_outer_quad(t, matmul_a_quad(low, a), matmul_a_quad(high, a), l, r);
        t2 = matmul_outer_quad(t2, matmul_a_quad(low2, a), matmul_a_quad(high2, a), l, r);
        a += step_a;
        b += step_b;
    }
    matmul_put_tile(batch, row, column, t);
    matmul_put_tile(batch, row + 8u, column, t2);
}

// Invocations down and across, 8x8 outputs each, and how much of k they share at a time.
override TILE_DOWN: u32 = 8u;
override TILE_ACROSS: u32 = 8u;
override TILE_K: u32 = 16u;
// Sizes by name: naga cannot compare an index with a length that is an expression of others.
override TILE_A: u32 = 8u * TILE_DOWN * TILE_K;
override TILE_B: u32 = 8u * TILE_ACROSS * TILE_K;
// k-major.
var<workgroup> matmul_tile_a: array<f32, TILE_A>;
var<workgroup> matmul_tile_b: array<f32, TILE_B>;

fn matmul_shared_a(at: u32) -> vec4<f32> {
    return vec4<f32>(matmul_tile_a[at], matmul_tile_a[at + 1u], matmul_tile_a[at + 2u], matmul_tile_a[at + 3u]);
}

fn matmul_shared_b(at: u32) -> vec4<f32> {
    return vec4<f32>(matmul_tile_b[at], matmul_tile_b[at + 1u], matmul_tile_b[at + 2u], matmul_tile_b[at + 3u]);
}

@compute @workgroup_size(TILE_ACROSS, TILE_DOWN)
fn matmul_fwd_v4(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) lid: vec3<u32>) {
    let rows = 8u * TILE_DOWN;
    let columns = 8u * TILE_ACROSS;
    let first_row = matmul.first_row + group.y * rows;
    let first_column = matmul.first_column + group.x * columns;
    let batch = matmul.first_batch + group.z;
    let base_a = batch * matmul.a_batch;
    let base_b = batch * matmul.b_batch;
    let id = lid.y * TILE_ACROSS + lid.x;
    let count = TILE_DOWN * TILE_ACROSS;
    // Neighbouring invocations read neighbours in memory.
    let along_a = matmul.a_column == 1u;
    let along_b = matmul.b_row == 1u;
    var t: MatmulTile;
    for (var k0 = 0u; k0 < matmul.k1; k0 += TILE_K) {
        for (var part = 0u; part < TILE_A; part += count) {
            let i = part + id;
            let ka = select(i / rows, i % TILE_K, along_a);
            let ra = select(i % rows, i / TILE_K, along_a);
            var x = 0.0;
            if k0 + ka < matmul.k1 && first_row + ra < matmul.rows {
                x = ld(matmul_a[base_a + (first_row + ra) * matmul.a_row + (k0 + ka) * matmul.a_column]);
            }
            matmul_tile_a[ka * rows + ra] = x;
        }
        for (var part = 0u; part < TILE_B; part += count) {
            let i = part + id;
            let kb = select(i / columns, i % TILE_K, along_b);
            let cb = select(i % columns, i / TILE_K, along_b);
            var x = 0.0;
            if k0 + kb < matmul.k1 && first_column + cb < matmul.columns {
                x = ld(matmul_b[base_b + (k0 + kb) * matmul.b_row + (first_column + cb) * matmul.b_column]);
            }
            matmul_tile_b[kb * columns + cb] = x;
        }
        workgroupBarrier();
        for (var k = 0u; k < TILE_K; k++) {
            let a = k * rows + lid.y * 8u;
            let b = k * columns + lid.x * 8u;
            t = matmul_outer(t, matmul_shared_a(a), matmul_shared_a(a + 4u), matmul_shared_b(b), matmul_shared_b(b + 4u));
        }
        // The next tile may only overwrite this one once everybody has read it.
        workgroupBarrier();
    }
    matmul_put_tile(batch, first_row + lid.y * 8u, first_column + lid.x * 8u, t);
}
