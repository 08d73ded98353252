//! Warpgroup matrix multiply-accumulate.
//!
//! Accumulators are separate variables, not an array: an array goes to local memory and ptxas then
//! serialises the pipeline (C7511). One macro numbers the registers.

/// Calls a macro with its arguments followed by the names of the accumulators of an m64 tile of 64,
/// 128, 192 or 256 columns, grouped by the eight that cover 16 columns.
macro_rules! with_accumulators {
    (64, $($callback:ident)::+ ! { $($arguments:tt)* }) => {
        $($callback)::+! {
            $($arguments)*
            [c0 c1 c2 c3 c4 c5 c6 c7]
            [c8 c9 c10 c11 c12 c13 c14 c15]
            [c16 c17 c18 c19 c20 c21 c22 c23]
            [c24 c25 c26 c27 c28 c29 c30 c31]
        }
    };
    (128, $($callback:ident)::+ ! { $($arguments:tt)* }) => {
        $($callback)::+! {
            $($arguments)*
            [c0 c1 c2 c3 c4 c5 c6 c7]
            [c8 c9 c10 c11 c12 c13 c14 c15]
            [c16 c17 c18 c19 c20 c21 c22 c23]
            [c24 c25 c26 c27 c28 c29 c30 c31]
            [c32 c33 c34 c35 c36 c37 c38 c39]
            [c40 c41 c42 c43 c44 c45 c46 c47]
            [c48 c49 c50 c51 c52 c53 c54 c55]
            [c56 c57 c58 c59 c60 c61 c62 c63]
        }
    };
    (192, $($callback:ident)::+ ! { $($arguments:tt)* }) => {
        $($callback)::+! {
            $($arguments)*
            [c0 c1 c2 c3 c4 c5 c6 c7]
            [c8 c9 c10 c11 c12 c13 c14 c15]
            [c16 c17 c18 c19 c20 c21 c22 c23]
            [c24 c25 c26 c27 c28 c29 c30 c31]
            [c32 c33 c34 c35 c36 c37 c38 c39]
            [c40 c41 c42 c43 c44 c45 c46 c47]
            [c48 c49 c50 c51 c52 c53 c54 c55]
            [c56 c57 c58 c59 c60 c61 c62 c63]
            [c64 c65 c66 c67 c68 c69 c70 c71]
            [c72 c73 c74 c75 c76 c77 c78 c79]
            [c80 c81 c82 c83 c84 c85 c86 c87]
            [c88 c89 c90 c91 c92 c93 c94 c95]
        }
    };
    (256, $($callback:ident)::+ ! { $($arguments:tt)* }) => {
        $($callback)::+! {
            $($arguments)*
            [c0 c1 c2 c3 c4 c5 c6 c7]
            [c8 c9 c10 c11 c12 c13 c14 c15]
            [c16 c17 c18 c19 c20 c21 c22 c23]
            [c24 c25 c26 c27 c28 c29 c30 c31]
            [c32 c33 c34 c35 c36 c37 c38 c39]
            [c40 c41 c42 c43 c44 c45 c46 c47]
            [c48 c49 c50 c51 c52 c53 c54 c55]
            [c56 c57 c58 c59 c60 c61 c62 c63]
            [c64 c65 c66 c67 c68 c69 c70 c71]
            [c72 c73 c74 c75 c76 c77 c78 c79]
            [c80 c81 c82 c83 c84 c85 c86 c87]
            [c88 c89 c90 c91 c92 c93 c94 c95]
            [c96 c97 c98 c99 c100 c101 c102 c103]
            [c104 c105 c106 c107 c108 c109 c110 c111]
            [c112 c113 c114 c115 c116 c117 c118 c119]
            [c120 c121 c122 c123 c124 c125 c126 c127]
        }
    };
}

