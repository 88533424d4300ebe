"""The comparison of SuperHF in small, with random weights."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("nltk")

from geobased.training import superhf_experiment
from geobased.training.superhf_experiment import load_results, run_experiment
from geobased.training.superhf_experiment_settings import ARMS, BASED, LLAMA, PRESETS, LlamaTwin, num_runs

SMALL = replace(
    PRESETS["smoke"],
    num_pairs=8,
    num_held_out_pairs=4,
    reward_batch_size=4,
    num_validation_prompts=2,
    num_test_prompts=4,
    num_perplexity_documents=1,
    llama=LlamaTwin(16, 1, 2, num_parameters=10_000, steps=1, batch_size=1, context_length=512, num_short=4, num_long=4),
)


@pytest.fixture(scope="module")
def based(tiny_model_dir):
    return str(tiny_model_dir)
