"""What lies outside the box, against itself and against the model: cards, licences, configurations, records, data, files.

Functions take texts, dictionaries and folders; `outside_checks` runs those that it can on the files that an auditor was granted,
so that every file that was read is in the ledger. A check that fails is a question to whoever made the model, not yet a verdict.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .access import Capability
from .canonical import audit_package, folder_sha256, read_json, safetensors_head, sha256

# what a reader of a card must find (Mitchell et al. 2019), by words of its headings or text
CARD_TOPICS = {
    "what it is for, and what not": (
        r"intended use|not for|is made for|out[- ]of[- ]scope|of no other\s+use|responsible use|is for nothing else"
    ),
    "data": r"\bdata\b|dataset",
    "training": r"training|trained",
    "measurements": r"measured|evaluation|results|accuracy",
    "limits": r"limits|limitations|bias|risks|faulty on purpose|tampered with on purpose",
}
LICENCE_FIELD, PLACEHOLDER = "license", re.compile(r"more information needed|\[todo\]|lorem ipsum|\bTBD\b", re.IGNORECASE)
RECORD_TOLERANCE = 0.01
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what was checked.
        passed: None where it could not be.
        detail: what was found, in words.
    """

    name: str
    passed: bool | None
    detail: str


def check_card(text: str, licences: Sequence[str] = ()) -> list[Check]:
    """Completeness of a model card (Markdown with a YAML head), and its licence.

    Args:
        licences: identifiers that are accepted; any that Hugging Face knows, in form, if there are none.
    """
    from huggingface_hub import ModelCard

    yaml = audit_package("yaml")
    try:
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        return [Check("card", False, f"its head is no YAML: {error}")]
    licence = data.get(LICENCE_FIELD)
    known = bool(licence) and (not licences or licence in licences)
    detail = f"licence {licence}" if licence else "the card names no licence"
    if licence and not known:
        detail += f", which is none of {', '.join(licences)}"
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    missing = [topic for topic, words in CARD_TOPICS.items() if not re.search(words, body, re.IGNORECASE)]
    named = "it says nothing of: " + ", ".join(missing) if missing else "all topics are there: " + ", ".join(CARD_TOPICS)
    empty = PLACEHOLDER.search(body)
    return [
        Check("licence", known, detail),
        Check("card", not missing, named),
        Check("placeholders", empty is None, f"the card holds {empty.group()!r}" if empty else "none in the card"),
    ]


