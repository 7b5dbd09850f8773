// op:       matmul
// math:     as matmul.wgsl, which is joined in front of this file, with matmul_coop.wgsl, the kernel
// grad:     as matmul.wgsl
// shapes:   as matmul.wgsl: a[B, M, K], b[B, K, N] (a4, b4: the same in fours), bias[N], y[B, M, N], sums[B, M, N]
// layout:   as matmul.wgsl: a and b by strides, y contiguous
// launch:   eight subgroups of 8 invocations, of which four repeat the others, 64x64 outputs; batch in z
// cost:     2 B M N K flop
// numerics: products are exact in f32, sums in f32 in the order of k; NaN passes through
// source:   -
// rungs:    coop: fragments of 16 x 16 emulated in subgroups of eight, for numbers, not for speed: one of a or b is where it lies in
//           its tile, one of sums is spread over the lanes, two rows to each

const COOP = 16u;
alias CoopA = vec2<u32>;
alias CoopB = vec2<u32>;
alias CoopC = array<vec4<f32>, 8>;

fn coop_a(at: u32, step: u32) -> CoopA { return CoopA(at, step); }
fn coop_b(at: u32, step: u32) -> CoopB { return CoopB(at, step); }

fn coop_sum(a: CoopA, b: CoopB, c: CoopC) -> CoopC {
    var sum = c;
    for (var i = 0u; i < 8u; i++) {
        let row = a.x + (2u * coop_lane + i / 4u) * a.y;
        for (var k = 0u; k < 16u; k++) {
            let at = b.x + k * b.y + (i % 4u) * 4u;
            let four = vec4<f32>(ld(coop_tile_b[at]), ld(coop_tile_b[at + 1u]), ld(coop_tile_b[at + 2u]), ld(coop_tile_b[at + 3u]));
            sum[i] += ld(coop_tile_a[row + k]) * four;
        }
    }
    return sum;
}

fn coop_put(c: CoopC, at: u32, step: u32) {
    var sum = c;
    for (var i = 0u; i < 8u; i++) {
        let first = at + (2u * coop_lane + i / 4u) * step + (i % 4u) * 4u;
        for (var j = 0u; j < 4u; j++) { coop_tile_c[first + j] = sum[i][j]; }
    }
}
