// op:       relu, gelu_tanh, gelu_erf, silu, tanh, sigmoid, exp, scale, reciprocal, their backward, cast
// math:     y = f(x); dx = dy f'(x); cast: y = x in another storage type
// grad:     unary_bwd; a cast's gradient is the cast back
// shapes:   fwd: x[N], y[N]; bwd: x[N], dy[N], dx[N] (x4, y4, dy4, dx4: the same in fours); cast: x[N], y[N]
// layout:   contiguous; bf16 words hold two elements, the even one low
// launch:   linear, 64 invocations a group, 4 elements each (fours: 16)
// cost:     N functions; 2 N (fwd) or 3 N (bwd) elements moved
// numerics: f32 arithmetic whatever the storage; NaN passes through all but relu (0)
// source:   GELU: Hendrycks and Gimpel 2016; SiLU: Elfwing et al. 2017
// rungs:    v1 one invocation, four neighbours; fours: loads and stores of four, the function a constant; wide: unary_wide.wgsl

struct UnaryParams { count: u32, kind: u32, factor: f32 }
var<immediate> unary: UnaryParams;

@group(0) @binding(0) var<storage, read> unary_x: array<E>;
@group(0) @binding(1) var<storage, read_write> unary_y: array<E>;
@group(0) @binding(1) var<storage, read> unary_dy: array<E>;
@group(0) @binding(2) var<storage, read_write> unary_dx: array<E>;

const GELU_SCALE: f32 = 0.7978845608;

// The function, where it is known when the kernel is compiled: software drivers compute every branch of a switch.
override KIND: u32 = 99u;
fn unary_kind() -> u32 {
    if KIND < 99u { return KIND; }
    return unary.kind;
}

// The argument is clamped so that exp stays finite: infinities may be assumed away by the compiler.
fn sigmoid(x: f32) -> f32 { return 1.0 / (1.0 + exp(min(-x, 80.0))); }

// (1 + tanh u) / 2 written as sigmoid(2 u): no cancellation in the negative tail.
fn gelu_gate(x: f32) -> f32 { return sigmoid(2.0 * GELU_SCALE * (x + 0.044715 * x * x * x)); }

// The normal distribution's probability of a value below x, and its density times sqrt(2 pi): src/cpu/unary.rs has the fit. One
// exponential, one quotient and no branch, of which software drivers would compute both sides.
fn normal(x: f32) -> vec2<f32> {
    // Past it the density is 0 in f32. e^(-a^2 / 2) as a power of two, which drivers have.
    let a = min(abs(x), 15.0);
    let density = exp2(-0.7213475204 * a * a);
    let t = 1.0 / (1.0 + 0.3 * a);
    // In two halves: what waits for what is longer than what there is to do.
    let t2 = t * t;
    let low = 0.119626395 + t2 * 0.09963759 + t * (0.12079835 + t2 * 0.1294689);
    let high = -0.0553933 - t2 * 0.1582757 + t * (0.20820601 + t2 * 0.03593167);
    let p = low + t2 * t2 * high;
    let tail = p * t * density;
    return vec2<f32>(select(tail, 1.0 - tail, x > 0.0), density);
}

fn apply(x: f32) -> f32 {
    switch unary_kind() {
        case 0u: { return max(x, 0.0); }
        case 1u: { return x * gelu_gate(x); }
        case 2u: { return x * normal(x).x; }
        case 3u: { return x * sigmoid(x); }
        case 4u: { return tanh_safe(x); }
        case 5u: { return sigmoid(x); }
        case 6u: { return exp(x); }
        case 8u: { return 1.0 / x; }
        default: { return x * unary.factor; }
    }
}

fn derivative(x: f32) -> f32 {
    switch unary_kind() {
        case 0u: { return select(0.0, 1.0, x > 0.0); }
        case 1u: {
            let s = gelu_gate(x);
            return s + x * s * (1.0 - s) * 2.0 * GELU_SCALE * (1.0 + 0.134145 * x * x);
        }
        case 2u: {
            let n = normal(x);
            return n.x + x * 0.3989422804 * n.y;
        }
        case 3u: { let s = sigmoid(x); return s * (1.0 + x * (1.0 - s)); }
        case 4u: { let t = tanh_safe(x); return 1.0 - t * t; }
        case 5u: { let s = sigmoid(x); return s * (1.0 - s); }
        case 6u: { return exp(x); }
        case 8u: { return -1.0 / (x * x); }
        default: { return unary.factor; }
    }
}

