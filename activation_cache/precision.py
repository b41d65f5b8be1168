"""At which precision products of float32 arrays can be made, and what `auto` means; loads no JAX.

    float32       exact products of float32: six bfloat16 passes on a TPU, no tensor cores on a GPU
    bfloat16_3x   operands as sums of two bfloat16 numbers, three passes: close to float32
    tf32          operands rounded to 10 bits after the point; GPUs only
    bfloat16      operands rounded to bfloat16, 7 bits, one pass

`activation_cache.products` makes them. docs/numerics.md says what is rounded where.
"""

from __future__ import annotations

from typing import Literal, get_args

from activation_cache.runtime.errors import UserError

Precision = Literal["float32", "bfloat16_3x", "tf32", "bfloat16"]
# What a key of the config takes.
PrecisionChoice = Literal["auto", "float32", "bfloat16_3x", "tf32", "bfloat16"]

# By JAX's name of a platform. A CPU takes the presets of the other two and computes float32.
AVAILABLE: dict[str, tuple[Precision, ...]] = {
    "cpu": ("float32", "bfloat16"),
    "gpu": get_args(Precision),
    "tpu": ("float32", "bfloat16_3x", "bfloat16"),
}
_ALSO_GPU = ("cuda", "rocm")


def resolve(chosen: PrecisionChoice, *, platform: str, key: str = "train.precision") -> Precision:
    """The precision that a config's key means on a platform, as `jax.Device.platform` names it.

    `auto` is float32 on CPUs and bfloat16 on accelerators.

    Args:
        key: which key it is, for the message.

    Raises:
        UserError: the platform has no such products.
    """
    name = "gpu" if platform in _ALSO_GPU else platform
    available = AVAILABLE.get(name, ("float32",))
    if chosen == "auto":
        return "bfloat16" if name != "cpu" and "bfloat16" in available else "float32"
    if chosen not in available:
        raise UserError(
            f"{key} is {chosen}, and devices of the platform {platform} have no such products; "
            f"they have {', '.join(available)}: set {key} to one of these, or to auto"
        )
    return chosen