/// The accumulators of an m64 tile of 64, 128, 192 or 256 columns as asm operands, the first ones;
/// `lower 128` is those behind the first 128 columns'.
macro_rules! accumulator_operands {
    (64) => {
        "{{{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, \
             {15}, {16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, \
             {29}, {30}, {31}}}"
    };
    (128) => {
        "{{{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, \
             {15}, {16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, \
             {29}, {30}, {31}, {32}, {33}, {34}, {35}, {36}, {37}, {38}, {39}, {40}, {41}, {42}, \
             {43}, {44}, {45}, {46}, {47}, {48}, {49}, {50}, {51}, {52}, {53}, {54}, {55}, {56}, \
             {57}, {58}, {59}, {60}, {61}, {62}, {63}}}"
    };
    (lower 128) => {
        "{{{64}, {65}, {66}, {67}, {68}, {69}, {70}, {71}, {72}, {73}, {74}, {75}, \
             {76}, {77}, {78}, {79}, {80}, {81}, {82}, {83}, {84}, {85}, {86}, {87}, \
             {88}, {89}, {90}, {91}, {92}, {93}, {94}, {95}, {96}, {97}, {98}, {99}, \
             {100}, {101}, {102}, {103}, {104}, {105}, {106}, {107}, {108}, {109}, {110}, {111}, \
             {112}, {113}, {114}, {115}, {116}, {117}, {118}, {119}, {120}, {121}, {122}, {123}, \
             {124}, {125}, {126}, {127}}}"
    };
    (192) => {
        "{{{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, \
             {16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, \
             {30}, {31}, {32}, {33}, {34}, {35}, {36}, {37}, {38}, {39}, {40}, {41}, {42}, {43}, \
             {44}, {45}, {46}, {47}, {48}, {49}, {50}, {51}, {52}, {53}, {54}, {55}, {56}, {57}, \
             {58}, {59}, {60}, {61}, {62}, {63}, {64}, {65}, {66}, {67}, {68}, {69}, {70}, {71}, \
             {72}, {73}, {74}, {75}, {76}, {77}, {78}, {79}, {80}, {81}, {82}, {83}, {84}, {85}, \
             {86}, {87}, {88}, {89}, {90}, {91}, {92}, {93}, {94}, {95}}}"
    };
    (256) => {
        "{{{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, \
             {15}, {16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, \
             {29}, {30}, {31}, {32}, {33}, {34}, {35}, {36}, {37}, {38}, {39}, {40}, {41}, {42}, \
             {43}, {44}, {45}, {46}, {47}, {48}, {49}, {50}, {51}, {52}, {53}, {54}, {55}, {56}, \
             {57}, {58}, {59}, {60}, {61}, {62}, {63}, {64}, {65}, {66}, {67}, {68}, {69}, {70}, \
             {71}, {72}, {73}, {74}, {75}, {76}, {77}, {78}, {79}, {80}, {81}, {82}, {83}, {84}, \
             {85}, {86}, {87}, {88}, {89}, {90}, {91}, {92}, {93}, {94}, {95}, {96}, {97}, {98}, \
             {99}, {100}, {101}, {102}, {103}, {104}, {105}, {106}, {107}, {108}, {109}, {110}, \
             {111}, {112}, {113}, {114}, {115}, {116}, {117}, {118}, {119}, {120}, {121}, {122}, \
             {123}, {124}, {125}, {126}, {127}}}"
    };
}

