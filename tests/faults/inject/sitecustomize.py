"""Python imports this at start-up where this folder is on its path: it puts the fault that a test asked for in place.

`FAULT` is one of: `stuck:<step>` (a worker whose index is 1 sleeps for ever at that step), `nan:<step>` and `nan:all`
(the generator's noise of that step, or of all, is NaN on the first replica), `clock:<seconds>` (the clock is wrong by
so much).
"""

import importlib.machinery
import json
import os
import sys
import time

KIND, _, VALUE = os.environ.get("FAULT", "").partition(":")


def stick(data):
    real = data.order

    def order(seed, first, last, *rest):
        if first <= int(VALUE) < last and json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 1:
            time.sleep(3600)
        return real(seed, first, last, *rest)

    data.order = order


def poison(rng):
    import tensorflow as tf

    real, poisoned = rng.normal, rng.key(0, "noise/g")

    def normal(stream_key, clock, first_row, rows, size):
        noise = real(stream_key, clock, first_row, rows, size)
        if stream_key != poisoned:
            return noise
        bad = tf.equal(first_row, 0) & (VALUE == "all" or tf.equal(clock, int(VALUE)))
        return tf.where(bad, tf.fill(tf.shape(noise), float("nan")), noise)

    rng.normal = normal


PATCHES = {"stuck": ("gan_dist.data", stick), "nan": ("gan_dist.rng", poison)}


class Patcher:
    def find_spec(self, name, path, target=None):
        module, patch = PATCHES[KIND]
        if name != module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_patch(loaded):
            execute(loaded)
            patch(loaded)

        spec.loader.exec_module = execute_and_patch
        return spec


if KIND in PATCHES:
    sys.meta_path.insert(0, Patcher())
if KIND == "clock":
    wall = time.time
    time.time = lambda: wall() + float(VALUE)
