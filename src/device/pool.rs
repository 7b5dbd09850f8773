//! Recycles memory by size class and counts it: every allocation of every leaf passes here.

use std::any::Any;
use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use super::{Storage, check_range};
use crate::error::{Error, Result};

/// What a device has done and holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub bytes_live: u64,
    /// High-water mark of `bytes_live` since the last reset.
    pub bytes_peak: u64,
    /// Bytes kept for reuse.
    pub bytes_pooled: u64,
    pub allocations: u64,
    pub launches: u64,
}

/// Memory of one size class, on loan from a pool that gets it back when the loan ends: what a `Buffer` of a leaf holds.
pub struct Loan<T> {
    memory: ManuallyDrop<T>,
    class: usize,
    pool: Arc<Pool<T>>,
}

impl<T> Loan<T> {
    /// Refuses a range outside the memory.
    pub fn check(&self, offset: usize, bytes: usize) -> Result<()> {
        check_range(offset, bytes, self.class)
    }
}

impl<T> Deref for Loan<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.memory
    }
}

impl<T> Drop for Loan<T> {
    fn drop(&mut self) {
        // SAFETY: taken once, here, and not used after.
        self.pool.give(self.class, unsafe { ManuallyDrop::take(&mut self.memory) });
    }
}

impl<T: Send + Sync + 'static> Storage for Loan<T> {
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Free lists of one leaf's memory type.
pub struct Pool<T> {
    free: Mutex<HashMap<usize, Vec<T>>>,
    live: AtomicU64,
    peak: AtomicU64,
    pooled: AtomicU64,
    allocations: AtomicU64,
    cap: AtomicU64,
}

impl<T> Pool<T> {
    pub fn new() -> Self {
        Self {
            free: Mutex::new(HashMap::new()),
            live: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            pooled: AtomicU64::new(0),
            allocations: AtomicU64::new(0),
            cap: AtomicU64::new(u64::MAX),
        }
    }

    /// Size classes: 256-byte steps to 4 KiB, then eighths of a power of two, so at most 12.5 % is lost.
    pub fn class(bytes: usize) -> usize {
        let step = if bytes <= 4096 { 256 } else { bytes.next_power_of_two() / 16 };
        bytes.max(1).div_ceil(step) * step
    }

    /// Recycled memory of the class of `bytes`, or new memory from `make`, which is given the class size.
    pub fn lend(
        self: &Arc<Self>,
        device: &str,
        bytes: usize,
        make: impl FnOnce(usize) -> Result<T>,
    ) -> Result<Loan<T>> {
        let class = Self::class(bytes);
        let live = self.live.fetch_add(class as u64, Relaxed) + class as u64;
        let cap = self.cap.load(Relaxed);
        if live > cap {
            self.live.fetch_sub(class as u64, Relaxed);
            let live = live - class as u64;
            return Err(Error::OutOfMemory { device: device.to_string(), requested: bytes as u64, live, cap });
        }
        self.allocations.fetch_add(1, Relaxed);
        let recycled = self.lock().get_mut(&class).and_then(Vec::pop);
        let memory = match recycled {
            Some(memory) => {
                self.pooled.fetch_sub(class as u64, Relaxed);
                memory
            }
            None => make(class).inspect_err(|_| {
                self.live.fetch_sub(class as u64, Relaxed);
            })?,
        };
        self.peak.fetch_max(live, Relaxed);
        Ok(Loan { memory: ManuallyDrop::new(memory), class, pool: self.clone() })
    }

    fn give(&self, class: usize, memory: T) {
        self.live.fetch_sub(class as u64, Relaxed);
        self.pooled.fetch_add(class as u64, Relaxed);
        self.lock().entry(class).or_default().push(memory);
    }

    pub fn set_cap(&self, bytes: Option<u64>) {
        self.cap.store(bytes.unwrap_or(u64::MAX), Relaxed);
    }

    pub fn reset_peak(&self) {
        self.peak.store(self.live.load(Relaxed), Relaxed);
    }

    pub fn stats(&self, launches: u64) -> Stats {
        Stats {
            bytes_live: self.live.load(Relaxed),
            bytes_peak: self.peak.load(Relaxed),
            bytes_pooled: self.pooled.load(Relaxed),
            allocations: self.allocations.load(Relaxed),
            launches,
        }
    }

    /// A poisoned lock only means that another thread panicked between two list operations; the lists stay valid.
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<usize, Vec<T>>> {
        self.free.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
