//! Letters carried by MPI: one process per rank, started with `mpirun`. Without the feature `mpi`, or where one process was
//! started, there is nothing to join.
//!
//! A thread for each receiver sends and may wait there, so that nobody else does; one thread takes in what comes. It asks
//! instead of waiting, because the wait of common MPI libraries occupies a core.

#[cfg(not(feature = "mpi"))]
pub use absent::{Joined, join};
#[cfg(feature = "mpi")]
pub use present::{Joined, join};

#[cfg(feature = "mpi")]
mod present {
    use std::collections::HashMap;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
    use std::thread::JoinHandle;
    use std::time::{Duration, Instant};

    use mpi::Threading;
    use mpi::environment::Universe;
    use mpi::point_to_point::MatchedReceiveVec;
    use mpi::topology::SimpleCommunicator;
    use mpi::traits::{Communicator, Destination, Source};

    use crate::console::LAUNCHERS;
    use crate::error::{Error, Result};
    use crate::pipeline::post::{ALIVE_EVERY, GENERATIONS, Inbox, Lane, Letter, Post};

    /// Longer letters go in pieces: MPI counts in 32 bits.
    const PIECE: usize = 8 << 20;

    /// Pause between looks for a letter.
    const LOOK: Duration = Duration::from_micros(100);

    /// How long a letter may take to leave when the program ends.
    const LEAVE: Duration = Duration::from_secs(5);

    /// This process among the ranks of a run.
    pub struct Joined {
        pub post: Arc<Post>,
        stopping: Arc<AtomicBool>,
        senders: Vec<JoinHandle<()>>,
        receiver: Option<JoinHandle<()>>,
        universe: Option<Universe>,
    }

    /// The ranks that this process was started among; `None` where it is alone.
    ///
    /// # Errors
    /// An MPI that does not let threads call it.
    pub fn join() -> Result<Option<Joined>> {
        let size = |name| std::env::var(name).ok().and_then(|n| n.parse::<usize>().ok());
        if !LAUNCHERS.into_iter().filter_map(size).any(|ranks| ranks > 1) {
            return Ok(None);
        }
        let refused = |reason: &str| Error::NotAvailable { device: "mpi".into(), reason: reason.into() };
        let Some((universe, threading)) = mpi::initialize_with_threading(Threading::Multiple) else {
            return Err(refused("it runs already"));
        };
        if threading != Threading::Multiple {
            return Err(refused("this library gives no MPI_THREAD_MULTIPLE"));
        }
        let world = universe.world();
        let (rank, ranks) = (world.rank() as usize, world.size() as usize);
        let (outgoing, queues): (Vec<_>, Vec<_>) = (0..ranks).map(|_| channel()).unzip();
        let (post, inbox) = Post::new(rank, outgoing);
        let spawn = |name: String, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name).spawn(body).map_err(|e| Error::io("mpi thread", e))
        };
        let mut senders = Vec::new();
        for (to, queue) in queues.into_iter().enumerate().filter(|(to, _)| *to != rank) {
            // Rank 0 and each other one watch each other.
            let watched = to == 0 || rank == 0;
            senders.push(spawn(format!("espalier-mpi-{to}"), Box::new(move || send_all(to, &queue, watched)))?);
        }
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = stopping.clone();
        let receiver = spawn("espalier-mpi-in".into(), Box::new(move || receive_all(&inbox, &stop)))?;
        Ok(Some(Joined { post: Arc::new(post), stopping, senders, receiver: Some(receiver), universe: Some(universe) }))
    }

    /// What a letter is, in the bits of its MPI tag: those of the smallest range that MPI promises.
    fn tag_of(letter: &Letter, more: bool) -> i32 {
        ((letter.generation % GENERATIONS) << 3 | (letter.lane as u32) << 1 | u32::from(more)) as i32
    }

    fn send_all(to: usize, queue: &Receiver<Letter>, watched: bool) {
        let world = SimpleCommunicator::world();
        let process = world.process_at_rank(to as i32);
        loop {
            let letter = match queue.recv_timeout(ALIVE_EVERY) {
                Ok(letter) => letter,
                Err(RecvTimeoutError::Timeout) if watched => {
                    Letter { rank: to, lane: Lane::Alive, generation: 0, bytes: Vec::new() }
                }
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let mut rest = letter.bytes.as_slice();
            while rest.len() > PIECE {
                let (piece, others) = rest.split_at(PIECE);
                process.send_with_tag(piece, tag_of(&letter, true));
                rest = others;
            }
            process.send_with_tag(rest, tag_of(&letter, false));
        }
    }

    fn receive_all(inbox: &Inbox, stopping: &AtomicBool) {
        let world = SimpleCommunicator::world();
        let mut pieces: HashMap<(usize, i32), Vec<u8>> = HashMap::new();
        while !stopping.load(Relaxed) {
            let Some(matched) = world.any_process().immediate_matched_probe() else {
                std::thread::sleep(LOOK);
                continue;
            };
            let (bytes, status) = matched.matched_receive_vec::<u8>();
            let (rank, tag) = (status.source_rank() as usize, status.tag());
            // A large letter is a sign of life as long as it lasts.
            inbox.hear(rank);
            let key = (rank, tag >> 1);
            if tag & 1 == 1 {
                pieces.entry(key).or_default().extend(bytes);
                continue;
            }
            let bytes = match pieces.remove(&key) {
                Some(mut whole) => {
                    whole.extend(bytes);
                    whole
                }
                None => bytes,
            };
            let (lane, generation) = (Lane::from_number(tag as u32 >> 1 & 3), tag as u32 >> 3);
            if let Some(lane) = lane {
                inbox.deliver(Letter { rank, lane, generation, bytes });
            }
        }
    }

    impl Joined {
        /// Leaves in good order, together with all others.
        pub fn leave(mut self) {
            self.post.close();
            let began = Instant::now();
            while self.senders.iter().any(|t| !t.is_finished()) && began.elapsed() < LEAVE {
                std::thread::sleep(Duration::from_millis(1));
            }
            let sent = self.senders.iter().all(JoinHandle::is_finished);
            self.stopping.store(true, Relaxed);
            if let Some(receiver) = self.receiver.take() {
                let _ = receiver.join();
            }
            if sent {
                drop(self.universe.take());
            }
        }
    }

    impl Drop for Joined {
        /// A process that ends in disorder must not wait for the others, as MPI's own end does. The launcher notices and ends
        /// the others, more reliably than MPI_Abort when some of them are gone.
        fn drop(&mut self) {
            self.stopping.store(true, Relaxed);
            std::mem::forget(self.universe.take());
        }
    }
}

#[cfg(not(feature = "mpi"))]
mod absent {
    use std::sync::Arc;

    use crate::error::Result;
    use crate::pipeline::post::Post;

    /// No process is one among several.
    pub struct Joined {
        pub post: Arc<Post>,
        never: std::convert::Infallible,
    }

    /// # Errors
    /// None.
    pub fn join() -> Result<Option<Joined>> {
        Ok(None)
    }

    impl Joined {
        pub fn leave(self) {
            match self.never {}
        }
    }
}
