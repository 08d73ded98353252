//! Results under the roofline of their GPU, as an SVG.
//!
//! Rate over arithmetic intensity, both logarithmic. A case is a filled disc, its peer a ring at the
//! same intensity; both tell their figures when pointed at. Ceilings are those of
//! [`CEILINGS`](super::ceilings::CEILINGS).

use std::fmt::Write as _;

use super::ceilings::{Arithmetic, Ceilings};
use super::record::Record;
use super::report::distinct;

const WIDTH: f64 = 1080.0;
const HEIGHT: f64 = 680.0;
/// The plot's edges: left, top, right, bottom.
const FRAME: [f64; 4] = [84.0, 64.0, 812.0, 604.0];
/// Told apart by people who do not see all colours (Okabe and Ito).
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933"];

/// Keeps text readable on lines and marks.
const HALO: &str = "stroke=\"#fff\" stroke-width=\"3\" paint-order=\"stroke\"";

/// Intensity in operations per byte and rate in TFLOP/s.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Point {
    intensity: f64,
    tflops: f64,
}

/// A point with what is said of it.
struct Mark<'a> {
    point: Point,
    colour: &'a str,
    is_peer: bool,
    label: String,
}

/// The decades that a plot shows, as exponents of 10.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Axes {
    x: [f64; 2],
    y: [f64; 2],
}

impl Axes {
    /// Whole decades around all points.
    fn around(points: impl Iterator<Item = Point>) -> Self {
        let mut axes = Self { x: [0.0, 1.0], y: [0.0, 1.0] };
        for (index, point) in points.enumerate() {
            for (range, value) in [(&mut axes.x, point.intensity), (&mut axes.y, point.tflops)] {
                let (below, above) = (value.log10().floor(), value.log10().ceil());
                let [low, high] = if index == 0 { [below, above] } else { *range };
                *range = [low.min(below), high.max(above).max(low.min(below) + 1.0)];
            }
        }
        axes
    }

    /// Where a point lies in the picture.
    fn place(&self, point: Point) -> (f64, f64) {
        let share = |value: f64, [low, high]: [f64; 2]| (value.log10() - low) / (high - low);
        let [left, top, right, bottom] = FRAME;
        (
            left + share(point.intensity, self.x) * (right - left),
            bottom - share(point.tflops, self.y) * (bottom - top),
        )
    }
}

/// The plot of all records whose operations and bytes are known.
#[must_use]
pub fn svg(records: &[Record]) -> String {
    let operations = distinct(records.iter().map(|record| record.operation.as_str()));
    let colour_of = |operation: &str| {
        let index = operations.iter().position(|name| *name == operation).unwrap_or(0);
        COLOURS[index % COLOURS.len()]
    };
    let marks: Vec<Mark<'_>> =
        records.iter().flat_map(|record| marks(record, colour_of(&record.operation))).collect();
    let gpus = distinct(records.iter().map(|record| record.gpu.as_str()));
    let ceilings: Vec<&Ceilings> = gpus.iter().filter_map(|gpu| Ceilings::of(gpu)).collect();
    let tops = ceilings.iter().map(|ceilings| ridge(ceilings, Arithmetic::Half));
    let axes = Axes::around(marks.iter().map(|mark| mark.point).chain(tops));

    let mut svg = Svg::new();
    let commits = distinct(records.iter().map(|record| record.commit.as_str())).join(", ");
    let title = format!("Roofline: {}, commit {commits}", gpus.join(", "));
    svg.text((FRAME[0], 34.0), "start", 17.0, &title);
    svg.grid(&axes);
    if ceilings.is_empty() {
        let at = ((FRAME[0] + FRAME[2]) / 2.0, FRAME[1] + 20.0);
        svg.text(at, "middle", 12.0, "no measured ceilings of this GPU");
    }
    // Ours last, so that no peer hides it.
    for is_peer in [true, false] {
        for mark in marks.iter().filter(|mark| mark.is_peer == is_peer) {
            svg.mark(&axes, mark);
        }
    }
    for ceilings in &ceilings {
        svg.ceilings(&axes, ceilings);
    }
    let shown: Vec<&str> = operations
        .iter()
        .copied()
        .filter(|operation| {
            records.iter().any(|r| r.operation == *operation && intensity(r).is_some())
        })
        .collect();
    svg.legend(&shown, colour_of);
    svg.finish()
}

