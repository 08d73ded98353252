//! Results as Markdown tables.

use std::collections::BTreeMap;

use super::ceilings::{Arithmetic, Ceilings};
use super::record::Record;

/// Whose time the others' is divided by where a case has several contenders.
const KASMINA: &str = "kasmina";

/// One section per operation, each with a table and the geometric means of its ratios.
#[must_use]
pub fn markdown(records: &[Record]) -> String {
    let mut text = String::new();
    for gpu in distinct(records.iter().map(|record| record.gpu.as_str())) {
        let of_gpu: Vec<&Record> = records.iter().filter(|record| record.gpu == gpu).collect();
        let commits = distinct(of_gpu.iter().map(|record| record.commit.as_str()));
        line(&mut text, &format!("# {gpu}, commit {}\n", commits.join(", ")));
        for operation in distinct(of_gpu.iter().map(|record| record.operation.as_str())) {
            let section: Vec<&Record> =
                of_gpu.iter().copied().filter(|record| record.operation == operation).collect();
            line(&mut text, &format!("## {operation}\n"));
            table(&mut text, &section);
            means(&mut text, &section);
        }
    }
    text
}

/// The values in the order in which they first appear.
pub(super) fn distinct<'a>(values: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = Vec::new();
    for value in values {
        if !seen.contains(&value) {
            seen.push(value);
        }
    }
    seen
}

fn line(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}

fn table(text: &mut String, section: &[&Record]) {
    let contenders = section.iter().any(|record| record.contender.is_some());
    let contender = |word: &str| if contenders { format!(" {word} |") } else { String::new() };
    line(
        text,
        &format!(
            "| case | regime |{} µs (p10–p90) | TFLOP/s | TB/s | % of roof | peer | peer µs | ratio |",
            contender("contender")
        ),
    );
    line(
        text,
        &format!("|---|---|{}---|---|---|---|---|---|---|", contender("---").replace(' ', "")),
    );
    for record in section {
        let times = &record.times;
        let spread = times
            .spread
            .map_or_else(String::new, |[p10, p90]| format!(" ({}–{})", number(p10), number(p90)));
        let none = || "–".to_owned();
        let [peer, peer_us] = match &record.peer {
            Some(peer) => [peer.name.clone(), number(peer.times.central)],
            None => [none(), none()],
        };
        line(
            text,
            &format!(
                "| {} | {} |{} {}{spread} | {} | {} | {} | {peer} | {peer_us} | {} |",
                record.case(),
                if record.regime.is_empty() { "–" } else { record.regime.as_str() },
                contender(record.contender.as_deref().unwrap_or("–")),
                number(times.central),
                record.tflops(times).map_or_else(none, number),
                record.tbps(times).map_or_else(none, number),
                optional(share_of_roof(record).map(|share| share * 100.0), 0),
                optional(record.ratio, 3),
            ),
        );
    }
    line(text, "");
}

/// How much of what the GPU can do a case reaches: the least time over the time it took.
fn share_of_roof(record: &Record) -> Option<f64> {
    let ceilings = Ceilings::of(&record.gpu)?;
    let least = ceilings.least_us(record.flops?, record.bytes?, Arithmetic::of(record));
    Some(least / record.times.central)
}

fn means(text: &mut String, section: &[&Record]) {
    let mut groups: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for record in section {
        let Some(ratio) = record.ratio else { continue };
        let peer = record.peer.as_ref().map_or("peer", |peer| peer.name.as_str());
        let contender = record.contender.as_deref().unwrap_or(KASMINA);
        let kind: Vec<&str> = [Some(&record.regime), record.identity.get("dtype")]
            .into_iter()
            .chain([record.identity.get("tier")])
            .flatten()
            .filter(|word| !word.is_empty())
            .map(String::as_str)
            .collect();
        let group = format!("{} | {contender} over {peer}", kind.join(", "));
        groups.entry(group).or_default().push(ratio);
    }
    for (contender, regime, ratios) in over_contenders(section) {
        groups.insert(format!("{regime} | {KASMINA} over {contender}"), ratios);
    }
    if groups.is_empty() {
        return;
    }
    line(text, "| regime | ratio | geometric mean | lowest | cases |\n|---|---|---|---|---|");
    for (group, ratios) in groups {
        let lowest = ratios.iter().copied().fold(f64::INFINITY, f64::min);
        let mean = geometric_mean(&ratios);
        line(text, &format!("| {group} | {mean:.3} | {lowest:.3} | {} |", ratios.len()));
    }
    line(text, "");
}

