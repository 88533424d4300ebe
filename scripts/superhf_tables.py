"""The comparison of SuperHF as Markdown, from benchmarks/results/<gpu>/superhf_experiment/results.json.

python scripts/superhf_tables.py [--folder benchmarks/results/h200]   # the section of docs/superhf.md; says what is missing
python scripts/superhf_tables.py --write                              # puts it between the page's markers
"""

from pathlib import Path
from typing import Any

from page_sections import Section, fill_page, link_to_results, markdown_table, measured_on, over_seeds, page_sections
from performance_tables import RESULTS, ROOT, number, plot

from geobased.training.superhf_experiment_settings import NAMES, POLICIES, VALIDATION
from geobased.training.superhf_experiment_verdicts import MEASURES, measures, summary

PAGE = ROOT / "docs" / "superhf.md"
NAME = "superhf_experiment"
COMMANDS = {NAME: "geobased train superhf-experiment --preset standard"}
COLUMNS = {
    "reward": ("reward", ".2f"),
    "held_out_reward": ("held-out reward", ".2f"),
    "rule_reward": ("rules", ".3f"),
    "answers_from_record": ("answers", ".3f"),
    "similarity": ("METEOR", ".3f"),
    "distinct_2": ("distinct-2", ".2f"),
    "mean_length": ("tokens", ".1f"),
    "kl": ("KL", ".3f"),
}
TRIED = {key: COLUMNS[key][1] for key in ("reward", "held_out_reward", "rule_reward", "answers_from_record", "kl")}
COSTS = {"completions": ("sampled", ",.0f"), "training_seconds": ("training, s", ",.0f")}


def comparison(name: str, folder: Path, results: dict[str, Any]) -> str:
    """Every arm and measure, the verdicts, what was tried, and the figures."""
    rows = results["rows"]
    trained = [row for row in rows if row["completions_per_answer"] == 1 and row["options"]]
    settings = results["settings"]
    lines = [measured_on(results, len(trained), "training")]
    lines.append(
        f"{settings['steps']} steps of {settings['prompts_per_step']} prompts and {settings['num_generations']} completions;"
        f" {settings['num_test_prompts']} held-out prompts; processes on devices: {results['num_workers']} on"
        f" {results['num_devices']}; {results['seconds'] / 60:,.0f} minutes in all."
    )
    if not results["complete"]:
        lines.append("Not all runs are done.")
    parts = ["\n".join(lines + link_to_results(name, folder)), reward_models(results)]
    for policy in POLICIES:
        if any(row["policy"] == policy for row in rows):
            parts += [
                f"### {policy}",
                policy_table(results, policy),
                *plot(folder / name, f"rewards-{policy}", f"Rewards, {policy}"),
            ]
    if results["similarity"] != "meteor":
        parts.append("METEOR counts exact and stem matches, without WordNet's synonyms.")
    parts += plot(folder / name, "kl_sweep", "KL weights")
    parts += ["### Verdicts", verdict_table(results), "### Settings that were tried", tried_table(results)]
    diverged = [row for row in rows if row.get("diverged")]
    if diverged:
        cases = [
            f"- {row['policy']}, {NAMES[row['arm']]}, {_options(row)}, seed {row['seed']}: {row['diverged']}" for row in diverged
        ]
        parts.append("\n".join(["Diverged:", "", *cases]))
    return "\n\n".join(parts)


def reward_models(results: dict[str, Any]) -> str:
    stages = results["stages"]
    told = [
        f"{label} tells {100 * stages[key]['accuracy']:.1f} % of {number(stages[key]['num_pairs'])} held-out pairs apart"
        f" ({100 * stages[key]['low']:.1f} to {100 * stages[key]['high']:.1f}), wrong values"
        f" {100 * stages[key]['by_corruption']['other_value']['accuracy']:.1f} %"
        for key, label in (("reward", "The reward model"), ("held_out_reward", "its twin"))
    ]
    text = "; ".join(told) + "."
    if "llama" in stages:
        llama = stages["llama"]
        text += (
            f" The Llama: {number(llama['parameters'])} parameters, {number(llama['tokens'])} tokens,"
            f" {llama['training_seconds']:,.0f} s."
        )
    return text


def policy_table(results: dict[str, Any], policy: str) -> str:
    """Means and standard deviations over seeds after training, of chosen settings."""
    found = [entry for entry in summary(results["rows"]) if entry["policy"] == policy]
    perplexities = [key for key in (found[0]["means"] if found else {}) if key.startswith("perplexity/")]
    columns = {**COLUMNS, **{key: (f"perplexity, {key[11:].replace('_', ' ')}", ".2f") for key in perplexities}, **COSTS}
    table = []
    for entry in found:
        own = [measures(row) for row in entry["rows"]]
        cells = [over_seeds([row[key] for row in own if row[key] is not None], form) for key, (_, form) in columns.items()]
        table.append([entry["name"], str(entry["seeds"]), *cells])
    return markdown_table(["arm", "seeds", *(title for title, _ in columns.values())], table)


def verdict_table(results: dict[str, Any]) -> str:
    table = [
        [
            *(f"{entry['claim']} ({entry['policy']})", MEASURES[entry["measure"]], f"{entry['difference']:+.3f}"),
            *(f"{entry['low']:+.3f} to {entry['high']:+.3f}", f"**{entry['verdict']}**"),
        ]
        for entry in results["verdicts"]
    ]
    return markdown_table(["claim", "measure", "difference", "95 % interval", "verdict"], table)


def tried_table(results: dict[str, Any]) -> str:
    """What the first seed's runs came to with each setting; the chosen ones are bold."""
    table = []
    for row in results["rows"]:
        if row["seed"] == 0 and row["options"] and row["arm"] != "kl_sweep":
            own: dict[str, Any] = {} if row.get("diverged") else measures(row)
            forms = {name: COLUMNS[key][1] for key, name in VALIDATION.items()} | TRIED
            found = {**row, **own}
            values = ["" if found.get(key) is None else f"{found[key]:{form}}" for key, form in forms.items()]
            values[0] = "diverged" if row.get("diverged") else values[0]
            setting = f"**{_options(row)}**" if row["chosen"] else _options(row)
            table.append([f"{NAMES[row['arm']]}, {row['policy']}", setting, *values])
    titles = [*(f"{COLUMNS[key][0]}, validation" for key in VALIDATION), *(COLUMNS[key][0] for key in TRIED)]
    return markdown_table(["arm", "setting", *titles], table)


def _options(row: dict[str, Any]) -> str:
    beta = f", β {row['options']['beta']:g}" if "beta" in row["options"] else ""
    return f"rate {row['options']['learning_rate']:g}{beta}"


SECTIONS: dict[str, Section] = {NAME: (NAME, comparison)}


def sections(folder: Path = RESULTS) -> tuple[dict[str, str], list[str]]:
    """Text of the marker, and the file if it is missing."""
    return page_sections(SECTIONS, COMMANDS, folder)


if __name__ == "__main__":
    fill_page(PAGE, str(__doc__), sections)
