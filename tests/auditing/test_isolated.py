"""What an auditor with black-box access cannot do, with the model in a process of its own."""

import copy
import gc
import io
import pickle
import types

import pytest
import torch
from transformers import PreTrainedModel

from geobased.auditing import AccessDeniedError, AuditError, AuditTarget, Capability
from geobased.auditing.wire import Message, read_message, write_message

NOT_BLACK = ("forward", "score", "score_ids", "top_tokens", "tokenize", "modules", "weights", "fine_tune", "randomise", "restore")
NOT_BLACK += ("parameter_gradients", "parameter_shapes")
NOWHERE = ("logits", "parameters", "backward", "register_forward_hook", "state_dict", "model", "module", "tokenizer", "grad")


@pytest.fixture(scope="module")
def black(tiny_model_dir):
    before = models()
    with AuditTarget.open(str(tiny_model_dir), "black") as target:
        yield target, before


def models() -> set[int]:
    return {id(found) for found in gc.get_objects() if issubclass(type(found), PreTrainedModel)}


def test_answers_are_served_as_in_process(black, tiny_model_dir):
    prompts = ["the river", "the town looks at"]
    asked = {"max_new_tokens": 5, "temperature": 1.0, "samples": 2, "seed": 3}
    answers = []
    for mode in ("isolated", "in_process"):
        target = black[0] if mode == "isolated" else AuditTarget.open(str(tiny_model_dir), "black", mode=mode)
        with target.scope("test", "query", budget=100) as metered:
            answers.append((metered.generate(prompts, **asked), metered.spent))
    assert answers[0] == answers[1]
    assert black[0].mode == "isolated"


@pytest.mark.parametrize("name", [*NOT_BLACK, *NOWHERE])
def test_what_is_not_granted_is_no_attribute(black, name):
    target, _ = black
    with pytest.raises(AccessDeniedError):
        getattr(target, name)
    assert not hasattr(target, name) and name not in dir(target)
    with target.scope("test", "query", budget=1) as metered, pytest.raises(AccessDeniedError):
        getattr(metered, name)


@pytest.mark.parametrize(
    ("verb", "arguments", "tensors"),
    [
        ("forward", {"read": ["logits"]}, {"ids": torch.tensor([[1, 2]])}),
        ("forward", {"read": ["model.layers.0"]}, {"ids": torch.tensor([[1, 2]])}),
        ("forward", {"read": [], "track": ["token_weights"]}, {"token_weights": torch.eye(300)[None, :2]}),
        ("forward", {"read": [], "parameters": ["*"]}, {"ids": torch.tensor([[1, 2]])}),
        ("backward", {"handle": 1, "wrt": ["ids"]}, {}),
        ("weights", {"names": ["*"]}, {}),
        ("score", {"start": 1}, {"ids": torch.tensor([[1, 2]])}),
        ("tokenize", {"texts": ["a"], "special": True}, {}),
        ("fine_tune", {"steps": 1}, {}),
        ("identity", {}, {}),
        ("_parameters", {"patterns": ["*"]}, {}),
        ("outside", {"what": "docs"}, {}),
        ("__class__", {}, {}),
    ],
)
def test_going_around_the_proxy_is_refused_and_written_down(black, verb, arguments, tensors):
    target, _ = black
    target.grant = Capability.QUERY | Capability.WEIGHTS  # of no avail: the other side has its own
    try:
        with pytest.raises(AccessDeniedError):
            target._request(verb, arguments, tensors)
    finally:
        target.grant = Capability.QUERY
    last = target.ledger()[-1]
    assert last["outcome"] == "refused" and last["verb"].endswith(verb)


def test_a_scope_cannot_have_more_than_the_target(black):
    with pytest.raises(AccessDeniedError, match="logits is not granted"), black[0].scope("test", "logits", budget=1):
        pass


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_targets_are_not_copied(black, copied):
    with pytest.raises(AccessDeniedError, match="pickled or copied"):
        copied(black[0])


def test_no_walk_from_the_target_leads_to_a_model(black):
    """Through attributes, slots, closures, containers and classes; and no model is in this process at all."""
    target, before = black
    assert models() <= before
    seen, ahead = set(), [target]
    while ahead:
        found = ahead.pop()
        if id(found) in seen or isinstance(found, types.ModuleType | type) or len(seen) > 20_000:
            continue
        seen.add(id(found))
        assert not isinstance(found, torch.nn.Module | torch.Tensor), type(found)
        ahead += [value for value in getattr(found, "__dict__", {}).values()]
        ahead += [cell.cell_contents for cell in getattr(found, "__closure__", None) or ()]
        for kind in type(found).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                try:
                    ahead.append(object.__getattribute__(found, name))
                except AttributeError:
                    continue
        if isinstance(found, dict):
            ahead += list(found.values())
        elif isinstance(found, list | tuple | set):
            ahead += list(found)
    assert len(seen) > 20


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_not_executed_on_the_other_side(tiny_model_dir, tmp_path, capfd):
    planted = tmp_path / "planted"
    with AuditTarget.open(str(tiny_model_dir), "black") as target:
        server = next(cell.cell_contents for cell in target._ask.__closure__)
        server._process.stdin.write(pickle.dumps(Planted(str(planted))) * 20)
        server._process.stdin.flush()
        with pytest.raises(AuditError, match="process"):
            target.ledger()
    assert not planted.exists()
    assert "too large" in capfd.readouterr().err


def test_messages_are_json_and_tensors_alone():
    stream = io.BytesIO()
    sent = Message({"a": [1, None, "ü"]}, {"x": torch.arange(6).view(2, 3), "y": torch.tensor(1.5, dtype=torch.bfloat16)})
    write_message(stream, sent)
    stream.seek(0)
    got = read_message(stream)
    assert got.header == sent.header and all(torch.equal(got.tensors[name], sent.tensors[name]) for name in sent.tensors)
    with pytest.raises(TypeError):
        write_message(io.BytesIO(), Message({"a": object()}))
    with pytest.raises(ValueError, match="ends within"):
        read_message(io.BytesIO(stream.getvalue()[:-1]))


def test_what_keeps_a_model_from_loading_is_told(tmp_path, tiny_clip_dir):
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises((AuditError, ValueError), match="nothing"):
        AuditTarget.open(str(tmp_path), "black")
