//! A command as several processes: the first one does the work and leads the others.

use std::sync::Arc;
use std::time::Duration;

use super::flow::stop_on_signal;
use crate::console;
use crate::error::Result;
use crate::pipeline::post::Post;
use crate::pipeline::{mpi, rank, remote};
use crate::recipe::hooks;

/// Time for the launcher to read what was said last.
const LINGER: Duration = Duration::from_millis(500);

/// Exit code of what can be resumed.
const INTERRUPTED: i32 = 5;

/// How long the other processes may take to say that they end.
const FAREWELL: Duration = Duration::from_secs(5);

/// Runs `work` in the first of the processes that were started together, or in the only one; the others serve it and end with
/// it. `heartbeat`: the run's.
pub fn among(heartbeat: Duration, work: impl FnOnce(Option<Arc<Post>>) -> Result<()>) -> Result<()> {
    let Some(joined) = mpi::join()? else {
        stop_on_signal();
        return work(None);
    };
    let post = joined.post.clone();
    if post.rank() > 0 {
        // What a signal means is for the first process to say; the launcher sends it to all of them.
        let _ = ctrlc::set_handler(|| {});
        let code = match rank::serve(&post, &hooks::maker(), heartbeat) {
            Ok(code) => {
                joined.leave();
                code
            }
            Err(e) => {
                let code = e.exit_code();
                // In one piece: the launcher ends all ranks when the first of them has ended.
                let next = if code == INTERRUPTED { "\nthe same command goes on from the last checkpoint" } else { "" };
                console::tell(format_args!("rank {}: error[{}]: {e}{next}", post.rank(), e.code()));
                code
            }
        };
        std::process::exit(code);
    }
    stop_on_signal();
    let done = work(Some(post.clone()));
    let code = done.as_ref().map_or_else(|e| e.exit_code(), |()| 0);
    // Said before anything is waited for: a launcher that has lost a process leaves the others little time.
    if let Err(e) = &done {
        console::tell(format_args!("error[{}]: {e}", e.code()));
        if code == INTERRUPTED {
            console::tell("the same command goes on from the last checkpoint");
        }
    }
    if !remote::end(&post, code, FAREWELL) {
        if done.is_ok() {
            console::warn("a rank did not say that it ends; all results are written");
        }
        // A launcher that is ending the ranks throws away what one of them wrote just before it went.
        std::thread::sleep(LINGER);
        // Without MPI's own end, which waits for all: the launcher sees it and ends the rest.
        drop(joined);
        std::process::exit(if code == 0 { 1 } else { code });
    }
    joined.leave();
    if done.is_err() {
        std::process::exit(code);
    }
    Ok(())
}
