// op:       add, sub, mul (full, row and scalar broadcast), accumulate_scaled
// math:     y = a + b, a - b, a b; accumulate_scaled: target += factor x
// grad:     da = dy (times b for mul); db = dy, -dy, a dy, summed over rows or all for a broadcast b
// shapes:   a[N], b[M], y[N] with M = N, the row length or 1; accumulate_scaled: target[N] (in place), x[N]
// layout:   contiguous; b repeats with period M
// launch:   linear, 64 threads a block, 4 elements each
// cost:     N flops; 2 N + M (2 N flops and 3 N for accumulate_scaled) elements moved
// numerics: f32 arithmetic whatever the storage, one rounding (accumulate_scaled: one, the product is fused)
// source:   -
// rungs:    v1 one thread, four neighbours

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
