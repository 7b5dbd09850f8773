//! Register-tiled product of small packed matrices: C (+)= A B with B's and C's rows contiguous and padded to whole
//! vectors, A with any strides (a transpose costs nothing, its elements are broadcast).

/// Vectors of f32 that one instruction set works on.
pub trait Vector: Copy {
    const LANES: usize;
    /// Rows of C that one tile holds in registers, two vectors wide.
    const ROWS: usize;
    fn zero() -> Self;
    /// # Safety
    /// `x` points to `LANES` readable floats.
    unsafe fn load(x: *const f32) -> Self;
    /// # Safety
    /// `x` points to `LANES` writable floats.
    unsafe fn store(self, x: *mut f32);
    /// `self + a * b` with `a` in every lane.
    fn fused(self, a: f32, b: Self) -> Self;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    macro_rules! vector {
        ($v:ty, $lanes:expr, $rows:expr, $zero:ident, $load:ident, $store:ident, $splat:ident, $fma:ident) => {
            // SAFETY of every block: `best` names this type only where the processor has its instruction set; memory
            // is the caller's promise.
            impl super::Vector for $v {
                const LANES: usize = $lanes;
                const ROWS: usize = $rows;
                #[inline(always)]
                fn zero() -> Self {
                    // SAFETY: see above.
                    unsafe { $zero() }
                }
                #[inline(always)]
                unsafe fn load(x: *const f32) -> Self {
                    // SAFETY: see above.
                    unsafe { $load(x) }
                }
                #[inline(always)]
                unsafe fn store(self, x: *mut f32) {
                    // SAFETY: see above.
                    unsafe { $store(x, self) }
                }
                #[inline(always)]
                fn fused(self, a: f32, b: Self) -> Self {
                    // SAFETY: see above.
                    unsafe { $fma($splat(a), b, self) }
                }
            }
        };
    }
    vector!(__m512, 16, 8, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_fmadd_ps);
    vector!(__m256, 8, 4, _mm256_setzero_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, _mm256_fmadd_ps);
}

impl Vector for [f32; 4] {
    const LANES: usize = 4;
    const ROWS: usize = 4;
    #[inline(always)]
    fn zero() -> Self {
        [0.0; 4]
    }
    #[inline(always)]
    unsafe fn load(x: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { x.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, x: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { x.cast::<[f32; 4]>().write_unaligned(self) }
    }
    #[inline(always)]
    fn fused(self, a: f32, b: Self) -> Self {
        [self[0] + a * b[0], self[1] + a * b[1], self[2] + a * b[2], self[3] + a * b[3]]
    }
}

/// Work written once for every instruction set.
pub trait Work {
    fn run<V: Vector>(self);
}

/// Runs `work` compiled for the best instruction set of this processor.
pub fn best<W: Work>(work: W) {
    #[cfg(target_arch = "x86_64")]
    {
        use crate::simd::{Level, level};
        use std::arch::x86_64::{__m256, __m512};
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
        fn avx512<W: Work>(work: W) {
            work.run::<__m512>();
        }
        #[target_feature(enable = "avx2,fma,f16c,bmi2")]
        fn avx2<W: Work>(work: W) {
            work.run::<__m256>();
        }
        match level() {
            // SAFETY: `level` found every feature that the function is compiled for.
            Level::Avx512 => return unsafe { avx512(work) },
            // SAFETY: as above.
            Level::Avx2 => return unsafe { avx2(work) },
            Level::Portable => {}
        }
    }
    work.run::<[f32; 4]>();
}

/// A left operand: element (i, p) at `data[i * row + p * column]`.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub column: usize,
}

