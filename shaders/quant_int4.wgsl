// op:       unpack_int4, matmul_int4 (pack_int4 stands in quant.wgsl, beside the scale rule)
// math:     w[j, k] = (nibble[j, k] - 8) scale[j, k / group]; y[i, j] = sum_k x[i, k] w[j, k] (+ bias[j])
// grad:     dx = dy W with W unpacked; the packed weight is fixed
// shapes:   unpack: words[N, K/8] (packed), scales[N, K/group], w[N, K]; matmul: x[M, K], words, scales, bias[N], y[M, N]
// layout:   eight weights to a word, the lowest column in the lowest four bits
// launch:   linear, 64 invocations a group; one word (unpack) or one element of y
// cost:     2 M N K operations; N K / 2 bytes of weights
// numerics: f32: sums within a word, times its scale, in rising order of k
// source:   Frantar et al. 2023 (group scales)
// rungs:    v1 one element of y

struct Int4Params { m: u32, n: u32, k: u32, group: u32, bias: u32 }
struct UnpackParams { n: u32, one: u32, k: u32, group: u32 }
var<immediate> int4: Int4Params;
var<immediate> unpack: UnpackParams;

@group(0) @binding(0) var<storage, read> unpack_words: array<u32>;
@group(0) @binding(1) var<storage, read> unpack_scales: array<f32>;
@group(0) @binding(2) var<storage, read_write> unpack_w: array<f32>;

@compute @workgroup_size(64)
fn unpack_int4_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= unpack.n * unpack.k / 8u { return; }
    let scale = unpack_scales[id * 8u / unpack.group];
    for (var b = 0u; b < 8u; b++) {
        let level = f32((unpack_words[id] >> (4u * b)) & 15u) - 8.0;
        unpack_w[id * 8u + b] = level * scale;
    }
}

@group(0) @binding(0) var<storage, read> int4_x: array<E>;
@group(0) @binding(1) var<storage, read> int4_words: array<u32>;
@group(0) @binding(2) var<storage, read> int4_scales: array<f32>;
@group(0) @binding(3) var<storage, read> int4_bias: array<E>;
@group(0) @binding(4) var<storage, read_write> int4_y: array<E>;

@compute @workgroup_size(64)
fn matmul_int4_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let i = id / int4.n;
    let j = id % int4.n;
    if i >= int4.m { return; }
    let words = int4.k / 8u;
    var sum = 0.0;
    for (var w = 0u; w < words; w++) {
        let word = int4_words[j * words + w];
        let x = i * int4.k + w * 8u;
        var part = 0.0;
        for (var b = 0u; b < 8u; b++) { part += (f32((word >> (4u * b)) & 15u) - 8.0) * ld(int4_x[x + b]); }
        sum += part * int4_scales[(j * int4.k + w * 8u) / int4.group];
    }
    if int4.bias == 1u { sum += ld(int4_bias[j]); }
    int4_y[id] = st(sum);
}