/// One stage of 64 k as four `wgmma.mma_async.m64nNk16` and a commit, then a wait until at most
/// this batch is in flight, so that the stage before may be released.
///
/// `$a` and `$b` are descriptors of the stage's first k16; they advance by `$step_a` and `$step_b`
/// (units of 16 bytes) per k16. `$transpose_a` and `$transpose_b` are 1 for MN-major operands.
/// `$accumulate` 0 overwrites the accumulators.
macro_rules! wgmma_k64 {
    ($dtype:literal, $n:tt, $transpose_a:expr, $transpose_b:expr, $step_a:expr, $step_b:expr,
     $a:expr, $b:expr, $accumulate:expr, $($c:ident)+) => {
        core::arch::asm!(
            "{{",
            ".reg .pred first, rest;",
            ".reg .b64 a, b;",
            "setp.ne.b32 first, {accumulate}, 0;",
            "setp.eq.b32 rest, 0, 0;",
            "mov.b64 a, {a};",
            "mov.b64 b, {b};",
            "wgmma.fence.sync.aligned;",
            $crate::ptx::wgmma::wgmma_k64!(@mma $dtype, $n, "first"),
            "add.s64 a, a, {step_a};",
            "add.s64 b, b, {step_b};",
            $crate::ptx::wgmma::wgmma_k64!(@mma $dtype, $n, "rest"),
            "add.s64 a, a, {step_a};",
            "add.s64 b, b, {step_b};",
            $crate::ptx::wgmma::wgmma_k64!(@mma $dtype, $n, "rest"),
            "add.s64 a, a, {step_a};",
            "add.s64 b, b, {step_b};",
            $crate::ptx::wgmma::wgmma_k64!(@mma $dtype, $n, "rest"),
            "wgmma.commit_group.sync.aligned;",
            "wgmma.wait_group.sync.aligned 1;",
            "}}",
            $(inout(reg32) $c,)+
            a = in(reg64) $a,
            b = in(reg64) $b,
            accumulate = in(reg32) $accumulate,
            step_a = const $step_a,
            step_b = const $step_b,
            transpose_a = const $transpose_a,
            transpose_b = const $transpose_b,
            options(nostack),
        )
    };
    (@mma $dtype:literal, $n:tt, $predicate:literal) => {
        concat!(
            "wgmma.mma_async.sync.aligned.m64n", $n, "k16.f32.", $dtype, ".", $dtype, " ",
            $crate::ptx::wgmma::accumulator_operands!($n),
            ", a, b, ", $predicate, ", 1, 1, {transpose_a}, {transpose_b};"
        )
    };
}

/// As [`wgmma_k64`] for two m64n128 tiles below each other, with the same `$b`: first the upper 64
/// accumulators, then the lower. The lower rows of A are `$below` further on, in units of 16 bytes.
macro_rules! wgmma_two_k64 {
    ($dtype:literal, $transpose_a:expr, $transpose_b:expr, $step_a:expr, $step_b:expr,
     $below:expr, $a:expr, $b:expr, $accumulate:expr, $($c:ident)+) => {
        core::arch::asm!(
            "{{",
            ".reg .pred first, rest;",
            ".reg .b64 a, b, below;",
            "setp.ne.b32 first, {accumulate}, 0;",
            "setp.eq.b32 rest, 0, 0;",
            "mov.b64 a, {a};",
            "mov.b64 b, {b};",
            "wgmma.fence.sync.aligned;",
            $crate::ptx::wgmma::wgmma_two_k64!(@mma $dtype, "first"),
            $crate::ptx::wgmma::wgmma_two_k64!(@next $dtype),
            $crate::ptx::wgmma::wgmma_two_k64!(@next $dtype),
            $crate::ptx::wgmma::wgmma_two_k64!(@next $dtype),
            "wgmma.commit_group.sync.aligned;",
            "wgmma.wait_group.sync.aligned 1;",
            "}}",
            $(inout(reg32) $c,)+
            a = in(reg64) $a,
            b = in(reg64) $b,
            accumulate = in(reg32) $accumulate,
            step_a = const $step_a,
            step_b = const $step_b,
            below = const $below,
            transpose_a = const $transpose_a,
            transpose_b = const $transpose_b,
            options(nostack),
        )
    };
    (@next $dtype:literal) => {
        concat!(
            "add.s64 a, a, {step_a};\n",
            "add.s64 b, b, {step_b};\n",
            $crate::ptx::wgmma::wgmma_two_k64!(@mma $dtype, "rest"),
        )
    };
    (@mma $dtype:literal, $predicate:literal) => {
        concat!(
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.", $dtype, ".", $dtype, " ",
            $crate::ptx::wgmma::accumulator_operands!(128),
            ", a, b, ", $predicate, ", 1, 1, {transpose_a}, {transpose_b};\n",
            "add.s64 below, a, {below};\n",
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.", $dtype, ".", $dtype, " ",
            $crate::ptx::wgmma::accumulator_operands!(lower 128),
            ", below, b, ", $predicate, ", 1, 1, {transpose_a}, {transpose_b};"
        )
    };
}

