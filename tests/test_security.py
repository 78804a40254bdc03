"""Nobody let in: no code, pickles or markup of others, no writing elsewhere, no secrets kept."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import regex
import torch
from peft import LoraConfig
from rich.console import Console
from transformers import modeling_utils
from transformers.integrations import hub_kernels

from ppo_cli.config.loading import load_config
from ppo_cli.config.schema import PolicyConfig
from ppo_cli.data.embedded import classifier_folder, policy_folder
from ppo_cli.errors import ConfigError, ModelError, UsageError
from ppo_cli.evaluation.best_of_n import best_of_n, share
from ppo_cli.evaluation.comparison_result import (
    Comparison,
    ModelResult,
    ScoredSamples,
    most_changed,
    paired_difference,
    rows_of,
)
from ppo_cli.evaluation.quality import Likelihoods, Quality
from ppo_cli.evaluation.samples import Generated, Sample
from ppo_cli.models.loading import load_policy, load_tokenizer
from ppo_cli.models.model_card import trainer_card
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.reporting import comparison_tables, tables
from ppo_cli.reporting.comparison_page import comparison_html
from ppo_cli.reporting.plots import plot_training
from ppo_cli.reporting.terminal_chart import terminal_chart
from ppo_cli.rewards.sentiment import SentimentReward
from ppo_cli.utils.files import refuse_special, write_text
from ppo_cli.utils.text import (
    escape_controls,
    json_text,
    markdown_code,
    markdown_text,
    spreadsheet_text,
)
from tests.conftest import make_gpt2, make_tokenizer
from tests.forked import ppo_cli
from tests.test_bad_input import run_here  # noqa: F401
from tests.test_cli import QUICK
from tests.test_structure import modules

EVIL = (
    "[red]\x1b[31m\x9b1m\u202e\u200b<script>alert(1)</script>|`x`**b** =1+1 \ud800 $a$ "
    "http://x.yz\n# h"
)
SEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\ud800-\udfff]")


def calls(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_no_pickle_is_written_and_none_read_with_code() -> None:
    between_processes = modules()["utils.processes"]  # of one run; no file is read or written
    for path in modules().values():
        names = set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
        if path != between_processes:
            assert not names & {"pickle", "marshal", "shelve", "dill", "joblib"}, path
        for call in calls(path):
            name = ast.unparse(call.func)
            assert name not in ("torch.save", "np.save", "np.savez", "yaml.load", "eval", "exec"), (
                path
            )
            if name == "torch.load":
                assert "weights_only=True" in ast.unparse(call)
            if name == "np.load":
                assert "allow_pickle" not in ast.unparse(call)


class Evil:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("where", ["policy", "value head", "classifier"])
def test_a_pickle_in_a_model_folder_is_not_run(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_gpt2().save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    state = torch.nn.Module.state_dict(make_gpt2())
    if where != "value head":
        Path("model/model.safetensors").unlink()
    if where == "classifier":
        config = json.loads(Path("model/config.json").read_text())
        config["architectures"] = ["GPT2ForSequenceClassification"]
        Path("model/config.json").write_text(json.dumps(config))
    torch.save({**state, "v_head.summary.weight": Evil()}, "model/pytorch_model.bin")
    if where == "value head":  # which is found among the weights of a folder that TRL wrote
        AutoModelForCausalLMWithValueHead.from_pretrained("model")
    else:
        load = AutoModelForCausalLMWithValueHead.from_pretrained
        with pytest.raises(ModelError, match="cannot be loaded"):
            (SentimentReward if where == "classifier" else load)("model")
    assert not Path("unpickled").exists()


OWN_CODE = """
import pathlib
from transformers import GPT2Config, GPT2LMHeadModel
pathlib.Path("executed").write_text("")
class OwnConfig(GPT2Config):
    model_type = "own"
