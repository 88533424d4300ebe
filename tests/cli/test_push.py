"""`geobased push`: exactly what would be sent, and what keeps it from being sent. No network: HfApi is replaced by a recorder."""

import inspect
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import httpx
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, SpaceCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, pipeline

import geobased as package
from geobased.cli import push as module
from geobased.geography.evaluation import evaluate

REPOSITORY = Path(__file__).parents[2]
SOMEBODYS = "/" + "home/ann/photos"
GPS_TAGS = 0x8825


@pytest.fixture
def sent(monkeypatch, tmp_path):
    """Replaces the Hub; a list of (method, arguments), and `folder`, which holds what was uploaded."""
    calls = SimpleNamespace(list=[], folder=tmp_path / "sent")

    class Recorder:
        def __getattr__(self, name):
            def call(*args, **kwargs):
                # as the real one would take it
                calls.list.append((name, inspect.signature(getattr(HfApi, name)).bind(self, *args, **kwargs).arguments))
                if name == "upload_folder":
                    shutil.copytree(kwargs["folder_path"], calls.folder, dirs_exist_ok=True)
                repo_id = args[0] if args else kwargs["repo_id"]
                url = f"https://huggingface.co/{repo_id}"
                pull_request = f"{url}/discussions/1" if kwargs.get("create_pr") else None
                return SimpleNamespace(repo_id=repo_id, repo_url=url, pr_url=pull_request)

            return call

    monkeypatch.setattr(module, "hub_is_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.HfApi", Recorder)
    return calls


@pytest.fixture
def dry(geobased, monkeypatch):
    """Runs with --dry-run and --json, where reaching for the Hub fails; the report, and the exit code as "code"."""

    def refuse(*args, **kwargs):
        raise AssertionError("a dry run reached for the Hub")

    monkeypatch.setattr(module, "hub_is_reachable", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi", refuse)

    def run(*arguments):
        result = geobased("push", *arguments, "--dry-run", "--json")
        return json.loads(result.stdout) | {"code": result.exit_code}

    return run


def files_of(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def measured(**more) -> dict:
    """What `geobased evaluate --report` writes, about two images."""
    result = evaluate(
        [(55.7, 13.2), (0.0, 0.0)],
        [(55.7, 13.3), (10.0, 0.0)],
        confidences=[0.9, 0.2],
        correct=[True, False],
        error_radii_km={0.9: [10.0, 100.0]},
        abstained=[False, True],
        bootstrap=20,
    )
    return result.to_dict() | more


# --- models -----------------------------------------------------------------------------------------------------------


def test_language_model_is_sent_with_its_code_and_a_card(geobased, sent, tiny_model_dir):
    result = geobased("push", tiny_model_dir, "me/tiny", "--private", "--license", "apache-2.0")
    assert result.exit_code == 0 and result.stdout == "https://huggingface.co/me/tiny\n", result.stderr
    (made, made_with), (uploaded, uploaded_with) = sent.list
    assert (made, uploaded) == ("create_repo", "upload_folder")
    assert made_with["repo_id"] == "me/tiny" and made_with["private"] is True and made_with["exist_ok"] is True
    assert made_with["repo_type"] == uploaded_with["repo_type"] == "model"
    assert uploaded_with["commit_message"] == "Upload tiny with geobased" and uploaded_with["revision"] is None
    assert {"model.safetensors", "tokenizer.json", "modeling_based.py", "README.md"} <= set(files_of(sent.folder))
    card = ModelCard.load(sent.folder / "README.md")
    assert (card.data.license, card.data.pipeline_tag, card.data.library_name) == (
        "apache-2.0",
        "text-generation",
        "transformers",
    )
    assert 'from_pretrained("me/tiny", trust_remote_code=True)' in card.text and "3 layers (" in card.text
    assert str(tiny_model_dir) not in card.content and str(Path.home()) + "/" not in card.content
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tiny_model_dir, sent.folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_dry_run_tells_files_sizes_and_card(geobased, dry, tiny_model_dir):
    report = dry(tiny_model_dir, "me/tiny", "--license", "mit")
    assert report["code"] == 0 and report["problems"] == [] and report["dry_run"] is True and report["url"] is None
    assert (report["kind"], report["repo_type"], report["repo_id"]) == ("model", "model", "me/tiny")
    assert report["files"]["model.safetensors"] == (tiny_model_dir / "model.safetensors").stat().st_size
    assert report["files"]["README.md"] == len(report["card"].encode())
    text = geobased("push", tiny_model_dir, "me/tiny", "--license", "mit", "--dry-run")
    assert text.exit_code == 0 and text.stderr == ""
    assert "would push this model to me/tiny" in text.stdout and "  license: mit" in text.stdout
    assert all(name in text.stdout for name in report["files"]) and "problems: none" in text.stdout


def test_the_hub_client_makes_one_commit_of_the_listed_files(geobased, dry, tiny_copy, monkeypatch):
    (tiny_copy / ".env").write_text("secret")
    report, commits, cards = dry(tiny_copy, "me/tiny", "--license", "mit"), [], []

    class LocalApi(HfApi):
        """The real client up to the requests."""

        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def _validate_yaml(self, content, **kwargs):
            cards.append(content)  # the Hub would check its metadata

        def create_commit(self, repo_id, operations, **kwargs):
            commits.append({operation.path_in_repo: operation.upload_info.size for operation in operations})
            return SimpleNamespace(repo_url=f"https://huggingface.co/{repo_id}", pr_url=None)

    monkeypatch.setattr(module, "hub_is_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.HfApi", LocalApi)
    # with Xet newer clients upload in a pipeline of their own; without, all versions make a commit
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False, raising=False)
    result = geobased("push", tiny_copy, "me/tiny", "--license", "mit")
    assert result.exit_code == 0, result.stderr
    assert commits == [report["files"]] and cards == [report["card"]]


@pytest.mark.parametrize("name", ["earthclip-mini", "earthclip-mini-clip"])
def test_geolocalization_models_are_sent_with_their_code(geobased, sent, name):
    result = geobased("push", name, f"me/{name}", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["files"] == files_of(sent.folder) and report["url"] == f"https://huggingface.co/me/{name}"
    config = json.loads((sent.folder / "config.json").read_text(encoding="utf-8"))
    assert {value.partition(".")[0] + ".py" for value in config["auto_map"].values()} <= set(report["files"])
    source = Path(package.checkpoint_path(name))
    # the card is kept as it is, and so are the weights
    assert report["card"] == (source / "README.md").read_text(encoding="utf-8")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, sent.folder))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert AutoModel.from_pretrained(sent.folder).config.model_type == config["model_type"]