/// Where the slope of the memory meets the ceiling of an arithmetic.
fn ridge(ceilings: &Ceilings, arithmetic: Arithmetic) -> Point {
    let tflops = ceilings.arithmetic(arithmetic).rate;
    Point { intensity: tflops / ceilings.memory.rate, tflops }
}

fn intensity(record: &Record) -> Option<f64> {
    let intensity = record.flops? / record.bytes?;
    (intensity.is_finite() && intensity > 0.0).then_some(intensity)
}

/// The marks of a case: its own and its peer's.
fn marks<'a>(record: &Record, colour: &'a str) -> Vec<Mark<'a>> {
    let Some(intensity) = intensity(record) else { return Vec::new() };
    let mut marks = Vec::new();
    let own = record.contender.as_deref().unwrap_or("kasmina");
    let sides = [Some((own, &record.times, record.foreign))].into_iter();
    let peer = record.peer.as_ref().map(|peer| (peer.name.as_str(), &peer.times, true));
    for (name, times, is_peer) in sides.chain([peer]).flatten() {
        let Some(tflops) = record.tflops(times).filter(|rate| rate.is_finite()) else { continue };
        let label = format!(
            "{name}: {}, {}, {}: {:.2} µs, {tflops:.4} TFLOP/s, {:.3} TB/s",
            record.operation,
            record.case(),
            record.regime,
            times.central,
            record.tbps(times).unwrap_or(0.0),
        );
        marks.push(Mark { point: Point { intensity, tflops }, colour, is_peer, label });
    }
    marks
}

/// An SVG as it grows.
struct Svg(String);

