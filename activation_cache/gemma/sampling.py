"""Continuations of prompts, sampled with a key-value cache.

The prompts run through the model once, then one token of each row at a time, against the keys and
values of all tokens before it. The layers are those of `forward`; a row's numbers are those of the
forward without a cache, to rounding. Rows may be of different lengths: they are padded on the
right, and each new token takes the place after its row's last, so that a key's place is its
position.

A program is compiled for each number of rows, bucket of prompt lengths and bucket of lengths with
what is sampled (powers of two), and for each set of splices.

Legend: B rows, S prompt positions, T positions with room for what is sampled, N sampled tokens,
G key-value heads, E head dim, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from activation_cache.gemma.attention import attend, attend_cached, rope
from activation_cache.gemma.config import GemmaConfig
from activation_cache.gemma.forward import Gemma
from activation_cache.gemma.params import on_all
from activation_cache.gemma.taps import Splice, Tap, check_tap
from activation_cache.precision import Precision
from activation_cache.runtime.errors import UserError

TOKENS_AT_A_TIME = 8  # sampled between two looks at the clock, the stop tokens and the listener
_SHORTEST_BUCKET = 16

# Of a splice, what is compiled into the program.
_Static = tuple[Tap, Callable[..., Array], Tap | None]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        new_tokens: at most so many for each row.
        temperature: logits are divided by it; 0 takes the most likely token.
        seed: of the draws. Row b draws from (seed, b) and the token's number alone: what other rows
            hold makes no difference.
        stop_ids: a row ends with the first of these.
        unspliced_ids: splices leave the activations of these tokens alone, such as BOS's.
    """

    new_tokens: int = 32
    temperature: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    unspliced_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Continuation:
    """What was sampled for one prompt.

    Attributes:
        tokens: the sampled ids, a stop token included.
        log_probabilities: of each, in nats, at temperature 1.
        stopped: whether a stop token ended it, rather than `Sampling.new_tokens`.
    """

    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    stopped: bool


@struct.dataclass
class _State:
    """Between two tokens: the cache, and the logits of the next token."""

    keys: list[Float[Array, "B T G E"]]
    values: list[Float[Array, "B T G E"]]
    logits_BV: Float[Array, "B V"]
    position_B: Int[Array, " B"]  # of the next token
    done_B: Bool[Array, " B"]


@struct.dataclass
class _Draws:
    """`Sampling` on the devices."""

    first: Int[Array, ""]  # number of the first token to draw
    temperature: Float[Array, ""]
    seed: Array
    stops: Int[Array, " stops"]
    unspliced: Int[Array, " unspliced"]


