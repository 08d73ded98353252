//! Repetition by the macro expander.

/// Repeats a block with a name bound to each literal. A loop would be unrolled too late (or not
/// at all) for the arrays it indexes to become registers.
macro_rules! unroll {
    ($index:ident: $type:ident in [$($literal:literal)+] $body:block) => {
        $({
            let $index: $type = $literal;
            $body
        })+
    };
}
pub(crate) use unroll;
