//! How frames get from worker to worker.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// The receiver takes no messages any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// One worker's end.
pub trait Transport: Send {
    /// Hands a frame over without waiting for its receiver.
    ///
    /// # Errors
    /// [`Gone`].
    fn send(&mut self, to: usize, frame: Vec<u8>) -> Result<(), Gone>;

    /// The next frame and who sent it; `None` when none came within `wait`.
    ///
    /// # Errors
    /// Why nothing can come any more.
    fn receive(&mut self, wait: Duration) -> Result<Option<(usize, Vec<u8>)>, String>;
}

/// Between threads of one process.
pub struct Channels {
    own: usize,
    others: Vec<Sender<(usize, Vec<u8>)>>,
    inbox: Receiver<(usize, Vec<u8>)>,
}

impl Channels {
    /// The ends of all workers.
    pub fn between(workers: usize) -> Vec<Self> {
        let (senders, inboxes): (Vec<_>, Vec<_>) = (0..workers).map(|_| channel()).unzip();
        let end = |(own, inbox)| Self { own, others: senders.clone(), inbox };
        inboxes.into_iter().enumerate().map(end).collect()
    }
}

impl Transport for Channels {
    fn send(&mut self, to: usize, frame: Vec<u8>) -> Result<(), Gone> {
        self.others.get(to).ok_or(Gone)?.send((self.own, frame)).map_err(|_| Gone)
    }

    fn receive(&mut self, wait: Duration) -> Result<Option<(usize, Vec<u8>)>, String> {
        match self.inbox.recv_timeout(wait) {
            Ok(frame) => Ok(Some(frame)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err("all other stages are gone".into()),
        }
    }
}
