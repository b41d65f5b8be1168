"""What the compilers of accelerators make of a training step, on a machine without one.

    pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12   # of jax's version
    pip install libtpu                                                    # as jax[tpu] asks
    python -m benchmarks.compilers --out compilers.json

For each target, precision and size the whole step is compiled. Printed are, per program, the types
of its products' operands, the bytes moved over arrays [B, F] and [F, D] per element, temporaries,
and the time at the roofline: each instruction takes the longer of its products at the peak of the
precision and its bytes at the memory's bandwidth, and they run one after the other. No device
reaches that; ratios of it say what a precision can bring. Checks, per program:

    copies    no array [B, F] or [F, D] is copied
    converts  none is written only because its type changed, but for the rounded weights
    floats    no float32 array [B, F] is written which is only read to be rounded

With `--kernels pallas` also the registers of each Pallas kernel and what the assembler found none
for. Whether results are right, or how fast a device really is, isn't shown by any of it: without a
device XLA chooses the GPU's products and their tiles by rules, where it would time them else.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from activation_cache.precision import AVAILABLE, Precision
from benchmarks.step import config_of
from benchmarks.support.described_devices import TARGETS, described_mesh, prepare
from benchmarks.support.hlo import Executed, Module
from benchmarks.support.measure import markdown, write_results
from sae_train.model.sharding import BATCH_DIMS, sharding
from sae_train.plan.accelerators import ACCELERATORS, Accelerator
from sae_train.step.schedule import scheduled
from sae_train.step.state import abstract_state
from sae_train.train.train_step import make_train_step

StepPath = Literal["dense", "sparse"]
Kernels = Literal["xla", "pallas"]
KERNELS = ("_one_tile", "_one_part", "_one_program")
# Devices that run a target's programs.
RUNS_ON = {"h100": ("h100", "h200"), "v5p": ("v5p",), "v6e": ("v6e",)}


@dataclass(frozen=True)
class Size:
    """Of one program."""

    d_model: int
    width: int
    batch_size: int

    def kind(self, num_elements: int) -> str:
        """What an array of so many elements is: latents [B, F], a matrix [F, D], rows, other."""
        kinds = {
            self.batch_size * self.width: "BF",
            self.width * self.d_model: "FD",
            self.batch_size * self.d_model: "BD",
        }
        return kinds.get(num_elements, "other")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was read off one program.

    Attributes:
        operands: the types of its large products' operands, and how many products have them.
        latent_bytes, matrix_bytes: moved over arrays [B, F] and [F, D], per element of one.
        total_bytes: of all arrays.
        temporary_bytes: of memory beside arguments and results.
        copied_bytes: of arguments that the results aren't written over.
        roofline_ms: by device, in milliseconds.
        left_out: loops whose length the compiler doesn't know, which are not counted.
        checks: what was found against each, of PASS and FAIL.
    """

    target: str
    step: str
    precision: Precision
    d_model: int
    width: int
    batch_size: int
    operands: dict[str, int]
    latent_bytes: float
    matrix_bytes: float
    total_bytes: int
    temporary_bytes: int
    copied_bytes: int
    roofline_ms: dict[str, float]
    left_out: int
    checks: dict[str, str]
    seconds: float


def compile_step(
    mesh: Mesh,
    size: Size,
    *,
    step: StepPath,
    precision: Precision,
    kernels: Kernels = "xla",
    folder: str | None = None,
) -> jax.stages.Compiled:
    """The compiled step; with a folder, what is given to the assembler is left there."""
    config = config_of(
        width=size.width,
        batch_size=size.batch_size,
        step=step,
        kernels=kernels,
        precision=precision,
    )
    program: Any = make_train_step(config, input_scale=1.0, mesh=mesh)
    state = abstract_state(config.sae, d_model=size.d_model, mesh=mesh)
    rows = jax.ShapeDtypeStruct(
        (size.batch_size, size.d_model), jnp.float32, sharding=sharding(mesh, BATCH_DIMS)
    )
    options = None if folder is None else {"xla_dump_to": folder}
    return program.lower(state, rows, scheduled(config.train, step=1)).compile(
        compiler_options=options
    )


