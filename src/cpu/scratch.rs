//! Memory that kernels work in, kept by each thread from call to call. A vector of more than 128 KB that is made anew comes
//! from the system, which hands it out page by page as it is first touched: that alone can cost as much as the product in it.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

/// One cache line: no vector load from the start of a packed panel reaches over two.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Lines that a thread keeps (64 MB in all): the work on larger buffers outweighs their pages.
const KEPT: usize = 1 << 20;

thread_local!(static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) });

/// How many times as large as needed a buffer may be: a small request leaves the large one to the next.
const SPARE: usize = 16;

/// A buffer in use; dropped, it lies ready for the thread's next.
pub(crate) struct Scratch<T> {
    lines: Vec<Line>,
    len: usize,
    _elements: PhantomData<T>,
}

/// `len` elements that hold whatever was left in them.
pub(crate) fn scratch<T: Pod>(len: usize) -> Scratch<T> {
    let wanted = (len * size_of::<T>()).div_ceil(size_of::<Line>());
    let mut lines = FREE.with_borrow_mut(|free| {
        // The smallest that is large enough; else the largest, to grow.
        let unfit = |i: &usize| (free[*i].len() < wanted, free[*i].len().abs_diff(wanted));
        let best = (0..free.len()).min_by_key(unfit).filter(|&i| free[i].len() <= SPARE * wanted.max(1));
        best.map_or_else(Vec::new, |i| free.remove(i))
    });
    if lines.len() < wanted {
        drop(lines);
        lines = vec![Line::zeroed(); wanted];
    }
    if cfg!(debug_assertions) {
        // NaN and indices out of range: tests see who reads before writing.
        lines[..wanted].fill(Line([0xff; 64]));
    }
    Scratch { lines, len, _elements: PhantomData }
}

/// `len` zeros.
pub(crate) fn zeros<T: Pod>(len: usize) -> Scratch<T> {
    let mut scratch = scratch(len);
    scratch.fill(T::zeroed());
    scratch
}

impl<T: Pod> Deref for Scratch<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Pod> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl<T> Drop for Scratch<T> {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        if (1..=KEPT).contains(&lines.len()) {
            // A thread that is ending keeps nothing.
            let _ = FREE.try_with(|free| {
                let mut free = free.borrow_mut();
                free.push(lines);
                // What was kept longest goes first.
                while free.iter().map(Vec::len).sum::<usize>() > KEPT {
                    free.remove(0);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back_aligned_and_is_never_shared() {
        let first = scratch::<f32>(1000);
        let place = first.as_ptr();
        assert!(place.addr().is_multiple_of(64) && first.len() == 1000);
        let mut second = scratch::<i8>(4000);
        assert_ne!(place.addr(), second.as_ptr().addr());
        second.fill(3);
        drop(first);
        drop(second);
        // The smaller of two that fit, and the one that fits.
        assert_eq!(zeros::<u32>(900).iter().sum::<u32>(), 0);
        let (a, b) = (scratch::<f32>(10), scratch::<f32>(20));
        assert_ne!(a.as_ptr(), b.as_ptr());
        assert_eq!(scratch::<f32>(0).len(), 0);
    }

    #[test]
    fn what_a_thread_keeps_is_bounded_and_large_buffers_are_left_for_large_requests() {
        let large = || scratch::<u8>(60 << 20);
        let place = large().as_ptr().addr();
        let small: Vec<Scratch<u8>> = (0..7).map(|_| scratch(1000)).collect();
        assert_eq!(large().as_ptr().addr(), place);
        drop(small);
        drop((large(), large()));
        let kept: usize = FREE.with_borrow(|free| free.iter().map(Vec::len).sum());
        assert!(kept <= KEPT, "{kept}");
    }
}
