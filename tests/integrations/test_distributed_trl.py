"""`SPOTrainer` over several processes, with DDP and FSDP2, equals one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL, see the extra [trl]")
pytest.importorskip("peft", reason="needs PEFT, see the extra [trl]")

import sharded
import trainer_runs
from processes import Processes
from tiny_models import save_model
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

pytestmark = [pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")]
SUPPORT = Path(trainer_runs.__file__).parent
EXAMPLES = SUPPORT.parents[1] / "examples"


def check(result: Any, truth: dict[str, Any], tolerance: float) -> None:
    """Gradients and metrics of each step, and of an evaluation, relative, weights absolute."""
    if isinstance(result, BaseException):
        raise result
    for ours, theirs in zip(result["gradients"], truth["gradients"], strict=True):
        assert sharded.distance(ours, theirs) < tolerance
    for ours, theirs in zip(result["metrics"], truth["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    for name, weight in truth["weights"].items():
        assert (result["weights"][name] - weight).abs().max() < tolerance


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(root / name, name) for name in ("llama", "qwen2", "gemma2")}


def launch(*arguments: str) -> str:
    """The output of two processes that ``accelerate launch`` starts."""
    path = os.pathsep.join([str(SUPPORT), str(EXAMPLES), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout


def test_the_example_of_fsdp2_and_its_configuration() -> None:
    script = str(EXAMPLES / "accelerate_fsdp2.py")
    output = launch("--config_file", str(EXAMPLES / "accelerate_fsdp2.yaml"), script, "--steps", "9")
    assert "FSDP2 sharded both models over 2 processes" in output


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of two processes that ``accelerate launch`` starts, on CPUs as on GPUs."""
    folder = tmp_path_factory.mktemp("ddp")
    save_model(folder / "model", "llama")
    options = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch(*options, str(SUPPORT / "trainer_runs.py"), str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_a_loop_with_accelerate_and_ddp(launched: list[dict[str, Any]]) -> None:
    truth = trainer_runs.loop()
    for result in launched:
        check(result["loop"], truth, 1e-6)


@pytest.mark.parametrize("name", trainer_runs.LAUNCHED)
def test_trainer_with_ddp(
    launched: list[dict[str, Any]], name: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    trainer, truth = trainer_runs.train(model_folders["llama"], tmp_path, **trainer_runs.LAUNCHED[name])
    truth["metrics"].append(trainer_runs.evaluated(trainer))
    for result in launched:
        check(result[name], truth, 1e-6)


def fsdp2(group: ProcessGroup, model: str, out: str, lora: bool, settings: dict[str, Any]) -> dict[str, Any]:
    from accelerate_fsdp2 import fsdp2_on_cpus

    sharded.use_pool_in_accelerate(group.rank(), group.size())
    with fsdp2_on_cpus():
        trainer, result = trainer_runs.train(Path(model), Path(out), lora=lora, **settings)
    for policy_or_reference in (trainer.model, trainer.ref_model):
        if policy_or_reference is not None:
            assert all(isinstance(parameter, DTensor) for parameter in policy_or_reference.parameters())
    result["metrics"].append(trainer_runs.evaluated(trainer))
    return result


@pytest.mark.parametrize(
    ("architecture", "lora", "settings"),
    [
        ("llama", False, {}),
        ("qwen2", False, {"log_reference_rewards": True}),
        ("gemma2", False, {"head": "logits"}),
        ("llama", True, {}),
    ],
    ids=["llama", "tied", "logits", "lora"],
)
def test_trainer_with_fsdp2(
    processes: Processes,
    model_folders: dict[str, Path],
    architecture: str,
    lora: bool,
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    folder = model_folders[architecture]
    trainer, truth = trainer_runs.train(folder, tmp_path / "one", lora=lora, **settings)
    truth["metrics"].append(trainer_runs.evaluated(trainer))
    for result in processes.run(len(processes), fsdp2, str(folder), str(tmp_path / "two"), lora, settings):
        check(result, truth, 1e-5)


def resumed_with_fsdp2(group: ProcessGroup, model: str, out: str) -> list[dict[str, Any]]:
    """A run of two steps, and its second step again, from the checkpoint of the first."""
    from accelerate_fsdp2 import fsdp2_on_cpus

    sharded.use_pool_in_accelerate(group.rank(), group.size())
    settings = {"optim": "adamw_torch", "kl_every": 2, "importance_normalizer": "ema"}
    with fsdp2_on_cpus():
        saves = {"save_strategy": "steps", "save_steps": 1}
        first = trainer_runs.train(Path(model), Path(out), **settings, **saves)[1]
        checkpoint = Path(out) / "checkpoint-1"
        return [first, trainer_runs.train(Path(model), Path(out) / "again", resume=checkpoint, **settings)[1]]


def test_resume_with_fsdp2_has_the_same_bits(
    two_processes: Processes, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    for result in two_processes.run(2, resumed_with_fsdp2, str(model_folders["llama"]), str(tmp_path)):
        if isinstance(result, BaseException):
            raise result
        unbroken, resumed = result
        assert resumed["metrics"][-1] == unbroken["metrics"][-1]
        assert all(torch.equal(resumed["weights"][name], weight) for name, weight in unbroken["weights"].items())
