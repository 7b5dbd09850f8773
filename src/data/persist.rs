//! Directories written whole or not at all (single files: [`crate::atomic`]), and reads that look at the size first.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes files as one directory. A new or empty directory appears whole; in an existing one the files are written
/// aside first, then put in the place of their namesakes, `marker` last: a reader that asks for the marker sees the old
/// directory, the new one or none. What else lies in it stays, and the directory (or the link to it) itself stays.
///
/// # Errors
/// `Error::Io` with the file; what was there is then untouched. `Error::File` when `path` is no directory, or one that
/// holds other things and no `marker`: something else wrote it.
pub fn write_directory(path: &Path, marker: &str, files: &[(&str, Vec<u8>)]) -> Result<()> {
    if path.symlink_metadata().is_ok() && !is_own(path, marker, files)? {
        return Err(Error::file(path, "directory", format!("exists and holds no {marker}; name another directory")));
    }
    put_files(path, marker, files)
}

/// As [`write_directory`], whatever else the directory holds.
pub fn put_files(path: &Path, marker: &str, files: &[(&str, Vec<u8>)]) -> Result<()> {
    let occupied = path.symlink_metadata().is_ok();
    let parent = if occupied { path.to_path_buf() } else { parent_of(path) };
    fs::create_dir_all(&parent).map_err(|e| Error::io(&parent, e))?;
    let stage = tempfile::Builder::new().prefix(ASIDE).tempdir_in(&parent).map_err(|e| Error::io(&parent, e))?;
    let fresh = stage.path().join("new");
    fs::create_dir(&fresh).map_err(|e| Error::io(&fresh, e))?;
    for (name, bytes) in files {
        let target = path.join(name);
        let mut file = File::create(fresh.join(name)).map_err(|e| Error::io(&target, e))?;
        file.write_all(bytes).map_err(|e| Error::io(&target, e))?;
        file.sync_all().map_err(|e| Error::io(&target, e))?;
    }
    sync_directory(&fresh)?;
    if !occupied {
        fs::rename(&fresh, path).map_err(|e| Error::io(path, e))?;
        return sync_directory(&parent);
    }
    match fs::remove_file(path.join(marker)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(path.join(marker), e)),
        _ => sync_directory(path)?,
    }
    let last = |name: &str| name == marker;
    for (name, _) in files.iter().filter(|(n, _)| !last(n)).chain(files.iter().filter(|(n, _)| last(n))) {
        let target = path.join(name);
        fs::rename(fresh.join(name), &target).map_err(|e| Error::io(&target, e))?;
    }
    sync_directory(path)
}

/// Prefix of what is being written; a killed program leaves it behind.
const ASIDE: &str = ".espalier-";

/// Whether an earlier call wrote the directory: it is empty, holds the marker, or holds nothing but files of these names
/// (a writing that was cut off between them).
fn is_own(path: &Path, marker: &str, files: &[(&str, Vec<u8>)]) -> Result<bool> {
    if !path.is_dir() {
        return Ok(false);
    }
    if path.join(marker).is_file() {
        return Ok(true);
    }
    for entry in fs::read_dir(path).map_err(|e| Error::io(path, e))? {
        let name = entry.map_err(|e| Error::io(path, e))?.file_name();
        let aside = name.to_string_lossy().starts_with(ASIDE);
        if !aside && !files.iter().any(|(own, _)| name == *own) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn parent_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

fn sync_directory(path: &Path) -> Result<()> {
    // Directories cannot be opened for sync everywhere (Windows); there the rename alone must do.
    match File::open(path) {
        Ok(directory) => directory.sync_all().map_err(|e| Error::io(path, e)),
        Err(_) => Ok(()),
    }
}

/// Reads a file after looking at its size, so that no absurd file is ever allocated for.
pub fn read_capped(path: &Path, cap: u64) -> Result<Vec<u8>> {
    let metadata = fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !metadata.is_file() {
        return Err(Error::file(path, "file", "must be a regular file"));
    }
    if metadata.len() > cap {
        return Err(Error::file(path, "file", format!("{} bytes, above the cap of {cap}", metadata.len())));
    }
    fs::read(path).map_err(|e| Error::io(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_directory_is_never_replaced() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        write_directory(&out, "card.json", &[("card.json", b"1".to_vec())]).unwrap();
        fs::write(out.join("notes.txt"), "mine").unwrap();
        write_directory(&out, "card.json", &[("card.json", b"2".to_vec())]).unwrap();
        assert_eq!(fs::read(out.join("card.json")).unwrap(), b"2");
        assert_eq!(fs::read(out.join("notes.txt")).unwrap(), b"mine", "what else lies in it stays");
        assert_eq!(fs::read_dir(&out).unwrap().count(), 2, "no temporary left");
        fs::remove_file(out.join("card.json")).unwrap();
        fs::write(out.join("thesis.tex"), "mine").unwrap();
        let error = write_directory(&out, "card.json", &[("card.json", b"3".to_vec())]).unwrap_err();
        assert!(matches!(error, Error::File { .. }), "{error}");
        assert_eq!(fs::read(out.join("thesis.tex")).unwrap(), b"mine");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "no temporary left");
    }

    #[cfg(unix)]
    #[test]
    fn a_linked_directory_stays_a_link_and_a_torn_one_is_written_anew() {
        let root = tempfile::tempdir().unwrap();
        let (real, link) = (root.path().join("real"), root.path().join("link"));
        fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let files = [("card.json", b"1".to_vec()), ("text", b"a".to_vec())];
        write_directory(&link, "card.json", &files).unwrap();
        assert!(link.symlink_metadata().unwrap().is_symlink() && real.join("card.json").is_file());
        fs::remove_file(real.join("card.json")).unwrap();
        write_directory(&link, "card.json", &files).unwrap();
        assert_eq!(fs::read(real.join("card.json")).unwrap(), b"1");
    }

    #[test]
    fn sizes_are_looked_at_before_reading() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("big");
        fs::write(&path, [0; 100]).unwrap();
        assert!(matches!(read_capped(&path, 99), Err(Error::File { .. })));
        assert_eq!(read_capped(&path, 100).unwrap().len(), 100);
        assert!(matches!(read_capped(root.path(), 100), Err(Error::File { .. })));
    }
}
