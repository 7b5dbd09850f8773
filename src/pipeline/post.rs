//! Letters between the processes of a run: sent without waiting, sorted on arrival, and a sign of life in each of them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::transport::{Gone, Transport};
use super::watch::locked;

/// What a letter is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    /// Orders, answers and what a worker shows of itself.
    Control = 0,
    /// Frames between workers.
    Data = 1,
    /// Nothing but a sign of life.
    Alive = 2,
}

impl Lane {
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::Control, Self::Data, Self::Alive].into_iter().find(|l| *l as u32 == number)
    }
}

/// Pipelines of one run are told apart by their number modulo this: a late letter of an earlier one is thrown away.
pub const GENERATIONS: u32 = 4096;

/// A process that has nothing to say says so this often.
pub const ALIVE_EVERY: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub struct Letter {
    /// The sender on arrival, the receiver before.
    pub rank: usize,
    pub lane: Lane,
    pub generation: u32,
    pub bytes: Vec<u8>,
}

/// When something last came from each rank.
struct Heard {
    started: Instant,
    /// Microseconds after that.
    last: Vec<AtomicU64>,
}

impl Heard {
    fn now(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }
}

/// Takes in what arrives.
#[derive(Clone)]
pub struct Inbox {
    control: Sender<Letter>,
    data: Sender<Letter>,
    heard: Arc<Heard>,
}

impl Inbox {
    /// Something came from `rank`.
    pub fn hear(&self, rank: usize) {
        if let Some(last) = self.heard.last.get(rank) {
            last.store(self.heard.now(), Relaxed);
        }
    }

    pub fn deliver(&self, letter: Letter) {
        self.hear(letter.rank);
        // Nobody reads any more where the program ends.
        let _ = match letter.lane {
            Lane::Control => self.control.send(letter),
            Lane::Data => self.data.send(letter),
            Lane::Alive => Ok(()),
        };
    }
}

/// One process's end. What carries the letters (see `mpi`) takes them from a queue for each receiver.
pub struct Post {
    rank: usize,
    outgoing: Mutex<Vec<Sender<Letter>>>,
    ranks: usize,
    control: Mutex<Receiver<Letter>>,
    data: Mutex<Receiver<Letter>>,
    heard: Arc<Heard>,
    lost: AtomicBool,
}

impl Post {
    /// `outgoing`: a queue for each rank.
    pub fn new(rank: usize, outgoing: Vec<Sender<Letter>>) -> (Self, Inbox) {
        let ranks = outgoing.len();
        let heard = Arc::new(Heard { started: Instant::now(), last: (0..ranks).map(|_| AtomicU64::new(0)).collect() });
        let ((control, controls), (data, frames)) = (channel(), channel());
        let post = Self {
            rank,
            outgoing: Mutex::new(outgoing),
            ranks,
            control: Mutex::new(controls),
            data: Mutex::new(frames),
            heard: heard.clone(),
            lost: AtomicBool::new(false),
        };
        (post, Inbox { control, data, heard })
    }

    /// This process's number.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Processes of the run.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Hands a letter over; `false` where the way to its receiver is closed.
    pub fn send(&self, to: usize, lane: Lane, generation: u32, bytes: Vec<u8>) -> bool {
        let letter = Letter { rank: to, lane, generation: generation % GENERATIONS, bytes };
        locked(&self.outgoing).get(to).is_some_and(|queue| queue.send(letter).is_ok())
    }

    /// The next word of another process.
    pub fn control(&self, wait: Duration) -> Option<Letter> {
        locked(&self.control).recv_timeout(wait).ok()
    }

    /// How long nothing has come from `rank`.
    pub fn silence(&self, rank: usize) -> Duration {
        let last = self.heard.last.get(rank).map_or(0, |last| last.load(Relaxed));
        Duration::from_micros(self.heard.now().saturating_sub(last))
    }

    /// Notes that a rank is not to be reached any more.
    pub fn lose(&self) {
        self.lost.store(true, Relaxed);
    }

    pub fn has_lost(&self) -> bool {
        self.lost.load(Relaxed)
    }

    /// Sends what is queued and nothing more.
    pub fn close(&self) {
        locked(&self.outgoing).clear();
    }
}

/// Frames of one pipeline's worker, which is the process of the same number.
pub struct Mail {
    pub post: Arc<Post>,
    pub generation: u32,
}

impl Transport for Mail {
    fn send(&mut self, to: usize, frame: Vec<u8>) -> Result<(), Gone> {
        if self.post.send(to, Lane::Data, self.generation, frame) { Ok(()) } else { Err(Gone) }
    }

    fn receive(&mut self, wait: Duration) -> Result<Option<(usize, Vec<u8>)>, String> {
        let until = Instant::now() + wait;
        loop {
            match locked(&self.post.data).recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(letter) if letter.generation == self.generation % GENERATIONS => {
                    return Ok(Some((letter.rank, letter.bytes)));
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => return Err("no message can come any more".into()),
            }
        }
    }
}
