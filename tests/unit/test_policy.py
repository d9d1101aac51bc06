r"""The parts before the judge and the update: problems, answers, prompts, sampling, log-probs."""

import datetime
import json
import time

import datasets
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LogitsProcessorList,
    MistralConfig,
    Qwen2Config,
    TopKLogitsWarper,
)

import exprl

# ---- Problems ------------------------------------------------------------------------------------


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_the_columns_of_gsm8k_math_and_our_own_files(tmp_path):
    gsm8k = {"question": "Q?", "answer": "She has <<2+3=5>>5 and <<5*2=10>>10.\n#### 1,010"}
    maths = {"problem": "P?", "solution": r"It is 3, so \boxed{\frac{1}{2}}.", "level": "Level 5"}
    plain = {"question": "R?", "reference": "Because.", "answer": 7, "domain": "code"}
    problems = exprl.load_problems(
        write(tmp_path / "a.jsonl", gsm8k, maths, plain), "train", "answer"
    )
    texts = [
        [problem[name] for name in ("question", "reference", "answer")] for problem in problems
    ]
    assert texts == [
        ["Q?", "She has 5 and 10.", "1,010"],
        ["P?", maths["solution"], r"\frac{1}{2}"],
        ["R?", "Because.", "7"],
    ]
    assert [problem["domain"] for problem in problems] == ["math", "math", "code"]
    assert all(len(problem) == 4 for problem in problems)


def test_a_box_without_braces(tmp_path):
    r"""MATH contains `\boxed 2`. The problem loads where an answer is needed."""
    data = write(tmp_path / "a.jsonl", {"problem": "1 + 1?", "solution": r"Two: $\boxed 2$."})
    [problem] = exprl.load_problems(data, "train", needed="answer")
    assert problem["answer"] == "2"


GOOD = '{"question": "Q?", "reference": "r", "answer": "1"}'


@pytest.mark.parametrize(
    "text, line, word",
    [
        (GOOD + '\n{"question": "Q?", "answer": "1"}\n', 2, "reference"),
        (GOOD + '\n{"reference": "r"}\n', 2, "question"),
        (GOOD + '\n{"question": "Q?", "reference": "r", "domain": "art"}', 2, "art"),
        (GOOD + '\n["a"]\n', 2, ""),
        (GOOD + "\n" + GOOD + '\n{"question": "Q?"', 3, ""),
        (GOOD + "\n\n" + GOOD, 2, ""),
        ("", 1, ""),
    ],
)
def test_a_malformed_record_is_named_by_its_number(tmp_path, text, line, word):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=rf"a\.jsonl, record {line}\b.*{word}") as stopped:
        exprl.load_problems(str(tmp_path / "a.jsonl"), "train", "reference")
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("box", [r"\boxed{}", r"\boxed x", r"\boxed{2"])
def test_a_box_without_an_answer_is_malformed_only_if_the_answer_is_needed(tmp_path, box):
    data = write(tmp_path / "a.jsonl", {"problem": "P?", "solution": f"So {box}."})
    with pytest.raises(SystemExit, match=r"record 1.*answer"):
        exprl.load_problems(data, "train", "answer")
    assert exprl.load_problems(data, "train", "reference")[0]["answer"] == ""


def test_a_reference_is_needed_only_if_a_judge_reads_it(tmp_path):
    data = write(tmp_path / "a.jsonl", {"question": "Q?", "answer": "1"})
    assert exprl.load_problems(data, "train", "answer")[0]["reference"] == ""
    data = write(tmp_path / "b.jsonl", {"question": "Q?", "reference": "r"})
    assert exprl.load_problems(data, "train", "reference")[0]["answer"] == ""


def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(SystemExit, match=r"nowhere\.jsonl") as stopped:
        exprl.load_problems(str(tmp_path / "nowhere.jsonl"), "train", "answer")
    assert "\n" not in str(stopped.value)


def test_names_of_hub_data_sets(monkeypatch):
    asked = []

    def hub(name, config, split):
        asked.append((name, config, split))
        return [{"problem": "P?", "solution": r"\boxed{1}"}]

    monkeypatch.setattr(datasets, "load_dataset", hub)
    for source in ("gsm8k", "math", "someone/something"):
        assert len(exprl.load_problems(source, "test", "answer")) == 1
    assert asked[0] == ("openai/gsm8k", "main", "test")
    assert asked[1][0] == "DigitalLearningGmbH/MATH-lighteval"
    assert asked[2] == ("someone/something", None, "test")


