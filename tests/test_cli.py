"""The command line in real processes: streams and exit codes.

Most are forked from one that has imported everything; some begin with an interpreter.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter
from safetensors.torch import load_file

from ppo_cli.evaluation.comparison_result import Comparison
from ppo_cli.kernels.switch import PATHS, VARIABLE
from tests.conftest import SMALL_RUN
from tests.forked import Done, ppo_cli, start

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
QUICK = ["--config", SMALL_RUN]


def environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "PPO_CLI_DEBUG")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | extra


def anew(*arguments: Any, cwd: Path) -> Done:
    """Run `ppo-cli ARGUMENTS` in a new interpreter, which takes seconds to import."""
    done = subprocess.run(
        [sys.executable, "-m", "ppo_cli", *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,  # far more than it takes, however busy the machine
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two short runs in it."""
    folder = tmp_path_factory.mktemp("home")
    for run, sentiment, steps in ((anew, "positive", 3), (ppo_cli, "negative", 2)):
        done = run(
            "train", "--sentiment", sentiment, "--steps", steps, "--seed", 1, *QUICK, cwd=folder
        )
        assert done.code == 0, done.err
        assert "mean P(" in done.out
    return folder


def test_run_directory_is_as_the_contract_says(home: Path) -> None:
    run = home / "ppo-good"
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "value_head.safetensors",
        "README.md",
        "run.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "training.png",
        "checkpoints",
    }
    assert not [name for name in names if name.startswith(".") or name.endswith(".bin")]
    umask = os.umask(0)
    os.umask(umask)
    for path in run.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(isinstance(value, (int, float)) for row in steps for value in row.values())
    assert (run / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "mean P(POSITIVE)" in (run / "README.md").read_text()


def test_saved_model_loads_as_a_plain_one_without_a_warning(home: Path) -> None:
    code = """
import logging, sys, warnings
warnings.simplefilter("error")
import transformers
records = []
handler = logging.Handler(); handler.emit = lambda r: records.append(r.getMessage())
transformers.utils.logging.get_logger("transformers").addHandler(handler)
transformers.utils.logging.set_verbosity_info()
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert not [r for r in records if "warn" in r.lower() or "UNEXPECTED" in r], records
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "ppo-good"],
        cwd=home,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_compare_as_json(home: Path) -> None:
    done = ppo_cli("compare", "ppo-good", "ppo-bad", "--samples", 6, "--format", "json", cwd=home)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert [m["model"] for m in result["models"]] == ["ppo-good", "ppo-bad", "reference"]
    assert len(result["rows"]) == 6
    for m in result["models"]:
        scores = [
            r["score"]
            for row in result["rows"]
            for r in row["responses"]
            if r["model"] == m["model"]
        ]
        assert sum(scores) / 6 == pytest.approx(m["mean_score"], abs=1e-5)
    gap = result["differences"][0]["difference"]
    expected = result["models"][0]["mean_score"] - result["models"][1]["mean_score"]
    assert gap["mean"] == pytest.approx(expected, abs=1e-5)
    assert gap["low"] <= gap["mean"] <= gap["high"]
    assert result["models"][0]["kl"] > result["models"][-1]["kl"] == 0
    TypeAdapter(Comparison).validate_json(done.out, strict=True)
    again = ppo_cli("compare", "ppo-good", "ppo-bad", "--samples", 6, "--format", "json", cwd=home)
    assert again.out == done.out


def test_compare_prints_its_schema(home: Path) -> None:
    done = ppo_cli("compare", "--schema", cwd=home)
    assert done.code == 0, done.err
    assert {"label", "models", "differences", "rows"} < json.loads(done.out)["properties"].keys()


def test_compare_min_gap_and_files(home: Path) -> None:
    done = ppo_cli(
        "compare", "ppo-good", "ppo-bad", "--samples", 2, "--min-gap", 99, "--html", "page.html",
        "--format", "markdown", "--output", "table.md", cwd=home,
    )  # fmt: skip
    assert done.code == 3, done.err
    assert "less than --min-gap 99" in done.err
    assert done.out == ""
    page = (home / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "://" not in page
    assert "<h2>Training</h2>" in page and "--min-gap 99 --html page.html" in page
    assert (home / "table.md").read_text().startswith("| query | ppo-good | ppo-bad | reference |")


def test_generate_jsonl_from_both_and_standard_input(home: Path) -> None:
    done = ppo_cli(
        "generate", "ppo-good", "ppo-bad", "--prompt", "This movie", "-n", 2, "--format", "jsonl",
        cwd=home,
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["model"] for row in rows] == ["ppo-good"] * 2 + ["ppo-bad"] * 2
    assert set(rows[0]) == {"model", "query", "response", "score", "probability"}
    assert len({row["response"] for row in rows}) > 1
    piped = ppo_cli(
        "generate", "ppo-good", "--prompts", "-", "--no-score", "--format", "text",
        cwd=home, stdin="This film\n\nThe acting\n",
    )  # fmt: skip
    assert [line[:5] for line in piped.out.splitlines()] == ["This ", "The a"]


def test_generate_from_a_plain_folder_without_a_classifier(home: Path) -> None:
    from ppo_cli.data.embedded import policy_folder

    done = anew("generate", policy_folder(), "--format", "text", cwd=home)
    assert done.code == 0, done.err
    assert done.out.startswith("This movie")


def test_tables_without_a_terminal_hold_no_control_codes(home: Path) -> None:
    for arguments in (
        ("stats", "ppo-good", "--objective"),
        ("generate", "ppo-good"),
        ("compare", "ppo-good", "ppo-bad", "--samples", 4, "--best-of-n", "1,2"),
        ("plot", "ppo-good", "--terminal"),
    ):
        done = ppo_cli(*arguments, cwd=home)
        assert done.code == 0, done.err
        assert not CONTROL.search(done.out + done.err)
        assert max(map(len, done.out.splitlines())) <= 80


def test_stats_shows_either_half(home: Path) -> None:
    objective = ppo_cli("stats", "ppo-good", "--objective", cwd=home).out
    other = ppo_cli("stats", "ppo-good", "--no-objective", cwd=home).out
    assert "ppo/loss/total" in objective
    assert "ppo/loss/total" not in other
    assert "ppo/mean_scores" in other
    assert "ppo/mean_scores" not in objective
    first = json.loads(ppo_cli("stats", "ppo-good", "--step", 1, "--json", cwd=home).out)
    assert first["step"] == 1


def test_plot_of_two_runs(home: Path) -> None:
    done = ppo_cli("plot", "ppo-good", "ppo-bad", "--output", "both.svg", cwd=home)
    assert done.out.strip() == "both.svg"
    assert "<svg" in (home / "both.svg").read_text()


def test_json_summary_and_dry_run(tmp_path: Path) -> None:
    # Of the default configuration.
    dry = ppo_cli("train", "--dry-run", "--no-measure", cwd=tmp_path)
    assert dry.code == 0, dry.err
    assert "steps     128 of 128 samples" in dry.out and "\nmeasured  nothing" in dry.out
    assert list(tmp_path.iterdir()) == []
    done = ppo_cli(
        "train", "--steps", 1, "--json", "--quiet", "--output", "out/run", *QUICK, cwd=tmp_path
    )
    summary = json.loads(done.out)
    assert done.err == ""
    assert summary["steps"] == 1
    assert summary["before"].keys() == summary["after"].keys()
    assert summary["before"].keys() >= {"score", "probability", "kl", "perplexity", "distinct_2"}
    assert summary["weights"] == {"step": 1, "why": "best evaluation"}
    assert summary["stopped_early"] is None
    assert (tmp_path / "out" / "run" / "model.safetensors").is_file()


def test_a_signal_leaves_a_usable_run_directory(tmp_path: Path) -> None:
    running = start("train", "--steps", 5000, *QUICK, cwd=tmp_path)
    metrics = tmp_path / "ppo-good" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(running.process.pid or 0, signal.SIGTERM)
    code, _, stderr = running.wait()
    assert code == 128 + signal.SIGTERM, stderr
    assert "Traceback" not in stderr
    assert "--resume" in stderr
    assert (tmp_path / "ppo-good" / "model.safetensors").is_file()
    ended = yaml.safe_load((tmp_path / "ppo-good" / "run.yaml").read_text())["ended"]
    assert (ended["as"], ended["step"]) == ("interrupted", len(metrics.read_bytes().splitlines()))
    assert ppo_cli("stats", "ppo-good", cwd=tmp_path).code == 0


def test_runs_are_listed_and_their_settings_start_another(home: Path, tmp_path: Path) -> None:
    listed = json.loads(ppo_cli("runs", "--json", cwd=home).out)
    states = {run["path"]: (run["state"], run["steps"], run["step"]) for run in listed}
    assert states == {"ppo-bad": ("finished", 2, 2), "ppo-good": ("finished", 3, 3)}
    assert all(run["results"].keys() >= {"score", "kl", "probability"} for run in listed)
    table = ppo_cli("runs", "ppo-good", "ppo-bad", cwd=home).out
    rows = [" ".join(line.split()) for line in table.splitlines()]
    assert "reward.sentiment positive negative" in rows and "run.steps 3 2" in rows

    run = ["train", "--config", home / "ppo-bad/run.yaml", "--steps", 1]
    done = ppo_cli(*run, "--output", "new", cwd=tmp_path)
    assert done.code == 0, done.err
    assert f"settings of the run in {home / 'ppo-bad'} (ppo-cli " in done.err
    was, now = (
        yaml.safe_load((path / "run.yaml").read_text())["config"]
        for path in (home / "ppo-bad", tmp_path / "new")
    )
    assert now == was | {"run": was["run"] | {"steps": 1, "output": "new"}}
    kept = (home / "ppo-bad/metrics.jsonl").read_bytes()
    # Without a name the new run has the default one, not the old run's; with it, it is resumed.
    refused = ppo_cli("train", "--config", "ppo-bad", cwd=home)
    assert refused.code == 2 and "ppo-bad exists" in refused.err
    again = ppo_cli("train", "--config", "ppo-bad", "--resume", "--dry-run", "--json", cwd=home)
    assert again.code == 0 and "going on" not in again.err and json.loads(again.out)["steps"] == 0
    assert (home / "ppo-bad/metrics.jsonl").read_bytes() == kept


def test_output_that_exists_is_kept_and_overwrite_replaces_it(home: Path) -> None:
    before = (home / "ppo-bad" / "metrics.jsonl").read_bytes()
    refused = ppo_cli("train", "--sentiment", "negative", *QUICK, cwd=home)
    assert refused.code == 2
    assert "--resume" in refused.err
    assert "--overwrite" in refused.err
    assert (home / "ppo-bad" / "metrics.jsonl").read_bytes() == before


def test_a_reader_that_leaves_early_is_no_error(home: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m ppo_cli config --schema | head -1",
        shell=True,
        cwd=home,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_config_prints_what_it_reads(tmp_path: Path) -> None:
    listed = ppo_cli("config", cwd=tmp_path).out
    assert "tiny (default)" in listed
    assert "gpt2-imdb" in listed
    resolved = ppo_cli("config", "gpt2-imdb", cwd=tmp_path).out
    (tmp_path / "copy.yaml").write_text(resolved)
    assert ppo_cli("config", "copy.yaml", cwd=tmp_path).out == resolved
    schema = json.loads(ppo_cli("config", "--schema", cwd=tmp_path).out)
    assert schema["properties"].keys() >= {"policy", "prompts", "rollout", "reward", "ppo", "run"}


def test_untrusted_text_is_shown_not_interpreted(home: Path) -> None:
    done = ppo_cli("generate", "ppo-good", "--prompt", "[red]\x1b[31mThis\u202e movie", cwd=home)
    assert done.code == 0, done.err
    assert "\x1b" not in done.out
    assert "\u202e" not in done.out
    assert "[red]" in done.out.replace("\n", "")


def test_an_adapter_trains_and_the_run_directory_holds_what_is_asked_for(tmp_path: Path) -> None:
    done = ppo_cli(
        "train", "--steps", 2, "--quiet", "--set", "policy.adapter.r=4",
        "--set", "ppo.learning_rate=0.01", *QUICK, cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    names = set(load_file(tmp_path / "ppo-good" / "model.safetensors"))
    assert "transformer.wte.weight" in names
    assert not [name for name in names if "lora" in name]
    assert (tmp_path / "ppo-good" / "adapter" / "adapter_model.safetensors").is_file()
    texts = []
    for change in ([], ["--resume", "--quiet", "--set", "policy.adapter.save=adapter"]):
        if change:  # of a run that has ended: its model is written anew
            done = ppo_cli("train", "--output", "ppo-good", *change, cwd=tmp_path)
            assert done.code == 0, done.err
            assert not (tmp_path / "ppo-good" / "model.safetensors").exists()
        scored = ppo_cli("generate", "ppo-good", "--format", "jsonl", "-n", 1, cwd=tmp_path)
        assert scored.code == 0, scored.err
        texts.append(scored.out)
    assert texts[0] == texts[1]
    done = ppo_cli("export", "ppo-good", "whole", cwd=tmp_path)
    assert (done.code, done.out) == (0, "")
    assert "AutoModelForCausalLM.from_pretrained('whole')" in done.err
    assert set(load_file(tmp_path / "whole" / "model.safetensors")) == names


def test_numbers_that_stop_being_finite_end_the_run_with_advice(tmp_path: Path) -> None:
    done = ppo_cli(
        "train", "--steps", 3, "--quiet", "--set", "ppo.learning_rate=1e8",
        "--set", "ppo.max_grad_norm=null", *QUICK, cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 1
    assert "finite" in done.err
    assert "ppo.learning_rate" in done.err
    assert "Traceback" not in done.err


def test_sampling_that_is_not_pure_is_warned_of(tmp_path: Path) -> None:
    done = ppo_cli(
        "train", "--dry-run", "--no-measure", "--set", "rollout.top_k=5", *QUICK, cwd=tmp_path
    )
    assert done.code == 0
    assert "warning: with rollout.top_k=5" in done.err


def test_a_run_has_no_fewer_steps_than_it_made(home: Path) -> None:
    fewer = ppo_cli("train", "--output", "ppo-good", "--resume", "--steps", 1, cwd=home)
    assert fewer.code == 2
    assert "3 steps already" in fewer.err


# ---------------------------------------------------------------- fast paths


def plain() -> None:
    os.environ[VARIABLE] = "off"


def fast() -> None:
    os.environ.pop(VARIABLE, None)


def mistyped() -> None:
    os.environ[VARIABLE] = "-pakcing"


def test_a_run_without_fast_paths_says_so_and_goes_on_with_them(tmp_path: Path) -> None:
    off = "--set", "policy.kernels=off"
    done = ppo_cli("train", *QUICK, *off, "--steps", 1, cwd=tmp_path, fault=fast)
    assert done.code == 0, done.err
    run = tmp_path / "ppo-good"
    record = yaml.safe_load((run / "run.yaml").read_text())["kernels"]
    assert record == dict.fromkeys(PATHS, "switched off (policy.kernels: off)")
    done = ppo_cli("generate", run, "-n", 2, "--format", "jsonl", cwd=tmp_path, fault=plain)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 2
    on = "--set", "policy.kernels=auto"
    done = ppo_cli("train", "--resume", *on, "--steps", 2, cwd=tmp_path, fault=fast)
    assert done.code == 0, done.err
    assert 'resuming with changed settings: policy.kernels "off" -> "auto"' in done.err
    assert "fast paths none (now lm_head, " in done.err
    record = yaml.safe_load((run / "run.yaml").read_text())["kernels"]
    assert record["lm_head"] == record["decode_loop"] == "used"
    assert record["cuda_graph"] == "needs a CUDA GPU"


def test_a_dry_run_says_which_fast_paths_are_taken_and_why_not(tmp_path: Path) -> None:
    done = ppo_cli("train", *QUICK, "--dry-run", "--no-measure", cwd=tmp_path, fault=fast)
    assert "\nfast paths: lm_head, " in done.err
    assert "\n  not cuda_graph: needs a CUDA GPU\n" in done.err
    done = ppo_cli("train", *QUICK, "--dry-run", "--no-measure", cwd=tmp_path, fault=plain)
    paths = ", ".join(PATHS)
    assert f"\nfast paths: none\n  not {paths}: switched off (PPO_CLI_KERNELS: off)\n" in done.err
    done = ppo_cli("train", *QUICK, "--dry-run", "--no-measure", cwd=tmp_path, fault=mistyped)
    assert done.code == 2
    expected = "PPO_CLI_KERNELS: there is no fast path 'pakcing'. Did you mean 'packing'?"
    assert done.err == f"error: {expected}\n"
