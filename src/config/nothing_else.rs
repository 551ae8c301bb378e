//! The end of a struct that has flattened fields, for which serde cannot refuse unknown names.

use std::fmt;

use serde::de::{Error, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// As the last flattened field of a struct it gets the names that no field took, and refuses
/// them.
#[derive(Clone, Copy, Debug)]
pub(super) struct NothingElse;

impl Serialize for NothingElse {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_map(Some(0))?.end()
    }
}

impl<'de> Deserialize<'de> for NothingElse {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NoName;
        impl<'de> Visitor<'de> for NoName {
            type Value = NothingElse;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("no other name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<NothingElse, A::Error> {
                match map.next_key::<String>()? {
                    Some(name) => Err(A::Error::custom(format_args!("unknown field `{name}`"))),
                    None => Ok(NothingElse),
                }
            }
        }
        deserializer.deserialize_map(NoName)
    }
}
