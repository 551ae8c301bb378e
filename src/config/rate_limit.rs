//! How fast a device may be.

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// How many bytes and operations a device may do in a second, and how many at once. What is not
/// set is not limited.
///
/// A device that rested may do its whole burst at once, and goes on at its rate. One request
/// that is larger than the burst passes when the device has rested long enough for a full burst,
/// and those behind it wait until it is paid for.
///
/// ```
/// use dormouse::RateLimit;
///
/// // 100 MiB/s and 1,000 requests/s, of which 50 may come at once.
/// let limit = RateLimit::default()
///     .bytes_per_second(100 << 20)
///     .operations_per_second(1000)
///     .burst_operations(50);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RateLimit {
    pub(crate) bytes_per_second: Option<u64>,
    pub(crate) burst_bytes: Option<u64>,
    pub(crate) operations_per_second: Option<u64>,
    pub(crate) burst_operations: Option<u64>,
}

impl RateLimit {
    pub(crate) fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }

    /// Bytes in a second, 1 or more.
    #[must_use]
    pub fn bytes_per_second(mut self, rate: u64) -> Self {
        self.bytes_per_second = Some(rate);
        self
    }

    /// Bytes at once, 1 or more; as many as come in a second unless set.
    #[must_use]
    pub fn burst_bytes(mut self, burst: u64) -> Self {
        self.burst_bytes = Some(burst);
        self
    }

    /// Requests in a second, 1 or more.
    #[must_use]
    pub fn operations_per_second(mut self, rate: u64) -> Self {
        self.operations_per_second = Some(rate);
        self
    }

    /// Requests at once, 1 or more; as many as come in a second unless set.
    #[must_use]
    pub fn burst_operations(mut self, burst: u64) -> Self {
        self.burst_operations = Some(burst);
        self
    }

    /// Refuses a rate of nothing, which no request would ever pass, and a burst without a rate.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let bytes = (self.bytes_per_second, self.burst_bytes);
        let operations = (self.operations_per_second, self.burst_operations);
        for bucket in [bytes, operations] {
            match bucket {
                (Some(0), _) | (_, Some(0)) => return Err(ConfigError::RateOfNothing),
                (None, Some(burst)) => return Err(ConfigError::BurstWithoutRate { burst }),
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_of_nothing_and_a_burst_without_a_rate_are_refused() {
        let limit = RateLimit::default();
        for bad in [
            limit.bytes_per_second(0),
            limit.operations_per_second(0),
            limit.bytes_per_second(1).burst_bytes(0),
            limit.burst_bytes(1),
            limit.bytes_per_second(1).burst_operations(1),
        ] {
            bad.check().unwrap_err();
        }
        limit.check().unwrap();
        limit.bytes_per_second(u64::MAX).burst_bytes(u64::MAX).check().unwrap();
    }

    #[test]
    fn what_is_not_written_is_not_limited() {
        let limit: RateLimit = serde_json::from_str(r#"{"bytes_per_second": 7}"#).unwrap();
        assert_eq!(limit, RateLimit::default().bytes_per_second(7));
    }
}
