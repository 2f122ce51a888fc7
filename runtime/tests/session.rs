//! Sessions on the toy decoder: results, thread counts, slots, generation, refusals.

mod common;

use common::*;
use pleach_plan::{Plan, Residency};
use pleach_runtime::*;
use std::ops::ControlFlow;
use std::sync::Arc;

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn infer_gives_what_it_must_for_packed_sequences() {
    let mut s = session(2);
    let sequences = [vec![3, 1, 4, 1, 5], vec![9], vec![2, 6, 5, 3, 5, 8, 9, 7]];
    let out = s.infer(&sequences, None).unwrap();
    assert_eq!(out.get("logits").unwrap().shape, [14, V as u64]);
    let want: Vec<f32> = sequences.iter().flat_map(|s| expected(s, None)).collect();
    close(out.f32("logits").unwrap(), &want);
    assert!(out.f32("nothing").is_err());
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let ids: Vec<i32> = (0..24).map(|i| i * 7 % V as i32).collect();
    let mut all = vec![];
    for threads in [1, 2, 3, 4, 7] {
        let mut s = session(threads);
        assert_eq!(s.threads(), threads);
        s.load_slot(0, &adapter(10)).unwrap();
        for _ in 0..50 {
            all.push(bits(s.infer(&[&ids[..]], None).unwrap().f32("logits").unwrap()));
        }
    }
    assert!(all.iter().all(|b| *b == all[0]));
}

#[test]
fn a_slot_is_swapped_in_place_and_a_misfit_changes_nothing() {
    let mut s = session(2);
    let ids = [vec![1, 2, 3]];
    let run = |s: &mut Session| s.infer(&ids, None).unwrap().f32("logits").unwrap().to_vec();
    let base = run(&mut s);
    let address = s.address_of("slot0.merged").unwrap();
    s.load_slot(0, &adapter(10)).unwrap();
    let first = run(&mut s);
    close(&first, &expected(&ids[0], Some(10)));
    assert_ne!(bits(&first), bits(&base));
    // Wrong shape, missing, unknown, wrong type: refused by name, and the old adapter stays.
    let cases: [(InMemory, &str); 4] = [
        (
            adapter(20).f32("head.lora_A", &[3, D as u64], &noise(3 * D, 20)),
            "`head.lora_A` is [3, 8], the plan expects [2, 8]",
        ),
        (InMemory::new().f32("head.scale", &[], &[1.0]), "`head.lora_B` is missing"),
        (
            adapter(20).f32("head.lora_C", &[1], &[0.0]),
            "`head.lora_C` is not one of this slot (nearest: `head.lora_A`)",
        ),
        (
            {
                let mut a = adapter(20);
                a.insert("head.scale", plan::DType::I32, &[], vec![0; 4]);
                a
            },
            "`head.scale` is i32, the plan expects f32",
        ),
    ];
    for (bad, why) in cases {
        let e = s.load_slot(0, &bad).unwrap_err().to_string();
        assert!(e.contains(why), "{e}");
        assert_eq!(bits(&run(&mut s)), bits(&first));
    }
    let e = s.load_slot(7, &adapter(20)).unwrap_err().to_string();
    assert!(e.contains("no such slot; it has [0]"), "{e}");
    s.load_slot(0, &adapter(30)).unwrap();
    close(&run(&mut s), &expected(&ids[0], Some(30)));
    assert_eq!(s.address_of("slot0.merged").unwrap(), address);
    s.clear_slot(0).unwrap();
    assert_eq!(bits(&run(&mut s)), bits(&base));
    let keys: Vec<String> = s.slot_keys(0).into_iter().map(|k| k.0).collect();
    assert_eq!(keys, ["head.lora_A", "head.lora_B", "head.scale"]);
}

#[test]
fn generation_agrees_with_running_from_the_start() {
    let prompts = vec![vec![1, 2, 3, 4, 5], vec![7], vec![30, 20, 10, 5, 3, 2, 1, 0]];
    let params = GenerateParams { max_new_tokens: 9, eos: vec![V as i32 - 1], ..GenerateParams::default() };
    for adapter_salt in [None, Some(10)] {
        // 5+8, 1+8, 8+8 slots: all in one group of 40; with T = 24 in one chunk.
        let mut s = session(2);
        if let Some(a) = adapter_salt {
            s.load_slot(0, &adapter(a)).unwrap();
        }
        let mut heard = vec![vec![]; 3];
        let got = generate(&mut s, &prompts, &params, &mut |i, id| {
            heard[i].push(id);
            ControlFlow::Continue(())
        })
        .unwrap();
        for (i, p) in prompts.iter().enumerate() {
            assert_eq!(got.ids[i], greedy(p, 9, adapter_salt), "prompt {i}");
        }
        assert_eq!(heard, got.ids);
        assert_eq!(got.stats.prompt_tokens, 14);
        assert_eq!(got.stats.decode_tokens, got.ids.iter().map(|v| v.len() as u64 - 1).sum::<u64>());
    }
}

