"""Past one GPU: ExpRL inside TRL's GRPOTrainer, which accelerate runs on any number of devices.

    pip install -r tests/requirements-trl.txt
    accelerate launch --num_processes 2 tests/trl_example.py --model Qwen2.5-0.5B --method process

The flags are those of exprl.py. Its judge, steps and advantages are called here as they are; TRL
samples, computes the loss and moves the weights. Outcome is a reward function: TRL's advantage is
(r - mean) / (std + 1e-4) over the group. Process is a trainer that puts an advantage for each token
in the place of TRL's one for each completion. A completion whose judgement failed has the reward
None (TRL leaves it out of the group's mean) or, under Process, no advantage.

Each process judges its own completions, so it needs whole groups, and its own judge and cache.
--judge-threads is for each process. There is no --resume; --save-every and --sample-batch do
nothing.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import exprl  # noqa: E402
import judge_prompts  # noqa: E402
from exprl import Completion, Judge, setting  # noqa: E402


@dataclass(kw_only=True)
class TrlSettings(exprl.TrainSettings):
    """ExpRL in TRL: train a model by method outcome or process."""

    trl: dict = setting('more for GRPOConfig, JSON: {"use_vllm": true}', "{}")


class Scaffold:
    """TRL's completions -> exprl's, judged against the references that the policy does not see."""

    def __init__(self, settings: TrlSettings, rows: list[dict], tokenizer, eos_ids: list[int]):
        self.settings, self.rows, self.tokenizer, self.eos_ids = settings, rows, tokenizer, eos_ids
        self.judge = Judge(settings, Path(settings.out) / f"process-{PartialState().process_index}")
        self.kind = settings.judge_input if settings.method == "process" else settings.method
        self.completions: list[Completion] = []  # of the last batch, on this process

    def __call__(self, completion_ids: list[list[int]], row: list[int], **_) -> list[float | None]:
        """TRL's reward function: a reward 0..1 for each completion (under Process the mean of its
        steps, which is only logged). Completions of a problem follow each other."""
        read = [
            exprl.read_completion(self.rows[i], ids, self.tokenizer, self.eos_ids)
            for i, ids in zip(row, completion_ids, strict=True)
        ]
        for c in read[:: self.settings.group_size]:  # so that no completion will wait for it
            self.judge.pool.submit(self.judge.ask_rubric, c.row)
        for c in read:
            self.judge.submit(c, self.kind)
        self.judge.wait(read)
        exprl.fill_advantages(read, self.settings)
        self.completions = read
        return [None if c.rewards is None else sum(c.rewards) / len(c.rewards) for c in read]


class ProcessTrainer(GRPOTrainer):
    """GRPOTrainer with ExpRL-Process: (B, T) advantages, each step's for all its tokens."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        batch = exprl.collate(self.reward_funcs[0].completions, self.model)
        width = output["completion_ids"].shape[1] - batch["advantages"].shape[1]
        output["advantages"] = torch.nn.functional.pad(batch["advantages"], (0, width))
        return output


def grpo_config(settings: TrlSettings) -> GRPOConfig:
    """The settings in TRL's words. Stops where a process would not get whole groups."""
    use_cpu = torch.accelerator.current_accelerator(check_available=True) is None
    processes = PartialState(cpu=use_cpu).num_processes
    n_local, rest = divmod(settings.prompts_per_step * settings.group_size, processes)
    micro_batch = min(settings.micro_batch, n_local)
    if rest or n_local % settings.group_size or n_local % micro_batch:
        exprl.stop(
            f"{settings.prompts_per_step} problems x {settings.group_size} completions on "
            f"{processes} processes: each needs whole groups, and --micro-batch has to divide them"
        )
    options = dict(  # noqa: C408
        output_dir=settings.out, seed=settings.seed,
        max_steps=settings.steps * settings.updates_per_batch,  # of the optimizer
        num_iterations=settings.updates_per_batch,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=n_local // micro_batch,
        num_generations=settings.group_size, temperature=settings.temperature, top_k=0, top_p=1.0,
        max_completion_length=settings.max_new_tokens,
        loss_type="dapo",  # one denominator: the tokens of all processes
        scale_rewards="none" if settings.no_std else "group",
        beta=settings.kl, epsilon=settings.clip_low, epsilon_high=settings.clip_high,
        learning_rate=settings.lr, lr_scheduler_type="constant_with_warmup",
        warmup_steps=5 * settings.updates_per_batch,
        adam_beta2=0.99, weight_decay=0.01, max_grad_norm=1.0,
        use_cpu=use_cpu, bf16=torch.cuda.is_available(),
        activation_checkpointing=False, disable_dropout=True, remove_unused_columns=False,
        save_strategy="no", report_to="none", logging_steps=1,
    )  # fmt: skip
    return GRPOConfig(**options | settings.trl)


def make_trainer(settings: TrlSettings) -> GRPOTrainer:
    """A trainer for these settings. Stops at bad input before a model is loaded."""
    if settings.resume or (Path(settings.out) / "final").exists():
        exprl.stop(f"{settings.out} holds a trained model, or --resume is given: another --out")
    if settings.method == "sparse":
        exprl.stop("--method sparse has no judge: give TRL a reward function of exprl.is_correct")
    config = grpo_config(settings)
    rows = exprl.load_rows(settings.data, "train", needed=("question", "reference"))
    source, tokenizer = exprl.find_model(settings.model)
    for row in rows:
        row["prompt_ids"] = judge_prompts.policy_prompt(tokenizer, row["question"])
    if tokenizer.chat_template:  # TRL fills it in
        text = [f"{judge_prompts.POLICY}\n\n{row['question']}" for row in rows]
        prompts = [[{"role": "user", "content": t}] for t in text]
    else:
        prompts = [tokenizer.decode(row["prompt_ids"], skip_special_tokens=True) for row in rows]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    eos_ids = judge_prompts.end_tokens(tokenizer, model)
    model.generation_config.eos_token_id = eos_ids
    scaffold = Scaffold(settings, rows, tokenizer, eos_ids)
    trainer = ProcessTrainer if settings.method == "process" else GRPOTrainer
    data = Dataset.from_dict({"prompt": prompts, "row": list(range(len(rows)))})
    return trainer(model, scaffold, config, data, processing_class=tokenizer)


def train(settings: TrlSettings) -> None:
    """ExpRL in TRL: train a model by method outcome or process."""
    settings.out = settings.out or f"runs/trl-{settings.method}"
    trainer = make_trainer(settings)
    try:
        trainer.train()
    finally:  # also after an error: nothing more is paid
        trainer.reward_funcs[0].judge.close()
    final = Path(settings.out) / "final"
    trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        exprl.write_log(Path(settings.out) / "metrics.jsonl", trainer.state.log_history, "w")
        print(f"trained model: {final}")


if __name__ == "__main__":
    exprl.run_command(train, TrlSettings, sys.argv[1:], __doc__)
