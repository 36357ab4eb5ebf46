"""One adversarial update, replicated over every device of a strategy, and the compiled loop around it.

A step is a pure function of (state, seed, step): its images come by index from `rng.example_order`, its noise by row.

Dimension key for name suffixes:
  S  steps in a block   N  examples of the data set   G  global batch   B  images on one replica
  H, W  height and width, pixels   C  channels   Z  latent size   K  classes
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from gan_dist import images, optimizers, rng
from gan_dist.config import Config
from gan_dist.layout import Layout
from gan_dist.losses import OBJECTIVES
from gan_dist.models import ARCHITECTURES, BatchStatistics
from gan_dist.optimizers import Adam
from gan_dist.state import State, Variables

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
        pixels: `[N, H, W, C]` uint8 on each replica.
        labels: `[N]` int32 on each replica.
    """
    replicas = layout.replicas
    update = _update(config, state, layout)
    # Noise is drawn outside: XLA's Philox walks its counter in another order.
    if config.devices.xla == "on" or (config.devices.xla == "auto" and replicas == 1 and _on_gpu(strategy)):
        update = tf.function(update, jit_compile=True)
    streams = {name: rng.key(config.run.seed, name) for name in ("noise/d", "noise/g", "labels/d", "labels/g")}
    range_of = ARCHITECTURES[config.model.architecture].image_range
    num_classes = state.generator.num_classes
    batch, model = layout.per_replica, config.model
    dtype = state.generator_variables[state.generator.trainable[0]].dtype

    def latent(stream: str, step: tf.Tensor, first_row: tf.Tensor) -> tf.Tensor:
        noise_BZ = rng.normal(streams[stream], step, first_row, batch, model.latent_size)
        return tf.cast(noise_BZ * model.latent_stddev + model.latent_mean, dtype)

    def one_hot(labels_B: tf.Tensor) -> tf.Tensor:
        return tf.one_hot(labels_B, num_classes, dtype=dtype)

    def drawn_labels(stream: str, step: tf.Tensor, first_row: tf.Tensor) -> tf.Tensor | None:
        return one_hot(rng.classes(streams[stream], step, first_row, batch, num_classes)) if num_classes else None

    def replica_step(pixels_NHWC: tf.Tensor, labels_N: tf.Tensor, order_G: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        first_row = layout.first_row(tf.cast(context.replica_id_in_sync_group, tf.int32))
        order_B = order_G[first_row : first_row + batch]
        order_B.set_shape([batch])
        step = tf.convert_to_tensor(state.step)
        scalars = update(
            tf.cast(images.scale(tf.gather(pixels_NHWC, order_B), range_of), dtype),
            one_hot(tf.gather(labels_N, order_B)) if num_classes else None,
            latent("noise/d", step, first_row),
            drawn_labels("labels/d", step, first_row),
            latent("noise/g", step, first_row),
            drawn_labels("labels/g", step, first_row),
        )
        optimizers.assign(state.step, step + 1)
        return scalars

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
    """Discriminator, then generator on fresh noise; returns `SCALARS`, NaN among them where the step was skipped."""
    optim, replicas = config.optim, layout.replicas
    objective = OBJECTIVES[optim.loss]
    generator_adam = Adam(optim.generator_lr, optim.adam_beta1, optim.adam_beta2, optim.adam_epsilon)
    discriminator_adam = Adam(optim.discriminator_lr, optim.adam_beta1, optim.adam_beta2, optim.adam_epsilon)
    decay = ema_decay(optim.ema_half_life_kimg, layout.global_batch)

    def all_reduce(x: tf.Tensor) -> tf.Tensor:
        if replicas == 1:
            return x
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, x)

    def statistics(groups: int) -> BatchStatistics:
        return (
            BatchStatistics(groups, replicas, all_reduce) if config.model.sync_batch_norm else BatchStatistics(groups)
        )

    def read(variables: Variables) -> dict[str, tf.Tensor]:
        return {name: tf.convert_to_tensor(v) for name, v in variables.items()}

    def pack(*scalars: tf.Tensor, averages: dict[str, tf.Tensor]) -> tf.Tensor:
        # The new batch-norm averages travel with the gradients: equal already with sync_batch_norm, and made so
        # without it (the sum over replicas of 1/replicas of each).
        share = [tf.reshape(value, [-1]) / replicas for value in averages.values()]
        return tf.concat([tf.stack(scalars), *share], 0)

    def unpack(extras: tf.Tensor, scalars: int, averages: dict[str, tf.Tensor]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        head, *rest = tf.split(extras, [scalars, *(value.shape.num_elements() for value in averages.values())])
        return head, rest

    def write_averages(variables: Variables, names: dict[str, tf.Tensor], new: list[tf.Tensor], ok: tf.Tensor) -> None:
        for name, value in zip(names, new, strict=True):
            optimizers.assign(variables[name], tf.where(ok, value, tf.convert_to_tensor(variables[name])))

    def update(
        real_BHWC: tf.Tensor,
        real_labels_BK: tf.Tensor | None,
        latent_BZ: tf.Tensor,
        fake_labels_BK: tf.Tensor | None,
        fresh_latent_BZ: tf.Tensor,
        fresh_labels_BK: tf.Tensor | None,
    ) -> tf.Tensor:
        # Discriminator.
        d, g = read(state.discriminator_variables), read(state.generator_variables)
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
        accuracy_real = tf.reduce_sum(tf.cast(real_logits_B > 0, d_loss.dtype)) / layout.global_batch
        accuracy_fake = tf.reduce_sum(tf.cast(fake_logits_B < 0, d_loss.dtype)) / layout.global_batch
        gradients: dict[str, Any] = tape.gradient(d_loss, weights)
        extras = pack(d_loss, accuracy_real, accuracy_fake, averages=averages)
        d_reduced = optimizers.reduce_packed(list(gradients.values()), extras, all_reduce)
        discriminator_adam.apply(
            dict(zip(weights, d_reduced.gradients, strict=True)),
            state.discriminator_variables,
            state.discriminator_optimizer,
            where=d_reduced.finite,
        )
        d_scalars, new = unpack(d_reduced.extras, 3, averages)
        write_averages(state.discriminator_variables, averages, new, d_reduced.finite)

        # Generator, against the discriminator as it is now. Its averages are not moved again.
        d = read(state.discriminator_variables)
        weights = {name: g[name] for name in state.generator.trainable}
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            fake_BHWC, averages = state.generator(g, fresh_latent_BZ, fresh_labels_BK, statistics(1))
            logits_B, _ = state.discriminator(d, fake_BHWC, fresh_labels_BK, statistics(1))
            g_loss = tf.reduce_sum(objective.generator(logits_B)) / layout.global_batch
        gradients = tape.gradient(g_loss, weights)
        g_reduced = optimizers.reduce_packed(list(gradients.values()), pack(g_loss, averages=averages), all_reduce)
        ok = d_reduced.finite & g_reduced.finite
        generator_adam.apply(
            dict(zip(weights, g_reduced.gradients, strict=True)),
            state.generator_variables,
            state.generator_optimizer,
            where=ok,
        )
        g_scalars, new = unpack(g_reduced.extras, 1, averages)
        write_averages(state.generator_variables, averages, new, ok)

        _average(state, decay, ok)
        scalars = tf.stack([g_scalars[0], *tf.unstack(d_scalars), g_reduced.norm, d_reduced.norm])
        return tf.where(ok, scalars, tf.cast(float("nan"), scalars.dtype))

    return update


def ema_decay(half_life_kimg: float, global_batch: int) -> float:
    """The share of the old average that a step keeps: half of it is left after `half_life_kimg` thousand images."""
    return 0.5 ** (global_batch / (1000 * half_life_kimg)) if half_life_kimg else 0.0


def _average(state: State, decay: float, ok: tf.Tensor) -> None:
    """Moves the running average of the generator."""
    count = tf.cast(tf.convert_to_tensor(state.generator_optimizer["count"]), tf.float64)
    # A young average forgets faster, or the initial weights would stay in it for many half-lives
    # (as `num_updates` does in tf.train.ExponentialMovingAverage).
    keep = tf.minimum(tf.constant(decay, tf.float64), (1 + count) / (10 + count))
    rate = tf.where(ok, 1 - keep, tf.zeros_like(keep))
    for name, variable in state.ema.items():
        average, now = tf.convert_to_tensor(variable), tf.convert_to_tensor(state.generator_variables[name])
        optimizers.assign(variable, average + tf.cast(rate, average.dtype) * (now - average))
