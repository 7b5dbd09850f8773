//! Train, validation and test parts that share no near-duplicate: whole groups (packages, term combinations) go to one
//! part, and what still looks the same across parts leaves the larger one.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::order;
use crate::error::{Error, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    Train,
    Validation,
    Test,
}

impl Split {
    pub const ALL: [Split; 3] = [Split::Train, Split::Validation, Split::Test];

    pub const fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Validation => "validation",
            Split::Test => "test",
        }
    }
}

/// Target shares of the held-out parts; the rest trains.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fractions {
    pub validation: f64,
    pub test: f64,
}

impl Default for Fractions {
    fn default() -> Self {
        Self { validation: 0.05, test: 0.05 }
    }
}

impl Fractions {
    /// Errors unless both are finite, not negative, and leave at least half for training.
    pub fn check(self) -> Result<()> {
        for (parameter, value) in [("validation", self.validation), ("test", self.test)] {
            if !(value >= 0.0 && self.validation + self.test <= 0.5) {
                let (value, allowed) = (value.to_string(), "0 or more, together at most 0.5");
                return Err(Error::Parameter { op: "split", parameter, value, allowed });
            }
        }
        Ok(())
    }

    /// The part of one item of a large, even population, from its hash in [0, 1).
    pub fn part(self, unit: f64) -> Split {
        if unit < self.test {
            Split::Test
        } else if unit < self.test + self.validation {
            Split::Validation
        } else {
            Split::Train
        }
    }
}

/// Gives every group (name to number of rows) a part. Groups are visited in an order fixed by the seed; a held-out part takes each
/// group that still fits under its target, so one huge package never lands in a small test set. A held-out part that took
/// nothing gets the smallest group left, as long as one remains for training.
pub fn by_group(groups: &BTreeMap<String, usize>, fractions: Fractions, seed: u64) -> Result<BTreeMap<String, Split>> {
    fractions.check()?;
    let total: usize = groups.values().sum();
    let mut order: Vec<(&String, usize)> = groups.iter().map(|(name, &rows)| (name, rows)).collect();
    order.sort_by_key(|(name, _)| (order::hash_text(seed, name), *name));
    let mut parts: BTreeMap<String, Split> = BTreeMap::new();
    for (split, fraction) in [(Split::Test, fractions.test), (Split::Validation, fractions.validation)] {
        let room = (fraction * total as f64).round() as usize;
        let mut taken = 0;
        for &(name, rows) in &order {
            if rows > 0 && taken + rows <= room && !parts.contains_key(name) {
                parts.insert(name.clone(), split);
                taken += rows;
            }
        }
        let left = order.iter().filter(|(name, rows)| *rows > 0 && !parts.contains_key(*name));
        if taken == 0
            && room > 0
            && left.clone().count() >= 2
            && let Some((name, _)) = left.min_by_key(|(name, rows)| (*rows, *name))
        {
            parts.insert((*name).clone(), split);
        }
    }
    for name in groups.keys() {
        parts.entry(name.clone()).or_insert(Split::Train);
    }
    Ok(parts)
}

/// What two strings have in common when only a program name, a number, a placeholder, case or punctuation differs: letters and
/// ideographs in lower case, every run of anything else one space, digits and placeholders gone. A text without any
/// letter is its own form.
pub fn near_duplicate_form(text: &str) -> String {
    let mut form = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    let mut gap = false;
    while let Some(c) = chars.next() {
        if c == '%' {
            // A printf conversion is flags, widths and one letter; its letter is no word.
            while chars.next_if(|c| c.is_ascii_digit() || "$-+#.*lhz".contains(*c)).is_some() {}
            chars.next_if(char::is_ascii_alphabetic);
            gap = true;
        } else if c.is_alphabetic() {
            if gap && !form.is_empty() {
                form.push(' ');
            }
            gap = false;
            form.extend(c.to_lowercase());
        } else if !matches!(c, '_' | '&') {
            // Underscore and ampersand mark shortcut letters inside words ("_File", "&Open").
            gap = true;
        }
    }
    if form.is_empty() { text.to_string() } else { form }
}

/// Near-duplicate forms of the sides of already held-out pairs.
#[derive(Debug, Default)]
pub struct HeldOut {
    sources: BTreeSet<String>,
    targets: BTreeSet<String>,
}

impl HeldOut {
    pub fn insert(&mut self, source: &str, target: &str) {
        self.sources.insert(near_duplicate_form(source));
        self.targets.insert(near_duplicate_form(target));
    }

    /// The rule that a pair of a larger part breaks, if any. Both sides count, since both directions are trained.
    pub fn leak(&self, source: &str, target: &str) -> Option<&'static str> {
        if self.sources.contains(&near_duplicate_form(source)) {
            Some("source near-duplicate of a held-out pair")
        } else if self.targets.contains(&near_duplicate_form(target)) {
            Some("target near-duplicate of a held-out pair")
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(sizes: &[usize]) -> BTreeMap<String, usize> {
        sizes.iter().enumerate().map(|(i, &n)| (format!("package{i:02}"), n)).collect()
    }

    #[test]
    fn parts_come_near_their_targets_and_repeat() {
        let sizes: Vec<usize> = (1..=60).map(|i| 5000 / i).collect();
        let groups = groups(&sizes);
        let total: usize = sizes.iter().sum();
        let parts = by_group(&groups, Fractions::default(), 3).unwrap();
        assert_eq!(parts, by_group(&groups, Fractions::default(), 3).unwrap());
        assert_ne!(parts, by_group(&groups, Fractions::default(), 4).unwrap());
        for split in [Split::Validation, Split::Test] {
            let rows: usize = groups.iter().filter(|(name, _)| parts[*name] == split).map(|(_, n)| n).sum();
            let share = rows as f64 / total as f64;
            assert!((0.03..=0.05).contains(&share), "{split:?} {share}");
        }
    }

    #[test]
    fn few_or_huge_groups_still_train() {
        let parts = |sizes: &[usize]| -> Vec<Split> {
            by_group(&groups(sizes), Fractions::default(), 1).unwrap().into_values().collect()
        };
        assert_eq!(parts(&[100]), [Split::Train]);
        let three = parts(&[1000, 900, 800]);
        assert_eq!(three, [Split::Train, Split::Validation, Split::Test]);
        assert!(parts(&[]).is_empty());
    }

    #[test]
    fn fractions_are_checked() {
        for (validation, test) in [(-0.1, 0.1), (0.4, 0.2), (f64::NAN, 0.1), (0.1, f64::INFINITY)] {
            assert!(
                matches!(Fractions { validation, test }.check(), Err(Error::Parameter { .. })),
                "{validation} {test}"
            );
        }
    }

    #[test]
    fn near_duplicates() {
        let same = |a, b| near_duplicate_form(a) == near_duplicate_form(b);
        assert!(same("cannot open file '%s' (%d)", "Cannot open file: %-10s"));
        assert!(same("_Open", "&Open…"));
        assert!(same("version 15", "Version 16"));
        assert!(same("无法打开“%s”", "无法打开 %s"));
        assert!(!same("open file", "close file"));
        assert!(!same("15", "16"));
    }
}
