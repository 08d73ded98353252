#![doc = include_str!("../README.md")]

pub use kasmina_host::*;
