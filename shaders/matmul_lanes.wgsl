// op:       matmul
// math:     as matmul.wgsl, which is joined in front of this file
// grad:     as matmul.wgsl
// shapes:   as matmul.wgsl: a[B, M, K], b[B, K, N] (a4, b4: the same in fours), bias[N], y[B, M, N] (bias4, y4), sums[B, M, N]
// layout:   as matmul_fwd_v3: rows of a, of b and of y start at multiples of four elements
// launch:   groups of one subgroup of eight lanes, 32x32 outputs each; batch in z
// cost:     2 B M N K flop
// numerics: f32 sums in the order of k; NaN passes through
// source:   -
// rungs:    v5 four rows of a and four columns of b to a lane; each lane's rows are broadcast to all, so that an element is
//           loaded once for 32 products: software drivers load lane by lane, which costs them more than the products

fn matmul_row_sum(c: vec4<f32>, a: vec4<f32>, b: mat4x4<f32>) -> vec4<f32> {
    return fma(a.wwww, b[3], fma(a.zzzz, b[2], fma(a.yyyy, b[1], fma(a.xxxx, b[0], c))));
}

// Four rows more of c += a b; a by rows along k, as its lane has them; b by steps of k.
fn matmul_rows(c: mat4x4<f32>, a0: vec4<f32>, a1: vec4<f32>, a2: vec4<f32>, a3: vec4<f32>, b: mat4x4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(matmul_row_sum(c[0], a0, b), matmul_row_sum(c[1], a1, b), matmul_row_sum(c[2], a2, b), matmul_row_sum(c[3], a3, b));
}

// 32x32 outputs of a subgroup: of each lane four columns of all rows; ci holds rows 4 i to 4 i + 3.
struct LaneTile {
    c0: mat4x4<f32>, c1: mat4x4<f32>, c2: mat4x4<f32>, c3: mat4x4<f32>,
    c4: mat4x4<f32>, c5: mat4x4<f32>, c6: mat4x4<f32>, c7: mat4x4<f32>,
}

// Four steps of k: of x each lane has four rows, along k; of y four columns, by steps of k.
fn lane_tile_add(t: LaneTile, x: mat4x4<f32>, y: mat4x4<f32>) -> LaneTile {
    return LaneTile(
        matmul_rows(t.c0, subgroupBroadcast(x[0], 0u), subgroupBroadcast(x[1], 0u), subgroupBroadcast(x[2], 0u), subgroupBroadcast(x[3], 0u), y),
        matmul_rows(t.c1, subgroupBroadcast(x[0], 1u), subgroupBroadcast(x[1], 1u), subgroupBroadcast(x[2], 1u), subgroupBroadcast(x[3], 1u), y),
        matmul_rows(t.c2, subgroupBroadcast(x[0], 2u), subgroupBroadcast(x[1], 2u), subgroupBroadcast(x[2], 2u), subgroupBroadcast(x[3], 2u), y),
        matmul_rows(t.c3, subgroupBroadcast(x[0], 3u), subgroupBroadcast(x[1], 3u), subgroupBroadcast(x[2], 3u), subgroupBroadcast(x[3], 3u), y),
        matmul_rows(t.c4, subgroupBroadcast(x[0], 4u), subgroupBroadcast(x[1], 4u), subgroupBroadcast(x[2], 4u), subgroupBroadcast(x[3], 4u), y),
        matmul_rows(t.c5, subgroupBroadcast(x[0], 5u), subgroupBroadcast(x[1], 5u), subgroupBroadcast(x[2], 5u), subgroupBroadcast(x[3], 5u), y),
        matmul_rows(t.c6, subgroupBroadcast(x[0], 6u), subgroupBroadcast(x[1], 6u), subgroupBroadcast(x[2], 6u), subgroupBroadcast(x[3], 6u), y),
        matmul_rows(t.c7, subgroupBroadcast(x[0], 7u), subgroupBroadcast(x[1], 7u), subgroupBroadcast(x[2], 7u), subgroupBroadcast(x[3], 7u), y));
}

@group(0) @binding(2) var<storage, read> matmul_bias4: array<vec4<E>>;
@group(0) @binding(3) var<storage, read_write> matmul_y4: array<vec4<E>>;

// Four neighbours in a row at once: a store of one costs a check, and an epilogue of one is as much code.
fn matmul_put_four(batch: u32, row: u32, column: u32, sums: vec4<f32>) {
    if row >= matmul.rows || column >= matmul.columns { return; }
    let at = ((batch * matmul.rows + row) * matmul.columns + column) / 4u;
    var y = sums;
    if (matmul.mode & 4u) != 0u { y += matmul_ld4(matmul_bias4[column / 4u]); }
    if (matmul.mode & 8u) != 0u { y += matmul_ld4(matmul_y4[at]); }
    switch matmul.mode & 3u {
        case 1u: { y = select(y, vec4<f32>(0.0), y < vec4<f32>(0.0)); }
        case 2u: { y = vec4<f32>(matmul_gelu(y.x), matmul_gelu(y.y), matmul_gelu(y.z), matmul_gelu(y.w)); }
        default: {}
    }
    matmul_y4[at] = vec4<E>(st(y.x), st(y.y), st(y.z), st(y.w));
}

fn matmul_put_rows(batch: u32, row: u32, column: u32, c: mat4x4<f32>) {
    matmul_put_four(batch, row, column, c[0]);
    matmul_put_four(batch, row + 1u, column, c[1]);
    matmul_put_four(batch, row + 2u, column, c[2]);
    matmul_put_four(batch, row + 3u, column, c[3]);
}

@compute @workgroup_size(8)
fn matmul_fwd_v5(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let row = matmul.first_row + group.y * 32u;
    let column = matmul.first_column + group.x * 32u + lane * 4u;
    let batch = matmul.first_batch + group.z;
    let at_a = matmul_starts(A_ALONG_K, row + lane * 4u, matmul.rows, batch * matmul.a_batch, matmul.a_row, matmul.a_column);
    let at_b = matmul_starts(B_ALONG_K, column, matmul.columns, batch * matmul.b_batch, matmul.b_column, matmul.b_row);
    // Four of k are one load along k, else four strides of k.
    var step_a = 1u;
    var step_b = 1u;
    if !A_ALONG_K { step_a = matmul.a_column; }
    if !B_ALONG_K { step_b = matmul.b_row; }
    var t: LaneTile;
    var a = 0u;
    var b = 0u;
    for (var k = 0u; k < matmul.k1; k += 4u) {
        t = lane_tile_add(t, transpose(matmul_a_quad(at_a, a)), matmul_b_quad(at_b, b));
        a += step_a;
        b += step_b;
    }
    matmul_put_rows(batch, row, column, t.c0);
    matmul_put_rows(batch, row + 4u, column, t.c1);
    matmul_put_rows(batch, row + 8u, column, t.c2);
    matmul_put_rows(batch, row + 12u, column, t.c3);
    matmul_put_rows(batch, row + 16u, column, t.c4);
    matmul_put_rows(batch, row + 20u, column, t.c5);
    matmul_put_rows(batch, row + 24u, column, t.c6);
    matmul_put_rows(batch, row + 28u, column, t.c7);
}
