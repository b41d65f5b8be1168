"""The mutations: each names a line, what breaks it, and the test that must turn red."""

from __future__ import annotations

from tests.mutations.kernels import KERNELS
from tests.mutations.mutation import Mutation
from tests.mutations.stores import STORES

_SPARSE, _PAIRS = "sae_train/sparse/jumprelu_step.py", "sae_train/sparse/active_pairs.py"
_ROWS, _SUMS = "sae_train/sparse/latent_updates.py", "sae_train/sparse/segment_sums.py"
_DENSE, _TILES = "sae_train/step/dense_jumprelu.py", "sae_train/step/tile_passes.py"
_GRADIENTS, _OPTIMISER = "sae_train/step/gradients.py", "sae_train/step/optimiser.py"
_EQUATIONS, _T_EQUATIONS = "sae_train/model/jumprelu.py", "tests/sae_train/model/test_jumprelu.py"
_T_PAIRS, _T_SPARSE = (
    "tests/sae_train/sparse/test_pairs.py",
    "tests/sae_train/sparse/test_sparse_step.py",
)
_CONTEXTS = "sae_train/latents/contexts.py"
_BY_SORT = (
    "tests/sae_train/latents/test_compute.py"
    "::test_contexts_are_those_of_a_sort_of_all_firings[jumprelu]"
)
_ON_MESH = f"{_T_SPARSE}::test_pairs_on_many_meshes[4-2-128]"
_BY_REFERENCE = f"{_T_SPARSE}::test_forty_steps_follow_the_float64_reference"


