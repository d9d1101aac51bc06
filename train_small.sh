#!/usr/bin/env bash
# ExpRL end to end, and its control. If it is killed or stopped, the same command continues it.
#   bash train_small.sh                 the toy world: CPU, no key, no download but the packages
#   bash train_small.sh compare         the toy world again: all methods and baselines, both stages,
#                                       ablations of the judge, 3 seeds (1 to 2 hours on 2 cores)
#   bash train_small.sh words           a real language model (135M parameters, downloaded once) on
#                                       problems in words: CPU or GPU, no key (90 minutes on 2 idle
#                                       cores, twice as long or more on slow or busy ones)
#   bash train_small.sh Qwen2.5-0.5B    both stages and the control on GSM8K, for one GPU; the judge is
#                                       OpenAI's (set OPENAI_API_KEY) or yours (JUDGE_URL, JUDGE_MODEL)
# STAGE1 and STAGE2 in the environment set the numbers of iterations, RUNS sets the folder of the
# runs, and SEEDS and SYSTEMS set what `compare` compares. With another RUNS you can also change the
# toy world: LENGTH=8 makes problems of eight operations, and JUDGE_MODEL=toy-judge-lies-20 makes the
# toy judge invert 20% of its scores.
set -euo pipefail
what=${1:-toy}  # toy, compare, words, or a model
case $what in toy | words) has_program_judge=1 ;; *) has_program_judge= ;; esac
cd "$(dirname "$0")"
. tests/setup.sh

heading() { printf '\n== %s\n' "$*"; }
train() { "$python" exprl.py --data "$problems" --resume "$@" "${settings[@]}" "${sampling[@]}"; }
evaluate() { "$python" tests/tools/evaluate.py "$@"; }
start_judge() {  # a judge that is a program: it runs until this script ends
  rm -f "$runs/judge.url"
  "$python" "$@" --url-file "$runs/judge.url" &
  in_background=$!
  trap 'kill $in_background 2>/dev/null || true' EXIT
  for _ in $(seq 300); do
    [ -f "$runs/judge.url" ] && break
    sleep 0.1
  done
  [ -f "$runs/judge.url" ] || { echo "the judge did not start within 30 seconds" >&2; exit 1; }
  judge=(--judge-url "$(cat "$runs/judge.url")")
  held_out=(--data "$runs/heldout.jsonl" --problems "${PROBLEMS:-0}" --samples 8 --out "$runs/eval")
}

process=(--method process) sparse=(--method sparse)
if [ "$what" = toy ] || [ "$what" = compare ]; then
  runs=${RUNS:-runs/toy} stage1=${STAGE1:-80} stage2=${STAGE2:-40} base=$runs/base problems=$runs/train.jsonl
  length=${LENGTH:-6}
  export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
  unset OPENAI_API_KEY OPENAI_BASE_URL
  sampling=(--temperature 1 --max-new-tokens $((10 * length)) --sample-batch 256)
  settings=(--lr 4e-4 --kl 0.02 --optimizer-steps 2 --micro-batch 64 --save-every 20 --clip-high 0.28)
  settings+=(--judge-model "${JUDGE_MODEL:-toy-judge}")
  [ "$what" = toy ] || exec "$python" tests/toy/compare.py --runs "$runs" --seeds "${SEEDS:-1 2 3}" \
    --stage1 "${STAGE1:-120}" --stage2 "${STAGE2:-60}" --base-steps "${BASE_STEPS:-1000}" \
    --length "$length" --problems "${PROBLEMS:-0}" --systems "${SYSTEMS:-}" --train="${settings[*]}" --sampling="${sampling[*]}"
elif [ "$what" = words ]; then
  runs=${RUNS:-runs/words} stage1=${STAGE1:-40} stage2=${STAGE2:-40} base=$runs/warm-up/final problems=$runs/train.jsonl
  seed=${SEED:-0} PROBLEMS=${PROBLEMS:-100}
  sampling=(--temperature 1 --max-new-tokens 72 --sample-batch 64 --seed "$seed")
  process+=(--process-norm group --lr 3e-5)
  sparse+=(--lr 1e-5)  # at 3e-5, correct answers fell from 37% to 9% in 9 iterations
  settings=(--prompts-per-iteration 4 --kl 0.02 --micro-batch 8 --save-every 10 --judge-model value-judge)
  unset OPENAI_API_KEY OPENAI_BASE_URL
