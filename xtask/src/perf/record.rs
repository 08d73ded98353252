//! One measured case, read from a JSON line of any bench.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use kasmina_kernels::abi::DType;
use serde_json::{Map, Value};

/// Says on what a case was measured.
const PROVENANCE: [&str; 5] = ["commit", "ptx_digest", "gpu", "driver", "cuda"];
/// Says what a measurement gave, beside the fields whose names end in a unit.
const MEASUREMENT: [&str; 11] = [
    "samples",
    "tflops",
    "tbps",
    "flops",
    "bytes",
    "max_error",
    "difference",
    "peer",
    "ratio",
    "details",
    "foreign",
];
/// Ends of names of measured fields.
const MEASURED_UNITS: [&str; 4] = ["_us", "_per_s", "_mhz", "_error"];

/// What one side took.
#[derive(Clone, Debug, PartialEq)]
pub struct Times {
    /// Number of samples behind the quantiles; 1 where it is not told.
    pub samples: f64,
    /// Microseconds that stand for the case: the mean in the steady regime, else the median.
    pub central: f64,
    /// A tenth and nine tenths of the samples took no longer; `None` where they are not told.
    pub spread: Option<[f64; 2]>,
}

impl Times {
    fn read(fields: &Map<String, Value>, regime: &str) -> Option<Self> {
        let number = |name| fields.get(name).and_then(Value::as_f64);
        let median = number("median_us").or_else(|| number("p50_us"));
        let central = if regime == "steady" { number("mean_us").or(median) } else { median }?;
        let spread = number("p10_us").zip(number("p90_us")).map(|(p10, p90)| [p10, p90]);
        Some(Self { samples: number("samples").unwrap_or(1.0), central, spread })
    }
}

/// The other side of a comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Peer {
    /// Name and version.
    pub name: String,
    /// What it took.
    pub times: Times,
}

/// One measured case.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Name of the GPU.
    pub gpu: String,
    /// The commit that was measured.
    pub commit: String,
    /// What is computed.
    pub operation: String,
    /// How calls follow each other; empty where the bench knows but one way.
    pub regime: String,
    /// Whose implementation was measured, where the bench tells.
    pub contender: Option<String>,
    /// The contender is not kasmina.
    pub foreign: bool,
    /// What tells this case from others: every field but those of provenance and measurement.
    pub identity: BTreeMap<String, String>,
    /// What it took.
    pub times: Times,
    /// What the peer took.
    pub peer: Option<Peer>,
    /// The peer's time over ours.
    pub ratio: Option<f64>,
    /// Operations of one call.
    pub flops: Option<f64>,
    /// Bytes that one call moves at least.
    pub bytes: Option<f64>,
}

impl Record {
    /// Every record of a file of JSON Lines.
    ///
    /// # Errors
    /// A file that cannot be read, and the number of a line that is no record.
    pub fn read(file: &Path) -> Result<Vec<Self>> {
        let name = || file.display().to_string();
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", name()))?;
        let lines = read_lines(&text).with_context(name)?;
        Ok(lines.into_iter().map(|(_, record)| record).collect())
    }

    /// The record in a JSON line.
    ///
    /// # Errors
    /// What is missing: an object, `gpu`, or a time.
    pub fn parse(line: &str) -> Result<Self> {
        let fields: Map<String, Value> = serde_json::from_str(line).context("not a JSON object")?;
        let text = |name: &str| fields.get(name).and_then(Value::as_str).map(str::to_owned);
        let number = |name: &str| fields.get(name).and_then(Value::as_f64);

        let gpu = text("gpu").context("no field `gpu`")?;
        let regime = text("regime").unwrap_or_default();
        let operation = text("operation").unwrap_or_else(|| {
            if product(&fields).is_some() { "gemm".to_owned() } else { "other".to_owned() }
        });
        let times = Times::read(&fields, &regime)
            .context("no time: `median_us`, `p50_us`, or in the steady regime `mean_us`")?;
        let peer = fields.get("peer").and_then(Value::as_object).and_then(|peer| {
            let name = peer.get("name")?.as_str()?.to_owned();
            Some(Peer { name, times: Times::read(peer, &regime)? })
        });
        let ratio = number("ratio")
            .or_else(|| peer.as_ref().map(|peer| peer.times.central / times.central));
        let mut identity: BTreeMap<String, String> = fields
            .iter()
            .filter(|(name, value)| is_identity(name) && !value.is_null())
            .map(|(name, value)| (name.clone(), shown(value)))
            .collect();
        identity.insert("operation".to_owned(), operation.clone());
        Ok(Self {
            gpu,
            commit: text("commit").unwrap_or_else(|| "unknown".to_owned()),
            contender: text("contender"),
            foreign: fields.get("foreign").and_then(Value::as_bool).unwrap_or(false),
            flops: number("flops").or_else(|| derived_flops(&fields)),
            bytes: number("bytes").or_else(|| derived_bytes(&fields)),
            operation,
            regime,
            identity,
            times,
            peer,
            ratio,
        })
    }

