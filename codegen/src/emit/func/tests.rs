//! Lines and the values that they are written for.

use super::*;
use pleach_ir::{Class, DType, Dim, Entry, Kernel, Layout, Op};

#[test]
fn lines_name_the_values_they_are_for() {
    let mut body = Entry::new("kernel");
    let input = |n: &str| Op::Input { name: n.into(), dtype: DType::F32, shape: vec![Dim::Known(4)] };
    let (a, b) = (body.push(&[], input("a0"), &[]).unwrap(), body.push(&[], input("a1"), &[]).unwrap());
    let sum = body.push(&[], Op::Add, &[a, b]).unwrap();
    body.output("r0", sum);
    let k = Kernel {
        name: "k".into(),
        class: Class::Row,
        body,
        operands: vec![Layout::RowMajor; 2],
        results: vec![Layout::RowMajor],
        aliases: vec![Some(1)],
    };
    let of = |f: &Func, word: &str| -> Vec<ValueId> {
        let text = f.text();
        values_of(text.lines().find(|l| l.contains(word)).unwrap()).collect()
    };
    let mut f = Func::host_kernel("k");
    f.is_for(&k, &[]);
    let x = f.buffer(0);
    f.buffer(2);
    let y = f.of(&[sum], |f| f.load(&x, "f32"));
    f.of(&[a, sum], |f| f.stmt(&format!("\"both\"({y})")));
    f.stmt("\"none\"()");
    // An operand's buffer, a result's with what it lies over, and what was said.
    assert_eq!(of(&f, "llvm.load %buffers"), [a]);
    assert_eq!(of(&f, "getelementptr %buffers[2]"), [sum, b]);
    assert_eq!((of(&f, "llvm.load %v1 "), of(&f, "both"), of(&f, "none")), (vec![sum], vec![a, sum], vec![]));
    // Parameters of a GPU's kernel, and what a tensor map shows.
    let mut f = Func::new("k", &[("p0", "!llvm.ptr"), ("p1", "!llvm.ptr"), ("map0", "!llvm.ptr")]);
    f.gpu = true;
    f.is_for(&k, &[sum]);
    f.maps = vec![1];
    let p = f.arg("p0");
    f.load(&p, "f32");
    f.stmt("\"copy\"(%map0, %p10)");
    assert_eq!((of(&f, "llvm.load"), of(&f, "copy")), (vec![sum, a], vec![sum, b]));
}
