//! The one way a result file is written: whole or not at all.

use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes `bytes` to `path` so that a reader, a crash or a full disk sees the old content or the new one, never a
/// part: a temporary file in the same directory is written, flushed to the disk and renamed over `path`, then the
/// directory entry itself is flushed. The directory must exist. A symbolic link stays and its target is replaced; a
/// device, a FIFO or a socket is written to as it stands.
///
/// # Errors
/// `Error::Io` naming `path`; a full disk keeps its `ErrorKind::StorageFull`. The old file is then untouched and the
/// temporary one is removed.
pub fn write_atomic(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let named = path.as_ref();
    let fail = |source| Error::io(named, source);
    let path = match destination(named).map_err(fail)? {
        Destination::File(path) => path,
        Destination::Stream(mut stream) => return stream.write_all(bytes).and_then(|()| stream.flush()).map_err(fail),
    };
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
    file.persist(&path).map_err(|error| fail(error.error))?;
    sync_directory(directory).map_err(fail)
}

/// What a path stands for.
enum Destination {
    /// A regular file, or one to be made.
    File(PathBuf),
    /// What cannot be replaced, because others have it open.
    Stream(Box<dyn Write>),
}

/// Links that are followed at most, as on Linux.
const MAX_LINKS: usize = 40;

fn destination(path: &Path) -> std::io::Result<Destination> {
    // Whatever standard output is: opened by name, a file would be written from its beginning again.
    if path == Path::new("/dev/stdout") {
        return Ok(Destination::Stream(Box::new(std::io::stdout())));
    }
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() && !found.is_dir() => {
            return Ok(Destination::Stream(Box::new(std::fs::File::options().write(true).open(path)?)));
        }
        _ => {}
    }
    let mut file = path.to_path_buf();
    for _ in 0..MAX_LINKS {
        // A link in /proc, which /dev/fd leads to, names a file that is open.
        if file.starts_with("/proc") {
            return Ok(Destination::Stream(Box::new(std::fs::File::options().append(true).open(path)?)));
        }
        match std::fs::read_link(&file) {
            // Relative to the folder of the link; `join` takes an absolute target as it is.
            Ok(target) => file = file.parent().unwrap_or(Path::new("")).join(target),
            Err(_) => return Ok(Destination::File(file)),
        }
    }
    Err(std::io::Error::other(format!("more than {MAX_LINKS} symbolic links, one behind the other")))
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

    #[cfg(unix)]
    #[test]
    fn links_stay_and_their_targets_are_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let [file, link, farther] = ["file", "link", "farther"].map(|name| directory.path().join(name));
        std::os::unix::fs::symlink("file", &link).unwrap();
        std::os::unix::fs::symlink(&link, &farther).unwrap();
        // Made where it leads to nothing, replaced where it does.
        for text in [b"first", b"other"] {
            write_atomic(&farther, text).unwrap();
            assert_eq!(std::fs::read(&file).unwrap(), text);
        }
        assert!([&link, &farther].iter().all(|path| path.symlink_metadata().unwrap().is_symlink()));
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("farther", &file).unwrap();
        assert!(write_atomic(&link, b"x").is_err(), "a ring");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn devices_and_pipes_are_written_to_and_stay() {
        use std::os::unix::fs::{FileTypeExt, symlink};

        // By a link in a folder of its own: a mistake here must not cost the machine its devices.
        let directory = tempfile::tempdir().unwrap();
        let [full, null, pipe] = ["full", "null", "pipe"].map(|name| directory.path().join(name));
        symlink("/dev/full", &full).unwrap();
        symlink("/dev/null", &null).unwrap();
        let error = write_atomic(&full, b"x").unwrap_err();
        assert!(
            matches!(&error, Error::Io { path, source }
            if *path == full && source.kind() == std::io::ErrorKind::StorageFull),
            "{error}"
        );
        write_atomic(&null, b"x").unwrap();
        assert!([&full, &null].iter().all(|path| path.symlink_metadata().unwrap().is_symlink()));

        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || std::fs::read(pipe).unwrap()
        });
        write_atomic(&pipe, b"through the pipe").unwrap();
        assert!(pipe.symlink_metadata().unwrap().file_type().is_fifo());
        assert_eq!(reader.join().unwrap(), b"through the pipe");
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
