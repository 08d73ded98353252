//! Whether two tensors share an element.
#![forbid(unsafe_code)]

/// Which elements of an address space a tensor with at least one element covers.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) start: u64,
    pub(super) rows: u64,
    pub(super) columns: u64,
    pub(super) row_stride: u64,
}

impl Span {
    const fn end(self) -> u64 {
        self.start + (self.rows - 1) * self.row_stride + self.columns
    }

    pub(super) fn overlaps(self, other: Self) -> bool {
        let (low, high) = if self.start <= other.start { (self, other) } else { (other, self) };
        if low.end() <= high.start {
            return false;
        }
        // Two views of columns of one matrix interleave without touching: seen modulo the row
        // stride, the second lies in the gap that the first leaves.
        if low.row_stride == high.row_stride {
            let shift = (high.start - low.start) % low.row_stride;
            return shift < low.columns || shift + high.columns > low.row_stride;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn spans_of_one_row_stride_overlap_exactly_where_they_share_an_element() {
        let elements = |span: Span| -> HashSet<u64> {
            (0..span.rows)
                .flat_map(|row| {
                    let start = span.start + row * span.row_stride;
                    start..start + span.columns
                })
                .collect()
        };
        let row_stride = 5;
        for start in 0..12 {
            for (rows, columns) in [(1, 1), (1, 5), (2, 2), (3, 4), (2, 5)] {
                for (other_rows, other_columns) in [(1, 1), (2, 3), (3, 1), (1, 5)] {
                    let span = Span { start, rows, columns, row_stride };
                    let (rows, columns) = (other_rows, other_columns);
                    let other = Span { start: 4, rows, columns, row_stride };
                    let shared = !elements(span).is_disjoint(&elements(other));
                    assert_eq!(span.overlaps(other), shared, "{start} {rows} {columns}");
                    assert_eq!(other.overlaps(span), shared);
                }
            }
        }
    }
}