/// Adds 64 k of an MN-major slab to its sums over k, as four `wgmma.mma_async.m64n8k16` with a
/// second operand of ones and a commit. They complete after a later wait.
///
/// `$a` is the descriptor of the slab's first k16, `$ones` that of 16 by 8 ones. `$accumulate` 0
/// overwrites the sums: accumulators 0 and 1 of one row, 2 and 3 of the row 8 below.
macro_rules! wgmma_sums_k64 {
    ($dtype:literal, $a:expr, $ones:expr, $accumulate:expr, $($s:ident)+) => {
        core::arch::asm!(
            "{{",
            ".reg .pred first, rest;",
            ".reg .b64 a;",
            "setp.ne.b32 first, {accumulate}, 0;",
            "setp.eq.b32 rest, 0, 0;",
            "mov.b64 a, {a};",
            "wgmma.fence.sync.aligned;",
            $crate::ptx::wgmma::wgmma_sums_k64!(@mma $dtype, "first"),
            "add.s64 a, a, {step};",
            $crate::ptx::wgmma::wgmma_sums_k64!(@mma $dtype, "rest"),
            "add.s64 a, a, {step};",
            $crate::ptx::wgmma::wgmma_sums_k64!(@mma $dtype, "rest"),
            "add.s64 a, a, {step};",
            $crate::ptx::wgmma::wgmma_sums_k64!(@mma $dtype, "rest"),
            "wgmma.commit_group.sync.aligned;",
            "}}",
            $(inout(reg32) $s,)+
            a = in(reg64) $a,
            ones = in(reg64) $ones,
            accumulate = in(reg32) $accumulate,
            step = const $crate::smem_layout::descriptor_step_k16($crate::smem_layout::Major::MN),
            options(nostack),
        )
    };
    (@mma $dtype:literal, $predicate:literal) => {
        concat!(
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.", $dtype, ".", $dtype,
            " {{{0}, {1}, {2}, {3}}}, a, {ones}, ", $predicate, ", 1, 1, 1, 0;"
        )
    };
}

/// Ties the sums of [`wgmma_sums_k64`] to a point where every wgmma has completed.
macro_rules! wgmma_wait_sums {
    ($($s:ident)+) => {
        core::arch::asm!(
            "wgmma.wait_group.sync.aligned 0; // {0} {1} {2} {3} {4} {5} {6} {7}",
            $(inout(reg32) $s,)+
            options(nostack),
        )
    };
}

