"""Data, prompts, sampling, answers: what stands before the judge and the update."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import read
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
)
from transformers.cache_utils import Cache

import exprl
import judge_prompts

# ---- Data ----------------------------------------------------------------------------------------


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_usual_columns_are_recognised(tmp_path):
    gsm8k = {"question": "Q?", "answer": "She has <<2+3=5>>5 and <<5*2=10>>10.\n#### 1,010"}
    maths = {"problem": "P?", "solution": r"Then \boxed{3} is no end, \boxed{\frac{1}{2}} is."}
    plain = {"prompt": "R?", "reference": "Because.", "answer": 7}
    rows = exprl.load_rows(write(tmp_path / "a.jsonl", gsm8k, maths, plain), "train")
    assert rows == [
        {"question": "Q?", "reference": "She has 5 and 10.", "answer": "1,010", "domain": "math"},
        {
            "question": "P?",
            "reference": maths["solution"],
            "answer": r"\frac{1}{2}",
            "domain": "math",
        },
        {"question": "R?", "reference": "Because.", "answer": "7", "domain": "math"},
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"question": "Q?", "answer": "1"}\n{"question": "Q?"}\n', "line 2: has no answer"),
        ('{"question": "Q?", "answer": "1"}\n\n{"answer": "1"}\n', "line 2: Expecting value"),
        ('{"answer": "1"}\n', "line 1: has no question"),
        ('{"question": "Q?", "answer": "1"}\n["a"]\n', "line 2: is not a JSON object"),
        ('{"question": "Q?", "answer": "1"', "line 1: Expecting ',' delimiter"),
        ("", "line 1: Expecting value"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=message):
        exprl.load_rows(str(tmp_path / "a.jsonl"), "train")


def test_a_reference_is_needed_only_where_a_judge_reads_it(tmp_path):
    data = write(tmp_path / "a.jsonl", {"question": "Q?", "answer": "1"})
    assert exprl.load_rows(data, "train")[0]["reference"] == ""
    with pytest.raises(SystemExit, match="line 1: has no reference"):
        exprl.load_rows(data, "train", needed=("question", "reference", "answer"))


@pytest.mark.parametrize(
    "text, content",
    [
        (r"so \boxed{1} and then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"so \boxed{ 4 }", "4"),
        (r"so \boxed{4", ""),
        (r"\boxed{1}, that is \boxed{2", "1"),  # the last that is closed
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        (r"\boxed{{a}, {b}} }", "{a}, {b}"),
        ("4", ""),
    ],
)
def test_the_content_of_the_last_balanced_box(text, content):
    assert exprl.last_boxed(text) == content


def test_a_row_has_a_domain(tmp_path):
    rows = [{"question": f"{i}?", "reference": "r"} for i in range(3)]
    rows[1]["domain"] = "code"
    data, needed = write(tmp_path / "a.jsonl", *rows), ("question", "reference")
    rows = exprl.load_rows(data, "train", needed=needed)
    assert [row["domain"] for row in rows] == ["math", "code", "math"]
    assert [row["answer"] for row in rows] == [""] * 3
    data = write(tmp_path / "b.jsonl", rows[0], rows[1], rows[2] | {"domain": "art"})
    with pytest.raises(SystemExit, match="line 3: has the domain art, not math or science or code"):
        exprl.load_rows(data, "train", needed=needed)


def test_a_hub_data_set_with_splits(tmp_path):
    write(tmp_path / "train.jsonl", {"question": "A?", "answer": "1"})
    write(
        tmp_path / "test.jsonl",
        {"question": "B?", "answer": "2"},
        {"question": "C?", "answer": "3"},
    )
    assert [r["question"] for r in exprl.load_rows(str(tmp_path), "train")] == ["A?"]
    assert len(exprl.load_rows(str(tmp_path), "test")) == 2
    assert len(exprl.load_rows(str(tmp_path), "test", n=1)) == 1


def test_names_of_hub_data_sets(monkeypatch):
    from datasets import Dataset

    asked = []

    def hub(name, config, split):
        asked.append((name, config, split))
        levels = [f"Level {i}" for i in range(1, 6)]
        return Dataset.from_dict(
            {"problem": levels, "level": levels, "solution": [r"\boxed{1}"] * 5}
        )

    monkeypatch.setattr(exprl, "load_dataset", hub)
    assert len(exprl.load_rows("math", "test")) == 5
    exprl.load_rows("someone/something:main", "train")
    assert asked[0][2] == "test" and asked[1] == ("someone/something", "main", "train")


@pytest.mark.parametrize(
    "completion, answer, correct",
    [
        (r"\boxed{07}", "7", True),
        (r"\boxed{\frac12}", "0.5", True),
        (r"\boxed{18\text{ dollars}}", "18", True),
        (r"\boxed{1}\boxed{2}", "2", True),
        (r"\boxed{1}\boxed{2}", "1", False),
        (r"\boxed{3", "3", True),
        ("It is 1,250 dollars.", "1250", True),
        ("It is 12 or 13", "12", False),
        ("-5", "5", False),
        ("x is 10-3=7 or 8-7", "7", True),
        ("so x = -7", "-7", True),
        ("", "0", False),
        ("no number", "1", False),
        (r"\boxed{}", "0", False),
        (r"5, so \boxed{6}", "5", False),
    ],
)
def test_answers_are_those_of_the_box_then_the_last_number(completion, answer, correct):
    assert exprl.is_correct(completion, answer) is correct


# ---- Prompts -------------------------------------------------------------------------------------


def test_short_names_get_their_owner(monkeypatch):
    asked = []

    def no_hub(source):
        asked.append(source)
        raise OSError("offline")

    monkeypatch.setattr(exprl.AutoTokenizer, "from_pretrained", no_hub)
    for name in ("Qwen2.5-0.5B", "SmolLM2-135M", "me/mine", "unheard-of"):
        with pytest.raises(SystemExit, match=f"--model {name}"):
            exprl.find_model(name)
    assert asked == ["Qwen/Qwen2.5-0.5B", "HuggingFaceTB/SmolLM2-135M", "me/mine", "unheard-of"]


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny / "base")


def test_one_bos_at_most(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    assert judge_prompts.policy_prompt(tokenizer, "29a*3=").count(bos) == 1
    tokenizer.chat_template = None
    assert judge_prompts.policy_prompt(tokenizer, "29a*3=").count(bos) == 1


def test_the_prompt_holds_instruction_and_question(tokenizer):
    tokenizer.chat_template = (
        "<{{ messages[0].content }}>{% if add_generation_prompt %}GO{% endif %}"
    )
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{judge_prompts.POLICY}\n\n29a*3="}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert judge_prompts.policy_prompt(tokenizer, "29a*3=") == tokenizer(rendered).input_ids
    for words in ("step by step", "new line with ###", r"\boxed{}"):
        assert words in judge_prompts.POLICY


@pytest.mark.parametrize("template", ["a chat template", None])
def test_only_the_teacher_is_given_a_reference(template):
    class Letters:
        """A tokenizer whose tokens are letters and whose chat has no marks."""

        chat_template = template

        def __call__(self, text, **_):
            return SimpleNamespace(input_ids=list(text))

        def apply_chat_template(self, messages, **_):
            return messages[0]["content"]

    end = "" if template else "\n\nSolution:\n"
    prompt = "".join(judge_prompts.policy_prompt(Letters(), "1+1?"))
    assert prompt == f"{judge_prompts.POLICY}\n\n1+1?{end}"
    prompt = "".join(
        judge_prompts.policy_prompt(Letters(), "It is 2.\n\n1+1?", judge_prompts.TEACHER)
    )
    assert prompt == f"{judge_prompts.TEACHER}\n\nIt is 2.\n\n1+1?{end}"
    assert judge_prompts.TEACHER.startswith(judge_prompts.POLICY)


# ---- Sampling ------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny):
    return exprl.load_model(str(tiny / "base"))


def set_sampling(model, tokenizer, prompt_ids, temperature, cap):
    settings = exprl.SamplingSettings(temperature=temperature, max_new_tokens=cap)
    exprl.set_sampling(model, tokenizer, prompt_ids, settings)


def with_prompts(rows, tokenizer):
    prompt = judge_prompts.policy_prompt
    return [row | {"prompt_ids": prompt(tokenizer, row["question"])} for row in rows]


def test_the_sampler_draws_from_the_log_probs_that_are_trained(model, tokenizer):
    """Though the checkpoint asks for top_k, top_p and a penalty; at a temperature that is not 1."""
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.5, repetition_penalty=1.5, temperature=0.3, eos_token_id=1
    )
    row = {"question": "29a*3b+7=", "answer": "94", "reference": ""}
    [row] = with_prompts([row], tokenizer)
    set_sampling(model, tokenizer, row["prompt_ids"], 2.0, 1)
    torch.manual_seed(0)
    [group] = exprl.sample_groups(model, tokenizer, [row], 8000, 4000)
    drawn = torch.bincount(torch.tensor([c.ids[0] for c in group]), minlength=len(tokenizer)) / 8000
    ids = torch.tensor([row["prompt_ids"] + [v] for v in range(len(tokenizer))])
    with torch.no_grad():
        expected = exprl.token_logprobs(model, ids, torch.ones_like(ids), 1, 2.0).exp()[:, 0]
    assert expected.sum().item() == pytest.approx(1, abs=1e-4)
    assert expected.max() < 0.9  # there is something to get wrong
    assert (drawn - expected).abs().sum() / 2 < 0.06


def test_a_sampler_that_changes_the_distribution_is_refused(model, tokenizer):
    from transformers import LogitsProcessorList, TopKLogitsWarper

    generate = model.generate
    model.generate = lambda *args, **kwargs: generate(
        *args, logits_processor=LogitsProcessorList([TopKLogitsWarper(2)]), **kwargs
    )
    with pytest.raises(SystemExit, match="softmax"):
        set_sampling(model, tokenizer, [5, 6], 1.0, 8)


def test_the_stop_set_has_every_eos(model, tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<turn>\n{% endfor %}"
    model.generation_config.eos_token_id = [1, 7]
    tokenizer.pad_token = tokenizer.eos_token  # pad may equal eos
    set_sampling(model, tokenizer, [5, 6], 1.0, 8)
    assert model.generation_config.eos_token_id == sorted({1, 7, turn})
    assert model.generation_config.pad_token_id == tokenizer.eos_token_id


def test_completions_do_not_depend_on_the_prompts_beside_them(model, tokenizer):
    """Greedily, as the draws differ: left padding must not shift positions or be attended to."""
    rows = [
        {"question": q, "answer": "1", "reference": ""} for q in ("29a*3=", "41a+7b+7c*3d*3e*3f+7=")
    ]
    rows = with_prompts(rows, tokenizer)
    set_sampling(model, tokenizer, rows[0]["prompt_ids"], 1.0, 20)
    model.generation_config.do_sample = False
    together = [group[0].ids for group in exprl.sample_groups(model, tokenizer, rows, 1, 2)]
    alone = [next(exprl.sample_groups(model, tokenizer, [row], 1, 1))[0].ids for row in rows]
    assert together == alone


def small(kind: str, vocabulary: int):
    """A random model of one of the kinds of cache: full, sliding window, with a state (no KV)."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": vocabulary}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
    window = {"sliding_window": 8, "head_dim": 16}
    torch.manual_seed(0)
    config = {
        "llama": lambda: LlamaConfig(**sizes, **heads),
        "qwen2": lambda: Qwen2Config(**sizes, **heads),
        "gemma3": lambda: Gemma3TextConfig(**sizes, **heads, **window),
        "mistral": lambda: MistralConfig(**sizes, **heads, **window),
        "gpt2": lambda: GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=2),
        "mamba": lambda: MambaConfig(**sizes, state_size=4),
    }[kind]()
    config.initializer_range = 0.3
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = 1
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "mistral", "gpt2"])
def test_a_prompt_is_computed_once_and_nothing_changes(kind, tokenizer):
    """Neither the samples nor the log-probs and their gradient; prompts of different lengths, one
    longer than the window."""
    model = small(kind, len(tokenizer))
    questions = ("29a*3=", "41a+7b+7c*3d*3e*3f+7=")
    rows = with_prompts(
        [{"question": q, "answer": "", "reference": ""} for q in questions], tokenizer
    )
    set_sampling(model, tokenizer, rows[0]["prompt_ids"], 0.8, 12)
    assert model.shares_prompts
    model.generation_config.min_new_tokens = 12  # what has ended is another test's
    computed, results = [], []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, out: computed.append(args[0].numel()))
    for model.shares_prompts in (True, False):
        torch.manual_seed(0)
        computed.clear()
        groups = list(exprl.sample_groups(model, tokenizer, rows, 4, 8))
        completions = [c for group in groups for c in group]
        for c in completions:
            c.advantages = [1.0] * len(c.steps)
        batch = exprl.collate(completions, model)
        logp = exprl.token_logprobs(model, *batch["inputs"], 0.8)
        model.zero_grad()
        logp[batch["mask"]].square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((sum(computed), [c.ids for c in completions], logp[batch["mask"]], gradient))
    (shared, *mine), (plain, *theirs) = results
    assert shared < 0.7 * plain
    assert mine[0] == theirs[0]
    assert torch.allclose(mine[1], theirs[1], atol=1e-4)
    assert torch.allclose(mine[2], theirs[2], rtol=1e-3, atol=1e-3 * theirs[2].abs().max())


