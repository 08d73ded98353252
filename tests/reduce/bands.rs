//! Wide chunks of columns, which have a kernel of their own, with values that are hard to add.

use super::*;

/// Rows, columns and chunks around a batch of four rows of each lane, the longest band of 16, and one
/// block for a chunk or several, where a row of a chunk is of 32, 64, 128 and 256 vectors; and
/// neighbours of 31, 33 and 512 vectors that others have.
fn shapes(dtype: DType) -> Vec<[usize; 3]> {
    let vector = 16 / dtype.size();
    let mut shapes = vec![
        [1, 32 * vector, 1],
        [9, 256 * vector, 1],
        [17, 3 * 128 * vector, 3],
        [65, 2 * 32 * vector, 2],
        [5, 2 * 31 * vector, 2],
    ];
    if !reduced() {
        shapes.extend([
            [8, 8192, 16],
            [31, 64 * vector, 1],
            [33, 128 * vector, 1],
            [64, 64 * vector, 1],
            [1009, 3 * 64 * vector, 3],
            [515, 2 * 256 * vector, 2],
            [2111, 32 * vector, 1],
            [130, 33 * vector, 1],
            [130, 512 * vector, 1],
            // So many chunks that the GPU is busy with one band of each.
            [70, 530 * 32 * vector, 530],
        ]);
    }
    shapes
}

/// The element in row `row` of `rows` and in column `column` of chunk `chunk`, each chunk of a kind
/// of its own.
fn adversary<T: Element>(place: [usize; 3], rows: usize, noise: f32) -> f32 {
    let [chunk, row, column] = place;
    let [largest, smallest] = extremes::<T>();
    let sign = if row.is_multiple_of(2) { 1.0 } else { -1.0 };
    match (chunk + rows) % 14 {
        0 => 1e4 + noise,
        1 => 0.01 * noise - 3e4,
        // Far from a mean of the first rows.
        2 if row < 4 => 3e4,
        3 if 2 * row < rows => 3e4,
        // A column that is unlike all others, the first of a warp.
        4 if column == 0 => 3e4,
        5 if row == 2 * rows / 3 && column == 77 => 6e4,
        5 => 1e-3,
        6 => (16.0 * noise).round() * smallest,
        7 => 0.0 * sign,
        8 => 0.1,
        9 => largest * sign,
        10 => largest / 64.0 * noise,
        11 if row == rows / 2 && column == 5 => f32::NAN,
        12 if row == rows - 1 && column == 3 => f32::INFINITY,
        13 => row as f32 / rows as f32,
        _ => noise,
    }
}

/// The elements of a matrix, given by chunk, row and column within the chunk, and a normal number.
fn matrix<T: Element>(
    [rows, columns, chunks]: [usize; 3],
    value: impl Fn([usize; 3], f32) -> f32,
) -> Vec<T> {
    let width = columns / chunks;
    let noise = Random::of(&format!("bands {}", T::DTYPE)).normal((1 << 16) + 3);
    let noise = noise.iter().cycle().take(rows * columns).enumerate();
    noise
        .map(|(place, &noise)| {
            let (row, column) = (place / columns, place % columns);
            T::from_f32(value([column / width, row, column % width], noise))
        })
        .collect()
}