    /// What records of one case on one GPU model have in common, and no others.
    #[must_use]
    pub fn key(&self) -> (String, BTreeMap<String, String>) {
        (self.gpu.clone(), self.identity.clone())
    }

    /// The case in words, without what heads its table.
    #[must_use]
    pub fn case(&self) -> String {
        let mut words = Vec::new();
        let extents: Vec<&str> = ["m", "n", "k"]
            .iter()
            .filter_map(|name| Some(self.identity.get(*name)?.as_str()))
            .collect();
        if extents.len() == 3 {
            words.push(extents.join(" × "));
        }
        for (name, value) in &self.identity {
            match name.as_str() {
                "operation" | "regime" | "contender" => {}
                "m" | "n" | "k" if extents.len() == 3 => {}
                "dtype" | "tier" | "layout" | "activation" | "case" => words.push(value.clone()),
                "len" => words.push(length(value)),
                _ => words.push(format!("{name} {value}")),
            }
        }
        words.join(", ")
    }

    /// Operations per second in 10¹².
    #[must_use]
    pub fn tflops(&self, times: &Times) -> Option<f64> {
        self.flops.map(|flops| flops / times.central * 1e-6)
    }

    /// Bytes per second in 10¹².
    #[must_use]
    pub fn tbps(&self, times: &Times) -> Option<f64> {
        self.bytes.map(|bytes| bytes / times.central * 1e-6)
    }
}

/// The lines of a text of JSON Lines, each with its record.
///
/// # Errors
/// The number of a line that is no record.
pub fn read_lines(text: &str) -> Result<Vec<(&str, Record)>> {
    let lines = text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty());
    lines
        .map(|(line, number)| {
            let record = Record::parse(line).with_context(|| format!("line {number}"))?;
            Ok((line, record))
        })
        .collect()
}

/// The last record of each case, in the order in which the cases first appear.
#[must_use]
pub fn latest(records: Vec<Record>) -> Vec<Record> {
    let mut places = BTreeMap::new();
    let mut kept: Vec<Record> = Vec::new();
    for record in records {
        let key = record.key();
        if let Some(&place) = places.get(&key) {
            kept[place] = record;
        } else {
            places.insert(key, kept.len());
            kept.push(record);
        }
    }
    kept
}

fn is_identity(name: &str) -> bool {
    !PROVENANCE.contains(&name)
        && !MEASUREMENT.contains(&name)
        && !MEASURED_UNITS.iter().any(|unit| name.ends_with(unit))
}

