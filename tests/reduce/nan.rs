//! Elements that are not finite, under either policy.

use super::*;

/// Whether the element at a place is NaN, where a stretch is so long.
type Pattern = fn(usize, usize) -> bool;

pub(crate) fn count_and_propagate<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let reducer = reducer(device, tier)?;
    let lengths: &[usize] = if reduced() { &[33, 9001] } else { &[1, 33, 9001, 1_000_003] };
    for &length in lengths {
        let values = normal::<T>("non-finite", length);
        let somewhere = Random::of(&format!("position {length}")).below(length);
        let positions = [0, length - 1, length / 2, somewhere];
        let specials: [&[f32]; 5] = [
            &[f32::NAN],
            &[f32::INFINITY],
            &[f32::NEG_INFINITY],
            &[f32::INFINITY, f32::NEG_INFINITY],
            &[f32::NAN, f32::INFINITY, -f32::NAN],
        ];
        for (special, position) in
            specials.iter().flat_map(|special| positions.map(|position| (special, position)))
        {
            let mut values = values.clone();
            for (i, &special) in special.iter().enumerate() {
                values[(position + i * (length / 3 + 1)) % length] = T::from_f32(special);
            }
            compare(&reducer, &values).map_err(|error| {
                format!("{special:?} from {position} on among {length} elements: {error}")
            })?;
        }
    }
    // Nothing but them.
    for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        compare(&reducer, &[T::from_f32(special); 5000])?;
    }
    Ok(())
}

/// NaN at some places, of which nothing may show but their number.
pub(crate) fn are_skipped<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let reducer = TelemetryReducer::with_config(device, config(tier).nan(NanPolicy::Skip))?;
    let lengths: &[usize] =
        if reduced() { &[33, 9001] } else { &[1, 33, 4097, 9001, 70_001, 1_000_003] };
    for &length in lengths {
        // What the threads of a block have under way at once.
        let stretch = 16_384 / size_of::<T>();
        let patterns: [(&str, Pattern, f32); 7] = [
            ("none", |_, _| false, 0.0),
            ("each", |_, _| true, 0.0),
            ("every second", |place, _| place.is_multiple_of(2), 0.0),
            ("every 997th", |place, _| place.is_multiple_of(997), 1e4),
            ("every 7001st", |place, _| place.is_multiple_of(7001), 1e4),
            // Neither gives a mean that stands for what follows.
            ("every second stretch", |place, stretch| (place / stretch).is_multiple_of(2), 1e4),
            ("the first of every 64", |place, _| place % 64 < 16, 1e4),
        ];
        for (which, is_skipped, shift) in patterns {
            let mut values = normal::<T>("skipped", length);
            values.iter_mut().for_each(|value| *value = T::from_f32(value.to_f32() + shift));
            let mut others = Vec::new();
            for (place, value) in values.iter_mut().enumerate() {
                if is_skipped(place, stretch) {
                    *value = T::from_f32(f32::NAN);
                } else {
                    others.push(*value);
                }
            }
            let tensor = vector(device, &values)?;
            let (summary, case) = (reducer.summary(&tensor)?, format!("{length}, {which}"));
            let skipped = (length - others.len()) as u64;
            let counts = (summary.count(), summary.non_finite());
            require(counts == (others.len() as u64, skipped), || format!("{case}: {counts:?}"))?;
            let reference = Reference::of(&others, EPSILON, tier).with_non_finite(skipped);
            reference.compare(&summary).map_err(|error| format!("{case}: {error}"))?;
            for reduction in Reduction::ALL {
                let got = reducer.reduce(&tensor, reduction)?;
                reference
                    .compare_one(reduction, got)
                    .map_err(|error| format!("{case}, reduce alone: {error}"))?;
            }
        }
    }
    Ok(())
}
