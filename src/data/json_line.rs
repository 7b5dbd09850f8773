//! One line of a JSON-lines table: an object of which two text fields are read.

use std::fmt;

use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::Pair;
use super::table::BadRow;

/// Parses `{"<source>": "...", "<target>": "...", ...}`; other fields are skipped, whatever they hold.
pub(super) fn parse(line: &str, source: &str, target: &str) -> Result<Pair, BadRow> {
    let mut json = serde_json::Deserializer::from_str(line);
    let located = |e: serde_json::Error| BadRow::at(e.column().saturating_sub(1), "not JSON").detail(e);
    let fields = Fields { source, target }.deserialize(&mut json).map_err(|e| match e.to_string() {
        // serde_json keeps the last of doubled keys without a word; the visitor below does not.
        message if message.starts_with(DOUBLED) => BadRow::at(e.column().saturating_sub(1), DOUBLED),
        _ => located(e),
    })?;
    json.end().map_err(located)?;
    let side = |name: &str, value: Option<Value>| match value {
        None => Err(BadRow::in_field(name, "missing field")),
        Some(Value::String(text)) if text.trim().is_empty() => Err(BadRow::in_field(name, "empty side")),
        // Escapes can bring back what the raw line may not hold.
        Some(Value::String(text)) if text.contains(['\0', '\u{feff}']) => {
            Err(BadRow::in_field(name, "NUL or byte-order mark"))
        }
        Some(Value::String(text)) => Ok(text.trim().to_string()),
        Some(_) => Err(BadRow::in_field(name, "field is not text")),
    };
    Ok(Pair { source: side(source, fields.0)?, target: side(target, fields.1)? })
}

const DOUBLED: &str = "field given twice";

struct Fields<'a> {
    source: &'a str,
    target: &'a str,
}

type Found = (Option<Value>, Option<Value>);

impl<'de> DeserializeSeed<'de> for Fields<'_> {
    type Value = Found;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Found, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object with text fields")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found, A::Error> {
        let mut found = (None, None);
        while let Some(key) = map.next_key::<String>()? {
            let slot = match key {
                key if key == self.source => &mut found.0,
                key if key == self.target => &mut found.1,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            if slot.replace(map.next_value()?).is_some() {
                return Err(A::Error::custom(DOUBLED));
            }
        }
        Ok(found)
    }
}
