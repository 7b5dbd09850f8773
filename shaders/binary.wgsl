// op:       add, sub, mul (full, row and scalar broadcast), accumulate_scaled
// math:     y = a + b, a - b, a b; accumulate_scaled: target += factor x
// grad:     da = dy (times b for mul); db = dy, -dy, a dy, summed over rows or all for a broadcast b
// shapes:   a[N], b[M], y[N] (a4, b4, y4: the same in fours) with M = N, the row length or 1; accumulate_scaled: target[N] (in place), x[N]
// layout:   contiguous; b repeats with period M
// launch:   linear, 64 invocations a group, 4 elements each (fours: 16); windows where a binding is too small
// cost:     N flops; 2 N + M (2 N flops and 3 N for accumulate_scaled) elements moved
// numerics: f32 arithmetic whatever the storage, one rounding (accumulate_scaled: two, or one where the device fuses)
// source:   -
// rungs:    v1 one invocation, four neighbours; fours: loads and stores of four; wide: binary_wide.wgsl

struct BinaryParams { count: u32, kind: u32, base: u32, period: u32, factor: f32 }
var<immediate> binary: BinaryParams;

@group(0) @binding(0) var<storage, read> binary_a: array<E>;
@group(0) @binding(1) var<storage, read> binary_b: array<E>;
@group(0) @binding(2) var<storage, read_write> binary_y: array<E>;
@group(0) @binding(0) var<storage, read_write> binary_target: array<E>;

@compute @workgroup_size(64)
fn binary_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    if first >= binary.count { return; }
    // One division per invocation; the neighbours wrap by comparison.
    var j = (binary.base + first) % binary.period;
    for (var i = first; i < min(first + 4u, binary.count); i++) {
        let a = ld(binary_a[i]);
        let b = ld(binary_b[j]);
        var y = a * b;
        if binary.kind == 0u { y = a + b; }
        if binary.kind == 1u { y = a - b; }
        binary_y[i] = st(y);
        j++;
        if j == binary.period { j = 0u; }
    }
}

@compute @workgroup_size(64)
fn accumulate_scaled(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    for (var i = first; i < min(first + 4u, binary.count); i++) {
        binary_target[i] = st(ld(binary_target[i]) + binary.factor * ld(binary_b[i]));
    }
}

@group(0) @binding(0) var<storage, read> binary_a4: array<vec4<E>>;
@group(0) @binding(1) var<storage, read> binary_b4: array<vec4<E>>;
@group(0) @binding(2) var<storage, read_write> binary_y4: array<vec4<E>>;

fn binary_of(x: f32, y: f32) -> f32 {
    return select(select(x * y, x - y, binary.kind == 1u), x + y, binary.kind == 0u);
}

fn binary_element(a: E, b: E) -> E { return st(binary_of(ld(a), ld(b))); }

// Stores one four; the next one of b.
fn binary_four(i: u32, j: u32) -> u32 {
    let a = binary_a4[i];
    let b = binary_b4[j];
    binary_y4[i] = vec4<E>(
        binary_element(a.x, b.x), binary_element(a.y, b.y), binary_element(a.z, b.z), binary_element(a.w, b.w),
    );
    return select(j + 1u, 0u, j + 1u == binary.period / 4u);
}

@compute @workgroup_size(64)
fn binary_fwd_fours(@builtin(global_invocation_id) gid: vec3<u32>) {
    // A block past the end moves back onto its neighbour, which writes the same.
    let i = min(linear_id(gid, 64u) * 4u, binary.count / 4u - 4u);
    var j = i % (binary.period / 4u);
    j = binary_four(i, j);
    j = binary_four(i + 1u, j);
    j = binary_four(i + 2u, j);
    j = binary_four(i + 3u, j);
}
