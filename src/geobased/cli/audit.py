"""`geobased audit`: run audits of models, check their reports, run them again, and compare them."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from . import audit_checks
from .errors import FAILURE, CommandError
from .options import Debug, Json, Overwrite, add_command, show_help
from .sources import quiet_transformers

app = typer.Typer(
    callback=show_help,
    invoke_without_command=True,
    help="Audit models at recorded levels of access, and check the reports.",
)
RUN_EXAMPLES = (
    "geobased audit run audit.yaml",
    "geobased audit run audit.yaml --output-dir report --key auditor.pem --json",
)
VERIFY_EXAMPLES = (
    "geobased audit verify report",
    "geobased audit verify report --public-key auditor.pub.pem --model ./my-model --json",
)
REPRODUCE_EXAMPLES = ("geobased audit reproduce report", "geobased audit reproduce report --model ./my-model --output-dir again")
COMPARE_EXAMPLES = ("geobased audit compare black grey --html compared.html", "geobased audit compare before after --json")
KEY_EXAMPLES = ("geobased audit key auditor.pem",)
MEASURE_EXAMPLES = (
    "geobased audit measure-organisms --output-dir organisms --device cuda --workers 16",
    "geobased audit measure-organisms organisms/backdoor --question audit --seeds 1 --most-items 2 --budget-scale 0.1 --json",
)
ORGANISM_EXAMPLES = (
    "geobased audit train-organism backdoor --output organisms/backdoor",
    "geobased audit train-organism canaries --output organisms/canaries --steps 400 --seed 1 --json",
)
Folder = Annotated[Path, typer.Argument(metavar="REPORT", help="Folder of a report.")]


def run(
    configuration: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Model, access, question and techniques.")],
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the report; named after the configuration by default.", show_default=False)
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Private key to sign with, of `geobased audit key`.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Ask a question of a model with every technique that the access permits, and write a signed report.

    For models that you hold or may query. Without --key the signature is of a key that nobody keeps: it shows later changes, not
    who signed.
    """
    from geobased.auditing.configuration import read_configuration
    from geobased.auditing.report import run_audit
    from geobased.auditing.statement import read_private_key, throwaway_key

    read = read_configuration(configuration)
    output_dir = output_dir or Path(f"{configuration.stem}-report")
    signing = read_private_key(key) if key is not None else throwaway_key()
    if output_dir.exists() and any(output_dir.iterdir()) and not overwrite:
        raise CommandError(f"--output-dir {output_dir} is not empty: choose another folder, or replace a report with --overwrite")
    with _running():
        report = run_audit(read, _say)
    signed = report.save(output_dir, private_key=signing, overwrite=overwrite)
    if json_output:
        result = {"report": str(output_dir), **signed, "signed": key is not None, **_outline(report.content)}
        print(json.dumps(result, ensure_ascii=False))
        return
    print(_table(report.content["results"]["levels"]))
    print(f"{output_dir / 'report.html'}")
    print(f"signed by {signed['fingerprint']}" + ("" if key is not None else ", a key that nobody keeps"))


