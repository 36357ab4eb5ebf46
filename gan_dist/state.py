"""Everything a checkpoint holds, as native variables by structural name."""

import dataclasses

import numpy as np
import tensorflow as tf

from gan_dist import models
from gan_dist.config import Config
from gan_dist.models import Network
from gan_dist.optimizers import Adam

Variables = dict[str, tf.Variable]

COUNTERS = ("step", "skipped_steps", "consecutive_skips", "attempt")


@dataclasses.dataclass(frozen=True)
class State:
    """The two networks, their variables, and where training stands.

    Attributes:
        generator, discriminator: The networks as functions.
        generator_variables, discriminator_variables: Their values, by the network's names.
        ema: Running average of `generator_variables`, parameters and batch-norm averages alike.
        generator_optimizer, discriminator_optimizer: `count` (updates made) and Adam's moments.
        counters: int64 numbers: `step`, steps done, the one source of the step; `skipped_steps`, how many of them
            changed nothing else; `consecutive_skips`, of these the last ones in a row; `attempt`, how often the run
            went back to a commit for too many of those: it changes noise and order of the data.
    """

    generator: Network
    discriminator: Network
    generator_variables: Variables
    discriminator_variables: Variables
    ema: Variables
    generator_optimizer: Variables
    discriminator_optimizer: Variables
    counters: Variables

    def flat(self) -> Variables:
        """All variables by the key that they have in a checkpoint. The same for every strategy."""
        groups = {
            "generator": self.generator_variables,
            "discriminator": self.discriminator_variables,
            "ema": self.ema,
            "generator_optimizer": self.generator_optimizer,
            "discriminator_optimizer": self.discriminator_optimizer,
        }
        flat = {f"{group}/{name}": v for group, variables in groups.items() for name, v in variables.items()}
        return {**flat, **self.counters}


def networks(config: Config, num_classes: int) -> tuple[Network, Network]:
    """The generator and the discriminator that a configuration describes."""
    return models.create(config.model, config.data, num_classes, config.run.seed, config.devices.precision)


def create(config: Config, strategy: tf.distribute.Strategy, num_classes: int) -> State:
    """The state at step 0, mirrored over the strategy's replicas."""
    generator, discriminator = networks(config, num_classes)
    with strategy.scope():
        return State(
            generator=generator,
            discriminator=discriminator,
            generator_variables=_variables(generator.initial),
            discriminator_variables=_variables(discriminator.initial),
            ema=_variables(generator.initial),
            generator_optimizer=_variables(_adam_zeros(generator)),
            discriminator_optimizer=_variables(_adam_zeros(discriminator)),
            counters=_variables({name: np.zeros([], np.int64) for name in COUNTERS}),
        )


def _adam_zeros(network: Network) -> dict[str, np.ndarray]:
    slots = {slot: np.zeros_like(network.initial[name]) for name in network.trainable for slot in Adam.slots(name)}
    return {"count": np.zeros([], np.int64), **slots}


def _variables(values: dict[str, np.ndarray]) -> Variables:
    return {
        # Every replica writes the same value to its own copy (optimizers.assign), so nothing is ever aggregated.
        name: tf.Variable(
            tf.convert_to_tensor(value),
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_WRITE,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )
        for name, value in values.items()
    }
