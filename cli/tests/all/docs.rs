//! The pages of `docs/` and the README: every command in them is run, every snippet is held against its source.
//!
//! A page is Markdown. Comments say what a block needs:
//! * `<!-- given: NAME = PATH -->`: a link to a file or folder of the repository, made before the first block runs. A page whose PATH lies
//!   under `models/` and was not fetched is skipped, visibly.
//! * `<!-- file: NAME -->`: the next block is written to NAME.
//! * `<!-- from: PATH -->`: the next block stands in that file of the repository, apart from indentation.
//! * `<!-- exit: N -->`: the next commands end with that code.
//!
//! A block `sh` is one script, run in the page's own folder; lines that start with `make ` must name a target of the Makefile and are
//! not run. A block `text` after it is what it printed, on stdout or stderr: its lines must come in this order, `…` stands
//! for anything, a line of `…` alone for any lines. A block `txt` is a picture. Any other block needs `file` or `from`.

use crate::kit::Folder;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// A fenced block with the directives before it.
struct Block {
    line: usize,
    kind: String,
    text: String,
    directives: Vec<(String, String)>,
}

impl Block {
    fn directive(&self, name: &str) -> Option<&str> {
        self.directives.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// What a page gives, and its blocks.
fn read(page: &str) -> (Vec<(String, String)>, Vec<Block>) {
    let (mut given, mut directives, mut blocks) = (vec![], vec![], vec![]);
    let mut lines = page.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        if let Some((name, value)) = line.strip_prefix("<!-- ").and_then(|l| l.strip_suffix(" -->")?.split_once(": ")) {
            match name {
                "given" => {
                    let (name, path) =
                        value.split_once(" = ").unwrap_or_else(|| panic!("line {}: NAME = PATH", number + 1));
                    given.push((name.to_string(), path.to_string()));
                }
                "file" | "from" | "exit" => directives.push((name.to_string(), value.to_string())),
                _ => {}
            }
        } else if let Some(kind) = line.strip_prefix("```") {
            let mut text = String::new();
            for (_, line) in lines.by_ref().take_while(|(_, l)| *l != "```") {
                text += line;
                text.push('\n');
            }
            let directives = std::mem::take(&mut directives);
            blocks.push(Block { line: number + 1, kind: kind.to_string(), text, directives });
        }
    }
    assert!(directives.is_empty(), "a directive has no block");
    (given, blocks)
}

/// Whether `line` is `pattern` with something in place of every `…`.
fn fits(pattern: &str, line: &str) -> bool {
    let mut parts = pattern.split('…');
    let Some(mut rest) = line.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    for part in middle {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// The first line of `wanted` that does not come in its place among `lines`.
fn missing<'a>(wanted: &'a str, lines: &[&str]) -> Option<&'a str> {
    let (mut at, mut anywhere) = (0, true);
    for want in wanted.lines() {
        if want.trim() == "…" {
            anywhere = true;
            continue;
        }
        let place = lines[at..].iter().position(|l| fits(want.trim_end(), l.trim_end()));
        match place {
            Some(skipped) if anywhere || skipped == 0 => at += skipped + 1,
            _ => return Some(want),
        }
        anywhere = false;
    }
    None
}

fn flat(text: &str) -> Vec<&str> {
    text.lines().map(str::trim).filter(|l| !l.is_empty()).collect()
}

fn stands_in(snippet: &str, source: &str) -> bool {
    let (snippet, source) = (flat(snippet), flat(source));
    !snippet.is_empty() && source.windows(snippet.len()).any(|w| w == snippet)
}

/// Runs the commands of a block; what they print.
fn run(folder: &Folder, block: &Block, targets: &[String]) -> String {
    let mut script = String::new();
    for line in block.text.lines() {
        match line.strip_prefix("make ") {
            Some(rest) => {
                let target = rest.split_whitespace().next().unwrap_or_default();
                assert!(targets.iter().any(|t| t == target), "line {}: no target {target} in the Makefile", block.line);
            }
            None => script += &format!("{line}\n"),
        }
    }
    let bin = folder.join(".bin");
    let path = std::env::var("PATH").unwrap_or_default();
    let done = Command::new("bash")
        .args(["-euo", "pipefail", "-c", &format!("exec 2>&1\n{script}")])
        .current_dir(folder.join("page"))
        .env("PATH", format!("{}:{path}", bin.display()))
        .env("PLEACH_CACHE_DIR", folder.join("cache"))
        .env("PLEACH_ROOT", root())
        .env("NO_COLOR", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    let code = block.directive("exit").map_or(0, |c| c.parse().unwrap());
    assert_eq!(done.status.code(), Some(code), "line {}: {script}{said}", block.line);
    said
}

fn check(name: &str) {
    let root = root();
    let (given, blocks) = read(&std::fs::read_to_string(root.join(name)).unwrap());
    assert!(!blocks.is_empty(), "{name} has no block");
    if let Some((_, path)) = given.iter().find(|(_, p)| p.starts_with("models/") && !root.join(p).exists()) {
        println!("skipped: {name} needs {path}, run `make models`");
        return;
    }
    let folder = Folder::new("docs");
    for sub in ["page", ".bin"] {
        std::fs::create_dir(folder.join(sub)).unwrap();
    }
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_pleach"), folder.join(".bin/pleach")).unwrap();
    for (link, path) in &given {
        assert!(root.join(path).exists(), "{name}: there is no {path}");
        std::os::unix::fs::symlink(root.join(path), folder.join("page").join(link)).unwrap();
    }
    let makefile = std::fs::read_to_string(root.join("Makefile")).unwrap();
    let targets: Vec<String> = makefile.lines().filter_map(|l| Some(l.split_once(':')?.0.to_string())).collect();
    let mut said = None;
    for block in &blocks {
        let at = format!("{name}, line {}", block.line);
        if let Some(file) = block.directive("file") {
            std::fs::write(folder.join("page").join(file), &block.text).unwrap();
        } else if let Some(path) = block.directive("from") {
            let source = std::fs::read_to_string(root.join(path)).unwrap_or_else(|e| panic!("{at}: {path}: {e}"));
            assert!(stands_in(&block.text, &source), "{at}: this does not stand in {path}:\n{}", block.text);
        } else if block.kind == "txt" {
            continue;
        } else if block.kind == "sh" {
            said = Some(run(&folder, block, &targets));
        } else if let ("text", Some(said)) = (block.kind.as_str(), &said) {
            let lines: Vec<&str> = said.lines().collect();
            if let Some(line) = missing(&block.text, &lines) {
                panic!("{at}: this line was not printed in its place:\n{line}\n--- printed:\n{said}");
            }
        } else {
            panic!("{at}: a block `{}` is neither run nor compared", block.kind);
        }
    }
}

macro_rules! pages {
    ($($test:ident $page:literal)*) => {
        $(#[test]
        fn $test() {
            check($page);
        })*

        #[test]
        fn every_page_is_checked() {
            let listed = [$($page),*];
            for page in std::fs::read_dir(root().join("docs")).unwrap().flatten() {
                let name = format!("docs/{}", page.file_name().to_string_lossy());
                let text = std::fs::read_to_string(page.path()).unwrap_or_default();
                assert!(!name.ends_with(".md") || !text.contains("```") || listed.contains(&name.as_str()), "{name} has no test");
            }
        }
    };
}

pages! {
    readme "README.md"
    first_adapter "docs/first-adapter.md"
    reading_the_ir "docs/reading-the-ir.md"
    write_a_pass "docs/write-a-pass.md"
    write_a_method "docs/write-a-method.md"
    embed "docs/embed.md"
    will_it_fit "docs/will-it-fit.md"
    from_peft "docs/from-peft.md"
    on_a_gpu "docs/on-a-gpu.md"
}

#[test]
fn patterns() {
    assert!(fits("a…c…", "abcd") && fits("…", "") && fits("abc", "abc"));
    assert!(!fits("a…c", "abcd") && !fits("abc", "abcd") && !fits("…x…y", "yx"));
    let lines = ["one", "two 2", "three"];
    assert_eq!(missing("two …\nthree\n", &lines), None);
    assert_eq!(missing("one\n…\nthree\n", &lines), None);
    assert_eq!(missing("one\nthree\n", &lines), Some("three"));
    assert!(stands_in("  b {\n    c\n  }", "a\n      b {\n        c\n      }\n") && !stands_in("b", "bc"));
}