/// A value as it stands in a table: strings without quotes.
fn shown(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn length(text: &str) -> String {
    match text.parse::<u64>() {
        Ok(len) if len.is_power_of_two() => format!("2^{} elements", len.ilog2()),
        _ => format!("{text} elements"),
    }
}

/// The extents of a matrix product.
fn product(fields: &Map<String, Value>) -> Option<[f64; 3]> {
    let extent = |name| fields.get(name).and_then(Value::as_f64);
    Some([extent("m")?, extent("n")?, extent("k")?])
}

/// A product multiplies and adds m·n·k times; of a reduction, one operation per element counts.
fn derived_flops(fields: &Map<String, Value>) -> Option<f64> {
    match product(fields) {
        Some([m, n, k]) => Some(2.0 * m * n * k),
        None => fields.get("len").and_then(Value::as_f64),
    }
}

/// Each matrix, or each element of a reduction, is read or written once.
fn derived_bytes(fields: &Map<String, Value>) -> Option<f64> {
    let dtype: DType = fields.get("dtype")?.as_str()?.parse().ok()?;
    let size = dtype.size() as f64;
    match product(fields) {
        Some([m, n, k]) => Some((m * k + k * n + m * n) * size),
        None => fields.get("len").and_then(Value::as_f64).map(|len| len * size),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A product of 4096³ in bf16 that took `ours` with the peer taking `theirs`, both ±1 %.
    pub(crate) fn product_line(regime: &str, ours: f64, theirs: f64) -> String {
        let times = |time: f64| {
            format!(
                r#""samples":60,"median_us":{time},"p10_us":{},"p90_us":{},"mean_us":{time}"#,
                time * 0.99,
                time * 1.01
            )
        };
        format!(
            r#"{{"commit":"abc","gpu":"NVIDIA H200","cuda":"13.0","m":4096,"n":4096,"k":4096,
            "dtype":"bf16","layout":"in-out","tier":"hopper","regime":"{regime}",{},"tflops":1.0,
            "peer":{{"name":"cuBLASLt 13.1.0",{}}},"ratio":{}}}"#,
            times(ours),
            times(theirs),
            theirs / ours
        )
        .replace('\n', " ")
    }

    #[test]
    fn identity_is_what_is_neither_provenance_nor_measurement() {
        let record = Record::parse(&product_line("burst", 180.0, 200.0)).unwrap();
        let names: Vec<&str> = record.identity.keys().map(String::as_str).collect();
        assert_eq!(names, ["dtype", "k", "layout", "m", "n", "operation", "regime", "tier"]);
        let later =
            product_line("burst", 190.0, 210.0).replace("abc", "def").replace("13.0", "13.1");
        assert_eq!(Record::parse(&later).unwrap().identity, record.identity);
        let other = Record::parse(&product_line("steady", 180.0, 200.0)).unwrap();
        assert_ne!(other.identity, record.identity);
    }

    #[test]
    fn records_that_differ_in_what_was_measured_are_one_case() {
        let line = |median: f64, difference: &str| {
            format!(
                r#"{{"gpu":"G","operation":"conv1d dgrad","batch":16,"layout":"ncl","regime":"burst",
                "median_us":{median},"tflops":{median},"max_error":{median},
                "details":{{"x":{median}}},"peer":null,"difference":{difference}}}"#
            )
        };
        let [first, second, without] = [(36.0, "0.0002"), (37.0, "0.00021"), (38.0, "null")]
            .map(|(median, difference)| Record::parse(&line(median, difference)).unwrap());
        assert_eq!(first.identity, second.identity);
        assert_eq!(first.identity, without.identity);
        assert_eq!(first.case(), "batch 16, ncl");
    }

    #[test]
    fn a_field_of_a_bench_unknown_here_tells_cases_apart() {
        let line = r#"{"gpu":"G","operation":"conv1d dgrad","shape":[32,256,4096],"stride":1,
            "regime":"graph","median_us":76.0,"p99_us":80.0,"items_per_s":3,"flops":6e9,"bytes":2e8}"#;
        let record = Record::parse(line).unwrap();
        assert_eq!(record.identity["shape"], "[32,256,4096]");
        assert!(!record.identity.contains_key("p99_us"));
        assert!(!record.identity.contains_key("items_per_s"));
        assert_eq!(record.case(), "shape [32,256,4096], stride 1");
        assert_eq!((record.flops, record.bytes), (Some(6e9), Some(2e8)));
        assert_eq!(record.ratio, None);
    }

    #[test]
    fn operations_and_bytes_follow_from_extents() {
        let record = Record::parse(&product_line("burst", 180.0, 200.0)).unwrap();
        assert_eq!(record.flops, Some(2.0 * 4096.0_f64.powi(3)));
        assert_eq!(record.bytes, Some(3.0 * 4096.0_f64.powi(2) * 2.0));
        let line = r#"{"gpu":"G","operation":"sum","len":1024,"dtype":"f32","median_us":2.0}"#;
        let record = Record::parse(line).unwrap();
        assert_eq!((record.flops, record.bytes), (Some(1024.0), Some(4096.0)));
        assert_eq!(record.case(), "f32, 2^10 elements");
    }

    #[test]
    fn the_time_of_a_case_depends_on_its_regime() {
        let line = |regime: &str| {
            format!(r#"{{"gpu":"G","regime":"{regime}","median_us":2.0,"mean_us":3.0}}"#)
        };
        assert_eq!(Record::parse(&line("steady")).unwrap().times.central, 3.0);
        assert_eq!(Record::parse(&line("burst")).unwrap().times.central, 2.0);
        let latency =
            r#"{"gpu":"G","case":"echo","contender":"persistent","p50_us":2.7,"p99_us":3}"#;
        let record = Record::parse(latency).unwrap();
        assert_eq!((record.times.central, record.times.spread), (2.7, None));
        assert_eq!((record.operation.as_str(), record.case().as_str()), ("other", "echo"));
    }

    #[test]
    fn a_line_that_is_no_record_says_what_is_missing() {
        let message = |line: &str| format!("{:#}", Record::parse(line).unwrap_err());
        assert!(message("[]").contains("JSON object"));
        assert!(message(r#"{"median_us":1}"#).contains("`gpu`"));
        assert!(message(r#"{"gpu":"G"}"#).contains("median_us"));
    }

    #[test]
    fn the_last_of_several_measurements_of_a_case_counts() {
        let records = [("burst", 1.0), ("steady", 2.0), ("burst", 3.0)]
            .map(|(regime, time)| Record::parse(&product_line(regime, time, 1.0)).unwrap());
        let kept = latest(records.to_vec());
        assert_eq!(kept.iter().map(|record| record.times.central).collect::<Vec<_>>(), [3.0, 2.0]);
    }
}
