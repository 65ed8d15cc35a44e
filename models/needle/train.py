"""Train the needle model from a seed, on a CPU or a GPU.

    python -m models.needle.train FOLDER [--seed 0] [--threads 2] [--checkpoint FILE]

Lengths grow in stages (`STAGES`). Short sequences are cheap, so the look-up itself is learned
with them. Their positions are spread by random gaps, so that long distances are seen
early (PoSE, arXiv 2309.10400), and the last stages train at full length. Started again
with the same checkpoint file, it continues where it stopped.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from models.needle.tasks import ANSWER, COPY, NAMES, PLAIN, Batch, draw_batch
from models.needle.tokenizer import BOS, EOS, MAX_POSITIONS, TOKEN_IDS, make_tokenizer

WIDTH, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS = 128, 32, 8, 4

LOSS_WEIGHTS = {PLAIN: 0.2, COPY: 1.0}
"""Weight of the mean loss of marks other than ANSWER, whose weight is the stage's."""
PLAIN_STRIDE = 4
"""One in so many plain targets has a loss: the vocabulary's softmax costs a tenth of a step."""
MATRIX_RATE, OTHER_RATE = 0.02, 3e-3
"""Learning rates of Muon (matrices) and AdamW (embedding, norms). At length 128 and 4,096
tokens a step Muon had 88 % of the answers' tokens right after 420 steps, AdamW alone at
2e-3 28 % (one CPU core, no `start_looking_back`)."""
WARMUP_STEPS = 50
EMBEDDING_MEAN = 0.5
LOOK_BACK_HEADS, LOOK_BACK_PAIRS, LOOK_BACK_GAIN = 4, 4, 128.0
"""Query heads of layer 0, their fastest rotary pairs, and the size, of `start_looking_back`."""
SHORTER_SHARE = 0.25
"""Share of a stage's steps that go back to the length of an earlier stage."""
CHECKPOINT_STEPS = 50


class Stage(NamedTuple):
    """Steps at one length.

    length: tokens per sequence. steps: how many. tokens: of a batch. span: positions
    that a sequence is spread over, see `spread_positions`. own_nouns: share of the
    contexts in which no two facts share a noun. recall: share of the sequences that are
    about facts. answer_weight: of the mean loss of answers, in addition to `LOSS_WEIGHTS`.
    rates: learning rate at its start and its end, as shares of the highest.
    """

    length: int
    steps: int
    tokens: int
    span: int
    own_nouns: float
    recall: float = 0.54
    answer_weight: float = 1.0
    rates: tuple[float, float] = (1.0, 1.0)


STAGES = (
    Stage(128, 600, 4096, 128, 0.0),
    Stage(256, 250, 4096, 4096, 0.0),
    Stage(512, 300, 4096, 8192, 0.0),
    Stage(512, 150, 8192, 8192, 0.75, 0.65, 3.0, rates=(1.0, 0.8)),
    Stage(1024, 55, 8192, 12288, 0.75, 0.65, 3.0, rates=(0.8, 0.65)),
    Stage(1024, 45, 8192, 12288, 0.9, 0.65, 3.0, rates=(0.65, 0.35)),
    Stage(512, 80, 4096, 12288, 0.9, 0.65, 3.0, rates=(0.35, 0.12)),
    Stage(2048, 20, 4096, 12288, 0.9, 0.65, 3.0, rates=(0.12, 0.06)),
    Stage(4096, 20, 4096, 12288, 0.9, 0.65, 3.0, rates=(0.06, 0.0)),
    Stage(2048, 90, 8192, 12288, 0.9, 0.8, 3.0, rates=(0.35, 0.35)),
    Stage(4096, 130, 8192, 12288, 0.9, 0.8, 3.0, rates=(0.35, 0.0)),
    Stage(512, 200, 8192, 12288, 0.9, 0.8, 10.0, rates=(0.5, 0.4)),
    Stage(2048, 80, 8192, 12288, 0.9, 0.8, 10.0, rates=(0.4, 0.25)),
    Stage(4096, 100, 8192, 12288, 0.9, 0.8, 10.0, rates=(0.25, 0.0)),
)
"""The training of the shipped weights. Stages from the third on were shortened during training,
before or in them, so that an uninterrupted run draws the same batches at the same rates."""


