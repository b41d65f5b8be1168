"""Mutations of the kernels of the sparse path."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

_KERNELS, _T_KERNELS = "sae_train/sparse/kernels", "tests/sae_train/sparse/test_kernels.py"
_T_PAIRS = "tests/sae_train/sparse/test_pairs.py"


KERNELS = (
    Mutation(
        "in a kernel every block of rows is the first",
        f"{_KERNELS}/select.py",
        "row_M = pl.program_id(1) * ROWS +",
        "row_M = 0 * pl.program_id(1) +",
        f"{_T_PAIRS}::test_pairs_are_all_that_are_active_or_in_the_window[pallas-300-70]",
    ),
    Mutation(
        "a kernel's pairs of one latent lie on those of another",
        f"{_KERNELS}/select.py",
        "position_ML = first + before_L[None, :] + rank_ML",
        "position_ML = first + 0 * before_L[None, :] + rank_ML",
        f"{_T_PAIRS}::test_pairs_are_all_that_are_active_or_in_the_window[pallas-64-96]",
    ),
    Mutation(
        "a kernel's pool that was too small is taken for whole",
        f"{_KERNELS}/select.py",
        "& (total <= capacity)",
        "& (total >= 0)",
        f"{_T_PAIRS}::test_pairs_without_a_place_are_counted[pallas]",
    ),
    Mutation(
        "a kernel's pairs are ranked within their block of rows alone",
        f"{_KERNELS}/select.py",
        "jnp.cumsum(counts_RF, axis=0, dtype=jnp.int32) - counts_RF + starts_F",
        "0 * counts_RF + starts_F",
        f"{_T_KERNELS}::test_pairs_from_the_pool_are_the_same_in_whichever_order_they_got_there",
    ),
    Mutation(
        "a kernel decodes the pairs of a row but for the last few",
        f"{_KERNELS}/decode.py",
        "(count + AT_ONCE - 1) // AT_ONCE",
        "count // AT_ONCE",
        f"{_T_PAIRS}::test_decoding_pairs_is_the_product[pallas-4]",
    ),
    Mutation(
        "a kernel's program takes its first latent again and again",
        f"{_KERNELS}/update.py",
        "program + nth * num_programs",
        "program + 0 * nth * num_programs",
        f"{_T_KERNELS}::test_touched_latents_are_updated_as_by_xla[float32-300-7-True-3]",
    ),
    Mutation(
        "a kernel leaves out the window of a threshold",
        f"{_KERNELS}/update.py",
        "jnp.where(window, theta * g_f",
        "jnp.where(window & active, theta * g_f",
        f"{_T_KERNELS}::test_touched_latents_are_updated_as_by_xla[float32-8-1024-True-1]",
    ),
    Mutation(
        "a kernel keeps the gradient's part along the row",
        f"{_KERNELS}/update.py",
        "lambda g, w: g - along * w",
        "lambda g, w: g - 0 * along * w",
        f"{_T_KERNELS}::test_touched_latents_are_updated_as_by_xla[float32-8-1024-True-1]",
    ),
    Mutation(
        "a kernel's rows aren't made unit again",
        f"{_KERNELS}/update.py",
        "lambda w: w / norm",
        "lambda w: w + 0 * norm",
        f"{_T_KERNELS}::test_touched_latents_are_updated_as_by_xla[float32-8-1024-True-1]",
    ),
    Mutation(
        "a kernel's second moments decay once, however long their latent rested",
        f"{_KERNELS}/update.py",
        "decay = config.beta2 * read.decay_F[latent]",
        "decay = config.beta2",
        f"{_T_KERNELS}::test_touched_latents_are_updated_as_by_xla[float32-8-1024-True-1]",
    ),
    Mutation(
        "a kernel's norm leaves out what is along the row",
        f"{_KERNELS}/update.py",
        "squares + of_enc + _dot(found.dec, found.dec)",
        "squares + of_enc + _dot(projected, projected)",
        f"{_T_KERNELS}::test_touched_latents_are_updated_as_by_xla[float32-300-7-False-1]",
    ),
    Mutation(
        "a kernel holds less than a row",
        f"{_KERNELS}/update.py",
        "(left - 1).bit_length()",
        "left.bit_length() - 1",
        f"{_T_KERNELS}::test_pieces_cover_a_row_once",
    ),
    Mutation(
        "a kernel's tile has a size that Triton doesn't know",
        f"{_KERNELS}/select.py",
        "ROWS, LATENTS, DEPTH = 128,",
        "ROWS, LATENTS, DEPTH = 96,",
        f"{_T_KERNELS}::test_kernels_lower_for_cuda",
    ),
    Mutation(
        "a kernel's results are typed as the same on all devices",
        f"{_KERNELS}/pallas.py",
        "manual_axis_type=kind",
        "manual_axis_type=None if kind else kind",
        f"{_T_KERNELS}::test_a_whole_step_lowers_for_cuda_with_its_types_checked",
    ),
    Mutation(
        "kernels are started where no GPU is",
        f"{_KERNELS}/mode.py",
        "if platform not in _GPUS and",
        "if platform in _GPUS and",
        f"{_T_KERNELS}::test_kernels_are_refused_where_there_is_no_gpu",
    ),
    Mutation(
        "a kernel decodes a list that was too short",
        f"{_KERNELS}/decode.py",
        "jnp.where(pairs.total > latents_P.shape[0], 0, counts_B)",
        "jnp.where(pairs.total < 0, 0, counts_B)",
        f"{_T_KERNELS}::test_of_too_many_pairs_none_is_decoded",
    ),
    Mutation(
        "a kernel's pairs stay in the order in which their tiles came",
        f"{_KERNELS}/select.py",
        "to_P = jnp.where(there_P, to_P, capacity + nth_P)",
        "to_P = jnp.where(there_P, nth_P, capacity + nth_P)",
        f"{_T_KERNELS}::test_programs_in_the_opposite_order_leave_the_same_bits",
    ),
)
