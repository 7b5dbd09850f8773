// op:       scale_groups, group_dots
// math:     scale_groups: y_i = x_i g_{(i / D) mod M}; group_dots: s_j = sum over i = D j .. D j + D - 1 of a_i b_i
// grad:     scale_groups: dx = scale_groups(dy, g), dg = group_dots(x, dy), summed over rows where those share gates;
//           group_dots: da = scale_groups(b, ds), db = scale_groups(a, ds)
// shapes:   scale_groups: x[N], gates[M], y[N]; group_dots: a[N], b[N], sums[N / D]
// layout:   contiguous; D neighbouring columns share a gate, M gates repeat; base is the index of the first bound element
// launch:   linear, 64 invocations a group; scale_groups: 4 elements each, group_dots: a sum each
// cost:     N (2 N) flops; 2 N + M (2 N + N / D) elements moved
// numerics: f32 arithmetic whatever the storage; gates and sums are f32; a sum in order
// source:   Michel et al. 2019 (gates of heads); Xia et al. 2022 (CoFi)
// rungs:    v1 one invocation per four elements, or per sum

struct GatesParams { count: u32, base: u32, group: u32, gates: u32 }
var<immediate> gates: GatesParams;

@group(0) @binding(0) var<storage, read> gates_x: array<E>;
@group(0) @binding(1) var<storage, read> gates_gates: array<f32>;
@group(0) @binding(2) var<storage, read_write> gates_y: array<E>;
@group(0) @binding(1) var<storage, read> gates_b: array<E>;
@group(0) @binding(2) var<storage, read_write> gates_sums: array<f32>;

@compute @workgroup_size(64)
fn scale_groups_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    for (var i = first; i < min(first + 4u, gates.count); i++) {
        gates_y[i] = st(ld(gates_x[i]) * gates_gates[((gates.base + i) / gates.group) % gates.gates]);
    }
}

@compute @workgroup_size(64)
fn group_dots_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= gates.count { return; }
    var sum = 0.0;
    for (var k = 0u; k < gates.group; k++) {
        let i = id * gates.group + k;
        sum += ld(gates_x[i]) * ld(gates_b[i]);
    }
    gates_sums[id] = sum;
}