/// As [`with_accumulators`] for 128 columns, with three accumulators for each element: two that
/// tensor cores fill in turn, and one that collects them.
macro_rules! with_promoted_accumulators {
    ($($callback:ident)::+ ! { $($arguments:tt)* }) => {
        $($callback)::+! {
            $($arguments)*
            [(c0 d0 s0) (c1 d1 s1) (c2 d2 s2) (c3 d3 s3) (c4 d4 s4) (c5 d5 s5) (c6 d6 s6) (c7 d7 s7)]
            [(c8 d8 s8) (c9 d9 s9) (c10 d10 s10) (c11 d11 s11) (c12 d12 s12) (c13 d13 s13) (c14 d14 s14) (c15 d15 s15)]
            [(c16 d16 s16) (c17 d17 s17) (c18 d18 s18) (c19 d19 s19) (c20 d20 s20) (c21 d21 s21) (c22 d22 s22) (c23 d23 s23)]
            [(c24 d24 s24) (c25 d25 s25) (c26 d26 s26) (c27 d27 s27) (c28 d28 s28) (c29 d29 s29) (c30 d30 s30) (c31 d31 s31)]
            [(c32 d32 s32) (c33 d33 s33) (c34 d34 s34) (c35 d35 s35) (c36 d36 s36) (c37 d37 s37) (c38 d38 s38) (c39 d39 s39)]
            [(c40 d40 s40) (c41 d41 s41) (c42 d42 s42) (c43 d43 s43) (c44 d44 s44) (c45 d45 s45) (c46 d46 s46) (c47 d47 s47)]
            [(c48 d48 s48) (c49 d49 s49) (c50 d50 s50) (c51 d51 s51) (c52 d52 s52) (c53 d53 s53) (c54 d54 s54) (c55 d55 s55)]
            [(c56 d56 s56) (c57 d57 s57) (c58 d58 s58) (c59 d59 s59) (c60 d60 s60) (c61 d61 s61) (c62 d62 s62) (c63 d63 s63)]
        }
    };
}

/// One stage of 32 k of operands in bf16 parts, 128 columns: the named products of parts, the
/// smallest first, and a commit; then a wait until at most this batch is in flight.
///
/// `$a` and `$b` are descriptors of the first k16 of the first part; parts follow each other at
/// distances of `$part_a` and `$part_b`, k16 at `$step_a` and `$step_b`, in units of 16 bytes.
/// `$transpose_a` and `$transpose_b` are 1 for an MN-major operand. `$c` are overwritten, and complete after a later wait;
/// `$done` are those of the batch before, complete now.
macro_rules! wgmma_parts_k32 {
    ($products:ident, $transpose_a:expr, $transpose_b:expr, $step_a:expr, $step_b:expr,
     $part_a:expr, $part_b:expr, $a:expr, $b:expr, [$($c:ident)+], [$($done:ident)+]) => {
        core::arch::asm!(
            "{{",
            ".reg .pred first, rest;",
            ".reg .b64 a, b;",
            "setp.ne.b32 first, 0, 0;",
            "setp.eq.b32 rest, 0, 0;",
            "wgmma.fence.sync.aligned;",
            $crate::ptx::wgmma::wgmma_parts_k32!(@$products),
            "wgmma.commit_group.sync.aligned;",
            "wgmma.wait_group.sync.aligned 1;",
            concat!("// ", $crate::ptx::wgmma::accumulator_operands!(256)),
            "}}",
            $(inout(reg32) $c,)+
            $(inout(reg32) $done,)+
            a = in(reg64) $a,
            b = in(reg64) $b,
            part_a = const $part_a,
            part_b = const $part_b,
            step_a = const $step_a,
            step_b = const $step_b,
            transpose_a = const $transpose_a,
            transpose_b = const $transpose_b,
            options(nostack),
        )
    };
    (@six) => {
        concat!(
            $crate::ptx::wgmma::wgmma_parts_k32!(@product 2, 0, "first"),
            $crate::ptx::wgmma::wgmma_parts_k32!(@product 0, 2, "rest"),
            $crate::ptx::wgmma::wgmma_parts_k32!(@product 1, 1, "rest"),
            $crate::ptx::wgmma::wgmma_parts_k32!(@product 1, 0, "rest"),
            $crate::ptx::wgmma::wgmma_parts_k32!(@product 0, 1, "rest"),
            $crate::ptx::wgmma::wgmma_parts_k32!(@product 0, 0, "rest"),
        )
    };
    (@three) => {
        concat!(
            $crate::ptx::wgmma::wgmma_parts_k32!(@product 1, 0, "first"),
            $crate::ptx::wgmma::wgmma_parts_k32!(@product 0, 1, "rest"),
            $crate::ptx::wgmma::wgmma_parts_k32!(@product 0, 0, "rest"),
        )
    };
    (@product $i:literal, $j:literal, $predicate:literal) => {
        concat!(
            "add.s64 a, {a}, ", $i, "*{part_a};\n",
            "add.s64 b, {b}, ", $j, "*{part_b};\n",
            $crate::ptx::wgmma::wgmma_parts_k32!(@mma $predicate),
            "add.s64 a, a, {step_a};\n",
            "add.s64 b, b, {step_b};\n",
            $crate::ptx::wgmma::wgmma_parts_k32!(@mma "rest"),
        )
    };
    (@mma $predicate:literal) => {
        concat!(
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 ",
            $crate::ptx::wgmma::accumulator_operands!(128),
            ", a, b, ", $predicate, ", 1, 1, {transpose_a}, {transpose_b};\n"
        )
    };
}