else
  runs=${RUNS:-runs/$(basename "$what")} stage1=${STAGE1:-200} stage2=${STAGE2:-100} base=$what
  problems=$runs/hard.jsonl
  judge=(--judge-url "${JUDGE_URL:-}" --judge-model "${JUDGE_MODEL:-gpt-4.1-mini}")
  sampling=(--max-new-tokens "${MAX_NEW_TOKENS:-512}")
  held_out=(--data "${HELD_OUT:-gsm8k}" --problems "${PROBLEMS:-200}" --samples 8 --out "$runs/eval")
  settings=(--save-every 20)
  sparse+=(--no-std --kl 0)  # the paper's stage 2
fi
mkdir -p "$runs"
if command -v flock >/dev/null; then
  exec 8>"$runs/.lock"
  flock -n 8 || { echo "another train_small.sh is running in $runs: wait for its end, or set RUNS to another folder" >&2; exit 1; }
fi

if [ "$what" = toy ]; then
  heading "toy world: problems and base model ($runs); 5 to 6 minutes in all on 2 cores"
  [ -d "$base" ] || OMP_NUM_THREADS=2 "$python" tests/toy/toy_world.py build "$runs" \
    --steps "${BASE_STEPS:-1000}" --length "$length"
  start_judge tests/toy/toy_world.py judge
elif [ "$what" = words ]; then
  heading "problems in words, and a base model that knows the form of a solution ($runs); 1.5 to 3 hours in all on 2 cores"
  [ -f "$runs/heldout.jsonl" ] || "$python" tests/toy/words_world.py "$runs" --length "${LENGTH:-4}" --seed "$seed"
  [ -d "$base" ] || "$python" tests/tools/baselines.py --method sft --model "${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}" \
    --data "$runs/base.jsonl" --out "$runs/warm-up" --iterations "${WARM_UP:-16}" --prompts-per-iteration 16 --lr 1e-4 --seed "$seed" --resume
  start_judge tests/tools/value_judge.py --port 0
  # Two runs at the same time, with half of the cores each, are faster than one after the other.
  OMP_NUM_THREADS=$("$python" -c 'import os; print(max(1, os.cpu_count() // 2))') && export OMP_NUM_THREADS
elif [ ! -f "$problems" ]; then
  heading "finding problems that the base model fails: training uses only these"
  evaluate --model "$base" --data "${TRAIN:-gsm8k}" --split train --problems "${TRAIN_PROBLEMS:-1000}" \
    --samples 4 --save-hard "$problems" --out "$runs/eval-train" "${sampling[@]}"
fi
evaluate_held_out() { evaluate --model "$@" "${held_out[@]}" "${sampling[@]}"; }
control() {
  train "${sparse[@]}" --model "$base" --out "$runs/sparse-only" --iterations $((stage1 + stage2))
  evaluate_held_out "$base" "$runs/sparse-only/final"
}

if [ "$has_program_judge" ]; then  # the second core has nothing else to do
  control >"$runs/sparse-only.log" 2>&1 &
  control_process=$!
  in_background="$in_background $control_process"
fi
heading "1/4 stage 1: ExpRL-Process, $stage1 iterations. The judge reads the references, the policy does not"
train "${process[@]}" --model "$base" --out "$runs/process" --iterations "$stage1" "${judge[@]}"
heading "2/4 stage 2: sparse reward, $stage2 iterations, from the model of stage 1"
train "${sparse[@]}" --model "$runs/process/final" --out "$runs/process-then-sparse" --iterations "$stage2"
heading "3/4 the control: sparse reward from the base model, $((stage1 + stage2)) iterations"
if [ "$has_program_judge" ]; then
  echo "(it runs at the same time as the stages above; its output is in $runs/sparse-only.log)"
else
  control
fi
heading "4/4 all models, on held-out problems"
evaluate_held_out "$runs/process/final" "$runs/process-then-sparse/final" >/dev/null  # the report prints all
if [ "$has_program_judge" ]; then
  wait "$control_process" || { tail -n 3 "$runs/sparse-only.log" >&2; exit 1; }
fi
"$python" tests/tools/report.py "$runs/process" "$runs/process-then-sparse" "$runs/sparse-only" \
  "$runs"/eval/*.jsonl --out "$runs/report.html" --figure "$runs/curves.png"
echo
echo "What to look at: the model of stage 2 and the control both had $((stage1 + stage2)) iterations in all. On"
echo "the way to stage 2, ExpRL did the first $stage1. In the control, the sparse reward did all. Every"
echo "completion, with its rewards and advantages and the judge's words, is in"
echo "$runs/process/rollouts.jsonl. Learning curves: $runs/curves.png. A page of completions to read:"
echo "$runs/report.html"
