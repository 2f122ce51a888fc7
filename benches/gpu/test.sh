#!/usr/bin/env bash
# Tests the bundle without a GPU: tiny plans, PyTorch on the processor, and the stand-in driver that runs kernels in the PTX simulator.
# PYTHON names a python with torch, peft and transformers. PLEACH, MEASURE and FAKE_CUDA name what is built already.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=${CARGO_TARGET_DIR:-target}
python=${PYTHON:-python3}
if ! "$python" -c 'import torch, peft, transformers' 2>/dev/null; then
    echo "skipped: $python has no torch, peft and transformers; name one that has them in PYTHON" >&2
    exit 0
fi
if [ -z "${PLEACH:-}" ]; then
    cargo build -p pleach -p pleach-fake-cuda
    cargo build -p pleach-runtime --example measure
fi
export PLEACH=${PLEACH:-$target/debug/pleach} MEASURE=${MEASURE:-$target/debug/examples/measure}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
PYTHON=$python bash benches/gpu/build.sh "$work/bundle" --tiny
fake=${FAKE_CUDA:-$target/debug/libpleach_fake_cuda.so}
run() { PLEACH_CUDA_LIBRARY=$fake PLEACH_CUBLASLT_LIBRARY=$fake PYTHON=$python "$work/bundle/run.sh" "$@"; }

# What is asked for wrongly is refused, and says what there is.
for bad in "--only speed" "--bundle /nonexistent" "--device tpu" "--seconds soon"; do
    if said=$(run $bad 2>&1); then
        echo "run.sh $bad was not refused" >&2
        exit 1
    fi
    echo "refused: $bad: $(echo "$said" | tail -1)"
done

run --device cpu --seconds 3000 --limit 600 --repeat 2 --out "$work/out.json"
# A newer GPU, which has code of its own and runs the older one's too.
PLEACH_FAKE_CUDA=sm=9.0 run --device cpu --seconds 3000 --limit 600 --target sm_90a --repeat 2 --out "$work/newer.json"
"$python" - "$work/out.json" "$work/newer.json" <<'END'
import json, sys

out, newer = (json.load(open(p)) for p in sys.argv[1:])
assert newer["target"] == "sm_90a" and all(c["ok"] for c in newer["checks"]), newer["checks"]
assert [sum(c["target"] == t for c in newer["checks"]) for t in ("sm_90a", "sm_80")] == [18, 16], newer["checks"]
assert not [r for r in newer["steps"] if "error" in r] and len(newer["adapter_overhead"]) == 2 and newer["attention"], newer["steps"]
checks = out["checks"]
assert len(checks) == 18 and all(c["ok"] for c in checks), checks
assert all(c["same_bits"] in (True, {"graph": True, "launches": True}) for c in checks if "infer" not in c["what"]), checks
assert all(r["replay_ms"] > 0 and r["in_a_row_ms"] > 0 and r["checked"] for r in out["steps"] if r["who"] == "pleach"), out["steps"]
assert {r["what"] for r in out["blocks"]} == {"tiny-2-blocks-lora", "tiny-2-blocks-none"}, out["blocks"]
assert all(r["blocks_ms"] > 0 and r["blocks_weights_bytes"] < r["numbers_weights_bytes"] for r in out["blocks"]), out["blocks"]
assert out["limits"]["product_tflops"] > 0 and out["limits"]["copy_tb_per_s"] > 0, out["limits"]
assert not [r for r in out["steps"] if "error" in r] and {r["plan"] for r in out["adapter_overhead"]} == {
    "tiny-2-lora-r4", "tiny-2-paca-r4"}, out["adapter_overhead"]
