// Joined in front of every kernel file, after the element prelude.

// Item of a launch made by `Launch::linear`: groups fold into y above 65,535.
fn linear_id(gid: vec3<u32>, block: u32) -> u32 { return gid.x + gid.y * (65535u * block); }

// NaN by its bits: compilers may assume that no NaN exists and fold `x != x` away.
fn is_nan(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }

fn is_finite(x: f32) -> bool { return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u; }

// Large and finite: masked scores never hold an infinity.
const MASKED: f32 = -1e30;

// exp overflows in some drivers' tanh for large arguments; past 10 the result is 1 in f32.
fn tanh_safe(x: f32) -> f32 { return tanh(clamp(x, -10.0, 10.0)); }

// 64-bit product of two words as (low, high).
fn mul_wide(a: u32, b: u32) -> vec2<u32> {
    let al = a & 0xffffu; let ah = a >> 16u;
    let bl = b & 0xffffu; let bh = b >> 16u;
    let ll = al * bl; let lh = al * bh; let hl = ah * bl;
    let mid = (ll >> 16u) + (lh & 0xffffu) + (hl & 0xffffu);
    return vec2<u32>(a * b, ah * bh + (lh >> 16u) + (hl >> 16u) + (mid >> 16u));
}

// Philox4x32-10 (Salmon et al. 2011): the same bits as src/rng.rs.
fn philox(counter: vec4<u32>, key: vec2<u32>) -> vec4<u32> {
    var c = counter;
    var k = key;
    for (var round = 0u; round < 10u; round++) {
        let p0 = mul_wide(c.x, 0xD2511F53u);
        let p1 = mul_wide(c.z, 0xCD9E8D57u);
        c = vec4<u32>(p1.y ^ c.y ^ k.x, p1.x, p0.y ^ c.w ^ k.y, p0.x);
        k += vec2<u32>(0x9E3779B9u, 0xBB67AE85u);
    }
    return c;
}
