//! `plan-memory` and `extract` on the public sets: bars in bytes and cost, never in time.

use crate::kit::{Folder, Pleach};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(path)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn buffers_are_placed_and_written() {
    let folder = Folder::new("plan-memory");
    let pleach = Pleach::new(&folder);
    let (file, out) = (data("memory/B.1048576.csv"), folder.join("out"));
    let said = pleach.call(&["plan-memory", text(&file), "--out", text(&out)]);
    assert_eq!(said.code, Some(0), "{}", said.err);
    let lines: Vec<&str> = said.out.lines().collect();
    assert_eq!(lines[0], "file,lower_bound,achieved,ms,optimal");
    let cells: Vec<&str> = lines[1].split(',').collect();
    assert_eq!((cells[0], cells[1], cells[2], cells[4]), (text(&file), "1048576", "1048576", "yes"));
    // Checked here once more: no two that are alive together share a byte.
    let written = std::fs::read_to_string(out.join("B.1048576.csv")).unwrap();
    assert_eq!(written.lines().next(), Some("id,lower,upper,size,offset"));
    let rows: Vec<Vec<u64>> =
        written.lines().skip(1).map(|l| l.split(',').map(|x| x.parse().unwrap()).collect()).collect();
    assert_eq!(rows.len(), 170);
    for (i, a) in rows.iter().enumerate() {
        assert!(a[4] + a[3] <= 1_048_576);
        for b in &rows[..i] {
            assert!(a[1] >= b[2] || b[1] >= a[2] || a[4] >= b[4] + b[3] || b[4] >= a[4] + a[3], "{a:?} {b:?}");
        }
    }
    let again = pleach.call(&["plan-memory", text(&file), "--out", text(&out)]);
    assert!(again.code == Some(1) && again.err.contains("--overwrite"));
    let said = pleach.call(&["plan-memory", text(&file), "--out", text(&out), "--overwrite", "--json"]);
    let value: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((value[0]["achieved"].as_u64(), value[0]["optimal"].as_bool()), (Some(1_048_576), Some(true)));
}

#[test]
fn a_damaged_file_of_buffers_is_refused_with_its_line() {
    let folder = Folder::new("plan-memory-damaged");
    let file = folder.join("x.csv");
    std::fs::write(&file, "id,lower,upper,size\n0,1,2,3\n1,2,1,3\n").unwrap();
    let out = folder.join("new/out");
    let said = Pleach::new(&folder).call(&["plan-memory", text(&file), "--out", text(&out)]);
    assert!(said.code == Some(1) && !folder.join("new").exists(), "what was begun is taken away again");
    let said = Pleach::new(&folder).call(&["plan-memory", text(&file)]);
    assert_eq!(said.code, Some(1));
    assert!(said.err.contains("x.csv: line 3: upper 1 is before lower 2"), "{}", said.err);
    let e = Pleach::new(&folder).fails(2, &["plan-memory", text(&file), "--out", text(&folder.0), "--overwrite"]);
    assert!(e.contains("is the file itself"), "{e}");
    let small = folder.join("y.10.csv");
    std::fs::write(&small, "id,lower,upper,size\n0,0,2,8\n1,1,3,8\n").unwrap();
    let said = Pleach::new(&folder).call(&["plan-memory", text(&small)]);
    assert!(said.code == Some(0) && said.err.contains("nothing fits into 10 bytes"), "{}", said.err);
}

#[cfg(target_os = "linux")]
#[test]
fn a_name_that_is_no_text_is_no_fault() {
    use std::os::unix::ffi::OsStrExt;
    let folder = Folder::new("no-utf8");
    let file = folder.0.join(std::ffi::OsStr::from_bytes(b"x\xff.csv"));
    std::fs::write(&file, "id,lower,upper,size\n0,1,2,3\n").unwrap();
    let call = |file: &Path| {
        let command = std::process::Command::new(env!("CARGO_BIN_EXE_pleach"))
            .args(["plan-memory", "--json"])
            .arg(file)
            .output()
            .unwrap();
        (command.status.code(), String::from_utf8(command.stdout).unwrap())
    };
    let (code, said) = call(&file);
    assert_eq!(code, Some(0));
    let v: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(v[0]["achieved"].as_u64(), Some(3));
}