/// For every other contender and regime, its time over kasmina's in the cases that both have.
fn over_contenders<'a>(section: &[&'a Record]) -> Vec<(&'a str, &'a str, Vec<f64>)> {
    let case = |record: &Record| {
        let mut identity = record.identity.clone();
        // A contender that is not kasmina has no tier.
        identity.retain(|name, _| name != "contender" && name != "tier");
        identity
    };
    let is_kasmina = |record: &&&Record| record.contender.as_deref() == Some(KASMINA);
    let own: BTreeMap<_, f64> = section
        .iter()
        .filter(is_kasmina)
        .map(|record| (case(record), record.times.central))
        .collect();
    let mut found: Vec<(&str, &str, Vec<f64>)> = Vec::new();
    for record in section.iter().filter(|record| !is_kasmina(record)) {
        let Some((contender, own)) = record.contender.as_deref().zip(own.get(&case(record))) else {
            continue;
        };
        let ratio = record.times.central / own;
        match found.iter_mut().find(|(c, r, _)| (*c, *r) == (contender, &record.regime)) {
            Some((_, _, ratios)) => ratios.push(ratio),
            None => found.push((contender, &record.regime, vec![ratio])),
        }
    }
    found
}

/// `exp(mean of ln)`; of at least one ratio.
fn geometric_mean(ratios: &[f64]) -> f64 {
    (ratios.iter().map(|ratio| ratio.ln()).sum::<f64>() / ratios.len() as f64).exp()
}

/// Four significant digits, but no more than four decimals.
fn number(value: f64) -> String {
    let decimals = match value {
        value if value < 1.0 => 4,
        value if value < 10.0 => 3,
        value if value < 100.0 => 2,
        value if value < 1000.0 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

fn optional(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.decimals$}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perf::record::tests::product_line;

    fn records(lines: &[String]) -> Vec<Record> {
        lines.iter().map(|line| Record::parse(line).unwrap()).collect()
    }

    #[test]
    fn every_operation_has_a_section_with_the_means_of_each_regime() {
        let sum = r#"{"gpu":"NVIDIA H200","operation":"sum","len":4096,"dtype":"f32",
            "regime":"graph","median_us":2.0,"peer":{"name":"CUB","median_us":3.0},"ratio":1.5}"#;
        let text = markdown(&records(&[
            product_line("burst", 100.0, 200.0),
            product_line("burst", 100.0, 50.0).replace("\"k\":4096", "\"k\":8192"),
            product_line("steady", 100.0, 125.0),
            sum.to_owned(),
        ]));
        assert!(text.contains("## gemm\n") && text.contains("## sum\n"), "{text}");
        let burst = "| burst, bf16, hopper | kasmina over cuBLASLt 13.1.0 | 1.000 | 0.500 | 2 |";
        assert!(text.contains(burst), "{text}");
        assert!(text.contains("over cuBLASLt 13.1.0 | 1.250 | 1.250 | 1 |"), "{text}");
        assert!(text.contains("| graph, f32 | kasmina over CUB | 1.500 | 1.500 | 1 |"), "{text}");
        assert!(text.contains("| 4096 × 4096 × 4096, bf16, in-out, hopper | burst |"), "{text}");
    }

    #[test]
    fn rows_have_as_many_cells_as_their_heading() {
        let plain = product_line("burst", 180.0, 200.0);
        let named = plain.replace("\"dtype\"", "\"contender\":\"kasmina\",\"dtype\"");
        for lines in [vec![plain.clone()], vec![plain, named]] {
            let text = markdown(&records(&lines));
            let rows: Vec<&str> =
                text.lines().skip_while(|row| !row.starts_with("| case")).collect();
            let cells = |row: &str| row.matches('|').count();
            for row in rows.iter().take_while(|row| !row.is_empty()) {
                assert_eq!(cells(row), cells(rows[0]), "{row}");
            }
        }
    }

    #[test]
    fn kasmina_is_compared_with_every_other_contender() {
        let contender = |name: &str, time: f64| {
            let line = product_line("steady", time, 100.0);
            let tier = if name == KASMINA { "\"tier\":\"hopper\"" } else { "\"tier\":null" };
            line.replace("\"tier\":\"hopper\"", &format!("{tier},\"contender\":\"{name}\""))
        };
        let text = markdown(&records(&[contender(KASMINA, 80.0), contender("Triton", 100.0)]));
        assert!(text.contains("| steady | kasmina over Triton | 1.250 | 1.250 | 1 |"), "{text}");
        assert!(text.contains("| steady, bf16 | Triton over cuBLASLt 13.1.0 | 1.000 |"), "{text}");
    }

    #[test]
    fn a_case_at_the_ceiling_of_its_gpu_is_at_its_roof() {
        let time = 2.0 * 4096.0_f64.powi(3) / 832.5e12 * 1e6;
        let share = |line: &str| share_of_roof(&Record::parse(line).unwrap()).unwrap();
        assert!((share(&product_line("burst", time, 200.0)) - 1.0).abs() < 1e-9);
        // Six products of parts take six times as long.
        let six = product_line("burst", 6.0 * time, 200.0)
            .replace("\"dtype\":\"bf16\"", "\"dtype\":\"f32\",\"products\":\"six\"");
        assert!((share(&six) - 1.0).abs() < 1e-9);
    }
}
