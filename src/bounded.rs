//! Lists that come from files: no longer than what reads them has a use for.
//!
//! An entry takes a byte or two of a file where most of it is left out, and hundreds in memory: a file that is bounded
//! bounds no list. Maps have keys that differ, which take more of it.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// More than there may be of anything that a VM has several of.
pub(crate) const MOST_IN_LIST: usize = 1024;
/// As many arguments as a program may be given: their bytes are bounded.
const MOST_WORDS: usize = 1 << 17;

/// Of parts of a VM, for `#[serde(deserialize_with)]`.
pub(crate) fn list<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    deserializer.deserialize_seq(List { most: MOST_IN_LIST, entry: PhantomData })
}

/// Likewise of the words of a command.
pub(crate) fn words<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    deserializer.deserialize_seq(List { most: MOST_WORDS, entry: PhantomData })
}

struct List<T> {
    most: usize,
    entry: PhantomData<T>,
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of up to {} entries", self.most)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Vec<T>, A::Error> {
        let mut list = Vec::new();
        while let Some(entry) = entries.next_element()? {
            if list.len() == self.most {
                return Err(A::Error::invalid_length(self.most + 1, &self));
            }
            list.push(entry);
        }
        Ok(list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_ends_where_nothing_has_as_many() {
        #[derive(Debug, serde::Deserialize)]
        struct Lists {
            #[serde(default, deserialize_with = "list")]
            parts: Vec<u8>,
            #[serde(default, deserialize_with = "words")]
            argv: Vec<String>,
        }
        let read = |text: String| serde_json::from_str::<Lists>(&text);
        let parts = |count| read(format!(r#"{{"parts": {:?}}}"#, vec![7; count]));
        assert_eq!(parts(MOST_IN_LIST).unwrap().parts, [7; MOST_IN_LIST]);
        let error = parts(MOST_IN_LIST + 1).unwrap_err().to_string();
        assert!(error.contains("invalid length 1025, expected a list of up to 1024"), "{error}");
        let argv = |count| read(format!(r#"{{"argv": {:?}}}"#, vec!["x"; count]));
        assert_eq!(argv(MOST_WORDS).unwrap().argv.len(), MOST_WORDS);
        argv(MOST_WORDS + 1).unwrap_err();
        assert!(read("{}".into()).unwrap().parts.is_empty());
        assert!(read(r#"{"parts": 7}"#.into()).unwrap_err().to_string().contains("a list"));
    }
}
