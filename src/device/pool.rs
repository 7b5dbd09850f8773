//! Recycles memory by size class and counts it: every allocation of every leaf passes here.
//!
//! Memory lent during a capture belongs to captured work from then on. Such work runs in order on one queue and keeps
//! nothing in it from one replay to the next, so all graphs of a device share it, and nobody else gets it.

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use super::{Storage, check_range};
use crate::error::{Error, Result, Uncapturable};

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
    /// Command buffers handed to the driver, where launches are gathered into some.
    pub submits: u64,
}

/// Memory of one size class, on loan from a pool that gets it back when the loan ends: what a `Buffer` of a leaf holds.
pub struct Loan<T> {
    memory: ManuallyDrop<T>,
    class: usize,
    /// The capture in which it was lent.
    capture: Option<u64>,
    pool: Arc<Pool<T>>,
}

impl<T> Loan<T> {
    /// Whether it belongs to captured work.
    pub fn captured(&self) -> bool {
        self.capture.is_some_and(|capture| !self.pool.lock().outlived.contains(&capture))
    }

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
        self.pool.give(self.class, self.capture, unsafe { ManuallyDrop::take(&mut self.memory) });
    }
}

impl<T: Send + Sync + 'static> Storage for Loan<T> {
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Memory that is not lent, by size class.
struct Lists<T> {
    free: HashMap<usize, Vec<T>>,
    /// For captured work alone.
    captured: HashMap<usize, Vec<T>>,
    /// The capture under way, and how many of its loans have not ended.
    capture: Option<u64>,
    lent: usize,
    captures: u64,
    /// Captures that came to nothing because loans of theirs went on: these are like any other.
    outlived: HashSet<u64>,
    graphs: usize,
}

impl<T> Lists<T> {
    /// Without captured work its memory is everyone's.
    fn release(&mut self) {
        if self.graphs == 0 && self.capture.is_none() {
            for (class, memory) in self.captured.drain() {
                self.free.entry(class).or_default().extend(memory);
            }
        }
    }
}

/// Keeps the memory of captured work from everyone else.
pub struct Held<T>(Arc<Pool<T>>);

impl<T> Drop for Held<T> {
    fn drop(&mut self) {
        let mut lists = self.0.lock();
        lists.graphs -= 1;
        lists.release();
    }
}

/// What is lent until this ends belongs to captured work.
pub struct Lending<T>(Arc<Pool<T>>);

impl<T> Lending<T> {
    /// Gives also how many of the capture's loans go on.
    pub fn end(self) -> (Held<T>, usize) {
        let mut lists = self.0.lock();
        lists.graphs += 1;
        (Held(self.0.clone()), lists.lent)
    }
}

impl<T> Drop for Lending<T> {
    fn drop(&mut self) {
        let mut lists = self.0.lock();
        let capture = lists.capture.take().filter(|_| lists.lent > 0);
        lists.outlived.extend(capture);
        lists.release();
    }
}

/// Free lists of one leaf's memory type.
pub struct Pool<T> {
    lists: Mutex<Lists<T>>,
    live: AtomicU64,
    peak: AtomicU64,
    pooled: AtomicU64,
    allocations: AtomicU64,
    cap: AtomicU64,
}

impl<T> Pool<T> {
    pub fn new() -> Self {
        Self {
            lists: Mutex::new(Lists {
                free: HashMap::new(),
                captured: HashMap::new(),
                capture: None,
                lent: 0,
                captures: 0,
                outlived: HashSet::new(),
                graphs: 0,
            }),
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

    pub fn begin_capture(self: &Arc<Self>) -> Lending<T> {
        let mut lists = self.lock();
        lists.captures += 1;
        (lists.capture, lists.lent) = (Some(lists.captures), 0);
        Lending(self.clone())
    }

    /// Recycled memory of the class of `bytes`, or new memory from `make`, which is given the class size. During a capture
    /// there is no new memory: drivers allocate in the order of a queue that is not running.
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
        let (recycled, capture) = self.recycled(class);
        let memory = match recycled {
            Some(memory) => {
                self.pooled.fetch_sub(class as u64, Relaxed);
                Ok(memory)
            }
            None if capture.is_some() => {
                let reason = Uncapturable::Memory(class);
                Err(Error::Capture { device: device.to_string(), reason })
            }
            None => make(class),
        };
        let memory = memory.inspect_err(|_| {
            self.live.fetch_sub(class as u64, Relaxed);
        })?;
        self.peak.fetch_max(live, Relaxed);
        Ok(Loan { memory: ManuallyDrop::new(memory), class, capture, pool: self.clone() })
    }

    /// Memory of a class, and the capture that takes it.
    fn recycled(&self, class: usize) -> (Option<T>, Option<u64>) {
        let mut lists = self.lock();
        let capture = lists.capture;
        let own = if capture.is_some() { lists.captured.get_mut(&class).and_then(Vec::pop) } else { None };
        let memory = own.or_else(|| lists.free.get_mut(&class).and_then(Vec::pop));
        lists.lent += usize::from(capture.is_some() && memory.is_some());
        (memory, capture)
    }

    fn give(&self, class: usize, capture: Option<u64>, memory: T) {
        self.live.fetch_sub(class as u64, Relaxed);
        self.pooled.fetch_add(class as u64, Relaxed);
        let mut lists = self.lock();
        if capture.is_some() && capture == lists.capture {
            lists.lent -= 1;
        }
        let captured = capture.is_some_and(|capture| !lists.outlived.contains(&capture));
        let list = if captured { &mut lists.captured } else { &mut lists.free };
        list.entry(class).or_default().push(memory);
        lists.release();
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
            ..Stats::default()
        }
    }