class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig
"""


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    make_gpt2().save_pretrained("own")
    make_tokenizer().save_pretrained("own")
    config = json.loads(Path("own/config.json").read_text())
    config |= {
        "model_type": "own", "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"},
    }  # fmt: skip
    Path("own/config.json").write_text(json.dumps(config))
    Path("own/code.py").write_text(OWN_CODE)
    return "own"


def test_code_of_a_model_runs_only_where_it_is_named(
    own_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 5))  # transformers would ask
    for trusted in ((), ("other",), ("./own",)):
        load_tokenizer(own_model, trusted=trusted)  # which needs none
        with pytest.raises(ModelError, match="--trust-remote-code own"):
            load_policy(PolicyConfig(model=own_model), trusted=trusted)
        with pytest.raises(ModelError, match="--trust-remote-code own"):
            AutoModelForCausalLMWithValueHead.from_pretrained(own_model)
        with pytest.raises(ModelError, match="--trust-remote-code own"):
            SentimentReward(own_model)
    assert not Path("executed").exists()
    assert sys.stdin.read() == "y\n" * 5
    policy = load_policy(PolicyConfig(model=own_model), trusted=[own_model])
    assert type(policy.pretrained_model).__name__ == "OwnModel"
    assert Path("executed").exists()


def with_kernel(folder: Path, name: str, *keys: str) -> str:
    """A copy of a model whose configuration names code of the hub."""
    config = json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, name)
    Path(name, "config.json").write_text(
        json.dumps(config | {"attn_implementation": "evil/kernel"})
    )
    return name


@pytest.mark.parametrize(
    "keys",
    [
        ["attn_implementation"],
        ["_attn_implementation"],
        ["attn_implementation", "_attn_implementation"],
    ],
)
def test_code_that_a_configuration_names_elsewhere_needs_the_same_consent(
    keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []
    monkeypatch.setattr(hub_kernels, "load_and_register_attn_kernel", asked.append)
    monkeypatch.setattr(
        modeling_utils, "lazy_import_flash_attention", lambda *a, **k: asked.append(k)
    )
    policy = with_kernel(policy_folder(), "policy", *keys)
    judge = with_kernel(classifier_folder(), "judge", *keys)
    plain = load_policy(PolicyConfig(model=str(policy_folder())))
    ids = torch.arange(5).unsqueeze(0)
    with pytest.warns(UserWarning, match=r"'evil/kernel' .* --trust-remote-code policy"):
        loaded = load_policy(PolicyConfig(model=policy))
    assert torch.equal(loaded(ids)[0], plain(ids)[0])
    with pytest.warns(UserWarning, match=r"'evil/kernel' .* --trust-remote-code judge"):
        SentimentReward(judge)
    adapter = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    base = AutoModelForCausalLMWithValueHead.from_pretrained(policy_folder(), peft_config=adapter)
    base.save_pretrained("adapter")
    about = json.loads(Path("adapter/adapter_config.json").read_text())
    about |= {"base_model_name_or_path": policy, "task_type": "CAUSAL_LM"}
    Path("adapter/adapter_config.json").write_text(json.dumps(about))
    with pytest.warns(UserWarning, match="'evil/kernel'"):
        load_policy(PolicyConfig(model="adapter"), trusted=["adapter"])
    about |= {"megatron_config": {"x": 1}, "megatron_core": "evil"}
    Path("adapter/adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(ModelError, match="megatron_core"):
        load_policy(PolicyConfig(model="adapter"), trusted=["adapter"])
    assert asked == []
    with pytest.raises(ModelError):  # the stand-in registers no such attention
        load_policy(PolicyConfig(model=policy), trusted=[policy])
    assert asked and {"allow_all_kernels": False} not in asked


def test_without_the_package_that_fetches_kernels_none_is_told_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    policy = with_kernel(policy_folder(), "policy", "attn_implementation")
    with pytest.raises(ModelError, match="asks for code") as caught:
        load_policy(PolicyConfig(model=policy), trusted=[policy])
    assert "pip install" not in str(caught.value)


SECRETS = [
    "hf_" + "a" * 30, "ghp_" + "b" * 36, "gho_" + "b" * 36, "github_pat_" + "c_1" * 10,
    "sk-" + "d" * 40, "sk-proj-" + "e" * 30, "AKIA" + "F" * 16, "xoxb-12345-67890-abcdef",
    "glpat-" + "g" * 20, "eyJhbGciOiJI.eyJzdWIiOiIx.c2ln", "https://me:word@host/x",
    "Bearer abcdefghijklmnop123", "-----BEGIN RSA PRIVATE KEY-----",
]  # fmt: skip
SECRET_NAMES = """
password passwd pwd passphrase secret client_secret token hf_token HF_TOKEN slack-token apiKey
api-key API_KEY X-Api-Key access_key aws_secret_access_key private_key auth authorization bearer
credentials password2
"""
HARMLESS_NAMES = """
pad_token eos_token max_tokens max_new_tokens num_tokens token_type_ids tokenizer pad_token_id
special_token key keys monkey author passes tags entity secretary image_token
"""


@pytest.mark.parametrize("form", ["{S}", "[a, ['{S}']]", "{{a: [{{b: '{S}'}}]}}", "{{'{S}': 1}}"])
def test_secrets_are_known_by_their_shape_wherever_they_stand(form: str) -> None:
    for secret in SECRETS:
        value = "{x: " + form.format(S=secret) + "}" if form != "{S}" else "{x: '" + secret + "'}"
        with pytest.raises(ConfigError, match="password or token") as caught:
            load_config("tiny", assignments=[f"ppo.tracker_kwargs={value}"])
        assert secret not in str(caught.value)


def test_secrets_are_known_by_their_names() -> None:
    for name in SECRET_NAMES.split():
        for value in ("x", 12345, {"inner": "x"}, ["x"]):
            setting = f"ppo.tracker_kwargs={json.dumps({'wandb': [{name: value}]})}"
            with pytest.raises(ConfigError, match="password or token"):
                load_config("tiny", assignments=[setting])
        for value in ("", None, False):  # none is given
            load_config("tiny", assignments=[f"ppo.tracker_kwargs={json.dumps({name: value})}"])
    for name in HARMLESS_NAMES.split():
        load_config("tiny", assignments=[f"ppo.tracker_kwargs={json.dumps({name: 'x', 'n': 5})}"])
    commit = "0123456789abcdef0123456789abcdef01234567"
    load_config("tiny", assignments=[f"policy.revision={commit}"])
    with pytest.raises(ConfigError, match="password or token"):
        load_config("tiny", assignments=[f"ppo.tracker_kwargs={{wandb: {{key: {commit}}}}}"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["config", "tiny", "--set", "policy.token={S}"],
        ["config", "tiny", "--set", "nosuch.key={S}"],
        ["config", "tiny", "--set", "{S}"],
        ["config", "tiny", "--set", "{S}.x=1"],
        ["config", "tiny", "--set", "ppo.gamma={S}"],
        ["config", "tiny", "--set", "policy.model=[{S}]"],
        ["config", "tiny", "--set", "ppo.tracker_kwargs={{a: '{S}'"],
        ["config", "{S}"],
        ["config", "tiny", "--{S}"],
        ["{S}"],
        ["train", "--device", "{S}"],
        ["stats", "{S}"],
        ["generate", "{S}", "--no-score"],
    ],
)
def test_no_message_repeats_a_secret(
    arguments: list[str],
    tmp_path: Path,
    run_here: Callable[..., tuple[int, str, str]],  # noqa: F811
) -> None:
    for secret in SECRETS[:3]:
        code, stdout, stderr = run_here([a.format(S=secret) for a in arguments], tmp_path)
        assert code in (1, 2) and "error: " in stderr
        assert secret not in stdout + stderr


@pytest.mark.parametrize(
    "setting",
    [
        "policy.password=opensesame", "policy={password: opensesame}",
        "policy.model={pwd: opensesame}", "ppo.tracker_kwargs={wandb: {api_key: opensesame",
        "ppo.tracker_kwargs={passwd: [opensesame]}", "password=opensesame",
        "run.steps={auth: opensesame}", "run.x.secret=opensesame",
    ],
)  # fmt: skip
def test_no_message_repeats_what_stands_under_a_secrets_name(setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", assignments=[setting])
    assert "opensesame" not in str(caught.value)


SAMPLES = [Sample(EVIL, EVIL, 1.0, 0.5), Sample("=1", "+2", 1.0, 0.5)]


def evil_comparison() -> Comparison:
    read = Likelihoods(*np.ones((4, 2)))
    worse = [Sample(EVIL, EVIL, score, 0.5) for score in (0.0, 2.0)]
    models = [ScoredSamples(EVIL, SAMPLES, read, True), ScoredSamples(EVIL, worse, read, True)]
    drawn = np.arange(4.0).reshape(2, 2)
    return Comparison(
        label=EVIL,
        output="logit",
        classifier=EVIL,
        seed=0,
        reference=EVIL,
        max_new_tokens=2,
        models=[ModelResult.of(model) for model in models],
        differences=[paired_difference(*models, is_reference=True)],
        changes=most_changed(*models, 2),
        best_of_n=best_of_n(drawn, [2], label=EVIL, seed=0),
        shares=[share(EVIL, models[0].scores, models[0].kl, drawn, [2])],
        rows=rows_of(models),
        terms=[],
    )


def shown(renderables: list[object]) -> str:
    console = Console(file=io.StringIO(), width=400, color_system=None, markup=False, emoji=False)
    for item in renderables:
        console.print(item)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tables_show_text_as_it_is() -> None:
    comparison = evil_comparison()
    judged = Quality.of(SAMPLES, Likelihoods(*np.ones((4, 2))))
    summary = SimpleNamespace(
        run=EVIL,
        label=EVIL,
        weights=EVIL,
        before=judged,
        after=judged,
        after_samples=SAMPLES,
    )
    for text in (
        shown(list(comparison_tables.comparison_tables(comparison, 2))),
        shown([tables.generated_texts([Generated(EVIL, SAMPLES)], True)]),
        shown([tables.summary_table(summary)]),  # type: ignore[arg-type]
        shown(tables.statistics_tables({"h": [(EVIL, 1.0, "m")]}, EVIL)),
        "\n".join(line.plain for line in terminal_chart({EVIL: [{"step": 1, EVIL: 1.0}]}, EVIL)),
    ):
        assert not SEEN.search(text)
        assert "[red]" in text
        assert "\\x1b[31m" in text


def test_html_markdown_and_csv_show_text_as_it_is() -> None:
    comparison = evil_comparison()
    page = comparison_html(comparison)
    assert not SEEN.search(page)
    assert page.count("<script") == 1  # its own, the one that the policy allows by its hash
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in page and "script-src 'sha256-" in page
    table = comparison_tables.comparison_markdown(comparison)
    assert not SEEN.search(table)
    assert not re.search(r"<|(?<!\\)[`*\[$]|://|^# ", table, re.MULTILINE)
    for row in csv.reader(io.StringIO(comparison_tables.comparison_csv(comparison))):
        assert not SEEN.search("".join(row))
        assert not [cell for cell in row if cell.startswith(tuple("=+-@\t\r"))]


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@x", " =1", "\t=1", "\n@x", "＝1"])
def test_no_cell_is_a_formula(text: str) -> None:
    assert spreadsheet_text(text).startswith("'")
    assert spreadsheet_text("a" + text).startswith("a")


def test_every_character_that_is_not_seen_is_escaped() -> None:
    unseen = regex.compile(r"[\p{Default_Ignorable_Code_Point}\u2800[\p{C}--\p{Cn}]]", regex.V1)
    for code in range(0x110000):
        character = chr(code)
        if unseen.match(character) and character != "\n":
            assert character not in escape_controls(f"a{character}b"), f"U+{code:04X}"
    for joined in (
        "é",
        "👩",
        "می",
        "日",
        "क",
    ):  # nothing is told by runs of what belongs there once
        for run in ("\u200d" * 5, "\u200c\u200d", "\ufe0f" * 5, "\U000e0101" * 2):
            assert escape_controls(f"{joined}{run}b").count("\\") >= len(run) - 1


@pytest.mark.parametrize(
    "text",
    [
        "👩‍👩‍👧", "🧑🏻‍❤️‍💋‍🧑🏿", "🏳️‍🌈", "👁️‍🗨️", "☺︎ ©️ 1️⃣ #⃣", "🇩🇪 👍🏽", "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "می‌خواهم", "شه‍", "क्‍ष", "श्री‌मान", "ශ්‍රී", "葛󠄀城", "ᠠ᠊ᠨ᠋ᠠ",
        "שלום", "naïve 日本語", "한국어", "ไทย", "a\u00a0b\u3000c",
    ],
)  # fmt: skip
def test_writing_of_the_world_is_left_alone(text: str) -> None:
    assert escape_controls(text) == text
    assert json.loads(json_text(text)) == text
    assert escape_controls("a\u200db\u200cc") == "a\\u200db\\u200cc"


def test_json_reads_back_the_same() -> None:
    text = json_text({"x": EVIL, "tag": "\U000e0041"}, indent=2)
    assert json.loads(text) == {"x": EVIL, "tag": "\U000e0041"}
    assert not SEEN.search(text)
    assert "\U000e0041" not in text


def test_cards_show_names_as_text() -> None:
    card = trainer_card(EVIL, 'x"\n```\n<b>', SimpleNamespace(model_name=EVIL))
    assert not SEEN.search(card)
    assert "<script>" not in card
    assert len(re.findall("^```", card, re.MULTILINE)) == 4
    assert markdown_code("gpt2") == "`gpt2`"
    assert "`x`" not in markdown_code("a`x`|").replace("\\`", "")
    assert "www." not in markdown_text("www.x.yz")


def test_names_in_plots_are_text(tmp_path: Path) -> None:
    runs = {name: [{"step": 1, "a$b\\frac$": 1.0}] for name in ("$x$\\frac{", "_hidden", "b\x1b")}
    plot_training(runs, tmp_path / "x.svg", ["a$b\\frac$"])
    assert not SEEN.search((tmp_path / "x.svg").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["x.svg"]


def test_writing_follows_no_link(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("kept")
    (tmp_path / ".file.tmp").symlink_to(other)
    (tmp_path / "file").symlink_to(other)
    write_text(tmp_path / "file", "new")
    assert other.read_text() == "kept"
    assert (tmp_path / "file").read_text() == "new"
    (tmp_path / "file").unlink()
    for special in ("link", "pipe"):
        (tmp_path / "link").symlink_to("nowhere") if special == "link" else os.mkfifo(
            tmp_path / special
        )
        with pytest.raises(UsageError, match=r"is a (link|device)"):
            refuse_special(tmp_path / special)


def careful(secrets: dict[str, str]) -> None:
    """A process whose user lets no others read, and has secrets in the environment."""
    os.umask(0o027)
    os.environ |= secrets


def test_a_run_keeps_the_umask_no_secret_and_shows_its_names_as_text(tmp_path: Path) -> None:
    name = "[red]`x`|<b>$y$\u202e=1"
    secrets = {"HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz", "WANDB_API_KEY": "wandbsecret"}
    done = ppo_cli(
        "train", "--steps", 1, "--output", name, *QUICK, cwd=tmp_path,
        fault=partial(careful, secrets),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert not SEEN.search(done.out + done.err)
    assert f"ppo-cli plot '{name.partition(chr(0x202E))[0]}\\u202e=1'" in done.err
    files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert path.stat().st_mode & 0o777 == 0o640, path
        assert not [secret for secret in secrets.values() if secret.encode() in content], path
        assert path.suffix not in (".bin", ".pt", ".pth", ".pkl")
        if path.suffix in (".md", ".yaml", ".jsonl"):
            assert not SEEN.search(content.decode()), path
    assert "<b>" not in (tmp_path / name / "README.md").read_text().partition("```")[0]
