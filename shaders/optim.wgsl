// op:       adamw, sgd, update_factor
// math:     adamw: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p -= lr (c1 m / (sqrt(c2 v) + eps) + decay p)
//           sgd: u = momentum u + g, p -= lr (u + decay p); g = grad factor; a factor of 0 changes nothing
//           update_factor: a = inverse / scale, norm = a sqrt(squares), factor = a min(1, max / (norm + 1e-6)), 0 where
//           squares or loss are not finite; scale doubled after `growth` good steps, halved else, or the step has failed
// grad:     none
// shapes:   adamw: param[N] (in place), grad[N], m[N] (in place), v[N] (in place), factor[1], rates[5], mask[N] when masked
//           sgd: param[N] (in place), grad[N], velocity[N] (in place), factor[1], rates[5], mask[N] when masked
//           update_factor: squares[1], losses[1], rates[5], state[5] (in place), factor[1]
//           rates: lr, c1, c2, inverse (1 / weight), step; state: scale, good steps, failed step, loss, norm
// layout:   contiguous; a group's parameters lie one after another
// launch:   linear, 64 invocations a group, 4 elements each; windows where a binding is too small
// cost:     14 flops and 28 bytes an element (adamw), 6 and 20 (sgd)
// numerics: f32; c1 and c2 are rounded once on the host; finite by bits; a masked element becomes exactly 0 everywhere
// source:   AdamW: Loshchilov and Hutter 2019
// rungs:    v1 one invocation, four neighbours

struct OptimParams {
    count: u32, masked: u32, beta1: f32, beta2: f32, epsilon: f32, decay: f32
}
var<immediate> optim: OptimParams;

@group(0) @binding(0) var<storage, read_write> optim_param: array<f32>;
@group(0) @binding(1) var<storage, read> optim_grad: array<f32>;
@group(0) @binding(2) var<storage, read_write> optim_m: array<f32>;
@group(0) @binding(3) var<storage, read_write> optim_v: array<f32>;
@group(0) @binding(4) var<storage, read> optim_factor: array<f32>;
@group(0) @binding(5) var<storage, read> optim_rates: array<f32, 5>;
@group(0) @binding(6) var<storage, read> optim_mask: array<f32>;
@group(0) @binding(3) var<storage, read> sgd_factor: array<f32>;
@group(0) @binding(4) var<storage, read> sgd_rates: array<f32, 5>;
@group(0) @binding(5) var<storage, read> sgd_mask: array<f32>;

@compute @workgroup_size(64)
fn adamw(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    let factor = optim_factor[0];
    if factor == 0.0 { return; }
    let rates = optim_rates;
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
        let g = optim_grad[i] * factor;
        let m = optim.beta1 * optim_m[i] + (1.0 - optim.beta1) * g;
        let v = optim.beta2 * optim_v[i] + (1.0 - optim.beta2) * g * g;
        let direction = m * rates[1] / (sqrt(v * rates[2]) + optim.epsilon);
        let p = optim_param[i];
        optim_param[i] = p - rates[0] * (direction + optim.decay * p);
        optim_m[i] = m;
        optim_v[i] = v;
    }
}

@compute @workgroup_size(64)
fn sgd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    let factor = sgd_factor[0];
    if factor == 0.0 { return; }
    let rate = sgd_rates[0];
    for (var i = first; i < min(first + 4u, optim.count); i++) {
        if optim.masked == 1u {
            if sgd_mask[i] == 0.0 {
                optim_param[i] = 0.0;
                optim_m[i] = 0.0;
                continue;
            }
        }
        // Momentum stands where AdamW's first beta does.
        let u = optim.beta1 * optim_m[i] + optim_grad[i] * factor;
        let p = optim_param[i];
        optim_param[i] = p - rate * (u + optim.decay * p);
        optim_m[i] = u;
    }
}

@group(0) @binding(0) var<storage, read> step_squares: array<f32, 1>;
@group(0) @binding(1) var<storage, read> step_losses: array<f32, 1>;
@group(0) @binding(2) var<storage, read> step_rates: array<f32, 5>;
@group(0) @binding(3) var<storage, read_write> step_state: array<f32, 5>;
@group(0) @binding(4) var<storage, read_write> step_factor: array<f32, 1>;

@compute @workgroup_size(1)
fn update_factor() {
    // The op's block is count, scaled, max_norm, growth, least, most: by place.
    let max_norm = optim.beta1;
    step_factor[0] = 0.0;
    if step_state[2] != 0.0 { return; }
    let squares = step_squares[0];
    let losses = step_losses[0];
    let inverse = step_rates[3];
    let scale = step_state[0];
    let all = inverse / scale;
    let norm = all * sqrt(squares);
    if is_finite(squares) && is_finite(losses) && is_finite(norm) {
        var clip = 1.0;
        if max_norm > 0.0 { clip = min(1.0, max_norm / (norm + 1e-6)); }
        step_factor[0] = all * clip;
        if optim.masked == 1u {
            let good = step_state[1] + 1.0;
            let grown = good >= optim.beta2;
            step_state[0] = select(scale, min(2.0 * scale, optim.decay), grown);
            step_state[1] = select(good, 0.0, grown);
        }
        step_state[3] = losses * inverse;
        step_state[4] = norm;
    } else if optim.masked == 1u && is_finite(losses) && scale > optim.epsilon {
        step_state[0] = max(0.5 * scale, optim.epsilon);
        step_state[1] = 0.0;
        step_state[3] = losses * inverse;
        step_state[4] = 0.0;
    } else {
        step_state[2] = step_rates[4];
        step_state[3] = 0.0;
        step_state[4] = 0.0;
    }
}
