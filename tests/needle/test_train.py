"""The training script: takes steps, goes on where it stopped, and saves what vLLM loads."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.needle.tasks import draw_batch
from models.needle.train import (
    STAGES,
    Stage,
    Trainer,
    export,
    hidden_states,
    make_model,
    place_of,
    rate_at,
    spread_positions,
    train,
)

SHORT = (Stage(32, 3, 128, 32, 1.0), Stage(64, 3, 128, 256, 0.5))


def test_a_few_steps_learn_something() -> None:
    """The loss of a fresh model falls within thirty steps."""
    trainer = Trainer(0, (Stage(32, 30, 512, 32, 1.0),), "cpu")
    said = [trainer.take_step() for _ in range(30)]
    first = sum(row["loss_plain"] for row in said[:5])
    last = sum(row["loss_plain"] for row in said[-5:])
    assert last < first


def test_stopped_training_goes_on(tmp_path: Path) -> None:
    """Stopped and resumed, the weights are those of a run in one go."""
    whole = Trainer(1, SHORT, "cpu")
    train(whole, None, None)
    stopped = Trainer(1, SHORT, "cpu")
    for _ in range(2):
        stopped.take_step()
    stopped.save(tmp_path / "checkpoint.pt")
    resumed = Trainer(1, SHORT, "cpu")
    train(resumed, tmp_path / "checkpoint.pt", tmp_path / "log.jsonl")
    assert resumed.step == whole.step == 6
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    log = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in log] == [3, 4, 5, 6]


def test_another_seeds_checkpoint_is_refused(tmp_path: Path) -> None:
    Trainer(1, SHORT, "cpu").save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="seed 1, not 2"):
        Trainer(2, SHORT, "cpu").load(tmp_path / "checkpoint.pt")


def test_saved_model_is_the_trained_one(tmp_path: Path) -> None:
    """transformers loads it with no code of ours, and computes the same."""
    model = make_model(2)
    export(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = draw_batch(random.Random(0), 111, 222).ids
    positions = torch.arange(111)[None]
    with torch.no_grad():
        want = model.lm_head(hidden_states(model, ids, positions))
        torch.testing.assert_close(loaded(ids).logits, want)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == model.config.vocab_size


@pytest.mark.parametrize(("length", "span"), [(2, 2), (2, 64), (63, 63), (63, 64), (64, 4096)])
def test_spread_positions_rise_within_the_span(length: int, span: int) -> None:
    """Gaps only lengthen distances; order and range stay."""
    for seed in range(20):
        positions = spread_positions(random.Random(seed), length, span)[0]
        assert positions[0] == 0
        assert (positions.diff() >= 1).all()
        assert positions[-1] < max(span, length)


def test_every_step_has_a_stage_and_a_rate() -> None:
    """Stages follow one another; the rate warms up, stays and falls."""
    total = sum(stage.steps for stage in STAGES)
    places = [place_of(step, STAGES) for step in range(total)]
    assert places[0] == (0, 0)
    assert places[-1] == (len(STAGES) - 1, STAGES[-1].steps - 1)
    assert places == sorted(places)
    rates = [rate_at(step, STAGES) for step in range(total)]
    assert max(rates) == 1.0
    assert 0 < rates[0] < 0.1
    assert 0 < rates[-1] < 0.1
    with pytest.raises(ValueError, match="past the last stage"):
        place_of(total, STAGES)
