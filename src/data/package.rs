//! Which Debian package a file came from, its version, and the licence its copyright file states. Plain files of the package
//! database are read; no program is run. On other systems the index is simply empty.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::persist::read_capped;

const MAX_LIST_BYTES: u64 = 64 << 20;
const MAX_COPYRIGHT_BYTES: u64 = 8 << 20;
/// What is recorded when no machine-readable licence is found.
pub const SEE_COPYRIGHT: &str = "see copyright";

/// Files of interest to package, and what the database knows of each package.
#[derive(Debug, Default)]
pub struct PackageIndex {
    owners: BTreeMap<PathBuf, String>,
    facts: BTreeMap<String, Facts>,
}

#[derive(Debug, Default)]
struct Facts {
    version: Option<String>,
    source: Option<String>,
}

impl PackageIndex {
    /// Reads `<dpkg>/info/*.list` for paths under `root` ending in `.mo`, and `<dpkg>/status`. Unreadable files are left out:
    /// a missing owner is reported per catalog, it must not stop a collection.
    pub fn read(dpkg: &Path, root: &Path) -> Self {
        let mut index = Self::default();
        let mut lists: Vec<PathBuf> = match fs::read_dir(dpkg.join("info")) {
            Ok(entries) => entries.filter_map(|e| e.ok().map(|e| e.path())).collect(),
            Err(_) => Vec::new(),
        };
        lists.sort();
        for list in lists.iter().filter(|path| path.extension().is_some_and(|e| e == "list")) {
            let Some(stem) = list.file_stem().and_then(|s| s.to_str()) else { continue };
            // Multi-arch packages are listed as name:architecture.
            let package = stem.split(':').next().unwrap_or(stem);
            let Ok(bytes) = read_capped(list, MAX_LIST_BYTES) else { continue };
            for line in String::from_utf8_lossy(&bytes).lines() {
                if line.ends_with(".mo") && Path::new(line).starts_with(root) {
                    index.owners.insert(PathBuf::from(line), package.to_string());
                }
            }
        }
        if let Ok(bytes) = read_capped(&dpkg.join("status"), MAX_LIST_BYTES) {
            index.read_status(&String::from_utf8_lossy(&bytes));
        }
        index
    }

    pub fn owner(&self, path: &Path) -> Option<&str> {
        self.owners.get(path).map(String::as_str)
    }

    /// Every catalog path that some installed package lists.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.owners.keys().map(PathBuf::as_path)
    }

    pub fn version(&self, package: &str) -> Option<&str> {
        self.facts.get(package)?.version.as_deref()
    }

    /// The source package: binary packages built from one source share their messages.
    pub fn source<'a>(&'a self, package: &'a str) -> &'a str {
        self.facts.get(package).and_then(|f| f.source.as_deref()).unwrap_or(package)
    }

    fn read_status(&mut self, status: &str) {
        for stanza in status.split("\n\n") {
            let field = |name: &str| {
                let line = stanza.lines().find(|line| line.starts_with(name))?;
                Some(line[name.len()..].trim())
            };
            let Some(package) = field("Package:") else { continue };
            // "Source: glibc (2.36-9)" carries a version when it differs from the binary's.
            let source = field("Source:").and_then(|s| s.split_whitespace().next()).map(str::to_string);
            self.facts.insert(package.to_string(), Facts { version: field("Version:").map(str::to_string), source });
        }
    }
}

/// The licence of a package's catalogs from `<doc>/<package>/copyright`.
pub fn licence(doc: &Path, package: &str, language: &str) -> String {
    let Ok(bytes) = read_capped(&doc.join(package).join("copyright"), MAX_COPYRIGHT_BYTES) else {
        return SEE_COPYRIGHT.to_string();
    };
    licence_of(&String::from_utf8_lossy(&bytes), &format!("po/{language}.po"))
        .unwrap_or_else(|| SEE_COPYRIGHT.to_string())
}

/// The licence that a machine-readable copyright file (Debian copyright format 1.0) gives to one path: the last paragraph
/// whose patterns match wins. None when the file is not of that format or names no licence for the path.
fn licence_of(text: &str, path: &str) -> Option<String> {
    let first = text.lines().next()?;
    if !first.starts_with("Format:") || !first.contains("copyright-format") {
        return None;
    }
    let mut found = None;
    let mut stanza = Stanza::default();
    for line in text.lines().chain([""]) {
        if line.trim().is_empty() {
            let done = std::mem::take(&mut stanza);
            if done.files.iter().any(|pattern| matches(pattern.as_bytes(), path.as_bytes())) {
                found = done.licence.or(found);
            }
        } else if line.starts_with([' ', '\t']) {
            if stanza.in_files {
                stanza.files.extend(line.split_whitespace());
            }
        } else if let Some((name, value)) = line.split_once(':') {
            stanza.in_files = name.eq_ignore_ascii_case("Files");
            if stanza.in_files {
                stanza.files.extend(value.split_whitespace());
            } else if name.eq_ignore_ascii_case("License") && !value.trim().is_empty() {
                stanza.licence = Some(value.trim().to_string());
            }
        }
    }
    found
}

#[derive(Default)]
struct Stanza<'a> {
    files: Vec<&'a str>,
    licence: Option<String>,
    in_files: bool,
}

/// Shell pattern with `*` (any run, slashes included) and `?`; iterative, so no pattern can make it exponential.
fn matches(pattern: &[u8], path: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star = None;
    while t < path.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == path[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    p = at + 1;
                    t = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    const COPYRIGHT: &str = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\
        Source: https://example.org\n\n\
        Files: *\nCopyright: 2005 somebody\nLicense: GPL-2\n text of the licence\n\n\
        Files: lib/*\n  po/zh_*.po\nCopyright: 2010 translators\nLicense: LGPL-2.1+\n\n\
        License: GPL-2\n long text\n";

    #[test]
    fn the_last_matching_paragraph_wins() {
        assert_eq!(licence_of(COPYRIGHT, "po/nl.po").as_deref(), Some("GPL-2"));
        assert_eq!(licence_of(COPYRIGHT, "po/zh_CN.po").as_deref(), Some("LGPL-2.1+"));
        assert_eq!(licence_of("This package was debianized by", "po/nl.po"), None);
        assert_eq!(licence_of("", "po/nl.po"), None);
    }

    #[test]
    fn patterns() {
        assert!(matches(b"*", b"po/nl.po") && matches(b"po/??.po", b"po/nl.po") && matches(b"p*o/*.po", b"po/nl.po"));
        assert!(!matches(b"po", b"po/nl.po") && !matches(b"", b"x") && !matches(b"lib/*", b"po/nl.po"));
        assert!(!matches(&b"*a".repeat(2000), &b"b".repeat(2000)), "ends quickly");
    }
}
