"""ExpRL inside TRL's GRPOTrainer, which accelerate runs on any number of devices.

    pip install -r tests/tools/requirements-trl.txt
    accelerate launch --num_processes 2 tests/tools/trl_example.py --model Qwen2.5-0.5B

The flags are those of exprl.py, and its judge, steps and advantages are called as they are. TRL
samples, computes the loss and updates the weights.

- Outcome is a reward function. TRL itself computes the advantage (r - mean) / (std + 1e-4).
- Process is a trainer. It replaces TRL's advantage of each completion by one for each token.
- The prompt comes from exprl.policy_prompt, and not from TRL.
- If the judge fails, the reward of the completion is None, and TRL leaves it out of the mean of the
  group. Under process, the completion gets no advantage.

Every process judges its own completions. It therefore needs whole groups, and it has its own judge
and its own cache. --judge-threads counts for each process. Three flags are not supported: --resume,
--save-every and --sample-batch.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from accelerate import PartialState
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOConfig, GRPOTrainer

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import exprl  # noqa: E402
from exprl import option  # noqa: E402


@dataclass(kw_only=True)
class TrlSettings(exprl.TrainingSettings):
    """What is trained, as in exprl.py."""

    method: Literal["process", "outcome"] = option(
        "process", "process: a score for every step. outcome: a score for the whole completion"
    )
    out: str = option("", "run folder; if empty, runs/trl-METHOD")
    trl: str = option("{}", 'JSON object with more settings of GRPOConfig: {"use_vllm": true}')


class Scaffold:
    """TRL's reward function, which asks the judge. The references stay here, out of TRL's sight."""

    def __init__(self, training, judging, problems, tokenizer, eos_ids):
        self.training, self.problems = training, problems
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        out = Path(training.out) / f"process-{PartialState().process_index}" / "judge"
        out.mkdir(parents=True, exist_ok=True)
        self.judge = exprl.Judge(judging, training.method, out)
        self.completions, self.advantages = [], []  # of the last batch of this process

    def __call__(self, completion_ids, problem_index, **_):
        """Return a reward in 0..1 for each completion, or None if the judge failed.

        Under process it is the mean over the steps, and it is only logged. The completions of a
        problem follow each other.
        """
        completions = []
        for i, ids in zip(problem_index, completion_ids, strict=True):
            problem = self.problems[i]
            prompt_ids = exprl.policy_prompt(self.tokenizer, problem["question"])
            completions.append(
                exprl.read_completion(problem, prompt_ids, ids, self.tokenizer, self.eos_ids)
            )
        rewards = [verdict.rewards for verdict in self.judge(completions)]
        self.completions = completions
        self.advantages = exprl.compute_advantages(rewards, self.training)
        return [None if steps is None else fmean(steps) for steps in rewards]


class OutcomeTrainer(GRPOTrainer):
    """GRPOTrainer with the prompts of exprl.py. (This method of TRL is private: 1.16 has it.)"""

    def _tokenize_prompts(self, prompts):
        prompt_ids = [exprl.policy_prompt(self.processing_class, question) for question in prompts]
        return prompt_ids, None, {}  # no images and no other inputs


class ProcessTrainer(OutcomeTrainer):
    """The same with ExpRL-Process: each token has the advantage of its step."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        scaffold, rows = self.reward_funcs[0], []
        for completion, advantages in zip(scaffold.completions, scaffold.advantages, strict=True):
            spread = exprl.spread_over_tokens(completion, advantages or [0.0])  # 0: judge failed
            rows.append(torch.tensor(spread))
        advantages = pad_sequence(rows, batch_first=True)  # (B, longest)
        missing = output["completion_ids"].shape[1] - advantages.shape[1]
        advantages = torch.nn.functional.pad(advantages, (0, missing))  # (B, T)
        output["advantages"] = advantages.to(output["completion_ids"].device)
        return output


def grpo_config(training: TrlSettings, sampling: exprl.SamplingSettings) -> GRPOConfig:
    """Translate the settings for TRL. Stops if a process would not get whole groups."""
    use_cpu = torch.accelerator.current_accelerator(check_available=True) is None
    n_processes = PartialState(cpu=use_cpu).num_processes
    n_all = training.prompts_per_iteration * training.group_size
    n_local, remainder = divmod(n_all, n_processes)
    micro_batch = min(training.micro_batch, n_local)
    if remainder or n_local % training.group_size or n_local % micro_batch:
        exprl.stop(
            f"{n_all} completions in an iteration cannot be divided among {n_processes} processes. "
            f"Each process needs whole groups of --group-size {training.group_size}, and "
            f"--micro-batch {training.micro_batch} has to divide its completions"
        )
    options = dict(  # noqa: C408
        output_dir=training.out, seed=sampling.seed,
        max_steps=training.iterations * training.optimizer_steps,  # TRL counts optimizer steps
        num_iterations=training.optimizer_steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=n_local // micro_batch,
        num_generations=training.group_size, temperature=sampling.temperature, top_k=0, top_p=1.0,
        max_completion_length=sampling.max_new_tokens,
        loss_type="dapo",  # one denominator: the tokens of all processes
        scale_rewards="none" if training.no_std else "group",
        beta=training.kl, epsilon=training.clip_low, epsilon_high=training.clip_high,
        learning_rate=training.lr, lr_scheduler_type="constant_with_warmup",
        warmup_steps=5 * training.optimizer_steps,
        adam_beta2=0.99, weight_decay=0.01, max_grad_norm=1.0,
        use_cpu=use_cpu, bf16=torch.cuda.is_available(),
        activation_checkpointing=False, disable_dropout=True, remove_unused_columns=False,
        save_strategy="no", report_to="none", logging_steps=1,
    )  # fmt: skip
    return GRPOConfig(**options | json.loads(training.trl))


def make_trainer(training: TrlSettings, sampling, judging) -> GRPOTrainer:
    """Make a trainer for these settings. Stops at wrong settings before a model is loaded."""
    if training.resume:
        exprl.stop("--resume is not supported here: train again with another --out")
    if (Path(training.out) / "final").exists():
        exprl.stop(f"{training.out} contains a trained model: choose another --out")
    config = grpo_config(training, sampling)
    problems = exprl.load_problems(sampling.data, "train", "reference")
    model, tokenizer = exprl.load_policy(training.model, problems, sampling)
    questions = [problem["question"] for problem in problems]
    indices = list(range(len(problems)))
    data = Dataset.from_dict({"prompt": questions, "problem_index": indices})
    eos_ids = model.generation_config.eos_token_id
    scaffold = Scaffold(training, judging, problems, tokenizer, eos_ids)
    trainer = ProcessTrainer if training.method == "process" else OutcomeTrainer
    return trainer(model, scaffold, config, data, processing_class=tokenizer)


def train(training: TrlSettings, sampling, judging) -> None:
    """Train with ExpRL inside TRL."""
    training.out = training.out or f"runs/trl-{training.method}"
    trainer = make_trainer(training, sampling, judging)
    trainer.train()
    final = Path(training.out) / "final"
    trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        metrics = Path(training.out) / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        exprl.append_jsonl(metrics, trainer.state.log_history)
        print(f"trained model: {final}")


if __name__ == "__main__":
    classes = [TrlSettings, exprl.SamplingSettings, exprl.JudgeSettings]
    exprl.run_command(train, classes, sys.argv[1:])
