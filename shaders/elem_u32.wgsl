// Element prelude: 4-byte words, for ops that move elements and compute nothing: any bit pattern survives.
alias E = u32;
fn ld(x: E) -> f32 { return bitcast<f32>(x); }
fn st(x: f32) -> E { return bitcast<u32>(x); }
