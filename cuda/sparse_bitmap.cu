// op:       decompress_bitmap, matmul_bitmap, matmul_bitmap_int8
// math:     y[i, j] = sum over the kept words p of row j of v[j, p] x[i, p] (+ bias[j]); int8: times xs[i] ws[j]
// grad:     none: inference only
// shapes:   decompress: values[C], lists[B, N, 3], w[N, W] in words; matmul: x[M, W], values[C], lists[B, N, 3], bias[N], y[M, N];
//           int8: x[M, W] words of four bytes, xs[M], values[C], lists, ws[N], bias[N], y[M, N] f32
// layout:   a word is one f32 or four i8 along k; a list is two words of mask (64 words of k, low bits first) and where its values
//           start; kept words ascend along k
// launch:   linear, 64 threads a block; one thread per list (decompress) or element of y
// cost:     2 operations (int8: 8) per kept word and token; 4 bytes a kept word and 12 a list read per column
// numerics: f32 sums in the order of k; int8: exact int32 sums, then three roundings
// source:   Fan et al. 2025 (SpInfer: bitmaps beside the values for moderate unstructured sparsity)
// rungs:    v1 one element

struct BitmapParams { u32 m, n, words, bias; };

extern "C" __global__ void __launch_bounds__(64) decompress_bitmap_fwd(const u32* values, const u32* lists, u32* w, BitmapParams p) {
    u32 list = linear_id(), first = list / p.n * 64u;
    if (first >= p.words) return;
    w += (u64)(list % p.n) * p.words + first;
    lists += 3u * (u64)list;
    values += lists[2];
    for (u32 place = 0u; place < min(64u, p.words - first); place++) w[place] = (lists[place / 32u] >> (place % 32u)) & 1u ? *values++ : 0u;
}

// Calls f(place, value) for the kept words of row j, in their order.
template <class T, class F> __device__ __forceinline__ void each_kept(const T* values, const u32* lists, u32 j, const BitmapParams& p, F f) {
    for (u32 first = 0u; first < p.words; first += 64u) {
        const u32* list = lists + 3u * ((u64)(first / 64u) * p.n + j);
        const T* value = values + list[2];
        for (u32 half = 0u; half < 2u; half++) {
            for (u32 mask = list[half]; mask != 0u; mask &= mask - 1u) f(first + 32u * half + (u32)__ffs((int)mask) - 1u, *value++);
        }
    }
}

extern "C" __global__ void __launch_bounds__(64) matmul_bitmap_fwd(const float* x, const float* values, const u32* lists, const float* bias, float* y, BitmapParams p) {
    u32 id = linear_id(), i = id / p.n, j = id % p.n;
    if (i >= p.m) return;
    x += (u64)i * p.words;
    float sum = 0.0f;
    each_kept(values, lists, j, p, [&](u32 place, float value) { sum += value * x[place]; });
    if (p.bias == 1u) sum += bias[j];
    y[id] = sum;
}

extern "C" __global__ void __launch_bounds__(64) matmul_bitmap_int8_fwd(const u32* x, const float* xs, const u32* values, const u32* lists, const float* ws, const float* bias, float* y, BitmapParams p) {
    u32 id = linear_id(), i = id / p.n, j = id % p.n;
    if (i >= p.m) return;
    x += (u64)i * p.words;
    int sum = 0;
    each_kept(values, lists, j, p, [&](u32 place, u32 value) {
        for (u32 byte = 0u; byte < 32u; byte += 8u) sum += (int)(i8)(value >> byte) * (int)(i8)(x[place] >> byte);
    });
    float out = (float)sum * xs[i] * ws[j];
    // Rounded by itself: a fused sum would differ from what other devices give.
    if (p.bias == 1u) out = __fadd_rn(out, bias[j]);
    y[id] = out;
}
