// op:       add, sub, mul: the rung of binary.wgsl for software drivers that have words of 64 bits, f32 alone
// math:     that of binary.wgsl
// grad:     that of binary.wgsl
// shapes:   a8, b8, y8: a, b, y of binary.wgsl (there a4, b4, y4 too, and target, x) in eights; N and M multiples of 8, N at least 16
// layout:   contiguous; a word of 64 bits holds two neighbours, the even one low
// launch:   linear, 64 invocations a group, 16 elements each
// cost:     that of binary.wgsl
// numerics: those of binary.wgsl
// source:   -
// rungs:    wide: loads and stores of eight

@group(0) @binding(0) var<storage, read> binary_a8: array<vec4<u64>>;
@group(0) @binding(1) var<storage, read> binary_b8: array<vec4<u64>>;
@group(0) @binding(2) var<storage, read_write> binary_y8: array<vec4<u64>>;

fn binary_pair(a: u64, b: u64) -> u64 {
    return pair_of(binary_of(low_of(a), low_of(b)), binary_of(high_of(a), high_of(b)));
}

// Stores one eight; the next one of b.
fn binary_eight(i: u32, j: u32) -> u32 {
    let a = binary_a8[i];
    let b = binary_b8[j];
    binary_y8[i] = vec4<u64>(binary_pair(a.x, b.x), binary_pair(a.y, b.y), binary_pair(a.z, b.z), binary_pair(a.w, b.w));
    return select(j + 1u, 0u, j + 1u == binary.period / 8u);
}

@compute @workgroup_size(64)
fn binary_fwd_wide(@builtin(global_invocation_id) gid: vec3<u32>) {
    // A block past the end moves back onto its neighbour, which writes the same.
    let i = min(linear_id(gid, 64u) * 2u, binary.count / 8u - 2u);
    let j = binary_eight(i, i % (binary.period / 8u));
    binary_eight(i + 1u, j);
}
