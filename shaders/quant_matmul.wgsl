// op:       matmul_int8, matmul_int8_requantized
// math:     y[i, j] = (sum_k x[i, k] w[j, k]) xs[i] ws[j] + bias[j];
//           requantize: h = relu(y) or gelu(y), scale[i] = max_j |h[i, j]| / 127, q[i, j] = rne(h[i, j] / scale[i])
// grad:     none: training runs on fake-quantized values
// shapes:   x[M, K] i8, xs[M], w[N, K] i8, ws[N], bias[N] (any array where there is none), y[M, N];
//           requantize: hidden[M, N] (y of the launch before), q[M, N] i8, scale[M]
// layout:   rows contiguous along k; four i8 to a word, little endian; rows start on words where K % 4 = 0
// launch:   linear, 64 invocations a group; one invocation per element (v1), four columns (v2), 4 x 4 tile (v3);
//           requantize: 256 invocations for four rows, whose bytes are whole words
// cost:     2 M N K operations; M K + N K bytes read, 4 M N written; requantize: 8 M N read, M N written
// numerics: int32 sums, exact for K below 2^17; then three f32 roundings; requantize: the grid and the rounding of quant.wgsl
// source:   Jacob et al. 2018; dynamic per-token scales: Dettmers et al. 2022
// rungs:    v1 byte by byte, any K; v2 four columns share a word of x; v3 4 x 4 tile in registers

struct Int8Params { m: u32, n: u32, k: u32, bias: u32 }
var<immediate> int8: Int8Params;

@group(0) @binding(0) var<storage, read> int8_x: array<u32>;
@group(0) @binding(1) var<storage, read> int8_xs: array<f32>;
@group(0) @binding(2) var<storage, read> int8_w: array<u32>;
@group(0) @binding(3) var<storage, read> int8_ws: array<f32>;
@group(0) @binding(4) var<storage, read> int8_bias: array<f32>;
@group(0) @binding(5) var<storage, read_write> int8_y: array<f32>;

fn store_sum(i: u32, j: u32, sum: i32) {
    if i >= int8.m || j >= int8.n { return; }
    var y = f32(sum) * int8_xs[i] * int8_ws[j];
    if int8.bias == 1u { y += int8_bias[j]; }
    int8_y[i * int8.n + j] = y;
}

fn x_byte(at: u32) -> i32 { return extractBits(bitcast<i32>(int8_x[at >> 2u]), 8u * (at & 3u), 8u); }
fn w_byte(at: u32) -> i32 { return extractBits(bitcast<i32>(int8_w[at >> 2u]), 8u * (at & 3u), 8u); }

@compute @workgroup_size(64)
fn matmul_int8_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let i = id / int8.n;
    let j = id % int8.n;
    if i >= int8.m { return; }
    let x = i * int8.k;
    let w = j * int8.k;
    var sum = 0;
    // Four products a turn: the longest rows stay inside the loop budget of every driver.
    for (var k = 0u; k < int8.k; k += 4u) {
        sum += x_byte(x + k) * w_byte(w + k);
        if k + 1u < int8.k { sum += x_byte(x + k + 1u) * w_byte(w + k + 1u); }
        if k + 2u < int8.k { sum += x_byte(x + k + 2u) * w_byte(w + k + 2u); }
        if k + 3u < int8.k { sum += x_byte(x + k + 3u) * w_byte(w + k + 3u); }
    }
    store_sum(i, j, sum);
}

// Columns past the edge repeat the last one; what they make is not stored.
fn w_words(j: u32, words: u32) -> vec4<u32> {
    return min(vec4<u32>(j, j + 1u, j + 2u, j + 3u), vec4<u32>(int8.n - 1u)) * words;
}

fn dots(x: u32, w: vec4<u32>) -> vec4<i32> {
    return vec4<i32>(dot4I8Packed(x, w.x), dot4I8Packed(x, w.y), dot4I8Packed(x, w.z), dot4I8Packed(x, w.w));
}

@compute @workgroup_size(64)
fn matmul_int8_fwd_v2(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let columns = (int8.n + 3u) / 4u;
    let i = id / columns;
    let j = (id % columns) * 4u;
    if i >= int8.m { return; }
    let words = int8.k / 4u;
    let at = w_words(j, words);
    let x = i * words;
    var sum = vec4<i32>();
    for (var k = 0u; k < words; k++) {
        let w = vec4<u32>(int8_w[at.x + k], int8_w[at.y + k], int8_w[at.z + k], int8_w[at.w + k]);
        sum += dots(int8_x[x + k], w);
    }
    for (var c = 0u; c < 4u; c++) { store_sum(i, j + c, sum[c]); }
}