/// Compares each chunk, and the bits of repetitions.
fn compare_chunks<T: Element>(
    reducer: &TelemetryReducer,
    shape: [usize; 3],
    skip: bool,
    value: impl Fn([usize; 3], f32) -> f32,
) -> Result<(), Failed> {
    let [rows, columns, chunks] = shape;
    let values = matrix::<T>(shape, value);
    let tensor = Tensor::from_slice(reducer.device(), &values, [rows, columns])?;
    let cut = Segments::Chunks(chunks);
    let all = reducer.segmented(&tensor, cut)?;
    require(all.len() == chunks, || format!("{shape:?}: {} summaries", all.len()))?;
    let width = columns / chunks;
    for (chunk, got) in all.iter().enumerate() {
        let of_rows = values.chunks(columns).map(|row| &row[chunk * width..][..width]);
        let mut elements: Vec<T> = of_rows.flatten().copied().collect();
        let reference = if skip {
            elements.retain(|element| !element.to_f32().is_nan());
            let skipped = (rows * width - elements.len()) as u64;
            Reference::of(&elements, EPSILON, reducer.tier()).with_non_finite(skipped)
        } else {
            Reference::of(&elements, EPSILON, reducer.tier())
        };
        reference.compare(got).map_err(|error| format!("{shape:?}, chunk {chunk}: {error}"))?;
    }
    let bits: Vec<u64> = all.iter().flat_map(summary_bits).collect();
    for repetition in 0..2 {
        let again = reducer.segmented(&tensor, cut)?;
        let same = again.iter().flat_map(summary_bits).eq(bits.iter().copied());
        require(same, || format!("{shape:?}: repetition {repetition} differs"))?;
    }
    Ok(())
}

pub(crate) fn match_reference<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let reducer = reducer(device, tier)?;
    for shape in shapes(T::DTYPE) {
        let adversary = |place: [usize; 3], noise: f32| adversary::<T>(place, shape[0], noise);
        compare_chunks::<T>(&reducer, shape, false, adversary)?;
    }
    if !reduced() {
        // And more rows than the longest band has.
        let long = [67, 265 * 4096 / T::DTYPE.size(), 265];
        let adversary = |place: [usize; 3], noise: f32| adversary::<T>(place, 67, noise);
        compare_chunks::<T>(&reducer, long, false, adversary)?;
    }
    // Every kind in a chunk of several bands and in one of a single short one.
    let width = 32 * 16 / T::DTYPE.size();
    for rows in [7, 300] {
        let kinds = [rows, 14 * width, 14];
        let adversary = |place: [usize; 3], noise: f32| adversary::<T>(place, rows, noise);
        compare_chunks::<T>(&reducer, kinds, false, adversary)?;
    }
    Ok(())
}

pub(crate) fn skip_nan<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let reducer = TelemetryReducer::with_config(device, config(tier).nan(NanPolicy::Skip))?;
    for shape in shapes(T::DTYPE) {
        let some = |[chunk, row, column]: [usize; 3], noise: f32| {
            let nan = match chunk % 5 {
                0 => row.is_multiple_of(2),
                1 => true,
                // None is left to make a pivot.
                2 => row < 40,
                3 => column.is_multiple_of(97),
                _ => false,
            };
            if nan { f32::NAN } else { noise + chunk as f32 }
        };
        compare_chunks::<T>(&reducer, shape, true, some)?;
    }
    Ok(())
}

pub(crate) fn of_views<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let reducer = reducer(device, tier)?;
    let vector = 16 / T::DTYPE.size();
    for shape @ [rows, columns, chunks] in shapes(T::DTYPE) {
        // Gaps of whole vectors, and ones that leave no row where 16 bytes may be loaded at once.
        let values = matrix::<T>(shape, |[chunk, ..], noise| noise + chunk as f32);
        let tensor = Tensor::from_slice(device, &values, [rows, columns])?;
        let cut = Segments::Chunks(chunks);
        let expected = reducer.segmented(&tensor, cut)?;
        for (before, after) in [(vector, 2 * vector), (1, 2), (3, vector)] {
            let whole_columns = before + columns + after;
            let mut whole = vec![T::from_f32(f32::NAN); rows * whole_columns];
            for (row, values) in values.chunks(columns).enumerate() {
                whole[row * whole_columns + before..][..columns].copy_from_slice(values);
            }
            let view = Tensor::from_slice(device, &whole, [rows, whole_columns])?
                .columns(before..before + columns)?;
            let got = reducer.segmented(&view, cut)?;
            let bits = |all: &[Summary]| all.iter().flat_map(summary_bits).collect::<Vec<u64>>();
            require(bits(&got) == bits(&expected), || format!("{shape:?}, {before} before a row"))?;
        }
    }
    Ok(())
}
