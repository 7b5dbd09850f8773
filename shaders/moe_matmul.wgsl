// op:       grouped_matmul, grouped_matmul_int8, grouped_matmul_bwd_input, grouped_matmul_bwd_weight
// math:     y[r, j] = f(sum_c x[row(r), c] w[e(r), j, c] + b[e(r), j]), e(r) the expert whose sorted rows hold r
// grad:     dx[r, c] = sum_j dz[r, j] w[e(r), j, c]; dw[e, j, c] = sum_{r in e} dz[r, j] x[row(r), c]; db[e, j] = sum dz[r, j]
// shapes:   fwd: x[M, D], w[E, N, D], b[E, N], order[R], offsets[E + 1], y[R, N]; int8: x i8, xs[M], w i8, ws[E, N], b, order,
//           offsets, y; bwd_input: dz[R, N], w, offsets, dx[R, D]; bwd_weight: dz, x, order, offsets, dw[E, N, D];
//           bwd_bias: dz, x, order, offsets, db[E, N]
// layout:   rows contiguous; i8 four to a word, little endian, rows need not start on words
// launch:   linear, 64 invocations a group: four columns of a row (fwd), one element else
// cost:     2 R N D operations; weights of experts without rows are never read
// numerics: f32 sums in rising order of the summed axis; int8: exact int32 sums, then three roundings
// source:   Shazeer et al. 2017; MoEfication: Zhang et al. 2022
// rungs:    v1 as above

struct GroupedParams { rows: u32, n: u32, d: u32, k: u32, gather: u32, experts: u32, relu: u32, bias: u32 }
struct GroupedBackParams { rows: u32, n: u32, d: u32, k: u32, gather: u32, experts: u32 }
var<immediate> grouped: GroupedParams;
var<immediate> grouped_back: GroupedBackParams;

@group(0) @binding(0) var<storage, read> grouped_x: array<E>;
@group(0) @binding(1) var<storage, read> grouped_w: array<E>;
@group(0) @binding(2) var<storage, read> grouped_b: array<E>;
@group(0) @binding(3) var<storage, read> grouped_order: array<u32>;
@group(0) @binding(4) var<storage, read> grouped_offsets: array<u32>;
@group(0) @binding(5) var<storage, read_write> grouped_y: array<E>;

@compute @workgroup_size(64)
fn grouped_matmul_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let quads = (grouped.n + 3u) / 4u;
    let r = id / quads;
    let j = (id % quads) * 4u;
    if r >= grouped.rows { return; }
    var e = 0u;
    for (var next = 1u; next < grouped.experts; next++) {
        if grouped_offsets[next] <= r { e = next; }
    }
    let x = select(r, min(grouped_order[r], grouped.rows - 1u) / grouped.k, grouped.gather == 1u) * grouped.d;
    // Columns past the edge repeat the last one; what they make is not stored.
    let columns = min(vec4<u32>(j, j + 1u, j + 2u, j + 3u), vec4<u32>(grouped.n - 1u)) + e * grouped.n;
    let w = columns * grouped.d;
    var sum = vec4<f32>();
    for (var c = 0u; c < grouped.d; c++) {
        let weights = vec4<f32>(ld(grouped_w[w.x + c]), ld(grouped_w[w.y + c]), ld(grouped_w[w.z + c]), ld(grouped_w[w.w + c]));
        sum += ld(grouped_x[x + c]) * weights;
    }
    for (var q = 0u; q < 4u && j + q < grouped.n; q++) {
        var y = sum[q];
        if grouped.bias == 1u { y += ld(grouped_b[columns[q]]); }
        if grouped.relu == 1u && y < 0.0 { y = 0.0; }
        grouped_y[r * grouped.n + j + q] = st(y);
    }
}

@group(0) @binding(0) var<storage, read> bytes_x: array<u32>;
@group(0) @binding(1) var<storage, read> bytes_xs: array<f32>;
@group(0) @binding(2) var<storage, read> bytes_w: array<u32>;
@group(0) @binding(3) var<storage, read> bytes_ws: array<f32>;
@group(0) @binding(4) var<storage, read> bytes_b: array<f32>;
@group(0) @binding(5) var<storage, read> bytes_order: array<u32>;
@group(0) @binding(6) var<storage, read> bytes_offsets: array<u32>;
@group(0) @binding(7) var<storage, read_write> bytes_y: array<f32>;

