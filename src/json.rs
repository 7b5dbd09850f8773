//! Reading JSON files, with errors that say where.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// What editors on some systems put before UTF-8 text.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// One value and nothing behind it. `path` is named in errors.
///
/// # Errors
/// `File` with the key that is wrong, or the line where no key is.
pub fn read<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    let mut reader = serde_json::Deserializer::from_slice(bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes));
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|e| {
        let (key, line) = (e.path().to_string(), e.inner().line());
        Error::file(path, if key == "." { format!("line {line}") } else { key }, e.inner())
    })?;
    reader.end().map_err(|e| Error::file(path, format!("line {}", e.line()), e))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_are_placed_and_a_byte_order_mark_is_none() {
        let numbers =
            |text: &str| read::<std::collections::BTreeMap<String, u8>>(Path::new("numbers.json"), text.as_bytes());
        assert_eq!(numbers("\u{feff}{\"a\": 1}").unwrap()["a"], 1);
        for (text, place) in [("{\"a\": 300}", "a"), ("\n[1]", "line 2"), ("", "line 1"), ("{\"a\": 1}\n\n}", "line 3")]
        {
            let Err(Error::File { position, .. }) = numbers(text) else { panic!("{text} is read") };
            assert_eq!(position, place, "{text}");
        }
    }
}
