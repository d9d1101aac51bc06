"""The benchmark times every system at the same work, and its table divides the right numbers."""

import benchmark
import pytest
from transformers import AutoTokenizer

TINY = {
    "prompts": 2, "group": 2, "micro_batch": 2, "prompt_length": 8, "length": 4, "vocabulary": 64,
    "iterations": 1,
}  # fmt: skip


@pytest.fixture
def settings(tmp_path):
    model = benchmark.random_model(str(tmp_path / "model"), 64)
    return benchmark.BenchmarkSettings(model=model, **TINY)


def test_the_prompts_differ_and_have_their_length(settings):
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    texts = benchmark.make_prompts(tokenizer, settings)
    assert texts[0] != texts[1]
    assert [len(benchmark.prompt_ids(tokenizer, text)) for text in texts] == [8, 8]


@pytest.mark.parametrize("system", benchmark.SYSTEMS)
def test_each_system_runs(settings, system):
    """exprl.py and TRL both assert that their completions have the length."""
    measured = benchmark.SYSTEMS[system](settings)
    assert set(measured) == {"sampling", "updating", "peak"}
    assert min(measured.values()) > 0


def test_the_first_iteration_does_not_count():
    clock = benchmark.Clock()
    for seconds in (100.0, 1.0, 3.0):
        clock.add(seconds, 2 * seconds)
    assert (clock.result()["sampling"], clock.result()["updating"]) == (2.0, 4.0)


def test_shares_of_trl_and_exponents(monkeypatch, capsys):
    def in_a_process(settings, system, **changes):
        seconds = {"exprl": 1.0, "trl": 2.0, "limit": 0.5}[system]
        factor = 2 if "length" in changes else 4 if "group" in changes else 1
        return {"sampling": seconds * factor, "updating": 2 * seconds * factor, "peak": seconds}

    monkeypatch.setattr(benchmark, "in_a_process", in_a_process)
    benchmark.benchmark(benchmark.BenchmarkSettings(grow=True, **TINY))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {row[0]: row[1:] for row in rows if row}
    assert rows["trl"][:9:3] == ["2.00", "4.00", "6.00"]
    assert rows["exprl"][-6::3] == ["0.50", "0.50"]
    assert rows["limit"][-6::3] == ["0.25", "0.25"]
    assert rows["length"] == ["1.00", "1.00", "0.00"]
    assert rows["group"] == ["2.00", "2.00", "0.00"]
    assert "vocabulary" in rows


def test_bad_input_and_a_system_that_fails_say_so(tmp_path):
    with pytest.raises(SystemExit, match="--micro-batch 3"):
        benchmark.benchmark(benchmark.BenchmarkSettings(**TINY | {"micro_batch": 3}))
    settings = benchmark.BenchmarkSettings(model=str(tmp_path / "none"), **TINY)
    with pytest.raises(SystemExit, match=r"limit failed: exprl: --model .*none"):
        benchmark.in_a_process(settings, system="limit")
