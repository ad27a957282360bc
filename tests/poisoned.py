"""A training whose loss a poisoned character spoils; as a program, one of several processes of it."""

import dataclasses
import sys
from pathlib import Path

import jax.numpy as jnp
from small import experiment

import experiments
from experiments.run import main
from gdn_jax import train

STEPS, LR = 46, 1e-2
POISON = {"nan": "\x01", "large": "\x02"}  # a batch that holds one has a loss of nan, or a hundred times its own
LOSS = train.next_token_loss


def loss(model, batch, compute):
    nan, large = ((batch["tokens"] == ord(POISON[kind])).any() for kind in ("nan", "large"))
    return LOSS(model, batch, compute) * jnp.where(nan, jnp.nan, jnp.where(large, 100.0, 1.0))


def spiking(home, directory, on_spike, lr):
    found = experiment(home, dir=str(directory), on_spike=on_spike, keep=9, save_every=10, eval_every=STEPS)
    return dataclasses.replace(found, optim=dataclasses.replace(found.optim, steps=STEPS, lr=lr))


if __name__ == "__main__":
    home, directory, on_spike, lr = sys.argv[1:]
    train.next_token_loss = loss
    experiments.EXPERIMENTS["test/small"] = spiking(Path(home), directory, on_spike, float(lr))
    sys.exit(main(["train", "test/small"]))
