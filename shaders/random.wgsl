// op:       dropout, uniform, normal
// math:     element i draws word i & 3 of Philox block i >> 2; u = (word >> 8) / 2^24; dropout: y = x scale if
//           word >> 8 >= threshold, else 0; uniform: y = low + span u; normal: y = mean + deviation z, z = probit(q),
//           q = (2 (word mod 2^31) + 1) / 2^33, below the mean where the word's top bit is set
// grad:     dropout: the same op on dy; the others have no input
// shapes:   dropout: x[N], step[1], dropped[N]; uniform, normal: y[N]
// layout:   contiguous; base is the index of the first bound element, a multiple of 4
// launch:   linear, 64 invocations a group, 4 elements (one Philox block) each
// cost:     about 100 (normal 200) integer and float operations per element; N or 2 N elements moved
// numerics: bit-equal on every device: each product and sum is rounded by itself (`rounded` keeps compilers from fusing
//           or reordering them); probit error below 4e-7 relative or 1e-7 absolute
// source:   Salmon et al. 2011 (Philox); Giles 2012 (form of the probit, refitted for 32-bit words); Moshier (log)
// rungs:    v1 one Philox block per invocation

struct RandomParams {
    count: u32, base: u32, seed_low: u32, seed_high: u32, site: u32, step: u32, threshold: u32, zero: u32, a: f32, b: f32,
}
var<immediate> random: RandomParams;

@group(0) @binding(0) var<storage, read> random_x: array<E>;
@group(0) @binding(1) var<storage, read> random_step: array<u32, 1>;
@group(0) @binding(2) var<storage, read_write> random_dropped: array<E>;
@group(0) @binding(0) var<storage, read_write> random_y: array<E>;

// The value as it is: `zero` is 0 at run time, which no compiler knows, so that nothing is fused or reordered across.
fn rounded(x: f32) -> f32 { return bitcast<f32>(bitcast<u32>(x) ^ random.zero); }

// a x + b with both roundings.
fn step_of(a: f32, x: f32, b: f32) -> f32 { return rounded(rounded(a * x) + b); }

fn words_of(block: u32, step: u32) -> vec4<u32> {
    return philox(vec4<u32>(random.base / 4u + block, 0u, random.site, step), vec2<u32>(random.seed_low, random.seed_high));
}

// 24 bits are exact in f32.
fn uniform_of(word: u32) -> f32 { return f32(word >> 8u) * 5.9604644775390625e-8; }

// Natural logarithm of t in [2^-31, 1]: exponent, and Moshier's polynomial for a mantissa in [sqrt 1/2, sqrt 2).
fn log_of(t: f32) -> f32 {
    let bits = bitcast<u32>(t);
    let exponent = bitcast<i32>(bits - 0x3f3504f3u) >> 23u;
    let s = rounded(bitcast<f32>(bits - (bitcast<u32>(exponent) << 23u)) - 1.0);
    let z = rounded(s * s);
    var p = step_of(7.0376836292e-2, s, -1.1514610310e-1);
    p = step_of(p, s, 1.1676998740e-1);
    p = step_of(p, s, -1.2420140846e-1);
    p = step_of(p, s, 1.4249322787e-1);
    p = step_of(p, s, -1.6668057665e-1);
    p = step_of(p, s, 2.0000714765e-1);
    p = step_of(p, s, -2.4999993993e-1);
    p = step_of(p, s, 3.3333331174e-1);
    let cubic = rounded(rounded(p * s) * z);
    let low = rounded(rounded(cubic - rounded(0.5 * z)) + s);
    return step_of(f32(exponent), 0.69314718, low);
}

// Square root by three Newton steps for its inverse: only products and sums.
fn sqrt_of(w: f32) -> f32 {
    let h = rounded(0.5 * w);
    var y = bitcast<f32>(0x5f375a86u - (bitcast<u32>(w) >> 1u));
    y = rounded(y * rounded(1.5 - rounded(rounded(h * y) * y)));
    y = rounded(y * rounded(1.5 - rounded(rounded(h * y) * y)));
    y = rounded(y * rounded(1.5 - rounded(rounded(h * y) * y)));
    return rounded(w * y);
}

fn normal_of(word: u32) -> f32 {
    let odd = 2u * (word & 0x7fffffffu) + 1u;
    // Rounded once: both halves and the product are exact. q = n / 2^33.
    let n = rounded(f32(odd >> 16u) * 65536.0 + f32(odd & 0xffffu));
    let x = rounded(1.0 - n * 2.3283064365386963e-10);
    let t = rounded((n * 4.656612873077393e-10) * rounded(1.0 - n * 1.1641532182693481e-10));
    let w = -log_of(t);
    let c = rounded(w - 2.5);
    var near = step_of(4.0353157e-8, c, 4.8610195e-7);
    near = step_of(near, c, -4.9905475e-6);
    near = step_of(near, c, -6.2179711e-6);
    near = step_of(near, c, 3.0915014e-4);
    near = step_of(near, c, -1.7730102e-3);
    near = step_of(near, c, -5.9081707e-3);
    near = step_of(near, c, 3.4880266e-1);
    near = step_of(near, c, 2.1233137);
    near = rounded(near * x);
    let s = rounded(sqrt_of(max(w, 5.0)) - 3.4844658);
    var far = step_of(1.8707557e-5, s, 2.2280592e-5);
    far = step_of(far, s, -2.7727164e-4);
    far = step_of(far, s, 9.068221e-4);
    far = step_of(far, s, -2.4698325e-3);
    far = step_of(far, s, 4.4986038e-3);
    far = step_of(far, s, 1.4245695);
    far = step_of(far, s, 4.6949477);
    let z = select(far, near, w < 5.0);
    return select(z, -z, word >= 0x80000000u);
}

@compute @workgroup_size(64)
fn dropout_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let block = linear_id(gid, 64u);
    let first = block * 4u;
    if first >= random.count { return; }
    let words = words_of(block, random_step[0]);
    for (var i = first; i < min(first + 4u, random.count); i++) {
        let kept = ld(random_x[i]) * random.a;
        random_dropped[i] = st(select(0.0, kept, (words[i - first] >> 8u) >= random.threshold));
    }
}

@compute @workgroup_size(64)
fn uniform_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let block = linear_id(gid, 64u);
    let first = block * 4u;
    if first >= random.count { return; }
    let words = words_of(block, random.step);
    for (var i = first; i < min(first + 4u, random.count); i++) {
        random_y[i] = st(step_of(random.b, uniform_of(words[i - first]), random.a));
    }
}

@compute @workgroup_size(64)
fn normal_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let block = linear_id(gid, 64u);
    let first = block * 4u;
    if first >= random.count { return; }
    let words = words_of(block, random.step);
    for (var i = first; i < min(first + 4u, random.count); i++) {
        random_y[i] = st(step_of(random.b, normal_of(words[i - first]), random.a));
    }
}