def test_pipeline_is_sent_with_its_code(geobased, sent, tiny_pigeon_dir, one_gazetteer):
    arguments = ("--as", "pipeline", "--license", "mit", "--json")
    result = geobased("push", tiny_pigeon_dir, "me/places", *arguments)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["kind"] == "pipeline"
    config = json.loads((sent.folder / "config.json").read_text())
    assert config["custom_pipelines"]["image-geolocalization"]["impl"] == "image_geolocalization.ImageGeolocalizationPipeline"
    locate = pipeline(model=str(sent.folder), device="cpu", trust_remote_code=True)
    assert type(locate).__module__.startswith("transformers_modules")
    assert len(locate(Image.new("RGB", (40, 30), "teal"))) == 5
    # a folder that such a pipeline saved goes as it is
    saved = shutil.copytree(sent.folder, sent.folder.parent / "saved")
    again = geobased("push", saved, "me/places", "--json", "--dry-run")
    assert json.loads(again.stdout)["kind"] == "pipeline" and again.exit_code == 0
    assert set(json.loads(again.stdout)["files"]) == set(files_of(saved))


def test_revision_pull_request_and_message(geobased, sent, tiny_model_dir):
    shared = ("push", tiny_model_dir, "me/tiny", "--license", "mit", "--revision", "v2", "--message", "Longer training")
    assert geobased(*shared).exit_code == 0
    names = [name for name, _ in sent.list]
    assert names == ["create_repo", "create_branch", "upload_folder"]
    assert sent.list[1][1]["branch"] == "v2"
    assert sent.list[2][1]["revision"] == "v2" and sent.list[2][1]["commit_message"] == "Longer training"
    sent.list.clear()
    assert "--create-pr and --revision" in geobased(*shared, "--create-pr").stderr and sent.list == []
    result = geobased(*shared[:5], "--create-pr")
    assert [name for name, _ in sent.list] == ["create_repo", "upload_folder"]
    assert sent.list[1][1]["create_pr"] is True and result.stdout.endswith("/discussions/1\n")


# --- cards and records ------------------------------------------------------------------------------------------------


