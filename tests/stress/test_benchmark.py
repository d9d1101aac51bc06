"""The benchmark: each system is timed at the same work, and the table divides the right numbers."""

import benchmark
import pytest

import exprl

TINY = {
    "prompts": 2, "group": 2, "micro_batch": 2, "prompt_length": 8, "length": 4, "vocabulary": 64,
    "steps": 1,
}  # fmt: skip


def test_each_system_does_its_steps(tmp_path):
    model = benchmark.random_model(str(tmp_path / "model"), 64)
    settings = benchmark.BenchmarkSettings(model=model, **TINY)
    source, tokenizer = exprl.find_model(model)
    texts = benchmark.make_prompts(tokenizer, 2, 8)
    assert texts[0] != texts[1]
    assert [len(tokenizer(text).input_ids) for text in texts] == [8, 8]
    for run in benchmark.SYSTEMS.values():  # both assert that completions have their length
        taken = run(settings, source, tokenizer, texts)
        assert set(taken) == {"sample", "update", "peak"} and min(taken.values()) > 0


def test_the_first_step_is_not_counted():
    clock = benchmark.Clock()
    for seconds in (100.0, 1.0, 3.0):
        clock.step(seconds, 2 * seconds)
    assert (clock.result()["sample"], clock.result()["update"]) == (2.0, 4.0)


def test_table_ratios_and_exponents(monkeypatch, capsys):
    def in_a_process(settings, system, **changes):
        sample = {"exprl": 1.0, "trl": 2.0, "limit": 0.5}[system]
        factor = 2 if "length" in changes else 4 if "group" in changes else 1
        return {"sample": sample * factor, "update": 2 * sample * factor, "peak": sample}

    monkeypatch.setattr(benchmark, "in_a_process", in_a_process)
    benchmark.benchmark(benchmark.BenchmarkSettings(grow=True, **TINY))
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "2.00 [2.00, 2.00]  4.00 [4.00, 4.00]  6.00 [6.00, 6.00]" in lines["trl"]
    assert "0.50 [0.50, 0.50]" in lines["exprl.py / trl"]
    assert "2.00 [2.00, 2.00]" in lines["exprl.py / limit"]
    assert lines["length 4 -> 8"].split()[-3:] == ["1.00", "1.00", "0.00"]
    assert lines["group 2 -> 4"].split()[-3:] == ["2.00", "2.00", "0.00"]
    assert "vocabulary 64 -> 128" in lines


def test_a_judge_s_time_is_reported_by_phase(monkeypatch, capsys):
    """Two steps with each judge; the first step of a run is not counted."""
    settings = benchmark.BenchmarkSettings(judge=True, repeats=1, **TINY | {"steps": 2})
    benchmark.benchmark(settings)
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "medians and ranges of 2 steps" in lines
    assert lines["0 s a call"].endswith("1.00")
    waited = {
        name: float(lines[name].split("]")[2].split()[0]) for name in ("0 s a call", "2 s a call")
    }
    assert waited["0 s a call"] < 0.5 < 1.0 < waited["2 s a call"] < 2.5  # one round of calls


def test_what_judge_calls_share_is_counted_from_the_start(tmp_path, capsys):
    assert benchmark.common_start([1, 2, 3, 4], [1, 2, 5, 4]) == 2
    assert benchmark.common_start([1, 2], [1, 2, 3]) == 2
    model = benchmark.random_model(str(tmp_path / "model"), 64)
    rows = [{"question": "w1 w2", "reference": "w3\nw4\nw5"}, {"question": "w7", "reference": "w3"}]
    exprl.write_log(tmp_path / "data.jsonl", rows, "w")
    data = str(tmp_path / "data.jsonl")
    benchmark.benchmark(benchmark.BenchmarkSettings(model=model, judge_prompts=data))
    lines = {line.split(" ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["together"][1] == "1.0" and lines["prefix"][1] == lines["alone"][1] == "2.0"
    for name in ("outcome", "together", "prefix", "alone", "quotes"):
        calls, tokens, a_call, same, share = map(float, lines[name][1:])
        assert tokens == pytest.approx(calls * a_call, rel=0.01)
        assert share == pytest.approx(100 * same / a_call, abs=0.5) and 80 < share <= 100


def test_bad_input_and_a_system_that_fails_say_so(tmp_path):
    with pytest.raises(SystemExit, match="--micro-batch has to divide"):
        benchmark.benchmark(benchmark.BenchmarkSettings(**TINY | {"micro_batch": 3}))
    settings = benchmark.BenchmarkSettings(model=str(tmp_path / "none"), **TINY)
    with pytest.raises(SystemExit, match=r"limit failed: exprl: --model .*none"):
        benchmark.in_a_process(settings, "limit")