def sample(
    config: GemmaConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    how: Sampling,
    mesh: Mesh,
    precision: Precision,
    splices: Sequence[Splice] = (),
    listener: Callable[[list[Continuation]], None] = lambda so_far: None,
) -> list[Continuation]:
    """Continue each prompt.

    On a mesh with devices of several processes all of them call it with the same, and each gets the
    whole result.

    Args:
        params: the tree that `params.parameter_table` describes, on the devices of `mesh`.
        prompts: ids, BOS included.
        splices: applied to prompts and to what is sampled. `replace` gets [B, S, D] of the prompts
            and then [B, 1, D] of each new token, so its arguments may not depend on positions.
        listener: called with what there is, every `TOKENS_AT_A_TIME` tokens; what it raises ends
            the sampling.

    Raises:
        UserError: an empty prompt, ids that the model doesn't embed, a prompt and `new_tokens` that
            don't fit the model's context, a temperature below 0, a splice at a layer that the model
            doesn't have.
    """
    _check(config, prompts, how)
    for splice in splices:
        check_tap(splice.tap, config)
    static = tuple((splice.tap, splice.replace, splice.reads) for splice in splices)
    arguments = tuple(splice.arguments for splice in splices)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    rounds = -(-how.new_tokens // TOKENS_AT_A_TIME)
    room = _bucket(int(lengths.max()) + rounds * TOKENS_AT_A_TIME)
    draws = _draws(how, mesh)
    prefill, extend = _programs(config, mesh, precision, static)
    prompt_tokens, length_B = (_put(one, mesh) for one in (_padded(prompts), lengths))
    state = prefill(room, params, arguments, prompt_tokens, length_B, draws.unspliced)
    tokens = np.zeros((len(prompts), 0), np.int32)
    chances = np.zeros((len(prompts), 0), np.float32)
    for number in range(rounds):
        first = _put(np.int32(number * TOKENS_AT_A_TIME), mesh)
        state, *new = extend(params, arguments, state, dataclasses.replace(draws, first=first))
        new_tokens, chance, done = map(np.asarray, new)
        tokens = np.concatenate([tokens, new_tokens], axis=1)
        chances = np.concatenate([chances, chance], axis=1)
        found = _continuations(tokens, chances, how)
        listener(found)
        if done.all():
            break
    return found


def _put(values: np.ndarray | np.generic, mesh: Mesh) -> Array:
    array = np.asarray(values)
    return jax.make_array_from_callback(array.shape, on_all(mesh), lambda index: array[index])


def _draws(how: Sampling, mesh: Mesh) -> _Draws:
    numbers = (np.int32(0), np.float32(how.temperature), np.uint32(how.seed % 2**32))
    return _Draws(
        *(_put(one, mesh) for one in (*numbers, _ids(how.stop_ids), _ids(how.unspliced_ids)))
    )


def _padded(prompts: Sequence[Sequence[int]]) -> Int[np.ndarray, "B S"]:
    tokens_BS = np.zeros((len(prompts), _bucket(max(map(len, prompts)))), np.int32)
    for row, prompt in zip(tokens_BS, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens_BS


def _check(config: GemmaConfig, prompts: Sequence[Sequence[int]], how: Sampling) -> None:
    if not prompts or not all(prompts):
        raise UserError("there is an empty prompt: a continuation needs at least one token, BOS")
    ids = [token for prompt in prompts for token in prompt]
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise UserError(
            f"token ids are {min(ids)} to {max(ids)} and the model embeds 0 to "
            f"{config.vocab_size - 1}: tokenise the text with the model's own tokenizer"
        )
    if how.new_tokens < 1 or not 0 <= how.temperature < float("inf"):
        raise UserError(
            f"{how.new_tokens} new tokens at temperature {how.temperature:g} were asked for: at "
            "least 1 new token, and a temperature from 0 on"
        )
    longest = max(map(len, prompts))
    if longest + how.new_tokens > config.context_length:
        raise UserError(
            f"the text has {longest} tokens and {how.new_tokens} new ones were asked for, and the "
            f"model's context has {config.context_length}: shorten the text to at most "
            f"{max(0, config.context_length - how.new_tokens)} tokens, or ask for fewer"
        )


def _bucket(length: int) -> int:
    """The power of two from `length` on, at least `_SHORTEST_BUCKET`."""
    return max(_SHORTEST_BUCKET, 1 << (length - 1).bit_length())


def _ids(ids: Sequence[int]) -> Int[np.ndarray, " ids"]:
    return np.array(ids, np.int32)


def _continuations(
    tokens_BN: Int[np.ndarray, "B N"], chances_BN: Float[np.ndarray, "B N"], how: Sampling
) -> list[Continuation]:
    """Each row up to its stop token, or to the number of tokens asked for."""
    found = []
    for tokens, chances in zip(tokens_BN, chances_BN, strict=True):
        ends = np.flatnonzero(np.isin(tokens[: how.new_tokens], _ids(how.stop_ids)))
        end = int(ends[0]) + 1 if len(ends) else how.new_tokens
        ids, logs = tokens[:end].tolist(), chances[:end].tolist()
        found.append(Continuation(tuple(ids), tuple(logs), stopped=bool(len(ends))))
    return found


@functools.lru_cache(maxsize=64)
def _programs(
    config: GemmaConfig, mesh: Mesh, precision: Precision, static: tuple[_Static, ...]
) -> tuple[Callable[..., _State], Callable[..., tuple[_State, Array, Array, Array]]]:
    """`_prefill` and `_extend`, compiled for each shape they are called with."""
    model, whole = Gemma(config, mesh, precision=precision), on_all(mesh)
    return (
        jax.jit(functools.partial(_prefill, model, static), static_argnums=0),
        jax.jit(
            functools.partial(_extend, model, static),
            donate_argnums=2,
            out_shardings=(None, whole, whole, whole),
        ),
    )


def _prefill(
    model: Gemma,
    static: tuple[_Static, ...],
    room: int,
    params: Any,
    arguments: Any,
    tokens_BS: Int[Array, "B S"],
    length_B: Int[Array, " B"],
    unspliced: Int[Array, " ids"],
) -> _State:
    """The prompts' keys and values, with room for `room` tokens, and their next tokens' logits."""
    cache = _PromptCache(room)
    logits_BV: Any = model.apply(
        {"params": params},
        tokens_BS,
        length_B - 1,
        attend=cache.attend,
        splices=_masked(static, arguments, spliced_BS=~jnp.isin(tokens_BS, unspliced)),
        method=Gemma.next_logits,
    )
    done_B = jnp.zeros(len(tokens_BS), bool)
    return _State(cache.keys, cache.values, logits_BV, length_B, done_B)


def _extend(
    model: Gemma,
    static: tuple[_Static, ...],
    params: Any,
    arguments: Any,
    state: _State,
    draws: _Draws,
) -> tuple[_State, Int[Array, "B N"], Float[Array, "B N"], Bool[Array, " B"]]:
    """`TOKENS_AT_A_TIME` tokens more: the state, the tokens, their log-probabilities, the ended."""
    rows = jnp.arange(len(state.done_B), dtype=jnp.uint32)
    key_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(draws.seed)))(rows)

    def one(state: _State, number: Array) -> tuple[_State, tuple[Array, Array]]:
        token_B = _choose(state.logits_BV, key_B, number, draws.temperature)
        log_BV = jax.nn.log_softmax(state.logits_BV, axis=-1)
        chance_B = jnp.take_along_axis(log_BV, token_B[:, None], axis=1)[:, 0]
        spliced_BS = ~jnp.isin(token_B[:, None], draws.unspliced)
        cache = _GrowingCache(state)
        logits_BV: Any = model.apply(
            {"params": params},
            token_B[:, None],
            jnp.zeros_like(token_B),
            attend=cache.attend,
            splices=_masked(static, arguments, spliced_BS=spliced_BS),
            method=Gemma.next_logits,
        )
        done_B, next_B = state.done_B | jnp.isin(token_B, draws.stops), state.position_B + 1
        after = _State(cache.keys, cache.values, logits_BV, next_B, done_B)
        return after, (token_B, chance_B)

    numbers = draws.first + jnp.arange(TOKENS_AT_A_TIME, dtype=jnp.int32)
    state, (token_NB, chance_NB) = jax.lax.scan(one, state, numbers)
    return state, token_NB.T, chance_NB.T, state.done_B