@compute @workgroup_size(64)
fn matmul_int8_fwd_v3(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let columns = (int8.n + 3u) / 4u;
    let i = (id / columns) * 4u;
    let j = (id % columns) * 4u;
    if i >= int8.m { return; }
    let words = int8.k / 4u;
    let at = w_words(j, words);
    let row = min(vec4<u32>(i, i + 1u, i + 2u, i + 3u), vec4<u32>(int8.m - 1u)) * words;
    var s0 = vec4<i32>();
    var s1 = vec4<i32>();
    var s2 = vec4<i32>();
    var s3 = vec4<i32>();
    for (var k = 0u; k < words; k++) {
        let w = vec4<u32>(int8_w[at.x + k], int8_w[at.y + k], int8_w[at.z + k], int8_w[at.w + k]);
        s0 += dots(int8_x[row.x + k], w);
        s1 += dots(int8_x[row.y + k], w);
        s2 += dots(int8_x[row.z + k], w);
        s3 += dots(int8_x[row.w + k], w);
    }
    for (var c = 0u; c < 4u; c++) {
        store_sum(i, j + c, s0[c]);
        store_sum(i + 1u, j + c, s1[c]);
        store_sum(i + 2u, j + c, s2[c]);
        store_sum(i + 3u, j + c, s3[c]);
    }
}

struct RequantizeParams { m: u32, n: u32, activation: u32, high: f32, unit: f32 }
var<immediate> requantize: RequantizeParams;

@group(0) @binding(0) var<storage, read> requantize_hidden: array<f32>;
@group(0) @binding(1) var<storage, read_write> requantize_q: array<u32>;
@group(0) @binding(2) var<storage, read_write> requantize_scale: array<f32>;

// Of each of the four rows the bits of the largest magnitude, which integers order as floats do, NaN on top; then 1 / scale.
var<workgroup> requantize_most: array<atomic<u32>, 4>;
var<workgroup> requantize_inverse: array<f32, 4>;

// ReLU or GELU; exp's argument is bounded so that it stays finite.
fn requantize_activated(at: u32) -> f32 {
    let x = requantize_hidden[at];
    if requantize.activation == 0u { return select(0.0, x, x > 0.0); }
    return x / (1.0 + exp(min(-1.5957691216 * (x + 0.044715 * x * x * x), 80.0)));
}

// Scale and its reciprocal for a largest magnitude: the symmetric grid of quant.wgsl.
fn requantize_grid(width: f32) -> vec2<f32> {
    if is_nan(width) || !(width <= 1.329228e36) {
        return vec2<f32>(bitcast<f32>(0x7fc00000u | (requantize.m & 0x80000000u)));
    }
    if width < 7.888609e-31 { return vec2<f32>(1.0, 0.0); }
    let scale = width * requantize.unit;
    return vec2<f32>(scale, reciprocal(scale));
}

@compute @workgroup_size(256)
fn matmul_int8_requantize(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) id: u32) {
    let n = requantize.n;
    let first = min((group.x + group.y * 65535u) * 4u, requantize.m);
    let rows = min(requantize.m - first, 4u);
    for (var row = 0u; row < rows; row++) {
        var most = 0u;
        for (var j = id; j < n; j += 256u) {
            most = max(most, bitcast<u32>(requantize_activated((first + row) * n + j)) & 0x7fffffffu);
        }
        atomicMax(&requantize_most[row], most);
    }
    workgroupBarrier();
    if id < rows {
        let grid = requantize_grid(bitcast<f32>(atomicLoad(&requantize_most[id])));
        requantize_scale[first + id] = grid.x;
        requantize_inverse[id] = grid.y;
    }
    workgroupBarrier();
    for (var at = 4u * id; at < rows * n; at += 1024u) {
        var packed = 0u;
        for (var i = at; i < min(at + 4u, rows * n); i++) {
            let level = round(requantize_activated(first * n + i) * requantize_inverse[i / n]);
            if !is_nan(level) {
                let q = i32(clamp(level, -requantize.high, requantize.high));
                packed |= (bitcast<u32>(q) & 0xffu) << (8u * (i - at));
            }
        }
        requantize_q[(first * n + at) / 4u] = packed;
    }
}