# ---- Answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, answer, correct",
    [
        (r"\boxed{07}", "7", True),
        (r"\boxed{\frac12}", "0.5", True),
        (r"\boxed{18\text{ dollars}}", "18", True),
        (r"\boxed{(1,2)}", "(1,2)", True),
        (r"First \boxed{1}. But that holds only if x is 0. So \boxed{2}", "2", True),
        (r"First \boxed{1}. But that holds only if x is 0. So \boxed{2}", "1", False),
        (r"5, so \boxed{6}", "5", False),
        (r"\boxed{6$ $5}", "5", False),
        (r"\boxed{}", "0", False),
        (".5", "5", False),
        (".5", "0.5", True),
        ("It is 1,250 dollars.", "1250", True),
        ("It is 12 or 13", "12", False),
        ("so x = -7", "-7", True),
        ("-5", "5", False),
        ("", "0", False),
        ("no number", "1", False),
    ],
)
def test_the_answer_is_that_of_the_box_or_else_the_last_number(completion, answer, correct):
    assert exprl.is_correct(completion, answer) is correct


def test_unclosed_boxes_take_no_time():
    started = time.monotonic()
    assert not exprl.is_correct(r"\boxed{" * 2000, "5")
    assert time.monotonic() - started < 3


# ---- Prompts -------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny / "base")


class Letters:
    """A tokenizer whose tokens are letters. It renders templates as transformers does."""

    def __init__(self, tokenizer, template):
        self.tokenizer, self.chat_template = tokenizer, template

    def __call__(self, text, add_special_tokens=True):
        return type("Encoding", (), {"input_ids": ["BOS"] * add_special_tokens + [*text]})

    def get_chat_template(self):
        return self.chat_template

    def apply_chat_template(self, messages, **options):
        options = {"chat_template": self.chat_template} | options
        return self.tokenizer.apply_chat_template(messages, **options)


def prompt_text(tokenizer, template, *args):
    return "".join(exprl.policy_prompt(Letters(tokenizer, template), *args))


def test_the_prompt_is_the_instruction_and_the_question(tokenizer):
    text = f"{exprl.INSTRUCTION}\n\n1+1?"
    for words in ("step by step", "new line with ###", r"\boxed{}"):
        assert words in exprl.INSTRUCTION
    assert prompt_text(tokenizer, None, "1+1?") == f"BOS{text}\n\nSolution:\n"
    assert prompt_text(tokenizer, None, "1+1?", "Do it.") == "BOSDo it.\n\n1+1?\n\nSolution:\n"
    # The template writes the BOS token, so the tokenizer must not add another one.
    template = (
        "<s>{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<GO>{% endif %}"
    )
    assert prompt_text(tokenizer, template, "1+1?") == f"<s><user>{text}<GO>"


def test_a_template_that_thinks_does_not(tokenizer):
    """Qwen3's template writes an empty thought if `enable_thinking` is False."""
    template = (
        "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    )
    assert prompt_text(tokenizer, template, "1+1?") == "<think></think>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %b %Y') }}",  # SmolLM3, gpt-oss
        "{% if strftime_now is defined %}{{ 'on ' + strftime_now('%d').upper() }}{% endif %}",
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
        "{{ date_string }}",
    ],
)
def test_a_template_that_prints_the_date_gives_the_same_prompt_every_day(
    tokenizer, monkeypatch, template
):
    from transformers.utils import chat_template_utils

    prompts = []
    for day in (1, 2):

        class Clock(datetime.datetime):
            now = classmethod(lambda cls, day=day: cls(2026, 5, day))

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        prompts.append(prompt_text(tokenizer, template, "1+1?"))
    assert prompts[0] == prompts[1] != ""


def test_the_end_tokens_are_those_of_the_tokenizer_the_model_and_the_template(tokenizer, model):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    assert exprl.end_tokens(tokenizer, model) == sorted({tokenizer.eos_token_id, 7, turn})
    model.generation_config.eos_token_id = None
    assert exprl.end_tokens(tokenizer, model) == sorted({tokenizer.eos_token_id, turn})