#[test]
fn generation_with_small_capacities_takes_chunks_and_groups() {
    let prompts: Vec<Vec<i32>> = (0..6).map(|i| (0..5 + i).map(|j| (i * 11 + j * 3) % 36).collect()).collect();
    let params = GenerateParams { max_new_tokens: 6, ..GenerateParams::default() };
    let open = |t, s, c| {
        let o = Options::default().threads(2).capacity("T", t).capacity("S", s).capacity("C", c);
        Session::open(Arc::new(plan()), Arc::new(weights()), &o).unwrap()
    };
    let want: Vec<Vec<i32>> = prompts
        .iter()
        .map(|p| {
            let mut ids = p.clone();
            for _ in 0..6 {
                let all = expected(&ids, None);
                let row = &all[all.len() - V..];
                ids.push((0..V).fold(0, |b, j| if row[j] > row[b] { j } else { b }) as i32);
            }
            ids[p.len()..].to_vec()
        })
        .collect();
    for (t, s, c) in [(3, 2, 40), (1, 1, 15), (24, 6, 200), (7, 6, 90)] {
        let got = generate(&mut open(t, s, c), &prompts, &params, &mut |_, _| ControlFlow::Continue(())).unwrap();
        assert_eq!(got.ids, want, "T = {t}, S = {s}, C = {c}");
    }
    // A prompt that cannot fit is refused before anything is generated.
    let e = generate(&mut open(24, 6, 14), &prompts, &params, &mut |_, _| panic!("nothing may run")).unwrap_err();
    assert!(e.to_string().contains("prompt 5 has 10 ids and 6 new ones are asked for: 15 places"), "{e}");
    let e =
        generate(&mut open(24, 6, 90), &[vec![1], vec![]], &params, &mut |_, _| panic!("nothing may run")).unwrap_err();
    assert!(e.to_string().contains("prompt 1 is empty"), "{e}");
    let e = generate(&mut open(24, 6, 90), &[vec![1, 99]], &params, &mut |_, _| panic!("nothing may run")).unwrap_err();
    assert!(e.to_string().contains("the id 99"), "{e}");
}

