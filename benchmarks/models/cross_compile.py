"""``python -m benchmarks.models.cross_compile cuda:90 hip:gfx942`` compiles every Triton kernel, without those GPUs.

Prints one JSON object per compilation: the case, its registers, the bytes or registers that it spilled, and its loops
over vectors, which the model in machine_code.py reads. With ``table``, prints what the loops of the largest bfloat16
configurations need. It runs as a program, because a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.models import machine_code
from spo_kernels.backends import triton as launch
from spo_kernels.backends import triton_kernels as kernels

ITEMSIZE = {"bf16": 2, "fp32": 4, "fp64": 8}
# This target compiles every configuration; the others compile the configurations that need the most registers.
THOROUGH = "cuda:90"
LARGEST, SMALLER = 128256, (1000, 32768)
HARDEST = (("bf16", None), ("bf16", "bf16"), ("fp64", "fp64"))

# Arguments that Triton never knows to be multiples of 16.
_NEVER_ALIGNED = ("N", "T", "ignore_index", "transform_rows", "ref_transform_rows")
# Arguments that are None in a launch without a reference, and without row options.
_OF_A_REFERENCE = ("ref_logits", "mask", "kl", "dkl", "ref_transform", "ref_transform_rows")
_OPTIONAL = ("dlse", "width", "transform", "transform_rows", "ref_transform", "ref_transform_rows")


class Case(NamedTuple):
    """One compilation.

    ``absent`` names the arguments that are None, ``ones`` the arguments that are the constant 1. With ``factors``, the
    launch has all row options, and transforms of so many factors. ``mixture`` is that of `RowOptions`.
    """

    kernel: str
    dtype: str
    ref_dtype: str | None
    constants: dict[str, int]
    threads: int
    aligned: bool = True
    absent: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()
    factors: int = 0
    mixture: float = 0.0


# A plain online softmax, which takes a second exponential for each element's maximum. The test of loops must refuse it.
PLANTED = Case("token_stats_fwd_kernel", "bf16", None, {"STEPS": 1, "LANES": 2048, "VECTOR": 1}, 256)


def cases(
    V: int, dtypes: Iterable[tuple[str, str | None]], alignments: Iterable[bool], factors: int = 0
) -> Iterator[Case]:
    """The launches for rows of V elements, without row options or with transforms of so many factors."""
    softcap = factors == 2
    block = launch.block_config(V, softcap)
    blocks = {"BLOCK": block.block}
    for (dtype, ref_dtype), aligned in itertools.product(dtypes, alignments):
        row = launch.row_config(V, ITEMSIZE[dtype], 1 if ref_dtype is None else 2, aligned, softcap)
        tiles = {"STEPS": row.steps, "LANES": row.lanes, "VECTOR": row.vector}
        found = [Case("token_stats_fwd_kernel", dtype, ref_dtype, tiles, row.threads, aligned)]
        if ref_dtype is not None:
            found.append(Case("kl_loss_fwd_kernel", dtype, ref_dtype, tiles, row.threads, aligned))
            found.append(Case("token_stats_bwd_kernel", dtype, ref_dtype, blocks, block.threads, aligned))
        yield from (case._replace(factors=factors) for case in found)
    if factors == 0:
        yield Case("scale_kernel", "bf16", None, blocks, block.threads)


def mixtures(V: int, factors: int) -> Iterator[Case]:
    """The launches for a reverse KL and a JSD of rows of V elements."""
    block = launch.block_config(V, factors == 2)
    for dtype in ("bf16", "fp64"):
        row = launch.row_config(V, ITEMSIZE[dtype], 2, True, True)
        tiles = {"STEPS": row.steps, "LANES": row.lanes, "VECTOR": row.vector}
        jsd = Case("mixture_kl_kernel", dtype, dtype, tiles, row.threads, factors=factors, mixture=0.5)
        yield jsd
        for mixture in (1.0, 0.5):
            yield jsd._replace(
                kernel="token_stats_bwd_kernel",
                constants={"BLOCK": block.block},
                threads=block.threads,
                mixture=mixture,
            )


def variants(V: int) -> Iterator[Case]:
    """Launches with arguments left out, and with sizes of 1, which Triton compiles as constants."""
    block = launch.block_config(V)
    blocks = {"BLOCK": block.block}
    row = launch.row_config(V, ITEMSIZE["bf16"], 2, True)
    tiles = {"STEPS": row.steps, "LANES": row.lanes, "VECTOR": row.vector}
    ones = ("V", "stride_b")
    for absent in (("mask",), ("labels", "logps", "dlogps"), ("mask", "labels", "logps", "dlogps")):
        yield Case("token_stats_fwd_kernel", "bf16", "bf16", tiles, row.threads, True, absent, ones)
        yield Case("token_stats_bwd_kernel", "bf16", "bf16", blocks, block.threads, True, absent, ones)
    yield Case("token_stats_bwd_kernel", "bf16", None, blocks, block.threads, True, (), ones)
    yield Case("kl_loss_fwd_kernel", "bf16", "bf16", tiles, row.threads, True, ("row_weight",), ones)


def source(case: Case) -> ASTSource:
    """The kernel with the argument types of a launch; aligned: pointers, V and strides are multiples of 16."""
    wide = "fp64" if case.dtype == "fp64" else "fp32"
    types = dict.fromkeys(("logps", "dlogps", "stats", "losses", "row_weight", "scale", "kl", "dkl", "kls"), f"*{wide}")
    types |= dict.fromkeys(("dlse", "transform", "ref_transform"), f"*{wide}")
    types |= dict.fromkeys(("logits", "dlogits", "tensor"), f"*{case.dtype}")
    types |= {"ref_logits": f"*{case.ref_dtype}", "mask": "*i1", "labels": "*i64"}
    absent = case.absent if case.ref_dtype else (*case.absent, *_OF_A_REFERENCE)
    if case.factors == 0:
        absent += _OPTIONAL
    factors = {"FACTORS": case.factors, "REF_FACTORS": case.factors if case.ref_dtype else 0}

    kernel = getattr(kernels, case.kernel)
    constants: dict[str, int | float | None] = dict(case.constants)
    if "MIXTURE" in kernel.arg_names:
        constants["MIXTURE"] = case.mixture
    constants |= {name: value for name, value in factors.items() if name in kernel.arg_names}
    constants |= {argument: 1 for argument in case.ones if argument in kernel.arg_names}
    constants |= {argument: None for argument in absent if argument in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    divisible = [name for name in kernel.arg_names if case.aligned and name not in (*constants, *_NEVER_ALIGNED)]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def resources(compiled: Any) -> dict[str, Any]:
    """Registers, spills, vector loops and, for NVIDIA, the kinds of floating-point division."""
    if "amdgcn" in compiled.asm:
        found = dict(re.findall(r"\.(vgpr_count|[vs]gpr_spill_count):\s*(\d+)", compiled.asm["amdgcn"]))
        spills = int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"])
        return {"registers": int(found["vgpr_count"]), "spills": spills, "loops": []}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = machine_code.run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        text = machine_code.run(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    found = dict(re.findall(r"\b(REG|STACK):(\d+)", usage))
    loops = [loop._asdict() for loop in machine_code.vector_loops(compiled.metadata.name, text)]
    divisions = sorted(set(re.findall(r"\bdiv\.(?!u32|s32|u64|s64)[\w.]+", compiled.asm["ptx"])))
    return {"registers": int(found["REG"]), "spills": int(found["STACK"]), "loops": loops, "divisions": divisions}


def compile_for(target: str, case: Case) -> dict[str, Any]:
    """Compile for ``cuda:<capability>`` or ``hip:<architecture>``; returns the case and its resources."""
    backend, architecture = target.split(":")
    warp = 64 if backend == "hip" else 32
    gpu = GPUTarget(backend, architecture if backend == "hip" else int(architecture), warp)
    options: dict[str, int] = {"num_warps": case.threads // warp, **launch._NO_CONTRACTION}
    if case.kernel == "token_stats_fwd_kernel":
        options |= {"debug": True, "sanitize_overflow": False}
    return {"target": target} | case._asdict() | resources(triton.compile(source(case), gpu, options))


def cases_for(target: str) -> list[Case]:
    todo: list[Case] = []
    for factors in (0, 2):
        todo += cases(LARGEST, HARDEST, (True,), factors)
        todo += cases(LARGEST, HARDEST[1:2], (False,), factors)
    todo += mixtures(LARGEST, 0)
    if target == THOROUGH:
        todo += mixtures(LARGEST, 2)
        todo += cases(LARGEST, HARDEST[1:2], (True,), 1)
        # One dtype is enough for smaller configurations: they have fewer threads, and each thread does the same.
        todo += [case for V in SMALLER for case in cases(V, HARDEST[1:2], (True,))]
        todo += [*cases(LARGEST, [("fp32", None), ("fp32", "fp32"), ("bf16", "fp32")], (True,)), *variants(SMALLER[0])]
        todo.append(PLANTED)
    return todo


def print_table() -> None:
    print(f"{'GPU':<6}{'kernel':<26}{'reference':<11}{'instr/elem':>10}{'busiest pipe':>14}{'of memory time':>16}")
    for name, gpu in machine_code.GPUS.items():
        for case in cases(LARGEST, HARDEST[:2], (True,)):
            if case.kernel != "scale_kernel":
                for loop in compile_for(f"cuda:{gpu.arch.removeprefix('sm_')}", case)["loops"]:
                    found = machine_code.Loop(**loop)
                    share, pipe = found.share(gpu)
                    each = found.instructions / (found.loads * 16 / ITEMSIZE[case.dtype])
                    print(f"{name:<6}{case.kernel:<26}{case.ref_dtype or '':<11}{each:>10.1f}{pipe:>14}{share:>16.0%}")


def main(arguments: list[str]) -> None:
    if arguments == ["table"]:
        print_table()
        return
    for target in arguments:
        for case in cases_for(target):
            print(json.dumps(compile_for(target, case)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
