//! Text to running code, and what is said when a text is wrong.

use crate::kit::{Loaded, targets};
use pleach_codegen::emit::func::{Func, vty};
use pleach_codegen::{CodegenError, HostTarget, link, mlir};

fn row_sum() -> String {
    let mut f = Func::host_kernel("row_sum");
    let (x, y, n) = (f.buffer(0), f.buffer(1), f.dim(0));
    let (first, last, zero) = (f.arg("first"), f.arg("last"), f.i64(0));
    let v = vty(16, "f32");
    f.loop_(&first, &last, 1, |f, row| {
        let base = f.mul(row, &n);
        let init = f.f32(0.0, 16);
        let sum = f.for_(&zero, &n, 16, &[(init, v.clone())], |f, i, acc| {
            let at = f.add(&base, i);
            let p = f.gep(&x, &at, "f32");
            let left = f.sub(&n, i);
            let mask = f.lane_mask(&left, 16);
            let t = f.masked_load(&p, &mask, "f32", 16);
            vec![f.op(format!("arith.addf {}, {t} : {}", acc[0], vty(16, "f32")))]
        });
        let s = f.op(format!("vector.reduction <add>, {} : {v} into f32", sum[0]));
        f.store_at(&s, &y, row, "f32", 1);
    });
    f.text()
}

#[test]
fn a_row_sum_runs() {
    for target in targets() {
        let lib = Loaded::new(&row_sum(), &target);
        let (rows, n) = (5usize, 37usize);
        let mut x: Vec<f32> = (0..rows * n).map(|i| (i % 11) as f32 - 3.0).collect();
        let mut y = vec![0f32; rows];
        let buffers = [x.as_mut_ptr().cast::<u8>(), y.as_mut_ptr().cast()];
        lib.run("row_sum", &buffers, &[n as i64], (0, rows as u64), 0);
        let want: Vec<f32> = x.chunks(n).map(|r| r.iter().sum()).collect();
        assert_eq!(y, want);
    }
}

#[test]
fn bytes_are_the_same_for_any_number_of_threads() {
    let Some(target) = HostTarget::detect() else { return };
    let texts: Vec<(String, String)> =
        (0..6).map(|i| (format!("k{i}"), row_sum().replace("row_sum", &format!("k{i}")))).collect();
    let one: Vec<Vec<u8>> = mlir::compile_parallel(&texts, &target, 1).into_iter().map(Result::unwrap).collect();
    let two: Vec<Vec<u8>> = mlir::compile_parallel(&texts, &target, 3).into_iter().map(Result::unwrap).collect();
    assert_eq!(one, two);
    assert_eq!(link::link(&one).unwrap(), link::link(&two).unwrap());
}

#[test]
fn faults_name_the_place() {
    let target = HostTarget::avx2();
    let e = mlir::compile_object("func.func @f() {\n  %0 = arith.addi %x, %x : i64\n  return\n}", &target).unwrap_err();
    let CodegenError::Lowering { stage, why } = &e else { panic!("{e}") };
    assert_eq!(*stage, "parse");
    assert!(why.contains("2:") && why.contains("undeclared"), "{why}");
    let e = mlir::compile_object("func.func @f(%m: memref<?xf32>) -> f32 { %c = arith.constant 0 : index %0 = memref.load %m[%c] : memref<?xf32> return %0 : f32 }", &target).unwrap_err();
    assert!(matches!(&e, CodegenError::Lowering { stage: "translation", .. }), "{e}");
    let text = "func.func private @absent(f32) -> f32\nfunc.func @f(%x: f32) -> f32 { %0 = call @absent(%x) : (f32) -> f32 return %0 : f32 }";
    let object = mlir::compile_object(text, &target).unwrap();
    let e = link::link(&[object]).unwrap_err();
    assert!(e.to_string().contains("absent"), "{e}");
}

#[test]
fn products_and_sums_are_not_fused() {
    let text = "func.func @f(%a: f32, %b: f32, %c: f32) -> f32 { %0 = arith.mulf %a, %b : f32 %1 = arith.addf %0, %c : f32 return %1 : f32 }";
    let asm = mlir::assembly(text, &HostTarget::avx512()).unwrap();
    assert!(asm.contains("vmulss") && asm.contains("vaddss") && !asm.contains("vfmadd"), "{asm}");
    assert!(mlir::lowered_llvm(text, &HostTarget::avx2()).unwrap().contains("define float @f"));
    assert!(mlir::lowered_mlir(text).unwrap().contains("llvm.fmul"));
}

#[test]
fn ptx_of_a_small_kernel() {
    let text = "module attributes {gpu.container_module} { gpu.module @kernels {
  llvm.func @scale(%x: !llvm.ptr<1>, %n: i64) attributes {nvvm.kernel} {
    %c0 = arith.constant 0 : i64
    %c1 = arith.constant 1 : i64
    %k = arith.constant 2.0 : f32
    scf.for %i = %c0 to %n step %c1 : i64 {
      %p = llvm.getelementptr %x[%i] : (!llvm.ptr<1>, i64) -> !llvm.ptr<1>, f32
      %v = llvm.load %p : !llvm.ptr<1> -> f32
      %w = math.fma %v, %k, %k : f32
      llvm.store %w, %p : f32, !llvm.ptr<1>
    }
    llvm.return
  }
} }";
    let ptx = mlir::compile_ptx(text, "sm_80").unwrap();
    assert!(ptx.contains(".target sm_80") && ptx.contains(".entry scale") && ptx.contains("fma.rn.f32"), "{ptx}");
    assert!(mlir::compile_ptx(text, "sm_9").unwrap_err().to_string().contains("sm_80"));
}
