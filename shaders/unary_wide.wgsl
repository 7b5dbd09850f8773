// op:       relu to reciprocal and their backward: the rung of unary.wgsl for software drivers that have words of 64 bits, f32 alone
// math:     that of unary.wgsl
// grad:     that of unary.wgsl
// shapes:   x8, y8, dy8, dx8: x, y, dy, dx of unary.wgsl (there x4, y4, dy4, dx4 too) in eights; N a multiple of 8, at least 16
// layout:   contiguous; a word of 64 bits holds two neighbours, the even one low
// launch:   linear, 64 invocations a group, 16 elements each
// cost:     that of unary.wgsl
// numerics: those of unary.wgsl
// source:   -
// rungs:    wide: loads and stores of eight, the function a constant

@group(0) @binding(0) var<storage, read> unary_x8: array<vec4<u64>>;
@group(0) @binding(1) var<storage, read_write> unary_y8: array<vec4<u64>>;
@group(0) @binding(1) var<storage, read> unary_dy8: array<vec4<u64>>;
@group(0) @binding(2) var<storage, read_write> unary_dx8: array<vec4<u64>>;

fn unary_pair(x: u64) -> u64 { return pair_of(apply(low_of(x)), apply(high_of(x))); }

fn unary_bwd_pair(x: u64, dy: u64) -> u64 {
    return pair_of(low_of(dy) * derivative(low_of(x)), high_of(dy) * derivative(high_of(x)));
}

fn unary_eight(i: u32) {
    let x = unary_x8[i];
    unary_y8[i] = vec4<u64>(unary_pair(x.x), unary_pair(x.y), unary_pair(x.z), unary_pair(x.w));
}

fn unary_bwd_eight(i: u32) {
    let x = unary_x8[i];
    let dy = unary_dy8[i];
    unary_dx8[i] = vec4<u64>(unary_bwd_pair(x.x, dy.x), unary_bwd_pair(x.y, dy.y), unary_bwd_pair(x.z, dy.z), unary_bwd_pair(x.w, dy.w));
}

@compute @workgroup_size(64)
fn unary_fwd_wide(@builtin(global_invocation_id) gid: vec3<u32>) {
    // Of whole eights every block starts at one.
    let i = unary_block(gid) / 2u;
    unary_eight(i);
    unary_eight(i + 1u);
}

@compute @workgroup_size(64)
fn unary_bwd_wide(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = unary_block(gid) / 2u;
    unary_bwd_eight(i);
    unary_bwd_eight(i + 1u);
}
