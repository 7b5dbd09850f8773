// op:       rope, rope_glm
// math:     (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (j, j + span) of each span of a head; rope has one
//           span pair of D/2, rope_glm two of D/4, the first turned by the position, the second by the block position
// grad:     the same op with the sign of the angle flipped
// shapes:   x[B,T,H,D], cos[P,D/2], sin[P,D/2], positions[B,T], blocks[B,T], y[B,T,H,D]
// layout:   contiguous; rope binds positions as blocks too
// launch:   linear, 64 threads a block, one pair of spans each
// cost:     3 B T H D flops; x and y moved once
// numerics: f32 arithmetic, tables made on the host in f64; a position beyond the table takes its last row
// source:   Su et al. 2021; GLM: Du et al. 2022, Zeng et al. 2023
// rungs:    v1 one thread per pair of spans

struct RopeParams { u32 rows, heads, dim, span, spans, table; float sign; };

extern "C" __global__ void __launch_bounds__(64)
rope_fwd(const E* x, const float* cosines, const float* sines, const u32* positions, const u32* blocks, E* y, RopeParams p) {
    u32 item = linear_id();
    if (item >= p.rows * p.spans) return;
    u32 row = item / p.spans, second = item % p.spans, token = row / p.heads;
    u32 position = second == 1u ? blocks[token] : positions[token];
    u64 angle = (u64)min(position, p.table - 1u) * (p.dim / 2u) + second * p.span;
    u64 start = (u64)row * p.dim + second * 2u * p.span;
    x += start;
    y += start;
    for (u32 j = 0; j < p.span; j++) {
        float a = ld(x[j]), b = ld(x[p.span + j]);
        float c = cosines[angle + j], s = p.sign * sines[angle + j];
        y[j] = st(a * c - b * s);
        y[p.span + j] = st(b * c + a * s);
    }
}
