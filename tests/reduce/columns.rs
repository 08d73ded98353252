//! Columns of wide matrices, which have a kernel of their own, with values that are hard to add.

use super::*;

/// Rows around the 16 of each of eight warps that make a pivot and the 1024 of the longest stripe, of
/// columns on both sides of half a group, of groups, and enough for the longest stripes.
fn shapes(dtype: DType) -> Vec<[usize; 2]> {
    let group = 512 / dtype.size();
    // The first is so narrow that the kernel for segments has it.
    let mut shapes =
        vec![[1009, 3], [1, group], [5, group / 2], [27, group + 1], [70, group / 2 + 1]];
    if !reduced() {
        shapes.extend([[33, 3 * group - 1], [1009, 2 * group], [4099, group / 2 + 3]]);
        shapes.extend([[8, group], [129, group - 1], [1025, group]]);
        // With so many groups one stripe would be enough for the GPU.
        shapes.push([1031, 133 * group + 3]);
    }
    shapes
}

/// The value in row `row` of column `column`, each column of a kind of its own.
fn adversary<T: Element>(row: usize, column: usize, rows: usize, noise: f32) -> f32 {
    let [largest, smallest] = extremes::<T>();
    let sign = if row.is_multiple_of(2) { 1.0 } else { -1.0 };
    match column % 13 {
        0 => 1e4 + noise,
        1 => 0.01 * noise - 3e4,
        2 => row as f32 / rows as f32,
        // Far from a pivot that the first rows make.
        3 => {
            if row < 96 {
                3e4
            } else {
                noise
            }
        }
        4 => {
            if 2 * row < rows {
                3e4
            } else {
                -3e4
            }
        }
        5 => {
            if row == 2 * rows / 3 {
                6e4
            } else {
                1e-3
            }
        }
        6 => (16.0 * noise).round() * smallest,
        7 => 0.0 * sign,
        8 => 0.1,
        9 => largest * sign,
        10 => largest / 64.0 * noise,
        11 if row == rows / 2 => f32::NAN,
        12 if row == rows - 1 => f32::INFINITY,
        _ => noise,
    }
}

/// Compares each column; `value` gives the element of a row and column from a normal number.
fn compare_columns<T: Element>(
    reducer: &TelemetryReducer,
    [rows, columns]: [usize; 2],
    skip: bool,
    value: impl Fn(usize, usize, f32) -> f32,
) -> Result<(), String> {
    let count = rows * columns;
    let noise = Random::of(&format!("columns {}", T::DTYPE)).normal((1 << 16) + 3);
    let noise = noise.iter().cycle().take(count).enumerate();
    let values: Vec<T> = noise
        .map(|(place, &noise)| T::from_f32(value(place / columns, place % columns, noise)))
        .collect();
    let told = |error: Error| error.to_string();
    let tensor = Tensor::from_slice(reducer.device(), &values, [rows, columns]).map_err(told)?;
    let got = reducer.segmented(&tensor, Segments::Columns).map_err(told)?;
    if got.len() != columns {
        return Err(format!("{rows}×{columns}: {} summaries", got.len()));
    }
    for (column, got) in got.iter().enumerate() {
        let mut elements: Vec<T> = values[column..].iter().step_by(columns).copied().collect();
        let reference = if skip {
            elements.retain(|element| !element.to_f32().is_nan());
            let skipped = (rows - elements.len()) as u64;
            Reference::of(&elements, EPSILON, reducer.tier()).with_non_finite(skipped)
        } else {
            Reference::of(&elements, EPSILON, reducer.tier())
        };
        reference
            .compare(got)
            .map_err(|error| format!("{rows}×{columns}, column {column}: {error}"))?;
    }
    Ok(())
}

pub(crate) fn match_reference<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let reducer = reducer(device, tier)?;
    for shape in shapes(T::DTYPE) {
        let adversary =
            |row: usize, column: usize, noise: f32| adversary::<T>(row, column, shape[0], noise);
        compare_columns::<T>(&reducer, shape, false, adversary)?;
    }
    Ok(())
}

pub(crate) fn skip_nan<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let reducer = TelemetryReducer::with_config(device, config(tier).nan(NanPolicy::Skip))?;
    for shape in shapes(T::DTYPE) {
        let some = |row: usize, column: usize, noise: f32| {
            let nan = match column % 5 {
                0 => true,
                1 => row.is_multiple_of(2),
                // None is left to make a pivot.
                2 => row < 40,
                3 => row + 1 == shape[0],
                _ => false,
            };
            if nan { f32::NAN } else { noise + column as f32 }
        };
        compare_columns::<T>(&reducer, shape, true, some)?;
    }
    Ok(())
}