/// One stage of 32 k of f32 operands as four `wgmma.mma_async.m64nNk8` in TF32 and a commit, then a
/// wait until at most this batch is in flight. Both operands are K-major, which is what there is.
///
/// `$a` and `$b` are descriptors of the stage's first k8. `$accumulate` 0 overwrites the
/// accumulators. The tensor cores take no notice of the lower 13 bits of an element.
macro_rules! wgmma_tf32_k32 {
    ($n:tt, $a:expr, $b:expr, $accumulate:expr, $($c:ident)+) => {
        core::arch::asm!(
            "{{",
            ".reg .pred first, rest;",
            ".reg .b64 a, b;",
            "setp.ne.b32 first, {accumulate}, 0;",
            "setp.eq.b32 rest, 0, 0;",
            "mov.b64 a, {a};",
            "mov.b64 b, {b};",
            "wgmma.fence.sync.aligned;",
            $crate::ptx::wgmma::wgmma_tf32_k32!(@mma $n, "first"),
            "add.s64 a, a, 2;",
            "add.s64 b, b, 2;",
            $crate::ptx::wgmma::wgmma_tf32_k32!(@mma $n, "rest"),
            "add.s64 a, a, 2;",
            "add.s64 b, b, 2;",
            $crate::ptx::wgmma::wgmma_tf32_k32!(@mma $n, "rest"),
            "add.s64 a, a, 2;",
            "add.s64 b, b, 2;",
            $crate::ptx::wgmma::wgmma_tf32_k32!(@mma $n, "rest"),
            "wgmma.commit_group.sync.aligned;",
            "wgmma.wait_group.sync.aligned 1;",
            "}}",
            $(inout(reg32) $c,)+
            a = in(reg64) $a,
            b = in(reg64) $b,
            accumulate = in(reg32) $accumulate,
            options(nostack),
        )
    };
    (@mma $n:tt, $predicate:literal) => {
        concat!(
            "wgmma.mma_async.sync.aligned.m64n", $n, "k8.f32.tf32.tf32 ",
            $crate::ptx::wgmma::accumulator_operands!($n),
            ", a, b, ", $predicate, ", 1, 1;"
        )
    };
}

