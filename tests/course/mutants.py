"""Grades the grader: solutions of the graded functions that properties.py must reject or accept.

MUTANTS contains the mistakes that students make. A mutant is either (what is wrong, old, new), an
edit of our source, in which `old` occurs once, or (what is wrong, source), a whole function. Each
mutant must fail a property. CORRECT contains solutions that are written differently from ours. They
must pass all properties. A source runs in a copy of the globals of the function's module. This file
is never given to students.

    python tests/course/mutants.py FOLDER      write a class of 100 submissions

In each of them 0 to 6 functions are mutants. FOLDER/wrong.json names them.
"""

import argparse
import ast
import json
import random
import shutil
from pathlib import Path

import handout

MUTANTS: dict[str, list[tuple[str, ...]]] = {
    "completion_mask": [
        ("the eos is left out", "is_eos.cumsum(dim=1) - is_eos", "is_eos.cumsum(dim=1)"),
        ("tokens != eos: goes on after it", "is_eos.cumsum(dim=1) - is_eos", "is_eos"),
        ("only the smallest eos of the set", "sorted(eos_ids)", "sorted(eos_ids)[:1]"),
        ("only the largest eos of the set", "sorted(eos_ids)", "sorted(eos_ids)[-1:]"),
        ("up to the second eos", "n_eos_before == 0", "n_eos_before <= 1"),
        (
            "up to the last eos",
            "return n_eos_before == 0",
            "return (is_eos.flip(1).cumsum(1).flip(1) > 0) | ~is_eos.bool().any(1, keepdim=True)",
        ),
        ("inverted: what comes after the eos", "n_eos_before == 0", "n_eos_before != 0"),
        ("integers, no bool", "return n_eos_before == 0", "return (n_eos_before == 0).long()"),
        ("down the columns", "cumsum(dim=1)", "cumsum(dim=0)"),
        (
            "an eos ends the later rows too",
            "is_eos.cumsum(dim=1)",
            "is_eos.flatten().cumsum(0).view_as(is_eos)",
        ),
        (
            "token 0 is taken for padding",
            "n_eos_before == 0",
            "n_eos_before + (tokens == 0) == 0",
        ),
        ("empty", "n_eos_before == 0", "n_eos_before < 0"),
        (
            "without eos only the first token: argmax gives 0",
            """
def completion_mask(tokens, eos_ids):
    is_eos = torch.isin(tokens, torch.tensor(list(eos_ids)))
    first = is_eos.int().argmax(dim=1)
    return torch.arange(tokens.shape[1]) <= first[:, None]
""",
        ),
        (
            "one token too many",
            """
def completion_mask(tokens, eos_ids):
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for b, row in enumerate(tokens.tolist()):
        ends = [t for t, token in enumerate(row) if token in eos_ids]
        if ends:
            mask[b, ends[0] + 2 :] = False
    return mask
""",
        ),
    ],
    "completion_logits": [
        (
            "not shifted",
            "torch.cat([first, following[:, :-1]], dim=1)",
            "following",
        ),
        ("one position too many", "following[:, :-1]", "following"),
        (
            "the first token's logits are missing",
            "torch.cat([first, following[:, :-1]], dim=1)",
            "following[:, :-1]",
        ),
        (
            "the first token is predicted at the beginning of the prompt",
            "first = prompt.logits",
            "first = model(prompt_ids[None]).logits[:, :1]",
        ),
        (
            "the completion's positions are one too high",
            "model(completion_ids, cache=prompt.cache)",
            "model(completion_ids, cache=prompt.cache, position_ids=len(prompt_ids) + 1"
            " + torch.arange(completion_ids.shape[1])[None])",
        ),
        (
            "the completion's positions begin at 0",
            "model(completion_ids, cache=prompt.cache)",
            "model(completion_ids, cache=prompt.cache,"
            " position_ids=torch.arange(completion_ids.shape[1])[None])",
        ),
        ("the prompt is not read", "cache=prompt.cache)", "cache=None)"),
        (
            "the cache is not repeated",
            "prompt.cache.batch_repeat_interleave(n_completions)",
            "pass",
        ),
        ("no gradient", "dim=1)", "dim=1).detach()"),
        (
            "the prompt runs without gradients",
            "prompt = model(prompt_ids[None], use_cache=True, logits_to_keep=1)",
            "with torch.no_grad():\n"
            "        prompt = model(prompt_ids[None], use_cache=True, logits_to_keep=1)",
        ),
        (
            "no gradient goes through the cache",
            "prompt.cache.batch_repeat_interleave(n_completions)",
            "prompt.cache.batch_repeat_interleave(n_completions)\n"
            "    for layer in prompt.cache.layers:\n"
            "        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()",
        ),
        ("log-probabilities", "dim=1)", "dim=1).log_softmax(-1)"),
        (
            "only the sampled token's logit",
            "dim=1)",
            "dim=1).gather(2, completion_ids[:, :, None])[:, :, 0]",
        ),
        (
            "all completions are read as one text",
            """
def completion_logits(model, prompt_ids, completion_ids):
    B, T = completion_ids.shape
    ids = torch.cat([prompt_ids, completion_ids.flatten()])
    logits = model(ids[None]).logits[0, len(prompt_ids) - 1 : -1]
    return logits.view(B, T, -1)
""",
        ),
        (
            "the completions share a cache, which grows",
            """
def completion_logits(model, prompt_ids, completion_ids):
    prompt = model(prompt_ids[None], use_cache=True)
    rows = []
    for ids in completion_ids:
        following = model(ids[None], cache=prompt.cache).logits
        rows.append(torch.cat([prompt.logits[:, -1:], following[:, :-1]], dim=1))
    return torch.cat(rows)
""",
        ),
        (
            "the prompt's last token is read twice",
            """
def completion_logits(model, prompt_ids, completion_ids):
    B = len(completion_ids)
    prompt = model(prompt_ids[None], use_cache=True)
    prompt.cache.batch_repeat_interleave(B)
    ids = torch.cat([prompt_ids[-1:].expand(B, 1), completion_ids[:, :-1]], dim=1)
    return model(ids, cache=prompt.cache).logits
""",
        ),
        (
            "token 0 is taken for padding",
            """
def completion_logits(model, prompt_ids, completion_ids):
    B, T = completion_ids.shape
    P = len(prompt_ids)
    ids = torch.cat([prompt_ids.expand(B, P), completion_ids], dim=1)
    return model(ids, attention_mask=(ids != 0).long()).logits[:, P - 1 : -1]
""",
        ),
        (
            "the prompt is masked",
            """
def completion_logits(model, prompt_ids, completion_ids):
    B, T = completion_ids.shape
    P = len(prompt_ids)
    ids = torch.cat([prompt_ids.expand(B, P), completion_ids], dim=1)
    mask = (torch.arange(P + T) >= P - 1).long().expand(B, P + T)
    return model(ids, attention_mask=mask).logits[:, P - 1 : -1]
""",
        ),
        (
            "shifted by two",
            """
def completion_logits(model, prompt_ids, completion_ids):
    B, T = completion_ids.shape
    P = len(prompt_ids)
    ids = torch.cat([prompt_ids.expand(B, P), completion_ids], dim=1)
    return model(ids).logits.roll(1, 1)[:, P - 1 : -1]
""",
        ),
        (
            "shifted the wrong way",
            """
def completion_logits(model, prompt_ids, completion_ids):
    B, T = completion_ids.shape
    P = len(prompt_ids)
    ids = torch.cat([prompt_ids.expand(B, P), completion_ids], dim=1)
    return model(ids).logits.roll(-1, 1)[:, P:]
""",
        ),
        (
            "of the prompt",
            """
def completion_logits(model, prompt_ids, completion_ids):
    B, T = completion_ids.shape
    P = len(prompt_ids)
    ids = torch.cat([prompt_ids.expand(B, P), completion_ids], dim=1)
    return model(ids).logits[:, :T]
""",
        ),
    ],
    "token_logprobs": [
        ("no temperature", "row.float() / temperature", "row.float()"),
        ("times the temperature", "row.float() / temperature", "row.float() * temperature"),
        (
            "temperature after log_softmax",
            "torch.log_softmax(row.float() / temperature, dim=-1)",
            "torch.log_softmax(row.float(), dim=-1) / temperature",
        ),
        ("the token before", "ids[:, None]", "ids.roll(1)[:, None]"),
        ("the token after", "ids[:, None]", "ids.roll(-1)[:, None]"),
        ("the prompt's tokens", "ids[:, None]", "prompt_ids.repeat(9)[: len(ids), None]"),
        ("bfloat16 stays bfloat16", "row.float()", "row"),
        (
            "float32 only at the end",
            "torch.log_softmax(row.float() / temperature, dim=-1)",
            "torch.log_softmax(row / temperature, dim=-1).float()",
        ),
        ("probabilities", "torch.log_softmax(", "torch.softmax("),
        (
            "log(p + 1e-8)",
            "torch.log_softmax(row.float() / temperature, dim=-1)",
            "(torch.softmax(row.float() / temperature, dim=-1) + 1e-8).log()",
        ),
        (
            "log(softmax): -inf where it underflows",
            "torch.log_softmax(row.float() / temperature, dim=-1)",
            "torch.softmax(row.float() / temperature, dim=-1).log()",
        ),
        (
            "logits, not normalised",
            "torch.log_softmax(row.float() / temperature, dim=-1)",
            "row.float() / temperature",
        ),
        ("normalised over positions", "temperature, dim=-1)", "temperature, dim=0)"),
        ("no gradient", "torch.stack(rows)", "torch.stack(rows).detach()"),
        ("of the likeliest token", ".gather(1, ids[:, None])[:, 0]", ".max(-1).values"),
        (
            "only the last token of the prompt is read",
            "completion_logits(model, prompt_ids, completion_ids)",
            "completion_logits(model, prompt_ids[-1:], completion_ids)",
        ),
        ("a sum for each completion", "torch.stack(rows)", "torch.stack(rows).sum(1)"),
        ("one list for all tokens", "torch.stack(rows)", "torch.cat(rows)"),
        (
            "cross-entropy without the minus",
            """
def token_logprobs(model, prompt_ids, completion_ids, temperature):
    logits = completion_logits(model, prompt_ids, completion_ids).float()
    return torch.nn.functional.cross_entropy(
        (logits / temperature).transpose(1, 2), completion_ids, reduction="none"
    )
""",
        ),
        (
            "logits not shifted",
            """
def token_logprobs(model, prompt_ids, completion_ids, temperature):
    B, T = completion_ids.shape
    ids = torch.cat([prompt_ids.expand(B, -1), completion_ids], dim=1)
    logp = (model(ids).logits[:, -T:].float() / temperature).log_softmax(-1)
    return logp.gather(2, completion_ids[:, :, None]).squeeze(2)
""",
        ),
    ],
    "parse_score": [
        ("the first score", "[-1]", "[0]"),
        (
            "the largest score",
            "scores[-1] if scores else None",
            "max(scores, default=None)",
        ),
        ("only the last line is read", 'reply.split("\\n")', 'reply.split("\\n")[-1:]'),
        ("other separators end a line", 'reply.split("\\n")', "reply.splitlines()"),
        ("10 is read as 1", "re.fullmatch", "re.match"),
        ("found inside sentences", "re.fullmatch", "re.search"),
        ("0 and 6 to 9 are scores", "[1-5]", "[0-9]"),
        ("4.5 is cut to 4", "([1-5])", "([1-5])(?:[.][0-9]+)?"),
        ("4/5 is a score", "([1-5])", "([1-5])(?:/5)?"),
        ("no stars, no brackets", r'r"[\s*()\[\]{}]*"', r'r"\s*"'),
        ("quotation marks may stand around it", r'r"[\s*()\[\]{}]*"', r'''r"[\s*()\[\]{}'\">]*"'''),
        ("the case matters", ", re.IGNORECASE", ""),
        ("the label is ignored", "{decoration}{label}", "{decoration}Score"),
        ("a string", "int(match[1])", "match[1]"),
        ("the reward, not the score", "int(match[1])", "(int(match[1]) - 1) / 4"),
        ("no score is a 1", "else None", "else 1"),
        ("no score is an error", " if scores else None", ""),
        (
            "clamped to 1..5",
            r"""
def parse_score(reply, label="Score"):
    around = r"[\s*()\[\]{}]*"
    pattern = rf"{around}{label}{around}:{around}(-?\d+){around}"
    lines = [re.fullmatch(pattern, line, re.IGNORECASE) for line in reply.split("\n")]
    return ([min(5, max(1, int(match[1]))) for match in lines if match] or [None])[-1]
""",
        ),
        (
            "the number may stand on the next line",
            r"""
def parse_score(reply, label="Score"):
    around = r"[\s*()\[\]{}]*"
    pattern = rf"^{around}{label}{around}:{around}([1-5]){around}$"
    found = re.findall(pattern, reply, re.IGNORECASE | re.MULTILINE)
    return int(found[-1]) if found else None
""",
        ),
        (
            "Step 11 passes for Step 1",
            r"""
def parse_score(reply, label="Score"):
    score = None
    for line in reply.split("\n"):
        name, _, value = line.partition(":")
        if name.strip(" *()[]{}").lower().startswith(label.lower()):
            value = value.strip(" *()[]{}")
            score = int(value) if value in list("12345") else score
    return score
""",
        ),
        (
            "a later line that is no score takes the score away",
            r"""
def parse_score(reply, label="Score"):
    score = None
    for line in reply.split("\n"):
        name, _, value = line.partition(":")
        if name.strip(" *()[]{}").lower() == label.lower():
            value = value.strip(" *()[]{}")
            score = int(value) if value in list("12345") else None
    return score
""",
        ),
    ],
    "fence": [
        ("no code", "text-{number}-{code}", "text-{number}"),
        ("code of the first text", '"".join(texts)', "texts[0]"),
        ("code of the last text", '"".join(texts)', "texts[-1]"),
        (
            "Python's hash: another one in the next run",
            'hashlib.sha256("".join(texts).encode()).hexdigest()[:8]',
            'f"{hash(tuple(texts)) % 16**8:08x}"',
        ),
        (
            "a random code",
            'hashlib.sha256("".join(texts).encode()).hexdigest()[:8]',
            '__import__("secrets").token_hex(4)',
        ),
        ("a fixed code", 'hashlib.sha256("".join(texts).encode()).hexdigest()[:8]', '"00000000"'),
        ("code of the lengths", '"".join(texts)', "str([len(text) for text in texts])"),
        ("the whole digest", "hexdigest()[:8]", "hexdigest()"),
        ("numbered from 0", "start=1", "start=0"),
        ("not numbered", "text-{number}-{code}", "text-{code}"),
        ("text is stripped", r"\n{text}\n", r"\n{text.strip()}\n"),
        ("text is escaped", r"\n{text}\n", r"\n{text.replace('<', '&lt;')}\n"),
        ("no closing tag", r"\n</{tag}>", ""),
        ("closed by an opening tag", "</{tag}>", "<{tag}>"),
        (
            "a list, not one text",
            r'return "\n".join(blocks)',
            "return blocks",
        ),
        (
            "each text has a code of its own",
            r"""
def fence(texts):
    parts = []
    for t, text in enumerate(texts, 1):
        code = hashlib.sha256(text.encode()).hexdigest()[:8]
        parts.append(f"<text-{t}-{code}>\n{text}\n</text-{t}-{code}>")
    return "\n".join(parts)
""",
        ),
        (
            "all texts between one pair of tags",
            r"""
def fence(texts):
    text = "".join(texts)
    code = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"<text-1-{code}>\n{text}\n</text-1-{code}>"
""",
        ),
    ],
    "judge_messages": [
        (
            "system and user are swapped",
            '"system", "content": system}, {"role": "user", "content": user}',
            '"user", "content": user}, {"role": "system", "content": system}',
        ),
        (
            "the roles are swapped",
            '"system", "content": system}, {"role": "user", "content": user}',
            '"user", "content": system}, {"role": "system", "content": user}',
        ),
        (
            "the attempt before the reference",
            "in sections.items() if text",
            "in [list(sections.items())[i] for i in (0, 3, 1, 2)] if text",
        ),
        (
            "the reference is left out",
            '"Reference solution": row["reference"]',
            '"Reference solution": ""',
        ),
        ("the rubric is left out", '"Checkpoints": rubric', '"Checkpoints": ""'),
        (
            "the answer stands in for the reference",
            '"Reference solution": row["reference"]',
            '"Reference solution": row["reference"] or row["answer"]',
        ),
        ("empty parts are shown", ".items() if text)", ".items())"),
        ("no blank line between parts", r'"\n".join(', '"".join('),
        (
            "told of a reference where there is none",
            'has_reference=bool(row["reference"])',
            "has_reference=True",
        ),
        ("the system message of mathematics", 'row["domain"]', '"math"'),
        ("always the kind outcome", "system_message(kind", 'system_message("outcome"'),
        (
            "fields of the system message not filled",
            'system_message(kind, row["domain"], has_reference=bool(row["reference"]))',
            "KINDS[kind]",
        ),
        (
            "the attempt in the system message",
            "system = system_message",
            r'system = attempt + "\n\n" + system_message',
        ),
        (
            "{{ and }} of a text collapse",
            r"{text}\n",
            r"{text.replace(2 * chr(123), chr(123)).replace(2 * chr(125), chr(125))}\n",
        ),
        (
            "braces of a text are doubled",
            r"{text}\n",
            r"{text.replace(chr(123), 2 * chr(123)).replace(chr(125), 2 * chr(125))}\n",
        ),
        (
            "fields in a text are filled with the row",
            'return [{"role"',
            'for name, text in row.items():\n        user = user.replace(f"{{{name}}}", text)\n'
            '    return [{"role"',
        ),
        (
            "filled one after the other, the attempt first",
            r"""
def judge_messages(kind, row, rubric="", attempt=""):
    system = system_message(kind, row["domain"], row["reference"] != "")
    parts = [("Text to judge", "text", attempt), ("Checkpoints", "checkpoints", rubric)]
    parts += [("Reference solution", "reference", row["reference"])]
    parts += [("Problem", "problem", row["question"])]
    user = "\n".join(f"## {title}\n{{{name}}}\n" for title, name, text in parts[::-1] if text)
    for _, name, text in parts:
        user = user.replace(f"{{{name}}}", text)
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]
""",
        ),
        (
            "the user message is filled with the fields of the system message",
            r"""
def judge_messages(kind, row, rubric="", attempt=""):
    basis = BASIS["reference" if row["reference"] else "none"]
    texts = (row["question"], row["reference"], rubric, attempt)
    titles = ("Problem", "Reference solution", "Checkpoints", "Text to judge")
    user = "\n".join(f"## {title}\n{t}\n" for title, t in zip(titles, texts) if t)
    messages = []
    for role, text in (("system", KINDS[kind]), ("user", user)):
        for name, value in {"basis": basis, **DOMAINS[row["domain"]], **SHARED}.items():
            text = text.replace("{" + name + "}", value)
        messages.append({"role": role, "content": text})
    return messages
""",
        ),
    ],
    "split_steps": [
        ("### inside a line", 'r"^###"', 'r"###"'),
        ("### may be indented", 'r"^###"', r'r"^[ \t]*###"'),
        ("### needs a blank after it", 'r"^###"', r'r"^### "'),
        ("#### is no ###", 'r"^###"', r'r"^###(?!#)"'),
        (
            "### on the first line is not seen",
            'match.start() for match in re.finditer(r"^###", text, re.MULTILINE)',
            r'match.start() + 1 for match in re.finditer(r"\n###", text)',
        ),
        (
            "blank lines split beside ###",
            r"""    if not borders:
        # A blank line may contain spaces.
        borders = [match.end() for match in re.finditer(r"\n[^\S\n]*\n\s*", text)]""",
            r"""    blank = [match.end() for match in re.finditer(r"\n[^\S\n]*\n\s*", text)]
    borders = sorted({*borders, *blank})""",
        ),
        (
            "blank lines split nothing",
            "if not borders:",
            "if False:",
        ),
        ("each line is a step", r"\n[^\S\n]*\n\s*", r"\n\s*"),
        ("a line of blanks is no blank line", r"\n[^\S\n]*\n\s*", r"\n\n\s*"),
        ("a border between tokens is one token early", "end <= border", "end < border"),
        (
            "a token across the border stays with the step before",
            "sum(end <= border for end in char_ends)",
            "sum(start < border for start in [0, *char_ends[:-1]])",
        ),
        (
            "crumbs are steps",
            "if has_words(before) and has_words(after):",
            "if start > starts[-1]:",
        ),
        ("a crumb at the beginning is a step", "has_words(before)", "before"),
        ("a crumb at the end is a step", " and has_words(after)", ""),
        (
            "a bare ### is a step",
            "has_words(before)",
            "before.strip()",
        ),
        (
            "no cap",
            "starts[:MAX_STEPS]",
            "starts",
        ),
        ("crumbs count for the cap", "re.MULTILINE)]", "re.MULTILINE)][:MAX_STEPS]"),
        (
            "15 steps at most",
            "starts[:MAX_STEPS]",
            "starts[:15]",
        ),
        (
            "17 steps at most",
            "starts[:MAX_STEPS]",
            "starts[:17]",
        ),
        ("the last token is dropped", "len(pieces)]", "len(pieces) - 1]"),
        ("a span without tokens", " if pieces else []", ""),
        (
            "last tokens in place of ends",
            "list(spans) if",
            "[(a, b - 1) for a, b in spans] if",
        ),
        (
            "offsets of characters",
            "list(spans) if",
            "[(char_ends[a] - len(pieces[a]), char_ends[b - 1]) for a, b in spans] if",
        ),
        (
            "texts in place of spans",
            "list(spans) if",
            '["".join(pieces[a:b]) for a, b in spans] if',
        ),
        (
            "what follows 16 steps is dropped",
            "    starts = starts[:MAX_STEPS]\n    spans = zip(starts, [*starts[1:], len(pieces)])",
            "    spans = list(zip(starts, [*starts[1:], len(pieces)]))[:MAX_STEPS]",
        ),
        (
            "what comes before the first ### is dropped",
            r"""
def split_steps(pieces):
    text, ends = "".join(pieces).rstrip(), list(itertools.accumulate(map(len, pieces)))
    cuts = [match.start() for match in re.finditer(r"^###", text, re.MULTILINE)]
    kept = cuts[:1] or [0]
    for cut in cuts or [match.end() for match in re.finditer(r"\n[^\S\n]*\n\s*", text)]:
        if re.search(r"\w", text[kept[-1] : cut]) and re.search(r"\w", text[cut:]):
            kept.append(cut)
    starts = sorted({sum(end <= cut for end in ends) for cut in kept[:MAX_STEPS]})
    return list(zip(starts, [*starts[1:], len(pieces)])) if pieces else []
""",
        ),
        (
            "### is looked for in single tokens",
            r"""
def split_steps(pieces):
    starts = [t for t, piece in enumerate(pieces) if piece.startswith("###")]
    starts = starts or [t + 1 for t, piece in enumerate(pieces) if "\n\n" in piece]
    starts = sorted({0, *starts} - {len(pieces)})[:MAX_STEPS]
    return list(zip(starts, [*starts[1:], len(pieces)])) if pieces else []
""",
        ),
    ],
    "step_advantages": [
        (
            "delta: A_1 = s_1",
            "s[t] - s[t - 1] for t in range(len(s))",
            "s[t] - (s[t - 1] if t else 0.0) for t in range(len(s))",
        ),
        (
            "delta: A_1 = 0",
            "s[t] - s[t - 1] for t in range(len(s))",
            "s[t] - s[max(t - 1, 0)] for t in range(len(s))",
        ),
        ("delta: the sign is flipped", "s[t] - s[t - 1]", "s[t - 1] - s[t]"),
        ("delta: to the step after it", "s[t] - s[t - 1]", "s[(t + 1) % len(s)] - s[t]"),
        (
            "delta: one step keeps its reward",
            "for t in range(len(s))]",
            "for t in range(len(s))] if len(s) > 1 else list(s)",
        ),
        ("delta: the first step is left out", "range(len(s))", "range(1, len(s))"),
        (
            "delta: across completions",
            "[[s[t] - s[t - 1] for t in range(len(s))] for s in step_rewards]",
            "[[s[t] - (s[t - 1] if t else step_rewards[i - 1][-1]) for t in range(len(s))]"
            " for i, s in enumerate(step_rewards)]",
        ),
        (
            "end: the last step gets 0",
            "[reward - s[-1] for reward in s[:-1]] + s[-1:]",
            "[reward - s[-1] for reward in s]",
        ),
        ("end: to the first step", "reward - s[-1] for", "reward - s[0] for"),
        ("end: the sign is flipped", "reward - s[-1] for", "s[-1] - reward for"),
        (
            "group: pooled over all steps",
            "[fmean(s) for s in step_rewards]",
            "[r for s in step_rewards for r in s]",
        ),
        (
            "group: the mean of one completion",
            "reward - fmean(means) for",
            "reward - fmean(s) for",
        ),
        (
            "group: the mean of the last steps",
            "[fmean(s) for s in step_rewards]",
            "[s[-1] for s in step_rewards]",
        ),
        (
            "group: divided by the std",
            "reward - fmean(means) for",
            "(reward - fmean(means)) / ((stdev(means) if len(means) > 1 else 0) + 1e-6) for",
        ),
        (
            "group: without the completion itself",
            "[[reward - fmean(means) for reward in s] for s in step_rewards]",
            "[[reward - (sum(means) - m) / max(1, len(means) - 1) for reward in s]"
            " for s, m in zip(step_rewards, means)]",
        ),
        (
            "another norm leaves the rewards as they are",
            'raise ValueError(f"norm {norm!r} is not delta, end or group")',
            "return [list(s) for s in step_rewards]",
        ),
        (
            "another norm is group",
            'if norm == "group":',
            "if True:",
        ),
        (
            "another norm is a KeyError",
            'raise ValueError(f"norm {norm!r} is not delta, end or group")',
            'raise KeyError(f"norm {norm!r} is not delta, end or group")',
        ),
        ("zeros", "s[t] - s[t - 1] for t in", "0.0 for t in"),
        (
            "one list for all",
            "[[s[t] - s[t - 1] for t in range(len(s))] for s in step_rewards]",
            "[s[t] - s[t - 1] for s in step_rewards for t in range(len(s))]",
        ),
        (
            "a group in which no completion is judged is an error",
            'if norm == "delta":',
            "baseline = sum(sum(s) / len(s) for s in step_rewards) / len(step_rewards)\n"
            '    if norm == "delta":',
        ),
        (
            "the rewards are overwritten",
            'if norm == "delta":',
            'if norm == "delta":\n        for s in step_rewards:\n'
            "            s[:] = [s[t] - s[t - 1] for t in range(len(s))]\n"
            '        return step_rewards\n    if norm == "delta":',
        ),
    ],
    "group_advantages": [
        ("the std of a population", "stdev(known)", "torch.tensor(known).std(correction=0).item()"),
        ("the variance", "stdev(known)", "stdev(known) ** 2"),
        ("the sign is flipped", "(reward - mean)", "(mean - reward)"),
        ("never divided", "stdev(known) + 1e-6 if divide_by_std else 1.0", "1.0"),
        ("always divided", " if divide_by_std else 1.0", ""),
        ("divided where it should not be", "if divide_by_std else", "if not divide_by_std else"),
        ("no epsilon", "stdev(known) + 1e-6", "stdev(known)"),
        ("a larger epsilon", "stdev(known) + 1e-6", "stdev(known) + 1e-4"),
        (
            "an error where all are equal",
            """
def group_advantages(rewards, divide_by_std=True):
    known = [reward for reward in rewards if reward is not None]
    if len(known) < 2:
        return [0.0] * len(rewards)
    mean, scale = fmean(known), stdev(known) if divide_by_std else 1.0
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]
""",
        ),
        ("an error for a lone member", "len(set(known)) < 2", "not known"),
        ("an error if all failed", "len(set(known)) < 2", "known and len(set(known)) < 2"),
        ("two rewards are too few", "len(set(known)) < 2", "len(known) < 3"),
        ("zeros", "len(set(known)) < 2", "True"),
        (
            "a failure is a 0 in mean and std",
            "[reward for reward in rewards if reward is not None]",
            "[reward or 0.0 for reward in rewards]",
        ),
        ("failures count in the mean's denominator", "fmean(known)", "sum(known) / len(rewards)"),
        ("a reward of 0 is taken for a failure", "if reward is not None", "if reward"),
        (
            "a reward of 0 gets no advantage",
            "0.0 if reward is None else",
            "0.0 if not reward else",
        ),
        (
            "failures get an advantage",
            "0.0 if reward is None else (reward - mean)",
            "((reward or 0.0) - mean)",
        ),
        ("failures get None", "[0.0 if reward is None", "[None if reward is None"),
        (
            "failures are left out of the result",
            "[0.0 if reward is None else (reward - mean) / scale for reward in rewards]",
            "[(reward - mean) / scale for reward in known]",
        ),
        ("failures are left out where all are equal", "* len(rewards)", "* len(known)"),
        ("the rewards are sorted", "mean = ", "rewards.sort(key=lambda r: r or 0)\n    mean = "),
        (
            "a tensor, not a list",
            "return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]",
            "return torch.tensor([0.0 if r is None else (r - mean) / scale for r in rewards])",
        ),
        (
            "float32: rounding is blown up where all are equal",
            """
def group_advantages(rewards, divide_by_std=True):
    known = torch.tensor([reward for reward in rewards if reward is not None])
    if len(known) < 2:
        return [0.0] * len(rewards)
    scale = known.std() + 1e-6 if divide_by_std else torch.ones(())
    mean = known.mean()
    return [0.0 if r is None else ((r - mean) / scale).item() for r in rewards]
""",
        ),
        (
            "failures are multiplied by 0: NaN stays NaN",
            """
def group_advantages(rewards, divide_by_std=True):
    r = torch.tensor([math.nan if reward is None else reward for reward in rewards])
    is_known = ~r.isnan()
    known = r[is_known]
    if len(known) < 2 or known.max() == known.min():
        return [0.0] * len(rewards)
    scale = known.std() + 1e-6 if divide_by_std else 1.0
    return ((r - known.mean()) / scale * is_known).tolist()
""",
        ),
    ],
    "policy_loss": [
        ("the sign is flipped", "return -torch.minimum", "return torch.minimum"),
        ("max for min", "torch.minimum", "torch.maximum"),
        (
            "always clipped, on both sides",
            "torch.minimum(ratio * advantages, clipped_ratio * advantages)",
            "(clipped_ratio * advantages)",
        ),
        (
            "never clipped",
            "torch.minimum(ratio * advantages, clipped_ratio * advantages)",
            "(ratio * advantages)",
        ),
        (
            "clip_low on both sides",
            "ratio.clamp(1 - clip_low, 1 + clip_high)",
            "ratio.clamp(1 - clip_low, 1 + clip_low)",
        ),
        (
            "clip_high on both sides",
            "ratio.clamp(1 - clip_low, 1 + clip_high)",
            "ratio.clamp(1 - clip_high, 1 + clip_high)",
        ),
        (
            "clip_low and clip_high are swapped",
            "ratio.clamp(1 - clip_low, 1 + clip_high)",
            "ratio.clamp(1 - clip_high, 1 + clip_low)",
        ),
        (
            "clipped where A < 0 only",
            "ratio.clamp(1 - clip_low, 1 + clip_high)",
            "ratio.clamp(min=1 - clip_low)",
        ),
        (
            "clipped where A > 0 only",
            "torch.minimum(ratio * advantages, clipped_ratio * advantages)",
            "torch.where(advantages > 0, clipped_ratio.minimum(ratio), ratio) * advantages",
        ),
        (
            "clipped in logs",
            "ratio.clamp(1 - clip_low, 1 + clip_high)",
            "ratio.log().clamp(-clip_low, clip_high).exp()",
        ),
        (
            "the advantage inside the clamp",
            "clipped_ratio * advantages)",
            "(ratio * advantages).clamp(1 - clip_low, 1 + clip_high))",
        ),
        (
            "clipped twice: a bad token's ratio ends at 3",
            "torch.minimum(ratio * advantages, clipped_ratio * advantages)",
            "torch.minimum(ratio.clamp(max=3) * advantages, clipped_ratio * advantages)",
        ),
        (
            "one ratio for all tokens",
            "torch.exp(logp - logp_old)",
            "torch.exp((logp - logp_old).mean()).expand_as(logp)",
        ),
        ("the ratio is upside down", "torch.exp(logp - logp_old)", "torch.exp(logp_old - logp)"),
        (
            "the ratio is a difference of logs",
            "torch.exp(logp - logp_old)",
            "1 + logp - logp_old",
        ),
        (
            "a quotient of probabilities: 0 / 0",
            "torch.exp(logp - logp_old)",
            "torch.exp(logp) / torch.exp(logp_old)",
        ),
        (
            "a quotient of probabilities, with an epsilon",
            "torch.exp(logp - logp_old)",
            "torch.exp(logp) / (torch.exp(logp_old) + 1e-8)",
        ),
        (
            "a quotient of log-probabilities",
            "torch.exp(logp - logp_old)",
            "logp / logp_old",
        ),
        (
            "no ratio: A log pi",
            "torch.minimum(ratio * advantages, clipped_ratio * advantages)",
            "(logp * advantages)",
        ),
        ("no gradient", "torch.exp(logp - logp_old)", "torch.exp(logp.detach() - logp_old)"),
        (
            "the clipped ratio has no gradient",
            "torch.minimum(ratio * advantages, clipped_ratio * advantages)",
            "torch.minimum(ratio.detach() * advantages, clipped_ratio * advantages)",
        ),
        ("the sum over tokens", "clipped_ratio * advantages)", "clipped_ratio * advantages).sum()"),
        (
            "the mean over tokens",
            "clipped_ratio * advantages)",
            "clipped_ratio * advantages).mean()",
        ),
        (
            "each token is divided by the number of tokens",
            "clipped_ratio * advantages)",
            "clipped_ratio * advantages) / len(logp)",
        ),
    ],
    "kl_to_initial": [
        ("the KL the other way round", "logp_initial - logp", "logp - logp_initial"),
        ("k1", "torch.expm1(log_r) - log_r", "-log_r"),
        ("k2", "torch.expm1(log_r) - log_r", "log_r**2 / 2"),
        ("the absolute difference", "torch.expm1(log_r) - log_r", "log_r.abs()"),
        ("k1, cut at 0", "torch.expm1(log_r) - log_r", "(-log_r).clamp(min=0)"),
        ("rounds below 0", "torch.expm1(log_r) - log_r", "torch.exp(log_r) - 1 - log_r"),
        ("no - 1", "torch.expm1(log_r) - log_r", "torch.exp(log_r) - log_r"),
        ("no - log r", "torch.expm1(log_r) - log_r", "torch.expm1(log_r)"),
        ("the sign is flipped", "torch.expm1(log_r) - log_r", "log_r - torch.expm1(log_r)"),
        ("+ log r", "torch.expm1(log_r) - log_r", "torch.expm1(log_r) + log_r"),
        ("cut at 10", "torch.expm1(log_r) - log_r", "(torch.expm1(log_r) - log_r).clamp(-10, 10)"),
        ("in bits", "torch.expm1(log_r) - log_r", "(torch.expm1(log_r) - log_r) / math.log(2)"),
        ("no gradient", "logp_initial - logp", "logp_initial - logp.detach()"),
        ("r has no gradient", "torch.expm1(log_r) - log_r", "torch.expm1(log_r.detach()) - log_r"),
        ("a ratio of logs", "logp_initial - logp", "(logp_initial / logp).log()"),
        ("weighted by pi", "torch.expm1(log_r) - log_r", "logp.exp() * -log_r"),
        ("one mean", "torch.expm1(log_r) - log_r", "(torch.expm1(log_r) - log_r).mean()"),
        ("one sum", "torch.expm1(log_r) - log_r", "(torch.expm1(log_r) - log_r).sum()"),
        (
            "a quotient of probabilities: NaN where they underflow",
            "torch.expm1(log_r) - log_r",
            "torch.exp(logp_initial) / torch.exp(logp) - 1 - log_r",
        ),
        (
            "NaN is hidden from the value, not from the gradient",
            """
def kl_to_initial(logp, logp_initial):
    ratio = torch.exp(logp_initial) / torch.exp(logp)
    log_r = logp_initial - logp
    is_likely = (logp > -80) & (logp_initial > -80)
    return torch.where(is_likely, ratio - 1 - log_r, torch.expm1(log_r) - log_r).clamp(min=0)
""",
        ),
        (
            "log-probs below -88 are cut off",
            "log_r = logp_initial - logp",
            "log_r = logp_initial.clamp(min=-88) - logp.clamp(min=-88)",
        ),
    ],
    "reverse_kl": [
        (
            "the KL the other way round",
            "zip(student, teacher, strict=True)",
            "zip(teacher, student, strict=True)",
        ),
        (
            "no temperature",
            "zip(student, teacher, strict=True)",
            "zip(student.float() * temperature, teacher.float() * temperature, strict=True)",
        ),
        (
            "times the temperature",
            "zip(student, teacher, strict=True)",
            "zip(student.float() * temperature**2, teacher.float() * temperature**2)",
        ),
        (
            "the temperature for the student only",
            "teacher_row.float() / temperature",
            "teacher_row.float()",
        ),
        (
            "the temperature for the teacher only",
            "student_row.float() / temperature",
            "student_row.float()",
        ),
        ("times the temperature squared", ".sum(dim=-1)", ".sum(dim=-1) * temperature**2"),
        (
            "normalised over positions",
            """
def reverse_kl(student, teacher, temperature):
    log_s, log_t = ((x.float() / temperature).log_softmax(1) for x in (student, teacher))
    return (log_s.exp() * (log_s - log_t)).sum(-1)
""",
        ),
        ("the mean over the vocabulary", ".sum(dim=-1)", ".mean(dim=-1)"),
        ("the sign is flipped", "(log_s - log_t)).sum", "(log_t - log_s)).sum"),
        ("cross-entropy", "(log_s - log_t)).sum", "-log_t).sum"),
        ("not weighted", "(log_s.exp() * (log_s - log_t))", "(log_s - log_t)"),
        (
            "logits, not normalised",
            "(log_s - log_t)).sum",
            "(student_row - teacher_row).float()).sum",
        ),
        (
            "at the likeliest token only",
            "(log_s.exp() * (log_s - log_t)).sum(dim=-1)",
            "(log_s - log_t).gather(-1, log_s.argmax(-1, keepdim=True))[..., 0]",
        ),
        (
            "the mean of both directions",
            "log_s.exp() * (log_s - log_t)",
            "(log_s.exp() - log_t.exp()) / 2 * (log_s - log_t)",
        ),
        ("p has no gradient", "log_s.exp() *", "log_s.exp().detach() *"),
        (
            "no gradient",
            "zip(student, teacher, strict=True)",
            "zip(student.detach(), teacher, strict=True)",
        ),
        (
            "bfloat16 stays bfloat16",
            """
def reverse_kl(student, teacher, temperature):
    log_s, log_t = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    return (log_s.exp() * (log_s - log_t)).sum(-1)
""",
        ),
        (
            "float32 only at the end",
            """
def reverse_kl(student, teacher, temperature):
    log_s, log_t = ((x / temperature).log_softmax(-1).float() for x in (student, teacher))
    return (log_s.exp() * (log_s - log_t)).sum(-1)
""",
        ),
        (
            "log(p + 1e-8): bounded where the two are far apart",
            """
def reverse_kl(student, teacher, temperature):
    p, q = ((x.float() / temperature).softmax(-1) + 1e-8 for x in (student, teacher))
    return (p * (p.log() - q.log())).sum(-1)
""",
        ),
        (
            "log(softmax): NaN where it underflows",
            """
def reverse_kl(student, teacher, temperature):
    p, q = ((x.float() / temperature).softmax(-1) for x in (student, teacher))
    return (p * (p.log() - q.log())).sum(-1)
""",
        ),
        (
            "one mean",
            """
def reverse_kl(student, teacher, temperature):
    log_s, log_t = ((x.float() / temperature).log_softmax(-1) for x in (student, teacher))
    return torch.nn.functional.kl_div(log_t, log_s, log_target=True, reduction="batchmean")
""",
        ),
        (
            "probabilities where log-probabilities are due",
            """
def reverse_kl(student, teacher, temperature):
    p, q = ((x.float() / temperature).softmax(-1) for x in (student, teacher))
    return torch.nn.functional.kl_div(q.log(), p, reduction="none", log_target=True).sum(-1)
""",
        ),
    ],
    "pass_at_k": [
        ("biased", "1 - math.comb(n - c, k) / math.comb(n, k)", "1 - (1 - c / n) ** k"),
        ("c / n * k", "1 - math.comb(n - c, k) / math.comb(n, k)", "min(1.0, c / n * k)"),
        ("pass@1 for every k", "1 - math.comb(n - c, k) / math.comb(n, k)", "c / n"),
        ("1 if any is right", "1 - math.comb(n - c, k) / math.comb(n, k)", "float(c > 0)"),
        (
            "all k are right",
            "1 - math.comb(n - c, k) / math.comb(n, k)",
            "math.comb(c, k) / math.comb(n, k)",
        ),
        (
            "exactly one is right",
            "1 - math.comb(n - c, k) / math.comb(n, k)",
            "c * math.comb(n - c, k - 1) / math.comb(n, k)",
        ),
        ("all k are wrong", "return 1 - math.comb", "return math.comb"),
        ("// for /", "math.comb(n - c, k) / math", "math.comb(n - c, k) // math"),
        (
            "in percent",
            "return 1 - math.comb(n - c, k) / math.comb(n, k)",
            "return 100 * (1 - math.comb(n - c, k) / math.comb(n, k))",
        ),
        ("with replacement in the denominator", "/ math.comb(n, k)", "/ math.comb(n + k - 1, k)"),
        ("no ValueError", "if not (0 <= c <= n and 1 <= k <= n):", "if False:"),
        (
            "k over n is taken for n",
            "if not (0 <= c <= n and 1 <= k <= n):",
            "k = min(k, n)\n    if not (0 <= c <= n and 1 <= k):",
        ),
        ("k = 0 is allowed", "and 1 <= k <= n):", "and 0 <= k <= n):"),
        ("a negative c is allowed", "if not (0 <= c <= n", "if not (c <= n"),
        ("an AssertionError", "raise ValueError(", "raise AssertionError("),
        (
            "floating factorials overflow",
            """
def pass_at_k(n, c, k):
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError("counts")
    if n - c < k:
        return 1.0
    wrong = math.gamma(n - c + 1) / math.gamma(n - c - k + 1)
    return 1 - wrong / (math.gamma(n + 1) / math.gamma(n - k + 1))
""",
        ),
        (
            "the product is shifted by one",
            """
def pass_at_k(n, c, k):
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError("counts")
    if n - c < k:
        return 1.0
    return 1 - float(np.prod(1 - k / np.arange(n - c + 2, n + 2)))
""",
        ),
        (
            "binomials through floats lose digits",
            """
def pass_at_k(n, c, k):
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError("counts")
    if n - c < k:
        return 1.0
    def log_comb(a, b):
        logs = torch.lgamma(torch.tensor([a + 1.0, b + 1.0, a - b + 1.0]))
        return logs[0] - logs[1] - logs[2]
    return 1 - torch.exp(log_comb(n - c, k) - log_comb(n, k)).item()
""",
        ),
    ],
}