/// C `[m, n]` = (or += with `add`) A `[m, k]` B `[k, n]`; `n` is a multiple of `V::LANES`, B and C have `ldb` and `ldc`
/// elements between rows. Every element of the product is one chain of fused multiply-adds in the order of k.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub fn product<V: Vector>(
    (m, n, k): (usize, usize, usize),
    a: Left,
    (b, ldb): (&[f32], usize),
    (c, ldc): (&mut [f32], usize),
    add: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(n.is_multiple_of(V::LANES) && (m - 1) * ldc + n <= c.len());
    assert!(k == 0 || ((k - 1) * ldb + n <= b.len() && (m - 1) * a.row + (k - 1) * a.column < a.data.len()));
    let mut column = 0;
    while column < n {
        let wide = n - column >= 2 * V::LANES;
        let mut row = 0;
        while row < m {
            let rows = m - row;
            // SAFETY: the assertions above hold every index of A, B and C that these tiles touch.
            unsafe {
                let a = (a.data.as_ptr().add(row * a.row), a.row, a.column);
                let b = (b.as_ptr().add(column), ldb);
                let c = (c.as_mut_ptr().add(row * ldc + column), ldc);
                row += match (rows, wide) {
                    (8.., true) if V::ROWS == 8 => tile::<V, 8, 2>(k, a, b, c, add),
                    (8.., false) if V::ROWS == 8 => tile::<V, 8, 1>(k, a, b, c, add),
                    (4.., true) => tile::<V, 4, 2>(k, a, b, c, add),
                    (4.., false) => tile::<V, 4, 1>(k, a, b, c, add),
                    (2.., true) => tile::<V, 2, 2>(k, a, b, c, add),
                    (2.., false) => tile::<V, 2, 1>(k, a, b, c, add),
                    (_, true) => tile::<V, 1, 2>(k, a, b, c, add),
                    (_, false) => tile::<V, 1, 1>(k, a, b, c, add),
                };
            }
        }
        column += if wide { 2 * V::LANES } else { V::LANES };
    }
}

/// One register tile of M rows and N vectors; returns M.
///
/// # Safety
/// A `[M, k]`, B `[k, N * LANES]` and C `[M, N * LANES]` lie in memory at the given strides.
#[inline(always)]
unsafe fn tile<V: Vector, const M: usize, const N: usize>(
    k: usize,
    (a, row, column): (*const f32, usize, usize),
    (b, ldb): (*const f32, usize),
    (c, ldc): (*mut f32, usize),
    add: bool,
) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sum = [[V::zero(); N]; M];
        for p in 0..k {
            let mut right = [V::zero(); N];
            for (j, right) in right.iter_mut().enumerate() {
                *right = V::load(b.add(p * ldb + j * V::LANES));
            }
            for (i, sum) in sum.iter_mut().enumerate() {
                let left = *a.add(i * row + p * column);
                for (sum, right) in sum.iter_mut().zip(right) {
                    *sum = sum.fused(left, right);
                }
            }
        }
        for (i, sum) in sum.iter().enumerate() {
            for (j, sum) in sum.iter().enumerate() {
                let c = c.add(i * ldc + j * V::LANES);
                // One block's sum is added as a whole: a chain over all keys would lose digits with every one of them.
                let sum = if add { V::load(c).fused(1.0, *sum) } else { *sum };
                sum.store(c);
            }
        }
    }
    M
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Check;

    impl Work for Check {
        fn run<V: Vector>(self) {
            check::<V>();
        }
    }

    fn check<V: Vector>() {
        for m in [1, 2, 3, 7, 8, 13] {
            for n in [1, 2, 3, 4].map(|vectors| vectors * V::LANES) {
                for k in [0, 1, 5] {
                    for transposed in [false, true] {
                        let a: Vec<f32> = (0..m * k).map(|i| (i % 11) as f32 - 5.0).collect();
                        let b: Vec<f32> = (0..k * n).map(|i| (i % 7) as f32 - 3.0).collect();
                        let (row, column) = if transposed { (1, m) } else { (k, 1) };
                        let mut c = vec![2.0; m * n];
                        product::<V>((m, n, k), Left { data: &a, row, column }, (&b, n), (&mut c, n), true);
                        for (at, c) in c.iter().enumerate() {
                            let (i, j) = (at / n, at % n);
                            let sum: f32 = (0..k).map(|p| a[i * row + p * column] * b[p * n + j]).sum();
                            assert_eq!(*c, 2.0 + sum);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn products_match_the_formula_on_every_tile_edge() {
        check::<[f32; 4]>();
        best(Check);
    }
}