#[test]
fn generation_stops_at_any_eos_and_when_told() {
    let mut s = session(2);
    let first = greedy(&[1, 2, 3], 9, None);
    let params = GenerateParams { max_new_tokens: 9, eos: vec![35, first[2]], ..GenerateParams::default() };
    let got = generate(&mut s, &[vec![1, 2, 3]], &params, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let end = first.iter().position(|x| *x == first[2]).unwrap();
    assert_eq!(got.ids[0], first[..=end]);
    let params = GenerateParams { max_new_tokens: 9, ..GenerateParams::default() };
    let mut n = 0;
    let got = generate(&mut s, &[vec![1, 2, 3]], &params, &mut |_, _| {
        n += 1;
        if n == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .unwrap();
    assert_eq!(got.ids[0], first[..2]);
}

#[test]
fn sampling_depends_on_the_seed_and_the_prompt_alone() {
    let sampling = Sampling { temperature: 1.5, top_p: 0.95, seed: 3 };
    let params = GenerateParams { max_new_tokens: 12, sampling, eos: vec![] };
    let prompts = vec![vec![1, 2, 3], vec![4, 5], vec![1, 2, 3]];
    let run = |s: &mut Session, p: &GenerateParams| {
        generate(s, &prompts, p, &mut |_, _| ControlFlow::Continue(())).unwrap().ids
    };
    let o = Options::default().capacity("T", 3).capacity("S", 1).capacity("C", 15);
    let mut narrow = Session::open(Arc::new(plan()), Arc::new(weights()), &o.threads(1)).unwrap();
    let a = run(&mut session(2), &params);
    assert_eq!(a, run(&mut narrow, &params));
    assert_ne!(a[0], a[2], "equal prompts are different streams");
    let other = GenerateParams { sampling: Sampling { seed: 4, ..sampling }, ..params };
    assert_ne!(a, run(&mut narrow, &other));
}

#[test]
fn no_input_reads_outside() {
    let mut s = session(2);
    type Case<'a> = (&'a str, Vec<i32>, &'a str);
    let good: [(&str, Vec<i32>); 7] = [
        ("input_ids", vec![1, 2, 3]),
        ("positions", vec![0, 1, 0]),
        ("q_segments", vec![0, 2, 3]),
        ("kv_start", vec![0, 10]),
        ("kv_len", vec![2, 1]),
        ("slots", vec![0, 1, 10]),
        ("last", vec![1, 2]),
    ];
    let run = |s: &mut Session, change: &str, v: &[i32]| {
        let inputs: Vec<(&str, Values<'_>)> =
            good.iter().map(|(n, g)| (*n, Values::I32(if *n == change { v } else { g }))).collect();
        s.run("generate", &inputs).map(|_| ()).map_err(|e| e.to_string())
    };
    run(&mut s, "", &[]).unwrap();
    let cases: Vec<Case<'_>> = vec![
        ("input_ids", vec![1, 37, 3], "value 1 is 37"),
        ("input_ids", vec![1, -1, 3], "value 1 is -1"),
        ("input_ids", vec![1, 2], "`positions`"),
        ("positions", vec![0, 1, 64], "below 64"),
        ("q_segments", vec![0, 4, 3], "never fall"),
        ("q_segments", vec![1, 2, 3], "start at 0"),
        ("q_segments", vec![0, 2, 2], "end at 3"),
        ("q_segments", vec![], "at least 1"),
        ("kv_start", vec![-1, 10], "value 0 is -1"),
        ("kv_start", vec![0, i32::MAX], "below 41"),
        ("kv_len", vec![2, 31], "must lie within 40"),
        ("kv_len", vec![2, -1], "has length -1"),
        ("kv_len", vec![1, 1], "shorter than the 2 tokens"),
        ("slots", vec![0, 1, 40], "below 40"),
        ("slots", vec![0, 1, 1], "1 occurs twice"),
        ("last", vec![1, 3], "below 3"),
        ("last", vec![1], "`last`"),
    ];
    for (name, v, why) in cases {
        let e = run(&mut s, name, &v).unwrap_err();
        assert!(e.contains(why), "{name} {v:?}: {e}");
    }
    let e = s.run("generate", &[("input_ids", Values::I32(&[1]))]).unwrap_err().to_string();
    assert!(e.contains("input `positions` is missing"), "{e}");
    let e = s.run("infer", &[("ids", Values::I32(&[1]))]).unwrap_err().to_string();
    assert!(e.contains("takes no input `ids`; it takes input_ids, positions"), "{e}");
    let e = s.run("infer", &[("input_ids", Values::F32(&[1.0]))]).unwrap_err().to_string();
    assert!(e.contains("missing") || e.contains("is f32, give i32"), "{e}");
    assert!(s.run("prepare(base)", &[]).is_err());
    let e = s.run("train_step", &[]).unwrap_err().to_string();
    assert!(e.contains("no entry `train_step`; it has: prepare(base), prepare(slot0), infer, generate"), "{e}");
    let e = s.infer(&[vec![1; 25]], None).unwrap_err().to_string();
    assert!(e.contains("T is 25, the session was opened for 24"), "{e}");
    let e = s.infer::<Vec<i32>>(&[], None).unwrap_err().to_string();
    assert!(e.contains("0"), "{e}");
}

#[test]
fn opening_names_what_is_missing() {
    let open =
        |w: InMemory, o: &Options| Session::open(Arc::new(plan()), Arc::new(w), o).map(|_| ()).unwrap_err().to_string();
    let o = Options::default().capacity("T", 8).capacity("S", 1).capacity("C", 8);
    let e = open(InMemory::new().f32("emb", &[V as u64, D as u64], &noise(V * D, 1)).f32("heat", &[1], &[0.0]), &o);
    assert!(e.contains("no tensor `head` (nearest: `heat`)"), "{e}");
    let e = open(weights().f32("head", &[V as u64, 7], &noise(V * 7, 1)), &o);
    assert!(e.contains("tensor `head` is [37, 7], the plan expects [37, 8]"), "{e}");
    let e = open(weights(), &Options::default().capacity("T", 8));
    assert!(e.contains("capacity for S, C"), "{e}");
    let e = open(weights(), &Options::default().capacity("T", 0));
    assert!(e.contains("the capacity of T is 0"), "{e}");
    let huge =
        Options::default().capacity("T", i32::MAX as u64).capacity("S", i32::MAX as u64).capacity("C", i32::MAX as u64);
    let _ = Session::open(Arc::new(plan()), Arc::new(weights()), &huge);
    let mut p = plan();
    p.target.features.push("avx9000".into());
    let e = Session::open(Arc::new(p), Arc::new(weights()), &o).map(|_| ()).unwrap_err().to_string();
    assert!(e.contains("lacks avx9000"), "{e}");
    let mut p = plan();
    p.target.arch = "riscv64".into();
    let e = Session::open(Arc::new(p), Arc::new(weights()), &o).map(|_| ()).unwrap_err().to_string();
    assert!(e.contains("compiled for riscv64"), "{e}");
    // Host code that calls itself a GPU's: refused with a driver and without.
    let mut p = plan();
    p.target.arch = "sm_80".into();
    let e = Session::open(Arc::new(p), Arc::new(weights()), &o).map(|_| ()).unwrap_err().to_string();
    assert!(e.contains("GPU"), "{e}");
    let mut p = plan();
    p.kernels[0].symbol = "missing".into();
    let e = Session::open(Arc::new(p), Arc::new(weights()), &o).map(|_| ()).unwrap_err().to_string();
    assert!(e.contains("kernel missing"), "{e}");
    let mut p = plan();
    p.blobs[0].bytes.truncate(100);
    assert!(Session::open(Arc::new(p), Arc::new(weights()), &o).is_err());
}

#[test]
fn weights_in_half_precision_are_cast() {
    let half = |v: &[f32]| -> (Vec<u8>, Vec<f32>) {
        let h: Vec<u16> = v.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
        (
            h.iter().flat_map(|h| h.to_le_bytes()).collect(),
            h.iter().map(|h| f32::from_bits(u32::from(*h) << 16)).collect(),
        )
    };
    let mut cast = weights();
    let mut exact = weights();
    for (name, salt) in [("emb", 1), ("head", 2)] {
        let (bytes, values) = half(&noise(V * D, salt));
        cast.insert(name, plan::DType::BF16, &[V as u64, D as u64], bytes);
        exact = exact.f32(name, &[V as u64, D as u64], &values);
    }
    let o = Options::default().capacity("T", 8).capacity("S", 1).capacity("C", 8);
    let run = |w: InMemory| {
        let mut s = Session::open(Arc::new(plan()), Arc::new(w), &o).unwrap();
        bits(s.infer(&[[1, 2, 3]], None).unwrap().f32("logits").unwrap())
    };
    assert_eq!(run(cast), run(exact));
}

#[test]
fn residency_follows_use_and_memory_is_reported() {
    let p = plan();
    let of = |n: &str| p.params.iter().find(|x| x.name == n).unwrap().residency;
    assert_eq!(of("emb"), Residency::Mapped);
    assert_eq!(of("head"), Residency::PrepareOnly);
    assert_eq!(of("head.packed"), Residency::Owned);
    let s = session(1);
    let m = s.memory();
    assert_eq!((m.mapped, m.prepare_only), (V as u64 * D as u64 * 4, V as u64 * D as u64 * 4));
    for (name, total, bound) in &m.entries {
        assert!(total <= &m.arena && total == bound, "{name}: {total} over {bound}");
    }
    assert_eq!(s.address_of("head"), None);
}

#[test]
fn the_profile_counts_launches() {
    let mut s = session(1);
    s.infer(&[[1, 2, 3]], None).unwrap();
    assert!(s.profile().is_empty());
    s.set_profile(true);
    for _ in 0..3 {
        s.infer(&[[1, 2, 3]], None).unwrap();
    }
    let p = s.profile();
    assert_eq!(p.len(), 3);
    assert!(p.iter().all(|k| k.calls == 3 && k.flops == 3 * 3 * D as u64));
    // by step, and as a timeline: launches one after another
    let (steps, line) = (s.step_times(), s.timeline());
    assert_eq!((steps.len(), line.len()), (3, 9));
    for t in &steps {
        let of: Vec<u64> = line.iter().filter(|l| (l.entry, l.step) == (t.entry, t.step)).map(|l| l.ns).collect();
        assert_eq!((of.len() as u64, of.iter().sum::<u64>(), of.iter().min()), (t.calls, t.ns, Some(&t.least_ns)));
    }
    assert!(line.windows(2).all(|w| w[0].start_ns + w[0].ns <= w[1].start_ns));
    assert_eq!(steps.iter().map(|t| t.ns).sum::<u64>(), p.iter().map(|k| k.ns).sum::<u64>());
    s.set_profile(false);
    assert!(s.profile().is_empty() && s.timeline().is_empty());
}

#[test]
fn sessions_of_different_plans_live_side_by_side() {
    let mut a = session(1);
    let mut b = session(2);
    drop(session(1));
    let c: Plan = Plan::from_bytes(&plan().to_bytes().unwrap()).unwrap();
    let o = Options::default().capacity("T", 8).capacity("S", 1).capacity("C", 8);
    let mut c = Session::open(Arc::new(c), random_weights(&plan(), 1).unwrap(), &o).unwrap();
    close(a.infer(&[[1]], None).unwrap().f32("logits").unwrap(), &expected(&[1], None));
    close(b.infer(&[[2]], None).unwrap().f32("logits").unwrap(), &expected(&[2], None));
    assert!(c.infer(&[[2]], None).unwrap().f32("logits").unwrap().iter().all(|x| x.is_finite()));
    // A session may move to another thread.
    std::thread::spawn(move || c.infer(&[[1]], None).map(|_| ()).unwrap()).join().unwrap();
}
