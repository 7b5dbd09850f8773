// op:       multiply_add_chain
// math:     y_0 = 0; y_{t+1} = y_t / 2 + x, `steps` times: a yardstick, nothing but multiply-adds in registers
// grad:     none
// shapes:   x[N], y[N]
// layout:   contiguous
// launch:   linear, 64 invocations a group, 16 elements each
// cost:     2 N steps operations; 2 N elements moved
// numerics: f32; the product by 1/2 is exact, so fused and unfused forms give the same bits
// source:   the measured ceiling of `kernels bench`
// rungs:    v1 four independent vec4 chains per invocation hide the latency of one

struct CeilingParams { count: u32, steps: u32 }
var<immediate> ceiling: CeilingParams;

@group(0) @binding(0) var<storage, read> ceiling_x: array<f32>;
@group(0) @binding(1) var<storage, read_write> ceiling_y: array<f32>;

// Loads past the end repeat the last element; they are never stored.
fn load4(first: u32) -> vec4<f32> {
    let last = ceiling.count - 1u;
    return vec4<f32>(ceiling_x[min(first, last)], ceiling_x[min(first + 1u, last)],
                     ceiling_x[min(first + 2u, last)], ceiling_x[min(first + 3u, last)]);
}

fn store4(first: u32, v: vec4<f32>) {
    if first < ceiling.count { ceiling_y[first] = v.x; }
    if first + 1u < ceiling.count { ceiling_y[first + 1u] = v.y; }
    if first + 2u < ceiling.count { ceiling_y[first + 2u] = v.z; }
    if first + 3u < ceiling.count { ceiling_y[first + 3u] = v.w; }
}

@compute @workgroup_size(64)
fn multiply_add_chain_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 16u;
    let xa = load4(first);
    let xb = load4(first + 4u);
    let xc = load4(first + 8u);
    let xd = load4(first + 12u);
    let half = vec4<f32>(0.5);
    var a = vec4<f32>(0.0);
    var b = vec4<f32>(0.0);
    var c = vec4<f32>(0.0);
    var d = vec4<f32>(0.0);
    for (var t = 0u; t < ceiling.steps; t++) {
        a = fma(a, half, xa);
        b = fma(b, half, xb);
        c = fma(c, half, xc);
        d = fma(d, half, xd);
    }
    store4(first, a);
    store4(first + 4u, b);
    store4(first + 8u, c);
    store4(first + 12u, d);
}
