"""`geobased audit bias`, `outside` and `card`: groups of places, what lies beside the weights, and audits in a model's card."""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import FAILURE, CommandError
from .evaluate import evaluate_images, places_of, read_list
from .locate import BatchSize, Dtype, Threads, load_geolocalizer
from .locate import Model as Geolocalizer
from .options import Debug, Device, Json, Source
from .sources import DEFAULT_GEOLOCALIZER, resolve_model

if TYPE_CHECKING:
    from geobased.auditing.group_bias import BiasReport

BIAS_EXAMPLES = (
    "geobased audit bias places.csv",
    "geobased audit bias places.csv --model ./my-pigeon --group income --cluster city --json",
)
OUTSIDE_EXAMPLES = (
    "geobased audit outside based-mini --rule 'training_log.json: tokens = steps * 65536'",
    "geobased audit outside ./my-model --license apache-2.0 --json",
)
CARD_EXAMPLES = ("geobased audit card ./my-model report", "geobased audit card ./my-model report other-report --json")
MOST_GROUPS = 12


def bias(
    table: Annotated[
        Path,
        typer.Argument(
            metavar="CSV", help="A list as for `geobased evaluate`: path, latitude, longitude, and country where it is known."
        ),
    ],
    model: Geolocalizer = DEFAULT_GEOLOCALIZER,
    images: Annotated[
        Path | None, typer.Option(help="The folder that paths start at, if it is not the list's.", show_default=False)
    ] = None,
    group: Annotated[
        list[str] | None, typer.Option(help="A column of the list to group by as well, such as income.", show_default=False)
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Column that tells which images were taken together; within a degree by default.", show_default=False),
    ] = None,
    gap_km: Annotated[float, typer.Option(help="Groups are compared by answers within it: 1, 25, 200, 750 or 2500.")] = 750.0,
    resamples: Annotated[int, typer.Option(min=1, help="Of clusters, for intervals and tests.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling.")] = 0,
    batch_size: BatchSize = 16,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Tell whether a geolocalizer is worse for some groups of places than for others, and what it over-predicts.

    Groups: country, UN region and subregion, density of the country, distance from towns, and columns of your own.
    """
    import numpy as np

    from geobased.auditing.group_bias import answer_groupings, group_bias, place_groupings

    listed = read_list(table, images)
    own = _columns(table, [*(group or []), *([cluster] if cluster is not None else [])])
    found = evaluate_images(load_geolocalizer(model, None, None, device, dtype), listed, batch_size, threads, bootstrap=0)
    for error in found.left_out.values():
        print(f"left out: {error}", file=sys.stderr)
    kept = [row for row, image in enumerate(listed.images) if image not in found.left_out]
    truths = found.listed.coordinates
    countries, _ = places_of(found.listed)
    groupings = {**place_groupings(truths, countries), **{name: [own[name][row] for row in kept] for name in group or []}}
    report = group_bias(
        np.array([[answer["latitude"], answer["longitude"]] for answer in found.answers]),
        truths,
        groupings,
        answered_groupings=answer_groupings([answer["country_code"] or "" for answer in found.answers]),
        clusters=None if cluster is None else [own[cluster][row] for row in kept],
        gap_km=gap_km,
        resamples=resamples,
        seed=seed,
    )
    if json_output:
        print(json.dumps({"model": model, "left_out": found.left_out, **report.to_dict()}, ensure_ascii=False))
    else:
        print(_bias_text(report))


def outside(
    model: Source,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="What recorded numbers must follow from others: FILE.json: name = name * number.", show_default=False),
    ] = None,
    licence: Annotated[
        list[str] | None, typer.Option("--license", help="Licences that are accepted; any by default.", show_default=False)
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Check what lies beside a model's weights against itself and the weights: card, licence, configuration, records."""
    from geobased.auditing.outside_checks import folder_checks

    folder = resolve_model(model)
    if not Path(folder).is_dir():
        raise CommandError(f"{model} is no folder here: download it first, such as with `hf download {model} --local-dir model`")
    checks = folder_checks(folder, rules=rule or (), licences=licence or ())
    if json_output:
        rows = [{"name": check.name, "passed": check.passed, "detail": check.detail} for check in checks]
        print(json.dumps({"model": model, "checks": rows}, ensure_ascii=False))
    else:
        words = {True: "ok", False: "FAILED", None: "not checked"}
        width = max((len(check.name) for check in checks), default=0)
        print("\n".join(f"{check.name:<{width}} {words[check.passed]:<12} {check.detail}" for check in checks))
    if any(check.passed is False for check in checks):
        raise typer.Exit(FAILURE)


def card(
    model: Source,
    reports: Annotated[
        list[Path] | None, typer.Argument(metavar="REPORT…", help="Folders of reports; none: take audits out of the card.")
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Put what audits found into the README.md of the audited model, in place of earlier audits there.

    Reports are checked first: they must be of this model's files.
    """
    from geobased.auditing.report_card import add_audits

    folder = Path(resolve_model(model))
    add_audits(folder, reports or [])
    path = folder / "README.md"
    print(json.dumps({"card": str(path), "audits": len(reports or [])}) if json_output else path)


def _columns(table: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Columns of a CSV file that `read_list` could read."""
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows, header = list(reader), list(reader.fieldnames or [])
    if missing := [name for name in names if name not in header]:
        raise CommandError(f"{table} has no column {missing[0]}; it has {', '.join(header)}")
    return {name: [(row[name] or "").strip() for row in rows] for name in names}


def _bias_text(report: "BiasReport") -> str:
    km = report.gap_km
    whole = report.within[km]
    lines = [f"{report.images} images of {report.clusters} clusters; {100 * whole.value:.1f} % within {km:g} km"]
    for grouping in report.groupings:
        lines.append("")
        lines.append(f"{grouping.grouping:<28} images  within {km:g} km   gap to others      p, adjusted  predicted / true")
        for row in grouping.groups[:MOST_GROUPS]:
            gap = "-"
            if row.gap.low is not None and row.gap.high is not None:
                gap = f"{100 * row.gap.value:+.0f} ({100 * row.gap.low:+.0f} to {100 * row.gap.high:+.0f})"
            over = "-" if row.over_prediction is None else f"{row.over_prediction.value:.2f}"
            share = f"{100 * row.within[km].value:.1f} %"
            lines.append(f"  {row.group:<26} {row.images:>6}  {share:>13}   {gap:<18} {row.p_value_holm:<12.3g} {over}")
        if len(grouping.groups) > MOST_GROUPS:
            lines.append(f"  and {len(grouping.groups) - MOST_GROUPS} more, which --json has")
    return "\n".join(lines)
