//! The one way a result file is written: whole or not at all.

use std::io::Write;
use std::path::Path;

use crate::error::{Error, Result};

/// Writes `bytes` to `path` so that a reader, a crash or a full disk sees the old content or the new one, never a
/// part: a temporary file in the same directory is written, flushed to the disk and renamed over `path`, then the
/// directory entry itself is flushed. The directory must exist.
///
/// # Errors
/// `Error::Io` naming `path`; a full disk keeps its `ErrorKind::StorageFull`. The old file is then untouched and the
/// temporary one is removed.
pub fn write_atomic(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    let fail = |source| Error::io(path, source);
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".write-").suffix(".tmp");
    // A temporary file is private by default; a report is not. The process's umask still applies.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(directory).map_err(fail)?;
    file.write_all(bytes).map_err(fail)?;
    file.as_file().sync_all().map_err(fail)?;
    file.persist(path).map_err(|error| fail(error.error))?;
    sync_directory(directory).map_err(fail)
}

/// A rename is durable only once the directory that holds the name is flushed.
#[cfg(unix)]
fn sync_directory(directory: &Path) -> std::io::Result<()> {
    std::fs::File::open(directory)?.sync_all()
}

/// Directories cannot be opened for flushing here; the file system's journal orders the rename.
#[cfg(not(unix))]
fn sync_directory(_directory: &Path) -> std::io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_whole_content_and_leaves_no_temporary_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.json");
        write_atomic(&path, b"a long first version").unwrap();
        write_atomic(&path, b"second").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"second");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn failure_names_the_path_and_keeps_the_old_file() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("absent").join("report.json");
        let error = write_atomic(&missing, b"x").unwrap_err();
        assert!(matches!(&error, Error::Io { path, source }
            if *path == missing && source.kind() == std::io::ErrorKind::NotFound));

        // A directory in the place of the file makes the rename itself fail, after the bytes are on the disk.
        let occupied = directory.path().join("occupied");
        std::fs::create_dir(&occupied).unwrap();
        assert!(write_atomic(&occupied, b"x").is_err());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "the temporary file is gone");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn full_disk_surfaces_as_storage_full() {
        // /dev/full fails every write with ENOSPC; the error must keep that kind through our type.
        let source = std::fs::File::options().write(true).open("/dev/full").unwrap().write_all(b"x").unwrap_err();
        let error = Error::io("/dev/full", source);
        assert!(matches!(&error, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull));
        assert_eq!(error.exit_code(), 5);
    }
}
