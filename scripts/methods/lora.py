"""LoRA, rsLoRA and DoRA: PEFT's own."""

BASE = dict(peft_type="LORA", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])

CASES = {
    "lora": dict(config=BASE, matters=[("alpha", {"lora_alpha": 9}, {})]),
    "rslora": dict(config=BASE | dict(use_rslora=True), matters=[("rsLoRA", {"use_rslora": False}, {})]),
    "dora": dict(config=BASE | dict(use_dora=True), matters=[("DoRA", {"use_dora": False}, {})]),
}
