"""Heads by attribution: prompts, gradients by gates, the choice."""

import random
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from models.needle import tasks
from razor_vllm.heads import attribution
from razor_vllm.heads.attribution import AttributionOptions, Gated
from razor_vllm.heads.prompts import FACTS, Prompt, PromptMaker, read_text

NEEDLE = Path(__file__).parents[2] / "models/needle/weights"
WINDOW, SINKS = 16, 4


def gated_model(folder: Path, window: int = WINDOW, dtype: torch.dtype = torch.float32):
    """A model with gates, and the gates."""
    gated = Gated(10**9, window, SINKS)
    AttentionInterface.register("gated", gated.attend)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="gated", dtype=dtype)
    return model, gated


def random_prompt(length: int, vocab: int, seed: int = 0) -> Prompt:
    """Random tokens; the last quarter is asked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocab, (length,), generator=generator).tolist()
    return Prompt("repeat", ids, list(range(length - length // 4, length)))


@pytest.fixture(scope="module")
def maker(model_dir: Path) -> PromptMaker:
    """Prompts in bytes: the bundled model's tokenizer has a token for each."""
    return PromptMaker(AutoTokenizer.from_pretrained(model_dir), read_text(None), 4096)


@pytest.mark.parametrize("seed", range(4))
def test_a_haystack_asks_for_what_it_told(maker: PromptMaker, seed: int) -> None:
    """Every answer is in the haystack before it is asked, and nothing else is asked."""
    prompt = maker.make("retrieval", seed)
    text = maker.tokenizer.decode(prompt.ids)
    haystack, questions = text.split("\n\n")
    lines = questions.split("\n")
    assert len(lines) == FACTS
    answers = "".join(maker.tokenizer.decode([prompt.ids[at]]) for at in prompt.asked)
    for line in lines:
        answer = next(line[at:-1] for at in range(len(line)) if answers.startswith(line[at:-1]))
        assert answer
        assert answer in haystack
        answers = answers.removeprefix(answer)
    assert answers == ""
    assert 3000 < len(prompt.ids) <= 4096
    assert any(character.isdigit() for character in questions)
    assert any(len(line.rsplit(" ", 1)[-1]) > 6 for line in lines)


def test_kinds_of_prompt(maker: PromptMaker) -> None:
    """A repeat asks for its second copy; each seed has its own prompts."""
    repeat = maker.make("repeat", 0)
    half = len(repeat.asked)
    assert repeat.ids[repeat.asked[0] :] == repeat.ids[1 : 1 + half]
    for kind in attribution.PROMPTS:
        assert maker.make(kind, 1) == maker.make(kind, 1)
        assert maker.make(kind, 1).ids != maker.make(kind, 2).ids


def test_a_text_shorter_than_a_prompt_is_refused(maker: PromptMaker) -> None:
    """The line names both lengths; so it does where the questions leave no room."""
    with pytest.raises(ValueError, match=r"12 tokens, fewer than a prompt of 600.*--text"):
        PromptMaker(maker.tokenizer, "Hello there.", 600)
    short = PromptMaker(maker.tokenizer, read_text(None), 600)
    with pytest.raises(ValueError, match=f"no room for {FACTS} questions"):
        short.make("retrieval", 0)


@pytest.mark.parametrize("value", [1.0, 0.3])
def test_gradients_are_finite_differences(model_dir: Path, value: float) -> None:
    """Of each gate of a layer, with every other gate at the same value."""
    model, gated = gated_model(model_dir, dtype=torch.float64)
    prompt = random_prompt(90, model.config.vocab_size)
    gated.value = value
    with attribution.checkpointed(model):
        attribution.loss_of(model, prompt).backward()
    found = gated.take()
    assert sorted(found) == list(range(model.config.num_hidden_layers))
    for layer, head in ((0, 1), (1, 0), (3, 3)):
        losses = []
        for step in (1e-2, -1e-2):
            gated.gates = {
                at: torch.full((4,), value).index_add(
                    0, torch.tensor([head]), torch.tensor([step * (at == layer)])
                )
                for at in range(4)
            }
            with torch.no_grad():
                losses.append(attribution.loss_of(model, prompt).item())
        gated.gates = {}
        want = -(losses[0] - losses[1]) / 2e-2
        assert found[layer][head].item() == pytest.approx(want, rel=0.02, abs=2e-5)


def test_gates_are_full_and_windowed_attention(model_dir: Path) -> None:
    """At 1 the model as it is; at 0 every query reads sinks and window."""
    model, gated = gated_model(model_dir)
    prompt = random_prompt(90, model.config.vocab_size)
    plain = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
    back = torch.arange(90)[:, None] - torch.arange(90)
    seen = (back >= 0) & ((back < WINDOW) | (torch.arange(90) < SINKS))
    masks = {1.0: back >= 0, 0.0: seen}
    for gated.value, mask in masks.items():
        added = torch.zeros(1, 1, 90, 90).masked_fill(~mask, torch.finfo(torch.float32).min)
        with torch.no_grad():
            want = plain(torch.tensor([prompt.ids]), attention_mask=added).logits
            got = model(torch.tensor([prompt.ids]), use_cache=False).logits
        gated.gates = {}
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return out


