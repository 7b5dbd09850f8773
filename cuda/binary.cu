// op:       add, sub, mul (full, row and scalar broadcast), accumulate_scaled
// math:     y = a + b, a - b, a b; accumulate_scaled: target += factor x
// grad:     da = dy (times b for mul); db = dy, -dy, a dy, summed over rows or all for a broadcast b
// shapes:   a[N], b[M], y[N] with M = N, the row length or 1; accumulate_scaled: target[N] (in place), x[N]
// layout:   contiguous; b repeats with period M
// launch:   linear, 64 threads a block, 4 elements each; v2: 256 threads a block, 16 bytes each
// cost:     N flops; 2 N + M (2 N flops and 3 N for accumulate_scaled) elements moved
// numerics: f32 arithmetic whatever the storage, one rounding (accumulate_scaled: one, the product is fused)
// source:   -
// rungs:    v1 one thread, four neighbours; v2 16 bytes per access, rows of b of whole vectors

struct BinaryParams { u32 count, kind, base, period; float factor; };

extern "C" __global__ void __launch_bounds__(64) binary_fwd(const E* a, const E* b, E* y, BinaryParams p) {
    u32 first = linear_id() * 4u;
    if (first >= p.count) return;
    // One division per thread; the neighbours wrap by comparison.
    u32 j = (p.base + first) % p.period;
    for (u32 i = first; i < min(first + 4u, p.count); i++) {
        float left = ld(a[i]), right = ld(b[j]);
        float value = left * right;
        if (p.kind == 0u) value = left + right;
        if (p.kind == 1u) value = left - right;
        y[i] = st(value);
        j++;
        if (j == p.period) j = 0u;
    }
}

extern "C" __global__ void __launch_bounds__(64) accumulate_scaled(E* target, const E* x, BinaryParams p) {
    u32 first = linear_id() * 4u;
    for (u32 i = first; i < min(first + 4u, p.count); i++) target[i] = st(ld(target[i]) + p.factor * ld(x[i]));
}

// --- 16 bytes per access. The last thread of a tensor may have fewer elements.
__device__ __forceinline__ void load_each(float* y, const E* x, u32 first, u32 count) {
    if (first + VECTOR <= count) {
        unpack_vector(y, load_vector(x + first));
    } else {
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) y[k] = ld(x[min(first + k, count - 1u)]);
    }
}

__device__ __forceinline__ void store_each(E* y, const float* x, u32 first, u32 count) {
    if (first + VECTOR <= count) {
        store_vector(y + first, pack_vector(x));
    } else {
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++)
            if (first + k < count) y[first + k] = st(x[k]);
    }
}

// b is one element, or as long as a, or a row of whole vectors, so that its vectors never wrap.
extern "C" __global__ void __launch_bounds__(256) binary_fwd_v2(const E* a, const E* b, E* y, BinaryParams p) {
    u32 first = linear_id() * VECTOR;
    if (first >= p.count) return;
    float left[VECTOR], right[VECTOR];
    load_each(left, a, first, p.count);
    if (p.period == 1u) {
        float one = ld(b[0]);
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) right[k] = one;
    } else {
        // A b as long as a needs no division.
        load_each(right, b, p.period == p.count ? first : (p.base + first) % p.period, p.period);
    }
#pragma unroll
    for (u32 k = 0; k < VECTOR; k++) {
        if (p.kind == 0u) left[k] = left[k] + right[k];
        else if (p.kind == 1u) left[k] = left[k] - right[k];
        else left[k] = left[k] * right[k];
    }
    store_each(y, left, first, p.count);
}

extern "C" __global__ void __launch_bounds__(256) accumulate_scaled_v2(E* target, const E* x, BinaryParams p) {
    u32 first = linear_id() * VECTOR;
    if (first >= p.count) return;
    float old[VECTOR], more[VECTOR];
    load_each(old, target, first, p.count);
    load_each(more, x, first, p.count);
#pragma unroll
    for (u32 k = 0; k < VECTOR; k++) old[k] += p.factor * more[k];
    store_each(target, old, first, p.count);
}
