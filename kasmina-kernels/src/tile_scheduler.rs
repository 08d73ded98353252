//! The order in which persistent blocks visit the output tiles.

/// Tiles of an output matrix, visited in groups of rows so that blocks running at the same time
/// share tiles of X and of W in L2.
///
/// Within a group the row index moves fastest. With `group_m` rows and one wave of blocks, a wave
/// reads `group_m` tile rows of X and `wave / group_m` tile columns of W.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct TileScheduler {
    /// Tile rows.
    pub tiles_m: u32,
    /// Tile columns.
    pub tiles_n: u32,
    /// Tile rows per group, at least 1.
    pub group_m: u32,
}

impl TileScheduler {
    /// Number of tiles. The caller has checked that the product fits (`check_tiles` on the host).
    #[must_use]
    #[inline(always)]
    pub const fn num_tiles(&self) -> u32 {
        self.tiles_m.wrapping_mul(self.tiles_n)
    }

    /// `(row, column)` of the tile that is visited `index`th; `index < num_tiles()`.
    #[must_use]
    #[inline(always)]
    pub const fn tile(&self, index: u32) -> (u32, u32) {
        let group_tiles = self.group_m.wrapping_mul(self.tiles_n);
        let group = div(index, group_tiles);
        let first_row = group.wrapping_mul(self.group_m);
        let within = index.wrapping_sub(group.wrapping_mul(group_tiles));
        // The last group may have fewer rows.
        let rows_left = self.tiles_m.wrapping_sub(first_row);
        let rows = if rows_left < self.group_m { rows_left } else { self.group_m };
        let column = div(within, rows);
        let row = within.wrapping_sub(column.wrapping_mul(rows));
        (first_row.wrapping_add(row), column)
    }
}

/// `a / b`, 0 where `b` is 0: a plain `/` would leave a panic function in the module.
#[inline(always)]
pub(crate) const fn div(a: u32, b: u32) -> u32 {
    match a.checked_div(b) {
        Some(quotient) => quotient,
        None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn scheduler_visits_every_tile_once() {
        for tiles_m in [1, 2, 7, 8, 9, 16, 31] {
            for tiles_n in [1, 2, 3, 16, 17] {
                for group_m in [1, 2, 8, 16] {
                    let scheduler = TileScheduler { tiles_m, tiles_n, group_m };
                    let seen: HashSet<_> =
                        (0..scheduler.num_tiles()).map(|index| scheduler.tile(index)).collect();
                    assert_eq!(seen.len(), (tiles_m * tiles_n) as usize);
                    assert!(seen.iter().all(|&(row, column)| row < tiles_m && column < tiles_n));
                }
            }
        }
    }

    #[test]
    fn neighbours_in_a_group_share_a_tile_column() {
        let scheduler = TileScheduler { tiles_m: 16, tiles_n: 4, group_m: 8 };
        let columns: HashSet<_> = (0..8).map(|index| scheduler.tile(index).1).collect();
        assert_eq!(columns.len(), 1);
    }
}
