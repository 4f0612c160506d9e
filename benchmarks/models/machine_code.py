"""``python -m benchmarks.models.machine_code`` prints the CUDA kernels' registers, spills, and a model of their loops.

The model divides a loop's cycles on the busiest pipe of a multiprocessor by its cycles of memory. A pipe's cycles are
warp instructions times the cycles of one (CUDA programming guide, "arithmetic instructions"). The memory's cycles move
the loop's bytes at the multiprocessor's even share of the bandwidth. The model knows no latencies, caches or clocks
under load, so it is a lower bound on the time and no prediction.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

WARP = 32


class Gpu(NamedTuple):
    arch: str
    multiprocessors: int
    clock_hz: float
    memory_bytes_per_second: float

    @property
    def bytes_per_cycle(self) -> float:
        """Memory bandwidth for one multiprocessor."""
        return self.memory_bytes_per_second / (self.multiprocessors * self.clock_hz)


GPUS = {
    "A100": Gpu("sm_80", 108, 1.41e9, 2.04e12),
    "H100": Gpu("sm_90", 132, 1.70e9, 3.35e12),
    "B200": Gpu("sm_100", 148, 1.85e9, 8.0e12),
}

# Pipe, cycles of a multiprocessor for one warp instruction, and beginnings of the instructions' names. The first match
# counts.
PIPES = (
    ("special", 2.0, "MUFU F2F F2I I2F FRND POPC"),
    ("load/store", 1.0, "LDG STG LDS STS LDL STL SHFL ATOM RED"),
    (
        "integer",
        0.5,
        "FMNMX FSETP FSEL FSET ISETP IADD IMNMX LOP3 PLOP3 SHF PRMT SEL LEA VIADD VIMNMX MOV F2FP I2FP BMSK SGXT R2P",
    ),
    ("float", 0.25, "FADD FMUL FFMA HFMA2 HADD2 HMUL2"),
    ("multiply", 0.5, "IMAD"),
)
ISSUE_CYCLES = 0.25


class Resources(NamedTuple):
    arch: str
    kernel: str
    registers: int
    spilled: int  # bytes of stack a thread
    shared: int  # bytes a block


class Loop(NamedTuple):
    """An innermost loop over whole vectors, per iteration of a warp."""

    kernel: str
    instructions: int
    loads: int  # of 16 bytes a thread
    stores: int
    cycles: dict[str, float]

    @property
    def bytes(self) -> int:
        return 16 * WARP * (self.loads + self.stores)

    def share(self, gpu: Gpu) -> tuple[float, str]:
        """The busiest pipe's cycles over the memory's, and which pipe that is."""
        pipe = max(self.cycles, key=lambda name: self.cycles[name])
        return self.cycles[pipe] / (self.bytes / gpu.bytes_per_cycle), pipe


def tool(name: str) -> str:
    """Path of cuobjdump or nvdisasm, from the CUDA toolkit or from Triton, which ships both."""
    if found := shutil.which(name):
        return found
    triton = importlib.util.find_spec("triton")
    path = Path(triton.origin or "").parent / "backends/nvidia/bin" / name if triton else Path()
    if not path.is_file():
        raise FileNotFoundError(f"{name} is neither on PATH nor part of an installed triton")
    return str(path)


def run(*command: str | Path, cwd: Path | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


def _short(mangled: str) -> str:
    name = run("c++filt", mangled).strip()
    name = re.sub(r"^void spo::cuda::|\(.*\)$", "", name)
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "f16").replace("spo::cuda::", "")


def resources(library: Path) -> Iterator[Resources]:
    """Resources of every kernel, for every architecture in a library."""
    arch = ""
    kernel = ""
    for line in run(tool("cuobjdump"), "--dump-resource-usage", library).splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\w+):", line):
            kernel = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            yield Resources(arch, _short(kernel), *(int(value) for value in match.groups()))


def _disassemble(library: Path, arch: str) -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        run(tool("cuobjdump"), "-xelf", "all", library.resolve(), cwd=Path(folder))
        for cubin in sorted(Path(folder).glob(f"*.{arch}.cubin")):
            text = run(tool("nvdisasm"), "-c", cubin)
            for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
                mangled, _, body = part.partition(":")
                yield mangled, body


def _cycles(body: list[str]) -> dict[str, float]:
    """Cycles of every pipe for one iteration."""
    cycles = {pipe: 0.0 for pipe, _, _ in PIPES}
    for name in body:
        for pipe, each, prefixes in PIPES:
            if name.startswith(tuple(prefixes.split())):
                cycles[pipe] += each * (4 if ".128" in name else 1)  # 16 bytes take four turns
                break
    return cycles | {"issue": ISSUE_CYCLES * len(body)}


def _loop(kernel: str, body: list[str]) -> Loop | None:
    """The loop with this body; None unless all its memory accesses are whole vectors."""
    memory = Counter(name for name in body if name.startswith(("LDG", "STG", "LDL", "STL")))
    vectors = {name: count for name, count in memory.items() if ".128" in name}
    if not vectors or len(vectors) != len(memory):
        return None
    loads = sum(count for name, count in vectors.items() if name.startswith("LDG"))
    stores = sum(vectors.values()) - loads
    return Loop(_short(kernel), len(body), loads, stores, _cycles(body))


def loops(library: Path, arch: str, only: str) -> Iterator[Loop]:
    """The vector loops of the kernels whose name matches, for one architecture."""
    for mangled, text in _disassemble(library, arch):
        if re.search(only, _short(mangled)):
            yield from vector_loops(mangled, text)


def _loop_bodies(text: str) -> Iterator[list[str]]:
    """The names of the instructions from a label to a branch back to it, for each such branch."""
    names: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := re.match(r"^(\.L_x_\d+):", line):
            labels[match[1]] = len(names)
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            names.append(match[1])
            target = re.search(r"`\((\.L_x_\d+)\)", match[2])
            if match[1].startswith("BRA") and target and target[1] in labels:
                yield names[labels[target[1]] :]


def vector_loops(kernel: str, text: str) -> Iterator[Loop]:
    """The vector loops of one disassembled kernel. kernel: its name, mangled or not.

    Loops that do not store may differ only in how many vectors an iteration takes. Only the largest of them counts: the
    smaller loops run at the end of a row. All loops that store count.
    """
    found: dict[bool, list[Loop]] = {}
    for body in _loop_bodies(text):
        loop = _loop(kernel, body)
        if loop and loop.loads:
            found.setdefault(loop.stores > 0, []).append(loop)
    for stores, candidates in found.items():
        largest = max(loop.loads for loop in candidates)
        yield from (loop for loop in candidates if stores or loop.loads == largest)


def cluster_loops(library: Path, arch: str, only: str) -> Iterator[Loop]:
    """The work on one vector of each tensor in the kernels of clusters whose name matches, as one loop a kernel.

    Bulk copies bring the vectors into shared memory, so no loop shows all traffic. The loop of the sums reads two
    vectors there and counts as two loads; the loop of the gradient counts as one store. Both contain code that most
    iterations skip (new maxima, infinities), so the count has too many instructions. It leaves out the merging of sums,
    which a row does once.
    """
    for mangled, text in _disassemble(library, arch):
        if not re.search(only, _short(mangled)):
            continue
        sums: list[list[str]] = []
        gradients: list[list[str]] = []
        for body in _loop_bodies(text):
            memory = Counter(name for name in body if name.startswith(("LDG", "STG", "LDL", "STL", "LDS", "SYNCS")))
            stores = memory.pop("STG.E.EF.128", 0)
            if memory == {"LDS.128": 2} and stores <= 1:
                (gradients if stores else sums).append(body)
            elif stores == 1 and set(memory) == {"LDS.128"}:
                gradients.append(body)  # reads a second time for infinities
        if not sums or not gradients:
            continue
        body = max(sums, key=len) + min(gradients, key=len)
        yield Loop(_short(mangled), len(body), 2, 1, _cycles(body))


def main(library: Path) -> None:
    found = list(resources(library))
    spilling = sum(resource.spilled > 0 for resource in found)
    print(f"{len(found)} kernels, at most {max(r.registers for r in found)} registers, {spilling} with spills\n")
    print(
        f"{'GPU':<6}{'kernel':<58}{'bytes':>6}{'instr':>7}{'instr/elem':>12}{'busiest pipe':>14}{'of memory time':>16}"
    )

    def row(name: str, gpu: Gpu, loop: Loop) -> None:
        share, pipe = loop.share(gpu)
        elements = loop.loads * 16 * WARP // 2
        print(
            f"{name:<6}{loop.kernel:<58}{loop.bytes:>6}{loop.instructions:>7}"
            f"{loop.instructions * WARP / elements:>12.1f}{pipe:>14}{share:>16.0%}"
        )

    for name, gpu in GPUS.items():
        for loop in loops(library, gpu.arch, r"<bf16, (bf16, )?.*256>|<bf16, bf16, 256>"):
            if "AnyType" in loop.kernel or "scale" in loop.kernel:
                continue
            row(name, gpu, loop)
        for loop in cluster_loops(library, gpu.arch, r"<bf16, 256>"):
            row(name, gpu, loop)


if __name__ == "__main__":
    from spo_kernels.backends import cuda

    path = Path(sys.argv[1]) if len(sys.argv) > 1 else cuda.library_path()
    if path is None:
        sys.exit("the CUDA kernels are not part of this installation")
    main(path)