/// As [`wgmma_tf32_k32`] with the first operand in registers, so that it may lie in memory either
/// way: `$a`, the fragments of four k8 of four registers each, which nothing may write before the
/// batch is complete. `$done` are those of the batch before, complete now.
macro_rules! wgmma_tf32_registers_k32 {
    ($n:tt, [$a0:ident $a1:ident $a2:ident $a3:ident $a4:ident $a5:ident $a6:ident $a7:ident
     $a8:ident $a9:ident $a10:ident $a11:ident $a12:ident $a13:ident $a14:ident $a15:ident],
     [$d0:ident $d1:ident $d2:ident $d3:ident $d4:ident $d5:ident $d6:ident $d7:ident
     $d8:ident $d9:ident $d10:ident $d11:ident $d12:ident $d13:ident $d14:ident $d15:ident],
     $b:expr, $accumulate:expr, $($c:ident)+) => {
        core::arch::asm!(
            "{{",
            ".reg .pred first, rest;",
            ".reg .b64 b;",
            "setp.ne.b32 first, {accumulate}, 0;",
            "setp.eq.b32 rest, 0, 0;",
            "mov.b64 b, {b};",
            "wgmma.fence.sync.aligned;",
            $crate::ptx::wgmma::wgmma_tf32_registers_k32!(@mma $n, "{{{a0}, {a1}, {a2}, {a3}}}", "first"),
            "add.s64 b, b, 2;",
            $crate::ptx::wgmma::wgmma_tf32_registers_k32!(@mma $n, "{{{a4}, {a5}, {a6}, {a7}}}", "rest"),
            "add.s64 b, b, 2;",
            $crate::ptx::wgmma::wgmma_tf32_registers_k32!(@mma $n, "{{{a8}, {a9}, {a10}, {a11}}}", "rest"),
            "add.s64 b, b, 2;",
            $crate::ptx::wgmma::wgmma_tf32_registers_k32!(@mma $n, "{{{a12}, {a13}, {a14}, {a15}}}", "rest"),
            "wgmma.commit_group.sync.aligned;",
            "wgmma.wait_group.sync.aligned 1;",
            "// {d0} {d1} {d2} {d3} {d4} {d5} {d6} {d7} {d8} {d9} {d10} {d11} {d12} {d13} {d14} {d15}",
            "}}",
            $(inout(reg32) $c,)+
            a0 = inout(reg32) $a0, a1 = inout(reg32) $a1, a2 = inout(reg32) $a2,
            a3 = inout(reg32) $a3, a4 = inout(reg32) $a4, a5 = inout(reg32) $a5,
            a6 = inout(reg32) $a6, a7 = inout(reg32) $a7, a8 = inout(reg32) $a8,
            a9 = inout(reg32) $a9, a10 = inout(reg32) $a10, a11 = inout(reg32) $a11,
            a12 = inout(reg32) $a12, a13 = inout(reg32) $a13, a14 = inout(reg32) $a14,
            a15 = inout(reg32) $a15,
            d0 = inout(reg32) $d0, d1 = inout(reg32) $d1, d2 = inout(reg32) $d2,
            d3 = inout(reg32) $d3, d4 = inout(reg32) $d4, d5 = inout(reg32) $d5,
            d6 = inout(reg32) $d6, d7 = inout(reg32) $d7, d8 = inout(reg32) $d8,
            d9 = inout(reg32) $d9, d10 = inout(reg32) $d10, d11 = inout(reg32) $d11,
            d12 = inout(reg32) $d12, d13 = inout(reg32) $d13, d14 = inout(reg32) $d14,
            d15 = inout(reg32) $d15,
            b = in(reg64) $b,
            accumulate = in(reg32) $accumulate,
            options(nostack),
        )
    };
    (@mma $n:tt, $a:literal, $predicate:literal) => {
        concat!(
            "wgmma.mma_async.sync.aligned.m64n", $n, "k8.f32.tf32.tf32 ",
            $crate::ptx::wgmma::accumulator_operands!($n),
            ", ", $a, ", b, ", $predicate, ", 1, 1;"
        )
    };
}

/// Waits for every wgmma in flight and ties the accumulators to that point.
macro_rules! wgmma_wait_all {
    ($n:tt, $($c:ident)+) => {
        core::arch::asm!(
            "wgmma.wait_group.sync.aligned 0;",
            concat!("// ", $crate::ptx::wgmma::accumulator_operands!($n)),
            $(inout(reg32) $c,)+
            options(nostack),
        )
    };
}

pub(crate) use {
    accumulator_operands, wgmma_k64, wgmma_parts_k32, wgmma_sums_k64, wgmma_tf32_k32,
    wgmma_tf32_registers_k32, wgmma_two_k64, wgmma_wait_all, wgmma_wait_sums, with_accumulators,
    with_promoted_accumulators,
};
