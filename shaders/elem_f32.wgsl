// Element prelude: f32 storage.
alias E = f32;
fn ld(x: E) -> f32 { return x; }
fn st(x: f32) -> E { return x; }
