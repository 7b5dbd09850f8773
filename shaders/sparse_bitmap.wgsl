// op:       decompress_bitmap, matmul_bitmap, matmul_bitmap_int8
// math:     y[i, j] = sum over the kept words p of row j of v[j, p] x[i, p] (+ bias[j]); int8: times xs[i] ws[j]
// grad:     none: inference only
// shapes:   decompress: values[C], lists[B, N, 3], w[N, W] in words; matmul: x[M, W], values[C], lists[B, N, 3], bias[N], y[M, N];
//           int8: x[M, W] words of four bytes, xs[M], values[C], lists, ws[N], bias[N], y[M, N] f32
// layout:   a word is one f32 or four i8 along k; a list is two words of mask (64 words of k, low bits first) and where its values
//           start; kept words ascend along k
// launch:   linear, 64 invocations a group; one invocation per list (decompress) or element of y
// cost:     2 operations (int8: 8) per kept word and token; 4 bytes a kept word and 12 a list read per column
// numerics: f32 sums in the order of k; int8: exact int32 sums, then three roundings
// source:   Fan et al. 2025 (SpInfer: bitmaps beside the values for moderate unstructured sparsity)
// rungs:    v1 one element

struct BitmapParams { m: u32, n: u32, words: u32, bias: u32 }
var<immediate> bitmap: BitmapParams;

@group(0) @binding(0) var<storage, read> decompress_values: array<u32>;
@group(0) @binding(1) var<storage, read> decompress_lists: array<u32>;
@group(0) @binding(2) var<storage, read_write> decompress_w: array<u32>;

@compute @workgroup_size(64)
fn decompress_bitmap_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let list = linear_id(gid, 64u);
    let first = list / bitmap.n * 64u;
    if first >= bitmap.words { return; }
    let to = (list % bitmap.n) * bitmap.words + first;
    var value = decompress_lists[3u * list + 2u];
    for (var place = 0u; place < min(64u, bitmap.words - first); place++) {
        let kept = ((decompress_lists[3u * list + place / 32u] >> (place % 32u)) & 1u) == 1u;
        var word = 0u;
        if kept {
            word = decompress_values[min(value, arrayLength(&decompress_values) - 1u)];
            value++;
        }
        decompress_w[to + place] = word;
    }
}

// Lists are data: bits past the row's end count as none, and values past theirs as the last.
fn within_row(first: u32) -> u32 {
    let left = max(bitmap.words, first) - first;
    return select(0xffffffffu, (1u << (left & 31u)) - 1u, left < 32u);
}

@group(0) @binding(0) var<storage, read> bitmap_x: array<f32>;
@group(0) @binding(1) var<storage, read> bitmap_values: array<f32>;
@group(0) @binding(2) var<storage, read> bitmap_lists: array<u32>;
@group(0) @binding(3) var<storage, read> bitmap_bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> bitmap_y: array<f32>;

@compute @workgroup_size(64)
fn matmul_bitmap_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let i = id / bitmap.n;
    let j = id % bitmap.n;
    if i >= bitmap.m { return; }
    var sum = 0.0;
    for (var first = 0u; first < bitmap.words; first += 64u) {
        let list = 3u * (first / 64u * bitmap.n + j);
        var value = bitmap_lists[list + 2u];
        for (var half = 0u; half < 2u; half++) {
            let x = i * bitmap.words + first + 32u * half;
            for (var mask = bitmap_lists[list + half] & within_row(first + 32u * half); mask != 0u; mask &= mask - 1u) {
                sum += bitmap_values[min(value, arrayLength(&bitmap_values) - 1u)] * bitmap_x[x + countTrailingZeros(mask)];
                value++;
            }
        }
    }
    if bitmap.bias == 1u { sum += bitmap_bias[j]; }
    bitmap_y[id] = sum;
}

@group(0) @binding(0) var<storage, read> int8_x: array<u32>;
@group(0) @binding(1) var<storage, read> int8_xs: array<f32>;
@group(0) @binding(2) var<storage, read> int8_values: array<u32>;
@group(0) @binding(3) var<storage, read> int8_lists: array<u32>;
@group(0) @binding(4) var<storage, read> int8_ws: array<f32>;
@group(0) @binding(5) var<storage, read> int8_bias: array<f32>;
@group(0) @binding(6) var<storage, read_write> int8_y: array<f32>;

@compute @workgroup_size(64)
fn matmul_bitmap_int8_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let i = id / bitmap.n;
    let j = id % bitmap.n;
    if i >= bitmap.m { return; }
    var sum = 0;
    for (var first = 0u; first < bitmap.words; first += 64u) {
        let list = 3u * (first / 64u * bitmap.n + j);
        var value = int8_lists[list + 2u];
        for (var half = 0u; half < 2u; half++) {
            let x = i * bitmap.words + first + 32u * half;
            for (var mask = int8_lists[list + half] & within_row(first + 32u * half); mask != 0u; mask &= mask - 1u) {
                sum += dot4I8Packed(int8_values[min(value, arrayLength(&int8_values) - 1u)], int8_x[x + countTrailingZeros(mask)]);
                value++;
            }
        }
    }
    var y = f32(sum) * int8_xs[i] * int8_ws[j];
    if bitmap.bias == 1u { y += int8_bias[j]; }
    int8_y[id] = y;
}