#[test]
fn e_graphs_are_extracted_within_a_hundredth_of_the_best_known() {
    let folder = Folder::new("extract");
    let out = folder.join("out");
    for (name, best) in [("vgg", 4.85076), ("bert", 0.70472)] {
        let file = data(&format!("extraction/{name}.json.gz"));
        let said = Pleach::new(&folder).call(&["extract", text(&file), "--out", text(&out)]);
        assert_eq!(said.code, Some(0), "{}", said.err);
        let lines: Vec<&str> = said.out.lines().collect();
        assert_eq!(lines[0], "file,dag_cost,ms,optimal");
        let cells: Vec<&str> = lines[1].split(',').collect();
        let cost: f64 = cells[1].parse().unwrap();
        assert!(cells[0] == text(&file) && cost <= 1.01 * best, "{name}: {cost}");
        let written = std::fs::read_to_string(out.join(format!("{name}.json.gz"))).unwrap();
        assert_eq!(written, std::fs::read_to_string(out.join(format!("{name}.json"))).unwrap());
        let choices: Value = serde_json::from_str(&written).unwrap();
        let walked = walk(&file, &choices["choices"]);
        assert!((walked - cost).abs() < 1e-9, "{name}: {walked} is not {cost}");
    }
}

#[test]
fn a_result_under_its_plain_name_replaces_nothing_unasked() {
    let folder = Folder::new("extract-plain");
    let (file, out) = (data("extraction/vgg.json.gz"), folder.join("out"));
    std::fs::create_dir_all(&out).unwrap();
    std::fs::write(out.join("vgg.json"), "mine").unwrap();
    let e = Pleach::new(&folder).fails(1, &["extract", text(&file), "--out", text(&out)]);
    assert!(e.contains("vgg.json") && e.contains("--overwrite"), "{e}");
    assert_eq!(std::fs::read_to_string(out.join("vgg.json")).unwrap(), "mine");
    assert!(!out.join("vgg.json.gz").exists());
    let said = Pleach::new(&folder).call(&["extract", text(&file), "--out", text(&out), "--overwrite"]);
    assert_eq!(said.code, Some(0), "{}", said.err);
    assert_ne!(std::fs::read_to_string(out.join("vgg.json")).unwrap(), "mine");
    // an input that lies where the plain name would go stays, whatever is asked
    let input = folder.join("vgg.json");
    std::fs::copy(out.join("vgg.json"), &input).unwrap();
    let e = Pleach::new(&folder).fails(1, &["extract", text(&file), text(&input), "--out", text(&out), "--overwrite"]);
    assert!(e.contains("vgg.json"), "{e}");
}

/// The DAG cost of choices, walked from the roots in the file's own ids; all of them must be reached, none twice open.
fn walk(file: &Path, choices: &Value) -> f64 {
    let mut json = String::new();
    flate2::read::GzDecoder::new(std::fs::File::open(file).unwrap()).read_to_string(&mut json).unwrap();
    let graph: Value = serde_json::from_str(&json).unwrap();
    let mut done: BTreeMap<String, bool> = BTreeMap::new();
    let mut sum = 0.0;
    let mut stack: Vec<(String, bool)> =
        graph["root_eclasses"].as_array().unwrap().iter().map(|r| (r.as_str().unwrap().to_string(), false)).collect();
    while let Some((class, leave)) = stack.pop() {
        if leave {
            done.insert(class, true);
            continue;
        }
        match done.get(&class) {
            Some(true) => continue,
            Some(false) => panic!("class {class} needs itself"),
            None => {}
        }
        let node = &graph["nodes"][choices[&class].as_str().unwrap()];
        assert_eq!(node["eclass"].as_str(), Some(class.as_str()));
        sum += node["cost"].as_f64().unwrap();
        done.insert(class.clone(), false);
        stack.push((class, true));
        let mut needs = BTreeSet::new();
        for c in node["children"].as_array().unwrap() {
            needs.insert(graph["nodes"][c.as_str().unwrap()]["eclass"].as_str().unwrap().to_string());
        }
        stack.extend(needs.into_iter().map(|c| (c, false)));
    }
    assert_eq!(choices.as_object().unwrap().len(), done.len());
    sum
}