CORRECT: dict[str, list[str]] = {
    "completion_mask": [
        """
def completion_mask(tokens, eos_ids):
    mask = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    for b, row in enumerate(tokens.tolist()):
        for t, token in enumerate(row):
            mask[b, t] = True
            if token in eos_ids:
                break
    return mask
""",
        """
def completion_mask(tokens, eos_ids):
    is_eos = torch.zeros_like(tokens, dtype=torch.bool)
    for eos in eos_ids:
        is_eos |= tokens == eos
    T = tokens.shape[1]
    positions = torch.arange(T, device=tokens.device).expand_as(tokens)
    first = positions.masked_fill(~is_eos, T).amin(dim=1, keepdim=True)
    return positions <= first
""",
        """
def completion_mask(tokens, eos_ids):
    goes_on = ~torch.isin(tokens, torch.tensor(list(eos_ids), device=tokens.device))
    alive = goes_on.long().cumprod(dim=1).bool()
    first = torch.ones_like(alive[:, :1])
    return torch.cat([first, alive[:, :-1]], dim=1)
""",
    ],
    "completion_logits": [
        """
def completion_logits(model, prompt_ids, completion_ids):
    B, T = completion_ids.shape
    P = len(prompt_ids)
    ids = torch.cat([prompt_ids.expand(B, P), completion_ids], dim=1)
    return model(input_ids=ids).logits[:, P - 1 : P + T - 1]
""",
        """
def completion_logits(model, prompt_ids, completion_ids):
    rows = []
    for ids in completion_ids:
        sequence = torch.cat([prompt_ids, ids])[:-1]  # nothing is predicted after the last token
        rows.append(model(sequence[None], use_cache=False, logits_to_keep=len(ids)).logits)
    return torch.cat(rows)
""",
        """
def completion_logits(model, prompt_ids, completion_ids):
    out = model(prompt_ids.repeat(len(completion_ids), 1), use_cache=True)
    logits = [out.logits[:, -1]]
    for ids in completion_ids.T[:-1]:  # one token at a time, for all completions
        out = model(ids[:, None], cache=out.cache)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, dim=1)
""",
    ],
    "token_logprobs": [
        """
def token_logprobs(model, prompt_ids, completion_ids, temperature):
    logits = completion_logits(model, prompt_ids, completion_ids)
    logits = logits.to(torch.float32) / temperature
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), completion_ids.flatten(), reduction="none"
    )
    return -loss.view(completion_ids.shape)
""",
        """
def token_logprobs(model, prompt_ids, completion_ids, temperature):
    scaled = completion_logits(model, prompt_ids, completion_ids).float().div(temperature)
    chosen = torch.take_along_dim(scaled, completion_ids[..., None], dim=-1).squeeze(-1)
    return chosen - scaled.logsumexp(dim=-1)
""",
        """
def token_logprobs(model, prompt_ids, completion_ids, temperature):
    result = []
    for completion in completion_ids:
        ids = torch.cat([prompt_ids, completion])
        logits = model(input_ids=ids[None]).logits[0].float()
        row = []
        for t in range(len(prompt_ids), len(ids)):
            row.append(torch.log_softmax(logits[t - 1] / temperature, dim=0)[ids[t]])
        result.append(torch.stack(row))
    return torch.stack(result)
""",
    ],
    "parse_score": [
        """
def parse_score(reply, label="Score"):
    decoration, score = " \\t\\r\\f\\v*()[]{}", None
    for line in reply.split("\\n"):
        name, colon, value = line.partition(":")
        value = value.strip(decoration)
        if colon and name.strip(decoration).lower() == label.lower():
            if value in ("1", "2", "3", "4", "5"):
                score = int(value)
    return score
""",
        r"""
def parse_score(reply, label="Score"):
    around = r"[^\S\n]*(?:[*()\[\]{}][^\S\n]*)*"
    line = rf"(?im)^{around}{re.escape(label)}{around}:{around}([12345]){around}$"
    found = re.findall(line, reply)
    return int(found[-1]) if found else None
""",
        r"""
def parse_score(reply, label="Score"):
    edges = re.compile(r"^[\s*()\[\]{}]+|[\s*()\[\]{}]+$")
    for line in reversed(reply.split("\n")):
        parts = [edges.sub("", part).casefold() for part in line.split(":")]
        for k in range(1, 6):
            if parts == [label.casefold(), str(k)]:
                return k
    return None
""",
    ],
    "fence": [
        r"""
def fence(texts):
    code, fenced = hashlib.sha256("".join(texts).encode("utf-8")).hexdigest()[:8], ""
    for i in range(len(texts)):
        if i > 0:
            fenced += "\n"
        fenced += f"<text-{i + 1}-{code}>\n" + texts[i] + f"\n</text-{i + 1}-{code}>"
    return fenced
""",
        r"""
def fence(texts):
    digest = hashlib.new("sha256")
    for text in texts:
        digest.update(text.encode())
    code, lines = digest.digest()[:4].hex(), []
    for number, text in enumerate(texts, start=1):
        lines += [f"<text-{number}-{code}>", text, f"</text-{number}-{code}>"]
    return "\n".join(lines)
""",
        r"""
def fence(texts):
    from string import Template

    code = f"{int(hashlib.sha256(bytes(''.join(texts), 'utf8')).hexdigest(), 16):064x}"[:8]
    template = Template("<$tag>\n$text\n</$tag>")
    tags = map("text-{}-{}".format, range(1, len(texts) + 1), [code] * len(texts))
    return "\n".join(template.substitute(tag=g, text=t) for g, t in zip(tags, texts))
""",
    ],
    "judge_messages": [
        """
def judge_messages(kind, row, rubric="", attempt=""):
    has_reference = len(row["reference"]) > 0
    titles = ["Problem", "Reference solution", "Checkpoints", "Text to judge"]
    parts = []
    for title, text in zip(titles, [row["question"], row["reference"], rubric, attempt]):
        if text != "":
            parts.append("## {title}\\n{text}\\n".replace("{title}", title).replace("{text}", text))
    return [
        {"role": "system", "content": system_message(kind, row["domain"], has_reference)},
        {"role": "user", "content": "\\n".join(parts)},
    ]
""",
        r"""
def judge_messages(kind, row, rubric="", attempt=""):
    has_reference = len(row["reference"]) > 0
    user = f"## Problem\n{row['question']}\n"
    if has_reference:
        user += f"\n## Reference solution\n{row['reference']}\n"
    if rubric:
        user += f"\n## Checkpoints\n{rubric}\n"
    if attempt:
        user += f"\n## Text to judge\n{attempt}\n"
    texts = DOMAINS[row["domain"]]
    basis = BASIS["reference" if has_reference else "none"].format(**texts)
    system = KINDS[kind].format_map({"basis": basis} | texts | SHARED)
    return [dict(role="system", content=system), dict(role="user", content=user)]
""",
        r"""
def judge_messages(kind, row, rubric="", attempt=""):
    texts = [row["question"], row["reference"], rubric, attempt]
    titles = ["Problem", "Reference solution", "Checkpoints", "Text to judge"]
    template = "\n".join(f"## {titles[i]}\n{{{i}}}\n" for i in range(4) if texts[i])
    user = template.format(*texts)
    system = system_message(
        has_reference=bool(row["reference"]), domain=row["domain"], kind=kind
    )
    return [{"content": system, "role": "system"}, {"content": user, "role": "user"}]
""",
    ],
    "split_steps": [
        r"""
def split_steps(pieces):
    if not pieces:
        return []
    text = "".join(pieces)
    owner = [i for i, piece in enumerate(pieces) for _ in piece]  # of each character
    heads, paragraphs, position, after_blank = [], [], 0, False
    for line in text.split("\n"):
        if line.startswith("###"):
            heads.append(position)
        if not line.strip():
            after_blank = True
        elif after_blank:
            paragraphs.append(position)
            after_blank = False
        position += len(line) + 1

    def has_content(part):
        return any(character.isalnum() for character in part)

    borders = [0]
    for border in heads or paragraphs:
        if has_content(text[borders[-1] : border]) and has_content(text[border:]):
            borders.append(border)
    starts = [0] + sorted({owner[border] for border in borders[1:16]} - {0})
    return [(s, e) for s, e in zip(starts, starts[1:] + [len(pieces)])]
""",
        r"""
def split_steps(pieces):
    import bisect
    import itertools

    text = "".join(pieces)
    if re.search(r"(?m)^###", text):
        parts = re.split(r"(?m)^(?=###)", text)
    else:
        parts = re.findall(r"(?s).+?(?:\n[ \t\r]*\n\s*|\Z)", text)
    steps = []
    for part in parts:  # a crumb joins the step before it, a crumb at the beginning the one after
        if steps and (not re.search(r"\w", part) or not re.search(r"\w", steps[-1])):
            steps[-1] += part
        else:
            steps.append(part)
    steps = steps[: MAX_STEPS - 1] + ["".join(steps[MAX_STEPS - 1 :])]
    ends, cuts = list(itertools.accumulate(map(len, pieces))), [0]
    for length in itertools.accumulate(len(step) for step in steps[:-1]):
        cuts.append(bisect.bisect_right(ends, length))
    cuts = sorted(set(cuts) - {len(pieces)}) + [len(pieces)]
    return list(map(list, itertools.pairwise(cuts)))
""",
        r"""
def split_steps(pieces):
    text = "".join(pieces)
    borders = {match.start() for match in re.finditer(r"(?:(?<=\n)|\A)###", text)}
    borders = borders or {match.end() for match in re.finditer(r"\n\s*?\n\s*", text)}
    spans, position = [], 0
    for t, piece in enumerate(pieces):
        begins = any(c in borders for c in range(position, position + len(piece)))
        position += len(piece)
        if begins or t == 0:
            spans.append([t, t + 1])
        else:
            spans[-1][1] = t + 1
    merged = []
    for start, end in spans:
        both = [merged[-1], [start, end]] if merged else []
        if both and not all(re.search(r"\w", "".join(pieces[a:b])) for a, b in both):
            merged[-1][1] = end
        else:
            merged.append([start, end])
    if len(merged) > 16:
        merged[15:] = [[merged[15][0], len(pieces)]]
    return [tuple(span) for span in merged]
""",
    ],
    "step_advantages": [
        """
def step_advantages(step_rewards, norm):
    if norm not in ("delta", "end", "group"):
        raise ValueError("norm must be delta, end or group")
    result = []
    for rewards in step_rewards:
        T, advantages = len(rewards), []
        for t in range(T):
            if norm == "delta":
                baseline = rewards[t - 1] if t > 0 else rewards[T - 1]
            elif norm == "end":
                baseline = rewards[T - 1] if t < T - 1 else 0.0
            else:
                total = 0.0
                for other in step_rewards:
                    total += sum(other) / len(other)
                baseline = total / len(step_rewards)
            advantages.append(rewards[t] - baseline)
        result.append(advantages)
    return result
""",
        """
def step_advantages(step_rewards, norm):
    import numpy as np

    arrays = [np.array(rewards, dtype=float) for rewards in step_rewards]
    if norm == "delta":
        advantages = [s - np.roll(s, 1) for s in arrays]
    elif norm == "end":
        advantages = [np.append(s[:-1] - s[-1], s[-1]) for s in arrays]
    elif norm == "group":
        baseline = np.mean([s.mean() for s in arrays]) if arrays else 0.0
        advantages = [s - baseline for s in arrays]
    else:
        raise ValueError(norm)
    return [a.tolist() for a in advantages]
""",
        """
def step_advantages(step_rewards, norm):
    def delta(s):
        return torch.diff(s, prepend=s[-1:])

    def end(s):
        return torch.cat([s[:-1] - s[-1], s[-1:]])

    def group(s):
        return s - torch.stack([other.mean() for other in tensors]).mean()

    functions = {"delta": delta, "end": end, "group": group}
    if norm not in functions:
        raise ValueError(f"{norm} is not one of {sorted(functions)}")
    tensors = [torch.tensor(s, dtype=torch.float64) for s in step_rewards]
    return [functions[norm](s).tolist() for s in tensors]
""",
    ],
    "group_advantages": [
        """
def group_advantages(rewards, divide_by_std=True):
    n, total = 0, 0.0
    for reward in rewards:
        if reward is not None:
            n += 1
            total += reward
    mean = total / max(n, 1)
    distances = [0.0 if reward is None else reward - mean for reward in rewards]
    variance = sum(distance * distance for distance in distances) / max(n - 1, 1)
    known = [reward for reward in rewards if reward is not None]
    if n < 2 or min(known) == max(known):
        return [0.0 for _ in rewards]
    if divide_by_std:
        distances = [distance / (math.sqrt(variance) + 1e-6) for distance in distances]
    return distances
""",
        """
def group_advantages(rewards, divide_by_std=True):
    import numpy as np

    values = np.array([np.nan if reward is None else reward for reward in rewards], dtype=float)
    known = values[~np.isnan(values)]
    if len(known) < 2 or np.ptp(known) == 0:
        return np.zeros(len(values)).tolist()
    advantages = np.nan_to_num(values - known.mean())
    if divide_by_std:
        advantages /= known.std(ddof=1) + 1e-6
    return list(advantages)
""",
        """
def group_advantages(rewards, divide_by_std=True):
    places = [i for i, reward in enumerate(rewards) if reward is not None]
    known = torch.tensor([rewards[i] for i in places], dtype=torch.float64)
    advantages = torch.zeros(len(rewards), dtype=torch.float64)
    if known.unique().numel() > 1:
        std, mean = torch.std_mean(known)
        advantages[places] = (known - mean) / (std + 1e-6 if divide_by_std else 1)
    return advantages.tolist()
""",
    ],
    "policy_loss": [
        """
def policy_loss(logp, logp_old, advantages, clip_low, clip_high):
    ratio = (logp - logp_old).exp()
    clipped = torch.clip(ratio, 1 - clip_low, 1 + clip_high)
    return torch.max(-advantages * ratio, -advantages * clipped)
""",
        """
def policy_loss(logp, logp_old, advantages, clip_low, clip_high):
    ratio = (logp - logp_old).exp()
    low, high = ratio.clamp(min=1 - clip_low), ratio.clamp(max=1 + clip_high)
    return torch.where(advantages >= 0, high, low) * -advantages
""",
        """
def policy_loss(logp, logp_old, advantages, clip_low, clip_high):
    losses = []
    for now, before, a in zip(logp, logp_old, advantages):
        ratio = torch.exp(now - before)
        if a > 0 and ratio > 1 + clip_high:
            ratio = 0 * now + 1 + clip_high
        elif a < 0 and ratio < 1 - clip_low:
            ratio = 0 * now + 1 - clip_low
        losses.append(-ratio * a)
    return torch.stack(losses) if losses else 0 * logp
""",
    ],
    "kl_to_initial": [
        """
def kl_to_initial(logp, logp_initial):
    difference = logp - logp_initial
    return torch.special.expm1(-difference) + difference
""",
        """
def kl_to_initial(logp, logp_initial):
    log_r = logp_initial.double() - logp.double()  # float32 would round below 0
    k3 = torch.exp(log_r) - 1 - log_r
    return k3.clamp(min=0).to(logp.dtype)
""",
        """
def kl_to_initial(logp, logp_initial):
    x = logp_initial - logp
    series = x**2 / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5)))
    return torch.where(x.abs() < 0.01, series, x.exp() - 1 - x)
""",
    ],
    "reverse_kl": [
        """
def reverse_kl(student, teacher, temperature):
    log_s = torch.nn.functional.log_softmax(student.float() / temperature, dim=-1)
    log_t = torch.nn.functional.log_softmax(teacher.float() / temperature, dim=-1)
    kl = torch.nn.functional.kl_div(log_t, log_s, reduction="none", log_target=True)
    return kl.sum(dim=-1)
""",
        """
def reverse_kl(student, teacher, temperature):
    def normalised(logits):
        scaled = logits.to(torch.float32).div(temperature)
        return scaled - scaled.logsumexp(dim=-1, keepdim=True)

    s, t = normalised(student), normalised(teacher)
    return torch.einsum("btv,btv->bt", s.exp(), s - t)
""",
        """
def reverse_kl(student, teacher, temperature):
    rows = []
    for b in range(student.shape[0]):
        row = []
        for t in range(student.shape[1]):
            log_s = torch.log_softmax(student[b, t].double() / temperature, 0)
            log_t = torch.log_softmax(teacher[b, t].double() / temperature, 0)
            row.append(torch.sum(torch.exp(log_s) * (log_s - log_t)))
        rows.append(torch.stack(row))
    return torch.stack(rows).float()
""",
    ],
    "pass_at_k": [
        """
def pass_at_k(n, c, k):
    if c < 0 or c > n or k < 1 or k > n:
        raise ValueError((n, c, k))
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))
""",
        """
def pass_at_k(n, c, k):
    if not 1 <= k <= n:
        raise ValueError("k is not in 1..n")
    if not 0 <= c <= n:
        raise ValueError("c is not in 0..n")
    all_sets, all_wrong = math.perm(n, k), math.perm(n - c, k)
    return (all_sets - all_wrong) / all_sets
""",
        """
def pass_at_k(n, c, k):
    if c not in range(n + 1) or k not in range(1, n + 1):
        raise ValueError("impossible counts")
    all_wrong = 1.0
    for i in range(k):  # the completions of a set are drawn one after the other
        all_wrong *= max(n - c - i, 0) / (n - i)
    return 1.0 - all_wrong
""",
    ],
}


