// op:       matmul
// math:     as matmul.wgsl, which is joined in front of this file, with matmul_coop.wgsl, the kernel
// grad:     as matmul.wgsl
// shapes:   as matmul.wgsl: a[B, M, K], b[B, K, N] (a4, b4: the same in fours), bias[N], y[B, M, N], sums[B, M, N]
// layout:   as matmul.wgsl: a and b by strides, y contiguous
// launch:   four subgroups of the largest size (8 or 64), more where they are smaller, 32x32 outputs; batch in z
// cost:     2 B M N K flop
// numerics: products are exact in f32, sums in f32 in the order of the matrix unit, 8 of k at a time; NaN passes through
// source:   -
// rungs:    coop: fragments of 8 x 8, which Metal and software Vulkan (Mesa from 25.2 on) have

const COOP = 8u;
alias CoopA = coop_mat8x8<E, A>;
alias CoopB = coop_mat8x8<E, B>;
alias CoopC = coop_mat8x8<f32, C>;
