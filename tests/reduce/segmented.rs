//! Rows, columns and chunks of columns, each against the reference of its own elements.

use super::*;

/// Shapes on both sides of vectors, warps and strips, wide and tall.
fn shapes() -> &'static [[usize; 2]] {
    if reduced() {
        &[[1, 1], [3, 97], [33, 64], [70, 130]]
    } else {
        &[
            [1, 1],
            [1, 7],
            [7, 1],
            [3, 97],
            [97, 3],
            [33, 64],
            [64, 33],
            [129, 8],
            [31, 255],
            [257, 257],
            [1009, 130],
            [130, 1009],
            [2, 70_001],
            [20_011, 5],
            [1, 1_200_007],
            [4096, 256],
            [515, 4104],
        ]
    }
}

/// Ways to cut a matrix of so many columns.
fn cuts(columns: usize) -> Vec<Segments> {
    let mut cuts = vec![Segments::Rows];
    // Each column's reference takes a while.
    if columns < 100_000 {
        cuts.push(Segments::Columns);
    }
    for chunks in [1, 2, 3, 7, 16, columns / 9] {
        if (1..=columns).contains(&chunks) {
            cuts.push(Segments::Chunks(chunks));
        }
    }
    cuts
}

/// The elements of each segment, row by row.
fn elements<T: Element>(values: &[T], columns: usize, cut: Segments) -> Vec<Vec<T>> {
    let parts = match cut {
        Segments::Rows => return values.chunks(columns).map(<[T]>::to_vec).collect(),
        Segments::Columns => columns,
        Segments::Chunks(chunks) => chunks,
        other => panic!("{other:?} has no reference: add its definition here"),
    };
    let start = |part: usize| part * (columns / parts) + part.min(columns % parts);
    let of_part = |part: usize| {
        let rows = values.chunks(columns);
        rows.flat_map(|row| row[start(part)..start(part + 1)].to_vec()).collect()
    };
    (0..parts).map(of_part).collect()
}

fn compare_each<T: Element>(
    reducer: &TelemetryReducer,
    tensor: &Tensor<T>,
    values: &[T],
    cut: Segments,
) -> Result<(), String> {
    let columns = tensor.shape().columns();
    let got = reducer.segmented(tensor, cut).map_err(|error| error.to_string())?;
    let expected = elements(values, columns, cut);
    if got.len() != expected.len() {
        return Err(format!("{} summaries of {}", got.len(), expected.len()));
    }
    for (segment, (got, expected)) in got.iter().zip(&expected).enumerate() {
        Reference::of(expected, EPSILON, reducer.tier())
            .compare(got)
            .map_err(|error| format!("segment {segment}: {error}"))?;
    }
    Ok(())
}

pub(crate) fn match_reference<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let reducer = reducer(device, tier)?;
    for &[rows, columns] in shapes() {
        let mut values = normal::<T>("segments", rows * columns);
        // Squares beyond f32 in one, NaN and infinity in others.
        for (place, special) in [(5, 3e4), (rows * columns / 2, f32::NAN), (7, f32::INFINITY)] {
            if place < values.len() && rows % 2 == 1 {
                values[place] = T::from_f32(special);
            }
        }
        let tensor = Tensor::from_slice(device, &values, [rows, columns])?;
        for cut in cuts(columns) {
            compare_each(&reducer, &tensor, &values, cut)
                .map_err(|error| format!("{rows}×{columns}, {cut:?}: {error}"))?;
        }
    }
    Ok(())
}

pub(crate) fn of_views<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let reducer = reducer(device, tier)?;
    for &[rows, columns] in shapes() {
        let (before, after) = (rows % 9, columns % 5 + 1);
        let whole_columns = before + columns + after;
        // What lies between the rows would show in every statistic.
        let mut whole = vec![T::from_f32(f32::NAN); rows * whole_columns];
        let values = normal::<T>("views", rows * columns);
        for (row, values) in values.chunks(columns).enumerate() {
            whole[row * whole_columns + before..][..columns].copy_from_slice(values);
        }
        let view = Tensor::from_slice(device, &whole, [rows, whole_columns])?
            .columns(before..before + columns)?;
        for cut in cuts(columns) {
            compare_each(&reducer, &view, &values, cut)
                .map_err(|error| format!("{rows}×{columns}, {cut:?}: {error}"))?;
        }
        let reference = Reference::of(&values, EPSILON, tier);
        reference.compare(&reducer.summary(&view)?)?;
        for reduction in Reduction::ALL {
            reference.compare_one(reduction, reducer.reduce(&view, reduction)?)?;
        }
    }
    Ok(())
}

fn bits_of_each<T: Element>(
    reducer: &TelemetryReducer,
    tensor: &Tensor<T>,
    cut: Segments,
) -> Result<Vec<u64>, Failed> {
    Ok(reducer.segmented(tensor, cut)?.iter().flat_map(summary_bits).collect())
}

pub(crate) fn keep_bits<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let reducer = reducer(device, tier)?;
    for &[rows, columns] in shapes() {
        let values = normal::<T>("bits", rows * columns);
        let tensor = Tensor::from_slice(device, &values, [rows, columns])?;
        let mut shifted = vec![T::from_f32(f32::NAN); rows * columns + 1];
        shifted[1..].copy_from_slice(&values);
        for cut in cuts(columns) {
            let expected = bits_of_each(&reducer, &tensor, cut)?;
            for repetition in 0..3 {
                let got = bits_of_each(&reducer, &tensor, cut)?;
                require(got == expected, || {
                    format!("{rows}×{columns}, {cut:?}: repetition {repetition} differs")
                })?;
            }
            if rows == 1 {
                let off = vector(device, &shifted)?.columns(1..columns + 1)?;
                let got = bits_of_each(&reducer, &off, cut)?;
                require(got == expected, || format!("{columns}, {cut:?}: one off an alignment"))?;
            }
        }
    }
    Ok(())
}