def watch_sampling(model, tokenizer, rows):
    """(ids of a completion of each row, (ids, after how many calls of generate) of each as it
    ended, how many tokens were computed)."""
    computed, calls, ended, generate = [], [], [], model.generate
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, args, out: computed.append(args[0].numel()))
    model.generate = lambda *args, **how: calls.append(1) or generate(*args, **how)
    groups = exprl.sample_groups(
        model, tokenizer, rows, 1, len(rows), lambda c: ended.append((c.ids, len(calls)))
    )
    ids = [c.ids for [c] in groups]
    del model.generate
    hook.remove()
    return ids, ended, sum(computed)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "mistral", "gpt2"])
def test_what_has_ended_leaves_the_batch_and_the_others_go_on(kind, tokenizer):
    """Greedily: each completion is what it is alone, though others have left before its end."""
    model = small(kind, len(tokenizer))
    starts = ("29a*3", "41a+7b+7c*3d", "1a+7b*3", "7a*3b*3", "96a+7", "50a*3b+7c*3", "3a+7", "8a*3")
    rows = with_prompts([{"question": q, "answer": "", "reference": ""} for q in starts], tokenizer)
    set_sampling(model, tokenizer, rows[0]["prompt_ids"], 1.0, 24)
    model.generation_config.do_sample = False

    def cut(eos):
        return [ids[: [*ids, eos].index(eos) + 1] for ids in free]

    model.generation_config.eos_token_id = [len(tokenizer)]  # none: to see what could be the end
    free = [watch_sampling(model, tokenizer, [row])[0][0] for row in rows]
    eos = max(range(len(tokenizer)), key=lambda eos: len({len(ids) for ids in cut(eos)}))
    model.generation_config.eos_token_id, alone = [eos], cut(eos)
    model.generation_config.pad_token_id = eos
    lengths = sorted(map(len, alone))
    assert lengths[1] < lengths[-2] and lengths[-1] > 8, lengths
    model.shares_prompts = False
    _, _, plain = watch_sampling(model, tokenizer, rows)
    model.shares_prompts = True
    together, ended, shared = watch_sampling(model, tokenizer, rows)
    assert together == alone and sorted(ids for ids, _ in ended) == sorted(alone)
    assert ended[0][1] == 1 < ended[-1][1]  # a short one came before `generate` went on
    assert len(ended[0][0]) < len(ended[-1][0])
    assert shared < 0.95 * plain