def test_card_is_filled_from_the_evaluation_and_keeps_its_images_private(dry, tiny_pigeon_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_pigeon_dir, tmp_path / "final"))
    images = [{"image": f"{SOMEBODYS}/lund.jpg", "truth": [55.7, 13.2], "distance_km": 6.3}]
    report = measured(model=f"{SOMEBODYS}/pigeon", images=images, left_out={f"{SOMEBODYS}/torn.jpg": "cannot be read"})
    # beside the folder `final`, where training writes it
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    result = dry(folder, "me/pigeon", "--license", "cc-by-nc-4.0")
    assert result["code"] == 0, result["problems"]
    card = ModelCard(result["card"])
    assert card.data.license == "cc-by-nc-4.0"
    median = next(entry for entry in card.data.eval_results if entry.metric_type == "median_km")
    assert median.metric_value == pytest.approx(report["metrics"]["median_km"]["value"], abs=1e-3)
    assert "2 images; 95 % bootstrap intervals" in card.text and "It abstains from 50.0 % of them" in card.text
    assert "What it is not for" in card.text
    for secret in (SOMEBODYS, "lund.jpg", "torn.jpg", str(tmp_path)):
        assert secret not in result["card"]
    assert any("images and left_out" in note for note in result["notes"])


def test_records_are_sent_without_paths_and_images(geobased, sent, tiny_pigeon_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_pigeon_dir, tmp_path / "model"))
    report = measured(model=f"{SOMEBODYS}/pigeon", images=[{"image": "lund.jpg"}])
    (folder / "evaluation.json").write_text(json.dumps(report))
    (folder / "training_log.json").write_text(json.dumps({"arguments": {"output_dir": f"{SOMEBODYS}/run", "steps": 3}}))
    assert geobased("push", folder, "me/pigeon", "--license", "mit").exit_code == 0
    sent_report = json.loads((sent.folder / "evaluation.json").read_text())
    assert sent_report["model"] == "pigeon" and "images" not in sent_report and sent_report["metrics"] == report["metrics"]
    log = json.loads((sent.folder / "training_log.json").read_text())
    assert log == {"arguments": {"output_dir": "run", "steps": 3}}
    assert "images" in json.loads((folder / "evaluation.json").read_text())  # the folder itself is untouched


def test_evaluation_of_a_shipped_model_fills_a_new_card(dry):
    result = dry("earthclip-mini", "me/places", "--card", "overwrite")
    stored = json.loads(Path(package.checkpoint_path("earthclip-mini"), "evaluation.json").read_text(encoding="utf-8"))
    median = stored["sets"]["held_out"]["pigeon"]["median_km"]["value"]
    assert result["code"] == 0 and f"| median, km | {median:,.1f} (" in result["card"]
    assert ModelCard(result["card"]).data.license == "apache-2.0"  # of the card before
    assert 'model="me/places"' in result["card"]


