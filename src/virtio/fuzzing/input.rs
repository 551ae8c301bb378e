//! The fuzzer's bytes, taken from the front. Behind their end come zeros.

use super::ram::RAM;

pub(super) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Up to so many bytes.
    pub(super) fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.bytes(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    pub(super) fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// An address: often inside RAM, sometimes near the end of a region, sometimes any.
    pub(super) fn address(&mut self) -> u64 {
        let kind = self.byte();
        match kind {
            0 => self.u64(),
            1..=15 => {
                let (start, len) = RAM[usize::from(kind) % RAM.len()];
                start.wrapping_add(len as u64).wrapping_sub(u64::from(self.byte()))
            }
            _ => u64::from(self.u16()),
        }
    }

    /// A length: often small, sometimes any.
    pub(super) fn len(&mut self) -> u32 {
        match self.byte() {
            0 => self.u32(),
            1..=15 => self.u16().into(),
            len => len.into(),
        }
    }
}
