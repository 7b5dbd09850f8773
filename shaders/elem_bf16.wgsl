// Element prelude: bf16 as 16-bit storage, widened by a shift, stored with round to nearest even.
enable wgpu_int16;
alias E = u16;
fn ld(x: E) -> f32 { return bitcast<f32>(u32(x) << 16u); }
fn st(x: f32) -> E {
    let b = bitcast<u32>(x);
    // NaN keeps its sign and top payload bits and gains a quiet bit: rounding could carry it into infinity.
    if (b & 0x7fffffffu) > 0x7f800000u { return u16((b >> 16u) | 0x40u); }
    return u16((b + 0x7fffu + ((b >> 16u) & 1u)) >> 16u);
}