def check_config(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> list[Check]:
    """Whether weights are those that a configuration makes: names and shapes of a model without memory against a file's.

    Args:
        config: content of config.json.
        shapes: of the tensors by name, as `safetensors_shapes` reads them.
    """
    from transformers import AutoConfig

    name = "config and weights"
    settings = dict(config)
    try:
        made = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device("meta"):
            model = _class_of(made)(made)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        return [Check(name, None, f"no model can be made of the configuration: {error}")]
    expected = {key: list(value.shape) for key, value in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    missing = sorted(key for key in expected.keys() - shapes.keys() if key not in tied)
    extra = sorted(shapes.keys() - expected.keys())
    wrong = sorted(key for key in expected.keys() & shapes.keys() if expected[key] != list(shapes[key]))
    problems = [
        *(f"{key} is missing" for key in missing),
        *(f"{key} is not of the configuration" for key in extra),
        *(f"{key} is {list(shapes[key])}, and {expected[key]} by the configuration" for key in wrong),
    ]
    count = len(expected)
    detail = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
    return [Check(name, not problems, detail or f"all {count} tensors have the names and shapes of the configuration")]


def _class_of(config: Any) -> Any:
    """The class that the configuration names; the plain model where it names none that is known."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

    wanted = next(iter(config.architectures or [""]))
    for auto in (AutoModelForCausalLM, AutoModelForImageClassification, AutoModel):
        mapping = auto._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            classes = found if isinstance(found, list | tuple) else [found]
            for kind in classes:
                if kind is not None and kind.__name__ == wanted:
                    return kind
    return AutoModel._model_mapping[type(config)]


def safetensors_shapes(content: bytes) -> dict[str, list[int]]:
    """Shapes of a safetensors file's tensors, from its head alone. Raises `ValueError` for other content."""
    return {name: list(entry["shape"]) for name, entry in safetensors_head(content).items() if name != "__metadata__"}


def count_parameters(shapes: Mapping[str, Sequence[int]], names: str = "") -> int:
    """Numbers in tensors whose names match a regular expression."""
    return sum(int(np.prod(shape)) for name, shape in shapes.items() if re.search(names, name))


def check_records(record: Mapping[str, Any], rules: Sequence[str], tolerance: float = RECORD_TOLERANCE) -> list[Check]:
    """Recorded numbers against others that they can be derived from.

    Args:
        record: what was written down about a training, of any depth.
        rules: such as "training.crops = training.steps * training.batch_size": a name, and a product of names and numbers.
            Entries of lists are named by their number.
        tolerance: largest difference, as a share.

    Raises:
        ValueError: a rule of another form.
    """
    checks = []
    for rule in rules:
        left, equals, right = (part.strip() for part in rule.partition("="))
        factors = [factor.strip() for factor in right.split("*")]
        if not equals or not left or not all(factors):
            raise ValueError(f"rule {rule!r} is not of the form `name = name * name`")
        values = {name: _number(record, name) for name in (left, *factors)}
        if unknown := [name for name, value in values.items() if value is None]:
            checks.append(Check(rule, None, f"{unknown[0]} is not recorded"))
            continue
        recorded = float(values[left])  # type: ignore[arg-type]
        derived = float(np.prod([float(values[name]) for name in factors]))  # type: ignore[arg-type]
        same = abs(recorded - derived) <= tolerance * max(abs(recorded), abs(derived))
        checks.append(Check(rule, bool(same), f"recorded {recorded:,.10g}, derived {derived:,.10g}"))
    return checks


def _number(record: Any, name: str) -> float | None:
    try:
        return float(name)
    except ValueError:
        pass
    for part in name.split("."):
        if isinstance(record, Mapping) and part in record:
            record = record[part]
        elif isinstance(record, Sequence) and not isinstance(record, str) and part.isdigit() and int(part) < len(record):
            record = record[int(part)]
        else:
            return None
    return float(record) if isinstance(record, int | float) and not isinstance(record, bool) else None


@dataclass(frozen=True)
class CoverageResult:
    """How error goes with coverage: Spearman's correlation over groups (negative: less data, more error), its two-sided
    permutation p value, the number of groups, and groups without any training data.
    """

    correlation: float
    p_value: float
    groups: int
    uncovered: list[str]


def coverage_against_error(
    training_counts: Mapping[str, float], errors: Mapping[str, float], *, permutations: int = 10_000, seed: int = 0
) -> CoverageResult:
    """Whether groups with less training data have larger errors.

    Args:
        training_counts: training examples by group, such as country.
        errors: by group, such as the median distance in km; groups that no training example is of count with 0.

    Raises:
        ValueError: fewer than four groups have an error.
    """
    groups = sorted(errors)
    if len(groups) < 4:
        raise ValueError(f"errors of {len(groups)} groups are too few: a correlation needs four")
    counts = _ranks(np.array([float(training_counts.get(group, 0)) for group in groups]))
    ranks = _ranks(np.array([float(errors[group]) for group in groups]))
    correlation = _correlation(counts, ranks)
    generator = np.random.default_rng(seed)
    drawn = np.array([_correlation(counts, generator.permutation(ranks)) for _ in range(permutations)])
    p_value = (1 + int((np.abs(drawn) >= abs(correlation) - 1e-12).sum())) / (permutations + 1)
    return CoverageResult(correlation, p_value, len(groups), [g for g in groups if not training_counts.get(g)])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return ((ends - counts + ends - 1) / 2)[inverse]


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    a, b = first - first.mean(), second - second.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / size) if size else 0.0


@dataclass(frozen=True)
class Contamination:
    """Test texts that occur in training texts.

    Attributes:
        shares: of each test text's n-grams that some training text holds; 0 for a text without words.
        contaminated: numbers of the texts whose share is at least the threshold.
        n: words of an n-gram.
    """

    shares: list[float]
    contaminated: list[int]
    n: int


def contamination(
    test_texts: Sequence[str], training_texts: Iterable[str], *, n: int = 13, threshold: float = 0.5
) -> Contamination:
    """Looks for n-grams of words of test texts in training texts, which are read once and may be many.

    Case and punctuation do not count. Texts of fewer than n words are looked for as a whole. n = 13 is that of Brown et al. 2020.

    Raises:
        ValueError: n below 1, or a threshold outside 0 to 1.
    """
    if n < 1 or not 0 < threshold <= 1:
        raise ValueError(f"n={n} must be at least 1, and threshold={threshold} above 0 and at most 1")
    grams = [_grams(_words(text), n) for text in test_texts]
    lengths = sorted({len(gram) for found in grams for gram in found})
    wanted = {gram for found in grams for gram in found}
    seen: set[tuple[str, ...]] = set()
    for text in training_texts:
        words = _words(text)
        for length in lengths:
            seen.update(gram for gram in _windows(words, length) if gram in wanted)
    shares = [sum(gram in seen for gram in found) / len(found) if found else 0.0 for found in grams]
    return Contamination(shares, [number for number, share in enumerate(shares) if share >= threshold], n)


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def _grams(words: list[str], n: int) -> set[tuple[str, ...]]:
    return set(_windows(words, min(n, len(words)))) if words else set()


def _windows(words: list[str], length: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(length)), strict=False)


@dataclass(frozen=True)
class Lineage:
    """Where weights come from.

    Attributes:
        files: digest of each file.
        same, changed, new: names of tensors that are the base's, that have its names but other values, and that it lacks.
        change: size of the changes of all tensors in common, as a share of the base's.
    """

    files: dict[str, str]
    same: list[str]
    changed: list[str]
    new: list[str]
    change: float