MUTATIONS = (
    *STORES,
    *KERNELS,
    Mutation(
        "the estimator of a threshold's gradient has the opposite sign",
        _EQUATIONS,
        "-theta / bandwidth",
        "theta / bandwidth",
        f"{_T_EQUATIONS}::test_a_step_has_the_gradients_of_the_equations[l0-log-dense]",
    ),
    Mutation(
        "thresholds learn with the opposite sign on the dense path",
        _GRADIENTS,
        "-g_theta_SB.sum(axis=1) / bandwidth",
        "g_theta_SB.sum(axis=1) / bandwidth",
        f"{_T_EQUATIONS}::test_a_step_has_the_gradients_of_the_equations[l0-log-dense]",
    ),
    Mutation(
        "thresholds learn with the opposite sign on the sparse path",
        _ROWS,
        'so_far["threshold"] - g_theta_SC',
        'so_far["threshold"] + g_theta_SC',
        f"{_T_EQUATIONS}::test_a_step_has_the_gradients_of_the_equations[l0-log-sparse]",
    ),
    Mutation(
        "a latent of a Matryoshka SAE learns from one of the prefixes it is part of",
        "sae_train/model/matryoshka.py",
        "[*itertools.accumulate(reversed(own))][::-1]",
        "own",
        "tests/sae_train/step/test_matryoshka.py::test_steps_follow_the_float64_reference[dense]",
    ),
    Mutation(
        "latents of a Matryoshka SAE are released as they lie in training",
        "sae_train/checkpoint/trained.py",
        "np.argsort(latent_at(config))",
        "np.arange(config.width)",
        "tests/sae_train/inference/test_sae_lens.py"
        "::test_a_matryoshka_release_is_a_plain_one_in_the_order_of_prefixes",
    ),
    Mutation(
        "the penalty's gradient in the threshold is lost",
        _EQUATIONS,
        "-1.0 / bandwidth, 0.0)",
        "0.0 / bandwidth, 0.0)",
        f"{_T_EQUATIONS}::test_a_threshold_learns_from_its_window_alone",
    ),
    Mutation(
        "a dense step takes second moments that wait for Adam's",
        _DENSE,
        "decay_F = optimiser.waited_decay(state.step - state.last_touched",
        "decay_F = optimiser.waited_decay(0 * state.last_touched",
        f"{_T_SPARSE}::test_a_dense_step_continues_what_a_sparse_one_left_waiting",
    ),
    Mutation(
        "pairs within the window of a threshold, not active, are left out",
        _GRADIENTS,
        "> -bandwidth / 2",
        "> 0.0",
        f"{_T_PAIRS}::test_pairs_are_all_that_are_active_or_in_the_window",
    ),
    Mutation(
        "the window of a threshold has no gradient",
        _ROWS,
        "jnp.where(window_SC, theta_S[:, None] * g_f_SC + g_step_SC, 0.0)",
        "jnp.where(window_SC & active_SC, theta_S[:, None] * g_f_SC + g_step_SC, 0.0)",
        f"{_BY_REFERENCE}[l0-log-96]",
    ),
    Mutation(
        "pairs without a place aren't counted",
        _PAIRS,
        "total = total + counts_L.sum(dtype=jnp.int32).astype(jnp.float32)",
        "total = written.astype(jnp.float32)",
        f"{_T_PAIRS}::test_pairs_without_a_place_are_counted",
    ),
    Mutation(
        "a step with too many pairs goes by those that have a place",
        _SPARSE,
        "fits = found <= self._capacity",
        "fits = found >= 0",
        f"{_T_SPARSE}::test_too_many_pairs_fall_back_and_are_counted",
    ),
    Mutation(
        "rows are updated on the sparse path and then on the dense one again",
        _SPARSE,
        "longest_first(counts_F, wanted=fits)",
        "longest_first(counts_F)",
        f"{_T_SPARSE}::test_too_many_pairs_fall_back_and_are_counted",
    ),
    Mutation(
        "the device with the fewest pairs says whether all fit",
        "sae_train/model/sharding.py",
        "jax.lax.pmax(value, axes)",
        "jax.lax.pmin(value, axes)",
        f"{_T_SPARSE}::test_one_device_with_too_many_pairs_is_enough_to_fall_back",
    ),
    Mutation(
        "a product in bfloat16 rounds one of its operands",
        "activation_cache/products.py",
        "a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)",
        "a, b = a.astype(jnp.float32), b.astype(jnp.bfloat16).astype(jnp.float32)",
        "tests/sae_train/step/test_precision.py"
        "::test_a_step_is_that_of_rounded_operands[dense-bfloat16]",
    ),
    Mutation(
        "the sparse path's sums leave their weights unrounded",
        "sae_train/sparse/segment_sums.py",
        "weight_SC = rounded(weight_SC, precision=precision)",
        "weight_SC = weight_SC + 0.0",
        "tests/sae_train/step/test_precision.py"
        "::test_a_step_is_that_of_rounded_operands[sparse-bfloat16]",
    ),
    Mutation(
        "a run goes on at another precision than its checkpoint's",
        "sae_train/checkpoint/same_run.py",
        "if earlier == precision:",
        "if earlier:",
        "tests/sae_train/train/test_precision_resume.py"
        "::test_another_precision_is_refused_until_it_is_accepted[bfloat16-auto-float32]",
    ),
    Mutation(
        "the sparse path starts at as many pairs as it stops at",
        _SPARSE,
        "_BEGIN_SPARSE, _END_SPARSE = 0.7, 0.95",
        "_BEGIN_SPARSE, _END_SPARSE = 0.95, 0.95",
        f"{_T_SPARSE}::test_the_sparse_path_starts_at_fewer_pairs_than_it_stops_at[0-0.71-0]",
    ),
    Mutation(
        "the sparse path stops as soon as it may not start",
        _SPARSE,
        "_BEGIN_SPARSE, _END_SPARSE = 0.7, 0.95",
        "_BEGIN_SPARSE, _END_SPARSE = 0.7, 0.7",
        f"{_T_SPARSE}::test_the_sparse_path_starts_at_fewer_pairs_than_it_stops_at[1-0.71-1]",
    ),
    Mutation(
        "reconstructions of the parts of the width are averaged",
        _DENSE,
        'sum_over("model", decoded_BD, mesh=mesh)',
        'sum_over("model", decoded_BD / mesh.shape["model"], mesh=mesh)',
        _ON_MESH,
    ),
    Mutation(
        "frequencies are those of a part of the batch",
        _DENSE,
        'sum_over("data", active_F, mesh=mesh)',
        'sum_over("data", active_F / mesh.shape["data"], mesh=mesh)',
        _ON_MESH,
    ),
    Mutation(
        "the norm that clips is that of a part of the width",
        _DENSE,
        "sums.squares, sums.projected), mesh",
        'sums.squares / self._mesh.shape["model"], sums.projected), mesh',
        _ON_MESH,
    ),
    Mutation(
        "all parts of the batch take their rows from the first",
        _SPARSE,
        "(pairs.row_P[:, 0] + first_row[:, None])",
        "(pairs.row_P[:, 0] + 0 * first_row[:, None])",
        _ON_MESH,
    ),
    Mutation(
        "a step by tiles averages the gradients of the parts of the batch",
        _TILES,
        'gradients = sum_over("data", gradients, mesh=mesh)',
        'gradients = sum_over("data", gradients, mesh=mesh)\n'
        '        gradients = jax.tree.map(lambda g: g / mesh.shape["data"], gradients)',
        f"{_T_SPARSE}::test_pairs_on_many_meshes[2-4-36]",
    ),
    Mutation(
        "of rows of one L0 the last is decoded as the first",
        _SUMS,
        "back_B = jnp.argsort(segments.ids_N)[:num_rows]",
        "back_B = segments.ids_N[:num_rows]",
        f"{_T_PAIRS}::test_decoding_pairs_is_the_product",
    ),
    Mutation(
        "the decoder's gradient keeps its part along the row",
        _OPTIMISER,
        'return updates | {"W_dec": remove_parallel(updates["W_dec"], rows_FD=params["W_dec"])}',
        "return updates",
        f"{_BY_REFERENCE}[l0-log-96]",
    ),
    Mutation(
        "touched rows of the decoder aren't made unit again",
        _OPTIMISER,
        'new["W_dec"] = unit_rows(rows_FD)',
        'new["W_dec"] = 1.0 * new["W_dec"]',
        f"{_BY_REFERENCE}[l0-log-96]",
    ),
    Mutation(
        "the error's gradient isn't clipped",
        _GRADIENTS,
        "g_BD=factor * self.g_BD",
        "g_BD=self.g_BD",
        f"{_T_SPARSE}::test_a_clipped_gradient_is_clipped_the_same_way",
    ),
    Mutation(
        "a second moment decays once, however long its latent rested",
        _OPTIMISER,
        "second_moment[name] * _per_row(decay_F, like=param)",
        "second_moment[name] + 0.0 * _per_row(decay_F, like=param)",
        f"{_T_SPARSE}::test_latents_that_rest_are_as_if_they_had_stepped",
    ),
    Mutation(
        "momentum isn't corrected for its start at zero",
        _OPTIMISER,
        "m / (correction * (jnp.sqrt(v) + epsilon))",
        "m / (jnp.sqrt(v) + epsilon)",
        "tests/sae_train/step/test_momentum.py::test_updates_are_torch_s_adam",
    ),
    Mutation(
        "momentum is forgotten from step to step",
        "sae_train/train/train_step.py",
        "first_moment=result.first_moment",
        "first_moment=state.first_moment",
        "tests/sae_train/step/test_momentum.py::test_thirty_steps_follow_the_float64_reference",
    ),
    Mutation(
        "momentum averages the gradients of the parts of the batch",
        _TILES,
        'return sum_over("data", gradients, mesh=mesh)',
        'return sum_over("data", jax.tree.map(lambda g: g / mesh.shape["data"], gradients), '
        "mesh=mesh)",
        "tests/sae_train/step/test_momentum.py::test_a_mesh_has_the_same_momentum[mesh0]",
    ),
    Mutation(
        "with momentum b_dec learns from the encoder of a part of the width",
        _DENSE,
        'return whole, sum_over("model", encoded_D, mesh=self._mesh)',
        'return whole, sum_over("model", encoded_D / self._mesh.shape["model"], mesh=self._mesh)',
        "tests/sae_train/step/test_momentum.py::test_a_mesh_has_the_same_momentum[mesh1]",
    ),
    Mutation(
        "a second moment's decay is one step short",
        _OPTIMISER,
        "jnp.exp(steps_F.astype(jnp.float32) * math.log(beta2))",
        "jnp.exp((steps_F - 1).astype(jnp.float32) * math.log(beta2))",
        f"{_T_PAIRS}::test_lazy_updates_are_optax_s_adam_over_four_thousand_steps",
    ),
    Mutation(
        "when latents were last touched is lost in a checkpoint",
        "sae_train/checkpoint/checkpoints.py",
        '{problem}")\n        return state\n',
        '{problem}")\n'
        "        forgotten = dict(vars(state), last_touched=0 * state.last_touched + step)\n"
        "        return type(state)(**forgotten)\n",
        "tests/sae_train/sparse/test_sparse_resume.py::test_second_moments_that_wait_are_restored_on_another_mesh",
    ),
    Mutation(
        "a sparse step keeps pre-activations of the whole width",
        "sae_train/step/tiles.py",
        "LARGEST_TILE = 1024",
        "LARGEST_TILE = 1 << 20",
        "tests/sae_train/sparse/test_sparse_memory.py::"
        "test_a_million_latents_take_little_more_than_their_state_and_the_batch",
    ),
    Mutation(
        "how steps went isn't in the state",
        "sae_train/train/train_step.py",
        "sparse=result.is_sparse.astype(jnp.int32),",
        "sparse=0 * result.is_sparse.astype(jnp.int32),",
        f"{_T_SPARSE}::test_left_open_a_step_goes_by_pairs_once_they_are_few",
    ),
    Mutation(
        "contexts of equal values go by the latest sequence",
        _CONTEXTS,
        "np.lexsort((-firings.values[firsts], firings.latents[firsts]))  # stable",
        "np.lexsort((-firsts, -firings.values[firsts], firings.latents[firsts]))",
        _BY_SORT,
    ),
    Mutation(
        "a context begins a quarter before its token, not three quarters",
        _CONTEXTS,
        "positions_C - 3 * self.size // 4",
        "positions_C - self.size // 4",
        _BY_SORT,
    ),
    Mutation(
        "the weight of KL has a gradient of its own",
        "sae_train/end_to_end/loss.py",
        "jax.lax.stop_gradient(mse / (kl + _SMALLEST_KL))",
        "mse / (kl + _SMALLEST_KL)",
        "tests/sae_train/end_to_end/test_gradient.py"
        "::test_loss_and_gradient_are_theirs[gemma2-resid_post.0-mesh0]",
    ),
)