def _masked(
    static: tuple[_Static, ...], arguments: Any, *, spliced_BS: Bool[Array, "B S"]
) -> list[Splice]:
    """The splices, each leaving the tokens alone where `spliced_BS` is False."""

    def where(replace: Callable[..., Array], acts_BSD: Array, own: Any, **read: Array) -> Array:
        new_BSD = replace(acts_BSD, own, **read).astype(acts_BSD.dtype)
        return jnp.where(spliced_BS[:, :, None], new_BSD, acts_BSD)

    return [
        Splice(tap, functools.partial(where, replace), own, reads)
        for (tap, replace, reads), own in zip(static, arguments, strict=True)
    ]


def _choose(
    logits_BV: Float[Array, "B V"],
    key_B: Key[Array, " B"],
    number: Int[Array, ""],
    temperature: Float[Array, ""],
) -> Int[Array, " B"]:
    """A draw from softmax(logits / temperature), by the Gumbel trick; at 0 the largest."""

    def noise(key: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, number), logits_BV.shape[1:])

    # logits + temperature * noise has its maximum where logits / temperature + noise has.
    return jnp.argmax(logits_BV + temperature * jax.vmap(noise)(key_B), axis=-1).astype(jnp.int32)


class _PromptCache:
    """Attention of the prompts, whose keys and values are kept, layer by layer, with more room."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.keys: list[Array] = []
        self.values: list[Array] = []

    def attend(
        self, q_BSHE: Array, k_BSGE: Array, v_BSGE: Array, *, base: float, factor: float, **how: Any
    ) -> Array:
        q_BSHE, k_BSGE = (rope(x, base=base, factor=factor) for x in (q_BSHE, k_BSGE))
        padding = ((0, 0), (0, self.room - k_BSGE.shape[1]), (0, 0), (0, 0))
        self.keys.append(jnp.pad(k_BSGE, padding))
        self.values.append(jnp.pad(v_BSGE, padding))
        return attend(q_BSHE, k_BSGE, v_BSGE, **how)


class _GrowingCache:
    """Attention of one new token a row, whose key and value are put at the row's position."""

    def __init__(self, state: _State) -> None:
        self.position_B = state.position_B
        self.before = iter(zip(state.keys, state.values, strict=True))
        self.keys: list[Array] = []
        self.values: list[Array] = []

    def attend(
        self, q_B1HE: Array, k_B1GE: Array, v_B1GE: Array, *, base: float, factor: float, **how: Any
    ) -> Array:
        keys, values = next(self.before)
        positions = (self.position_B[:, None], keys.shape[1])
        q_B1HE, k_B1GE = (
            rope(x, base=base, factor=factor, positions=positions) for x in (q_B1HE, k_B1GE)
        )
        rows = jnp.arange(len(self.position_B))
        self.keys.append(keys.at[rows, self.position_B].set(k_B1GE[:, 0]))
        self.values.append(values.at[rows, self.position_B].set(v_B1GE[:, 0]))
        return attend_cached(q_B1HE, self.keys[-1], self.values[-1], self.position_B, **how)
