"""One reduction of all gradients over the replicas, and Adam with the finite flag folded into its update."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Reduced:
    """Gradients summed over replicas.

    Attributes:
        gradients: In the order given.
        norm: Euclidean norm of all of them together.
        finite: Whether the norm and all extras are finite, which no gradient that is not finite lets the norm be. The
            same on every replica.
        extras: The other sums, `[E]`.
    """

    gradients: list[tf.Tensor]
    norm: tf.Tensor
    finite: tf.Tensor
    extras: tf.Tensor


def reduce_packed(
    gradients: Sequence[tf.Tensor], extras: tf.Tensor, all_reduce: Callable[[tf.Tensor], tf.Tensor]
) -> Reduced:
    """Sums gradients and `extras` (`[E]`, same type) over replicas, in one all-reduce."""
    sizes: list[Any] = [g.shape.num_elements() for g in (*gradients, extras)]
    packed = all_reduce(tf.concat([*(tf.reshape(g, [-1]) for g in gradients), extras], 0))
    *flat, extras = tf.split(packed, sizes)
    summed = [tf.reshape(f, g.shape) for f, g in zip(flat, gradients, strict=True)]
    norm = tf.linalg.global_norm(summed)
    # A sum over replicas is finite only if every replica's part is.
    finite = tf.math.is_finite(norm) & tf.reduce_all(tf.math.is_finite(extras))
    return Reduced(summed, norm, finite, extras)


def assign(variable: tf.Variable, value: tf.Tensor) -> None:
    """Assigns to this replica's copy; the value must be the same on every replica.

    `variable.assign` would start a reduction of its own.
    """
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1, with epsilon as in the text after it), as in Keras."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float

    @staticmethod
    def slots(name: str) -> tuple[str, str]:
        """The names of a variable's first and second moment."""
        return f"{name}_m", f"{name}_v"

    def apply(
        self,
        gradients: Mapping[str, tf.Tensor],
        variables: Mapping[str, tf.Variable],
        state: Mapping[str, tf.Variable],
        where: tf.Tensor,
    ) -> None:
        """Updates `variables` and `state` (`count` and the slots) in place, or nothing where `where` is false."""
        count = tf.convert_to_tensor(state["count"])
        step = tf.cast(count + 1, tf.float64)
        powers = [tf.pow(tf.constant(b, tf.float64), step) for b in (self.beta1, self.beta2)]
        for name, gradient in gradients.items():
            m, v = (state[slot] for slot in self.slots(name))

            def scalar(x: float, otherwise: float, dtype: tf.DType = gradient.dtype) -> tf.Tensor:
                return tf.where(where, tf.constant(x, dtype), tf.constant(otherwise, dtype))

            # With the betas at 1, the step size at 0 and the gradient at 0, the kernel writes back what it read:
            # a skipped step costs no copy of the state.
            tf.raw_ops.ResourceApplyAdam(
                var=variables[name].handle,
                m=m.handle,
                v=v.handle,
                beta1_power=tf.cast(powers[0], gradient.dtype),
                beta2_power=tf.cast(powers[1], gradient.dtype),
                lr=scalar(self.learning_rate, 0.0),
                beta1=scalar(self.beta1, 1.0),
                beta2=scalar(self.beta2, 1.0),
                epsilon=tf.constant(self.epsilon, gradient.dtype),
                grad=tf.where(where, gradient, tf.zeros_like(gradient)),
            )
        assign(state["count"], count + tf.cast(where, tf.int64))
