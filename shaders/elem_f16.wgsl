// Element prelude: f16 storage, f32 arithmetic.
enable f16;
alias E = f16;
fn ld(x: E) -> f32 { return f32(x); }
fn st(x: f32) -> E { return f16(x); }