def test_no_tensor_grows_with_the_square_of_the_length(model_dir: Path) -> None:
    """Forward and backward: twice the length, at most twice the largest tensor."""
    model, gated = gated_model(model_dir)
    sizes = []
    for length in (1024, 2048):
        with Largest() as largest, attribution.checkpointed(model):
            attribution.loss_of(model, random_prompt(length, model.config.vocab_size)).backward()
        gated.take()
        sizes.append(largest.elements)
    assert sizes[1] <= 2.1 * sizes[0]
    assert sizes[1] < 2048 * 2048


def test_layers_are_computed_again_in_the_backward_pass(model_dir: Path) -> None:
    """Nothing but a layer's input is kept; afterwards the model is as before."""
    gated = Gated(10**9, WINDOW, SINKS)
    calls = []

    def attend(module, *args, **kwargs):
        calls.append(module.layer_idx)
        return gated.attend(module, *args, **kwargs)

    AttentionInterface.register("counted", attend)
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="counted")
    with attribution.checkpointed(model):
        attribution.loss_of(model, random_prompt(60, model.config.vocab_size)).backward()
    assert calls == [0, 1, 2, 3, 3, 2, 1, 0]
    assert not any(module.training for module in model.modules())
    assert not model.is_gradient_checkpointing


def test_the_heads_that_look_up_facts_are_found() -> None:
    """The needle model's four retrieval heads, all in layer 1, hold nearly all of the score.

    That they retrieve was found otherwise: random heads in their place lose the facts.
    """
    model, gated = gated_model(NEEDLE, window=64)
    rounds = [[lookup(seed)] for seed in (0, 1)]
    found = attribution.attribute(model, gated, rounds)
    assert found.losses["retrieval"][0] < 0.2
    assert found.losses["retrieval"][-1] > 2
    scores = torch.stack([attribution.mix(kinds) for kinds in found.rounds]).mean(0)
    chosen = attribution.choose(scores, found.full_layers, AttributionOptions(count=4))
    assert chosen == ((), (0, 1, 2, 3), (), ())
    assert scores[1].sum() > 0.98 * scores.sum()


def lookup(seed: int) -> Prompt:
    """A chat in the needle model's language; its codes are asked."""
    drawn = tasks.recall(random.Random(seed), 600)
    asked = [at for at, mark in enumerate(drawn.marks) if mark == tasks.ANSWER]
    return Prompt("retrieval", drawn.ids, asked)


def test_choice_by_share_count_and_mass() -> None:
    """The fewest heads that hold the mass; ties go to the lower layer and head."""
    scores = torch.tensor([[0.5, 0.0], [0.2, 0.2], [0.1, 0.0]], dtype=torch.float64)
    want = {
        (("count", 1),): ((0,), (), ()),
        (("count", 2),): ((0,), (0,), ()),
        (("share", 0.5),): ((0,), (0, 1), ()),
        (("mass", 0.7),): ((0,), (0,), ()),
        (("mass", 0.71),): ((0,), (0, 1), ()),
        (("mass", 1.0),): ((0,), (0, 1), (0,)),
        (): ((0,), (0, 1), (0,)),
    }
    for options, chosen in want.items():
        assert attribution.choose(scores, range(3), AttributionOptions(**dict(options))) == chosen
    assert attribution.choose(scores, [2], AttributionOptions(count=1)) == ((), (), (0,))
    with pytest.raises(ValueError, match="count is 7; the model has 6"):
        attribution.choose(scores, range(3), AttributionOptions(count=7))


def test_kinds_count_alike_however_small_their_losses() -> None:
    """A kind of small losses is scaled; what harms is no score."""
    mixed = attribution.mix(
        {"retrieval": torch.tensor([[8.0, 0.0, -4.0]]), "repeat": torch.tensor([[0.0, 0.01, 0.0]])}
    )
    weights = attribution.WEIGHTS
    total = sum(weights.values())
    want = [weights["retrieval"] / total, weights["repeat"] / total, 0.0]
    assert mixed[0].tolist() == pytest.approx(want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.5, "mass": 0.9}, "one of share, mass"),
        ({"share": 0.0}, "share is 0.0"),
        ({"mass": float("nan")}, "mass is nan"),
        ({"count": 0}, "count is 0"),
        ({"length": 100, "window": 99}, "nothing would be compressed"),
        ({"prompts": 0}, "prompts is 0"),
        ({"seeds": ()}, "no seed"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    """Each refusal names the value."""
    with pytest.raises(ValueError, match=message):
        AttributionOptions(**options)


def test_a_model_that_gives_no_gradients_is_refused(model_dir: Path) -> None:
    """Its gates come back without any."""
    model, gated = gated_model(model_dir)
    with torch.no_grad():
        attribution.loss_of(model, random_prompt(60, model.config.vocab_size))
    with pytest.raises(NotImplementedError, match=r"no gradients.*--method probe"):
        gated.take()