impl Svg {
    fn new() -> Self {
        Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"sans-serif\" fill=\"#222\">\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n"
        ))
    }

    fn finish(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }

    /// Appends a line; writing to a string cannot fail.
    fn push(&mut self, line: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.0, "{line}");
    }

    fn text(&mut self, (x, y): (f64, f64), anchor: &str, size: f64, text: &str) {
        let text = escaped(text);
        self.push(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\" {HALO}>{text}\
             </text>"
        ));
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), style: &str) {
        self.push(format_args!(
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" {style}/>",
            from.0, from.1, to.0, to.1
        ));
    }

    /// The frame, a line per decade, and what the axes show.
    fn grid(&mut self, axes: &Axes) {
        let [left, top, right, bottom] = FRAME;
        let style = "stroke=\"#ddd\"";
        for exponent in decades(axes.x) {
            let intensity = 10.0_f64.powi(exponent);
            let (x, _) = axes.place(Point { intensity, tflops: 1.0 });
            self.line((x, top), (x, bottom), style);
            self.text((x, bottom + 20.0), "middle", 12.0, &power(exponent));
        }
        for exponent in decades(axes.y) {
            let tflops = 10.0_f64.powi(exponent);
            let (_, y) = axes.place(Point { intensity: 1.0, tflops });
            self.line((left, y), (right, y), style);
            self.text((left - 8.0, y + 4.0), "end", 12.0, &power(exponent));
        }
        self.push(format_args!(
            "<rect x=\"{left}\" y=\"{top}\" width=\"{}\" height=\"{}\" fill=\"none\" \
             stroke=\"#888\"/>",
            right - left,
            bottom - top
        ));
        let middle = ((left + right) / 2.0, (top + bottom) / 2.0);
        self.text((middle.0, bottom + 48.0), "middle", 14.0, "arithmetic intensity, FLOP/byte");
        self.push(format_args!(
            "<text transform=\"translate(26 {:.1}) rotate(-90)\" font-size=\"14\" \
             text-anchor=\"middle\">rate, TFLOP/s</text>",
            middle.1
        ));
    }

    /// The slope of the memory up to each ceiling of arithmetic.
    fn ceilings(&mut self, axes: &Axes, ceilings: &Ceilings) {
        let style = "stroke=\"#444\" stroke-width=\"1.5\"";
        let memory = ceilings.memory;
        let lowest = 10.0_f64.powf(axes.y[0]).max(memory.rate * 10.0_f64.powf(axes.x[0]));
        let start = Point { intensity: lowest / memory.rate, tflops: lowest };
        let top = ridge(ceilings, Arithmetic::Half);
        self.line(axes.place(start), axes.place(top), style);
        let (x, y) = axes.place(start);
        let label = format!("{} TB/s: {}", memory.rate, memory.source);
        // Along the slope, which runs at the ratio of the axes' scales.
        let (end_x, end_y) = axes.place(top);
        let degrees = (end_y - y).atan2(end_x - x).to_degrees();
        self.push(format_args!(
            "<text transform=\"translate({x:.1} {y:.1}) rotate({degrees:.2}) translate(14 -7)\" \
             font-size=\"12\" {HALO}>{}</text>",
            escaped(&label)
        ));
        for arithmetic in Arithmetic::ALL {
            let from = axes.place(ridge(ceilings, arithmetic));
            let to = (FRAME[2], from.1);
            if (FRAME[1]..=FRAME[3]).contains(&from.1) && from.0 < to.0 {
                self.line(from, to, style);
                let ceiling = ceilings.arithmetic(arithmetic);
                let (rate, name) = (ceiling.rate, arithmetic.name());
                let label = format!("{rate:.1} TFLOP/s, {name}: {}", ceiling.source);
                self.text((to.0 - 4.0, to.1 - 6.0), "end", 12.0, &label);
            }
        }
    }

    fn mark(&mut self, axes: &Axes, mark: &Mark<'_>) {
        let (x, y) = axes.place(mark.point);
        let (class, fill, radius) =
            if mark.is_peer { ("peer", "none", 4.5) } else { ("ours", mark.colour, 3.5) };
        self.push(format_args!(
            "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" fill=\"{fill}\" \
             fill-opacity=\"0.7\" stroke=\"{}\" pointer-events=\"all\"><title>{}</title></circle>",
            mark.colour,
            escaped(&mark.label)
        ));
    }

    fn legend<'a>(&mut self, operations: &[&str], colour_of: impl Fn(&str) -> &'a str) {
        let x = FRAME[2] + 24.0;
        let mut y = FRAME[1] + 12.0;
        for (name, fill) in [("kasmina", "#222"), ("peer", "none")] {
            self.push(format_args!(
                "<circle cx=\"{x}\" cy=\"{:.1}\" r=\"4\" fill=\"{fill}\" stroke=\"#222\"/>",
                y - 4.0
            ));
            self.text((x + 14.0, y), "start", 13.0, name);
            y += 20.0;
        }
        y += 8.0;
        for operation in operations {
            self.push(format_args!(
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"10\" height=\"10\" fill=\"{}\"/>",
                x - 5.0,
                y - 9.0,
                colour_of(operation)
            ));
            self.text((x + 14.0, y), "start", 13.0, operation);
            y += 20.0;
        }
    }
}

fn decades([low, high]: [f64; 2]) -> impl Iterator<Item = i32> {
    low as i32..=high as i32
}