def test_a_cache_that_cannot_be_repeated_is_found_out(model, tokenizer, monkeypatch):
    ids = judge_prompts.policy_prompt(tokenizer, "29a*3=")
    set_sampling(model, tokenizer, ids, 1.0, 8)
    assert model.shares_prompts
    select = DynamicCache.batch_select_indices

    def select_and_forget(cache, rows):
        select(cache, rows)
        for layer in cache.layers:
            layer.values = torch.zeros_like(layer.values)

    with monkeypatch.context() as patch:  # it says that it can, and does something else
        patch.setattr(DynamicCache, "batch_select_indices", select_and_forget)
        set_sampling(model, tokenizer, ids, 1.0, 8)
        assert not model.shares_prompts
    with monkeypatch.context() as patch:
        patch.delattr(Cache, "batch_select_indices")
        set_sampling(model, tokenizer, ids, 1.0, 8)
        assert not model.shares_prompts
    state = small("mamba", len(tokenizer))
    set_sampling(state, tokenizer, ids, 1.0, 8)
    assert not state.shares_prompts
    row = {"question": "", "answer": "", "reference": "", "prompt_ids": ids}
    assert len(next(exprl.sample_groups(state, tokenizer, [row], 2, 2))) == 2


def test_completions_end_with_their_eos_or_are_cut(model, tokenizer):
    rows = [{"question": "41a+7b+7c*3d*3e*3f+7=", "answer": "1", "reference": ""}]
    rows = with_prompts(rows, tokenizer)
    set_sampling(model, tokenizer, rows[0]["prompt_ids"], 1.0, 60)
    [group] = exprl.sample_groups(model, tokenizer, rows, 32, 8)
    eos = tokenizer.eos_token_id
    assert any(not c.cut for c in group)
    for c in group:
        assert eos not in c.ids[:-1]
        assert c.cut == (c.ids[-1] != eos)
        assert "<eos>" not in c.text and "".join(c.step_texts) == c.text
        assert c.steps[0][0] == 0 and c.steps[-1][1] == len(c.ids)


def test_dropout_is_off(tiny, tmp_path):
    """Also in the update, which leaves the model as it is loaded."""
    shutil.copytree(tiny / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.9}))
    model, seen = exprl.load_model(str(tmp_path / "base")), []
    model.register_forward_hook(lambda *_: seen.append(model.training))
    c = exprl.Completion({"prompt_ids": [5, 6]}, [7, 8], "", None, False, [(0, 2)], [""])
    c.rewards, c.advantages = [1.0], [1.0]
    settings = exprl.TrainSettings(model="", updates_per_batch=2)
    exprl.update(model, torch.optim.SGD(model.parameters(), 0.1), [c], settings)
    assert len(seen) == 2 and not any(seen)


def test_a_log_survives_a_torn_line_and_is_replaced_whole(tmp_path):
    exprl.write_log(tmp_path / "a.jsonl", [{"a": 1}])
    exprl.write_log(tmp_path / "a.jsonl", [{"a": 2}])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"a": 3')  # a crash tore this line
    assert [r["a"] for r in exprl.read_log(tmp_path / "a.jsonl")] == [1, 2]
    exprl.write_log(tmp_path / "a.jsonl", [{"a": 4}], "w")
    assert read(tmp_path / "a.jsonl") == [{"a": 4}]
