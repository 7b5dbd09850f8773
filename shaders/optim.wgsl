// op:       adamw, sgd, clip_factor
// math:     adamw: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p -= lr (c1 m / (sqrt(c2 v) + eps) + decay p)
//           sgd: u = momentum u + g, p -= lr (u + decay p); g = grad factor; clip: scale min(1, max / (scale sqrt s))
// grad:     none
// shapes:   adamw: param[N] (in place), grad[N], m[N] (in place), v[N] (in place), factor[1], mask[N] when masked
//           sgd: param[N] (in place), grad[N], velocity[N] (in place), factor[1], mask[N]; clip: squares[1], out[1] (the factor)
// layout:   contiguous; a group's parameters lie one after another
// launch:   linear, 64 invocations a group, 4 elements each; windows where a binding is too small
// cost:     14 flops and 28 bytes an element (adamw), 6 and 20 (sgd)
// numerics: f32; c1 and c2 are rounded once on the host; a masked element becomes exactly 0 everywhere
// source:   AdamW: Loshchilov and Hutter 2019
// rungs:    v1 one invocation, four neighbours

struct OptimParams {
    count: u32, masked: u32, rate: f32, beta1: f32, beta2: f32, epsilon: f32, decay: f32, correction1: f32, correction2: f32
}
var<immediate> optim: OptimParams;

@group(0) @binding(0) var<storage, read_write> optim_param: array<f32>;
@group(0) @binding(1) var<storage, read> optim_grad: array<f32>;
@group(0) @binding(2) var<storage, read_write> optim_m: array<f32>;
@group(0) @binding(3) var<storage, read_write> optim_v: array<f32>;
@group(0) @binding(4) var<storage, read> optim_factor: array<f32>;
@group(0) @binding(5) var<storage, read> optim_mask: array<f32>;
@group(0) @binding(3) var<storage, read> sgd_factor: array<f32>;
@group(0) @binding(4) var<storage, read> sgd_mask: array<f32>;

@compute @workgroup_size(64)
fn adamw(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    for (var i = first; i < min(first + 4u, optim.count); i++) {
        // Without a mask the binding is absent; `select` would read it, so this is a branch.
        if optim.masked == 1u {
            if optim_mask[i] == 0.0 {
                optim_param[i] = 0.0;
                optim_m[i] = 0.0;
                optim_v[i] = 0.0;
                continue;
            }
        }
        let g = optim_grad[i] * optim_factor[0];
        let m = optim.beta1 * optim_m[i] + (1.0 - optim.beta1) * g;
        let v = optim.beta2 * optim_v[i] + (1.0 - optim.beta2) * g * g;
        let direction = m * optim.correction1 / (sqrt(v * optim.correction2) + optim.epsilon);
        let p = optim_param[i];
        optim_param[i] = p - optim.rate * (direction + optim.decay * p);
        optim_m[i] = m;
        optim_v[i] = v;
    }
}

@compute @workgroup_size(64)
fn sgd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    for (var i = first; i < min(first + 4u, optim.count); i++) {
        if optim.masked == 1u {
            if sgd_mask[i] == 0.0 {
                optim_param[i] = 0.0;
                optim_m[i] = 0.0;
                continue;
            }
        }
        // Momentum stands where AdamW's first beta does.
        let u = optim.beta1 * optim_m[i] + optim_grad[i] * sgd_factor[0];
        let p = optim_param[i];
        optim_param[i] = p - optim.rate * (u + optim.decay * p);
        optim_m[i] = u;
    }
}

@group(0) @binding(0) var<storage, read> clip_squares: array<f32>;
@group(0) @binding(1) var<storage, read_write> clip_out: array<f32>;

@compute @workgroup_size(1)
fn clip_factor() {
    // The op's block is count, flag, max_norm, scale: `rate` and `beta1` by place.
    let max_norm = optim.rate;
    let scale = optim.beta1;
    var clip = 1.0;
    if max_norm > 0.0 { clip = min(1.0, max_norm / (scale * sqrt(clip_squares[0]) + 1e-6)); }
    clip_out[0] = scale * clip;
}