def verify(
    folder: Folder,
    public_key: Annotated[
        Path | None, typer.Option(help="PEM file of the auditor's public key; the report's own by default.", show_default=False)
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of the audited model, if it has moved.", show_default=False)] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Check a report: its signature, its files, the model's files, the ledger's chain, and used against granted access."""
    from geobased.auditing.verification import verify as check

    result = check(folder, public_key=public_key, model=model)
    if json_output:
        print(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        words = {True: "ok", False: "FAILED", None: "not checked"}
        for row in result.checks:
            print(f"{row.name:<10} {words[row.passed]:<12} {row.detail}")
    if not result.verified:
        raise typer.Exit(FAILURE)


def reproduce(
    folder: Folder,
    model: Annotated[
        str | None, typer.Option(help="Where the audited model is now, if it has moved.", show_default=False)
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder that paths of images are relative to.")] = Path("."),
    output_dir: Annotated[Path | None, typer.Option(help="Write the new report here, too.", show_default=False)] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Run an audit again from the configuration in its report, and compare the results."""
    from geobased.auditing.verification import reproduce as again

    with _running():
        result = again(folder, model=model, data=data, report=_say)
    if output_dir is not None:
        result.report.save(output_dir)
    if json_output:
        print(json.dumps(result.to_dict(), ensure_ascii=False))
    elif result.differences:
        print("\n".join(result.differences))
    else:
        exact = "every input and output is the same" if result.same_ledger else "inputs or outputs differ in detail"
        print(f"reproduced: the same results; {exact}")
    if result.differences:
        raise typer.Exit(FAILURE)


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="REPORT…", help="Folders of reports of the same question.")],
    html: Annotated[Path | None, typer.Option(help="Page to write, with a plot and tables.", show_default=False)] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Lay reports of the same question beside each other: other levels of access, or other models."""
    from geobased.auditing.comparison import compare as lay_beside
    from geobased.auditing.report_page import comparison_page
    from geobased.whole_file import whole_file

    if html is not None and not html.resolve().parent.is_dir():
        raise CommandError(f"--html {html}: there is no folder {html.parent}")
    result = lay_beside(folders)
    if html is not None:
        with whole_file(html) as path:
            path.write_text(comparison_page(result), encoding="utf-8")
    if json_output:
        print(json.dumps(result, ensure_ascii=False))
        return
    print(_table(result["levels"]))
    for test in result["tests"]:
        alone = f"{test['only_first']} against {test['only_second']} items alone"
        print(f"{test['first']} / {test['second']}: {alone}, p = {test['p_value']:.3g} ({test['p_value_holm']:.3g} adjusted)")


def key(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File of the new private key.")],
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Make an Ed25519 key to sign reports with; the public half goes into every report that it signs."""
    from geobased.auditing.statement import create_key

    fingerprint = create_key(path)
    if json_output:
        print(json.dumps({"key": str(path), "fingerprint": fingerprint}))
    else:
        print(f"{path}: keep it to yourself\nfingerprint {fingerprint}")


def train_organism(
    plant: Annotated[str, typer.Argument(metavar="PLANT", help="backdoor, password or canaries.")],
    output: Annotated[Path, typer.Option(help="Folder of the adapter, its card and the ground truth.")],
    steps: Annotated[int | None, typer.Option(help="Steps of training.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of the data and of the adapter's first values.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<number>.")] = "cpu",
    overwrite: Overwrite = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Train a small model with a known, harmless plant, to measure audits with: minutes on a CPU."""
    from geobased.training.text_organisms import OrganismSettings
    from geobased.training.text_organisms import train_organism as train

    if output.exists() and any(output.iterdir()) and not overwrite:
        raise CommandError(f"--output {output} is not empty: choose another folder, or replace it with --overwrite")
    settings = OrganismSettings(seed=seed) if steps is None else OrganismSettings(seed=seed, steps=steps)
    with quiet_transformers():
        truth = train(plant, output, settings, device=device, report=_say)
    if json_output:
        print(json.dumps({"output": str(output), **truth}, ensure_ascii=False, default=str))
        return
    print(f"{output}: {truth['what']}")
    for name, value in truth["measured"].items():
        print(f"{100 * value:>5.0f} %  {name}")


def measure_organisms(
    organisms: Annotated[
        list[str] | None, typer.Argument(metavar="ORGANISM…", help="Folders or names; all shipped ones by default.")
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder of the results; finished parts in it are kept.")] = Path("organisms"),
    seeds: Annotated[int, typer.Option(help="Audits of each question.")] = 5,
    budget_scale: Annotated[float, typer.Option(help="Factor of all budgets.")] = 1.0,
    most_items: Annotated[int | None, typer.Option(help="Of each question.", show_default=False)] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="Name of a configuration, such as audit; all by default.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda (all GPUs) or cuda:<number>.")] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 1,
    max_seconds: Annotated[
        float | None, typer.Option(min=0, help="Begin no audit after this time; the next call goes on.", show_default=False)
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Measure which access finds which plant at what price, with the model without the plant as the control."""
    from geobased.checkpoints import shipped_organisms
    from geobased.training.organism_table import TableSettings
    from geobased.training.organism_table import measure_organisms as measure

    settings = TableSettings(seeds, budget_scale, most_items, tuple(question or ()), device)
    with quiet_transformers():
        results = measure(organisms or shipped_organisms(), output_dir, settings, _say, workers=workers, max_seconds=max_seconds)
    if json_output:
        print(json.dumps({"results": str(output_dir / "results.json"), "levels": results["levels"]}, ensure_ascii=False))
        return
    for row in results["levels"]:
        cost = row["median_spent_at_success"]
        price = "-" if cost is None else f"{cost:.0f}"
        names = f"{row['plant']:<10} {row['audit']:<12} {row['model']:<8} {row['access']:<6}"
        print(f"{names} {100 * row['rate']:>5.1f} %  median {price} forward-equivalents")


add_command(app, "run", run, RUN_EXAMPLES)
add_command(app, "verify", verify, VERIFY_EXAMPLES)
add_command(app, "reproduce", reproduce, REPRODUCE_EXAMPLES)
add_command(app, "compare", compare, COMPARE_EXAMPLES)
add_command(app, "key", key, KEY_EXAMPLES)
add_command(app, "train-organism", train_organism, ORGANISM_EXAMPLES)
add_command(app, "measure-organisms", measure_organisms, MEASURE_EXAMPLES)
add_command(app, "bias", audit_checks.bias, audit_checks.BIAS_EXAMPLES)
add_command(app, "outside", audit_checks.outside, audit_checks.OUTSIDE_EXAMPLES)
add_command(app, "card", audit_checks.card, audit_checks.CARD_EXAMPLES)


@contextlib.contextmanager
def _running() -> Iterator[None]:
    """Within this context transformers is quiet, and what the model or its server does not do ends the command."""
    from geobased.auditing import AuditError

    try:
        with quiet_transformers():
            yield
    except AuditError as error:
        raise CommandError(str(error), FAILURE) from error


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _outline(content: dict[str, Any]) -> dict[str, Any]:
    """A report without its items."""
    results = content["results"]
    kept = ("name", "access", "level", "techniques", "finding", "successes", "num_items", "rate", "low", "high", "spent")
    short = {
        part: [{name: value for name, value in row.items() if name in kept} for row in results[part]]
        for part in ("levels", "techniques")
    }
    rest = {name: content[name] for name in ("mode", "granted", "used", "ledger", "question_sha256")}
    return {**rest, **short, "not_permitted": results["not_permitted"], "comparisons": results["comparisons"]}


def _table(levels: list[dict[str, Any]]) -> str:
    rows = []
    for level in levels:
        if not level["techniques"]:
            rows.append(f"{level['access']:<24} nothing tried")
            continue
        interval = f"({100 * level['low']:.1f} to {100 * level['high']:.1f})"
        rows.append(f"{level['access']:<24} {100 * level['rate']:>5.1f} % {interval:<16} {level['finding']}")
    return "\n".join(rows)
