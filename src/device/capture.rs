//! Work that is captured once and replayed: the launches and copies of a piece of host code, without the host code.

use std::any::Any;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, ThreadId};

use super::{Buffer, Info};
use crate::error::{Error, Result, Uncapturable};

/// Captured work of one device, in that device's own form; see [`super::Device::capture`].
pub struct Graph(Box<dyn Any + Send + Sync>);

impl Graph {
    pub(super) fn new(work: impl Any + Send + Sync) -> Self {
        Self(Box::new(work))
    }

    /// The leaf's own form; another device's graph is a typed error.
    pub(super) fn leaf<T: Any>(&self, info: &Info) -> Result<&T> {
        self.0.downcast_ref().ok_or_else(|| Error::WrongDevice {
            op: "replay",
            input: 0,
            expected: info.id.clone(),
            got: "work of another device".into(),
        })
    }
}

type Work<D> = Box<dyn Fn(&D) -> Result<()> + Send + Sync>;

/// What is taken down of a capture: on devices that replay it themselves the work, in order, and on all of them the memory
/// that must live as long as the graph.
pub struct Recording<D> {
    pub work: Vec<Work<D>>,
    pinned: Vec<Buffer>,
    refused: Option<Uncapturable>,
    /// The thread that captures.
    owner: ThreadId,
}

/// The capture under way on a device, if any. One at a time, and no other thread's work meanwhile: a driver takes down whatever is
/// put on its queue.
pub struct Recorder<D> {
    recording: Mutex<Option<Recording<D>>>,
    /// Held alone by the thread that captures.
    turn: RwLock<()>,
}

/// A capture under way. Where the work panics it ends here: the device goes on without it.
pub struct Capturing<'a, D> {
    recorder: &'a Recorder<D>,
    _alone: RwLockWriteGuard<'a, ()>,
}

impl<D> Drop for Capturing<'_, D> {
    fn drop(&mut self) {
        *self.recorder.lock() = None;
    }
}

impl<D> Recorder<D> {
    pub fn new() -> Self {
        Self { recording: Mutex::new(None), turn: RwLock::new(()) }
    }

    /// A poisoned lock means that captured code panicked; what was recorded is still whole.
    fn lock(&self) -> MutexGuard<'_, Option<Recording<D>>> {
        self.recording.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn captures_here(&self) -> bool {
        self.lock().as_ref().is_some_and(Recording::is_of_this_thread)
    }

    /// Held by a call while it puts work on the device or waits for it; comes when no other thread captures.
    #[must_use]
    pub fn turn(&self) -> Option<RwLockReadGuard<'_, ()>> {
        (!self.captures_here()).then(|| self.turn.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Held by a replay: all graphs of a device share memory, so none may run beside another.
    #[must_use]
    pub fn turn_alone(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        (!self.captures_here()).then(|| self.turn.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits for the calls of other threads; what comes back is held until the end of the capture.
    pub fn begin(&self, info: &Info) -> Result<Capturing<'_, D>> {
        if self.captures_here() {
            return Err(refusal(info, Uncapturable::Nested));
        }
        let alone = self.turn.write().unwrap_or_else(PoisonError::into_inner);
        let owner = thread::current().id();
        *self.lock() = Some(Recording { work: Vec::new(), pinned: Vec::new(), refused: None, owner });
        Ok(Capturing { recorder: self, _alone: alone })
    }

    /// Records `work` with the buffers it needs; gives it back to be run where nothing is captured.
    pub fn record<'b, W>(&self, buffers: impl Iterator<Item = &'b Buffer>, work: W) -> Option<W>
    where
        W: Fn(&D) -> Result<()> + Send + Sync + 'static,
    {
        let mut recording = self.lock();
        let Some(recording) = recording.as_mut() else {
            return Some(work);
        };
        recording.pin(buffers);
        recording.work.push(Box::new(work));
        None
    }

    /// Keeps the buffers of work that the driver records.
    pub fn pin<'b>(&self, buffers: impl Iterator<Item = &'b Buffer>) {
        if let Some(recording) = self.lock().as_mut() {
            recording.pin(buffers);
        }
    }

    /// Ends the hopes of a capture under way: the call that asks would have to wait for work that does not run.
    pub fn refuse(&self, info: &Info, reason: Uncapturable) -> Result<()> {
        match self.lock().as_mut().filter(|recording| recording.is_of_this_thread()) {
            None => Ok(()),
            Some(recording) => {
                recording.refused.get_or_insert(reason);
                Err(refusal(info, reason))
            }
        }
    }

    /// Ends the capture of work that came to `done` and leaves `outliving` allocations behind. Code that went on after a
    /// refusal has captured something else than it runs.
    pub fn end<T>(&self, info: &Info, done: Result<T>, outliving: usize) -> Result<(T, Recording<D>)> {
        let recording = self.lock().take();
        let refused = recording.as_ref().and_then(|r| r.refused);
        if let Some(reason) = refused {
            return Err(refusal(info, reason));
        }
        let done = done?;
        match recording {
            Some(recording) if outliving == 0 => Ok((done, recording)),
            _ => Err(refusal(info, Uncapturable::Outlives(outliving))),
        }
    }
}

impl<D> Recording<D> {
    fn is_of_this_thread(&self) -> bool {
        self.owner == thread::current().id()
    }

    /// Buffers come many times over: one handle each will do.
    fn pin<'b>(&mut self, buffers: impl Iterator<Item = &'b Buffer>) {
        for buffer in buffers {
            if !self.pinned.iter().rev().any(|pinned| pinned.same(buffer)) {
                self.pinned.push(buffer.clone());
            }
        }
    }

    pub fn replay(&self, device: &D) -> Result<()> {
        self.work.iter().try_for_each(|work| work(device))
    }
}

pub fn refusal(info: &Info, reason: Uncapturable) -> Error {
    Error::Capture { device: info.id.clone(), reason }
}
