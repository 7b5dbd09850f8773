//! Directories written whole or not at all (single files: [`crate::atomic`]), and reads that look at the size first.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes a directory of files at once. An existing directory is replaced only when it holds `marker`, that is when an
/// earlier call wrote it; anything else there is an error and stays untouched.
pub fn write_directory(path: &Path, marker: &str, files: &[(&str, Vec<u8>)]) -> Result<()> {
    let parent = parent_of(path);
    fs::create_dir_all(&parent).map_err(|e| Error::io(&parent, e))?;
    let occupied = path.symlink_metadata().is_ok();
    if occupied && !is_replaceable(path, marker)? {
        return Err(Error::file(path, "directory", format!("exists and holds no {marker}; name another directory")));
    }
    let stage = tempfile::Builder::new().prefix(".espalier-").tempdir_in(&parent).map_err(|e| Error::io(&parent, e))?;
    let fresh = stage.path().join("new");
    fs::create_dir(&fresh).map_err(|e| Error::io(&fresh, e))?;
    for (name, bytes) in files {
        let target = path.join(name);
        let mut file = File::create(fresh.join(name)).map_err(|e| Error::io(&target, e))?;
        file.write_all(bytes).map_err(|e| Error::io(&target, e))?;
        file.sync_all().map_err(|e| Error::io(&target, e))?;
    }
    sync_directory(&fresh)?;
    // The old directory leaves with the stage when that is dropped; if the second rename fails, it is put back.
    let old = stage.path().join("old");
    if occupied {
        fs::rename(path, &old).map_err(|e| Error::io(path, e))?;
    }
    if let Err(e) = fs::rename(&fresh, path) {
        if occupied {
            fs::rename(&old, path).map_err(|e| Error::io(path, e))?;
        }
        return Err(Error::io(path, e));
    }
    sync_directory(&parent)
}

fn is_replaceable(path: &Path, marker: &str) -> Result<bool> {
    if !path.is_dir() {
        return Ok(false);
    }
    let empty = fs::read_dir(path).map_err(|e| Error::io(path, e))?.next().is_none();
    Ok(empty || path.join(marker).is_file())
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
        write_directory(&out, "card.json", &[("card.json", b"2".to_vec())]).unwrap();
        assert_eq!(fs::read(out.join("card.json")).unwrap(), b"2");
        fs::remove_file(out.join("card.json")).unwrap();
        fs::write(out.join("thesis.tex"), "mine").unwrap();
        let error = write_directory(&out, "card.json", &[("card.json", b"3".to_vec())]).unwrap_err();
        assert!(matches!(error, Error::File { .. }), "{error}");
        assert_eq!(fs::read(out.join("thesis.tex")).unwrap(), b"mine");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "no temporary left");
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
