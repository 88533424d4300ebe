#!/usr/bin/env bash
# Trains checkpoints/based-mini and its two twins of equal size (6.7M parameters), data, seed and steps:
#   based           gated short convolutions, Taylor linear attention, 64-key sliding windows
#   sliding_window  linear attention replaced by 64-key sliding windows
#   attention       linear attention and sliding windows replaced by full causal attention (a window over the whole context)
#
#   DATA=data OUT=runs/based-mini benchmarks/train_based_mini.sh
#
# DATA holds tinyshakespeare.txt, inaugural.txt, state_union.txt, genesis.txt (public domain; NLTK corpora and char-rnn's
# Shakespeare), wikitext2_valid.txt (WikiText-2's validation part, CC BY-SA; its test part is kept for evaluation) and, if the
# tokenizer is there already, tokenizer/.
# BUDGET=420 chooses the number of steps so that the runs last about 420 seconds, after a short trial of the speed.
# The three runs share one GPU; set MODELS to train some of them, PARALLEL=0 to train one after the other.
set -euo pipefail

: "${DATA:?folder with the text files}"
OUT=${OUT:-runs/based-mini}
STEPS=${STEPS:-1500}
BUDGET=${BUDGET:-}
BATCH=${BATCH:-64}
SEED=${SEED:-0}
LEARNING_RATE=${LEARNING_RATE:-3e-3}
ANSWER_WEIGHT=${ANSWER_WEIGHT:-4}
NUM_SHORT=${NUM_SHORT:-60000}
NUM_LONG=${NUM_LONG:-80000}
# nearly all training records carry values of other towns: answers known by heart would not help on held-out towns
COUNTERFACTUAL=${COUNTERFACTUAL:-0.9}
WORKERS=${WORKERS:-$(nproc)}
MODELS=${MODELS:-based sliding_window attention}
PARALLEL=${PARALLEL:-1}
PYTHON=${PYTHON:-python} # of the environment that also has the command geobased
PRECISION=${PRECISION:---bf16}
# more options for every run, e.g. EXTRA="--max_seconds 400 --torch_compile"
EXTRA=${EXTRA:-}

mkdir -p "$OUT"
for size in "short $NUM_SHORT 160 6 1" "long $NUM_LONG 400 24 2"; do
    read -r name number words records seed <<<"$size"
    [ -f "$OUT/documents_$name.jsonl" ] || "$PYTHON" -m geobased.recall.gazetteer_documents \
        --output "$OUT/documents_$name.jsonl" --num_documents "$number" --max_words "$words" --max_records "$records" \
        --seed "$seed" --split train --counterfactual "$COUNTERFACTUAL" --num_workers "$WORKERS"
done
[ -f "$OUT/documents_validation.jsonl" ] || "$PYTHON" -m geobased.recall.gazetteer_documents \
    --output "$OUT/documents_validation.jsonl" --num_documents 300 --seed 3 --split held_out

text=("$DATA/tinyshakespeare.txt" "$DATA/inaugural.txt" "$DATA/state_union.txt" "$DATA/genesis.txt" "$DATA/wikitext2_valid.txt")
tokenizer="$DATA/tokenizer"
if [ ! -d "$tokenizer" ]; then
    tokenizer="$OUT/tokenizer"
    "$PYTHON" -m geobased.training.tokenization --output_dir "$tokenizer" --text "${text[@]}" \
        --documents "$OUT/documents_long.jsonl" --vocab_size 4096
fi

configuration() { # mixers of the four attention-like layers (1, 2, 5, 6), window, intermediate size
    printf '{"model_type": "based", "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "head_dim": 32,
        "feature_dim": 16, "mixers": ["conv", "%s", "sliding_attention", "conv", "conv", "%s", "sliding_attention", "conv"],
        "sliding_window": %d, "intermediate_size": %d, "max_position_embeddings": 1024}' "$1" "$1" "$2" "$3"
}
# intermediate sizes give 6,700,288 parameters and twice 6,683,904
declare -A configurations=(
    [based]=$(configuration linear_attention 64 512)
    [sliding_window]=$(configuration sliding_attention 64 488)
    [attention]=$(configuration sliding_attention 1025 488)
)

run() { # model, folder, more options
    # shellcheck disable=SC2086
    geobased train lm --config "${configurations[$1]}" --tokenizer "$tokenizer" \
        --text "${text[@]}" --documents "$OUT/documents_short.jsonl" "$OUT/documents_long.jsonl" \
        --mixture_weights 0.1 0.6 0.3 --final_mixture_weights 0.12 0.1 0.78 --mixture_transition 0.4 \
        --answer_weight "$ANSWER_WEIGHT" --context_length 1024 --cache_dir "$OUT/tokens" --num_workers "$WORKERS" \
        --max_steps "$STEPS" --per_device_train_batch_size "$BATCH" --learning_rate "$LEARNING_RATE" --warmup_steps 0.05 \
        --seed "$SEED" $PRECISION $EXTRA --output_dir "$OUT/$2" "${@:3}"
}

run_all() { # suffix of the folders, more options
    local model process processes=() failed=0
    for model in "${models[@]}"; do
        if [ "$PARALLEL" = 1 ]; then
            run "$model" "$model$1" --disable_tqdm True "${@:2}" >"$OUT/$model$1.log" 2>&1 &
            processes+=($!)
        else
            run "$model" "$model$1" "${@:2}" 2>&1 | tee "$OUT/$model$1.log"
        fi
    done
    for process in "${processes[@]}"; do
        wait "$process" || failed=1
    done
    for model in "${models[@]}"; do
        echo "== $model$1"
        grep -E "eval_answers_loss|Error|tokens_per_second" "$OUT/$model$1.log" | tail -n 14 || true
    done
    return "$failed"
}

read -ra models <<<"$MODELS"
validation=(--validation_documents "$OUT/documents_validation.jsonl")
run "${models[0]}" "${models[0]}" --prepare_only True "${validation[@]}" >/dev/null

if [ -n "$BUDGET" ]; then
    STEPS=60 run_all -trial --save_strategy no
    # the slowest model decides; the margin is for evaluations and for trials that did not fully overlap
    STEPS=$("$PYTHON" - "$BUDGET" "$BATCH" "${models[@]/#/$OUT/}" <<'END'
import json, sys
budget, batch, folders = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
speeds = [json.load(open(f"{folder}-trial/training_log.json"))["tokens_per_second"] for folder in folders]
print(max(50, int(0.85 * budget * min(speeds) / (batch * 1024)) // 50 * 50))
END
    )
    echo "training for $STEPS steps"
fi
run_all "" "${validation[@]}" --eval_strategy steps --eval_steps 0.1 --save_strategy steps --save_steps 0.5 --save_total_limit 1
