//! Kubernetes quantities (`100m`, `1.5Gi`, `2e3`) as exact numbers.
//!
//! Source: <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>. Like there, what is finer
//! than a billionth is rounded up.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// A quantity, in billionths of its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Amount(i128);

const NANOS: i128 = 1_000_000_000;

impl Amount {
    /// Parses a quantity; `None` for text that is none, or whose number does not fit.
    pub fn parse(quantity: &Quantity) -> Option<Self> {
        let text = quantity.0.as_str();
        let (negative, text) = match text.as_bytes().first()? {
            b'-' => (true, &text[1..]),
            b'+' => (false, &text[1..]),
            _ => (false, text),
        };
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, suffix) = text.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || fraction.contains('.') || number.len() > 40 {
            return None;
        }
        // 40 digits may overflow, which the parser tells.
        let digits: i128 = format!("0{whole}{fraction}").parse().ok()?;
        let (factor, exponent) = suffix_of(suffix)?;
        let scaled = digits.checked_mul(factor)?;
        let exponent = 9 + exponent - i32::try_from(fraction.len()).ok()?;
        let power = 10_i128.checked_pow(exponent.unsigned_abs());
        let nanos = match (exponent >= 0, power) {
            (true, Some(power)) => scaled.checked_mul(power)?,
            (true, None) => (scaled == 0).then_some(0)?,
            // Rounded up, away from zero: a limit of a trillionth is not "no limit".
            (false, Some(power)) => scaled / power + i128::from(scaled % power != 0),
            (false, None) => i128::from(scaled != 0),
        };
        Some(Self(if negative { -nanos } else { nanos }))
    }

    /// Whole units, rounded up; `None` when that does not fit.
    pub fn units(self) -> Option<i64> {
        i64::try_from(div_ceil(self.0, NANOS)).ok()
    }

    /// Thousandths, rounded up; `None` when that does not fit.
    pub fn millis(self) -> Option<i64> {
        i64::try_from(div_ceil(self.0, NANOS / 1000)).ok()
    }

    /// How often `divisor` goes into this, rounded up; `None` when it is not positive or the result does not fit.
    pub fn divided_by(self, divisor: Amount) -> Option<i64> {
        (divisor.0 > 0).then(|| i64::try_from(div_ceil(self.0, divisor.0)).ok()).flatten()
    }
}

fn div_ceil(a: i128, b: i128) -> i128 {
    a.div_euclid(b) + i128::from(a.rem_euclid(b) != 0)
}

/// Factor and power of ten of a suffix.
fn suffix_of(suffix: &str) -> Option<(i128, i32)> {
    Some(match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            (1, (-64..=64).contains(&exponent).then_some(exponent)?)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn amount(text: &str) -> Option<Amount> {
        Amount::parse(&Quantity(text.to_owned()))
    }

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, units, millis) in [
            ("0", 0, 0),
            ("1", 1, 1000),
            ("+1", 1, 1000),
            ("-1", -1, -1000),
            ("100m", 1, 100),
            ("1.5", 2, 1500),
            (".5", 1, 500),
            ("5.", 5, 5000),
            ("1n", 1, 1),
            ("0.0000000001", 1, 1),
            ("1u", 1, 1),
            ("2k", 2000, 2_000_000),
            ("1e3", 1000, 1_000_000),
            ("1E3", 1000, 1_000_000),
            ("1E", 1_000_000_000_000_000_000, i64::MAX),
            ("1e-3", 1, 1),
            ("1Ki", 1024, 1_024_000),
            ("1.5Gi", 1_610_612_736, 1_610_612_736_000),
            ("512Mi", 536_870_912, 536_870_912_000),
            ("0e64", 0, 0),
        ] {
            let parsed = amount(text).unwrap_or_else(|| panic!("{text:?} was refused"));
            assert_eq!(parsed.units(), Some(units), "{text}");
            if millis != i64::MAX {
                assert_eq!(parsed.millis(), Some(millis), "{text}");
            }
        }
    }

    #[test]
    fn what_is_no_quantity_is_refused() {
        for text in ["", "-", "m", ".", "1.2.3", "1mi", "1 Gi", "0x10", "1e", "1e99", "١", "1Zi", "--1", "1e+-3"] {
            assert_eq!(amount(text), None, "{text:?} was taken");
        }
        assert_eq!(amount(&"9".repeat(60)), None);
        assert_eq!(amount("100Ei").and_then(Amount::units), None, "too large for 64 bits");
    }

    #[test]
    fn a_divisor_rounds_up() {
        let million = amount("1M").unwrap();
        assert_eq!(amount("1Mi").unwrap().divided_by(million), Some(2));
        assert_eq!(amount("1M").unwrap().divided_by(million), Some(1));
        assert_eq!(amount("1").unwrap().divided_by(amount("0").unwrap()), None);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,50}") {
            let _ = amount(&text).map(|a| (a.units(), a.millis(), a.divided_by(a)));
        }

        #[test]
        fn thousandths_are_a_thousand_times_units(n in 0_i64..1 << 40) {
            prop_assert_eq!(amount(&n.to_string()).unwrap().millis(), Some(n * 1000));
            prop_assert_eq!(amount(&format!("{n}m")).unwrap().millis(), Some(n));
        }
    }
}
