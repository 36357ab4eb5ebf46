"""`python -m gan_dist.sample`: images from a run's checkpoint, as a grid or as an array."""

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gan_dist import cli, workdir
from gan_dist import config as config_lib
from gan_dist.config import Config, SampleConfig
from gan_dist.errors import CheckpointError, EnvironmentFault, UsageError

if TYPE_CHECKING:
    import numpy as np

    from gan_dist.models import Network, Values

# Images made at once.
_CHUNK = 100
# A row of a labelled grid.
_COLUMNS = 10


def compile_generator(
    network: "Network", config: Config, stream_key: int
) -> "Callable[[Values, np.ndarray | int], np.ndarray]":
    """Images from the generator with its batch-norm averages: no image depends on another.

    Args:
        network: The generator.
        config: The run's settings.
        stream_key: Names the noise; row i of it makes image i.

    Returns:
        A function of the variables' values and of a class for each image (or, without labels, of the number of
        images) to `[N, H, W, C]` uint8. It is traced once.
    """
    import numpy as np
    import tensorflow as tf

    from gan_dist import images, rng
    from gan_dist.models import ARCHITECTURES

    model = config.model
    dtype = network.initial[network.trainable[0]].dtype

    @tf.function
    def chunk(values: "Values", first_row: tf.Tensor, labels_B: tf.Tensor) -> tf.Tensor:
        noise_BZ = rng.normal(stream_key, 0, first_row, _CHUNK, model.latent_size)
        latent_BZ = tf.cast(noise_BZ * model.latent_stddev + model.latent_mean, dtype)
        one_hot = tf.one_hot(labels_B, network.num_classes, dtype=dtype) if network.num_classes else None
        return network(values, latent_BZ, one_hot, None)[0]

    def generate(values: "Values", labels: "np.ndarray | int") -> np.ndarray:
        total = labels if isinstance(labels, int) else len(labels)
        # Whole chunks: another shape would be traced again.
        classes = np.zeros(-(-total // _CHUNK) * _CHUNK, np.int32)
        if not isinstance(labels, int):
            classes[:total] = labels
        tensors = {name: tf.convert_to_tensor(value) for name, value in values.items()}
        pixels = [
            images.unscale(
                chunk(tensors, tf.constant(row), tf.constant(classes[row : row + _CHUNK])).numpy(),
                ARCHITECTURES[model.architecture].image_range,
            )
            for row in range(0, len(classes), _CHUNK)
        ]
        return np.concatenate(pixels)[:total]

    return generate


def grid_labels(num_images: int, num_classes: int) -> "np.ndarray":
    """The classes of a labelled grid: row r asks for class r mod `num_classes`."""
    import numpy as np

    return (np.arange(num_images) // _COLUMNS % num_classes).astype(np.int32)


def grid_columns(num_images: int, num_classes: int) -> int:
    """Pictures a row: so many that rows are classes, or that the grid is square."""
    return _COLUMNS if num_classes else math.ceil(math.sqrt(num_images))


def main(argv: Sequence[str]) -> None:
    """Reads flags and a run's folder, writes a .png or .npz."""
    parsed = cli.parse(argv, "sample", SampleConfig)
    options: SampleConfig = parsed.own
    folder = Path(parsed.config.run.workdir)
    stored = workdir.read_config(folder)
    if stored is None:
        raise UsageError(f"--workdir={folder} holds no run (no config.json); give the folder of one.")
    for name, (run_value, flag) in config_lib.differences(stored, parsed.config, identity=True).items():
        if name in parsed.given:
            raise UsageError(f"--{name}={flag} contradicts the run's {run_value}; take the flag out.")
    if options.label >= 0 and not stored.model.conditional:
        raise UsageError(f"--label={options.label} needs a conditional model, and this run's is not; take it out.")
    output = Path(options.output) if options.output else folder / workdir.SAMPLES / "sample.png"
    if output.suffix not in (".png", ".npz"):
        raise UsageError(f"--output={output} must end in .png (a grid) or .npz (an array).")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

    import numpy as np

    from gan_dist import checkpoints, data, images, rng, state, strategy

    num_classes = data.num_classes(stored.data) if stored.model.conditional else 0
    if options.label >= max(num_classes, 1):
        raise UsageError(f"--label={options.label} is not a class; give 0 to {num_classes - 1}.")
    # One device draws; which one, is for this machine to say and not for the run.
    own = dataclasses.replace(parsed.config.devices, strategy="single", num_devices=1, virtual_devices_per_gpu=1)
    if "accelerator" not in parsed.given:
        # In the run's flagfile it says where to train.
        own = dataclasses.replace(own, accelerator="auto")
    scope = strategy.create(dataclasses.replace(own, precision=stored.devices.precision))
    generator, _ = state.networks(stored, data.num_classes(stored.data))
    commits = folder / workdir.CHECKPOINTS
    step = _step(commits, options.checkpoint_step)
    group = "ema" if options.use_ema else "generator"
    arrays = checkpoints.read(commits, step, [f"{group}/{name}" for name in generator.initial])
    values = {key.removeprefix(f"{group}/"): array for key, array in arrays.items()}

    count = options.num_images
    labels = count
    if num_classes:
        labels = grid_labels(count, num_classes) if options.label < 0 else np.full(count, options.label, np.int32)
    with scope.scope():
        pixels = compile_generator(generator, stored, rng.key(options.sample_seed, "sample"))(values, labels)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".png":
            picture = images.grid(pixels, grid_columns(count, num_classes))
            workdir.write_whole(output, images.encode_png(picture))
        elif isinstance(labels, int):
            np.savez_compressed(output, images=pixels)
        else:
            np.savez_compressed(output, images=pixels, labels=labels)
    except OSError as error:
        raise EnvironmentFault(f"--output={output} cannot be written: {error.strerror}. Give another path.") from error
    print(f"{output}: {count} images from step {step}", file=sys.stderr)


def _step(commits: Path, asked: int) -> int:
    """The step to draw from: the one asked for, or the newest that is whole."""
    from gan_dist import checkpoints

    if asked < 0:
        newest = checkpoints.newest_valid(commits)
        if newest is None:
            raise CheckpointError(
                f"{commits} holds no commit yet; wait for the run's first, or give another --workdir."
            )
        return newest
    if asked not in checkpoints.steps(commits):
        raise UsageError(f"--checkpoint_step={asked} is not there; there are {checkpoints.steps(commits)}.")
    checkpoints.verify(commits, asked)
    return asked


if __name__ == "__main__":
    cli.run(main)
