// op:       matmul_sparse24, matmul_sparse24_int8
// math:     y[i, j] = sum_g v[j, 2g] x[i, 4g + p0] + v[j, 2g + 1] x[i, 4g + p1] (+ bias[j]); int8: times xs[i] ws[j]
// grad:     x and values through decompress24, gather24 and matmul; int8: none
// shapes:   x[M, K], values[N, K/2], meta[N, ceil(K/32)], bias[N], y[M, N];
//           int8: x[M, K] i8, xs[M], values[N, K/2] i8, meta, ws[N], bias[N], y[M, N] f32
// layout:   meta: two bits per kept place, eight groups of four to a word; i8 four to a word
// launch:   linear, 64 invocations a group; one invocation per element (v1, int8) or per 4 rows of one column (v2)
// cost:     M N K operations: half of dense; K/2 values and K/8 bytes of places read per column
// numerics: f32 sums in the order of k; int8: exact int32 sums, then three roundings
// source:   Mishra et al. 2021
// rungs:    v1 one element; v2 four rows share the values and places they meet

struct Sparse24MatmulParams { m: u32, n: u32, k: u32, bias: u32 }
var<immediate> product24: Sparse24MatmulParams;

@group(0) @binding(0) var<storage, read> product24_x: array<E>;
@group(0) @binding(1) var<storage, read> product24_values: array<E>;
@group(0) @binding(2) var<storage, read> product24_meta: array<u32>;
@group(0) @binding(3) var<storage, read> product24_bias: array<E>;
@group(0) @binding(4) var<storage, read_write> product24_y: array<E>;

fn words_of_meta() -> u32 { return (product24.k + 31u) / 32u; }

@compute @workgroup_size(64)
fn matmul_sparse24_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let i = id / product24.n;
    let j = id % product24.n;
    if i >= product24.m { return; }
    let x = i * product24.k;
    let values = j * product24.k / 2u;
    let meta_row = j * words_of_meta();
    var sum = 0.0;
    for (var g = 0u; g < product24.k / 4u; g++) {
        let places = product24_meta[meta_row + g / 8u] >> (4u * (g % 8u));
        sum += ld(product24_values[values + 2u * g]) * ld(product24_x[x + 4u * g + (places & 3u)]);
        sum += ld(product24_values[values + 2u * g + 1u]) * ld(product24_x[x + 4u * g + ((places >> 2u) & 3u)]);
    }
    if product24.bias == 1u { sum += ld(product24_bias[j]); }
    product24_y[id] = st(sum);
}

fn column_of(rows: vec4<u32>, at: u32) -> vec4<f32> {
    return vec4<f32>(
        ld(product24_x[rows.x + at]), ld(product24_x[rows.y + at]), ld(product24_x[rows.z + at]), ld(product24_x[rows.w + at]));
}

@compute @workgroup_size(64)
fn matmul_sparse24_fwd_v2(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let i = (id / product24.n) * 4u;
    let j = id % product24.n;
    if i >= product24.m { return; }
    // Rows past the edge repeat the last one; what they make is not stored.
    let rows = min(vec4<u32>(i, i + 1u, i + 2u, i + 3u), vec4<u32>(product24.m - 1u)) * product24.k;
    let values = j * product24.k / 2u;
    let meta_row = j * words_of_meta();
    var sum = vec4<f32>();
    for (var g = 0u; g < product24.k / 4u; g++) {
        let places = product24_meta[meta_row + g / 8u] >> (4u * (g % 8u));
        sum += ld(product24_values[values + 2u * g]) * column_of(rows, 4u * g + (places & 3u));
        sum += ld(product24_values[values + 2u * g + 1u]) * column_of(rows, 4u * g + ((places >> 2u) & 3u));
    }
    if product24.bias == 1u { sum += vec4<f32>(ld(product24_bias[j])); }
    for (var r = 0u; r < 4u && i + r < product24.m; r++) { product24_y[(i + r) * product24.n + j] = st(sum[r]); }
}

@group(0) @binding(0) var<storage, read> int24_x: array<u32>;
@group(0) @binding(1) var<storage, read> int24_xs: array<f32>;
@group(0) @binding(2) var<storage, read> int24_values: array<u32>;
@group(0) @binding(3) var<storage, read> int24_meta: array<u32>;
@group(0) @binding(4) var<storage, read> int24_ws: array<f32>;
@group(0) @binding(5) var<storage, read> int24_bias: array<f32>;
@group(0) @binding(6) var<storage, read_write> int24_y: array<f32>;

@compute @workgroup_size(64)
fn matmul_sparse24_int8_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let i = id / product24.n;
    let j = id % product24.n;
    if i >= product24.m { return; }
    let groups = product24.k / 4u;
    let meta_row = j * words_of_meta();
    var sum = 0;
    for (var g = 0u; g < groups; g++) {
        let places = int24_meta[meta_row + g / 8u] >> (4u * (g % 8u));
        // A group of x is one word; a pair of values is half of one.
        let x = bitcast<i32>(int24_x[i * groups + g]);
        let pair = j * groups + g;
        let values = bitcast<i32>(int24_values[pair / 2u] >> (16u * (pair & 1u)));
        sum += extractBits(values, 0u, 8u) * extractBits(x, 8u * (places & 3u), 8u);
        sum += extractBits(values, 8u, 8u) * extractBits(x, 8u * ((places >> 2u) & 3u), 8u);
    }
    var y = f32(sum) * int24_xs[i] * int24_ws[j];
    if product24.bias == 1u { y += int24_bias[j]; }
    int24_y[id] = y;
}