def spoil(source: str, name: str, mutant: tuple[str, ...]) -> str:
    """Return the source of a module, with a mutant in place of a function."""
    node = handout.find_functions(source)[name]
    old = ast.get_source_segment(source, node)
    new = mutant[1].strip("\n") if len(mutant) == 2 else old.replace(*mutant[1:])
    return source.replace(old, new)


def write_class(folder: Path, n_students: int = 100, most_mutants: int = 6) -> dict[str, list[str]]:
    """Write submissions. Return which functions of each student are wrong."""
    rng, wrong = random.Random(0), {}
    for i in range(n_students):
        student = f"student {i:03}"
        chosen = rng.sample(handout.FUNCTIONS, rng.randint(0, most_mutants))
        wrong[student] = [function.name for function in chosen]
        for file in {function.file for function in handout.FUNCTIONS}:
            (folder / student / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(handout.ROOT / file, folder / student / file)
        for function in chosen:
            path = folder / student / function.file
            mutant = rng.choice(MUTANTS[function.name])
            path.write_text(spoil(path.read_text(), function.name, mutant))
    (folder / "wrong.json").write_text(json.dumps(wrong, indent=1))
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a class of 100 submissions.")
    parser.add_argument("folder", type=Path)
    write_class(parser.parse_args().folder)
