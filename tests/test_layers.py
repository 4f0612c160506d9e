"""Imports point down only: a module imports modules of lower layers (`LAYERS`, `LOWER`), and spo_train public names."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import spo_kernels


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed"
    assert spec.submodule_search_locations, f"{name} is not a package"
    return Path(next(iter(spec.submodule_search_locations)))


def modules(package: str) -> dict[str, Path]:
    """Dotted names of a package's modules with their files."""
    folder = package_folder(package)
    files = {
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)): path for path in folder.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def imports(module: str, path: Path) -> Iterator[str]:
    """Every dotted name a file imports, wherever in the file; ``from a import b`` gives ``a.b``."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join((*up, *([node.module] if node.module else [])))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


KERNELS = modules("spo_kernels")
LAYERS = [  # a module may import the modules of its package that stand before it
    "precision",
    "checks",
    "huggingface",
    "op_library",
    "reference",
    "row_transforms",
    "row_ops",
    "sequences",
    "logit_options",
    "divergences",
    "shards",
    "distributed",
    "losses",
    "ranking",
    "linear.records",
    "linear.checks",
    "linear.tiles",
    "linear.loops",
    "linear.ops",
    "linear.functional",
    "linear",
    "functional",
    "cringe",
    "modules",
]
# What `spo_kernels.integrations` holds uses public names, and what stands before it here.
INTEGRATIONS = [
    "context",
    "head",
    "rows",
    "sampling",
    "buffer",
    "step",
    "core",
    "trl.config",
    "trl.sampler",
    "trl.checks",
    "trl.trainer",
    "trl",
]
INTEGRATIONS += ["hf", "pair_loss", "llamafactory", "nemo_rl", "openrlhf", "torchtune"]
# `backends` registers backends for the row ops, so it is above them. A single backend imports the oracle and the dtypes
# at most.
LOWER = {
    f"spo_kernels.{name}": tuple(f"spo_kernels.{lower}" for lower in LAYERS[:i]) for i, name in enumerate(LAYERS)
} | {
    "spo_kernels.backends.cpu": ("spo_kernels._control", "spo_kernels.reference"),
    "spo_kernels.backends.mixtures": ("spo_kernels.backends", "spo_kernels.reference"),
    "spo_kernels.backends.cuda": ("spo_kernels.backends.mixtures", "spo_kernels.reference"),
    "spo_kernels.backends.triton_kernels": ("spo_kernels.reference",),
    "spo_kernels.backends.triton": (
        "spo_kernels.backends.mixtures",
        "spo_kernels.backends.triton_kernels",
        "spo_kernels.precision",
        "spo_kernels.reference",
    ),
    "spo_kernels.backends": ("spo_kernels.backends", "spo_kernels.reference", "spo_kernels.row_ops"),
    "spo_kernels.integrations": (),
    **{
        f"spo_kernels.integrations.{name}": (
            *(f"spo_kernels.{public}" for public in spo_kernels.__all__),
            *(f"spo_kernels.integrations.{lower}" for lower in INTEGRATIONS[:i]),
        )
        for i, name in enumerate(INTEGRATIONS)
    },
    "spo_kernels.env": ("spo_kernels",),
    "spo_kernels.selfcheck": ("spo_kernels.backends", "spo_kernels.precision", "spo_kernels.reference"),
}


def test_every_module_has_a_layer() -> None:
    assert set(LOWER) == set(KERNELS) - {"spo_kernels", "spo_kernels._control"}


@pytest.mark.parametrize("module", LOWER)
def test_library_modules_import_only_what_lies_below(module: str) -> None:
    own = [name for name in imports(module, KERNELS[module]) if is_within(name, "spo_kernels")]
    # `from spo_kernels import ops` gives spo_kernels.ops, so `import spo_kernels` alone is an import of the top level.
    upward = [name for name in own if not any(is_within(name, lower) for lower in LOWER[module])]
    assert not upward, f"{module} imports {upward}"


@pytest.mark.parametrize("module", KERNELS)
def test_the_library_imports_nothing_that_uses_it(module: str) -> None:
    roots = {name.split(".")[0]: name for name in imports(module, KERNELS[module])}
    users = [roots[root] for root in ("spo_train", "benchmarks", "tests") if root in roots]
    assert not users, f"{module} imports {users}"


@pytest.mark.parametrize("module", KERNELS)
def test_the_library_needs_torch_and_numpy_only(module: str) -> None:
    allowed = {"spo_kernels", "torch", "numpy", *sys.stdlib_module_names}
    if module.startswith("spo_kernels.backends.triton"):
        allowed.add("triton")
    if module.startswith("spo_kernels.integrations.trl"):
        allowed |= {"accelerate", "datasets", "packaging", "peft", "transformers", "trl"}
    for name, projects in {"hf": {"transformers"}, "llamafactory": {"llamafactory"}, "nemo_rl": {"nemo_rl"}}.items():
        if module == f"spo_kernels.integrations.{name}":
            allowed |= projects
    others = [name for name in imports(module, KERNELS[module]) if name.split(".")[0] not in allowed]
    assert not others, f"{module} imports {others}"


def test_the_trainer_uses_public_names_only() -> None:
    public = {f"spo_kernels.{name}" for name in spo_kernels.__all__} | {"spo_kernels.__version__"}
    used = {
        (module, name)
        for module, path in modules("spo_train").items()
        for name in imports(module, path)
        if is_within(name, "spo_kernels") and name != "spo_kernels"
    }
    assert used, "spo_train does not use spo_kernels at all"
    private = sorted((module, name) for module, name in used if name not in public)
    assert not private, f"not public: {private}"
    # `import spo_kernels` is fine too, as long as only public names are taken from it.
    for module, path in modules("spo_train").items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "spo_kernels":
                assert f"spo_kernels.{node.attr}" in public, f"{module} uses spo_kernels.{node.attr}"


@pytest.mark.parametrize("module", modules("spo_train"))
def test_the_trainer_does_not_know_its_toy_domain(module: str) -> None:
    """Outside toy/ only the command line and the table of judges import it. The loop imports no model."""
    used = [name for name in imports(module, modules("spo_train")[module]) if is_within(name, "spo_train")]
    if not is_within(module, "spo_train.toy") and module not in ("spo_train.commands", "spo_train.judges"):
        assert not [name for name in used if is_within(name, "spo_train.toy")]
    if module in ("spo_train.align", "spo_train.alignment", "spo_train.evaluate", "spo_train.run"):
        assert not [name for name in used if is_within(name, "spo_train.models")]


def test_public_names_exist() -> None:
    for name in spo_kernels.__all__:
        assert getattr(spo_kernels, name) is not None


@pytest.mark.parametrize("route", ["auto", "recompute"])
def test_hidden_states_reach_the_product_in_few_calls(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    product, chains = torch.mm, []
    forward = inspect.unwrap(spo_kernels.LinearSPOLoss.forward)  # without the look for DTensors before it

    def spy(*args: Any, **options: Any) -> torch.Tensor:
        frame, chain = sys._getframe(1), ["mm"]
        while frame.f_code is not forward.__code__:
            if is_within(frame.f_globals["__name__"], "spo_kernels"):
                chain.append(frame.f_code.co_name)
            assert frame.f_back is not None
            frame = frame.f_back
        chains.append(chain[::-1])
        return product(*args, **options)

    monkeypatch.setattr(torch, "mm", spy)
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    spo_kernels.LinearSPOLoss(route=route)(hidden, torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.long))
    first_product = chains[0]
    assert len(first_product) <= 7, first_product