def test_models_of_other_kinds_need_a_card_of_their_own(fails, dry, tiny_model_dir, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "llama"
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in tiny_model_dir.glob("tokenizer*"):
        shutil.copy(path, folder)
    assert "no card can be written for a model of type llama" in fails("push", folder, "me/llama", "--dry-run")
    (folder / "README.md").write_text("---\nlicense: mit\npipeline_tag: text-generation\n---\n\n# Llama\n")
    assert dry(folder, "me/llama")["code"] == 0


def test_evaluation_given_by_name(dry, fails, tiny_pigeon_dir, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(measured()))
    result = dry(tiny_pigeon_dir, "me/pigeon", "--license", "mit", "--evaluation", path)
    assert "2 images; 95 %" in result["card"] and "evaluation.json" not in result["files"]
    path.write_text("{}")
    arguments = ("push", tiny_pigeon_dir, "me/pigeon", "--dry-run", "--evaluation")
    assert "is not what `geobased evaluate --report`" in fails(*arguments, path)
    assert "there is no file" in fails(*arguments, tmp_path / "nothing.json")


def test_a_card_is_kept_unless_it_is_to_be_overwritten(dry, tiny_copy):
    own = '---\nlicense: mit\npipeline_tag: text-generation\n---\n\n# Mine\n\n`AutoModel.from_pretrained("Mine")`\n'
    (tiny_copy / "README.md").write_text(own)
    assert dry(tiny_copy, "me/tiny")["card"] == own.replace('"Mine"', '"me/tiny"')
    licensed = ModelCard(dry(tiny_copy, "me/tiny", "--license", "apache-2.0")["card"])
    assert licensed.data.license == "apache-2.0" and "# Mine" in licensed.text
    new = ModelCard(dry(tiny_copy, "me/tiny", "--card", "overwrite")["card"])
    assert new.data.license == "mit" and "# Mine" not in new.text and "A BASED language model" in new.text


# --- what stays here, and what must be mended -------------------------------------------------------------------------


def test_secrets_pickles_and_training_state_stay_here(dry, tiny_copy):
    for name in (".env", ".git/config", "optimizer.pt", "pytorch_model.bin", "checkpoint-10/model.safetensors", "notes.docx"):
        (tiny_copy / name).parent.mkdir(exist_ok=True)
        (tiny_copy / name).write_text("secret")
    (tiny_copy / "LICENSE").write_text("Do what you like.")
    report = dry(tiny_copy, "me/tiny", "--license", "mit")
    assert report["code"] == 0
    assert set(report["left_out"]) == {
        *(".env", ".git/config", "optimizer.pt", "pytorch_model.bin", "checkpoint-10/model.safetensors", "notes.docx")
    }
    assert not set(report["files"]) & set(report["left_out"]) and "LICENSE" in report["files"]
    assert "hidden" in report["left_out"][".env"] and "safetensors" in report["left_out"]["pytorch_model.bin"]


def spoil_yaml(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n\n# Model\n")


def spoil_path(folder: Path) -> None:
    (folder / "README.md").write_text(f"---\nlicense: mit\npipeline_tag: text-generation\n---\n\nTrained on {SOMEBODYS}.\n")


def spoil_picture(folder: Path) -> None:
    exif = Image.Exif()
    exif[GPS_TAGS] = {1: "N", 2: (48.0, 51.0, 29.0), 3: "E", 4: (2.0, 17.0, 40.0)}
    Image.new("RGB", (8, 8)).save(folder / "example.jpg", exif=exif.tobytes())


def spoil_shards(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "tokenizer_config.json is missing"),
        (lambda folder: (folder / "modeling_based.py").unlink(), "modeling_based.py is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing: save the weights as safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"), "model.safetensors is damaged"),
        (spoil_shards, "model-00001-of-00002.safetensors is missing"),
        (lambda folder: (folder / "README.md").write_text("# No metadata\n"), "does not begin with metadata"),
        (spoil_yaml, "the metadata of README.md cannot be read"),
        (spoil_path, f"README.md names {SOMEBODYS}"),
        (lambda folder: (folder / "notes.txt").write_text("hf_" + "a1" * 17), "notes.txt holds a token of the Hub"),
        (spoil_picture, "example.jpg carries EXIF data"),
        (lambda folder: (folder / "README.md").write_text("---\ntags: x\n---\n\nA model\n"), "README.md names no licence"),
    ],
)
def test_nothing_is_sent_while_a_check_fails(geobased, sent, tiny_model_dir, tmp_path, spoil, words):
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    card = "---\nlicense: mit\npipeline_tag: text-generation\n---\n\n# Model\n"
    (folder / "README.md").write_text(card)
    spoil(folder)
    result = geobased("push", folder, "me/tiny", "--dry-run", "--json")
    assert result.exit_code == 2
    assert any(words in problem for problem in json.loads(result.stdout)["problems"]), result.stdout[-600:]
    result = geobased("push", folder, "me/tiny")
    assert result.exit_code == 2 and result.stdout == "" and words in result.stderr
    assert sent.list == []