# ---- Loading a policy ----------------------------------------------------------------------------

PROBLEM = {"question": "41a+7b+7c*3d*3e*3f+7=", "reference": "", "answer": "1", "domain": "math"}


def load(folder, **settings):
    sampling = exprl.SamplingSettings(**{"max_new_tokens": 60, "temperature": 1.0} | settings)
    return exprl.load_policy(str(folder), [PROBLEM], sampling)


def test_a_bare_name_is_a_model_of_qwen(monkeypatch):
    asked = []

    def no_hub(source):
        asked.append(source)
        raise OSError("offline")

    monkeypatch.setattr(exprl.AutoTokenizer, "from_pretrained", no_hub)
    for name in ("Qwen2.5-0.5B", "me/mine"):
        with pytest.raises(SystemExit, match=f"--model {name}"):
            load(name)
    assert asked == ["Qwen/Qwen2.5-0.5B", "me/mine"]


def test_a_context_that_is_too_short_is_refused(tiny):
    """The longest prompt has 14 tokens, and the model's context has 256."""
    load(tiny / "base", max_new_tokens=256 - 14)
    with pytest.raises(SystemExit, match="--max-new-tokens"):
        load(tiny / "base", max_new_tokens=256 - 13)


def test_weights_are_float32_and_dropout_is_off(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny / "base", dtype=torch.bfloat16)
    model.config.attention_dropout = 0.9
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny / "base").save_pretrained(tmp_path / "base")
    model, _ = load(tmp_path / "base")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.fixture
def policy(tiny):
    return load(tiny / "base", temperature=2.0)