def make_model(seed: int) -> LlamaForCausalLM:
    """A fresh model: 4 layers of 4 KV heads, each shared by 2 query heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKEN_IDS),
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    start_looking_back(model)
    return model


@torch.no_grad()
def start_looking_back(model: LlamaForCausalLM) -> None:
    """Initialise the weights so that layer 0 can tell a token what comes just before it.

    Induction needs a head that looks one token back, and such a head takes long to emerge.
    Embeddings get a common mean, on which queries and keys of layer 0 can agree for any
    token, and its first query heads start with queries rotated back by 1, 2, ...
    positions. Nothing else is set: which heads match, copy or echo is learned. In trials
    on repeated random ids (length 64, 2,048 tokens per step) 90 % of the copies were right
    after 175 steps; without this, 11 % after 200 (head_dim 64 and base 10,000).
    """
    group = NUM_HEADS // NUM_KV_HEADS
    model.model.embed_tokens.weight.normal_(EMBEDDING_MEAN, 1.0)
    # Logits of a normal size: the output matrix is the embedding.
    model.model.norm.weight.fill_(WIDTH**-0.5)
    attention = model.model.layers[0].self_attn
    torch.nn.init.orthogonal_(attention.v_proj.weight)
    torch.nn.init.orthogonal_(attention.o_proj.weight)
    fast = model.model.rotary_emb.inv_freq[:LOOK_BACK_PAIRS]
    pairs = slice(0, len(fast)), slice(HEAD_DIM // 2, HEAD_DIM // 2 + len(fast))
    for head in range(LOOK_BACK_HEADS):
        key = attention.k_proj.weight[head // group * HEAD_DIM :]
        if head % group == 0:
            key[pairs[0]] += 1 / WIDTH
        query = attention.q_proj.weight[head * HEAD_DIM :]
        turn = fast[:, None] * (head + 1)
        query[pairs[0]] += LOOK_BACK_GAIN / WIDTH * turn.cos()
        query[pairs[1]] -= LOOK_BACK_GAIN / WIDTH * turn.sin()


def spread_positions(rng: random.Random, length: int, span: int) -> torch.Tensor:
    """Positions 0 <= p < span, rising, with up to 4 gaps: [1, length] of int64."""
    positions = torch.arange(length)
    spare = span - length
    if spare <= 0 or rng.random() < 0.3:
        return positions[None]
    for _ in range(rng.randint(1, 4)):
        gap = rng.randint(0, spare)
        positions[rng.randrange(1, length) :] += gap
        spare -= gap
    return positions[None]


def hidden_states(
    model: LlamaForCausalLM, ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Last hidden states [batch, length, width] of causal attention.

    `LlamaModel.forward` would take gaps in the positions for packed documents, so
    the layers are called one by one.
    """
    hidden = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(hidden, position_ids=positions)
    for layer in model.model.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    return model.model.norm(hidden)


class Outcome(NamedTuple):
    """Losses and shares of right first guesses, by mark; loss is their weighted sum."""

    loss: torch.Tensor
    losses: dict[int, float]
    right: dict[int, float]


def judge(
    model: LlamaForCausalLM, batch: Batch, positions: torch.Tensor, answer_weight: float
) -> Outcome:
    """Loss of a batch: each mark's mean cross entropy, weighted."""
    hidden = hidden_states(model, batch.ids, positions)[:, :-1].flatten(0, 1)
    targets, marks = batch.ids[:, 1:].flatten(), batch.marks[:, 1:].flatten()
    judged = marks != PLAIN
    judged[::PLAIN_STRIDE] = True
    targets, marks = targets[judged], marks[judged]
    logits = model.lm_head(hidden[judged])
    losses = F.cross_entropy(logits, targets, reduction="none")
    hits = (logits.detach().argmax(-1) == targets).float()
    total, by_mark, right = logits.new_zeros(()), {}, {}
    for mark, weight in {**LOSS_WEIGHTS, ANSWER: answer_weight}.items():
        chosen = marks == mark
        if chosen.any():
            mean = losses[chosen].mean()
            total = total + weight * mean
            by_mark[mark] = mean.item()
            right[mark] = hits[chosen].mean().item()
    return Outcome(total, by_mark, right)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and "layers" in name else others).append(weight)
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Place(NamedTuple):
    """Index of a step's stage, and how many of that stage's steps are done."""

    stage: int
    done: int


