"""Train what ExpRL is compared with: other first stages, and a judge with another reference.

    python tests/tools/baselines.py --method sft --model MODEL --data DATA
    python tests/tools/baselines.py --method distill --model MODEL --data DATA
    python tests/tools/baselines.py --method process --reference wrong --model MODEL --data DATA

The training loop and the flags are those of exprl.py. A baseline hands the loop another function
for one of its stages: for the sampling, the reward, the advantage or the loss.
"""

import functools
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import exprl  # noqa: E402
from exprl import option  # noqa: E402

# What the teacher of self-distillation reads in place of the policy's instruction.
TEACHER = (
    f"{exprl.INSTRUCTION} A reference solution stands before the problem. Understand it, then "
    "solve the problem in your own way, without mention of it."
)


@dataclass(kw_only=True)
class BaselineSettings(exprl.TrainingSettings):
    """Which baseline is trained."""

    method: Literal["sft", "distill", "process", "outcome"] = option(
        "sft",
        "sft: supervised fine-tuning on the references. distill: on-policy self-distillation. "
        "process, outcome: ExpRL, with the reference that --reference names",
    )
    reference: Literal["right", "none", "wrong"] = option(
        "right", "what ExpRL's judge is shown: the reference, none, or another problem's"
    )


def show_reference(problems: list[dict], which: str, seed: int) -> list[dict]:
    """Return problems with the right reference, none, or a wrong one.

    A wrong reference belongs to the problem at a fixed distance in the list, drawn from `seed`.
    Stops if there is no other problem.
    """
    if which == "right":
        return problems
    if which == "none":
        return [problem | {"reference": ""} for problem in problems]
    if len(problems) < 2:
        exprl.stop("a wrong reference belongs to another problem: give two problems or more")
    distance = random.Random(seed).randrange(1, len(problems))
    shifted = problems[-distance:] + problems[:-distance]
    return [
        problem | {"reference": other["reference"]}
        for problem, other in zip(problems, shifted, strict=True)
    ]


# ---- SFT: cross-entropy on the references, with the policy's own prompt --------------------------
def read_references(model, tokenizer, problems, n, batch_size):
    """In place of sampling: one completion per problem, the reference and an end token.

    It is truncated where a sampled completion would be. `n` and `batch_size` are not used.
    """
    configuration = model.generation_config
    completions = []
    for problem in problems:
        ids = tokenizer(problem["reference"], add_special_tokens=False).input_ids
        eos = tokenizer.eos_token_id
        ids.append(configuration.eos_token_id[0] if eos is None else eos)
        ids = ids[: configuration.max_new_tokens]
        prompt_ids = exprl.policy_prompt(tokenizer, problem["question"])
        without_answer = problem | {"answer": ""}  # a reference is not an attempt
        completions.append(
            exprl.read_completion(
                without_answer, prompt_ids, ids, tokenizer, configuration.eos_token_id
            )
        )
    return completions


def sft_loss(model, batch, training):
    """The cross-entropy of each token, at temperature 1 whatever that of sampling is -> (N,)."""
    logp = exprl.token_logprobs(model, batch.prompt_ids, batch.completion_ids, 1.0)  # (B, T)
    cross_entropy = -logp[batch.mask]  # (N,)
    return cross_entropy, {"cross_entropy": cross_entropy}


# ---- On-policy self-distillation: the teacher is the initial model, with the reference -----------
def reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(B, T, V) logits of both at the student's samples -> (B, T) KL(student || teacher), in nats.

    KL_t = sum_v p_S(v) (log p_S(v) - log p_T(v)), with p = softmax(logits / temperature), all in
    float32. Its gradient is the mean of a_t grad log p_S(y_t) over y_t ~ p_S, where a_t =
    log p_S(y_t) - log p_T(y_t).

    >>> reverse_kl(torch.tensor([[[0.0, 1.0]]]), torch.zeros(1, 1, 2), 1.0)
    tensor([[0.1109]])
    """
    rows = []
    for student_row, teacher_row in zip(student, teacher, strict=True):  # float32 copies are large
        log_s = torch.log_softmax(student_row.float() / temperature, dim=-1)  # (T, V)
        log_t = torch.log_softmax(teacher_row.float() / temperature, dim=-1)  # (T, V)
        rows.append((log_s.exp() * (log_s - log_t)).sum(dim=-1))  # (T,)
    return torch.stack(rows)


def teacher_prompt(tokenizer, problem: dict) -> list[int]:
    """Return what the teacher sees: its instruction, the reference and the question."""
    text = f"{problem['reference']}\n\n{problem['question']}"
    return exprl.policy_prompt(tokenizer, text, TEACHER)


@functools.cache
def load_teacher(name: str):
    """Load the initial model as a teacher, once -> (model, tokenizer)."""
    any_length = exprl.SamplingSettings(max_new_tokens=1)
    model, tokenizer = exprl.load_policy(name, [{"question": ""}], any_length)
    return model.requires_grad_(False), tokenizer


def distill_loss(model, batch, training):
    """The reverse KL of each token, without clipping and without a KL penalty -> (N,)."""
    teacher, tokenizer = load_teacher(training.model)
    prompt = torch.tensor(teacher_prompt(tokenizer, batch.completions[0].problem))
    with torch.no_grad():
        teacher_logits = exprl.completion_logits(
            teacher, prompt.to(model.device), batch.completion_ids
        )
    student_logits = exprl.completion_logits(model, batch.prompt_ids, batch.completion_ids)
    kl = reverse_kl(student_logits, teacher_logits, model.generation_config.temperature)
    return kl[batch.mask], {"teacher_kl": kl[batch.mask]}


# ---- Both ----------------------------------------------------------------------------------------
def reward_accuracy(completions):
    """In place of the judge: the accuracy, for the log only. Without an answer it is 0."""
    return [exprl.Verdict([float(bool(completion.correct))]) for completion in completions]


def weigh_equally(rewards, training):
    """In place of advantages: 1 for every token."""
    return [[1.0] for _ in rewards]


def train(training, sampling, judging):
    """Train a baseline."""
    problems = exprl.load_problems(sampling.data, "train", "reference")
    replaced = {"reward": reward_accuracy, "advantage": weigh_equally}
    if training.method == "sft":
        training.kl = 0.0  # these two losses have no penalty
        training.group_size = 1
        replaced |= {"sample": read_references, "loss": sft_loss}
    elif training.method == "distill":
        training.kl = 0.0
        replaced |= {"loss": distill_loss}
    else:
        problems = show_reference(problems, training.reference, sampling.seed)
        replaced = {}
    exprl.train(training, sampling, judging, problems, **replaced)


if __name__ == "__main__":
    classes = [BaselineSettings, exprl.SamplingSettings, exprl.JudgeSettings]
    exprl.run_command(train, classes, sys.argv[1:])