    /// A poisoned lock only means that another thread panicked between two list operations; the lists stay valid.
    fn lock(&self) -> std::sync::MutexGuard<'_, Lists<T>> {
        self.lists.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory that knows which it is.
    fn lend(pool: &Arc<Pool<usize>>, bytes: usize) -> Result<Loan<usize>> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        pool.lend("test", bytes, |_| Ok(NEXT.fetch_add(1, Relaxed) as usize))
    }

    fn which(loans: &[Loan<usize>]) -> Vec<usize> {
        loans.iter().map(|loan| **loan).collect()
    }

    /// Memory that outlives its capture is nobody's graph's: neither while it is lent nor after.
    #[test]
    fn memory_that_outlives_its_capture_is_like_any_other() {
        let pool = Arc::new(Pool::new());
        drop((lend(&pool, 100).unwrap(), lend(&pool, 100).unwrap()));
        let lending = pool.begin_capture();
        let kept = lend(&pool, 100).unwrap();
        let (held, lent) = lending.end();
        assert!(lent == 1 && !kept.captured());
        drop(held);
        // A graph that uses it must pin it, and gets other memory of its own.
        let lending = pool.begin_capture();
        let own = lend(&pool, 100).unwrap();
        let first = *own;
        assert!(own.captured() && first != *kept);
        drop(own);
        let (held, lent) = lending.end();
        assert_eq!(lent, 0);
        let was = *kept;
        drop(kept);
        assert_eq!(*lend(&pool, 100).unwrap(), was, "everybody's again");
        drop(held);
    }

    #[test]
    fn captured_work_gets_recycled_memory_alone_and_keeps_it() {
        let pool = Arc::new(Pool::new());
        let before = which(&[lend(&pool, 100).unwrap(), lend(&pool, 100).unwrap()]);
        let lending = pool.begin_capture();
        let captured = lend(&pool, 100).unwrap();
        let first = *captured;
        assert!(captured.captured() && before.contains(&first));
        drop(captured);
        // Within the capture it is recycled: the work runs in order.
        assert_eq!(*lend(&pool, 100).unwrap(), first);
        let error = lend(&pool, 5000).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Capture { reason: Uncapturable::Memory(5120), .. }), "{error}");
        let (held, lent) = lending.end();
        assert_eq!(lent, 0);
        let others: Vec<_> = (0..3).map(|_| lend(&pool, 100).unwrap()).collect();
        assert!(!which(&others).contains(&first), "{first} is used by captured work");
        // A second graph shares it; the last one gives it back.
        let lending = pool.begin_capture();
        assert_eq!(*lend(&pool, 100).unwrap(), first);
        let (second, _) = lending.end();
        drop(held);
        assert_ne!(*lend(&pool, 100).unwrap(), first);
        drop(second);
        let all: Vec<_> = (0..2).map(|_| lend(&pool, 100).unwrap()).collect();
        assert!(which(&all).contains(&first));
    }

    #[test]
    fn loans_that_outlive_a_capture_are_counted() {
        let pool = Arc::new(Pool::new());
        drop([lend(&pool, 8).unwrap(), lend(&pool, 8).unwrap()]);
        let lending = pool.begin_capture();
        let outliving = lend(&pool, 8).unwrap();
        let (held, lent) = lending.end();
        assert_eq!(lent, 1);
        drop((held, outliving));
        let stats = pool.stats(0);
        assert_eq!((stats.bytes_live, stats.bytes_pooled), (0, 512));
        assert_eq!(pool.lock().free[&256].len(), 2);
    }
}