def moved_bytes(module: Module, size: Size) -> dict[str, int]:
    """Bytes read and written, by the kind of array."""
    found = dict.fromkeys(("BF", "FD", "BD", "other"), 0)
    for one in module.executed:
        for shape, count in one.read + one.written:
            found[size.kind(shape.size)] += count * one.times
    return found


def roofline(module: Module, device: Accelerator, precision: Precision) -> float:
    """Seconds: of each instruction the longer of its products and its bytes, added up."""

    def seconds(one: Executed) -> float:
        # A step may make some products at a lower precision than it asks of the others.
        products = sum(
            product.flops / device.flops["bfloat16" if product.is_bfloat16 else precision]
            for product in one.products
        )
        return max(products, one.bytes / device.hbm_bandwidth)

    return sum(map(seconds, module.executed))


def checks(module: Module, size: Size) -> dict[str, str]:
    """What each check found against the program, as PASS or as FAIL and the instructions."""
    large = [one for one in module.executed if _is_large(one, size)]
    against = {
        "copies": [one for one in large if module.only(one.instruction, {"copy", "transpose"})],
        "converts": [
            one
            for one in large
            if module.only(one.instruction, {"convert"}) and not _rounds_weights(one, size)
        ],
        "floats": [one for one in large if _only_rounded(module, one, size)],
    }
    return {
        name: "PASS" if not found else f"FAIL: {', '.join(one.instruction.name for one in found)}"
        for name, found in against.items()
    }


def _is_large(one: Executed, size: Size) -> bool:
    return any(size.kind(shape.size) in ("BF", "FD") and count for shape, count in one.written)


def _rounds_weights(one: Executed, size: Size) -> bool:
    """Float32 to bfloat16, of a matrix: half the bytes for the products that read it."""
    (shape, _), *others = one.written
    return not others and shape.dtype == "bf16" and size.kind(shape.size) == "FD"


def _only_rounded(module: Module, one: Executed, size: Size) -> bool:
    """Is one of its float32 results [B, F] read by nobody but to be rounded?"""
    for number, (shape, _) in enumerate(one.written):
        if shape.dtype == "f32" and size.kind(shape.size) == "BF" and not shape.on_chip:
            uses = list(module.uses(one.instruction, number))
            if uses and all(use.opcode == "convert" for use in uses):
                return True
    return False


def read_off(
    target: str,
    size: Size,
    *,
    step: StepPath,
    precision: Precision,
    kernels: Kernels = "xla",
    devices: int = 1,
) -> tuple[Row, dict[str, str]]:
    """Compile a step and read its program; with kernels, also what they need of registers."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_step(
            described_mesh(target, model=devices),
            size,
            step=step,
            precision=precision,
            kernels=kernels,
            folder=folder if kernels == "pallas" else None,
        )
        used = registers(folder) if kernels == "pallas" else {}
    module, memory = Module(compiled.as_text()), compiled.memory_analysis()
    assert memory is not None
    size = dataclasses.replace(size, width=size.width // devices)  # of a device's part
    moved = moved_bytes(module, size)
    operands: dict[str, int] = {}
    for product in (product for one in module.executed for product in one.products):
        # Others are products of a matrix and a vector.
        if product.flops > size.batch_size * size.width:
            kind = " ".join(filter(None, (f"{product.types}", product.algorithm)))
            operands[kind] = operands.get(kind, 0) + product.times
    row = Row(
        target=target,
        step=step,
        precision=precision,
        **dataclasses.asdict(size),
        operands=operands,
        latent_bytes=moved["BF"] / (size.batch_size * size.width),
        matrix_bytes=moved["FD"] / (size.width * size.d_model),
        total_bytes=sum(moved.values()),
        temporary_bytes=memory.temp_size_in_bytes,
        copied_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        roofline_ms={
            name: 1e3 * roofline(module, ACCELERATORS[name], precision) for name in RUNS_ON[target]
        },
        left_out=module.unknown_loops,
        checks=checks(module, size),
        seconds=time.perf_counter() - start,
    )
    return row, used


def registers(folder: str) -> dict[str, str]:
    """Of each Pallas kernel that was compiled, what the assembler says of it."""
    found = find_spec("nvidia.cuda_nvcc")
    assert found is not None
    assert found.submodule_search_locations
    assembler = Path(next(iter(found.submodule_search_locations))) / "bin" / "ptxas"
    told = {}
    for path in sorted(Path(folder).glob("*.ptx")):
        own = re.search(r"\.entry (\w+)", path.read_text())
        if own is None or own[1] not in KERNELS:
            continue
        command = [str(assembler), "-v", "-arch=sm_90a", str(path), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        used, spilled = re.search(r"Used (\d+)", report), re.search(r"(\d+) bytes spill st", report)
        assert used is not None
        assert spilled is not None
        told[own[1]] = f"{used[1]} registers, {spilled[1]} bytes spilled"
    return told


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each program."""
    lines = [
        [
            row.target,
            row.step,
            row.precision,
            f"{row.d_model}",
            f"{row.width}",
            "; ".join(f"{num} {kind}" for kind, num in row.operands.items()),
            f"{row.latent_bytes:.0f}",
            f"{row.matrix_bytes:.0f}",
            f"{row.temporary_bytes / 1e9:.2f}",
            ", ".join(f"{name} {ms:.2f}" for name, ms in row.roofline_ms.items()),
            " ".join(name for name, told in row.checks.items() if told != "PASS") or "none",
        ]
        for row in rows
    ]
    head = ["target", "step", "precision", "D", "width", "products"]
    head += ["bytes of [B, F]", "of [F, D]", "temporaries, GB", "roofline, ms", "failed checks"]
    return markdown(head, lines)


