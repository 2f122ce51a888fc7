//! A headless Chromium, driven through its DevTools protocol over a pair of pipes: no port, no driver program.
//!
//! `PLEACH_CHROMIUM` names another browser. Without one the tests are skipped, visibly.

use crate::kit::Folder;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// How long the browser may take for one answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A browser with one page.
pub(crate) struct Browser {
    child: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    session: Option<String>,
    next: u64,
    /// What the page complained about: exceptions, console, network.
    pub(crate) complaints: Vec<String>,
    /// Addresses that the page asked for.
    pub(crate) requests: Vec<String>,
    _profile: Folder,
}

/// The browser's program, if there is one.
pub(crate) fn program() -> Option<String> {
    let given = std::env::var("PLEACH_CHROMIUM").ok().filter(|p| !p.is_empty());
    let works = |p: &String| Command::new(p).arg("--version").output().is_ok_and(|o| o.status.success());
    given.into_iter().chain(["chromium", "chromium-browser", "google-chrome"].map(String::from)).find(works)
}

impl Browser {
    /// Opens a page that says it is ready in `data-ready`.
    pub(crate) fn open(program: &str, page: &Path, dark: bool) -> Browser {
        let profile = Folder::new("chromium");
        let mut child = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 0</dev/null 1>/dev/null 2>/dev/null", program])
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
            .args(["--hide-scrollbars", "--window-size=1440,900", "--remote-debugging-pipe"])
            .arg(format!("--user-data-dir={}", profile.0.display()))
            .arg("about:blank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (to, mut out) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (send, from) = channel();
        std::thread::spawn(move || {
            let (mut all, mut part) = (vec![], [0; 1 << 16]);
            while let Ok(n) = out.read(&mut part) {
                if n == 0 {
                    return;
                }
                all.extend_from_slice(&part[..n]);
                while let Some(end) = all.iter().position(|b| *b == 0) {
                    let message = serde_json::from_slice(&all[..end]).unwrap_or(Value::Null);
                    all.drain(..=end);
                    if send.send(message).is_err() {
                        return;
                    }
                }
            }
        });
        let (complaints, requests) = (vec![], vec![]);
        let mut b = Browser { child, to, from, session: None, next: 0, complaints, requests, _profile: profile };
        let targets = b.call("Target.getTargets", json!({}));
        let list = targets["targetInfos"].as_array().unwrap();
        let id = list.iter().find(|t| t["type"] == "page").unwrap()["targetId"].clone();
        let attached = b.call("Target.attachToTarget", json!({"targetId": id, "flatten": true}));
        b.session = attached["sessionId"].as_str().map(String::from);
        for domain in ["Page", "Runtime", "Log", "Network"] {
            b.call(&format!("{domain}.enable"), json!({}));
        }
        let size = json!({"width": 1440, "height": 900, "deviceScaleFactor": 1, "mobile": false});
        b.call("Emulation.setDeviceMetricsOverride", size);
        if dark {
            let features = json!([{"name": "prefers-color-scheme", "value": "dark"}]);
            b.call("Emulation.setEmulatedMedia", json!({ "features": features }));
        }
        b.call("Page.navigate", json!({"url": format!("file://{}", page.display())}));
        b.wait("document.body && document.body.dataset.ready === 'yes'");
        b
    }

    fn call(&mut self, method: &str, params: Value) -> Value {
        self.next += 1;
        let mut message = json!({"id": self.next, "method": method, "params": params});
        if let Some(s) = &self.session {
            message["sessionId"] = s.clone().into();
        }
        self.to.write_all(format!("{message}\0").as_bytes()).unwrap();
        loop {
            let m = self.from.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("the browser does not answer {method}"));
            if m["id"] == self.next {
                assert!(m["error"].is_null(), "{method}: {}", m["error"]);
                return m["result"].clone();
            }
            self.note(&m);
        }
    }