def test_the_sampler_draws_from_the_log_probs_that_are_trained(tiny, tmp_path):
    """The checkpoint asks for top_k, top_p and a penalty, and the temperature is not 1."""
    model = AutoModelForCausalLM.from_pretrained(tiny / "base")
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=2,
        top_p=0.5,
        repetition_penalty=1.5,
        min_new_tokens=5,
        temperature=0.3,
        eos_token_id=1,
    )
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny / "base").save_pretrained(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base", temperature=2.0, max_new_tokens=1)
    torch.manual_seed(0)
    without_answer = PROBLEM | {"answer": ""}  # checking 4,000 answers would take a while
    completions = exprl.sample(model, tokenizer, [without_answer], 4000, 4000)
    ids = torch.tensor([completion.ids[0] for completion in completions])
    drawn = torch.bincount(ids, minlength=len(tokenizer)) / 4000
    prompt = torch.tensor(completions[0].prompt_ids)
    with torch.no_grad():
        every_token = torch.arange(len(tokenizer))[:, None]
        expected = exprl.token_logprobs(model, prompt, every_token, 2.0).exp()[:, 0]
    assert expected.sum().item() == pytest.approx(1, abs=1e-4)
    assert expected.max() < 0.9  # otherwise a wrong sampler could pass
    assert (drawn - expected).abs().sum() / 2 < 0.08


def test_a_sampler_that_changes_the_distribution_is_refused(policy):
    model, tokenizer = policy
    exprl.sample(model, tokenizer, [PROBLEM], 2, 2)
    generate = model.generate
    only_two = LogitsProcessorList([TopKLogitsWarper(2)])
    model.generate = lambda *args, **how: generate(*args, logits_processor=only_two, **how)
    with pytest.raises(SystemExit, match="use another --model"):
        exprl.sample(model, tokenizer, [PROBLEM], 2, 2)
    model.generate = generate
    model.generation_config.repetition_penalty = 1.5
    with pytest.raises(SystemExit, match="use another --model"):
        exprl.sample(model, tokenizer, [PROBLEM], 2, 2)


# ---- Sampling ------------------------------------------------------------------------------------


def test_completions_end_with_their_eos_token_or_are_truncated(policy):
    model, tokenizer = policy
    other = PROBLEM | {"question": "29a*3b+7c+7d*3e*3f+7=", "answer": ""}
    torch.manual_seed(0)
    completions = exprl.sample(model, tokenizer, [PROBLEM, other], 12, 10)
    assert [c.problem for c in completions] == [PROBLEM] * 12 + [other] * 12
    assert {c.truncated for c in completions} == {True, False}
    eos = tokenizer.eos_token_id
    for c in completions:
        assert c.prompt_ids == exprl.policy_prompt(tokenizer, c.problem["question"])
        assert eos not in c.ids[:-1] and c.truncated == (c.ids[-1] != eos)
        assert len(c.ids) == 60 or not c.truncated
        assert "<eos>" not in c.text and "".join(c.step_texts) == c.text
        assert len(c.steps) == len(c.step_texts)
        assert c.steps[0][0] == 0 and c.steps[-1][1] == len(c.ids)
        assert (c.correct is None) == (c.problem is other)


# ---- Log-probs -----------------------------------------------------------------------------------


def random_model(kind):
    """A random model with full attention, or with a sliding window of 8 tokens."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
    window = {"sliding_window": 8, "head_dim": 16}
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(**sizes, **heads)
    elif kind == "qwen2":
        config = Qwen2Config(**sizes, **heads)
    elif kind == "gemma3":  # windows in one layer, full attention in the other
        layers = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(**sizes, **heads, **window, layer_types=layers)
    elif kind == "mistral":
        config = MistralConfig(**sizes, **heads, **window)
    else:
        config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2)
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config).eval()


KINDS = ["llama", "qwen2", "gemma3", "mistral", "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_shared_prompts_give_the_completions_of_plain_generate(kind, monkeypatch):
    """Near temperature 0, neither the padding nor the shared prompts change a completion.

    The prompts are shorter and longer than a window. The first token of one prompt has the id 0,
    which is also the id of the padding.
    """
    model = random_model(kind)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1e-5,
        top_k=0,
        max_new_tokens=12,
        eos_token_id=[39],
        pad_token_id=39,
    )
    prompts = [[0, *torch.randint(40, (length,)).tolist()] for length in (4, 13, 7)]
    monkeypatch.setattr(exprl, "policy_prompt", lambda tokenizer, question: prompts[question])
    monkeypatch.setattr(exprl, "read_completion", lambda problem, prompt, ids, *_: (prompt, ids))
    problems = [{"question": i} for i in range(3)]
    expected = []
    for prompt in prompts:
        sequence = model.generate(torch.tensor([prompt]))[0, len(prompt) :]
        expected += [(prompt, sequence.tolist())] * 2
    assert len({tuple(ids) for _, ids in expected}) == 3
    assert exprl.sample(model, None, problems, 2, 6) == expected
    assert exprl.sample(model, None, problems, 2, 1) == expected  # one problem after the other


@pytest.mark.parametrize("prompt_length", [3, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_their_gradient_are_those_of_a_plain_forward_pass(kind, prompt_length):
    """Completions of 1, 6 and 14 tokens. Prompt and completions are longer than a window."""
    model = random_model(kind)
    prompt = torch.randint(40, (prompt_length,))
    completions = [torch.randint(40, (length,)).tolist() for length in (1, 6, 14)]
    ids, mask = exprl.pad(completions, "right", "cpu")
    logp = exprl.token_logprobs(model, prompt, ids, 0.7)[mask]  # (N,)
    expected = []
    for completion in completions:
        whole = torch.cat([prompt, torch.tensor(completion)])[None]
        logits = model(whole).logits[0, prompt_length - 1 : -1] / 0.7
        expected.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    expected = torch.cat(expected)
    torch.testing.assert_close(logp, expected, atol=1e-4, rtol=1e-4)
    weights = torch.randn(len(logp))
    gradients = []
    for values in (logp, expected):
        model.zero_grad()
        (weights * values).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    tolerance = 1e-3 * gradients[1].abs().max().item()
    torch.testing.assert_close(*gradients, atol=tolerance, rtol=1e-3)


# ---- Logs ----------------------------------------------------------------------------------------


def test_a_log_survives_a_line_that_a_crash_cut_short(tmp_path):
    path = tmp_path / "a.jsonl"
    assert exprl.read_jsonl(path) == []
    exprl.append_jsonl(path, [{"a": 1}, {"a": 2}])
    with path.open("a") as file:
        file.write('{"a": 3')
    assert exprl.read_jsonl(path) == [{"a": 1}, {"a": 2}]