def ratios(rows: Sequence[Row]) -> str:
    """Markdown: how many times as long the roofline of float32 is as that of each precision."""
    found: dict[tuple[str, str, int, int], dict[Precision, float]] = {}
    for row in rows:
        for device, ms in row.roofline_ms.items():
            found.setdefault((device, row.step, row.d_model, row.width), {})[row.precision] = ms
    others = [one for one in get_args(Precision) if one != "float32"]
    lines = [
        [*map(str, key), *(f"{ms['float32'] / ms[one]:.1f}" if one in ms else "" for one in others)]
        for key, ms in found.items()
        if "float32" in ms
    ]
    head = ["device", "step", "D", "width", *(f"float32 / {one}" for one in others)]
    return markdown(head, lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--steps", nargs="+", choices=("dense", "sparse"), default=("dense",))
    parser.add_argument("--precisions", nargs="+", choices=get_args(Precision))
    parser.add_argument("--widths", type=int, nargs="+", default=(16_384, 131_072))
    parser.add_argument("--d-models", type=int, nargs="+", default=(2304,))
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--devices", type=int, default=1, help="that share the latents")
    parser.add_argument("--kernels", choices=("xla", "pallas"), default="xla")
    return parser


def main() -> None:
    """Compile every program, print the tables; exit 1 if a check failed."""
    arguments = _parser().parse_args()
    prepare()
    rows: list[Row] = []
    for target in arguments.targets:
        has = AVAILABLE["gpu" if target == "h100" else "tpu"]
        asked = [one for one in arguments.precisions or has if one in has]
        sizes = [
            Size(d_model, width, arguments.batch_size)
            for d_model in arguments.d_models
            for width in arguments.widths
        ]
        for size, step, precision in (
            (size, step, precision)
            for size in sizes
            for step in arguments.steps
            for precision in asked
        ):
            row, used = read_off(
                target,
                size,
                step=step,
                precision=precision,
                kernels=arguments.kernels,
                devices=arguments.devices,
            )
            rows.append(row)
            sys.stderr.write(f"{row}\n")
            for name, text in used.items():
                sys.stdout.write(f"{name}: {text}\n")
            if arguments.out is not None:
                write_results(arguments.out, {"rows": [dataclasses.asdict(one) for one in rows]})
    sys.stdout.write(f"{table(rows)}\n\n{ratios(rows)}\n")
    sys.exit(any(told != "PASS" for row in rows for told in row.checks.values()))


if __name__ == "__main__":
    main()
