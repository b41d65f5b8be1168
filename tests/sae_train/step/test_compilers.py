"""What `benchmarks.compilers` reads in a compiled program, beside a program that one can count.

Legend: B rows, D model width, F latents.
"""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.compilers import Size, checks, moved_bytes, roofline
from benchmarks.support.hlo import Module
from sae_train.plan.accelerators import ACCELERATORS

SIZE = Size(d_model=8, width=64, batch_size=16)
BF, FD, BD = 16 * 64, 64 * 8, 16 * 8

# x W_encᵀ, of which a mask is kept at half the bytes; a loop of four slices; an array on the chip.
PROGRAM = """HloModule step

%masked (param_0.1: f32[64,16]) -> bf16[64,16] {
  %param_0.1 = f32[64,16]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %zeros = f32[64,16]{1,0} broadcast(%zero), dimensions={}
  %above = pred[64,16]{1,0} compare(%param_0.1, %zeros), direction=GT
  %kept = f32[64,16]{1,0} select(%above, %param_0.1, %zeros)
  ROOT %short = bf16[64,16]{1,0} convert(%kept)
}

%rounded (param_0.2: f32[64,16]) -> bf16[64,16] {
  %param_0.2 = f32[64,16]{1,0} parameter(0)
  ROOT %short.1 = bf16[64,16]{1,0} convert(%param_0.2)
}

%part (param_0.3: f32[64,8], param_1.3: s32[]) -> f32[16,8] {
  %param_0.3 = f32[64,8]{1,0} parameter(0)
  %param_1.3 = s32[] parameter(1)
  %none = s32[] constant(0)
  %slice = f32[16,8]{1,0} dynamic-slice(%param_0.3, %param_1.3, %none), dynamic_slice_sizes={16,8}
  ROOT %twice = f32[16,8]{1,0} add(%slice, %slice)
}

%body (carried: (s32[], f32[64,8], f32[16,8])) -> (s32[], f32[64,8], f32[16,8]) {
  %carried = (s32[], f32[64,8]{1,0}, f32[16,8]{1,0}) parameter(0)
  %number = s32[] get-tuple-element(%carried), index=0
  %matrix = f32[64,8]{1,0} get-tuple-element(%carried), index=1
  %fusion.3 = f32[16,8]{1,0} fusion(%matrix, %number), kind=kLoop, calls=%part
  ROOT %next = (s32[], f32[64,8]{1,0}, f32[16,8]{1,0}) tuple(%number, %matrix, %fusion.3)
}

ENTRY %main (x: bf16[16,8], W: bf16[64,8], M: f32[64,8]) -> bf16[64,16] {
  %x = bf16[16,8]{1,0} parameter(0)
  %W = bf16[64,8]{1,0} parameter(1)
  %M = f32[64,8]{1,0} parameter(2)
  %pre = f32[64,16]{1,0} dot(%W, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %near = f32[64,16]{1,0:T(8,128)S(1)} negate(%pre)
  %start = s32[] constant(0)
  %loop = (s32[], f32[64,8]{1,0}, f32[16,8]{1,0}) tuple(%start, %M, %x)
  %while = (s32[], f32[64,8]{1,0}, f32[16,8]{1,0}) while(%loop), condition=%c, body=%body, TRIPS
  ROOT %out = bf16[64,16]{1,0} fusion(%pre), kind=kLoop, calls=%masked
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"4"}}')


def test_bytes_and_products_of_a_program():
    module = Module(PROGRAM)
    (product,) = (found for one in module.executed for found in one.products)
    assert product.types == "bf16 x bf16 -> f32"
    assert product.flops == 2 * 16 * 64 * 8
    moved = moved_bytes(module, SIZE)
    # Written by the product, read from the chip's side and by the mask; the mask's result.
    assert moved["BF"] == BF * (4 + 4 + 4 + 2)
    # Of the product; of the loop a quarter at a time, and what each turn writes.
    assert moved["FD"] == FD * 2 + 4 * (FD // 4) * 4
    assert moved["BD"] == BD * 2 + 4 * BD * 4
    assert module.unknown_loops == 0
    assert Module(PROGRAM.replace("known_trip_count", "other")).unknown_loops == 1


def test_the_roofline_takes_the_longer_of_products_and_bytes():
    module, chip = Module(PROGRAM), ACCELERATORS["h100"]
    # So small a product is bound by its bytes.
    by_bytes = sum(moved_bytes(module, SIZE).values()) / chip.hbm_bandwidth
    assert roofline(module, chip, "bfloat16") == pytest.approx(by_bytes)
    slow = dataclasses.replace(chip, flops={"bfloat16": 1.0})
    assert roofline(module, slow, "bfloat16") == pytest.approx(2 * 16 * 64 * 8, rel=1e-6)


def test_checks_find_copies_converts_and_wide_arrays():
    assert set(checks(Module(PROGRAM), SIZE).values()) == {"PASS"}
    rounded = checks(Module(PROGRAM.replace("calls=%masked", "calls=%rounded")), SIZE)
    # `near` reads the product's result too.
    assert rounded["converts"] == "FAIL: out"
    assert rounded["floats"] == "PASS"
    alone = PROGRAM.replace("calls=%masked", "calls=%rounded").replace("negate(%pre)", "iota()")
    assert checks(Module(alone), SIZE)["floats"] == "FAIL: pre"
    copied = PROGRAM.replace("negate(%pre)", "copy(%pre)").replace("S(1)", "")
    assert checks(Module(copied), SIZE)["copies"] == "FAIL: near"
