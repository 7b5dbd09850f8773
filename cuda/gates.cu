// op:       scale_groups, group_dots
// math:     scale_groups: y_i = x_i g_{(i / D) mod M}; group_dots: s_j = sum over i = D j .. D j + D - 1 of a_i b_i
// grad:     scale_groups: dx = scale_groups(dy, g), dg = group_dots(x, dy), summed over rows where those share gates;
//           group_dots: da = scale_groups(b, ds), db = scale_groups(a, ds)
// shapes:   scale_groups: x[N], gates[M], y[N]; group_dots: a[N], b[N], sums[N / D]
// layout:   contiguous; D neighbouring columns share a gate, M gates repeat; base is the index of the first bound element
// launch:   linear, 64 threads a block; scale_groups: 4 elements each, group_dots: a sum each
// cost:     N (2 N) flops; 2 N + M (2 N + N / D) elements moved
// numerics: f32 arithmetic whatever the storage; gates and sums are f32; a sum in order
// source:   Michel et al. 2019 (gates of heads); Xia et al. 2022 (CoFi)
// rungs:    v1 one thread per four elements, or per sum

struct GatesParams { u32 count, base, group, gates; };

extern "C" __global__ void __launch_bounds__(64) scale_groups_fwd(const E* x, const float* of, E* y, GatesParams p) {
    u32 first = linear_id() * 4u;
    for (u32 i = first; i < min(first + 4u, p.count); i++) y[i] = st(ld(x[i]) * of[((p.base + i) / p.group) % p.gates]);
}

extern "C" __global__ void __launch_bounds__(64) group_dots_fwd(const E* a, const E* b, float* sums, GatesParams p) {
    u32 id = linear_id();
    if (id >= p.count) return;
    a += (u64)id * p.group;
    b += (u64)id * p.group;
    float sum = 0.0f;
    for (u32 k = 0; k < p.group; k++) sum += ld(a[k]) * ld(b[k]);
    sums[id] = sum;
}
