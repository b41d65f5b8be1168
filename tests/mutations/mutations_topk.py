"""Mutations of TopK's and BatchTopK's step by pairs (`mutations`)."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

_SELECTION, _LISTED = "sae_train/sparse/topk_selection.py", "sae_train/sparse/dead_latents.py"
_TOPK = "sae_train/sparse/topk_parts.py"
_T_SELECTION, _T_TOPK = (
    "tests/sae_train/sparse/test_topk_selection.py",
    "tests/sae_train/sparse/test_sparse_topk.py",
)
_SELECTED = f"{_T_SELECTION}::test_the_largest_are_selected_whatever_the_values"

TOPK = (
    Mutation(
        "one more than k latents of a row are selected",
        _SELECTION,
        'return jax.lax.psum(counts, "model") >= self.k',
        'return jax.lax.psum(counts, "model") > self.k',
        f"{_SELECTED}[topk-mesh0]",
    ),
    Mutation(
        "each part of the width selects its own k",
        _SELECTION,
        'return jax.lax.psum(counts, "model") >= self.k',
        'return jax.lax.pmax(counts, "model") >= self.k',
        f"{_SELECTED}[topk-mesh3]",
    ),
    Mutation(
        "a value that ties with its row's bound isn't collected",
        _SELECTION,
        "(pre_BL >= so_far.bound_B[:, None])",
        "(pre_BL > so_far.bound_B[:, None])",
        f"{_SELECTED}[topk-mesh0]",
    ),
    Mutation(
        "a selection with too many pairs goes by those that have a place",
        _TOPK,
        "fits = (most <= self.capacity) & is_right",
        "fits = (most >= 0) & is_right",
        f"{_T_SELECTION}::test_more_than_fit_are_selected_by_products[topk-mesh0]",
    ),
    Mutation(
        "of a long tie the part with places is selected",
        _TOPK,
        "fits = (most <= self.capacity) & is_right",
        "fits = most <= self.capacity",
        f"{_T_SELECTION}::test_a_tie_too_long_for_a_row_s_places_is_noticed",
    ),
    Mutation(
        "a selection with too many pairs isn't tried again from its bound",
        _SELECTION,
        "(state[1] > capacity)",
        "(state[1] < 0)",
        f"{_T_SELECTION}::test_if_the_largest_come_last_a_second_pass_finds_room",
    ),
    Mutation(
        "all dead latents predict what the others missed",
        _LISTED,
        'wanted = jax.lax.psum(listed.num_dead, "model") > k',
        'wanted = jax.lax.psum(listed.num_dead, "model") > 1000 * k',
        f"{_T_SELECTION}::test_the_largest_dead_ones_predict[mesh0]",
    ),
    Mutation(
        "each part of the width selects its own dead latents",
        _LISTED,
        'jax.lax.psum(jax.lax.fori_loop(0, num_tiles, count, zeros_R), "model")',
        'jax.lax.pmax(jax.lax.fori_loop(0, num_tiles, count, zeros_R), "model")',
        f"{_T_SELECTION}::test_the_largest_dead_ones_predict[mesh3]",
    ),
    Mutation(
        "dead latents step by pairs and by products too",
        _TOPK,
        "alive_F = chosen.fits & ~dead_F",
        "alive_F = chosen.fits & (dead_F | ~dead_F)",
        f"{_T_TOPK}::test_dead_latents_are_touched_once_and_others_rest",
    ),
    Mutation(
        "a dead latent that is selected learns nothing from it",
        _LISTED,
        "jnp.where(fits, from_pairs_SB,",
        "jnp.where(fits, 0 * from_pairs_SB,",
        f"{_T_TOPK}::test_dead_latents_are_touched_once_and_others_rest",
    ),
    Mutation(
        "the dead latents' loss doesn't reach the encoder",
        _LISTED,
        "jnp.where(z_SB > 0, g_z_SB, 0.0)",
        "jnp.where(z_SB > 1e9, g_z_SB, 0.0)",
        f"{_T_TOPK}::test_steps_follow_the_float64_reference[topk-128]",
    ),
    Mutation(
        "gradients of dead latents are averaged over the parts of the batch",
        _LISTED,
        'jax.lax.psum(array, "data") for array in found',
        'jax.lax.pmean(array, "data") for array in found',
        f"{_T_TOPK}::test_pairs_on_many_meshes[batch_topk-2-2-128]",
    ),
    Mutation(
        "BatchTopK's threshold follows another value than the smallest selected",
        "sae_train/sparse/topk_step.py",
        "smallest=chosen.least_B[0]",
        "smallest=1.001 * chosen.least_B[0]",
        f"{_T_TOPK}::test_pairs_on_many_meshes[batch_topk-1-1-128]",
    ),
    Mutation(
        "dead pre-activations of the whole batch are kept",
        _LISTED,
        "PARTS = 16",
        "PARTS = 1",
        f"{_T_TOPK}::test_nothing_as_large_as_all_latents_of_a_batch_is_kept",
    ),
)
