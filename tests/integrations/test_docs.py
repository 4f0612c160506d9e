"""The pages: their Python compiles and, where TRL is installed, runs; their tables name what the code has."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

import spo_kernels
from spo_kernels.integrations import core

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TRL_PAGE = ROOT / "docs/trl.md"
HUB_MODEL, HUB_DATASET = "Qwen/Qwen3-0.6B", "trl-lib/ultrafeedback_binarized"

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL")


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def table(page: Path, heading: str) -> list[list[str]]:
    """Cells of the rows of the first table below a heading."""
    section = page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert set("".join(rows[1])) == {"-"}
    return rows[2:]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_compiles(page: Path) -> None:
    for block in python_blocks(page):
        compile(block, str(page), "exec")


def test_the_reference_has_every_public_name() -> None:
    pages = "\n".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    listed = {name for members in re.findall(r"members: \[(.*)\]", pages) for name in members.split(", ")}
    listed |= set(re.findall(r"^ +- (\w+)$", pages, flags=re.MULTILINE))
    listed |= {path.rpartition(".")[2] for path in re.findall(r"^::: ([\w.]+)$", pages, flags=re.MULTILINE)}
    assert listed >= {*spo_kernels.__all__, *core.__all__} - {"backends"}
    # "core" has the names of the modules beside it.
    adapters = {path.stem for path in (ROOT / "spo_kernels/integrations").glob("*.py")} - {"__init__"}
    assert listed >= adapters


def run(page: Path, blocks: list[str], replaced: dict[str, str]) -> dict[str, Any]:
    """Runs blocks in order in one namespace. Each text to be replaced must occur."""
    code = "\n".join(blocks)
    for text, other in replaced.items():
        assert text in code, f"{page.name} has no {text!r}"
        code = code.replace(text, other)
    namespace: dict[str, Any] = {}
    exec(compile(code, str(page), "exec"), namespace)
    return namespace


def test_install_page_runs() -> None:
    page = ROOT / "docs/install.md"
    run(page, python_blocks(page), {})


def test_migration_page_prints_what_it_says() -> None:
    page = ROOT / "docs/migration.md"
    code = python_blocks(page)
    names = run(page, code, {})
    printed = re.findall(r"^print\((\w+)\)  # (.+)$", "\n".join(code), flags=re.MULTILINE)
    assert {name for name, _ in printed} == {"plain", "centered"}
    for name, numbers in printed:
        assert names[name].tolist() == pytest.approx([float(number) for number in numbers.split(", ")], abs=0.005)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What stands in for the hub's model and dataset, and for settings that would take long or need a GPU."""
    import datasets
    from tiny_models import make_model, make_rows, make_tokenizer

    def messages(row: dict[str, str], answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[answer]}]

    rows = [{answer: messages(row, answer) for answer in ("chosen", "rejected")} for row in make_rows(16)]

    def load_dataset(name: str, split: str) -> Any:
        assert (name, split) == (HUB_DATASET, "train")
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content }} </s>{% endfor %}"
        "{% if add_generation_prompt %}<s> {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    make_model().save_pretrained(tmp_path / "model")
    settings = "use_cpu=True, report_to=[], max_steps=2, kl_max_new_tokens=8"
    return {f'"{HUB_MODEL}"': repr(str(tmp_path / "model")), 'output_dir="': f'{settings}, output_dir="{tmp_path}/'}


@needs_trl
def test_the_readme_begins_with_what_a_user_of_trl_needs(hub: dict[str, str]) -> None:
    readme = ROOT / "README.md"
    assert run(readme, python_blocks(readme)[:1], hub)["trainer"].state.global_step == 2


@needs_trl
def test_trl_page_runs(hub: dict[str, str]) -> None:
    names = run(TRL_PAGE, python_blocks(TRL_PAGE), hub)
    assert names["trainer"].state.global_step == 2
    assert names["trainer"].model.peft_config, "the last trainer is that of LoRA"


@needs_trl
def test_the_tables_of_fields_are_those_of_the_configuration() -> None:
    from trl import DPOConfig

    from spo_kernels.integrations.trl import SPOConfig

    dpo = {field.name: field.default for field in dataclasses.fields(DPOConfig)}
    own = {
        field.name: field.default
        for field in dataclasses.fields(SPOConfig)
        if field.name not in dpo or field.default != dpo[field.name]
    }
    rows = table(TRL_PAGE, "Fields") + table(TRL_PAGE, "vLLM")
    documented = {quoted(name)[0]: ast.literal_eval(quoted(default)[0]) for name, default, _ in rows}
    assert len(documented) == len(rows)
    assert documented == own


@needs_trl
def test_the_table_of_metrics_is_what_a_run_logs(hub: dict[str, str]) -> None:
    all_of_them = 'weighting="soft", head="eager", log_reference_rewards=True, logging_steps=1,'
    trainer = run(TRL_PAGE, python_blocks(TRL_PAGE)[:1], hub | {"logging_steps=10,": all_of_them})["trainer"]
    of_the_trainer = {"epoch", "grad_norm", "learning_rate", "step", "num_input_tokens_seen"}
    logged = set(trainer.state.log_history[0]) - of_the_trainer
    documented = [name for cells in table(TRL_PAGE, "Metrics") for name in quoted(cells[0])]
    assert sorted(documented) == sorted(logged)
