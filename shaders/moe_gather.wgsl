// op:       gathered_matmul, gathered_matmul_int8
// math:     z(t, j) = w[e] x[row], e the j-th choice of token t; rows: y[t k + j] = f(z(t, j) + b[e]), 0 where none; sum:
//           y[t] = f(sum_j z(t, j) + b)
// grad:     none: for inference
// shapes:   rows: x[M, D], w[E, N, D], b[E, N], indices[M, k], gates[M, k] or unused, y[M k, N]; sum: x[M k, D], b[N], y[M, N];
//           int8: x i8, xs, w i8, ws[E, N], b, indices, gates, y
// layout:   rows contiguous; slot = token k + choice; i8 four to a word, little endian, rows need not start on words
// launch:   linear, 64 invocations a group, one output each
// cost:     2 M k N D operations; weights of experts that nobody chose are never read
// numerics: f32 sums in rising order of choice and of the summed axis; int8: exact int32 sums of each choice, two roundings, then
//           f32 sums over choices
// source:   MoEfication: Zhang et al. 2022
// rungs:    v1 as above

struct GatherParams { tokens: u32, n: u32, d: u32, k: u32, experts: u32, sum: u32, relu: u32, skips: u32, threshold: f32 }
var<immediate> gathered: GatherParams;

@group(0) @binding(0) var<storage, read> gathered_x: array<E>;
@group(0) @binding(1) var<storage, read> gathered_w: array<E>;
@group(0) @binding(2) var<storage, read> gathered_b: array<E>;
@group(0) @binding(3) var<storage, read> gathered_indices: array<u32>;
@group(0) @binding(4) var<storage, read> gathered_gates: array<f32>;
@group(0) @binding(5) var<storage, read_write> gathered_y: array<E>;

@compute @workgroup_size(64)
fn gathered_matmul_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let row = id / gathered.n;
    let j = id % gathered.n;
    let summed = gathered.sum == 1u;
    if row >= select(gathered.tokens * gathered.k, gathered.tokens, summed) { return; }
    let first = select(row, row * gathered.k, summed);
    let end = select(first + 1u, first + gathered.k, summed);
    var total = 0.0;
    var executed = summed;
    var bias = j;
    for (var slot = first; slot < end; slot++) {
        let e = gathered_indices[slot];
        if e >= gathered.experts { continue; }
        if gathered.skips == 1u { if !(gathered_gates[slot] > gathered.threshold) { continue; } }
        let x = select(slot / gathered.k, slot, summed) * gathered.d;
        let w = (e * gathered.n + j) * gathered.d;
        if !summed { bias = e * gathered.n + j; }
        executed = true;
        var sum = 0.0;
        for (var c = 0u; c < gathered.d; c++) { sum += ld(gathered_x[x + c]) * ld(gathered_w[w + c]); }
        total += sum;
    }
    if executed { total += ld(gathered_b[bias]); }
    if gathered.relu == 1u && total < 0.0 { total = 0.0; }
    gathered_y[id] = st(total);
}

@group(0) @binding(0) var<storage, read> gathered_bytes_x: array<u32>;
@group(0) @binding(1) var<storage, read> gathered_bytes_xs: array<f32>;
@group(0) @binding(2) var<storage, read> gathered_bytes_w: array<u32>;
@group(0) @binding(3) var<storage, read> gathered_bytes_ws: array<f32>;
@group(0) @binding(4) var<storage, read> gathered_bytes_b: array<f32>;
@group(0) @binding(5) var<storage, read> gathered_bytes_indices: array<u32>;
@group(0) @binding(6) var<storage, read> gathered_bytes_gates: array<f32>;
@group(0) @binding(7) var<storage, read_write> gathered_bytes_y: array<f32>;

fn gathered_byte_product(x: u32, w: u32) -> i32 {
    return extractBits(bitcast<i32>(gathered_bytes_x[x >> 2u]), 8u * (x & 3u), 8u)
        * extractBits(bitcast<i32>(gathered_bytes_w[w >> 2u]), 8u * (w & 3u), 8u);
}

@compute @workgroup_size(64)
fn gathered_matmul_int8_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let row = id / gathered.n;
    let j = id % gathered.n;
    let summed = gathered.sum == 1u;
    if row >= select(gathered.tokens * gathered.k, gathered.tokens, summed) { return; }
    let first = select(row, row * gathered.k, summed);
    let end = select(first + 1u, first + gathered.k, summed);
    var total = 0.0;
    var executed = summed;
    var bias = j;
    for (var slot = first; slot < end; slot++) {
        let e = gathered_bytes_indices[slot];
        if e >= gathered.experts { continue; }
        if gathered.skips == 1u { if !(gathered_bytes_gates[slot] > gathered.threshold) { continue; } }
        let source = select(slot / gathered.k, slot, summed);
        let column = e * gathered.n + j;
        let x = source * gathered.d;
        let w = column * gathered.d;
        if !summed { bias = column; }
        executed = true;
        var sum = 0;
        if (gathered.d & 3u) == 0u {
            for (var c = 0u; c < gathered.d / 4u; c++) {
                sum += dot4I8Packed(gathered_bytes_x[x / 4u + c], gathered_bytes_w[w / 4u + c]);
            }
        } else {
            for (var c = 0u; c < gathered.d; c++) { sum += gathered_byte_product(x + c, w + c); }
        }
        total += f32(sum) * gathered_bytes_xs[source] * gathered_bytes_ws[column];
    }
    if executed { total += gathered_bytes_b[bias]; }
    if gathered.relu == 1u && total < 0.0 { total = 0.0; }
    gathered_bytes_y[id] = total;
}
