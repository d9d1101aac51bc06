"""What ExpRL is compared with: the paper's other ways to begin, and a judge with another reference.

    python tests/baselines.py --method sft --model MODEL --data DATA
    python tests/baselines.py --method distill --model MODEL --data DATA
    python tests/baselines.py --method process --reference wrong --model MODEL --data DATA

The loop is that of exprl.py, with the same flags. What a baseline does otherwise is handed to it:
what takes the place of the samples, of the advantages, of the loss.
"""

import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import exprl  # noqa: E402
import judge_prompts  # noqa: E402
from exprl import Completion, setting  # noqa: E402


@dataclass(kw_only=True)
class BaselineSettings(exprl.TrainSettings):
    """Train a baseline: SFT on the references, self-distillation, ExpRL by another reference."""

    method: str = setting("baseline, or ExpRL", "sft", "distill", "process", "outcome")
    reference: str = setting("ExpRL's judge is shown (wrong: another's)", "right", "none", "wrong")


def show_reference(rows: list[dict], which: str, seed: int) -> list[dict]:
    """Rows with the right reference, none, or a wrong one, of the row a fixed distance before."""
    if which == "right":
        return rows
    if which == "none":
        return [row | {"reference": ""} for row in rows]
    if len(rows) < 2:
        exprl.stop("a wrong reference is another problem's: give two problems or more")
    distance = np.random.default_rng(seed).integers(1, len(rows))
    return [row | {"reference": rows[i - distance]["reference"]} for i, row in enumerate(rows)]


# ---- SFT: cross-entropy on the references, with the policy's own prompt --------------------------
def read_references(model, tokenizer, rows: list, *_) -> Iterator[list[Completion]]:
    """In place of samples, one of each problem: reference + eos, cut where a sample would be."""
    sampling = model.generation_config
    ends, eos = sampling.eos_token_id, tokenizer.eos_token_id
    for row in rows:
        ids = tokenizer(row["reference"], add_special_tokens=False).input_ids
        ids = [*ids, ends[0] if eos is None else eos][: sampling.max_new_tokens]
        yield [exprl.read_completion(row | {"answer": ""}, ids, tokenizer, ends)]


def sft_loss(model, batch: dict, n_tokens: int, settings: BaselineSettings) -> tuple[Tensor, dict]:
    """A micro-batch's share of the cross-entropy, at temperature 1 whatever that of sampling is."""
    logp = exprl.token_logprobs(model, *batch["inputs"], 1.0)
    total = torch.where(batch["mask"], -logp, 0.0).sum()
    return total / n_tokens, {"cross_entropy": total}


# ---- On-policy self-distillation: the teacher is the initial model, with the reference -----------
def reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(B, T, V) logits of both at the student's samples -> (B, T) KL(student || teacher), nats, all
    in float32: KL_t = sum_v p_S(v) (log p_S(v) - log p_T(v)), p = softmax(logits / temperature).
    Its gradient is the mean of a_t grad log p_S(y_t), a_t = log p_S(y_t) - log p_T(y_t), y_t ~ p_S.
    The float32 copies exist for one row at a time, and are computed again in the backward pass.
    >>> reverse_kl(torch.tensor([[[0.0, 1.0]]]), torch.zeros(1, 1, 2), 1.0)
    tensor([[0.1109]])
    """

    def row_kl(student: Tensor, teacher: Tensor) -> Tensor:  # (T, V), (T, V) -> (T,)
        log_s, log_t = (torch.log_softmax(x.float() / temperature, -1) for x in (student, teacher))
        return (log_s.exp() * (log_s - log_t)).sum(-1)

    rows = zip(student, teacher, strict=True)
    return torch.stack([checkpoint(row_kl, *row, use_reentrant=False) for row in rows])


def sample_students(model, tokenizer, rows: list, *how) -> Iterator[list[Completion]]:
    """Samples of the policy, as ever; their rows hold the teacher's prompt too."""
    for row in rows:
        text = f"{row['reference']}\n\n{row['question']}"
        ids = judge_prompts.policy_prompt(tokenizer, text, judge_prompts.TEACHER)
        row["teacher_prompt_ids"] = ids
    return exprl.sample_groups(model, tokenizer, rows, *how)


@functools.cache
def load_teacher(name: str):
    """The initial model, once."""
    return exprl.load_model(exprl.find_model(name)[0]).requires_grad_(False)


def distill_loss(model, batch: dict, n_tokens: int, settings) -> tuple[Tensor, dict]:
    """A micro-batch's share of the reverse KL. No clipping, no penalty."""
    with torch.no_grad():
        inputs = exprl.collate(batch["completions"], model, "teacher_prompt_ids")["inputs"]
        teacher = load_teacher(settings.model)
        teacher.shares_prompts = getattr(model, "shares_prompts", False)  # of the same kind
        teacher_logits = exprl.completion_logits(teacher, *inputs)
    student_logits = exprl.completion_logits(model, *batch["inputs"])
    kl = reverse_kl(student_logits, teacher_logits, settings.temperature)
    total = torch.where(batch["mask"], kl, 0.0).sum()
    return total / n_tokens, {"teacher_kl": total}


# ---- Both ----------------------------------------------------------------------------------------
def fill_weights(completions: list[Completion], settings: BaselineSettings) -> None:
    """In place of advantages: all tokens count alike. The reward is what can be said of it."""
    for c in completions:
        c.rewards = [math.nan if c.correct is None else float(c.correct)]
        c.advantages = [1.0] * len(c.steps)


def train(settings: BaselineSettings) -> None:
    """Train by a baseline."""
    rows = exprl.load_rows(settings.data, "train", needed=("question", "reference"))
    if settings.method in ("sft", "distill"):
        settings.kl = 0.0  # their losses have no penalty
    if settings.method == "sft":
        exprl.train(settings, rows, read_references, fill_weights, sft_loss)
    elif settings.method == "distill":
        exprl.train(settings, rows, sample_students, fill_weights, distill_loss)
    elif (settings.reference, settings.rubric, settings.judge_input) == ("none", "none", "quotes"):
        exprl.stop("without a reference, --judge-input quotes needs --rubric checkpoints")
    else:
        exprl.train(settings, show_reference(rows, settings.reference, settings.seed))


if __name__ == "__main__":
    exprl.run_command(train, BaselineSettings, sys.argv[1:], __doc__)
