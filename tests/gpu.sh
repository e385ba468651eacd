#!/usr/bin/env bash
# Fifteen minutes on one GPU of 80 GB: does what the CPU tests show hold there, and what does it cost? Needs no download.
#
#     make venv models/SmolLM2-135M-Instruct/config.json && tests/gpu.sh [FOLDER]
#
# (A) two processes on one card: the bytes of one, nothing left on the card after a kill -9, and the same command goes on
# (B) tokens/s in the shape of Llama-3.1-8B with random weights: stage 1 with 64 and 128 requests in flight, in one process and in
#     two, against vLLM's own offline generation of the same prompts
# (C) FSDP 2 in the shape of Llama-3.2-3B with rows of 16,000 tokens: peak memory with and without activations computed twice,
#     the same losses, a kill -9, the model's own names
#
# Prints a line "pass" or "fail" for each check and the figures; the logs are in FOLDER. Exit status 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-/tmp/sand-gpu}" && cd "${1:-/tmp/sand-gpu}" && pwd)
python=.venv/bin/python
base=models/SmolLM2-135M-Instruct
failed=0

say() { echo "$1  $2"; [ "$1" = pass ] || failed=1; }
check() { local what=$1; shift; if "$@" >> "$out/log" 2>&1; then say pass "$what"; else say fail "$what: $*"; fi; }
used() { nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits | head -1; }  # MiB
nothing_left() { for _ in $(seq 30); do [ "$(nvidia-smi --query-compute-apps=pid --format=csv,noheader | wc -l)" -le "$1" ] && return 0; sleep 1; done; return 1; }
peak() { local most=0 now; while kill -0 "$1" 2> /dev/null; do now=$(used); [ "$now" -gt "$most" ] && most=$now; sleep 0.2; done; echo "$most"; }

nvidia-smi -L || { echo "tests/gpu.sh needs a GPU, and nvidia-smi shows none"; exit 2; }
others=$(nvidia-smi --query-compute-apps=pid --format=csv,noheader | wc -l)

echo "--- inputs: eight experts, and the shapes"
check "experts are collected" $python stage0_sft.py expert --env scienceworld --tasks 8 --out "$out/expert.jsonl" \
    --types find-animal,lifespan-longest-lived,lifespan-shortest-lived,find-living-thing
$python - "$out" $base <<'P' || exit 1
import json, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
out, base = Path(sys.argv[1]), sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(base)
shapes = {"8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
          "3b": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8)}
for name, shape in shapes.items():
    config = AutoConfig.from_pretrained(base, head_dim=128, vocab_size=128256, max_position_embeddings=131072, dtype="bfloat16", **shape)
    (out / name).mkdir(exist_ok=True)
    tokenizer.save_pretrained(out / name)
    if name == "3b":
        with torch.device("cuda"):
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out / name)
    else:  # vLLM makes its weights up
        config.save_pretrained(out / name)
        (out / name / "model.safetensors").touch()
step = {"thought": "I look at it.", "action": "look around", "observation": "a table and a bowl " * 150, "reward": 0.0, "accepted": True}
rows = [{"key": f"scienceworld/boil/{n}", "task": f"scienceworld/boil/{n}", "instruction": f"Task {n}.", "steps": [step] * 32, "reward": 1.0,
         "source": "test"} for n in range(8)]
