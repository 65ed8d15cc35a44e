"""Finding the heads of a model."""

from pathlib import Path

import pytest
import torch
from make_random_llama import HEAD_SIZE, NUM_KV_HEADS, NUM_LAYERS
from transformers import AutoModelForCausalLM, AutoTokenizer

from razor_kernels.scores import COPIES
from razor_vllm.heads.calibrate import (
    ProbeOptions,
    calibrate,
    choose,
    fitting_period,
    mean_scores,
    probe_ids,
    stability,
)
from razor_vllm.heads.profile import HeadProfile

SCORES = {
    "induction": ((0.9, 0.1), (0.5, 0.5), (0.2, 0.5)),
    "echo": ((0.0, 0.8), (0.1, 0.0), (0.0, 0.0)),
}


@pytest.mark.parametrize(
    ("induction", "echo", "want"),
    [
        (0.14, 0.01, ((0, 1), (), ())),
        (0.5, 0.0, ((0,), (0, 1), ())),  # a tie of three for two places: the lower layer
        (0.0, 0.2, ((1,), (0,), ())),
        (1.0, 0.0, ((0, 1), (0, 1), (0, 1))),
    ],
)
def test_the_choice_is_the_top_share_of_the_model(induction, echo, want) -> None:
    """Shares are of all KV heads, whole heads upward; ties break the same way each time."""
    assert choose(SCORES, ProbeOptions(induction, echo)) == want


def test_scores_are_the_quadratic_forms(model_dir: Path) -> None:
    """Through transformers' registry: the same scores as from whole attention matrices."""
    period, seed = 40, 5
    options = ProbeOptions(period=period, seeds=(seed,))
    profile = calibrate(str(model_dir), options)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    plain = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    ids = probe_ids(plain, tokenizer.bos_token_id, period, seed)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    for layer, weights in enumerate(attentions):
        echo = torch.zeros(weights.shape[1])
        induction = torch.zeros_like(echo)
        for i in range(1 + period, ids.shape[1]):
            for j in range(i - period, 0, -period):
                echo += weights[0, :, i, j]
                induction += weights[0, :, i, j + 1]
        count = (COPIES - 1) * period
        for name, mass in (("echo", echo), ("induction", induction)):
            want = (mass / count).view(NUM_KV_HEADS, -1).amax(1)
            assert profile.scores[name][layer] == pytest.approx(want.tolist(), abs=1e-4)
    assert (profile.num_layers, profile.head_size) == (NUM_LAYERS, HEAD_SIZE)
    assert profile.num_retrieval_heads in (3, 4)
    assert HeadProfile.from_json(profile.to_json()) == profile


def test_the_probe_is_four_copies_after_the_first_token() -> None:
    """Random tokens, the same for the same seed, from the vocabulary given."""
    ids = probe_ids([7, 8, 9], 1, 20, seed=3)
    assert ids.shape == (1, 81)
    assert ids[0, 0] == 1
    assert torch.equal(ids[0, 1:21], ids[0, 61:])
    assert set(ids[0, 1:].tolist()) <= {7, 8, 9}
    assert torch.equal(ids, probe_ids([7, 8, 9], 1, 20, seed=3))
    assert not torch.equal(ids, probe_ids([7, 8, 9], 1, 20, seed=4))


def test_means_and_overlap_over_seeds() -> None:
    """Scores are means over seeds; overlap is the mean Jaccard index."""
    rounds = [{"echo": [[0.0, 1.0]]}, {"echo": [[1.0, 1.0]]}]
    assert mean_scores(rounds) == {"echo": ((0.5, 1.0),)}
    assert stability([((0, 1),), ((1,),)]) == 0.5
    assert stability([((0, 1),)]) == 1.0


def test_bad_options_and_short_models_are_refused() -> None:
    """Each refusal names the value."""
    with pytest.raises(ValueError, match="induction is 1.5"):
        ProbeOptions(induction=1.5)
    with pytest.raises(ValueError, match="both 0"):
        ProbeOptions(induction=0, echo=0)
    with pytest.raises(ValueError, match="period is 1"):
        ProbeOptions(period=1)
    with pytest.raises(ValueError, match="no seed"):
        ProbeOptions(seeds=())
    assert fitting_period(ProbeOptions(), 10_001) == 2500
    assert fitting_period(ProbeOptions(), 4096) == 1023
    with pytest.raises(ValueError, match="too short"):
        fitting_period(ProbeOptions(), 8)
