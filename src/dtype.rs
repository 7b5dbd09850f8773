//! Storage types. Kernels load any float type to f32, accumulate in f32 (i32 for int8) and store back.

/// How one element is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    F32,
    F16,
    Bf16,
    I8,
    /// Indices, packed int4, 2:4 metadata, masks of bits.
    U32,
}

impl DType {
    pub const FLOATS: &'static [DType] = &[DType::F32, DType::F16, DType::Bf16];

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::F16 | DType::Bf16 => 2,
            DType::I8 => 1,
        }
    }

    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::Bf16)
    }

    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
            DType::I8 => "i8",
            DType::U32 => "u32",
        }
    }

    /// Rounds a value to what this type can store (round to nearest even), as f64.
    pub fn round(self, x: f64) -> f64 {
        match self {
            DType::F32 => f64::from(x as f32),
            DType::F16 => half::f16::from_f64(x).to_f64(),
            DType::Bf16 => bf16_from_f64(x).to_f64(),
            DType::I8 => x.round_ties_even().clamp(-128.0, 127.0),
            DType::U32 => x.round_ties_even().clamp(0.0, f64::from(u32::MAX)),
        }
    }

    /// Relative spacing of this type around 1: half of it is the rounding error of one store.
    pub const fn epsilon(self) -> f64 {
        match self {
            DType::F32 => 1.1920929e-7,
            DType::F16 => 9.765625e-4,
            DType::Bf16 => 7.8125e-3,
            DType::I8 | DType::U32 => 0.0,
        }
    }

    /// Encodes values to this type's bytes, rounding to nearest even.
    pub fn encode(self, values: &[f64]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(values.len() * self.size());
        for &x in values {
            match self {
                DType::F32 => bytes.extend((x as f32).to_le_bytes()),
                DType::F16 => bytes.extend(half::f16::from_f64(x).to_le_bytes()),
                DType::Bf16 => bytes.extend(bf16_from_f64(x).to_le_bytes()),
                DType::I8 => bytes.push(self.round(x) as i8 as u8),
                DType::U32 => bytes.extend((self.round(x) as u32).to_le_bytes()),
            }
        }
        bytes
    }

    /// Decodes this type's bytes to f64; a trailing partial element is ignored.
    pub fn decode(self, bytes: &[u8]) -> Vec<f64> {
        let chunks = bytes.chunks_exact(self.size());
        match self {
            DType::F32 => chunks.map(|c| f64::from(f32::from_le_bytes([c[0], c[1], c[2], c[3]]))).collect(),
            DType::U32 => chunks.map(|c| f64::from(u32::from_le_bytes([c[0], c[1], c[2], c[3]]))).collect(),
            DType::F16 => chunks.map(|c| half::f16::from_le_bytes([c[0], c[1]]).to_f64()).collect(),
            DType::Bf16 => chunks.map(|c| half::bf16::from_le_bytes([c[0], c[1]]).to_f64()).collect(),
            DType::I8 => chunks.map(|c| f64::from(c[0] as i8)).collect(),
        }
    }
}

/// Rounds f64 to bf16 once. `half::bf16::from_f64` looks at the upper 32 bits only and so misjudges ties; going
/// through an f32 rounded to odd keeps a sticky bit and rounds exactly.
fn bf16_from_f64(x: f64) -> half::bf16 {
    let nearest = x as f32;
    let wide = f64::from(nearest);
    if !x.is_finite() || !nearest.is_finite() || wide == x {
        return half::bf16::from_f32(nearest);
    }
    let toward_zero = if wide.abs() > x.abs() { nearest.to_bits() - 1 } else { nearest.to_bits() };
    half::bf16::from_f32(f32::from_bits(toward_zero | 1))
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Rust types that stand for a storage type in CPU kernels.
pub trait Element: bytemuck::Pod + Send + Sync + 'static {
    const DTYPE: DType;
}

/// Float storage types: loaded to f32, stored with round to nearest even.
pub trait Float: Element {
    fn load(self) -> f32;
    fn store(x: f32) -> Self;
}

macro_rules! element {
    ($($t:ty => $d:ident),*) => { $(impl Element for $t { const DTYPE: DType = DType::$d; })* };
}
element!(f32 => F32, half::f16 => F16, half::bf16 => Bf16, i8 => I8, u32 => U32);

impl Float for f32 {
    #[inline(always)]
    fn load(self) -> f32 {
        self
    }
    #[inline(always)]
    fn store(x: f32) -> Self {
        x
    }
}

impl Float for half::f16 {
    #[inline(always)]
    fn load(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn store(x: f32) -> Self {
        half::f16::from_f32(x)
    }
}

impl Float for half::bf16 {
    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn store(x: f32) -> Self {
        half::bf16::from_f32(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_f64_once() {
        // 0.681640625 is a tie between two bf16 neighbours; a hair above it must round up, a hair below down.
        assert_eq!(DType::Bf16.round(0.681640625), 0.6796875);
        assert_eq!(DType::Bf16.round(0.681640625 + 1e-12), 0.68359375);
        assert_eq!(DType::Bf16.round(-0.681640625 - 1e-12), -0.68359375);
        assert_eq!(DType::Bf16.round(0.681640625 - 1e-12), 0.6796875);
    }

    #[test]
    fn every_16_bit_pattern_survives_a_round_trip() {
        for bits in 0..=u16::MAX {
            let (a, b) = (half::f16::from_bits(bits), half::bf16::from_bits(bits));
            assert!(a.is_nan() || DType::F16.round(a.to_f64()) == a.to_f64());
            assert!(b.is_nan() || DType::Bf16.round(b.to_f64()) == b.to_f64());
        }
    }
}
