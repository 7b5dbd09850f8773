// op:       matmul_int8_groups
// math:     y[i, j] = sum_k x[i, k] q[j, k] scale[j, k / group] (+ bias[j])
// grad:     dx = dy W with W = q scale; the weight is fixed
// shapes:   x[M, K], q[N, K] i8, scale[N, K/group], bias[N], y[M, N]
// layout:   i8 one after the other
// launch:   linear, 64 threads a block; one element of y
// cost:     2 M N K operations; N K bytes of weights
// numerics: f32: sums within four, times their scale, in rising order of k
// source:   Frantar et al. 2023 (group scales)
// rungs:    v1 one element of y

struct GroupsParams { u32 m, n, k, group, bias; };

extern "C" __global__ void __launch_bounds__(64) matmul_int8_groups_fwd(const E* x, const i8* q, const float* scale, const E* bias, E* y, GroupsParams p) {
    u32 id = linear_id(), i = id / p.n, j = id % p.n;
    if (i >= p.m) return;
    x += (u64)i * p.k;
    q += (u64)j * p.k;
    scale += (u64)j * (p.k / p.group);
    float sum = 0.0f;
    for (u32 k = 0u; k < p.k; k += 4u) {
        float part = 0.0f;
        for (u32 b = 0u; b < 4u; b++) part += (float)q[k + b] * ld(x[k + b]);
        sum += part * scale[k / p.group];
    }
    if (p.bias == 1u) sum += ld(bias[j]);
    y[id] = st(sum);
}