# --- Spaces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generation", "geolocalization"])
def test_shipped_spaces_are_sent_as_they_are(geobased, sent, name):
    result = geobased("push", name, f"me/{name}")
    assert result.exit_code == 0 and result.stderr == f"uploading 3 files of {name} to me/{name}\n"
    (_, made_with), (_, uploaded_with) = sent.list
    assert made_with["repo_type"] == uploaded_with["repo_type"] == "space" and made_with["space_sdk"] == "gradio"
    original = REPOSITORY / "spaces" / name
    assert set(files_of(sent.folder)) == {"README.md", "app.py", "requirements.txt"}
    for path in sent.folder.iterdir():
        assert path.read_text(encoding="utf-8") == (original / path.name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "variable"),
    [("generation", "GEOBASED_DEMO_MODEL"), ("geolocalization", "GEOBASED_GEOLOCALIZATION_MODEL")],
)
def test_space_with_another_model(geobased, sent, monkeypatch, name, variable):
    address = "https://example.org/geobased-1.0-py3-none-any.whl"
    result = geobased("push", name, "me/demo", "--model", "me/large", "--package", address)
    assert result.exit_code == 0, result.stderr
    card = SpaceCard.load(sent.folder / "README.md")
    assert card.data.models == ["me/large"] and card.data.sdk == "gradio"
    assert "This Space runs [me/large](https://huggingface.co/me/large)" in card.text
    assert (sent.folder / "requirements.txt").read_text().strip().endswith(f"] @ {address}")

    seen = []
    page = ModuleType(f"geobased.demo.{name}")
    page.main = lambda: seen.append(os.environ[variable])
    monkeypatch.setitem(sys.modules, page.__name__, page)
    monkeypatch.delenv(variable, raising=False)
    runpy.run_path(str(sent.folder / "app.py"), run_name="__main__")
    monkeypatch.setenv(variable, "from/the-settings")
    runpy.run_path(str(sent.folder / "app.py"), run_name="__main__")
    assert seen == ["me/large", "from/the-settings"]


def test_folder_of_a_space(dry, tmp_path):
    folder = Path(shutil.copytree(REPOSITORY / "spaces" / "generation", tmp_path / "mine"))
    for name in ("packages.txt", "style.css", ".env"):
        (folder / name).write_text("x")
    report = dry(folder, "me/demo")
    assert report["code"] == 0 and report["kind"] == "space"
    assert {"packages.txt", "style.css", "app.py"} <= set(report["files"]) and report["left_out"] == {".env": "hidden"}
    text = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(text.replace("colorTo: green", "colorTo: mauve").replace("app.py", "start.py"))
    report = dry(folder, "me/demo")
    assert report["code"] == 2 and any("colorTo: mauve" in problem for problem in report["problems"])
    (folder / "README.md").write_text(text.replace("app_file: app.py", "app_file: start.py"), encoding="utf-8")
    assert any("start.py is missing" in problem for problem in dry(folder, "me/demo")["problems"])


# --- wrong usage, and a Hub that refuses ------------------------------------------------------------------------------


def test_push_errors(fails, tiny_model_dir, tmp_path):
    sentence = fails("push", tiny_model_dir, "me/tiny", code=1)
    assert "was not pushed to me/tiny" in sentence and "HF_HUB_OFFLINE is set" in sentence and "--dry-run" in sentence
    assert "me/a/b" in fails("push", tiny_model_dir, "me/a/b")
    assert "there is no folder './no'" in fails("push", "./no", "me/tiny", "--dry-run")
    assert "no-such" in fails("push", "acme/no-such", "me/tiny", "--dry-run", code=1)
    assert "--model and --package are for Spaces" in fails("push", tiny_model_dir, "me/tiny", "--model", "a/b", "--dry-run")
    assert "is a language model" in fails("push", tiny_model_dir, "me/tiny", "--as", "pipeline", "--dry-run")
    assert "no Space of that name ships" in fails("push", "chess", "me/tiny", "--as", "space", "--dry-run")
    assert "push that first" in fails("push", "generation", "me/demo", "--model", tiny_model_dir, "--dry-run")
    assert "a Space is described by its own" in fails("push", "generation", "me/demo", "--license", "mit", "--dry-run")
    assert "'magic'" in fails("push", tiny_model_dir, "me/tiny", "--card", "magic")


def test_without_a_login(fails, sent, tiny_model_dir, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "not logged in" in fails("push", tiny_model_dir, "me/tiny", code=1)
    assert sent.list == []


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "does not know your token"), (403, "may not write to acme"), (500, "the Hub is ill")],
)
def test_hub_that_refuses(geobased, sent, tiny_model_dir, monkeypatch, status, words):
    def refuse(self, *args, **kwargs):
        response = httpx.Response(status, request=httpx.Request("POST", "https://huggingface.co/api/repos/create"))
        raise HfHubHTTPError("the Hub is ill", response=response)

    monkeypatch.setattr("huggingface_hub.HfApi", type("Refusing", (), {"create_repo": refuse}))
    result = geobased("push", tiny_model_dir, "acme/tiny", "--license", "mit", "--json")
    assert result.exit_code == 1 and words in json.loads(result.stdout)["error"]
    assert "could not be pushed to acme/tiny" in result.stderr and "Traceback" not in result.stderr
