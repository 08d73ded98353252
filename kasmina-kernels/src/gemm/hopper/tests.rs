use super::*;

/// `(block_m, block_n, blocks of a cluster)` of the kernel for this problem.
fn selected(problem: Problem) -> (u32, u32, u32) {
    let layout = WeightLayout::InOut;
    let row = select(DType::BF16, layout, problem, 132, Forced::default()).expect("a kernel");
    (row.tile.block_m, row.tile.block_n, row.tile.cluster())
}

#[test]
fn large_problems_get_the_tile_that_reads_least() {
    assert_eq!(selected(Problem::aligned(8192, 8192, 8192)), (128, 256, 1));
    assert_eq!(selected(Problem::aligned(4096, 4096, 4096)), (128, 256, 1));
    assert_eq!(selected(Problem::aligned(2048, 2048, 2048)), (128, 256, 1));
}

#[test]
fn consumers_take_turns_where_tiles_are_many_and_k_is_short() {
    let ping_pong = |m, n, k| {
        let (layout, problem) = (WeightLayout::OutIn, Problem::aligned(m, n, k));
        let row = select(DType::F16, layout, problem, 132, Forced::default()).expect("a kernel");
        row.ping_pong
    };
    assert!(ping_pong(8192, 1024, 256) && ping_pong(4096, 4096, 256));
    assert!(ping_pong(8192, 1024, 512) && ping_pong(16384, 1024, 128));
    assert!(!ping_pong(4096, 4096, 4096) && !ping_pong(1024, 1024, 256));
}

/// Timed on an H200 with bf16, each was the fastest, as were those of the next three tests.
#[test]
fn small_and_skinny_problems_get_tiles_that_fill_the_gpu() {
    assert_eq!(selected(Problem::aligned(1024, 1024, 1024)), (64, 128, 1));
    assert_eq!(selected(Problem::aligned(512, 512, 512)), (64, 64, 1));
    assert_eq!(selected(Problem::aligned(128, 4096, 4096)), (64, 64, 1));
    assert_eq!(selected(Problem::aligned(1, 8192, 8192)), (64, 64, 1));
}

#[test]
fn blocks_share_a_tile_where_tiles_are_few_and_k_is_long() {
    assert_eq!(selected(Problem::aligned(32, 4096, 4096)), (64, 64, 2));
    assert_eq!(selected(Problem::aligned(64, 4096, 4096)), (64, 64, 2));
    assert_eq!(selected(Problem::aligned(512, 512, 4096)), (64, 64, 2));
    assert_eq!(selected(Problem::aligned(32, 1024, 4096)), (64, 64, 4));
    assert_eq!(selected(Problem::aligned(128, 512, 8192)), (64, 64, 4));
    assert_eq!(selected(Problem::aligned(128, 256, 8192)), (64, 64, 8));
    assert_eq!(selected(Problem::aligned(32, 64, 64)), (64, 64, 1));
}

#[test]
fn blocks_share_columns_where_reading_l2_takes_longest() {
    assert_eq!(selected(Problem::aligned(256, 4096, 4096)), (64, 128, 2));
}

#[test]
fn rows_that_straddle_lines_call_for_tiles_that_read_less() {
    let problem = Problem::aligned(1000, 1000, 1000);
    assert_eq!(selected(problem), (64, 128, 1));
    let straddling = Problem { x_straddles: true, w_straddles: true, ..problem };
    assert_eq!(selected(straddling), (64, 128, 2));
    assert!(Problem::straddles(2000) && !Problem::straddles(2048));
}

#[test]
fn the_parts_of_k_cover_every_step_once() {
    for split_k in [1, 2, 4, 8] {
        let tile = Tile { block_m: 64, block_n: 64, num_stages: 4, split_k, cluster_m: 1 };
        for k_blocks in [8, 9, 11, 15, 64, 127] {
            let mut next = 0;
            for rank in 0..split_k {
                let (begin, end) = tile.steps(rank, k_blocks);
                assert!(begin == next && end > begin);
                next = end;
            }
            assert_eq!(next, k_blocks);
        }
    }
}

#[test]
fn blocks_below_each_other_have_a_row_of_tiles_each() {
    let tile = Tile { block_m: 64, block_n: 128, num_stages: 8, split_k: 1, cluster_m: 2 };
    for (m, pairs) in [(1, 1), (128, 1), (129, 2), (256, 2)] {
        assert_eq!(tile.scheduler(m, 256).tiles_m, pairs);
    }
    assert_eq!((tile.num_blocks(3, 132), tile.num_blocks(100, 132)), (6, 132));
    assert_eq!((tile.num_blocks(100, 131), tile.num_blocks(100, 1)), (130, 2));
    assert_eq!((tile.w_rows(), tile.stage_bytes(64)), (64, 192 * 128));
}

#[test]
fn no_more_large_clusters_are_launched_than_run_at_once() {
    for (split_k, clusters) in [(1, 132), (2, 66), (4, 30), (8, 15)] {
        let tile = Tile { block_m: 64, block_n: 64, num_stages: 8, split_k, cluster_m: 1 };
        assert_eq!(tile.num_blocks(1000, 132), clusters * split_k);
        assert_eq!(tile.num_blocks(1, 132), split_k);
        assert_eq!(tile.num_blocks(1000, 1), split_k);
    }
}