fn byte_product(x: u32, w: u32) -> i32 {
    return extractBits(bitcast<i32>(bytes_x[x >> 2u]), 8u * (x & 3u), 8u)
        * extractBits(bitcast<i32>(bytes_w[w >> 2u]), 8u * (w & 3u), 8u);
}

@compute @workgroup_size(64)
fn grouped_matmul_int8_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let r = id / grouped.n;
    let j = id % grouped.n;
    if r >= grouped.rows { return; }
    var e = 0u;
    for (var next = 1u; next < grouped.experts; next++) {
        if bytes_offsets[next] <= r { e = next; }
    }
    let row = select(r, min(bytes_order[r], grouped.rows - 1u) / grouped.k, grouped.gather == 1u);
    let column = e * grouped.n + j;
    let x = row * grouped.d;
    let w = column * grouped.d;
    var sum = 0;
    if (grouped.d & 3u) == 0u {
        for (var c = 0u; c < grouped.d / 4u; c++) { sum += dot4I8Packed(bytes_x[x / 4u + c], bytes_w[w / 4u + c]); }
    } else {
        for (var c = 0u; c < grouped.d; c += 4u) {
            sum += byte_product(x + c, w + c);
            if c + 1u < grouped.d { sum += byte_product(x + c + 1u, w + c + 1u); }
            if c + 2u < grouped.d { sum += byte_product(x + c + 2u, w + c + 2u); }
            if c + 3u < grouped.d { sum += byte_product(x + c + 3u, w + c + 3u); }
        }
    }
    var y = f32(sum) * bytes_xs[row] * bytes_ws[column];
    if grouped.bias == 1u { y += bytes_b[column]; }
    if grouped.relu == 1u && y < 0.0 { y = 0.0; }
    bytes_y[id] = y;
}

@group(0) @binding(2) var<storage, read> input_offsets: array<u32>;
@group(0) @binding(3) var<storage, read_write> input_dx: array<E>;

@compute @workgroup_size(64)
fn grouped_matmul_bwd_input(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let r = id / grouped_back.d;
    if r >= grouped_back.rows { return; }
    var e = 0u;
    for (var next = 1u; next < grouped_back.experts; next++) {
        if input_offsets[next] <= r { e = next; }
    }
    let w = e * grouped_back.n * grouped_back.d + id % grouped_back.d;
    var sum = 0.0;
    for (var j = 0u; j < grouped_back.n; j++) {
        sum += ld(grouped_x[r * grouped_back.n + j]) * ld(grouped_w[w + j * grouped_back.d]);
    }
    input_dx[id] = st(sum);
}

@group(0) @binding(2) var<storage, read> weight_order: array<u32>;
@group(0) @binding(3) var<storage, read> weight_offsets: array<u32>;
@group(0) @binding(4) var<storage, read_write> weight_dw: array<E>;

// Argument 0 is dz, argument 1 x.
@compute @workgroup_size(64)
fn grouped_matmul_bwd_weight(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let column = id / grouped_back.d;
    let e = column / grouped_back.n;
    if e >= grouped_back.experts { return; }
    let j = column % grouped_back.n;
    let c = id % grouped_back.d;
    var sum = 0.0;
    for (var r = weight_offsets[e]; r < min(weight_offsets[e + 1u], grouped_back.rows); r++) {
        let row = select(r, min(weight_order[r], grouped_back.rows - 1u) / grouped_back.k, grouped_back.gather == 1u);
        sum += ld(grouped_x[r * grouped_back.n + j]) * ld(grouped_w[row * grouped_back.d + c]);
    }
    weight_dw[id] = st(sum);
}

@compute @workgroup_size(64)
fn grouped_matmul_bwd_bias(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let e = id / grouped_back.n;
    if e >= grouped_back.experts { return; }
    var sum = 0.0;
    for (var r = weight_offsets[e]; r < min(weight_offsets[e + 1u], grouped_back.rows); r++) {
        sum += ld(grouped_x[r * grouped_back.n + id % grouped_back.n]);
    }
    weight_dw[id] = st(sum);
}
