// Joined in front of the kernel files that put values on grids.

// 1 / s, correctly rounded, by long division of the mantissas: WGSL's own division may be off by 2.5 ulp.
// s is normal and between 2^-108 and 2^120.
fn reciprocal(s: f32) -> f32 {
    let bits = bitcast<u32>(s);
    let exponent = bits >> 23u;
    let mantissa = (bits & 0x7fffffu) | 0x800000u;
    if mantissa == 0x800000u { return bitcast<f32>((254u - exponent) << 23u); }
    // 2^47 / mantissa in three digits of eight bits; a tie would need a power of two.
    var rest = 0x800000u << 8u;
    let d2 = rest / mantissa;
    rest = (rest - d2 * mantissa) << 8u;
    let d1 = rest / mantissa;
    rest = (rest - d1 * mantissa) << 8u;
    let d0 = rest / mantissa;
    rest = rest - d0 * mantissa;
    let quotient = (d2 << 16u) + (d1 << 8u) + d0 + select(0u, 1u, 2u * rest > mantissa);
    return bitcast<f32>(((253u - exponent) << 23u) + (quotient - 0x800000u));
}