/// A power of ten as it is read.
fn power(exponent: i32) -> String {
    match exponent {
        0.. => 10_u64.pow(exponent.min(18) as u32).to_string(),
        _ => format!("{:.*}", exponent.unsigned_abs() as usize, 10.0_f64.powi(exponent)),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perf::record::tests::product_line;

    fn record(line: &str) -> Record {
        Record::parse(line).unwrap()
    }

    /// Panics where tags do not pair, an attribute is not quoted, or text holds a bare `&`.
    fn assert_well_formed(xml: &str) {
        let mut open = Vec::new();
        let mut rest = xml;
        while let Some((text, after)) = rest.split_once('<') {
            assert_text(text);
            let (tag, after) = after.split_once('>').expect("a tag ends");
            rest = after;
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "{tag}");
                continue;
            }
            let (tag, closed) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
            let (name, attributes) = tag.split_once(' ').unwrap_or((tag, ""));
            // name="value" pairs: the odd parts are values.
            let parts: Vec<&str> = attributes.split('"').collect();
            assert_eq!(parts.len() % 2, 1, "{tag}");
            for (index, part) in parts.iter().enumerate() {
                if index % 2 == 1 {
                    assert_text(part);
                } else if index + 1 < parts.len() {
                    let attribute = part.trim().strip_suffix('=').expect(tag);
                    assert!(attribute.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'));
                } else {
                    assert!(part.trim().is_empty(), "{tag}");
                }
            }
            if !closed {
                open.push(name);
            }
        }
        assert_text(rest);
        assert!(open.is_empty(), "not closed: {open:?}");
    }

    fn assert_text(text: &str) {
        assert!(!text.contains(['<', '>']), "{text}");
        for (place, _) in text.match_indices('&') {
            let entities = ["&amp;", "&lt;", "&gt;", "&quot;"];
            assert!(entities.iter().any(|entity| text[place..].starts_with(entity)), "{text}");
        }
    }

    #[test]
    fn the_plot_is_well_formed_and_holds_every_point_of_both_sides() {
        let records = [
            record(&product_line("burst", 180.0, 200.0)),
            record(&product_line("steady", 200.0, 210.0)),
            record(
                r#"{"gpu":"NVIDIA H200","operation":"a < b & \"c\"","len":4096,"dtype":"f32",
                "regime":"graph","median_us":2.0}"#,
            ),
            // Without operations it has no place.
            record(r#"{"gpu":"NVIDIA H200","case":"echo","p50_us":2.7}"#),
        ];
        let svg = svg(&records);
        assert_well_formed(&svg);
        assert_eq!(svg.matches("class=\"ours\"").count(), 3);
        assert_eq!(svg.matches("class=\"peer\"").count(), 2);
        let rate = 2.0 * 4096.0_f64.powi(3) / 180.0 * 1e-6;
        assert!(svg.contains(&format!("180.00 µs, {rate:.4} TFLOP/s")), "{svg}");
        for label in [
            "FLOP/byte",
            "832.5 TFLOP/s, 16 bit",
            "423.6 TFLOP/s, TF32",
            "277.5 TFLOP/s, f32 by three products",
            "138.8 TFLOP/s, f32 by six products",
            "51.4 TFLOP/s, f32:",
            "4.61 TB/s",
            ">gemm<",
        ] {
            assert!(svg.contains(label), "{label}");
        }
        assert!(!svg.contains(">other<"));
    }

    #[test]
    fn points_lie_where_their_figures_say() {
        let axes = Axes::around(
            [(0.25, 0.002), (1365.0, 800.0)]
                .map(|(intensity, tflops)| Point { intensity, tflops })
                .into_iter(),
        );
        assert_eq!(axes, Axes { x: [-1.0, 4.0], y: [-3.0, 3.0] });
        let [left, top, right, bottom] = FRAME;
        assert_eq!(axes.place(Point { intensity: 0.1, tflops: 0.001 }), (left, bottom));
        let (x, y) = axes.place(Point { intensity: 1e4, tflops: 1e3 });
        assert!((x - right).abs() < 1e-9 && (y - top).abs() < 1e-9);
        let (_, y) = axes.place(Point { intensity: 1.0, tflops: 1.0 });
        assert!((y - (top + bottom) / 2.0).abs() < 1e-9);
    }

    #[test]
    fn a_plot_without_points_or_ceilings_is_a_plot_that_says_so() {
        for records in [vec![], vec![record(r#"{"gpu":"NVIDIA T4","median_us":1.0}"#)]] {
            let svg = svg(&records);
            assert_well_formed(&svg);
            assert!(svg.contains("no measured ceilings"));
        }
    }
}