def place_of(step: int, stages: tuple[Stage, ...]) -> Place:
    """Where in the stages a step is.

    Raises:
        ValueError: past the last stage.
    """
    done = step
    for index, stage in enumerate(stages):
        if done < stage.steps:
            return Place(index, done)
        done -= stage.steps
    raise ValueError(f"step {step} is past the last stage")


def rate_at(step: int, stages: tuple[Stage, ...]) -> float:
    """Learning rate at a step, as a share of the highest: warm-up, then linear by stage."""
    place = place_of(step, stages)
    stage = stages[place.stage]
    first, last = stage.rates
    rate = first + (last - first) * place.done / stage.steps
    return min(rate, (step + 1) / WARMUP_STEPS)


def draw_step(seed: int, step: int, stages: tuple[Stage, ...]) -> tuple[Batch, torch.Tensor]:
    """A step's batch and positions [1, length]; they depend on seed, step and stages alone."""
    rng = random.Random(f"{seed}/{step}")
    index = place_of(step, stages).stage
    stage = stages[index]
    length = stage.length
    if index and rng.random() < SHORTER_SHARE:
        length = stages[rng.randrange(index)].length
    batch = draw_batch(rng, length, stage.tokens, stage.own_nouns, stage.recall)
    return batch, spread_positions(rng, length, stage.span)


class Trainer:
    """A model in training: takes steps, and saves and loads its state."""

    def __init__(self, seed: int, stages: tuple[Stage, ...], device: str) -> None:
        self.seed, self.stages, self.device = seed, stages, device
        self.model = make_model(seed)
        torch.nn.Module.to(self.model, device)
        self.optimizers = make_optimizers(self.model)
        self.step = 0
        self.seconds = 0.0

    @property
    def num_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def take_step(self) -> dict[str, float]:
        """Train on one batch and return its figures."""
        start = time.perf_counter()
        batch, positions = draw_step(self.seed, self.step, self.stages)
        ids, marks, positions = (x.to(self.device) for x in (*batch, positions))
        stage = self.stages[place_of(self.step, self.stages).stage]
        outcome = judge(self.model, Batch(ids, marks), positions, stage.answer_weight)
        outcome.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = rate_at(self.step, self.stages)
        for optimizer, highest in zip(self.optimizers, (MATRIX_RATE, OTHER_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * highest
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - start
        return {
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "length": ids.shape[1],
            **{f"loss_{NAMES[mark]}": round(x, 4) for mark, x in outcome.losses.items()},
            **{f"right_{NAMES[mark]}": round(x, 4) for mark, x in outcome.right.items()},
        }

    def save(self, path: Path) -> None:
        """Write a checkpoint; a crash leaves the old one or the new one."""
        new = path.with_suffix(".new")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step,
                "seconds": self.seconds,
                "seed": self.seed,
            },
            new,
        )
        new.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: it was made from another seed.
        """
        state = torch.load(path, map_location=self.device)
        if state["seed"] != self.seed:
            raise ValueError(f"{path} is of seed {state['seed']}, not {self.seed}")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]


def export(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config, weights, tokenizer and chat template, as vLLM loads them."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def train(trainer: Trainer, checkpoint: Path | None, log: Path | None) -> None:
    """Take all steps from the checkpoint on; a line of JSON per step goes to the log."""
    if checkpoint is not None and checkpoint.exists():
        trainer.load(checkpoint)
    with tqdm(total=trainer.num_steps, initial=trainer.step, desc="train") as bar:
        while trainer.step < trainer.num_steps:
            said = trainer.take_step()
            bar.update()
            bar.set_postfix(length=said["length"], answers=said.get("right_answer"))
            if log is not None:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(said) + "\n")
            done = trainer.step == trainer.num_steps
            if checkpoint is not None and (done or trainer.step % CHECKPOINT_STEPS == 0):
                trainer.save(checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--checkpoint", type=Path, help="file to save to and to go on from")
    parser.add_argument("--log", type=Path, help="file for a line of JSON a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainer = Trainer(args.seed, STAGES, args.device)
    train(trainer, args.checkpoint, args.log)
    export(trainer.model, args.folder)
    print(f"made {args.folder} in {trainer.seconds / 60:.0f} minutes of training")


if __name__ == "__main__":
    main()
