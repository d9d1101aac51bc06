"""Grades the grader: solutions of the graded functions that properties.py must reject or accept.

MUTANTS holds what students hand in by mistake: (what is wrong, old, new), an edit of our source, in
which `old` occurs once, or (what is wrong, source), the whole function. Each must fail a property.
CORRECT holds solutions written in other ways than ours, which must pass them all. A source runs in
a copy of the globals of the function's module. This file is never given to students.
"""

MUTANTS: dict[str, list[tuple[str, ...]]] = {
    "completion_mask": [
        ("the eos is left out", "is_eos.cumsum(dim=1) - is_eos == 0", "is_eos.cumsum(dim=1) == 0"),
        ("tokens != eos: goes on after it", "is_eos.cumsum(dim=1) - is_eos == 0", "is_eos == 0"),
        ("only the smallest eos of the set", "sorted(eos_ids)", "sorted(eos_ids)[:1]"),
        ("only the largest eos of the set", "sorted(eos_ids)", "sorted(eos_ids)[-1:]"),
        ("up to the second eos", "- is_eos == 0", "- is_eos <= 1"),
        (
            "up to the last eos",
            "is_eos.cumsum(dim=1) - is_eos == 0",
            "(is_eos.flip(1).cumsum(1).flip(1) > 0) | ~is_eos.bool().any(1, keepdim=True)",
        ),
        ("inverted: what comes after the eos", "- is_eos == 0", "- is_eos != 0"),
        (
            "integers, no bool",
            "is_eos.cumsum(dim=1) - is_eos == 0",
            "(is_eos.cumsum(dim=1) - is_eos == 0).long()",
        ),
        ("down the columns", "cumsum(dim=1)", "cumsum(dim=0)"),
        (
            "an eos ends the later rows too",
            "is_eos.cumsum(dim=1)",
            "is_eos.flatten().cumsum(0).view_as(is_eos)",
        ),
        ("token 0 is taken for padding", "- is_eos == 0", "- is_eos + (tokens == 0) == 0"),
        ("empty", "- is_eos == 0", "- is_eos < 0"),
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
        ("not shifted", "[:, -n - 1 : -1]", "[:, -n:]"),
        ("one position too many", "[:, -n - 1 : -1]", "[:, -n - 1 :]"),
        ("one position too few are kept", "logits_to_keep=n + 1", "logits_to_keep=n"),
        ("positions from 1", "(attention_mask.cumsum(dim=1) - 1)", "attention_mask.cumsum(dim=1)"),
        ("padding has position -1", ".clamp(min=0)", ""),
        (
            "padding is attended to",
            '"attention_mask": attention_mask',
            '"attention_mask": torch.ones_like(attention_mask)',
        ),
        (
            "every row takes the positions of the first",
            "(attention_mask.cumsum(dim=1) - 1)",
            "(attention_mask[:1].cumsum(dim=1) - 1).expand_as(input_ids)",
        ),
        (
            "mask of the padding, not of the text",
            '"attention_mask": attention_mask',
            '"attention_mask": 1 - attention_mask',
        ),
        (
            "padding is taken to be token 0",
            '"attention_mask": attention_mask',
            '"attention_mask": (input_ids != 0).long()',
        ),
        ("no gradient", "[:, -n - 1 : -1]", "[:, -n - 1 : -1].detach()"),
        ("log-probabilities", "[:, -n - 1 : -1]", "[:, -n - 1 : -1].log_softmax(-1)"),
        (
            "only the sampled token's logit",
            "[:, -n - 1 : -1]",
            "[:, -n - 1 : -1].gather(2, input_ids[:, -n:, None])[:, :, 0]",
        ),
        (
            "neither mask nor positions are passed",
            """
def completion_logits(model, input_ids, attention_mask, n):
    return model(input_ids=input_ids).logits[:, -n - 1 : -1]
""",
        ),
        (
            "the mask is passed, the positions are not",
            """
def completion_logits(model, input_ids, attention_mask, n):
    return model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -n - 1 : -1]
""",
        ),
        (
            "shifted by two",
            """
def completion_logits(model, input_ids, attention_mask, n):
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids, attention_mask=attention_mask, position_ids=positions).logits
    return logits[:, -n - 2 : -2]
""",
        ),
        (
            "shifted the wrong way",
            """
def completion_logits(model, input_ids, attention_mask, n):
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids, attention_mask=attention_mask, position_ids=positions).logits
    return logits.roll(-1, 1)[:, -n:]
""",
        ),
        (
            "of the prompt",
            """
def completion_logits(model, input_ids, attention_mask, n):
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids, attention_mask=attention_mask, position_ids=positions).logits
    return logits[:, :n]
""",
        ),
    ],
    "token_logprobs": [
        ("no temperature", "logits.float() / temperature", "logits.float()"),
        ("times the temperature", "logits.float() / temperature", "logits.float() * temperature"),
        (
            "temperature after log_softmax",
            "torch.log_softmax(logits.float() / temperature, -1)",
            "(torch.log_softmax(logits.float(), -1) / temperature)",
        ),
        (
            "the token before",
            "input_ids[:, -n_completion:]",
            "input_ids[:, -n_completion - 1 : -1]",
        ),
        ("the prompt's tokens", "input_ids[:, -n_completion:]", "input_ids[:, :n_completion]"),
        ("bfloat16 stays bfloat16", "logits.float()", "logits"),
        (
            "float32 only at the end",
            "torch.log_softmax(logits.float() / temperature, -1)",
            "torch.log_softmax(logits / temperature, -1).float()",
        ),
        ("probabilities", "torch.log_softmax(", "torch.softmax("),
        (
            "log(p + 1e-8)",
            "torch.log_softmax(logits.float() / temperature, -1)",
            "(torch.softmax(logits.float() / temperature, -1) + 1e-8).log()",
        ),
        (
            "log(softmax): -inf where it underflows",
            "torch.log_softmax(logits.float() / temperature, -1)",
            "torch.softmax(logits.float() / temperature, -1).log()",
        ),
        (
            "logits, not normalised",
            "torch.log_softmax(logits.float() / temperature, -1)",
            "(logits.float() / temperature)",
        ),
        ("normalised over positions", "temperature, -1)", "temperature, 0)"),
        ("no gradient", "attention_mask, n_completion)", "attention_mask, n_completion).detach()"),
        ("of the likeliest token", ".gather(1, tokens[:, None])[:, 0]", ".max(-1).values"),
        (
            "padding is attended to",
            "attention_mask, n_completion)",
            "torch.ones_like(attention_mask), n_completion)",
        ),
        (
            "a sum for each completion",
            "use_reentrant=False) for row in rows])",
            "use_reentrant=False) for row in rows]).sum(1)",
        ),
        (
            "cross-entropy without the minus",
            """
def token_logprobs(model, input_ids, attention_mask, n_completion, temperature):
    logits = completion_logits(model, input_ids, attention_mask, n_completion).float()
    return torch.nn.functional.cross_entropy(
        (logits / temperature).transpose(1, 2), input_ids[:, -n_completion:], reduction="none"
    )
""",
        ),
        (
            "logits not shifted",
            """
def token_logprobs(model, input_ids, attention_mask, n_completion, temperature):
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids, attention_mask=attention_mask, position_ids=positions).logits
    logp = (logits[:, -n_completion:].float() / temperature).log_softmax(-1)
    return logp.gather(2, input_ids[:, -n_completion:, None]).squeeze(2)
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
        ("the label is ignored", "{around}{label}", "{around}Score"),
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
        ("no code", "text-{t}-{code}", "text-{t}"),
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
        ("numbered from 0", "range(1, len(texts) + 1)", "range(len(texts))"),
        ("not numbered", "text-{t}-{code}", "text-{code}"),
        ("text is stripped", r"\n{text}\n", r"\n{text.strip()}\n"),
        ("text is escaped", r"\n{text}\n", r"\n{text.replace('<', '&lt;')}\n"),
        ("no closing tag", r"\n</{t}>", ""),
        ("closed by an opening tag", "</{t}>", "<{t}>"),
        (
            "a list, not one text",
            r'return "\n".join(f"<{t}>\n{text}\n</{t}>" for t, text in '
            "zip(tags, texts, strict=True))",
            r'return [f"<{t}>\n{text}\n</{t}>" for t, text in zip(tags, texts, strict=True)]',
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
            "zip(USER, texts, strict=True)",
            "[(USER[i], texts[i]) for i in (0, 3, 1, 2)]",
        ),
        (
            "the reference is left out",
            'row["question"], row["reference"], rubric',
            'row["question"], "", rubric',
        ),
        ("the checkpoints are left out", "rubric, attempt)", '"", attempt)'),
        (
            "the answer stands in for the reference",
            'row["question"], row["reference"], rubric',
            'row["question"], row["reference"] or row["answer"], rubric',
        ),
        ("empty parts are shown", "in sections if text)", "in sections)"),
        ("no blank line between parts", r'"\n".join(', '"".join('),
        (
            "told of a reference where there is none",
            '"reference" if row["reference"] else "none"',
            '"reference"',
        ),
        ("the system message of mathematics", 'SYSTEM[row["domain"]]', 'SYSTEM["math"]'),
        ("the basis of mathematics", 'BASIS[row["domain"]]', 'BASIS["math"]'),
        ("always the kind outcome", "[kind]", '["outcome"]'),
        (
            "fields of the system message not filled",
            ".format(basis=basis, **SHARED)",
            '.replace("{basis}", basis)',
        ),
        (
            "the attempt in the system message",
            "BASIS[row",
            r'attempt + "\n\n" + BASIS[row',
        ),
        (
            "{{ and }} of a text collapse",
            "section.format(text=text)",
            'section.format(text=text).replace("{{", "{").replace("}}", "}")',
        ),
        (
            "braces of a text are doubled",
            "section.format(text=text)",
            'section.format(text=text.replace("{", "{{").replace("}", "}}"))',
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
    basis = BASIS[row["domain"]]["reference" if row["reference"] else "none"]
    system = SYSTEM[row["domain"]][kind].format(basis=basis, **SHARED)
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
    basis = BASIS[row["domain"]]["reference" if row["reference"] else "none"]
    texts = (row["question"], row["reference"], rubric, attempt)
    user = "\n".join(section.format(text=t) for section, t in zip(USER, texts) if t)
    messages = []
    for role, text in (("system", SYSTEM[row["domain"]][kind]), ("user", user)):
        for name, value in {"basis": basis, **SHARED}.items():
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
        ("a border between tokens is one token early", "ends <= border", "ends < border"),
        (
            "a token across the border stays with the step before",
            "ends <= border",
            "ends - [len(piece) for piece in pieces] < border",
        ),
        (
            "crumbs are steps",
            r'if re.search(r"\w", before) and re.search(r"\w", after):',
            "if start > starts[-1]:",
        ),
        ("a crumb at the beginning is a step", r're.search(r"\w", before)', "before"),
        ("a crumb at the end is a step", r' and re.search(r"\w", after)', ""),
        (
            "a bare ### is a step",
            r're.search(r"\w", before)',
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
            "[(int(ends[a]) - len(pieces[a]), int(ends[b - 1])) for a, b in spans] if",
        ),
        (
            "texts in place of spans",
            "list(spans) if",
            '["".join(pieces[a:b]) for a, b in spans] if',
        ),
        (
            "what follows 16 steps is dropped",
            "    starts = starts[:MAX_STEPS]\n"
            "    spans = zip(starts, [*starts[1:], len(pieces)], strict=True)",
            "    spans = list(zip(starts, [*starts[1:], len(pieces)], strict=True))[:MAX_STEPS]",
        ),
        (
            "what comes before the first ### is dropped",
            r"""
def split_steps(pieces):
    text, ends = "".join(pieces).rstrip(), np.cumsum([len(piece) for piece in pieces])
    cuts = [match.start() for match in re.finditer(r"^###", text, re.MULTILINE)]
    kept = cuts[:1] or [0]
    for cut in cuts or [match.end() for match in re.finditer(r"\n[^\S\n]*\n\s*", text)]:
        if re.search(r"\w", text[kept[-1] : cut]) and re.search(r"\w", text[cut:]):
            kept.append(cut)
    starts = sorted(set(np.searchsorted(ends, kept[:MAX_STEPS], "right").tolist()))
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
            "[r - s[-1] for r in s[:-1]] + s[-1:]",
            "[r - s[-1] for r in s]",
        ),
        ("end: to the first step", "r - s[-1] for", "r - s[0] for"),
        ("end: the sign is flipped", "r - s[-1] for", "s[-1] - r for"),
        (
            "group: pooled over all steps",
            "[sum(s) / len(s) for s in step_rewards if s]",
            "[r for s in step_rewards for r in s]",
        ),
        (
            "group: the mean of one completion",
            "r - sum(means) / len(means) for r",
            "r - sum(s) / len(s) for r",
        ),
        (
            "group: the mean of the last steps",
            "[sum(s) / len(s) for s in step_rewards if s]",
            "[s[-1] for s in step_rewards if s]",
        ),
        (
            "group: divided by the std",
            "[[r - sum(means) / len(means) for r in s] for s in step_rewards]",
            "[[(r - sum(means) / len(means)) / (np.std(means) + 1e-6) for r in s]"
            " for s in step_rewards]",
        ),
        (
            "group: without the completion itself",
            "[[r - sum(means) / len(means) for r in s] for s in step_rewards]",
            "[[r - (sum(means) - m) / max(1, len(means) - 1) for r in s]"
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
        ("the mean of the batch", "r.mean()", "rewards[valid].mean()"),
        ("the std of the batch", "r.std()", "rewards[valid].std()"),
        ("the std of a population", "r.std()", "r.std(correction=0)"),
        ("the variance", "r.std()", "r.var()"),
        ("the sign is flipped", "(r - r.mean())", "(r.mean() - r)"),
        ("never divided", "((r.std() + 1e-6) if divide else 1)", "1"),
        ("always divided", "1e-6) if divide else 1", "1e-6)"),
        ("divided where it should not be", "if divide else", "if not divide else"),
        ("no epsilon", "r.std() + 1e-6", "r.std()"),
        ("a larger epsilon", "r.std() + 1e-6", "r.std() + 1e-4"),
        (
            "NaN where all are equal",
            "if len(r) > 1 and r.max() > r.min():\n            advantages[members] = "
            "(r - r.mean()) / ((r.std() + 1e-6) if divide else 1)",
            "if len(r) > 1:\n            advantages[members] = "
            "(r - r.mean()) / (r.std() if divide else 1)",
        ),
        ("NaN for a lone member", "if len(r) > 1 and r.max() > r.min():", "if len(r):"),
        (
            "rounding is blown up where all are equal",
            "if len(r) > 1 and r.max() > r.min():",
            "if len(r) > 1:",
        ),
        ("two rewards are too few", "len(r) > 1", "len(r) > 2"),
        ("no ValueError", "if rewards.numel() % group_size:", "if False:"),
        ("an AssertionError", "raise ValueError(", "raise AssertionError("),
        (
            "zeros",
            "if len(r) > 1 and r.max() > r.min():",
            "if False:",
        ),
        (
            "a failure is a 0 in mean and std",
            "members = begin + valid[begin : begin + group_size].nonzero().flatten()\n"
            "        r = rewards[members]",
            "members = torch.arange(begin, begin + group_size)\n"
            "        r = torch.where(valid, rewards, 0.0)[members]",
        ),
        (
            "valid is ignored",
            "begin + valid[begin : begin + group_size].nonzero().flatten()",
            "torch.arange(begin, begin + group_size)",
        ),
        (
            "failures get an advantage",
            "advantages[members] = (r - r.mean())",
            "advantages[begin : begin + group_size] = (rewards[begin : begin + group_size]"
            " - r.mean())",
        ),
        (
            "groups are interleaved",
            "begin + valid[begin : begin + group_size].nonzero().flatten()",
            "torch.tensor([i for i in range(begin // group_size, len(rewards),"
            " len(rewards) // group_size) if valid[i]], dtype=torch.long)",
        ),
        (
            "failures are multiplied by 0: NaN stays NaN",
            """
def group_advantages(rewards, valid, group_size, divide=True):
    if rewards.numel() % group_size:
        raise ValueError("no whole groups")
    v = valid.float().view(-1, group_size)
    r = rewards.view(-1, group_size) * v
    n = v.sum(1, keepdim=True)
    centred = (r - r.sum(1, keepdim=True) / n.clamp(min=1)) * v
    std = ((centred**2).sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    low = torch.where(v > 0, r, math.inf).amin(1, keepdim=True)
    high = torch.where(v > 0, r, -math.inf).amax(1, keepdim=True)
    centred = centred * (high > low)
    return (centred / (std + 1e-6) if divide else centred).flatten()
""",
        ),
    ],
    "policy_loss": [
        ("the sign is flipped", "return -torch.where", "return torch.where"),
        ("max for min", "torch.minimum", "torch.maximum"),
        (
            "always clipped, on both sides",
            "torch.minimum(rho * advantages, clipped * advantages)",
            "clipped * advantages",
        ),
        (
            "never clipped",
            "torch.minimum(rho * advantages, clipped * advantages)",
            "rho * advantages",
        ),
        (
            "clip_low on both sides",
            "rho.clamp(1 - clip_low, 1 + clip_high)",
            "rho.clamp(1 - clip_low, 1 + clip_low)",
        ),
        (
            "clip_high on both sides",
            "rho.clamp(1 - clip_low, 1 + clip_high)",
            "rho.clamp(1 - clip_high, 1 + clip_high)",
        ),
        (
            "clip_low and clip_high are swapped",
            "rho.clamp(1 - clip_low, 1 + clip_high)",
            "rho.clamp(1 - clip_high, 1 + clip_low)",
        ),
        (
            "clipped where A < 0 only",
            "rho.clamp(1 - clip_low, 1 + clip_high)",
            "rho.clamp(min=1 - clip_low)",
        ),
        (
            "clipped where A > 0 only",
            "torch.minimum(rho * advantages, clipped * advantages)",
            "torch.where(advantages > 0, clipped.minimum(rho), rho) * advantages",
        ),
        (
            "clipped in logs",
            "rho.clamp(1 - clip_low, 1 + clip_high)",
            "rho.log().clamp(-clip_low, clip_high).exp()",
        ),
        (
            "the advantage inside the clamp",
            "clipped * advantages)",
            "(rho * advantages).clamp(1 - clip_low, 1 + clip_high))",
        ),
        (
            "clipped twice: a bad token's ratio ends at 3",
            "torch.minimum(rho * advantages, clipped * advantages)",
            "torch.minimum(rho.clamp(max=3) * advantages, clipped * advantages)",
        ),
        (
            "one ratio for a completion",
            "torch.exp(torch.where(mask, logp - logp_old, 0.0))",
            "torch.exp(torch.where(mask, logp - logp_old, 0.0).sum(1, keepdim=True)"
            " / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(logp)",
        ),
        ("the ratio is upside down", "logp - logp_old, 0.0", "logp_old - logp, 0.0"),
        (
            "the ratio is a difference of logs",
            "rho = torch.exp(torch.where(mask, logp - logp_old, 0.0))",
            "rho = 1 + torch.where(mask, logp - logp_old, 0.0)",
        ),
        (
            "no ratio: A log pi",
            "torch.minimum(rho * advantages, clipped * advantages)",
            "logp * advantages",
        ),
        ("no gradient", "mask, logp - logp_old, 0.0", "mask, logp.detach() - logp_old, 0.0"),
        ("divided by the mask's own tokens", ".sum() / denominator", ".sum() / mask.sum()"),
        ("the mean of the micro-batch", ".sum() / denominator", ".mean()"),
        (
            "the mean of each completion's mean",
            ".sum() / denominator",
            ".sum(1).div(mask.sum(1).clamp(min=1)).mean()",
        ),
        ("no mask", "-torch.where(mask, objective, 0.0)", "-objective"),
        (
            "NaN outside the mask reaches the gradient",
            "torch.exp(torch.where(mask, logp - logp_old, 0.0))",
            "torch.exp(logp - logp_old)",
        ),
        (
            "multiplied by the mask: NaN stays NaN",
            "-torch.where(mask, objective, 0.0)",
            "-(mask * objective)",
        ),
    ],
    "kl_to_reference": [
        ("the KL the other way round", "logp_ref - logp", "logp - logp_ref"),
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
        ("no gradient", "logp_ref - logp", "logp_ref - logp.detach()"),
        ("r has no gradient", "torch.expm1(log_r) - log_r", "torch.expm1(log_r.detach()) - log_r"),
        ("a ratio of logs", "logp_ref - logp", "(logp_ref / logp).log()"),
        ("weighted by pi", "torch.expm1(log_r) - log_r", "logp.exp() * -log_r"),
        ("one mean", "torch.expm1(log_r) - log_r", "(torch.expm1(log_r) - log_r).mean()"),
        (
            "a sum for each completion",
            "torch.expm1(log_r) - log_r",
            "(torch.expm1(log_r) - log_r).sum(-1)",
        ),
    ],
    "reverse_kl": [
        (
            "the KL the other way round",
            "for x in (student, teacher)",
            "for x in (teacher, student)",
        ),
        ("no temperature", "x.float() / temperature", "x.float()"),
        ("times the temperature", "x.float() / temperature", "x.float() * temperature"),
        (
            "the temperature for the student only",
            "x.float() / temperature",
            "x.float() / (temperature if x is student else 1)",
        ),
        ("times the temperature squared", ".sum(-1)", ".sum(-1) * temperature**2"),
        ("normalised over positions", "temperature, -1)", "temperature, 0)"),
        ("the mean over the vocabulary", ".sum(-1)", ".mean(-1)"),
        ("the sign is flipped", "(log_s - log_t)).sum", "(log_t - log_s)).sum"),
        ("cross-entropy", "(log_s - log_t)).sum", "-log_t).sum"),
        ("not weighted", "(log_s.exp() * (log_s - log_t))", "(log_s - log_t)"),
        ("logits, not normalised", "(log_s - log_t)).sum", "(student - teacher).float()).sum"),
        (
            "at the likeliest token only",
            "(log_s.exp() * (log_s - log_t)).sum(-1)",
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
        ("bfloat16 stays bfloat16", "x.float()", "x"),
        (
            "float32 only at the end",
            "(torch.log_softmax(x.float() / temperature, -1) for",
            "(torch.log_softmax(x / temperature, -1).float() for",
        ),
        (
            "log(p + 1e-8): bounded where the two are far apart",
            "(torch.log_softmax(x.float() / temperature, -1) for",
            "((torch.softmax(x.float() / temperature, -1) + 1e-8).log() for",
        ),
        (
            "log(softmax): NaN where it underflows",
            "(torch.log_softmax(x.float() / temperature, -1) for",
            "(torch.softmax(x.float() / temperature, -1).log() for",
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
def completion_logits(model, input_ids, attention_mask, n):
    positions = attention_mask.long().cumsum(-1) - 1
    positions = positions.masked_fill(attention_mask == 0, 1)
    out = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions)
    P = input_ids.shape[1] - n
    return out.logits[:, P - 1 : P + n - 1]
""",
        """
def completion_logits(model, input_ids, attention_mask, n):
    attention_mask = attention_mask[:, :-1]  # nothing is predicted after the last token
    n_padding = (attention_mask == 0).sum(dim=1, keepdim=True)
    positions = torch.arange(attention_mask.shape[1], device=input_ids.device) - n_padding
    positions = torch.where(positions > 0, positions, 0)
    return model(
        input_ids[:, :-1], attention_mask=attention_mask, position_ids=positions
    ).logits[:, -n:, :]
""",
        """
def completion_logits(model, input_ids, attention_mask, n):
    rows = []
    for ids, attended in zip(input_ids, attention_mask):
        alone = ids[attended.bool()]
        logits = model(input_ids=alone[None]).logits[0, :-1][-n:]
        rows.append(torch.nn.functional.pad(logits, (0, 0, n - len(logits), 0)))
    return torch.stack(rows)
""",
    ],
    "token_logprobs": [
        """
def token_logprobs(model, input_ids, attention_mask, n_completion, temperature):
    logits = completion_logits(model, input_ids, attention_mask, n_completion)
    logits = logits.to(torch.float32) / temperature
    tokens = input_ids[:, input_ids.shape[1] - n_completion :]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens.flatten(), reduction="none"
    )
    return -loss.view(tokens.shape)
""",
        """
def token_logprobs(model, input_ids, attention_mask, n_completion, temperature):
    logits = completion_logits(model, input_ids, attention_mask, n_completion)
    tokens = input_ids[:, -n_completion:].unsqueeze(-1)
    scaled = logits.float().div(temperature)
    chosen = torch.take_along_dim(scaled, tokens, dim=-1).squeeze(-1)
    return chosen - scaled.logsumexp(dim=-1)
""",
        """
def token_logprobs(model, input_ids, attention_mask, n_completion, temperature):
    result = []
    for ids, mask in zip(input_ids, attention_mask):
        positions = (mask.cumsum(0) - 1).clamp(min=0)
        logits = model(
            input_ids=ids[None], attention_mask=mask[None], position_ids=positions[None]
        ).logits[0].float()
        row = []
        for t in range(len(ids) - n_completion, len(ids)):
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
    code = f"{int(hashlib.sha256(bytes(''.join(texts), 'utf8')).hexdigest(), 16):064x}"[:8]
    template = Template("<$tag>\n$text\n</$tag>")
    tags = map("text-{}-{}".format, range(1, len(texts) + 1), [code] * len(texts))
    return "\n".join(template.substitute(tag=g, text=t) for g, t in zip(tags, texts))
""",
    ],
    "judge_messages": [
        """
def judge_messages(kind, row, rubric="", attempt=""):
    domain, reference = row["domain"], row["reference"]
    basis = BASIS[domain]["none"]
    if reference:
        basis = BASIS[domain]["reference"]
    parts = []
    for template, text in zip(USER, [row["question"], reference, rubric, attempt]):
        if text != "":
            parts.append(template.replace("{text}", text))
    return [
        {"role": "system", "content": SYSTEM[domain][kind].format(basis=basis, **SHARED)},
        {"role": "user", "content": "\\n".join(parts)},
    ]
""",
        r"""
def judge_messages(kind, row, rubric="", attempt=""):
    has_reference = len(row["reference"]) > 0
    fields = dict(SHARED)
    fields["basis"] = BASIS[row["domain"]]["reference" if has_reference else "none"]
    user = f"## Problem\n{row['question']}\n"
    if has_reference:
        user += f"\n## Reference solution\n{row['reference']}\n"
    if rubric:
        user += f"\n## Checkpoints\n{rubric}\n"
    if attempt:
        user += f"\n## Text to judge\n{attempt}\n"
    system = SYSTEM[row["domain"]][kind].format_map(fields)
    return [dict(role="system", content=system), dict(role="user", content=user)]
""",
        r"""
def judge_messages(kind, row, rubric="", attempt=""):
    import re

    basis = BASIS[row["domain"]]["reference" if row["reference"] else "none"]
    fields = SHARED | {"basis": basis}
    system = re.sub(r"\{(\w+)\}", lambda match: fields[match[1]], SYSTEM[row["domain"]][kind])
    texts = [row["question"], row["reference"], rubric, attempt]
    template = "\n".join(USER[i].replace("{text}", f"{{{i}}}") for i in range(4) if texts[i])
    user = template.format(*texts)
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
        return bool(part.replace("#", "").strip())

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
def group_advantages(rewards, valid, group_size, divide=True):
    if len(rewards) % group_size != 0:
        raise ValueError("B is no multiple of G")
    shape = (len(rewards) // group_size, group_size)
    valid = valid.view(shape)
    r = rewards.masked_fill(~valid.flatten(), 0.0).view(shape)
    n = valid.sum(dim=1, keepdim=True)
    centred = (r - r.sum(dim=1, keepdim=True) / n.clamp(min=1)).masked_fill(~valid, 0.0)
    variance = centred.square().sum(dim=1, keepdim=True) / (n - 1).clamp(min=1)
    low = r.masked_fill(~valid, math.inf).amin(dim=1, keepdim=True)
    high = r.masked_fill(~valid, -math.inf).amax(dim=1, keepdim=True)
    if divide:
        centred = centred / (variance.sqrt() + 1e-6)
    return torch.where((n > 1) & (low < high), centred, torch.zeros_like(r)).flatten()
""",
        """
def group_advantages(rewards, valid, group_size, divide=True):
    import statistics

    if rewards.shape[0] % group_size:
        raise ValueError(f"{rewards.shape[0]} is not a multiple of {group_size}")
    r, ok, result = rewards.tolist(), valid.tolist(), []
    for start in range(0, len(r), group_size):
        group = range(start, start + group_size)
        kept = [r[i] for i in group if ok[i]]
        if len(set(kept)) < 2:
            result += [0.0] * group_size
            continue
        mean = statistics.fmean(kept)
        scale = statistics.stdev(kept) + 1e-6 if divide else 1.0
        result += [(r[i] - mean) / scale if ok[i] else 0.0 for i in group]
    return torch.tensor(result, dtype=rewards.dtype, device=rewards.device)
""",
        """
def group_advantages(rewards, valid, group_size, divide=True):
    if rewards.numel() % group_size:
        raise ValueError("the groups are not full")
    parts = []
    for r, ok in zip(rewards.split(group_size), valid.split(group_size)):
        kept, part = r[ok].double(), torch.zeros_like(r)
        if kept.unique().numel() > 1:
            std, mean = torch.std_mean(kept)
            advantage = kept - mean
            if divide:
                advantage /= std + 1e-6
            part[ok] = advantage.to(r.dtype)
        parts.append(part)
    return torch.cat(parts)
""",
    ],
    "policy_loss": [
        """
def policy_loss(logp, logp_old, advantages, mask, clip_low, clip_high, denominator):
    log_ratio, a = logp[mask] - logp_old[mask], advantages[mask]
    ratio = log_ratio.exp()
    plain = ratio * a
    clipped = torch.clip(ratio, 1 - clip_low, 1 + clip_high) * a
    return -torch.min(plain, clipped).sum() / denominator
""",
        """
def policy_loss(logp, logp_old, advantages, mask, clip_low, clip_high, denominator):
    outside = ~mask
    ratio = (logp.masked_fill(outside, 0) - logp_old.masked_fill(outside, 0)).exp()
    a = advantages.masked_fill(outside, 0)
    bounded = torch.where(a >= 0, ratio.clamp(max=1 + clip_high), ratio.clamp(min=1 - clip_low))
    return (bounded * -a).sum() / denominator
""",
        """
def policy_loss(logp, logp_old, advantages, mask, clip_low, clip_high, denominator):
    total = torch.zeros((), dtype=logp.dtype, device=logp.device)
    for b, t in mask.nonzero().tolist():
        rho, a = torch.exp(logp[b, t] - logp_old[b, t]), advantages[b, t]
        if a > 0 and rho > 1 + clip_high:
            rho = 1 + clip_high
        elif a < 0 and rho < 1 - clip_low:
            rho = 1 - clip_low
        total = total - rho * a
    if not mask.any():
        return total
    return (total + 0 * logp[mask].sum()) / denominator
""",
    ],
    "kl_to_reference": [
        """
def kl_to_reference(logp, logp_ref):
    difference = logp - logp_ref
    return torch.special.expm1(-difference) + difference
""",
        """
def kl_to_reference(logp, logp_ref):
    log_r = logp_ref.double() - logp.double()  # float32 would round below 0
    k3 = torch.exp(log_r) - 1 - log_r
    return k3.clamp(min=0).to(logp.dtype)
""",
        """
def kl_to_reference(logp, logp_ref):
    x = logp_ref - logp
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
