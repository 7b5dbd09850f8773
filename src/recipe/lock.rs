//! One process at a time in a folder.

use std::fs::{File, TryLockError};
use std::path::Path;

use crate::console;
use crate::error::{Error, Result};

/// Name of the lock file; it stays in the folder, what counts is the lock on it.
pub const FILE: &str = ".lock";

/// Held while a run works; the system releases it when the process ends, however it ends.
pub struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// Takes the folder, or says at once that another process has it: two runs in one folder would remove each other's
    /// checkpoints.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let file = File::options().write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|e| Error::io(&path, e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let rule = "is in use by another run; wait for it, or name another folder".to_string();
                return Err(Error::Usage { argument: "--out", value: folder.display().to_string(), rule });
            }
            // Some network file systems have no locks: better to run there than not at all.
            Err(TryLockError::Error(e)) => {
                console::warn(format_args!("{}: cannot be locked ({e}); start no second run there", path.display()));
            }
        }
        Ok(Self { _file: file })
    }
}
