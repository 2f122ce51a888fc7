//! The text form: what dumps show, golden files hold and `pleach opt` reads.
//!
//! ```text
//! graph core
//! param @0 "model.norm.weight" f32[64] frozen checkpoint("model.norm.weight")
//! param @1 "slot0.q.lora_A" f32[4,64] frozen adapter(0, "q.lora_A")
//! param @2 "cache.0.k" f32[C,32] state zeros
//! entry "infer" {
//!   %0 = input "x" : f32[T,64]
//!   %1 = param @0 : f32[64]
//!   %2 = const 1e-5 : f32[]
//!   %3 = broadcast(%1) {axes = [1]} : f32[T,64]
//!   %4 = mul(%0, %3) : f32[T,64] from "model.norm"
//!   output "y" %4
//! }
//! ```
//!
//! `parse(print(g)) == g` holds for every graph made through [`crate::Entry::push`]. A value's number is its position;
//! its type is written out and, on reading, compared with what the operator gives. Shapes that an operator carries as an
//! attribute (`input`, `const`, `iota`, `reshape`, `broadcast`, `cast`) are read from that type. Constants are exact:
//! decimal where that is so, else `0x…`, the bits of the element. `//` begins a comment.
//!
//! Reading takes time and memory in proportion to the text, whatever the text says. Kernels and schedules have a printed
//! form too, in one direction.

mod lex;
mod ops;
mod parse;
mod print;
mod schedule;
#[cfg(test)]
mod tests;

pub use parse::parse;
pub use print::{Place, lines, print, print_attributes, print_entry, print_node, print_param, quote};
pub use schedule::{print_kernel, print_layout, print_schedule};