#[test]
fn the_largest_tiles_get_no_more_blocks_than_their_rounds_need() {
    let tile = Tile::new(128, 256, 4);
    for (tiles, blocks) in
        [(0, 0), (1, 1), (128, 128), (132, 132), (133, 67), (512, 128), (1792, 128), (2048, 128)]
    {
        assert_eq!(tile.num_blocks(tiles, 132), blocks);
    }
    for tiles in 1..2000u32 {
        let rounds = |blocks: u32| tiles.div_ceil(blocks);
        let blocks = tile.num_blocks(tiles, 132);
        assert_eq!(rounds(blocks), rounds(132), "{tiles}");
        assert!(blocks == 1 || rounds(blocks - 1) > rounds(132), "{tiles}");
    }
}

#[test]
fn the_stores_of_a_kernels_warps_cover_its_rows_once() {
    for row in all_kernels() {
        let stores = if row.tile.stores_by_warp() { WARPGROUP / 32 } else { 1 };
        assert_eq!(row.store_rows() * stores * row.tile.split_k, CONSUMER_M);
    }
}

#[test]
fn a_box_has_no_more_groups_of_rows_than_the_input() {
    let tile = Tile::new(64, 64, 8);
    for (m, rows) in [(1, 8), (8, 8), (9, 16), (57, 64), (64, 64), (65, 64)] {
        assert_eq!(tile.x_rows(m), rows);
    }
    assert_eq!(tile.stage_bytes(1), 8 * 128 + 8192);
}

#[test]
fn every_combination_of_a_16_bit_type_and_a_layout_has_a_kernel_and_f32_has_none() {
    let select =
        |dtype, layout| select(dtype, layout, Problem::aligned(1, 1, 1), 132, Forced::default());
    for layout in WeightLayout::ALL {
        for dtype in [DType::F16, DType::BF16] {
            let row = select(dtype, layout).expect("a kernel");
            assert_eq!((row.dtype, row.layout), (dtype, layout));
        }
        assert!(!serves(DType::F32) && select(DType::F32, layout).is_none());
    }
}

#[test]
fn what_is_forced_is_what_is_used_or_nothing_is() {
    let select = |forced, k| {
        let (layout, problem) = (WeightLayout::OutIn, Problem::aligned(8192, 8192, k));
        select(DType::F16, layout, problem, 132, forced).map(|row| row.tile)
    };
    for tile in [[128, 256], [128, 128], [64, 128], [64, 64]] {
        let forced = Forced { tile: Some(tile), ..Forced::default() };
        assert_eq!(select(forced, 8192).expect("a kernel").extents(), tile);
        assert!(forced.exists());
    }
    for split_k in [1, 2, 4, 8] {
        let forced = Forced { split_k: Some(split_k), ..Forced::default() };
        assert_eq!(select(forced, 8192).expect("a kernel").split_k, split_k);
        assert_eq!(select(forced, 64).expect("a kernel").split_k, 1);
        assert!(forced.exists());
    }
    for cluster_m in [1, 2] {
        let forced = Forced { cluster_m: Some(cluster_m), ..Forced::default() };
        assert_eq!(select(forced, 8192).expect("a kernel").cluster_m, cluster_m);
        assert!(forced.exists());
    }
    for ping_pong in [false, true] {
        let forced = Forced { ping_pong: Some(ping_pong), ..Forced::default() };
        let (layout, problem) = (WeightLayout::OutIn, Problem::aligned(8192, 8192, 8192));
        let row = super::select(DType::F16, layout, problem, 132, forced).expect("a kernel");
        assert_eq!(row.ping_pong, ping_pong);
        assert!(forced.exists());
    }
    let none = Forced::default();
    for forced in [
        Forced { tile: Some([64, 32]), ..none },
        Forced { tile: Some([128, 256]), split_k: Some(2), ..none },
        Forced { split_k: Some(3), ..none },
        Forced { tile: Some([64, 64]), cluster_m: Some(2), ..none },
        Forced { cluster_m: Some(3), ..none },
        Forced { split_k: Some(2), cluster_m: Some(2), ..none },
        Forced { tile: Some([128, 256]), ping_pong: Some(true), ..none },
    ] {
        assert!(select(forced, 8192).is_none() && !forced.exists());
    }
}

#[test]
fn entry_names_say_what_the_kernel_serves() {
    for row in all_kernels() {
        let Tile { split_k, cluster_m, .. } = row.tile;
        let expected = std::format!(
            "gemm_{}_{}_{}x{}x{BLOCK_K}{}{}{}",
            row.dtype,
            row.layout.name(),
            row.tile.block_m,
            row.tile.block_n,
            if split_k > 1 { std::format!("_k{split_k}") } else { std::string::String::new() },
            if cluster_m > 1 { "_c2" } else { "" },
            if row.ping_pong { "_pp" } else { "" },
        );
        assert_eq!(row.kernel.entry, expected);
        assert_eq!(row.kernel.module.entries, [row.kernel.entry]);
    }
}
