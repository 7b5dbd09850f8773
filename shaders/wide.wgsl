// Pairs of f32 as words of 64 bits: software drivers load and store lane by lane, so that a word of twice the width costs half.

fn low_of(pair: u64) -> f32 { return bitcast<f32>(u32(pair)); }
fn high_of(pair: u64) -> f32 { return bitcast<f32>(u32(pair >> 32u)); }
fn pair_of(low: f32, high: f32) -> u64 { return u64(bitcast<u32>(low)) | (u64(bitcast<u32>(high)) << 32u); }
