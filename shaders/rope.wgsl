// op:       rope, rope_glm
// math:     (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (j, j + span) of each span of a head; rope has one
//           span pair of D/2, rope_glm two of D/4, the first turned by the position, the second by the block position
// grad:     the same op with the sign of the angle flipped
// shapes:   x[B,T,H,D], cos[P,D/2], sin[P,D/2], positions[B,T], blocks[B,T], y[B,T,H,D]
// layout:   contiguous; rope binds positions as blocks too
// launch:   linear, 64 invocations a group, one pair of spans each
// cost:     3 B T H D flops; x and y moved once
// numerics: f32 arithmetic, tables made on the host in f64; a position beyond the table takes its last row
// source:   Su et al. 2021; GLM: Du et al. 2022, Zeng et al. 2023
// rungs:    v1 one invocation per pair of spans

struct RopeParams { rows: u32, heads: u32, dim: u32, span: u32, spans: u32, table: u32, sign: f32 }
var<immediate> rope: RopeParams;

@group(0) @binding(0) var<storage, read> rope_x: array<E>;
@group(0) @binding(1) var<storage, read> rope_cos: array<f32>;
@group(0) @binding(2) var<storage, read> rope_sin: array<f32>;
@group(0) @binding(3) var<storage, read> rope_positions: array<u32>;
@group(0) @binding(4) var<storage, read> rope_blocks: array<u32>;
@group(0) @binding(5) var<storage, read_write> rope_y: array<E>;

@compute @workgroup_size(64)
fn rope_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= rope.rows * rope.spans { return; }
    let row = item / rope.spans;
    let second = item % rope.spans;
    let token = row / rope.heads;
    var position = rope_positions[token];
    if second == 1u { position = rope_blocks[token]; }
    let angle = min(position, rope.table - 1u) * (rope.dim / 2u) + second * rope.span;
    let start = row * rope.dim + second * 2u * rope.span;
    for (var j = 0u; j < rope.span; j++) {
        let a = ld(rope_x[start + j]);
        let b = ld(rope_x[start + rope.span + j]);
        let c = rope_cos[angle + j];
        let s = rope.sign * rope_sin[angle + j];
        rope_y[start + j] = st(a * c - b * s);
        rope_y[start + rope.span + j] = st(b * c + a * s);
    }
}
