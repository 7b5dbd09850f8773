// op:       matmul_int8_groups
// math:     y[i, j] = sum_k x[i, k] q[j, k] scale[j, k / group] (+ bias[j])
// grad:     dx = dy W with W = q scale; the weight is fixed
// shapes:   x[M, K], q[N, K] i8, scale[N, K/group], bias[N], y[M, N]
// layout:   i8 packed four to a word, little endian
// launch:   linear, 64 invocations a group; one element of y
// cost:     2 M N K operations; N K bytes of weights
// numerics: f32: sums within a word, times its scale, in rising order of k
// source:   Frantar et al. 2023 (group scales)
// rungs:    v1 one element of y

struct GroupsParams { m: u32, n: u32, k: u32, group: u32, bias: u32 }
var<immediate> groups: GroupsParams;

@group(0) @binding(0) var<storage, read> groups_x: array<E>;
@group(0) @binding(1) var<storage, read> groups_q: array<u32>;
@group(0) @binding(2) var<storage, read> groups_scale: array<f32>;
@group(0) @binding(3) var<storage, read> groups_bias: array<E>;
@group(0) @binding(4) var<storage, read_write> groups_y: array<E>;

@compute @workgroup_size(64)
fn matmul_int8_groups_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let i = id / groups.n;
    let j = id % groups.n;
    if i >= groups.m { return; }
    let words = groups.k / 4u;
    var sum = 0.0;
    for (var w = 0u; w < words; w++) {
        let q = vec4<f32>(unpack4xI8(groups_q[j * words + w]));
        let x = i * groups.k + w * 4u;
        var part = 0.0;
        for (var b = 0u; b < 4u; b++) { part += q[b] * ld(groups_x[x + b]); }
        sum += part * groups_scale[(j * groups.k + w * 4u) / groups.group];
    }
    if groups.bias == 1u { sum += ld(groups_bias[j]); }
    groups_y[id] = st(sum);
}
