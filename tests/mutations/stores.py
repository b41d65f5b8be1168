"""Mutations of stores: the order of a rolling one, its window, packed rows, imports."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

_ORDER, _T_ORDER = "activation_cache/store/order.py", "tests/activation_cache/store/test_order.py"
_ROLLING = "activation_cache/store/rolling.py"
_PACKED = "activation_cache/store/tap_array.py"
_T_PACKED = "tests/activation_cache/store/test_tap_array.py"
_BESIDE = "tests/launch/processes/test_rolling_beside.py"


STORES = (
    Mutation(
        "a stretch of a rolling store reads its buckets one after the other",
        _ORDER,
        "blocks = dealt[Permutation(len(dealt), key).forward(np.arange(len(dealt)))]",
        "blocks = dealt[np.arange(len(dealt)) + 0 * key]",
        f"{_T_ORDER}::test_the_rolling_order_is_the_documented_one",
    ),
    Mutation(
        "a stretch of a rolling store reads from a bucket beyond its window",
        _ORDER,
        "range(max(0, bucket - self.window + 1),",
        "range(max(0, bucket - self.window),",
        f"{_T_ORDER}::test_a_rolling_order_reads_every_row_once_from_its_window",
    ),
    Mutation(
        "a bucket whose rows are deleted still counts as whole",
        _ROLLING,
        "    commit_file(store, bucket).unlink(missing_ok=True)\n",
        "",
        f"{_T_PACKED}::test_a_rolling_window_deletes_the_bucket_that_is_meant",
    ),
    Mutation(
        "a harvest deletes what a trainer that has moved back reads",
        "activation_cache/harvest/rolling.py",
        "if read_reading(self.path) != reading:",
        "if reading.is_over:",
        f"{_BESIDE}"
        "::test_a_trainer_that_moves_back_loses_no_bucket_to_a_harvest_that_has_not_seen_it",
    ),
    Mutation(
        "halves of packed rows are rounded up",
        _PACKED,
        "np.rint(x_ND, out=x_ND)",
        "np.floor(x_ND + np.float32(0.5))",
        f"{_T_PACKED}::test_halves_are_rounded_to_even",
    ),
    Mutation(
        "a packed row is read with the scale of the block's first",
        _PACKED,
        "rows_ND *= row_scale[span, None]",
        "rows_ND *= row_scale[:1, None]",
        f"{_T_PACKED}::test_a_block_is_read_as_the_formulas_say",
    ),
    Mutation(
        "imported rows lie in a bucket as they came",
        "activation_cache/rows/fill_bucket.py",
        "return order.forward(np.arange(rows))",
        "return order.inverse(order.forward(np.arange(rows)))",
        "tests/activation_cache/harvest/test_imported_harvest.py"
        "::test_an_import_is_the_harvest_of_its_rows",
    ),
)
