"""Hanabi: `jaxmarl/hanabi`."""

import jax.numpy as jnp

from jaxstack.envs.jaxmarl.family import Family

FAMILY = Family(
    ids=("hanabi",),
    horizon=lambda lib, options: None,
    terminal=lambda lib, before, actions, state, done: done,
    mask=lambda lib, state: lib.get_legal_moves(state),
    info=lambda lib, state, info: {"score": state.score.astype(jnp.float32)},
    shared_reward=True,
    notes=("legal moves become the action mask", "reward['__all__'] is dropped"),
)
