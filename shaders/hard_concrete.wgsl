// op:       hard_concrete, hard_concrete_bwd, clamp
// math:     sample: z = clamp(1.2 s - 0.1, 0, 1), s = sigmoid((ln u - ln(1 - u) + x) / beta), beta = 2/3; element i draws word
//           i & 3 of Philox block i >> 2, u = epsilon + (1 - 2 epsilon) (word >> 8) / 2^24; test: s = sigmoid(x); open:
//           z = sigmoid(x - beta ln(0.1 / 1.1)); clamp: x = min(max(x, low), high) in place
// grad:     hard_concrete_bwd: dx = dz 1.2 s (1 - s) / beta where 0 < 1.2 s - 0.1 < 1, else 0; open: dz z (1 - z)
// shapes:   hard_concrete: x[N], step[1], z[N]; hard_concrete_bwd: x[N], dz[N], step[1], dx[N]; clamp: x[N]
// layout:   contiguous; x is log alpha; without a sample x stands in for the step, unread
// launch:   linear, 64 invocations a group, 4 elements (one Philox block) each
// cost:     about 120 operations per element; 2 N (backward 3 N) elements moved
// numerics: f32; 1 - u is made from the bits as u is, so that its logarithm loses nothing
// source:   Louizos et al. 2018; constants of Xia et al. 2022 (CoFi)
// rungs:    v1 one Philox block per invocation

struct HardConcreteParams { count: u32, kind: u32, seed_low: u32, seed_high: u32, site: u32, low: f32, high: f32 }
var<immediate> hard_concrete: HardConcreteParams;

@group(0) @binding(0) var<storage, read> hard_concrete_x: array<f32>;
@group(0) @binding(1) var<storage, read> hard_concrete_step: array<u32>;
@group(0) @binding(2) var<storage, read_write> hard_concrete_z: array<f32>;
@group(0) @binding(1) var<storage, read> hard_concrete_dz: array<f32>;
@group(0) @binding(2) var<storage, read> hard_concrete_bwd_step: array<u32>;
@group(0) @binding(3) var<storage, read_write> hard_concrete_dx: array<f32>;
@group(0) @binding(0) var<storage, read_write> hard_concrete_clamped: array<f32>;

fn hard_concrete_sigmoid(x: f32) -> f32 { return 1.0 / (1.0 + exp(clamp(-x, -80.0, 80.0))); }

fn hard_concrete_unit(bits: u32) -> f32 { return 1e-6 + 0.999998 * (f32(bits) * 5.9604644775390625e-8); }

// (s, temperature) of element i; a temperature of 0: not stretched.
fn hard_concrete_of(x: f32, word: u32) -> vec2<f32> {
    if hard_concrete.kind == 1u { return vec2<f32>(hard_concrete_sigmoid(x), 1.0); }
    if hard_concrete.kind == 2u { return vec2<f32>(hard_concrete_sigmoid(x + 1.5985968), 0.0); }
    let bits = word >> 8u;
    let noise = log(hard_concrete_unit(bits)) - log(hard_concrete_unit(16777216u - bits));
    return vec2<f32>(hard_concrete_sigmoid((noise + x) * 1.5), 0.6666667);
}

fn hard_concrete_words(block: u32, step: u32) -> vec4<u32> {
    let key = vec2<u32>(hard_concrete.seed_low, hard_concrete.seed_high);
    return philox(vec4<u32>(block, 0u, hard_concrete.site, step), key);
}

@compute @workgroup_size(64)
fn hard_concrete_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let block = linear_id(gid, 64u);
    let first = block * 4u;
    if first >= hard_concrete.count { return; }
    let words = hard_concrete_words(block, hard_concrete_step[0]);
    for (var i = first; i < min(first + 4u, hard_concrete.count); i++) {
        let gate = hard_concrete_of(hard_concrete_x[i], words[i - first]);
        let stretched = clamp(gate.x * 1.2 - 0.1, 0.0, 1.0);
        hard_concrete_z[i] = select(stretched, gate.x, gate.y == 0.0);
    }
}

@compute @workgroup_size(64)
fn hard_concrete_bwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let block = linear_id(gid, 64u);
    let first = block * 4u;
    if first >= hard_concrete.count { return; }
    let words = hard_concrete_words(block, hard_concrete_bwd_step[0]);
    for (var i = first; i < min(first + 4u, hard_concrete.count); i++) {
        let gate = hard_concrete_of(hard_concrete_x[i], words[i - first]);
        let stretched = gate.x * 1.2 - 0.1;
        var slope = gate.x * (1.0 - gate.x);
        if gate.y != 0.0 { slope = select(0.0, 1.2 * slope / gate.y, stretched > 0.0 && stretched < 1.0); }
        hard_concrete_dx[i] = hard_concrete_dz[i] * slope;
    }
}

@compute @workgroup_size(64)
fn clamp_values(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    for (var i = first; i < min(first + 4u, hard_concrete.count); i++) {
        hard_concrete_clamped[i] = clamp(hard_concrete_clamped[i], hard_concrete.low, hard_concrete.high);
    }
}