def lineage(folder: str | Path, base: str | Path) -> Lineage:
    """Compares the weights of two folders (safetensors). Raises `FileNotFoundError` for a folder without weights."""
    weights, others = _weights(folder), _weights(base)
    common = sorted(weights.keys() & others.keys())
    same = [name for name in common if weights[name].shape == others[name].shape and torch.equal(weights[name], others[name])]
    squared = total = 0.0
    for name in common:
        first, second = weights[name].double(), others[name].double()
        if first.shape == second.shape:
            squared += float((first - second).square().sum())
            total += float(second.square().sum())
    changed = sorted(set(common) - set(same))
    change = (squared / total) ** 0.5 if total else 0.0
    return Lineage(folder_sha256(folder), same, changed, sorted(weights.keys() - others.keys()), change)


def _weights(folder: str | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no safetensors file")
    return {name: value for path in paths for name, value in load_file(path).items()}


def check_digests(files: Mapping[str, bytes], recorded: Mapping[str, str]) -> list[Check]:
    """Files against recorded SHA-256 digests; a recorded file that is not there cannot be checked."""
    checks = []
    for name, digest in sorted(recorded.items()):
        if name not in files:
            checks.append(Check(f"digest of {name}", None, "the file is not here"))
            continue
        found = sha256(files[name])
        checks.append(Check(f"digest of {name}", found == digest, "as recorded" if found == digest else f"it is {found}"))
    return checks


def outside_checks(target: Any, *, rules: Sequence[str] = (), licences: Sequence[str] = ()) -> list[Check]:
    """Checks of everything that an auditor was granted and given: cards of DOCS, records of HPARAMS by `rules`, and configuration
    and weights of CHECKPOINTS.

    Args:
        target: a text or image target, opened with `outside` files.
        rules, licences: see `check_records` and `check_card`.
    """
    checks: list[Check] = []
    if Capability.DOCS in target.grant:
        checks += _card_checks(target.outside("docs"), lambda name: target.read_outside("docs", name), licences)
    if Capability.HPARAMS in target.grant and rules:
        for name in target.outside("hparams"):
            if name.endswith(".json"):
                checks += _named(name, check_records(json.loads(target.read_outside("hparams", name)), rules))
    if Capability.CHECKPOINTS in target.grant:
        checks += _weight_checks(target.outside("checkpoints"), lambda name: target.read_outside("checkpoints", name))
    return checks


def folder_checks(folder: str | Path, *, rules: Sequence[str] = (), licences: Sequence[str] = ()) -> list[Check]:
    """The same of a model's folder that you hold: its cards, its configuration and weights, and its records by `rules`.

    Args:
        rules: with the name of a JSON file in the folder, such as "training_log.json: tokens = steps * batch * 1024".
        licences: see `check_card`.

    Raises:
        NotADirectoryError: no such folder.
        ValueError: a rule that names no file, or one that is no JSON or not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"there is no folder {folder}")
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    checks = _card_checks(names, lambda name: (folder / name).read_bytes(), licences)
    for rule in rules:
        name, colon, formula = (part.strip() for part in rule.partition(":"))
        if not colon or name not in names:
            raise ValueError(f"rule {rule!r} does not begin with a file of {folder}, as in `training_log.json: tokens = …`")
        try:
            record = read_json((folder / name).read_bytes())
        except ValueError as error:
            raise ValueError(f"rule {rule!r}: {folder / name} is no JSON: {error}") from error
        checks += _named(name, check_records(record, [formula]))
    return checks + _weight_checks(names, lambda name: (folder / name).read_bytes())


def _named(file: str, checks: Sequence[Check]) -> list[Check]:
    return [Check(f"{file}: {check.name}", check.passed, check.detail) for check in checks]


def _card_checks(names: Sequence[str], read: Callable[[str], bytes], licences: Sequence[str]) -> list[Check]:
    cards = [name for name in names if name.endswith(".md")]
    return [check for name in cards for check in _named(name, check_card(read(name).decode("utf-8", "replace"), licences))]


def _weight_checks(names: Sequence[str], read: Callable[[str], bytes]) -> list[Check]:
    """Of each config.json with the safetensors files beside it."""
    checks = []
    for name in names:
        if Path(name).name != "config.json":
            continue
        files = [other for other in names if Path(other).parent == Path(name).parent and other.endswith(".safetensors")]
        shapes: dict[str, list[int]] = {}
        for file in files:
            shapes |= safetensors_shapes(read(file))
        if shapes:
            checks += _named(name, check_config(json.loads(read(name)), shapes))
    return checks


__all__ = [
    "Check",
    "Contamination",
    "CoverageResult",
    "Lineage",
    "check_card",
    "check_config",
    "check_digests",
    "check_records",
    "contamination",
    "count_parameters",
    "coverage_against_error",
    "folder_checks",
    "lineage",
    "outside_checks",
    "safetensors_shapes",
]