@compute @workgroup_size(64)
fn unary_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    for (var i = first; i < min(first + 4u, unary.count); i++) {
        unary_y[i] = st(apply(ld(unary_x[i])));
    }
}

@compute @workgroup_size(64)
fn unary_bwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    for (var i = first; i < min(first + 4u, unary.count); i++) {
        unary_dx[i] = st(ld(unary_dy[i]) * derivative(ld(unary_x[i])));
    }
}

@group(0) @binding(0) var<storage, read> unary_x4: array<vec4<E>>;
@group(0) @binding(1) var<storage, read_write> unary_y4: array<vec4<E>>;
@group(0) @binding(1) var<storage, read> unary_dy4: array<vec4<E>>;
@group(0) @binding(2) var<storage, read_write> unary_dx4: array<vec4<E>>;

fn unary_four(i: u32) {
    let x = unary_x4[i];
    unary_y4[i] = vec4<E>(st(apply(ld(x.x))), st(apply(ld(x.y))), st(apply(ld(x.z))), st(apply(ld(x.w))));
}

fn unary_slope(x: E, dy: E) -> E { return st(ld(dy) * derivative(ld(x))); }

fn unary_bwd_four(i: u32) {
    let x = unary_x4[i];
    let dy = unary_dy4[i];
    unary_dx4[i] = vec4<E>(unary_slope(x.x, dy.x), unary_slope(x.y, dy.y), unary_slope(x.z, dy.z), unary_slope(x.w, dy.w));
}

// Where the four fours of an invocation start; a block past the end moves back onto its neighbour, which writes the same.
fn unary_block(gid: vec3<u32>) -> u32 { return min(linear_id(gid, 64u) * 4u, unary.count / 4u - 4u); }

@compute @workgroup_size(64)
fn unary_fwd_fours(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = unary_block(gid);
    unary_four(i);
    unary_four(i + 1u);
    unary_four(i + 2u);
    unary_four(i + 3u);
}

@compute @workgroup_size(64)
fn unary_bwd_fours(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = unary_block(gid);
    unary_bwd_four(i);
    unary_bwd_four(i + 1u);
    unary_bwd_four(i + 2u);
    unary_bwd_four(i + 3u);
}

@group(0) @binding(1) var<storage, read_write> cast_y_f32: array<f32>;
@group(0) @binding(0) var<storage, read> cast_x_f32: array<f32>;
@group(0) @binding(1) var<storage, read_write> cast_y_words: array<u32>;
@group(0) @binding(0) var<storage, read> cast_x_words: array<u32>;

@compute @workgroup_size(64)
fn cast_to_f32(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    for (var i = first; i < min(first + 4u, unary.count); i++) { cast_y_f32[i] = ld(unary_x[i]); }
}

@compute @workgroup_size(64)
fn cast_from_f32(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    for (var i = first; i < min(first + 4u, unary.count); i++) { unary_y[i] = st(cast_x_f32[i]); }
}

fn bf16_bits(x: f32) -> u32 {
    let b = bitcast<u32>(x);
    if is_nan(x) { return (b >> 16u) | 0x40u; }
    return ((b + 0x7fffu + ((b >> 16u) & 1u)) >> 16u) & 0xffffu;
}

// f16 to bf16: a word of two elements is written whole, so neighbours never race.
@compute @workgroup_size(64)
fn cast_to_bf16_words(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    for (var i = first; i < min(first + 4u, unary.count); i += 2u) {
        var high = 0u;
        if i + 1u < unary.count { high = bf16_bits(ld(unary_x[i + 1u])); }
        cast_y_words[i / 2u] = bf16_bits(ld(unary_x[i])) | (high << 16u);
    }
}

@compute @workgroup_size(64)
fn cast_from_bf16_words(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 4u;
    for (var i = first; i < min(first + 4u, unary.count); i++) {
        let word = cast_x_words[i / 2u];
        let bits = select(word << 16u, word & 0xffff0000u, (i & 1u) == 1u);
        unary_y[i] = st(bitcast<f32>(bits));
    }
}