assert len(out["forms"]) > len({f["signature"] for f in out["forms"]}) and not any(f["wrong"] for f in out["forms"]) and any(f["ms"] for f in out["forms"]), out["forms"]
assert all(r["speedup"] > 0 for r in out["steps"] if r["who"] != "pleach")
assert {r["entry"] for r in out["attention"]} == {"forward", "backward"} and len(out["products"]) == 3, out
who = [(r["plan"], r["who"]) for r in out["steps"]]
for plan, rivals in (("tiny-2-lora-r4", ("pleach", "peft", "peft-bf16")), ("tiny-2-paca-r4", ("pleach", "paca"))):
    for name in rivals:
        assert (plan, name) in who, who
assert all(r["step_ms"] > 0 for r in out["steps"]), out["steps"]
assert out["versions"]["torch"] and out["commit"] and out["dtype"] == "bf16"
END

# A run without time says what it left out, and one that is stopped leaves what it had.
run --device cpu --seconds 15 --out "$work/short.json" || true
PLEACH_CUDA_LIBRARY=$fake PYTHON=$python "$work/bundle/run.sh" --device cpu --out "$work/stopped.json" >"$work/stopped" 2>&1 &
stopped=$!
for _ in $(seq 300); do grep -q '"ok": true' "$work/stopped.json" 2>/dev/null && break; sleep 0.5; done
kill -TERM "$stopped"
wait "$stopped" && { echo "a run that was stopped says it went well" >&2; exit 1; }
"$python" - "$work/short.json" "$work/stopped.json" <<'END'
import json, sys

short, stopped = (json.load(open(p)) for p in sys.argv[1:])
assert short["skipped"] and all("are left" in s["why"] or "no package" in s["why"] or "not checked" in s["why"] for s in short["skipped"]), short["skipped"]
assert stopped["checks"] and stopped["versions"]["torch"] and not stopped["attention"], stopped
END

# A call that hangs is ended and recorded, and what comes after it runs. Without the rivals' packages pleach is timed all the same.
mv "$work/bundle/measure" "$work/bundle/measure.real"
cat >"$work/bundle/measure" <<END
#!/usr/bin/env bash
case "\$*" in *matmul-nt-40x48x64.sm*) exec sleep 600 ;; esac
exec "$work/bundle/measure.real" "\$@"
END
chmod +x "$work/bundle/measure"
"$python" - "$work/bundle/bench.py" <<'END'
import pathlib, sys
p = pathlib.Path(sys.argv[1])
text = p.read_text()
lacks = "[n for n in NEEDED if not importlib.util.find_spec(n)]"
assert lacks in text
p.with_name("limited.py").write_text(text.replace(lacks, "list(NEEDED)"))
END
PLEACH_CUDA_LIBRARY=$fake PLEACH_CUBLASLT_LIBRARY=$fake "$python" "$work/bundle/limited.py" --device cpu --seconds 3000 --limit 120 --repeat 1 --only checks,steps \
    --out "$work/hangs.json" >"$work/said" && { echo "a run with a call that hangs says it went well" >&2; exit 1; }
mv "$work/bundle/measure.real" "$work/bundle/measure"
"$python" - "$work/hangs.json" <<'END'
import json, sys

out = json.load(open(sys.argv[1]))
bad = [c for c in out["checks"] if not c.get("ok")]
assert len(bad) == 1 and "took longer than 120 s" in bad[0]["error"] and len(out["checks"]) == 15, out["checks"]
assert [r["who"] for r in out["steps"]] == ["pleach"] * 3 and not any(r["checked"] for r in out["steps"]), out["steps"]
assert any("no package transformers" in s["why"] for s in out["skipped"]), out["skipped"]
END

# A wrong kernel is noticed.
"$python" - "$work/bundle/cases.py" <<'END'
import pathlib, sys
p = pathlib.Path(sys.argv[1])
p.write_text(p.read_text().replace('"nt": lambda: a @ b.T', '"nt": lambda: a @ b.T * 1.05'))
END
if run --device cpu --only checks --out "$work/wrong.json" >"$work/said"; then
    echo "a result that is off by 5 % was taken for right" >&2
    exit 1
fi
grep -q "WRONG  matmul-nt" "$work/said"
echo "the bundle works"