    fn note(&mut self, m: &Value) {
        match m["method"].as_str().unwrap_or_default() {
            "Runtime.exceptionThrown" => self.complaints.push(m["params"]["exceptionDetails"].to_string()),
            "Runtime.consoleAPICalled" => self.complaints.push(m["params"]["args"].to_string()),
            "Log.entryAdded" => self.complaints.push(m["params"]["entry"].to_string()),
            "Network.requestWillBeSent" => {
                self.requests.extend(m["params"]["request"]["url"].as_str().map(String::from));
            }
            _ => {}
        }
    }

    /// The value of an expression; a promise is waited for.
    pub(crate) fn js(&mut self, expression: &str) -> Value {
        let r = self
            .call("Runtime.evaluate", json!({"expression": expression, "returnByValue": true, "awaitPromise": true}));
        assert!(r["exceptionDetails"].is_null(), "{expression}: {}", r["exceptionDetails"]);
        r["result"]["value"].clone()
    }

    /// Waits until an expression holds.
    pub(crate) fn wait(&mut self, expression: &str) {
        let begin = Instant::now();
        while self.js(&format!("!!({expression})")) != true {
            let said = self.js("document.querySelector('#fault')?.textContent");
            assert!(begin.elapsed() < PATIENCE, "never: {expression}; the page says {said}, {:?}", self.complaints);
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// A click with the mouse in the middle of the first element of a selector, or at the point that an expression in
    /// parentheses gives as `[x, y]`.
    pub(crate) fn click(&mut self, at: &str) {
        let point = if at.starts_with('(') {
            self.js(at)
        } else {
            let middle = "(e => { e.scrollIntoView({block: 'nearest'}); const r = e.getBoundingClientRect(); \
                          return [r.x + r.width / 2, r.y + r.height / 2]; })";
            self.js(&format!("{middle}(document.querySelector({at:?}))"))
        };
        for kind in ["mouseMoved", "mousePressed", "mouseReleased"] {
            let clicks = u8::from(kind != "mouseMoved");
            let button = if kind == "mouseMoved" { "none" } else { "left" };
            self.call(
                "Input.dispatchMouseEvent",
                json!({"type": kind, "x": point[0], "y": point[1], "button": button, "clickCount": clicks}),
            );
        }
    }

    /// A key, or a text, typed.
    pub(crate) fn press(&mut self, key: &str) {
        for kind in ["keyDown", "keyUp"] {
            let text = if key == "Enter" {
                "\r"
            } else if key.len() == 1 {
                key
            } else {
                ""
            };
            let code = match key {
                "Enter" => 13,
                "Escape" => 27,
                _ => key.bytes().next().map_or(0, u32::from),
            };
            let mut event = json!({"type": kind, "key": key, "windowsVirtualKeyCode": code});
            if kind == "keyDown" && !text.is_empty() {
                event["text"] = text.into();
            }
            self.call("Input.dispatchKeyEvent", event);
        }
    }

    pub(crate) fn write(&mut self, text: &str) {
        self.call("Input.insertText", json!({ "text": text }));
    }

    /// Keeps a picture of the page as it is; where.
    pub(crate) fn picture(&mut self, name: &str) -> PathBuf {
        std::thread::sleep(Duration::from_millis(300));
        let shot = self.call("Page.captureScreenshot", json!({"format": "png"}));
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("page");
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join(format!("{name}.png"));
        std::fs::write(&path, decode(shot["data"].as_str().unwrap())).unwrap();
        path
    }

    /// Nothing was logged, and nothing but the page itself was loaded.
    pub(crate) fn was_quiet(&mut self) {
        self.js("1");
        assert!(self.complaints.is_empty(), "{:?}", self.complaints);
        let away: Vec<&String> = self.requests.iter().filter(|r| !r.starts_with("file://")).collect();
        assert!(away.is_empty(), "the page asked for {away:?}");
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.to.write_all(b"{\"id\":0,\"method\":\"Browser.close\"}\0");
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(3) {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn decode(base64: &str) -> Vec<u8> {
    let (mut out, mut bits, mut n) = (vec![], 0u32, 0);
    for c in base64.bytes() {
        let digit = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => break,
        };
        bits = bits << 6 | u32::from(digit);
        n += 6;
        if n >= 8 {
            n -= 8;
            out.push((bits >> n) as u8);
        }
    }
    out
}
