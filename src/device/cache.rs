//! What devices keep on the disk: where it lies, and compiled kernels by what they were made from.

use std::path::{Path, PathBuf};

use crate::atomic::write_atomic;
use crate::error::{Error, Result};

/// The folder of compiled kernels of one kind, made where it is missing.
pub fn folder(kind: &str) -> Result<PathBuf> {
    let folder = place(kind);
    std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
    Ok(folder)
}

/// Where what is kept of one kind lies, made or not: below `ESPALIER_CACHE`, else the user's cache folder.
pub fn place(kind: &str) -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = variable("ESPALIER_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("espalier")))
        .or_else(|| Some(variable("HOME")?.join(".cache").join("espalier")))
        .unwrap_or_else(|| std::env::temp_dir().join("espalier"));
    base.join(kind)
}

/// The cached file for `parts` (source, flags, versions, architecture), made by `build` where it is missing or damaged.
/// A file counts once its checksum stands beside it; both are put in place by a rename.
pub fn get(folder: &Path, extension: &str, parts: &[&str], build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    let name = hasher.finalize().to_hex();
    let file = folder.join(format!("{name}.{extension}"));
    let sum = folder.join(format!("{name}.sum"));
    let intact = || {
        let (bytes, wanted) = (std::fs::read(&file).ok()?, std::fs::read_to_string(&sum).ok()?);
        (blake3::hash(&bytes).to_hex().as_str() == wanted).then_some(())
    };
    if intact().is_some() {
        return Ok(file);
    }
    let made = tempfile::Builder::new()
        .prefix(".build-")
        .suffix(&format!(".{extension}"))
        .tempfile_in(folder)
        .map_err(|e| Error::io(folder, e))?
        .into_temp_path();
    build(&made)?;
    let bytes = std::fs::read(&made).map_err(|e| Error::io(&made, e))?;
    made.persist(&file).map_err(|e| Error::io(&file, e.error))?;
    write_atomic(&sum, blake3::hash(&bytes).to_hex().as_bytes())?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_entry_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut made = 0;
        let mut get = || {
            get(folder.path(), "bin", &["source", "flags"], |path| {
                made += 1;
                std::fs::write(path, b"compiled").map_err(|e| Error::io(path, e))
            })
            .unwrap()
        };
        let file = get();
        assert_eq!(get(), file);
        std::fs::write(&file, b"comp").unwrap();
        assert_eq!(std::fs::read(get()).unwrap(), b"compiled");
        assert_eq!(made, 2);
    }
}