(out / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
P

echo "--- A: two processes on one card"
launch=".venv/bin/torchrun --standalone --nproc-per-node 2"
sample="stage1_sample.py --model $base --trajectories $out/expert.jsonl --n-samples 2 --max-tokens 64 --max-model-len 4096"
exact='{"dtype": "float32", "gpu_memory_utilization": 0.3}'  # other batches round bf16 another way
check "one process" $python $sample --engine-args "$exact" --out "$out/one.jsonl"
check "two processes" $launch $sample --engine-args "$exact" --out "$out/two.jsonl"
check "the same bytes" cmp "$out/one.jsonl" "$out/two.jsonl"
$launch $sample --engine-args "$exact" --seed 1 --out "$out/killed.jsonl" >> "$out/log" 2>&1 & launcher=$!
until ls "$out"/killed.jsonl.part-* > /dev/null 2>&1 || ! kill -0 $launcher 2> /dev/null; do sleep 0.05; done
kill -9 $launcher; wait $launcher 2> /dev/null
check "nothing on the card after a kill -9 of the launcher" nothing_left "$others"
check "the same command goes on" $launch $sample --engine-args "$exact" --seed 1 --out "$out/killed.jsonl"
check "one process says the same" $python $sample --engine-args "$exact" --seed 1 --out "$out/whole.jsonl"
check "the same bytes after a kill" cmp "$out/killed.jsonl" "$out/whole.jsonl"

echo "--- B: tokens/s in the shape of 8B"
speed() { $python -c 'import json, sys; asked = [json.load(open(name))["counts"]["asked"] for name in sys.argv[1:]]
print(f"{sum(each[\"tokens out\"] for each in asked) / max(each[\"seconds\"] - each[\"seconds to start\"] for each in asked):.0f}")' "$@"; }
for live in 64 128; do
    big="stage1_sample.py --model $out/8b --trajectories $out/expert.jsonl --n-samples 8 --max-tokens 128 --max-model-len 4096 --max-live $live"
    check "one process, $live in flight" $python $big --engine-args '{"load_format": "dummy"}' --out "$out/b1-$live.jsonl"
    echo "figure  one process, $live in flight: $(speed "$out/b1-$live.meta.json") tokens/s"
    SECONDS=0
    check "two processes, $live in flight each" $launch $big --engine-args '{"load_format": "dummy", "gpu_memory_utilization": 0.45}' \
        --out "$out/b2-$live.jsonl"
    echo "figure  two processes, $live in flight each: $SECONDS s with their start; the last one: $(speed "$out/b2-$live.meta.json") tokens/s"
done
$python - "$out" <<'P' || say fail "vLLM's own offline generation"
import sys, time
from common import dialogue
from environments import read_trajectories
from prompts.model import ChatFormat
from vllm import LLM, SamplingParams
out = sys.argv[1]
llm = LLM(f"{out}/8b", load_format="dummy", max_model_len=4096, tokenizer_mode="hf")
chat = ChatFormat(llm.get_tokenizer())
prompts = [{"prompt_token_ids": chat.encode(dialogue(row["task"], row["instruction"], row["steps"][:t]))}
           for row in read_trajectories(f"{out}/expert.jsonl") for t in range(len(row["steps"]))]
started = time.time()
results = llm.generate(prompts, SamplingParams(n=8, max_tokens=128, temperature=1.0), use_tqdm=False)
tokens = sum(len(each.token_ids) for result in results for each in result.outputs)
print(f"figure  vLLM offline, the same prompts: {tokens / (time.time() - started):.0f} tokens/s")
P

echo "--- C: training with FSDP 2 in the shape of 3B, rows of 16,000 tokens"
train="stage5_finetune.py --model $out/3b --data $out/long.jsonl --epochs 1 --batch-size 2 --learning-rate 1e-5 --max-model-len 16384"
fsdp=".venv/bin/accelerate launch --num_machines 1 --num_processes 1 --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"
for twice in true false; do
    $fsdp --fsdp_activation_checkpointing $twice $train --out "$out/c-$twice" >> "$out/log" 2>&1 & trainer=$!
    most=$(peak $trainer)
    if wait $trainer; then say pass "training, activations computed twice: $twice"; else say fail "training, activations computed twice: $twice"; fi
    echo "figure  peak memory, activations computed twice $twice: $most MiB"
done
losses() { $python -c 'import json, sys; print(*(f"{loss:.3f}" for loss in json.load(open(sys.argv[1] + "/training.json"))["losses"]))' "$1"; }
check "the same losses" test "$(losses "$out/c-true")" = "$(losses "$out/c-false")"
check "the model's own names" $python -c 'import sys; from safetensors import safe_open; from pathlib import Path
names = [{name for file in Path(folder).glob("*.safetensors") for name in safe_open(file, "pt").keys()} for folder in sys.argv[1:]]
assert names[0] == names[1], names[0] ^ names[1]' "$out/3b" "$out/c-true"
$fsdp --fsdp_activation_checkpointing true $train --seed 1 --out "$out/c-killed" >> "$out/log" 2>&1 & trainer=$!
until ls "$out"/c-killed.part/checkpoint-*/trainer_state.json > /dev/null 2>&1 || ! kill -0 $trainer 2> /dev/null; do sleep 0.2; done
kill -9 $trainer; wait $trainer 2> /dev/null
check "nothing on the card after a kill -9" nothing_left "$others"
check "the training goes on" $fsdp --fsdp_activation_checkpointing true $train --seed 1 --out "$out/c-killed"

echo "--- $([ $failed = 0 ] && echo "all passed" || echo "some failed, see $out/log")"
exit $failed
