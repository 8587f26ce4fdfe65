//! Kubernetes quantities as whole numbers of thousandths, so that sums and comparisons are exact.
//!
//! Grammar: `k8s.io/apimachinery/pkg/api/resource`, the doc of `Quantity`: a decimal number and one of the suffixes
//! `n u m k M G T P E`, `Ki Mi Gi Ti Pi Ei`, or an exponent `e3`, `E3`.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Text that is no quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no quantity that can be counted; write for example 500m, 2 or 512Mi")]
pub struct NotAQuantity {
    text: String,
}

/// The thousandths of a quantity, rounded up: 500m is 500, 1Ki is 1,024,000. Negative amounts are refused, since
/// nobody can ask for or have less than nothing.
pub fn milli(quantity: &Quantity) -> Result<i128, NotAQuantity> {
    parse(&quantity.0).ok_or_else(|| NotAQuantity { text: quantity.0.chars().take(64).collect() })
}

/// The whole units of a quantity, rounded up: bytes of memory, numbers of bots.
pub fn units(quantity: &Quantity) -> Result<i128, NotAQuantity> {
    milli(quantity).map(|m| m.div_euclid(1000) + i128::from(m.rem_euclid(1000) > 0))
}

fn parse(text: &str) -> Option<i128> {
    let text = text.strip_prefix('+').unwrap_or(text);
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    // 18 digits each keep every product below within i128.
    if whole.is_empty() && fraction.is_empty() || whole.len() > 18 || fraction.len() > 18 || fraction.contains('.') {
        return None;
    }
    let digits: i128 = format!("0{whole}{fraction}").parse().ok()?;
    let (multiplier, mut divisor) = scale(suffix)?;
    divisor = divisor.checked_mul(10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?)?;
    let numerator = digits.checked_mul(multiplier)?.checked_mul(1000)?;
    Some(numerator / divisor + i128::from(numerator % divisor > 0))
}

/// What a suffix multiplies and divides by.
fn scale(suffix: &str) -> Option<(i128, i128)> {
    let binary = |power: u32| Some((1024_i128.pow(power), 1));
    let decimal = |power: u32| Some((10_i128.pow(power), 1));
    match suffix {
        "n" => Some((1, 1_000_000_000)),
        "u" => Some((1, 1_000_000)),
        "m" => Some((1, 1000)),
        "" => Some((1, 1)),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10_i128.pow(exponent.unsigned_abs().min(19));
            match exponent {
                -18..0 => Some((1, power)),
                0..=18 => Some((power, 1)),
                _ => None,
            }
        }
    }
}

/// Thousandths of a processor for people: `500m`, `2`.
pub fn show_cpu(milli: i128) -> String {
    if milli % 1000 == 0 { (milli / 1000).to_string() } else { format!("{milli}m") }
}

/// Bytes for people, exact where a unit divides them, else mebibytes rounded down (`up`: rounded up).
pub fn show_bytes(bytes: i128, up: bool) -> String {
    const KI: i128 = 1 << 10;
    const MI: i128 = 1 << 20;
    const GI: i128 = 1 << 30;
    match bytes {
        0 => "0".to_owned(),
        b if b % GI == 0 => format!("{}Gi", b / GI),
        b if b % MI == 0 => format!("{}Mi", b / MI),
        b if b.abs() >= 16 * MI => format!("{}Mi", b.div_euclid(MI) + i128::from(up)),
        b if b % KI == 0 => format!("{}Ki", b / KI),
        b => b.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_count_what_kubernetes_counts() {
        for (text, wanted) in [
            ("0", Some(0)),
            ("1", Some(1000)),
            ("500m", Some(500)),
            ("0.5", Some(500)),
            (".5", Some(500)),
            ("5.", Some(5000)),
            ("1n", Some(1)), // rounded up, as Quantity.MilliValue does
            ("1500u", Some(2)),
            ("1k", Some(1_000_000)),
            ("1Ki", Some(1_024_000)),
            ("1.5Gi", Some(1_610_612_736_000)),
            ("1e3", Some(1_000_000)),
            ("1E3", Some(1_000_000)),
            ("1E", Some(10_i128.pow(21))),
            ("12e-1", Some(1200)),
            ("1Ei", Some(1024_i128.pow(6) * 1000)),
            ("", None),
            (".", None),
            ("1.2.3", None),
            ("-1", None),
            ("1 Gi", None),
            ("1gi", None),
            ("Gi", None),
            ("1e99", None),
            ("1e-99", None),
            ("1234567890123456789012345678901234567890", None),
        ] {
            assert_eq!(milli(&Quantity(text.to_owned())).ok(), wanted, "{text:?}");
        }
        assert_eq!(units(&Quantity("1500m".to_owned())).unwrap(), 2);
    }

    #[test]
    fn amounts_read_as_people_write_them() {
        assert_eq!(show_cpu(2000), "2");
        assert_eq!(show_cpu(2500), "2500m");
        assert_eq!(show_bytes(2 << 30, false), "2Gi");
        assert_eq!(show_bytes(512 << 20, false), "512Mi");
        assert_eq!(show_bytes((512 << 20) + 1, false), "512Mi");
        assert_eq!(show_bytes((512 << 20) + 1, true), "513Mi");
        assert_eq!(show_bytes(1025, false), "1025");
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "[-+0-9.eEnumkMGTPKi ]{0,40}") {
            let _ = milli(&Quantity(text));
        }
    }
}
