//! How values become bytes: integers little-endian, lists and text after their length, an enum after
//! its tag. A decoder never allocates more than the bytes that it was given.

use std::fmt;

/// Bytes that are no message: what was expected, and at which byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed {
    pub(crate) what: &'static str,
    pub(crate) at: usize,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} expected at byte {}", self.what, self.at)
    }
}

impl std::error::Error for Malformed {}

/// What has not been read of a message.
pub(crate) struct Input<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(crate) fn malformed(&self, what: &'static str) -> Malformed {
        Malformed { what, at: self.at }
    }

    fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    fn take(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let taken = self.rest().get(..count).ok_or_else(|| self.malformed(what))?;
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Malformed> {
        let taken = self.take(N, what)?;
        taken.try_into().map_err(|_| self.malformed(what))
    }

    /// Leaves what follows unread.
    pub(crate) fn skip_all(&mut self) {
        self.at = self.bytes.len();
    }

    fn length(&mut self) -> Result<usize, Malformed> {
        let length = u32::decode(self)? as usize;
        // Every element takes a byte or more.
        if length > self.rest().len() { Err(self.malformed("a length")) } else { Ok(length) }
    }
}

/// A value that is written as bytes, and read again.
pub(crate) trait Wire: Sized {
    fn encode(&self, out: &mut Vec<u8>);
    fn decode(input: &mut Input<'_>) -> Result<Self, Malformed>;

    fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.encode(&mut out);
        out
    }

    /// The value that these bytes are, all of them.
    fn from_bytes(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut input = Input::new(bytes);
        let value = Self::decode(&mut input)?;
        if input.rest().is_empty() { Ok(value) } else { Err(input.malformed("the end")) }
    }
}

macro_rules! integers {
    ($($type:ty)*) => { $(
        impl Wire for $type {
            fn encode(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
            fn decode(input: &mut Input<'_>) -> Result<Self, Malformed> {
                Ok(Self::from_le_bytes(input.array(stringify!($type))?))
            }
        }
    )* };
}

integers! { u8 u16 u32 u64 i32 i64 }

impl Wire for bool {
    fn encode(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }

    fn decode(input: &mut Input<'_>) -> Result<Self, Malformed> {
        match u8::decode(input)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(input.malformed("true or false")),
        }
    }
}

impl Wire for String {
    fn encode(&self, out: &mut Vec<u8>) {
        Bytes::from(self.as_bytes()).encode(out);
    }

    fn decode(input: &mut Input<'_>) -> Result<Self, Malformed> {
        let bytes = Bytes::decode(input)?;
        Self::from_utf8(bytes.0).map_err(|_| input.malformed("UTF-8"))
    }
}

/// Bytes in a message: a path, an argument, a name. They need not be UTF-8.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl<T: AsRef<[u8]> + ?Sized> From<&T> for Bytes {
    fn from(bytes: &T) -> Self {
        Self(bytes.as_ref().to_vec())
    }
}

impl Wire for Bytes {
    fn encode(&self, out: &mut Vec<u8>) {
        (self.0.len() as u32).encode(out);
        out.extend_from_slice(&self.0);
    }

    fn decode(input: &mut Input<'_>) -> Result<Self, Malformed> {
        let length = input.length()?;
        Ok(Self(input.take(length, "bytes")?.to_vec()))
    }
}

impl<const N: usize> Wire for [u8; N] {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }

    fn decode(input: &mut Input<'_>) -> Result<Self, Malformed> {
        input.array("bytes")
    }
}

impl<T: Wire> Wire for Option<T> {
    fn encode(&self, out: &mut Vec<u8>) {
        self.is_some().encode(out);
        if let Some(value) = self {
            value.encode(out);
        }
    }

    fn decode(input: &mut Input<'_>) -> Result<Self, Malformed> {
        bool::decode(input)?.then(|| T::decode(input)).transpose()
    }
}

impl<T: Wire> Wire for Vec<T> {
    fn encode(&self, out: &mut Vec<u8>) {
        (self.len() as u32).encode(out);
        for value in self {
            value.encode(out);
        }
    }

    fn decode(input: &mut Input<'_>) -> Result<Self, Malformed> {
        // Not reserved: a short message could ask for many large values.
        (0..input.length()?).map(|_| T::decode(input)).collect()
    }
}

impl<A: Wire, B: Wire> Wire for (A, B) {
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
        self.1.encode(out);
    }

    fn decode(input: &mut Input<'_>) -> Result<Self, Malformed> {
        Ok((A::decode(input)?, B::decode(input)?))
    }
}

/// A struct or an enum that is written field by field; an enum's variants have their tags named.
macro_rules! wire {
    () => {};
    ($(#[$meta:meta])* struct $name:ident { $($(#[$doc:meta])* $field:ident: $type:ty,)* } $($more:tt)*) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub(crate) struct $name { $($(#[$doc])* pub(crate) $field: $type,)* }

        impl Wire for $name {
            fn encode(&self, out: &mut Vec<u8>) {
                $(self.$field.encode(out);)*
            }
            fn decode(input: &mut Input<'_>) -> Result<Self, Malformed> {
                Ok(Self { $($field: Wire::decode(input)?,)* })
            }
        }
        wire! { $($more)* }
    };
    ($(#[$meta:meta])* enum $name:ident { $($(#[$doc:meta])* $tag:literal => $variant:ident $(($type:ty))?,)* } $($more:tt)*) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub(crate) enum $name { $($(#[$doc])* $variant $(($type))?,)* }

        impl Wire for $name {
            fn encode(&self, out: &mut Vec<u8>) {
                match self {
                    $(wire!(@pattern $variant value $($type)?) => {
                        out.push($tag);
                        wire!(@encode out value $($type)?);
                    })*
                }
            }
            fn decode(input: &mut Input<'_>) -> Result<Self, Malformed> {
                match u8::decode(input)? {
                    $($tag => wire!(@decode input $variant $($type)?),)*
                    _ => Err(input.malformed(concat!("a ", stringify!($name)))),
                }
            }
        }
        wire! { $($more)* }
    };
    (@pattern $variant:ident $value:ident $type:ty) => { Self::$variant($value) };
    (@pattern $variant:ident $value:ident) => { Self::$variant };
    (@encode $out:ident $value:ident $type:ty) => { $value.encode($out) };
    (@encode $out:ident $value:ident) => {};
    (@decode $input:ident $variant:ident $type:ty) => { Ok(Self::$variant(<$type>::decode($input)?)) };
    (@decode $input:ident $variant:ident) => { Ok(Self::$variant) };
}

pub(super) use wire;
