"""One adversarial update, replicated over every device of a strategy, and the compiled loop around it.

A step is a pure function of (state, seed, step): its images come by index from `rng.example_order`, its noise by row.

Dimension key for name suffixes:
  S  steps in a block   N  examples of the data set   W  words of eight bytes, in data.pack   G  global batch
  B  images on one replica   H, W  height and width, pixels   C  channels   Z  latent size   K  classes
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from gan_dist import data, images, optimizers, rng
from gan_dist.config import Config
from gan_dist.layout import Layout
from gan_dist.losses import OBJECTIVES
from gan_dist.models import ARCHITECTURES, BatchStatistics
from gan_dist.optimizers import Adam
from gan_dist.state import State

# What a step reports, all of it equal on all replicas.
SCALARS = (
    "loss/generator",
    "loss/discriminator",
    "accuracy/real",
    "accuracy/fake",
    "gradient_norm/generator",
    "gradient_norm/discriminator",
)

# Maps the order of the examples, `[S, G]` int32, to the sums of `SCALARS` over the steps that were not skipped, and the
# number of those that were, after S steps.
Advance = Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


def compile_block(
    config: Config, state: State, strategy: tf.distribute.Strategy, layout: Layout, pixels: Any, labels: Any
) -> Advance:
    """The function that trains a block of steps.

    Args:
        config: The settings.
        state: The variables that it updates.
        strategy: Its replicas share the batch.
        layout: How they share it.
        pixels: The images on each replica, as `data.pack` gives them.
        labels: `[N]` int32 on each replica.
    """
    replicas = layout.replicas
    update = _update(config, state, layout)
    # The noise stays outside: XLA's Philox walks its counter in another order.
    if config.devices.xla == "on" or (config.devices.xla == "auto" and replicas == 1 and _on_gpu(strategy)):
        update = tf.function(update, jit_compile=True)
    streams = {name: rng.key(config.run.seed, name) for name in ("noise/d", "noise/g", "labels/d", "labels/g")}
    range_of = ARCHITECTURES[config.model.architecture].image_range
    num_classes = state.generator.num_classes
    batch, model = layout.per_replica, config.model
    shape_HWC = (config.data.resolution, config.data.resolution, config.data.channels)
    dtype = state.generator_variables[state.generator.trainable[0]].dtype

    def latent(stream: str, step: tf.Tensor, first_row: tf.Tensor) -> tf.Tensor:
        noise_BZ = rng.normal(streams[stream], step, first_row, batch, model.latent_size)
        return tf.cast(noise_BZ * model.latent_stddev + model.latent_mean, dtype)

    def one_hot(labels_B: tf.Tensor) -> tf.Tensor:
        return tf.one_hot(labels_B, num_classes, dtype=dtype)

    def drawn_labels(stream: str, step: tf.Tensor, first_row: tf.Tensor) -> tf.Tensor | None:
        return one_hot(rng.classes(streams[stream], step, first_row, batch, num_classes)) if num_classes else None

    def replica_step(pixels_NW: tf.Tensor, labels_N: tf.Tensor, order_G: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        first_row = layout.first_row(tf.cast(context.replica_id_in_sync_group, tf.int32))
        order_B = order_G[first_row : first_row + batch]
        order_B.set_shape([batch])
        clock = rng.clock(*(tf.convert_to_tensor(state.counters[name]) for name in ("step", "attempt")))
        return update(
            tf.cast(images.scale(data.unpack(tf.gather(pixels_NW, order_B), shape_HWC), range_of), dtype),
            one_hot(tf.gather(labels_N, order_B)) if num_classes else None,
            latent("noise/d", clock, first_row),
            drawn_labels("labels/d", clock, first_row),
            latent("noise/g", clock, first_row),
            drawn_labels("labels/g", clock, first_row),
        )

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, layout.global_batch], tf.int32),
        ]
    )
    def advance(order_SG: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        sums = tf.zeros([len(SCALARS)], dtype)
        skipped = tf.constant(0, tf.int64)
        for i in tf.range(tf.shape(order_SG)[0]):
            per_replica = strategy.run(replica_step, args=(pixels, labels, order_SG[i]))
            # Equal on all replicas: any one will do.
            scalars = strategy.experimental_local_results(per_replica)[0]
            good = tf.reduce_all(tf.math.is_finite(scalars))
            sums += tf.where(good, scalars, tf.zeros_like(scalars))
            skipped += tf.cast(~good, tf.int64)
        return sums, skipped

    return advance


def _on_gpu(strategy: tf.distribute.Strategy) -> bool:
    return all("GPU" in device for device in strategy.extended.worker_devices)


def _update(config: Config, state: State, layout: Layout) -> Callable[..., tf.Tensor]:
    """Discriminator, then generator on fresh noise; returns `SCALARS`, NaN all of them where the step was skipped."""
    optim, replicas = config.optim, layout.replicas
    objective = OBJECTIVES[optim.loss]
    decay = ema_decay(optim.ema_half_life_kimg, layout.global_batch)

    def adam(learning_rate: float) -> Callable[..., tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]]:
        update = Adam(learning_rate, optim.adam_beta1, optim.adam_beta2, optim.adam_epsilon).update
        # No collective and no variable lies inside: XLA makes one pass of it on any number of replicas.
        return update if config.devices.xla == "off" else tf.function(update, jit_compile=True)

    generator_adam, discriminator_adam = adam(optim.generator_lr), adam(optim.discriminator_lr)

    def all_reduce(x: tf.Tensor) -> tf.Tensor:
        if replicas == 1:
            return x
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, x)

    def statistics(groups: int) -> BatchStatistics:
        return (
            BatchStatistics(groups, replicas, all_reduce) if config.model.sync_batch_norm else BatchStatistics(groups)
        )

    def reduced(
        gradients: dict[str, Any], scalars: list[tf.Tensor], averages: dict[str, tf.Tensor]
    ) -> tuple[dict[str, tf.Tensor], tf.Tensor, tf.Tensor, list[tf.Tensor], dict[str, tf.Tensor]]:
        """Gradients, norm, finite flag, scalars and averages, summed over replicas in one all-reduce."""
        # The new batch-norm averages travel with the gradients: equal already with sync_batch_norm, and made so
        # without it (the sum over replicas of 1/replicas of each).
        share = [tf.reshape(value, [-1]) / replicas for value in averages.values()]
        sizes = [value.shape.num_elements() for value in averages.values()]
        sums = optimizers.reduce_packed(list(gradients.values()), tf.concat([tf.stack(scalars), *share], 0), all_reduce)
        head, *rest = tf.split(sums.extras, [len(scalars), *sizes])
        return (
            dict(zip(gradients, sums.gradients, strict=True)),
            sums.norm,
            sums.finite,
            tf.unstack(head),
            dict(zip(averages, rest, strict=True)),
        )

    def update(
        real_BHWC: tf.Tensor,
        real_labels_BK: tf.Tensor | None,
        latent_BZ: tf.Tensor,
        fake_labels_BK: tf.Tensor | None,
        fresh_latent_BZ: tf.Tensor,
        fresh_labels_BK: tf.Tensor | None,
    ) -> tf.Tensor:
        variables = state.flat()
        old = {key: tf.convert_to_tensor(variable) for key, variable in variables.items()}
        d, g = _group(old, "discriminator"), _group(old, "generator")

        # Discriminator.
        fake_BHWC, _ = state.generator(g, latent_BZ, fake_labels_BK, statistics(1))
        both_BHWC = tf.concat([real_BHWC, tf.stop_gradient(fake_BHWC)], 0)
        both_labels_BK = None
        if real_labels_BK is not None and fake_labels_BK is not None:
            both_labels_BK = tf.concat([real_labels_BK, fake_labels_BK], 0)
        weights = {name: d[name] for name in state.discriminator.trainable}
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            logits, averages = state.discriminator(d, both_BHWC, both_labels_BK, statistics(2))
            real_logits_B, fake_logits_B = tf.split(logits, 2)
            # Summed here, divided by the *global* batch: gradients are summed over replicas below, so what Adam sees
            # is the gradient of the mean over the global batch.
            d_loss = tf.reduce_sum(objective.discriminator(real_logits_B, fake_logits_B)) / layout.global_batch
        right = [
            tf.reduce_sum(tf.cast(guess, d_loss.dtype)) / layout.global_batch
            for guess in (real_logits_B > 0, fake_logits_B < 0)
        ]
        gradients, d_norm, d_finite, d_scalars, averages = reduced(
            tape.gradient(d_loss, weights), [d_loss, *right], averages
        )
        new_weights, new_d_optimizer = discriminator_adam(gradients, weights, _group(old, "discriminator_optimizer"))
        new_d = {**new_weights, **averages}

        # Generator, against the discriminator as it will be. Its averages are not moved again.
        weights = {name: g[name] for name in state.generator.trainable}
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            fake_BHWC, averages = state.generator(g, fresh_latent_BZ, fresh_labels_BK, statistics(1))
            logits_B, _ = state.discriminator(new_d, fake_BHWC, fresh_labels_BK, statistics(1))
            g_loss = tf.reduce_sum(objective.generator(logits_B)) / layout.global_batch
        gradients, g_norm, g_finite, g_scalars, averages = reduced(tape.gradient(g_loss, weights), [g_loss], averages)
        new_weights, new_g_optimizer = generator_adam(gradients, weights, _group(old, "generator_optimizer"))
        new_g = {**new_weights, **averages}

        # Nothing has been assigned yet: a step that is not finite leaves no trace but in the counters.
        # After too many such steps in a row the rest of the block stands still: where the run goes back from must not
        # depend on how long a block is.
        going_on = old["consecutive_skips"] < config.limits.max_consecutive_skips
        ok = d_finite & g_finite & going_on
        rate = tf.cast(_ema_rate(decay, old["generator_optimizer/count"]), g_loss.dtype)
        ema = _group(old, "ema")
        new = {
            **_keyed("discriminator", new_d),
            **_keyed("discriminator_optimizer", new_d_optimizer),
            **_keyed("generator", new_g),
            **_keyed("generator_optimizer", new_g_optimizer),
            **_keyed("ema", {name: average + rate * (new_g[name] - average) for name, average in ema.items()}),
            "step": old["step"] + 1,
            "skipped_steps": old["skipped_steps"],
            "consecutive_skips": tf.zeros_like(old["consecutive_skips"]),
            "attempt": old["attempt"],
        }
        skipped = {
            **old,
            **{
                name: old[name] + tf.cast(going_on, tf.int64) for name in ("step", "skipped_steps", "consecutive_skips")
            },
        }
        keys = list(variables)
        optimizers.assign_where(ok, [variables[k] for k in keys], [new[k] for k in keys], [skipped[k] for k in keys])
        scalars = tf.stack([*g_scalars, *d_scalars, g_norm, d_norm])
        return tf.where(ok, scalars, tf.cast(float("nan"), scalars.dtype))

    return update


def ema_decay(half_life_kimg: float, global_batch: int) -> float:
    """The share of the old average that a step keeps: half of it is left after `half_life_kimg` thousand images."""
    return 0.5 ** (global_batch / (1000 * half_life_kimg)) if half_life_kimg else 0.0


def _ema_rate(decay: float, updates: tf.Tensor) -> tf.Tensor:
    """The share of the new weights in the average, after `updates` updates before this one."""
    count = tf.cast(updates + 1, tf.float64)
    # A young average forgets faster, or the initial weights would stay in it for many half-lives
    # (as `num_updates` does in tf.train.ExponentialMovingAverage).
    return 1 - tf.minimum(tf.constant(decay, tf.float64), (1 + count) / (10 + count))


def _group(values: dict[str, tf.Tensor], group: str) -> dict[str, tf.Tensor]:
    """The values of `<group>/<name>`, by name."""
    return {key.removeprefix(f"{group}/"): value for key, value in values.items() if key.startswith(f"{group}/")}


def _keyed(group: str, values: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {f"{group}/{name}": value for name, value in values.items()}
